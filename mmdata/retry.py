"""`mmdata retry`: failed rows of a dataset are fetched again, then its recipe runs, which computes just these rows.

In: a dataset that a run has been over, the statuses to try again, and how to fetch now (options that never change what
is stored). Out: new generations of the shards that have such rows (same row_id and key), then the selection of the
recipe that ran last, brought up to date. Rows of several shards are fetched together, in one schedule and into one tar,
for there are few in each. Stopped at any moment, the same command goes on: what was published is no failure any more.
RecipeError for a status that is never tried again, an option that decides what is stored, or a dataset whose recipe is
not known; else as `mmdata.run`.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import yaml

from mmdata.columns import ROWS_PER_SHARD_BITS, STATUSES
from mmdata.driver import RunOptions, execute
from mmdata.errors import RecipeError, SourceError, StoreError, nearest
from mmdata.feed import Feed
from mmdata.fetched_before import FetchedBefore
from mmdata.host_state import HostKeeper
from mmdata.lease import Lease
from mmdata.ledger import Current, dataset_document
from mmdata.pool import Item, Runner
from mmdata.preflight import Proved, prove
from mmdata.progress import FetchLine, Progress
from mmdata.publish import MANIFEST
from mmdata.recipe import Recipe, document_of, parse, with_overrides
from mmdata.repeats import Repeats
from mmdata.retry_work import RetryContext, retry_schema
from mmdata.run_record import write_record
from mmdata.settings import FetchOptions
from mmdata.sources.places import absolute
from mmdata.sources.urls import GIVEN
from mmdata.store import Store

if TYPE_CHECKING:
    from mmdata.dataset import Dataset

__all__ = ["PASSING", "Refetched", "Retried", "retry"]

PASSING = ("deferred", "dns", "connect", "timeout", "http_429", "http_5xx")  # what another day may end otherwise
_NEVER = {
    "ok": "they are stored",
    "opted_out": "their hosts asked not to be used, and are not asked again",
    "purged": "they were removed on request",
    "missing_media": "they were adopted, not fetched",
}


@dataclass
class Refetched:
    """What became of the rows that were fetched again; `by_status` sums to `rows`."""

    rows: int = 0
    by_status: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0


@dataclass(frozen=True)
class Retried:
    """A retry that came to its end. `stale_export`: the recipe's export, where it was not brought up to date."""

    dataset: Dataset
    refetched: Refetched
    stale_export: str | None = None


def retry(
    path: str,
    errors: Sequence[str] = (),
    *,
    overrides: Sequence[str] = (),
    runner: Runner = "ray",
    workers: int | None = None,
    address: str | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    quiet: bool = True,
) -> Retried:
    """Fetch the rows of the dataset at `path` again whose status is one of `errors`, then run its recipe.

    No `errors`: `PASSING`. `overrides`: `--set fetch.…`, for this time only. The recipe's export is brought up to date
    where it stands at its path, seen from the current folder.
    """
    from mmdata.dataset import Dataset, export_of

    statuses = _checked(errors)
    proved = _prove_again(path)
    recipe, options = proved.plan.recipe, RunOptions(runner, workers, address, device)
    fetch = _fetch_now(recipe, overrides)
    is_there = recipe.export is not None and os.path.exists(os.path.join(recipe.export.path, MANIFEST))
    with Progress(quiet=quiet) as progress:
        refetched = _Retry(proved, frozenset(statuses), options, progress, fetch).run()
        exported = recipe if is_there else recipe.model_copy(update={"export": None})
        report = execute(proved, options, progress, export_of(exported, progress))
    made = Dataset(recipe.dataset, recipe.name)
    made.report = report
    return Retried(made, refetched, None if is_there or recipe.export is None else recipe.export.path)


def _checked(names: Sequence[str]) -> tuple[str, ...]:
    """The statuses as they are named, checked; none = those that pass."""
    for name in names:
        if name not in STATUSES:
            raise RecipeError(f"--error: no status is called {name!r}{nearest(name, STATUSES)}")
        if name in _NEVER:
            raise RecipeError(f"--error: rows with the status {name} are never fetched again: {_NEVER[name]}")
    return tuple(dict.fromkeys(names)) or PASSING


