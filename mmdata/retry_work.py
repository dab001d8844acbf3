"""Failed rows fetched once more, as one unit of work: rows of some shards → a tar → the next generation of each shard.

In: a table of failed rows (`retry_rows`), all of one source. Out: what became of them, and `media/retry-<attempt>.tar`
with the media of those that are ok now, committed before any rows file names it. Rows keep row_id and key. Where a
worker dies between two shards, the others' rows still have the status they had, and the next retry fetches them; what
another writer changed meanwhile stands (see `generations`). A row that could not even be asked for keeps the outcome it
had. Raises as `ingest_shard`; a bad row never raises.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from mmdata.block_lists import BlockFiles
from mmdata.columns import ROWS_PER_SHARD_BITS
from mmdata.errors import StoreError
from mmdata.fetch_rows import Found, RowToFetch, fetch_rows
from mmdata.fetched_before import EarlierFiles
from mmdata.fetcher import Watch
from mmdata.generations import publish_generation
from mmdata.host_gate import Gate, own_gate
from mmdata.ingest import IngestCounts, fetched_columns
from mmdata.ingest_journal import IngestJournal
from mmdata.settings import FetchOptions
from mmdata.shard_layout import lay_out
from mmdata.sources.urls import GIVEN
from mmdata.store import Store

__all__ = ["RetryContext", "retry_rows", "retry_schema"]


@dataclass(frozen=True)
class RetryContext:
    """What all retried rows of one source share; pickles. `run` as in PassContext."""

    store: Store
    dataset_id: str
    fetch: FetchOptions
    run: str = ""
    block: BlockFiles | None = None
    earlier: EarlierFiles | None = None
    has_captions: bool = False  # the source names a column of captions


def retry_schema() -> pa.Schema:
    """Of the table of failed rows: `rows_file` is the generation that they were read from, `attempts` those made."""
    text = pa.string()
    fields = [("row_id", pa.int64()), ("key", text), ("url", text), ("attempts", pa.int32()), ("rows_file", text)]
    return pa.schema([*fields, *((name, kind) for name, (kind, _) in GIVEN.items())])


def retry_rows(
    context: RetryContext,
    table: pa.Table,
    attempt: str,
    make_gate: Callable[[], Gate] | None = None,
    *,
    threads: int | None = None,
    watch: Watch | None = None,
    journal: IngestJournal | None = None,
) -> IngestCounts:
    """Fetch the rows of `table` (see `retry_schema`) again and publish their shards' next generations.

    `attempt` is unique to this call; the other arguments are those of `ingest_shard`. The counts are of these rows as
    they are fetched now, whether or not another writer was first.
    """
    started = time.perf_counter()
    store, fetch = context.store, context.fetch
    rows = _to_fetch(table)
    tar_name = f"media/retry-{attempt}.tar"
    with store.scratch() as folder:
        with journal or nullcontext():
            found = fetch_rows(
                rows,
                fetch,
                folder / "media.tar",
                make_gate or own_gate(fetch),
                threads=threads,
                watch=watch,
                journal=journal,
                blocks=context.block.load() if context.block is not None else None,
                earlier=context.earlier.load() if context.earlier is not None else None,
            )
        ordered = [found[index] for index in range(len(rows))]
        if any(f.place is not None for f in ordered) and not store.commit(tar_name, folder / "media.tar"):
            raise StoreError(f"{tar_name} exists in {store.url} already: attempt {attempt!r} was used twice")
    _publish(context, table, ordered, tar_name)
    if journal is not None:
        journal.forget()
    return _counts(ordered, started)


def _to_fetch(table: pa.Table) -> list[RowToFetch]:
    names = ("key", "url", *GIVEN)
    columns = zip(*(table.column(name).to_pylist() for name in names), strict=True)
    return [RowToFetch(index, *values) for index, values in enumerate(columns)]


def _publish(context: RetryContext, table: pa.Table, found: Sequence[Found], tar_name: str) -> None:
    """One generation a shard, of the rows that were asked for."""
    store, fetch = context.store, context.fetch
    columns = fetched_columns(found, fetch, tar_name)
    before = table.select(["row_id", "attempts", "rows_file"]).to_pylist()
    changes: dict[int, dict[int, Mapping[str, Any]]] = {}
    bases: dict[int, str] = {}
    for place, (row, what) in enumerate(zip(before, found, strict=True)):
        if what.prepared.status == "deferred":
            continue
        shard, index = divmod(row["row_id"], 1 << ROWS_PER_SHARD_BITS)
        change = {name: values[place] for name, values in columns.items()}
        change["attempts"] = (row["attempts"] or 0) + (change["attempts"] or 0)
        changes.setdefault(shard, {})[index] = change
        bases[shard] = row["rows_file"]
    computed = () if fetch.compute_hash is None else (fetch.compute_hash,)
    for shard, rows in changes.items():
        done = publish_generation(store, shard, rows, bases[shard], computed=computed)
        if done.changed and fetch.layout != "none":
            lay_out(store, shard, fetch, context.has_captions)


def _counts(found: Sequence[Found], started: float) -> IngestCounts:
    by_status = Counter(f.prepared.status for f in found)
    stored = sum(place[1] for f in found for place in (f.place, f.original_place) if place is not None)
    fetched = sum(f.prepared.size_bytes or 0 for f in found)
    return IngestCounts(len(found), dict(sorted(by_status.items())), stored, fetched, time.perf_counter() - started)
