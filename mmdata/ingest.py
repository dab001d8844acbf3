"""Source rows of one shard → stored media and base rows: fetch, check, resize, append to a tar, commit.

Every input row gives one base row, in input order, whatever becomes of it. The tar is in completion order; the rows
file is the commit point and names the tar of its own attempt.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from mmdata.block_lists import BlockLists
from mmdata.columns import MEDIA_ROLES, fetched_roles, fetched_schema, media_reference, role_of, row_id, uid_of
from mmdata.errors import StoreError
from mmdata.fetch_rows import Beside, Found, RowToFetch, fetch_rows
from mmdata.fetched_before import FetchedBefore
from mmdata.fetcher import Watch
from mmdata.host_gate import Gate, own_gate
from mmdata.ingest_journal import IngestJournal
from mmdata.media.http import Fetched
from mmdata.prepare import Prepared
from mmdata.settings import FetchOptions
from mmdata.sources.urls import GIVEN
from mmdata.store import Store, shard_name, write_parquet

__all__ = ["IngestCounts", "counts_of", "fetched_columns", "ingest_shard", "key_of", "rows_to_fetch", "uid_of"]

_OF_FETCHED = ("http_status", "final_url", "content_type", "attempts", "fetch_ms")
_OF_PREPARED = (
    "size_bytes",
    "sha256",
    "exif",
    "original_width_px",
    "original_height_px",
    "width_px",
    "height_px",
)


@dataclass(frozen=True)
class IngestCounts:
    """What became of a shard's rows. `by_status` sums to `rows`; bytes as stored and as fetched; wall seconds."""

    rows: int
    by_status: dict[str, int] = field(default_factory=dict)
    bytes_stored: int = 0
    bytes_fetched: int = 0
    seconds: float = 0.0


def key_of(shard: int, index: int, shard_rows: int, shard_digits: int = 5) -> str:
    """img2dataset's key: 10^k * shard + index with k = ceil(log10(shard_rows)), zero-padded to shard_digits + k."""
    digits = len(str(shard_rows - 1)) if shard_rows > 1 else 0
    return f"{10**digits * shard + index:0{shard_digits + digits}d}"


def ingest_shard(
    store: Store,
    shard: int,
    table: pa.Table,
    source_kind: str,
    fetch: FetchOptions,
    attempt: str,
    *,
    make_gate: Callable[[], Gate] | None = None,
    threads: int | None = None,
    watch: Watch | None = None,
    journal: IngestJournal | None = None,
    blocks: BlockLists | None = None,
    earlier: FetchedBefore | None = None,
    beside: Beside | None = None,
) -> IngestCounts:
    """Fetch and store the rows of one shard; commits `media/<shard>-<attempt>.tar`, then `rows/<shard>.g0.parquet`.

    `table` has `url` and `caption` and the source's extra columns, and optionally `uid`, the source's own name of each
    row, and the columns of GIVEN. `attempt` is unique to this call. `make_gate` gives what says when a host may be
    asked; None = this call has all of the run's allowances. `watch` is told of rows done. With a `journal`, a picture
    that killed its worker twice has status `decode` and the detail `worker_died`. What is on one of `blocks`, or was
    fetched `earlier`, is not asked for, or not stored. When the rows file exists (another attempt won, or this shard
    was done before), its counts are returned and nothing is fetched or changed. Raises StoreError (disk, folder) and
    RetryableError (no network at all); a bad row never raises.
    """
    started = time.perf_counter()
    rows_name = f"rows/{shard_name(shard)}.g0.parquet"
    if store.exists(rows_name):
        return counts_of(store.read_table(rows_name), started)
    tar_name = f"media/{shard_name(shard)}-{attempt}.tar"
    to_fetch = rows_to_fetch(shard, table, fetch)
    known = _known(to_fetch, earlier)
    with store.scratch() as folder:
        with journal or nullcontext():
            found = known | fetch_rows(
                [row for row in to_fetch if row.index not in known],
                fetch,
                folder / "media.tar",
                make_gate or own_gate(fetch),
                threads=threads,
                watch=watch,
                journal=journal,
                blocks=blocks,
                earlier=earlier,
                beside=beside,
            )
        ordered = [found[index] for index in range(len(table))]
        rows = _base_rows(shard, table, source_kind, fetch, ordered, tar_name)
        if any(f.place is not None for f in ordered) and not store.commit(tar_name, folder / "media.tar"):
            raise StoreError(f"{tar_name} exists in {store.url} already: attempt {attempt!r} was used twice")
        write_parquet(rows, folder / "rows.parquet")
        if not store.commit(rows_name, folder / "rows.parquet"):
            rows = store.read_table(rows_name)
    if journal is not None:
        journal.forget()
    return counts_of(rows, started)