def _prove_again(path: str) -> Proved:
    """The recipe that was run last over the dataset at `path`, proved as it stands now; without its export.

    Its export is not looked at, so that `Proved.plan.recipe` still has it as it was written.
    """
    store = Store(path)
    document = dataset_document(store)
    if document is None:
        raise SourceError(f"there is no dataset at {store.url}; make one with mmdata run RECIPE")
    recipe = _recorded(store)
    if recipe.fetch.backend != "mmdata":
        raise RecipeError(
            f"{store.url} was fetched by {recipe.fetch.backend}, and rows of one dataset are made one way"
        )
    written = document_of(recipe)
    if Store(recipe.dataset).url != store.url:
        written["dataset"] = path
    several = written["source"] if isinstance(written["source"], list) else [written["source"]]
    for source, entry in zip(several, document.sources, strict=False):
        known = entry.get("location")
        if known and absolute(source["path"]) != known:  # it was run from another folder
            source["path"] = known
    recipe = parse(written, where=f"the recipe of {store.url}")
    proved = prove(recipe.model_copy(update={"export": None}))
    return replace(proved, plan=replace(proved.plan, recipe=recipe))


def _recorded(store: Store) -> Recipe:
    """The recipe of the latest selection, else of the last run that was stopped before there was one."""
    current = Current.load(store)
    if current is not None:
        return parse(yaml.safe_load(current.recipe), where=f"the recipe of {store.url}")
    for name in reversed(store.list("runs")):
        try:
            return parse(json.loads(store.read(f"runs/{name}"))["recipe"], where=f"runs/{name} of {store.url}")
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"runs/{name} of {store.url} is damaged ({error}); remove it") from None
    raise RecipeError(f"{store.url} does not say which recipe made it; run that recipe to its end first")


def _fetch_now(recipe: Recipe, overrides: Sequence[str]) -> FetchOptions:
    """The recipe's `fetch` with `--set fetch.…`; RecipeError for an option that decides what is stored."""
    allowed = sorted(FetchOptions.OPERATIONAL)
    for assignment in overrides:
        place, _, name = assignment.partition("=")[0].strip().partition(".")
        option = name.split(".")[0]
        if place != "fetch" or option not in FetchOptions.OPERATIONAL:
            cure = nearest(option, allowed) or f"; those that only say how to fetch: {', '.join(allowed)}"
            raise RecipeError(f"--set {assignment}: a retry does not change what is stored{cure}")
    return parse(with_overrides(document_of(recipe), overrides), where="--set").fetch


