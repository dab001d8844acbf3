"""The columns that every duplicate group writes, made from each row's first row."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = ["cluster_columns"]


def cluster_columns(label: str, table: pa.Table, first: npt.NDArray[np.int64]) -> dict[str, Any]:
    """`<label>_id`, `_rank`, `_count`, `_of` of rows in visit order.

    `table` has row_id and key; `first`, (N,) int64, is the position of the row that opened each row's cluster, its own
    for a row that opened one. `_id` is that row's row_id, `_of` its key; `_rank` counts from 1 in visit order.
    """
    rows = len(first)
    sizes = np.bincount(first, minlength=rows) if rows else np.zeros(0, np.int64)
    by_cluster = np.argsort(first, kind="stable")
    begins = np.cumsum(sizes) - sizes
    rank = np.empty(rows, np.int64)
    rank[by_cluster] = np.arange(rows) - begins[first[by_cluster]] + 1
    at = pa.array(first)
    return {
        f"{label}_id": table.column("row_id").take(at),
        f"{label}_rank": rank.astype(np.int32),
        f"{label}_count": sizes[first].astype(np.int64),
        f"{label}_of": table.column("key").take(at),
    }