def rows_to_fetch(shard: int, table: pa.Table, fetch: FetchOptions) -> list[RowToFetch]:
    """What is to be fetched for each row of a shard's table."""
    names = table.column_names
    urls = table.column("url").to_pylist()
    hashes, boxes = (table.column(n).to_pylist() if n in names else [None] * len(urls) for n in GIVEN)
    given = table.select([n for n in names if n not in GIVEN]).to_pylist() if fetch.layout != "none" else None
    digits = fetch.oom_shard_count
    return [
        RowToFetch(i, key_of(shard, i, fetch.shard_rows, digits), url, hashes[i], boxes[i], given[i] if given else {})
        for i, url in enumerate(urls)
    ]


def _known(rows: Sequence[RowToFetch], earlier: FetchedBefore | None) -> dict[int, Found]:
    """Rows whose URLs were fetched for another dataset: nothing is sent for them."""
    if earlier is None:
        return {}
    words = earlier.urls([row.url for row in rows])
    return {
        row.index: Found(Fetched("filtered", said), Prepared("filtered", said))
        for row, said in zip(rows, words, strict=True)
        if said is not None
    }


def fetched_columns(found: Sequence[Found], fetch: FetchOptions, tar_name: str) -> dict[str, list[Any]]:
    """The base columns that fetching fills, a value per row; media references lead into `tar_name`."""
    made: dict[str, list[Any]] = {
        "status": [f.prepared.status for f in found],
        "status_detail": [f.prepared.detail for f in found],
    }
    for name in _OF_FETCHED:
        made[name] = [getattr(f.fetched, name) for f in found]
    for name in _OF_PREPARED:
        made[name] = [getattr(f.prepared, name) for f in found]
    if fetch.compute_hash is not None:
        made[fetch.compute_hash] = [f.prepared.extra_hash for f in found]
    for role in fetched_roles(fetch.media, fetch.store):
        parts = [_reference(f, role, fetch, tar_name) for f in found]
        for number, column in enumerate(media_reference(role)):
            made[column.name] = [part[number] for part in parts]
    return made


def _reference(found: Found, role: str, fetch: FetchOptions, tar_name: str) -> tuple[Any, ...]:
    """Path, offset, size and extension of one role's media; all None where the row has none."""
    if role == "original":
        place, ext = found.original_place, found.prepared.original_ext
    else:
        ext = found.prepared.ext
        place = found.place if ext is not None and role_of(fetch.media, ext) == role else None
    return (None,) * 4 if place is None else (tar_name, *place, ext)


def _base_rows(
    shard: int, table: pa.Table, source_kind: str, fetch: FetchOptions, found: list[Found], tar_name: str
) -> pa.Table:
    urls, captions = table.column("url").to_pylist(), table.column("caption").to_pylist()
    given = table.column("uid").to_pylist() if "uid" in table.column_names else [None] * len(table)
    kind = "url" if source_kind in ("urls", "url") else "path"
    made = fetched_columns(found, fetch, tar_name) | {
        "row_id": [row_id(shard, i) for i in range(len(table))],
        "key": [key_of(shard, i, fetch.shard_rows, fetch.oom_shard_count) for i in range(len(table))],
        "uid": [own or uid_of(kind, u, c) for own, u, c in zip(given, urls, captions, strict=True)],
    }
    extra = pa.schema([f for f in table.schema if f.name not in ("url", "caption", "uid", *GIVEN)])
    schema = fetched_schema(extra, fetch.media, fetch.store, fetch.compute_hash)
    columns = [
        table.column(f.name) if f.name in table.column_names and f.name not in made else pa.array(made[f.name], f.type)
        for f in schema
    ]
    return pa.table(columns, schema=schema)


def counts_of(rows: pa.Table, started: float) -> IngestCounts:
    """What became of these base rows; `started` is when the work on them began, by `time.perf_counter`."""
    sizes = {f"{role}_size" for role in MEDIA_ROLES} & set(rows.column_names)
    return IngestCounts(
        rows=len(rows),
        by_status=dict(sorted(Counter(rows.column("status").to_pylist()).items())),
        bytes_stored=sum(sum(rows.column(name).drop_null().to_pylist()) for name in sizes),
        bytes_fetched=sum(rows.column("size_bytes").drop_null().to_pylist()),
        seconds=time.perf_counter() - started,
    )