class _Retry:
    """One retry, from the failed rows to their new generations."""

    def __init__(
        self, proved: Proved, statuses: frozenset[str], options: RunOptions, progress: Progress, fetch: FetchOptions
    ) -> None:
        self._proved, self._statuses, self._options, self._fetch = proved, statuses, options, fetch
        self._store = proved.store
        self._id = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}-retry"
        self._line = FetchLine(progress)
        self._done = Refetched()
        self._seconds = 0.0
        self._held: FetchedBefore | None = None

    def run(self) -> Refetched:
        """Fetch the rows, a shard's worth of them at a time."""
        began, started, status = time.monotonic(), datetime.now(UTC), "stopped"
        options = self._options
        repeats = Repeats(self._store, {}, [])
        feed = Feed(options.runner, options.workers, options.address, options.device, repeats, self._line)
        feed.contexts |= {f"retry {n}": self._context(n) for n in range(len(self._proved.document.sources))}
        with Lease.acquire(self._store, self._id) as lease, HostKeeper(self._store, self._id, self._fetch) as hosts:
            feed.lease, feed.desk = lease, hosts.desk
            try:
                for finished in feed.drive(self._items(), deque()):
                    counts = finished.result
                    self._done.rows += counts.rows
                    self._done.by_status.update(counts.by_status)
                    self._seconds += counts.seconds
                    self._line.finish(counts.rows, counts.by_status.get("ok", 0), counts.bytes_fetched)
                status = "done"
            finally:
                feed.close()
                self._line.end()
                if self._done.rows or status != "done":
                    self._record(status, started, time.monotonic() - began)
        self._done.seconds = time.monotonic() - began
        return self._done

    def _record(self, status: str, started: datetime, seconds: float) -> None:
        facts = {"by_status": dict(self._done.by_status), "ingest_seconds": round(self._seconds, 3), "media_reads": 0}
        facts |= {"steps": [], "retried": sorted(self._statuses)}
        recipe = self._proved.plan.recipe
        write_record(self._store, self._id, status, started, seconds, self._options.runner, recipe, facts)

    def _context(self, number: int) -> RetryContext:
        proved, options = self._proved, self._options
        captions = proved.plan.recipe.sources[number].has_captions
        run = "" if options.runner == "inline" else self._id
        return RetryContext(self._store, proved.document.id, self._fetch, run, proved.block, proved.earlier, captions)

    # Which rows

    def _items(self) -> Iterator[Item]:
        """The failed rows of consecutive shards of a source, until they are as many as a shard has."""
        newest, most = self._store.row_files(), self._fetch.shard_rows
        for number, shards in self._shards(newest):
            held: list[pa.Table] = []
            for table in self._failed(number, shards, newest):
                if held and sum(map(len, held)) + len(table) > most:
                    yield self._item(number, held)
                    held = []
                held.append(table)
            if held:
                yield self._item(number, held)

    def _item(self, number: int, tables: list[pa.Table]) -> Item:
        if self._proved.earlier is not None and self._held is None:
            self._held = self._proved.earlier.load()  # once for all workers of this machine
        self._line.begin()
        rows = pa.concat_tables(tables).combine_chunks()
        shard = rows.column("row_id")[0].as_py() >> ROWS_PER_SHARD_BITS
        return Item("ingest", f"retry {number}", shard, rows, attempt=f"{self._id}-{secrets.token_hex(2)}")

    def _shards(self, newest: Mapping[int, str]) -> Iterator[tuple[int, list[int]]]:
        """(source, its shards that have rows) of every source that is fetched."""
        first = 0
        for number, entry in enumerate(self._proved.document.sources):
            end = max(newest, default=-1) + 1 if entry["shards"] is None else first + entry["shards"]
            if self._proved.plan.recipe.sources[number].is_fetched:
                yield number, [shard for shard in newest if first <= shard < end]
            first = end

    def _failed(self, number: int, shards: Sequence[int], newest: Mapping[int, str]) -> Iterator[pa.Table]:
        """The failed rows of each shard that has any, as `retry_schema` has them."""
        given = self._given(number, shards) if self._fetch.given and shards else iter(())
        for shard in shards:
            said = next(given, None)
            table = self._store.read_table(newest[shard], ["row_id", "key", "url", "attempts", "status"])
            rows = pa.array(pc.is_in(table.column("status"), pa.array(sorted(self._statuses))).combine_chunks())
            found = table.filter(rows)
            if not len(found):
                continue
            columns: dict[str, Any] = {"rows_file": pa.array([newest[shard]] * len(found), pa.string())}
            for name, (kind, _) in GIVEN.items():
                if said is not None and name in said.column_names:
                    columns[name] = said.column(name).filter(rows)
                else:
                    columns[name] = pa.nulls(len(found), kind)
            columns |= {name: found.column(name) for name in ("row_id", "key", "url", "attempts")}
            yield pa.table([columns[name] for name in retry_schema().names], schema=retry_schema())

    def _given(self, number: int, shards: Sequence[int]) -> Iterator[pa.Table]:
        """What the list says of the rows of these shards: it is read again as far as they go."""
        source: Any = self._proved.plan.recipe.sources[number]
        first = self._proved.document.sources[number]["first_shard"] or 0
        wanted = set(shards)
        for shard, table in enumerate(source.tables(self._fetch.shard_rows), first):
            if shard in wanted:
                yield table
            if shard >= shards[-1]:
                return
