"""The segments of the coverage log: `state/coverage/00007-<run>.parquet`, written once, read whole, merged when many.

In: entries as Arrow tables of `SCHEMA`. Out: one table of all entries, oldest first. A segment is a commit: it is there
whole or not at all. A merged segment names in its footer those it replaces, so that a reader may find them beside it or
gone. StoreError when a segment is torn; it may then be removed, because footers say the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from mmdata.column_files import write_parquet
from mmdata.errors import StoreError
from mmdata.store import Store

__all__ = ["FOLDER", "SCHEMA", "Segments", "read_segments", "replaced_segments", "write_segment"]

FOLDER = "state/coverage"
_REPLACES = "mmdata.replaces"

SCHEMA = pa.schema(
    [
        ("kind", pa.string()),  # rows, columns, pass or verdict
        ("key", pa.string()),  # columns: the set; pass and verdict: the hash of the steps so far
        ("shard", pa.int64()),
        ("number", pa.int64()),  # rows, columns: g or c
        ("size", pa.int64()),  # rows, columns, verdict: of the file, in bytes
        ("stamp", pa.int64()),
        ("inputs", pa.uint64()),  # pass, verdict: the marks of all files it went by
        ("rows", pa.int64()),
        ("covered", pa.int64()),  # rows: status ok; columns: covered; verdict: unsettled rows
        ("digest", pa.binary(32)),  # columns: the covered_digest
        ("hash", pa.string()),  # columns: the full identity
        ("name", pa.string()),  # verdict: the file
        ("key_min", pa.string()),  # rows: the smallest and largest key
        ("key_max", pa.string()),
        ("sums", pa.list_(pa.int64())),  # pass: rows, alive, then rows in and failed of each step
        ("counts", pa.string()),  # verdict: JSON of [verdict, position, reason, rows]
    ]
)


@dataclass
class Segments:
    """The names of the segments that count, oldest first, and all their entries in that order."""

    names: list[str] = field(default_factory=list)
    entries: pa.Table = field(default_factory=SCHEMA.empty_table)


def read_segments(store: Store) -> Segments:
    """What the log says now. A segment that goes away meanwhile was merged: then the newer one is read."""
    names = _listed(store)
    replaced = replaced_segments(store, names)
    counting = [name for name in names if name not in replaced]
    tables = []
    for name in counting:
        try:
            table = store.read_table(name)
        except StoreError:
            if not store.exists(name) and _listed(store) != names:
                return read_segments(store)
            raise
        if table.schema.remove_metadata() != SCHEMA:
            raise StoreError(f"{name} of {store.url} is no segment of the coverage log; remove it and run again")
        tables.append(table.replace_schema_metadata(None))
    return Segments(counting, pa.concat_tables(tables) if tables else SCHEMA.empty_table())


def _listed(store: Store) -> list[str]:
    return [f"{FOLDER}/{name}" for name in store.list(FOLDER) if name.endswith(".parquet")]


def replaced_segments(store: Store, names: Sequence[str]) -> set[str]:
    """Those of these segments that another one of them replaces."""
    replaced: set[str] = set()
    for name in names:
        replaced.update(json.loads(store.footer(name).get(_REPLACES, "[]")))
    return replaced & set(names)


def write_segment(store: Store, run: str, names: Sequence[str], entries: pa.Table, replaces: Sequence[str] = ()) -> str:
    """Commit a segment after those of these names; its name."""
    number = max((int(name.rpartition("/")[2].split("-")[0]) for name in names), default=-1) + 1
    made = f"{FOLDER}/{number:05d}-{run}.parquet"
    with store.scratch() as folder:
        metadata = {_REPLACES: json.dumps(list(replaces))} if replaces else None
        write_parquet(entries, folder / "segment.parquet", metadata)
        store.commit(made, folder / "segment.parquet")
    return made
