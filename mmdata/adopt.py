"""One shard of adopted media: a part of somebody's files → base rows that refer to it. No media is copied.

In: a source, one of its parts, and the dataset's extra columns. Out: `rows/<shard>.g0.parquet`, which is the commit
point, as for a fetched shard; there is no tar of ours. Fails as the source's `read` does (SourceError naming the file),
and with StoreError for the folder; a bad row never raises.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mmdata.block_lists import BlockLists
from mmdata.columns import MEDIA_ROLES, ROWS_PER_SHARD_BITS, base_schema, media_reference, row_id
from mmdata.errors import SourceError
from mmdata.ingest import IngestCounts, counts_of, key_of, uid_of
from mmdata.sources.adopted import Adopted, AdoptingSource, Part
from mmdata.store import Store, shard_name, write_parquet

__all__ = ["adopt_shard", "adopted_rows", "with_columns"]


def adopt_shard(
    store: Store,
    shard: int,
    source: AdoptingSource,
    part: Part,
    own: pa.Schema,
    extra: pa.Schema,
    shard_rows: int,
    tick: Callable[[int], None] | None = None,
    blocks: BlockLists | None = None,
) -> IngestCounts:
    """Commit the base rows of one part, unless they are there; returns what became of them.

    `own` are the source's extra columns, `extra` those of the whole dataset. `tick` is told how many rows were read.
    A row that is known to be on one of `blocks` has no media reference.
    """
    started = time.perf_counter()
    rows_name = f"rows/{shard_name(shard)}.g0.parquet"
    if store.exists(rows_name):
        return counts_of(store.read_table(rows_name), started)
    found = source.read(part, own)
    if blocks is not None:
        found = replace(found, rows=[_unless_blocked(row, blocks) for row in found.rows])
    rows = adopted_rows(shard, found, source.kind, extra, shard_rows, part.label)
    if tick is not None:
        tick(len(rows))
    with store.scratch() as folder:
        write_parquet(rows, folder / "rows.parquet")
        if not store.commit(rows_name, folder / "rows.parquet"):
            rows = store.read_table(rows_name)
    return counts_of(rows, started)


def _unless_blocked(row: Mapping[str, Any], blocks: BlockLists) -> dict[str, Any]:
    """The row, or what is left of it when its URL or its bytes are on a list."""
    words = blocks.url(row.get("url")) or blocks.url(row.get("final_url")) or blocks.body(row.get("sha256"))
    if words is None:
        return dict(row)
    gone = {c.name for role in MEDIA_ROLES for c in media_reference(role)} | {"exif"}
    return {**{k: v for k, v in row.items() if k not in gone}, "status": "blocked", "status_detail": words}


def adopted_rows(shard: int, found: Adopted, kind: str, extra: pa.Schema, shard_rows: int, label: str = "") -> pa.Table:
    """Base rows of what a source read: keys and uids where it has none of its own, NULL for what nobody knows."""
    if len(found.rows) > 1 << ROWS_PER_SHARD_BITS:
        raise SourceError(
            f"{label} of the source {kind} has {len(found.rows)} rows, a shard holds at most "
            f"{1 << ROWS_PER_SHARD_BITS}; divide that file"
        )
    own = found.extra.column_names
    paths = found.extra.column("path").to_pylist() if "path" in own else [None] * len(found.rows)
    rows: list[dict[str, Any]] = []
    for index, (row, path) in enumerate(zip(found.rows, paths, strict=True)):
        url, caption = row.get("url"), row.get("caption")
        made = {"attempts": 0, **row, "row_id": row_id(shard, index)}
        made["key"] = row.get("key") or key_of(shard, index, shard_rows)
        place = ("path", path) if url is None else ("url", url)
        made["uid"] = row.get("uid") or uid_of(*place, caption)
        rows.append(made)
    plain = base_schema()
    table = pa.Table.from_pylist(rows, schema=plain)
    beside = with_columns(found.extra, extra)
    schema = base_schema(extra)
    columns = [table.column(f.name) if f.name in plain.names else beside[f.name] for f in schema]
    return pa.table(columns, schema=schema)


def with_columns(table: pa.Table, extra: pa.Schema) -> dict[str, Any]:
    """Every extra column of the dataset by name, NULL throughout where this source does not have it.

    NaN becomes NULL: pandas and NumPy write a missing number so, and to SQL it is above all numbers, so that a missing
    score would pass every threshold and be the best of its cluster. Infinities stay as they are.
    """
    there = table.column_names
    return {f.name: _numbers(table.column(f.name)) if f.name in there else pa.nulls(len(table), f.type) for f in extra}


def _numbers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if not pa.types.is_floating(column.type):
        return column
    return pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
