"""What every duplicate group shares: the options that say which row of a cluster stays, and the columns it writes.

The columns are made from each row's first row: one of its own, or an older one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import ConfigDict, Field, model_validator

from mmdata.stage import OlderRows, Options, OrderBy

__all__ = ["VisitOrder", "cluster_columns", "cluster_remark", "cluster_schema", "older_columns", "remark_of"]

Positions = npt.NDArray[np.int64]

# Of the picture as fetched: an ingest that resizes makes the stored sides alike.
_LARGEST = "coalesce(original_width_px, width_px) * coalesce(original_height_px, height_px) desc"


class VisitOrder(Options):
    """Options of a group that keeps one row of a cluster: which comes first.

    `keep` is short for one term of `prefer`, and is that term once read: the same rows, the same identity. A group
    that knows further values of `keep` lists them as `own_orders`; the first of them is what None means.
    """

    own_orders: ClassVar[tuple[str, ...]] = ()

    model_config = ConfigDict(json_schema_extra={"not": {"required": ["keep", "prefer"]}})

    keep: Literal["largest", "first"] | dict[Literal["best"], str] | None = Field(
        None,
        description="short for prefer: largest (picture, in px), first (row), or {best: column} (the highest value)",
    )
    prefer: list[OrderBy] = Field([], description="SQL ordering terms: rows are visited in this order, ties by row_id")

    @model_validator(mode="before")
    @classmethod
    def _keep_as_order(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or given.get("keep") is None:
            return given
        rest = {name: value for name, value in given.items() if name != "keep"}
        if rest.get("prefer"):
            raise ValueError("keep and prefer both say which row stays; give one of them")
        keep = given["keep"]
        if keep in cls.own_orders:
            return given if cls.own_orders.index(keep) else rest
        if keep == "first":
            return rest
        if keep == "largest":
            return {**rest, "prefer": [_LARGEST]}
        best = keep.get("best") if isinstance(keep, Mapping) and len(keep) == 1 else None
        if not isinstance(best, str) or not best:
            words = dict.fromkeys([*cls.own_orders, "largest", "first"])
            raise ValueError(f"keep: expected {', '.join(words)} or {{best: <column>}}, got {keep!r}")
        quoted = best.replace('"', '""')
        return {**rest, "prefer": [f'"{quoted}" desc']}


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


def cluster_remark(label: str, columns: Mapping[str, Any]) -> str:
    """`812,004 clusters, the largest of 10,021 rows (first: 00012)`, of `cluster_columns` or `older_columns`."""
    counts, ranks = np.asarray(columns[f"{label}_count"]), np.asarray(columns[f"{label}_rank"])
    if not len(counts):
        return "no rows"
    # A cluster of n rows has one of rank n, also where its first row is an older one.
    clusters = int((ranks == counts).sum())
    largest = int(np.argmax(counts))
    return remark_of(clusters, int(counts[largest]), str(columns[f"{label}_of"][largest]))


def remark_of(clusters: int, largest: int, first: str) -> str:
    """What a run says of so many clusters; `first` is the key of the first row of the largest."""
    return f"{clusters:,} clusters, the largest of {largest:,} rows (first: {first})"


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
