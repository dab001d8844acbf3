"""The columns that every duplicate group writes, made from each row's first row: one of its own, or an older one."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mmdata.stage import OlderRows

__all__ = ["cluster_columns", "cluster_schema", "older_columns"]

Positions = npt.NDArray[np.int64]

_WRITES = "{0}_id: int64, {0}_rank: int32, {0}_count: int64, {0}_of: string"


def cluster_schema(label: str, against: bool, more: str = "") -> str:
    """The columns of `cluster_columns` or `older_columns`, as `parse_schema` reads them; `more` are the group's own."""
    return ", ".join(filter(None, [_WRITES.format(label), f"{label}_against: string" if against else "", more]))


def cluster_columns(label: str, table: pa.Table, first: Positions) -> dict[str, Any]:
    """`<label>_id`, `_rank`, `_count`, `_of` of rows in visit order.

    `table` has row_id and key; `first`, (N,) int64, is the position of the row that opened each row's cluster, its own
    for a row that opened one. `_id` is that row's row_id, `_of` its key; `_rank` counts from 1 in visit order.
    """
    rank, sizes = _ranks(first)
    at = pa.array(first)
    return {
        f"{label}_id": table.column("row_id").take(at),
        f"{label}_rank": rank.astype(np.int32),
        f"{label}_count": sizes,
        f"{label}_of": table.column("key").take(at),
    }


def older_columns(label: str, table: pa.Table, first: Positions, place: Positions, older: OlderRows) -> dict[str, Any]:
    """`cluster_columns` where some clusters have an older row first, and `<label>_against`, the dataset it is in.

    `place`, (N,) int64, is the place of that row in `older`, -1 for rows whose cluster `first` tells. The older row has
    rank 1, the rows of this dataset follow from 2; the count is theirs and one.
    """
    is_older = place >= 0
    places, which = np.unique(place[is_older], return_inverse=True)
    codes = first.copy()
    codes[is_older] = len(first) + which
    rank, sizes = _ranks(codes)
    found = older.look_up(places)
    at = pa.array(codes)

    def taken(own: pa.ChunkedArray, theirs: pa.ChunkedArray) -> pa.ChunkedArray:
        return pa.chunked_array([*own.chunks, *theirs.chunks], own.type).take(at)

    nothing = pa.chunked_array([pa.nulls(len(first), pa.string())])
    return {
        f"{label}_id": taken(table.column("row_id"), found.column("row_id")),
        f"{label}_rank": (rank + is_older).astype(np.int32),
        f"{label}_count": sizes + is_older,
        f"{label}_of": taken(table.column("key"), found.column("key")),
        f"{label}_against": taken(nothing, found.column("dataset")),
    }


def _ranks(cluster: Positions) -> tuple[Positions, Positions]:
    """Rank, from 1 in visit order, and size of each row's cluster; `cluster` numbers them, below 2 N."""
    sizes = np.bincount(cluster, minlength=1)
    by_cluster = np.argsort(cluster, kind="stable")
    begins = np.cumsum(sizes) - sizes
    rank = np.empty(len(cluster), np.int64)
    rank[by_cluster] = np.arange(len(cluster)) - begins[cluster[by_cluster]] + 1
    return rank, sizes[cluster].astype(np.int64)
