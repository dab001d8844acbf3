"""Drives a plan: ingest, passes and groups over a pool, then the ledger, then the export.

The driver never touches media. Fetching and the first pass of different shards overlap; a group waits for all shards.
Whatever stops it (Ctrl-C, a full disk, a budget) leaves finished shards finished, and the same command goes on.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Literal

import numpy as np
import numpy.typing as npt
import yaml

from mmdata.attach_work import AttachJob
from mmdata.computing import note_computing, remove_notes
from mmdata.coverage_log import CoverageLog, count_failed, pass_key
from mmdata.errors import RecipeError, StoreError
from mmdata.feed import Feed
from mmdata.filters import FilterEngine
from mmdata.group_work import GroupJob
from mmdata.host_state import HostKeeper
from mmdata.intake import Intake
from mmdata.lease import Lease
from mmdata.ledger import Current, DatasetDocument, new_dataset, update_dataset
from mmdata.plan import Pass, Plan, PlannedStep, Resolved, chain, identity
from mmdata.pool import Item, Runner
from mmdata.preflight import Proved
from mmdata.progress import FetchLine, Progress, Step
from mmdata.recipe import document_of
from mmdata.repeats import Repeats
from mmdata.resolve import Resolver
from mmdata.run_ledger import Ledger
from mmdata.run_record import write_record
from mmdata.selections import load_selections
from mmdata.set_files import SetFiles
from mmdata.store import Store
from mmdata.survivors import BoundStep
from mmdata.tally import Tally, from_sums, sums_of
from mmdata.verdict_work import Settled, settle_shard
from mmdata.work import PassContext, PassResult, StepWork, finished_pass

__all__ = ["Report", "RunOptions", "execute"]

TRANSIENT_ROUNDS = 2
LOCAL_ROWS = 4_000_000  # so many rows are looked through here rather than on workers, whose start takes as long
FLUSH_SHARDS = 1000  # finished shards between two segments of the coverage log


@dataclass(frozen=True)
class RunOptions:
    """How to run, which never changes what comes out."""

    runner: Runner = "ray"
    workers: int | None = None
    address: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    allow_mixed: bool = False


@dataclass
class Report:
    """What a run did. `work` maps step name → what was computed now; `by_status` counts rows ingested now.

    `unsettled` rows went on without a value for a transient reason, because their step says `on_error: keep`.
    """

    run: str
    current: Current
    changed: bool
    work: dict[str, StepWork]
    by_status: dict[str, int] = field(default_factory=dict)
    media_reads: int = 0
    seconds: float = 0.0
    unsettled: int = 0


def execute(proved: Proved, options: RunOptions, progress: Progress, finish: Callable[[Current], None]) -> Report:
    """Run a proved recipe to its end and publish the ledger, then `finish` (the export) while the dataset is held.

    Raises StoreError, BudgetError, ContractError or RetryableError when it must stop; the same command resumes.
    """
    if options.runner != "inline" and not proved.store.is_shared:
        raise RecipeError(f"{proved.store.url} lives in this process only; use --runner inline, or a folder on disk")
    driver = _Driver(proved, options, progress)
    return driver.run(finish)


class _Driver:
    """The state of one run."""

    def __init__(self, proved: Proved, options: RunOptions, progress: Progress) -> None:
        self.plan: Plan = proved.plan
        self.store: Store = proved.store
        self.proved = proved
        self.options = options
        self.progress = progress
        self.id = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"
        self.bound: list[BoundStep] = []
        self.rows: dict[int, str] = {}
        self.files: dict[str, SetFiles] = {}
        self.tally = Tally()
        self._engine = FilterEngine()
        self._fetch_line = FetchLine(progress)
        repeats = Repeats(self.store, self.files, self.bound)
        self._feed = Feed(options.runner, options.workers, options.address, options.device, repeats, self._fetch_line)
        self._feed.allow_mixed = options.allow_mixed
        self._resolver = Resolver(self.store, lambda: self._feed.pool.device, self._ask_worker)
        self._intake: Intake | None = None
        self._ledger: Ledger | None = None
        self._noted: set[str] = set()  # column sets that `clean` knows to leave alone

    def run(self, finish: Callable[[Current], None]) -> Report:
        """From dataset.json to current.json, and on to what `finish` does."""
        began, started = time.monotonic(), datetime.now(UTC)
        fetch = self.plan.recipe.fetch
        with Lease.acquire(self.store, self.id) as lease, HostKeeper(self.store, self.id, fetch) as hosts:
            self.lease, self._feed.lease, self._feed.desk = lease, lease, hosts.desk
            status = "stopped"
            try:
                document = self._dataset()
                self.log = CoverageLog(self.store, self.id, self.files)
                self._noted = {s for c in load_selections(self.store)[0].values() for s in c.set_names}
                self.rows = dict(zip(self.log.rows.shards.tolist(), self.log.rows.names(), strict=True))
                for number, part in enumerate(self.plan.passes, 1):
                    if part.steps or number == 1:
                        self._run_pass(number, part, document if number == 1 else None)
                    if part.group is not None:
                        self._run_whole(part.group)
                current, changed = self._publish()
                self._feed.close()
                finish(current)
                status = "done"
            finally:
                self._feed.close()
                if status == "stopped":
                    self._keep_log()
                self._record(status, started, time.monotonic() - began)
        seconds = time.monotonic() - began
        by_status = dict(self._intake.by_status) if self._intake is not None else {}
        work, reads = self.tally.work, self.tally.media_reads
        return Report(self.id, current, changed, work, by_status, reads, seconds, current.unsettled)

    def _keep_log(self) -> None:
        """What a stopped run learnt is for the next one; where it cannot be written, files are opened instead."""
        if hasattr(self, "log") and not self.lease.lost.is_set():
            with contextlib.suppress(StoreError):
                if self.store.exists("dataset.json"):
                    self.log.flush()

    def _dataset(self) -> DatasetDocument:
        if self.proved.document.data is None:
            new_dataset(self.store, self.proved.document)
        else:
            update_dataset(self.store, self.proved.document)  # the recipe may have grown by a source
        return self.proved.document

    # One pass

    def _run_pass(self, number: int, part: Pass, document: DatasetDocument | None) -> None:
        context = self._bind(number, part)
        title = ", ".join(s.name for s in part.steps) or "rows"
        with self.progress.step(title, None) as line:
            ready = self._unfinished(number, part, context, line)
            if document is not None and not self.rows:  # nothing is fetched for a model that is not to be had
                self._resolver.bring(step for later in self.plan.passes[1:] for step in later.steps)
            intake = None if document is None else self._open_intake()
            fetched = iter(()) if intake is None else intake.items(self.rows)
            again: set[int] = set()
            for finished in self._feed.drive(fetched, ready):
                shard = finished.item.shard
                if intake is not None and finished.item.kind == "ingest":
                    self.rows[shard] = intake.take(finished)
                    self.log.add_rows(shard, self.rows[shard])
                    ready.append(self._item("pass", number, part, shard))
                elif self._take_passed(context, finished.result, line):
                    again.add(shard)
            self._fetch_line.end()
            for _ in range(TRANSIENT_ROUNDS):
                items = deque(self._item("pass", number, part, shard) for shard in sorted(again))
                done = self._feed.drive(iter(()), items)
                again = {f.item.shard for f in done if self._take_passed(context, f.result, None)}
        self.log.flush()
        if intake is not None:
            intake.finish()
        self._feed.recycle()

    def _open_intake(self) -> Intake:
        self._intake = Intake(self.proved, self.id, self._worker_run, self._fetch_line)
        self._feed.contexts |= self._intake.contexts
        return self._intake

    def _bind(self, number: int, part: Pass) -> PassContext:
        """Give every stage of the pass its identity, and learn which rows its sets cover already."""
        begin = len(self.bound)
        for step in part.steps:
            if step.kind == "filter":
                self.bound.append(BoundStep(step))
                continue
            resolved = self._resolver.of(step, self._sets())
            name, document, full = identity(step, resolved, self._sets())
            is_repeat = name in self._sets().values()
            self.bound.append(BoundStep(step, name, document, full, resolved, is_repeat))
            self.log.read_set(name)
        threads = len(os.sched_getaffinity(0)) if self.options.runner == "inline" else part.threads
        folder = self._open_ledger().folder if len(self.bound) == len(self.plan.steps) else ""
        context = self._context(f"pass {number}", begin, threads, folder)
        self.log.name_inputs(pass_key(context.steps, context.begin), context.sets.values())
        return context

    def _context(self, name: str, begin: int, threads: int, folder: str) -> PassContext:
        steps, document = tuple(self.bound), self.proved.document.id
        self._feed.contexts[name] = PassContext(self.store, document, steps, begin, threads, self._worker_run, folder)
        context: PassContext = self._feed.contexts[name]
        return context

    def _open_ledger(self) -> Ledger:
        """The ledger, once every step has its identity."""
        if self._ledger is None:
            hashed = chain([b.step for b in self.bound], self._sets())
            self.log.name_inputs(hashed, self._sets().values())
            self._ledger = Ledger(self.store, self.log, self.plan.recipe.name, hashed, self.id)
        return self._ledger

    @property
    def _worker_run(self) -> str:
        """The run that workers write into their journals; inline there are none, and a death is the run's own."""
        return "" if self.options.runner == "inline" else self.id

    def _sets(self) -> dict[int, str]:
        return {b.step.position: b.set_name for b in self.bound if b.set_name}

    def _ask_worker(self, step: PlannedStep, name: str) -> Resolved:
        self._feed.contexts[name] = (step, self._feed.pool.device)
        [finished] = self._feed.drive(iter(()), deque([Item("resolve", name)]))
        settled: Resolved = finished.result
        return settled

    def _unfinished(self, number: int, part: Pass, context: PassContext, line: Step) -> deque[Item]:
        """Items for the shards that have something to compute; the others are counted here and now.

        What the coverage log knows is not looked at again. Of the others, a few are looked through here.
        """
        shards, key = self._shards(), pass_key(context.steps, context.begin)
        known, sums = self.log.finished(key, shards)
        if context.verdicts and len(known):
            todo = self._open_ledger().todo(known)
            known, sums = self.log.finished(key, np.setdiff1d(known, todo, assume_unique=True))
        if len(known):
            self._take_passed(context, from_sums(sums, [b.step.position for b in self.bound[context.begin :]]), line)
        unknown = np.setdiff1d(shards, known, assume_unique=True).tolist()
        every = [self._item("pass", number, part, shard) for shard in unknown]
        if not self._is_local(len(unknown)):
            return deque(every)
        items: deque[Item] = deque()
        for item in every:
            done = finished_pass(context, item.shard, item.rows_file, item.files, self._engine, item.earlier)
            if done is None:
                items.append(item)
            else:
                self._take_passed(context, done, line)
        return items

    def _is_local(self, shards: int) -> bool:
        """Whether so many shards are looked through in this process; inline there is no other."""
        few = shards * self.plan.recipe.fetch.shard_rows <= LOCAL_ROWS
        return self.options.runner == "inline" or (not self._feed.is_open and few)

    def _shards(self) -> npt.NDArray[np.int64]:
        return np.array(sorted(self.rows), np.int64)

    def _item(self, kind: Literal["pass", "verdict"], number: int, part: Pass, shard: int) -> Item:
        files = {name: found[shard] for name, found in self.files.items() if shard in found}
        earlier = self._ledger.earlier(shard) if self._ledger is not None else ""
        item = Item(kind, f"{kind} {number}", shard, rows_file=self.rows[shard], files=files, earlier=earlier)
        return replace(item, on_actor=part.uses_model, gpu=part.gpu) if kind == "pass" else item

    # What came back

    def _take_passed(self, context: PassContext, result: PassResult, line: Step | None) -> bool:
        """Count a shard's pass, and note it in the log; True when rows of it failed for a transient reason."""
        for name, file in result.files.items():
            self.files[name][result.shard] = file
        if result.files:
            self._note_computing()
        is_open = self.tally.take(result, {b.step.position: b.step for b in self.bound}, line)
        if result.shard >= 0 and not is_open:
            self.log.add_pass(pass_key(context.steps, context.begin), result.shard, sums_of(result))
        if result.settled is not None:
            self._take_settled(result.settled)
        elif self.log.waiting >= FLUSH_SHARDS:
            self.log.flush()
        return is_open

    def _note_computing(self, *more: str) -> None:
        """So that `mmdata clean` leaves the sets alone, should this run be stopped."""
        sets = {*self._sets().values(), *more} - self._noted
        if sets:
            note_computing(self.store, self.plan.recipe.name, self.id, sets)
            self._noted |= sets

    def _take_settled(self, settled: Settled) -> None:
        self._open_ledger().take(settled)
        if self.log.waiting >= FLUSH_SHARDS:
            self.log.flush()

    def _run_whole(self, step: PlannedStep) -> None:
        """A step over the whole dataset."""
        if step.kind == "group":
            self._run_group(step)
        else:
            self._run_attach(step)

    def _run_attach(self, step: PlannedStep) -> None:
        began = time.monotonic()
        job = AttachJob(self.store, step, self.rows, self._sets())
        covered = self.log.read_set(job.bound.set_name)
        total = self.tally.work.setdefault(step.name, StepWork())
        if left := job.left(covered):
            self._note_computing(job.bound.set_name)
            with self.progress.step(step.name, None) as line:

                def tick(rows: int) -> None:
                    line.advance(done=rows)
                    total.computed += rows
                    self.lease.require()

                covered.update(job.compute(left, tick))
            total.seconds = time.monotonic() - began
        job.require_within_budget(covered)
        self.log.flush()
        self.bound.append(job.bound)

    def _run_group(self, step: PlannedStep) -> None:
        began = time.monotonic()
        job = GroupJob(self.store, tuple(self.bound), step, self.rows, self.files, self._engine)
        bound = job.survey()
        covered = self.log.read_set(bound.set_name)
        computed = 0
        if not job.is_covered(covered):
            self._note_computing(bound.set_name)
            with self.progress.step(step.name, None) as line:
                found = job.compute(bound, lambda rows: line.advance(done=rows), line.say)
            covered.update({shard: file for shard, file in found.items() if covered.get(shard) != file})
            computed = job.rows
        self.log.flush()
        failed = count_failed(self.log, bound.set_name, self._shards())
        seconds = time.monotonic() - began if computed else 0.0
        self.tally.take_group(step, job.rows, failed, computed, seconds)
        self.bound.append(bound)

    # The end

    def _publish(self) -> tuple[Current, bool]:
        ledger, shards = self._open_ledger(), self._shards()
        self._settle(ledger.todo(shards).tolist())
        self.log.flush()
        recipe = yaml.safe_dump(document_of(self.plan.recipe), sort_keys=False, allow_unicode=True)
        published = ledger.publish(recipe, shards, self.bound, self.lease.hold)
        remove_notes(self.store, self.plan.recipe.name)
        return published

    def _settle(self, shards: list[int]) -> None:
        """Write the verdicts of these shards: rows of them failed for a transient reason, or a group came last."""
        number = len(self.plan.passes)
        context = self._context(f"verdict {number}", len(self.bound), 1, self._open_ledger().folder)
        items = deque(self._item("verdict", number, Pass((), None), shard) for shard in shards)
        if not self._is_local(len(shards)):
            for finished in self._feed.drive(iter(()), items):
                self._take_settled(finished.result)
            return
        for item in items:
            shard, rows_file, files, earlier = item.shard, item.rows_file, item.files, item.earlier
            steps, folder = context.steps, context.verdicts
            settled = settle_shard(self.store, steps, shard, rows_file, files, folder, earlier, self._engine)
            self._take_settled(settled)
            self.lease.require()

    def _record(self, status: str, started: datetime, seconds: float) -> None:
        sets = {b.step.name: b.set_name for b in self.bound}
        steps = [{"name": n, "set": sets.get(n, ""), **vars(w)} for n, w in self.tally.work.items()]
        by_status, took = ({}, 0.0) if self._intake is None else (self._intake.by_status, self._intake.seconds)
        fetched = {"by_status": dict(by_status), "ingest_seconds": round(took, 3)}
        facts = {**fetched, "media_reads": self.tally.media_reads, "steps": steps}
        write_record(self.store, self.id, status, started, seconds, self.options.runner, self.plan.recipe, facts)
