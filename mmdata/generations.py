"""Generations of base rows: how rows change after ingest, without a row ever being lost, moved or rewritten.

In: a shard, the rows file that the changes were made from, and per row index the columns to change. Out: the next
`rows/<shard>.g<n+1>.parquet`, published only if its name is free; the highest number is the shard's newest. A shard
keeps its row count and order, and every row its row_id and key. What may change:

- a *failed* row: its status and what fetching found out (`FETCHED`), among that its media reference, which names a tar
  committed before (a retry). The source's own columns (url, caption, uid, extras) never change.
- any row → `purged`: row_id and key stay, all else is NULL. A purged row stays purged.
- an *ok* row: only where its bytes lie, and only if the very same bytes lie there (so that a purge can leave a tar
  behind that holds purged bytes, and `mmdata clean` can remove it).

Two writers: the loser reads the winner's file and applies its changes to that. A row that the winner changed is left
as the winner has it, and told as `overtaken`; a purge is never overtaken. StoreError, and nothing is written, for any
other change, for a reference that leads nowhere, or for a row that is not there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from mmdata.column_files import shard_name, write_parquet
from mmdata.columns import MEDIA_ROLES, STATUSES, media_reference
from mmdata.errors import StoreError
from mmdata.store import Store

__all__ = ["FETCHED", "PURGE", "Generation", "newest_rows", "publish_generation"]

_REFERENCES = frozenset(c.name for role in MEDIA_ROLES for c in media_reference(role))
FETCHED = _REFERENCES | {
    "status",
    "status_detail",
    "http_status",
    "final_url",
    "content_type",
    "size_bytes",
    "sha256",
    "exif",
    "original_width_px",
    "original_height_px",
    "width_px",
    "height_px",
    "attempts",
    "fetch_ms",
}
PURGE: Mapping[str, Any] = {"status": "purged"}  # the whole change of a row that is purged
_KEPT = ("row_id", "key")
_PLACE = re.compile(rf"({'|'.join(MEDIA_ROLES)})_(path|offset)")

Row = dict[str, Any]
Changes = Mapping[int, Mapping[str, Any]]


@dataclass(frozen=True)
class Generation:
    """The newest rows file of a shard. `changed` rows were changed by this call; `overtaken` ones by another writer."""

    name: str
    number: int
    changed: tuple[int, ...] = ()
    overtaken: tuple[int, ...] = ()


def newest_rows(store: Store, shard: int) -> Generation:
    """The newest rows file of a shard; StoreError when the shard has none."""
    name = store.row_files().get(shard)
    if name is None:
        raise StoreError(f"{store.url} has no rows of shard {shard_name(shard)}; run the recipe first")
    return Generation(name, _number(name))


def _newest_since(store: Store, shard: int, base: str) -> Generation:
    """The newest rows file of a shard that had `base`: looked for by name, for a retry may ask for very many shards."""
    name, number = base, _number(base)
    while store.exists(later := f"rows/{shard_name(shard)}.g{number + 1}.parquet"):
        name, number = later, number + 1
    return Generation(name, number)


def _number(name: str) -> int:
    return int(name.rpartition(".g")[2].removesuffix(".parquet"))


def publish_generation(
    store: Store,
    shard: int,
    changes: Changes | pa.Table,
    base: str | None = None,
    read_media: Callable[[str, int, int], bytes] | None = None,
    computed: Collection[str] = (),
) -> Generation:
    """Change rows of a shard, by index from 0, as its next generation; returns what is the newest then.

    `changes`: index → column → value (`PURGE` for a purge), or a table with `row_id` and the columns to set. A change
    that gives a failed row a status speaks of the whole fetch: columns of `FETCHED` it does not name become NULL.
    `base` is the rows file the changes were made from; None = the newest. `read_media(path, offset, size)` reads media
    that lies outside the dataset, needed only to move an ok row's reference there; None = the store's own alone.
    Nothing is written when no change is left: the same changes twice are one generation. `computed`: further columns
    of this dataset that fetching fills (`fetch.compute_hash`).
    """
    fetched = FETCHED | set(computed)
    newest = newest_rows(store, shard) if base is None else _newest_since(store, shard, base)
    wanted = _by_index(changes, shard, store)
    read = partial(_read, store, read_media)
    table = store.read_table(base or newest.name)
    _check(f"{base or newest.name} of {store.url}", table, wanted, read, store, fetched)
    seen = _take(table, wanted)
    while True:
        rows = store.read_table(newest.name)
        now = _take(rows, wanted)
        overtaken = [i for i in wanted if now[i] != seen[i] and not _is_purge(wanted[i])]
        changed = [i for i in wanted if i not in overtaken and _applied(now[i], wanted[i], fetched) != now[i]]
        done = Generation(newest.name, newest.number, tuple(sorted(changed)), tuple(sorted(overtaken)))
        if not changed:
            return done
        name = f"rows/{shard_name(shard)}.g{newest.number + 1}.parquet"
        with store.scratch() as folder:
            after = {i: _applied(now[i], wanted[i], fetched) for i in changed}
            write_parquet(_replaced(rows, after), folder / "rows.parquet")
            if store.commit(name, folder / "rows.parquet"):
                return Generation(name, newest.number + 1, done.changed, done.overtaken)
        newest = newest_rows(store, shard)  # the winner made progress, so this ends


def _by_index(changes: Changes | pa.Table, shard: int, store: Store) -> dict[int, dict[str, Any]]:
    if not isinstance(changes, pa.Table):
        return {int(i): dict(row) for i, row in changes.items()}
    if "row_id" not in changes.column_names:
        raise StoreError(f"changes of {store.url}, shard {shard_name(shard)}: the table has no column row_id")
    found: dict[int, dict[str, Any]] = {}
    for row in changes.to_pylist():
        number, index = divmod(row.pop("row_id"), 1 << 24)
        if number != shard or index in found:
            raise StoreError(
                f"changes of {store.url}: row {index} of shard {number} is "
                f"{'named twice' if number == shard else f'not of shard {shard_name(shard)}'}"
            )
        found[index] = row
    return found


def _take(table: pa.Table, wanted: Iterable[int]) -> dict[int, Row]:
    indexes = sorted(wanted)
    rows: list[Row] = table.take(pa.array(indexes, pa.int64())).to_pylist()
    return dict(zip(indexes, rows, strict=True))


def _is_purge(change: Mapping[str, Any]) -> bool:
    return change.get("status") == "purged"


def _applied(row: Row, change: Mapping[str, Any], fetched: Collection[str]) -> Row:
    if _is_purge(change):
        return {name: row[name] if name in _KEPT else change.get(name) for name in row}
    forgotten = fetched if row["status"] != "ok" and "status" in change else ()
    return {name: change.get(name, None if name in forgotten else value) for name, value in row.items()}


def _replaced(table: pa.Table, rows: Mapping[int, Row]) -> pa.Table:
    """`table` with these rows in place of its own, same order and schema."""
    columns = []
    changed = pa.Table.from_pylist(list(rows.values()), schema=table.schema)
    choice = list(range(len(table)))
    for place, index in enumerate(rows):
        choice[index] = len(table) + place
    for name in table.column_names:
        chunks = [*table.column(name).chunks, *changed.column(name).chunks]
        both = pa.chunked_array(chunks, table.schema.field(name).type)
        columns.append(both.take(pa.array(choice, pa.int64())))
    return pa.table(columns, schema=table.schema)


def _read(
    store: Store, outside: Callable[[str, int, int], bytes] | None, path: str, offset: int, size: int
) -> bytes | None:
    """The bytes of a reference; None where nobody can read them."""
    if "://" in path or path.startswith("/"):
        return outside(path, offset, size) if outside is not None else None
    return store.read_range(path, offset, size)


def _check(
    where: str,
    table: pa.Table,
    wanted: Mapping[int, Mapping[str, Any]],
    read: Callable[[str, int, int], bytes | None],
    store: Store,
    fetched: Collection[str],
) -> None:
    """StoreError for the first change that is not allowed, or that cannot be true."""
    outside = [i for i in wanted if not 0 <= i < len(table)]
    if outside:
        raise StoreError(f"{where} has {len(table)} rows, there is no row {outside[0]} to change")
    there: dict[str, bool] = {}
    for index, row in _take(table, wanted).items():
        fault = _fault(row, wanted[index], table.schema, fetched)
        if fault is None:
            after = _applied(row, wanted[index], fetched)
            fault = _lost_reference(after, store, there) if after["status"] == "ok" else None
            if fault is None and row["status"] == "ok" and after["status"] == "ok":
                fault = _other_bytes(row, after, read)
        if fault is not None:
            raise StoreError(f"{where}: row {index} (key {row['key']}, status {row['status']}) {fault}")


def _fault(row: Row, change: Mapping[str, Any], schema: pa.Schema, fetched: Collection[str]) -> str | None:
    """What is wrong with the change of one row, by itself."""
    unknown = [name for name in change if name not in schema.names]
    if unknown:
        return f"has no column {unknown[0]!r}"
    for name, value in change.items():
        try:
            pa.array([value], schema.field(name).type)
        except (pa.ArrowException, OverflowError):
            return f"cannot have {name} {value!r}: expected {schema.field(name).type}"
    if _is_purge(change):
        told = [n for n, v in change.items() if n != "status" and v != (row[n] if n in _KEPT else None)]
        return f"is to be purged: it keeps row_id and key, and its {told[0]} must become NULL" if told else None
    if row["status"] == "purged":
        return "is purged and stays so"
    fixed = [name for name in change if name not in fetched and change[name] != row[name]]
    if fixed:
        return f"keeps its {fixed[0]}: a generation changes what fetching found out, nothing else"
    after = _applied(row, change, fetched)
    if after["status"] not in STATUSES:
        return f"cannot have the status {after['status']!r}; known: {', '.join(STATUSES)}"
    if row["status"] == "ok":
        moved = [n for n in change if change[n] != row[n] and not _PLACE.fullmatch(n)]
        return f"is stored already: only the place of its bytes may change, not its {moved[0]}" if moved else None
    if after["status"] != "ok" and any(after.get(name) is not None for name in _REFERENCES):
        return f"has failed ({after['status']}), so it cannot have a media reference"
    return None


def _lost_reference(after: Row, store: Store, there: dict[str, bool]) -> str | None:
    """What is wrong with the references of a row that is to be ok: incomplete, none, or to a file that is not there."""
    found = 0
    for role in MEDIA_ROLES:
        path, offset, size, ext = (after.get(c.name) for c in media_reference(role))
        if path is None and offset is None and size is None:
            continue
        if path is None or offset is None or size is None or ext is None or offset < 0 or size < 1:
            return f"cannot be ok with the {role} reference {(path, offset, size, ext)}"
        if "://" not in path and not path.startswith("/") and not there.setdefault(path, store.exists(path)):
            return f"cannot be ok: {path} is not there; commit the media before the rows"
        found += 1
    return None if found else "cannot be ok without a media reference"


def _other_bytes(row: Row, after: Row, read: Callable[[str, int, int], bytes | None]) -> str | None:
    for role in MEDIA_ROLES:
        names = [f"{role}_{part}" for part in ("path", "offset", "size")]
        (old_path, old_offset, size), (path, offset, _) = ([r.get(n) for n in names] for r in (row, after))
        if (old_path, old_offset) != (path, offset):
            before = read(str(old_path), int(old_offset or 0), int(size or 0))
            if before is None or before != read(str(path), int(offset or 0), int(size or 0)):
                return f"is stored already, and other bytes lie at {path}, byte {offset}"
    return None
