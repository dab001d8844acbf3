"""Drives a plan: ingest, passes and groups over a pool, then the ledger, then the export.

The driver never touches media. Fetching and the first pass of different shards overlap; a group waits for all shards.
Whatever stops it (Ctrl-C, a full disk, a budget) leaves finished shards finished, and the same command goes on.
"""

from __future__ import annotations

import os
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal

import yaml

from mmdata.attach_work import AttachJob
from mmdata.column_files import ColumnFile
from mmdata.errors import BudgetError, RecipeError, RetryableError
from mmdata.filters import FilterEngine
from mmdata.group_work import GroupJob
from mmdata.intake import Intake
from mmdata.lease import Lease
from mmdata.ledger import Current, DatasetDocument, Ledger, new_dataset, update_dataset
from mmdata.plan import Pass, Plan, PlannedStep, Resolved, base_identity, chain, identity
from mmdata.pool import Finished, InlinePool, Item, Pool, Tick
from mmdata.preflight import Proved
from mmdata.progress import FetchLine, Progress, Step
from mmdata.recipe import document_of
from mmdata.repeats import Repeats
from mmdata.resolve import needs_machine, require_device, resolve, resolved_before
from mmdata.run_record import write_record
from mmdata.store import Store
from mmdata.survivors import BoundStep, ShardView, unsettled, verdicts, walk
from mmdata.work import PassContext, PassResult, StepWork, finished_pass

__all__ = ["Report", "RunOptions", "execute"]

BUDGET_FROM_ROWS = 200
TRANSIENT_ROUNDS = 2


@dataclass(frozen=True)
class RunOptions:
    """How to run, which never changes what comes out."""

    runner: Literal["ray", "inline"] = "ray"
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
    if options.runner == "ray" and not proved.store.is_shared:
        raise RecipeError(f"{proved.store.url} lives in this process only; use --runner inline, or a folder on disk")
    driver = _Driver(proved, options, progress)
    return driver.run(finish)


def _make_pool(options: RunOptions, tick: Tick) -> Pool:
    if options.runner == "inline":
        return InlinePool(options.device, tick)
    from mmdata.ray_pool import RayPool

    return RayPool(options.workers, options.address, options.device, tick)


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
        self.files: dict[str, dict[int, ColumnFile]] = {}
        self.work: dict[str, StepWork] = {}
        self.totals: dict[int, Counter[str]] = {}
        self.media_reads = 0
        self.unsettled = 0
        self._repeats = Repeats(self.store, self.files, self.bound)
        self._engine = FilterEngine()
        self._pool: Pool | None = None
        self._contexts: dict[str, Any] = {}
        self._shared: set[str] = set()
        self._fetch_line = FetchLine(progress)
        self._intake: Intake | None = None

    @property
    def pool(self) -> Pool:
        """The workers, started when the first item needs them: a run with nothing to do starts none."""
        if self._pool is None:
            self._pool = _make_pool(self.options, self._fetch_line.tell)
        return self._pool

    def run(self, finish: Callable[[Current], None]) -> Report:
        """From dataset.json to current.json, and on to what `finish` does."""
        began, started = time.monotonic(), datetime.now(UTC)
        with Lease.acquire(self.store, self.id) as lease:
            self.lease = lease
            status = "stopped"
            try:
                document = self._dataset()
                self.rows = self.store.row_files()
                for number, part in enumerate(self.plan.passes, 1):
                    if part.steps or number == 1:
                        self._run_pass(number, part, document if number == 1 else None)
                    if part.group is not None:
                        self._run_whole(part.group)
                current, changed = self._publish()
                self._close_pool()
                finish(current)
                status = "done"
            finally:
                self._close_pool()
                self._record(status, started, time.monotonic() - began)
        seconds = time.monotonic() - began
        by_status = dict(self._intake.by_status) if self._intake is not None else {}
        return Report(self.id, current, changed, self.work, by_status, self.media_reads, seconds, self.unsettled)

    def _close_pool(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None

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
            ready = self._unfinished(number, part, context, sorted(self.rows), line)
            intake = None if document is None else self._open_intake()
            fetched = iter(()) if intake is None else intake.items(self.rows)
            again: set[int] = set()
            for finished in self._drive(fetched, ready):
                shard = finished.item.shard
                if intake is not None and finished.item.kind == "ingest":
                    self.rows[shard] = intake.take(finished)
                    ready.extend(self._unfinished(number, part, context, [shard], line))
                elif self._take_passed(finished.result, line):
                    again.add(shard)
            self._fetch_line.end()
            for _ in range(TRANSIENT_ROUNDS):
                items = deque(self._pass_item(number, part, shard) for shard in sorted(again))
                again = {f.item.shard for f in self._drive(iter(()), items) if self._take_passed(f.result, None)}
        if intake is not None:
            intake.finish()
        if self._pool is not None:
            self._pool.recycle()

    def _open_intake(self) -> Intake:
        self._intake = Intake(self.proved, self.id, self._worker_run, self._fetch_line)
        self._contexts |= self._intake.contexts
        return self._intake

    def _bind(self, number: int, part: Pass) -> PassContext:
        """Give every stage of the pass its identity, and learn which rows its sets cover already."""
        begin = len(self.bound)
        for step in part.steps:
            if step.kind == "filter":
                self.bound.append(BoundStep(step))
                continue
            resolved = self._resolve(step)
            name, document, full = identity(step, resolved, self._sets())
            is_repeat = name in self._sets().values()
            self.bound.append(BoundStep(step, name, document, full, resolved, is_repeat))
            self.files.setdefault(name, self.store.coverage(name))
        threads = len(os.sched_getaffinity(0)) if self.options.runner == "inline" else part.threads
        context = PassContext(self.store, self.proved.document.id, tuple(self.bound), begin, threads, self._worker_run)
        self._contexts[f"pass {number}"] = context
        return context

    @property
    def _worker_run(self) -> str:
        """The run that workers write into their journals; inline there are none, and a death is the run's own."""
        return "" if self.options.runner == "inline" else self.id

    def _sets(self) -> dict[int, str]:
        return {b.step.position: b.set_name for b in self.bound if b.set_name}

    def _resolve(self, step: PlannedStep) -> Resolved:
        """Shape, precision, device and weights of a stage: settled once per dataset, then read from `state/`."""
        if not needs_machine(step):
            return Resolved(precision=step.contract.precision if step.contract else None)
        base = base_identity(step, self._sets())
        found = resolved_before(self.store, step, base)
        if found is None:
            found = resolve(self.store, step, base, self.pool.device, lambda: self._ask_worker(step, base))
        return found

    def _ask_worker(self, step: PlannedStep, base: str) -> Resolved:
        self._contexts[base] = (step, self.pool.device)
        [finished] = self._drive(iter(()), deque([Item("resolve", base)]))
        settled: Resolved = finished.result
        return settled

    def _unfinished(
        self, number: int, part: Pass, context: PassContext, shards: Iterable[int], line: Step
    ) -> deque[Item]:
        """Items for the shards that have something to compute; the others are counted here and now."""
        items: deque[Item] = deque()
        for shard in shards:
            done = finished_pass(context, shard, self.rows[shard], self._files_of(shard), self._engine)
            if done is None:
                items.append(self._pass_item(number, part, shard))
            else:
                self._take_passed(done, line)
        return items

    def _files_of(self, shard: int) -> dict[str, ColumnFile]:
        return {name: found[shard] for name, found in self.files.items() if shard in found}

    def _pass_item(self, number: int, part: Pass, shard: int) -> Item:
        return Item(
            "pass",
            f"pass {number}",
            shard,
            rows_file=self.rows[shard],
            files=self._files_of(shard),
            on_actor=part.uses_model,
            gpu=part.gpu,
        )

    # Keeping the pool full

    def _drive(self, fetched: Iterator[Item], ready: deque[Item]) -> Iterator[Finished]:
        """Keep the pool full and yield what ended well; the caller may add to `ready` meanwhile.

        One shard is always being fetched while there is one to fetch, then passes come first.
        """
        upcoming = next(fetched, None)
        flying: Counter[str] = Counter()
        while True:
            while upcoming is not None and (not ready or not flying["ingest"]) and self._start(upcoming):
                flying["ingest"] += 1
                upcoming = next(fetched, None)
            while ready and self._start(ready[0]):
                flying[ready.popleft().kind] += 1
            if not flying.total():
                if ready or upcoming:
                    raise RecipeError("no worker has what this pass needs; look at --device, --workers and the cluster")
                return
            finished = self.pool.wait()
            self.lease.require()
            repeat = self._repeats.again(finished)
            if repeat is not None:
                if isinstance(finished.error, RetryableError):
                    self.pool.recycle()  # the worker lives, and its device is in doubt
                self.pool.submit(repeat, finished.node)
                continue
            flying[finished.item.kind] -= 1
            yield finished

    def _start(self, item: Item) -> bool:
        if not self.pool.has_room(item):
            return False
        if item.context not in self._shared:
            context = self._contexts[item.context]
            self.pool.share(item.context, self._on_device(context) if item.kind == "pass" else context)
            self._shared.add(item.context)
        self.pool.submit(item)
        return True

    def _on_device(self, context: PassContext) -> PassContext:
        """The pass with every model on the device class there is; refused where that mixes classes in one set."""
        steps = []
        for bound in context.steps:
            if bound.step.kind == "stage" and bound.step.position > context.begin and needs_machine(bound.step):
                require_device(bound.step, bound.resolved, self.pool.device, self.options.allow_mixed)
                bound = replace(bound, resolved=replace(bound.resolved, device=self.pool.device))
            steps.append(bound)
        return replace(context, steps=tuple(steps))

    # What came back

    def _take_passed(self, result: PassResult, line: Step | None) -> bool:
        """Count a shard's pass; True when rows of it failed for a transient reason."""
        for name, file in result.files.items():
            self.files[name][result.shard] = file
        self.media_reads += result.reads
        steps = {b.step.position: b.step for b in self.bound}
        for position, done in result.work.items():
            step = steps[position]
            total = self.work.setdefault(step.name, StepWork())
            total.computed += done.computed
            total.seconds += done.seconds
            total.opened += done.opened
            total.examples.update(done.examples)
            if line is not None:
                total.rows_in += done.rows_in
                # Transient failures have their turn again before anybody counts them.
                total.failed += done.failed - done.transient
                self._check_budget(step, total)
        if line is not None:
            line.advance(done=result.rows, kept=result.alive, failed=sum(w.failed for w in result.work.values()))
        return any(w.transient for w in result.work.values())

    def _check_budget(self, step: PlannedStep, total: StepWork) -> None:
        if step.kind == "filter" or total.rows_in < BUDGET_FROM_ROWS or total.failed <= step.max_failed * total.rows_in:
            return
        example = next(iter(total.examples.items()), None)
        why = f", for example {example[0]} ({example[1]})" if example else ""
        raise BudgetError(
            f"step {step.name}: {total.failed} of {total.rows_in} rows failed{why}, more than its max_failed of "
            f"{step.max_failed:.0%}; look at them with mmdata sql, then mend the step or raise its max_failed"
        )

    def _run_whole(self, step: PlannedStep) -> None:
        """A step over the whole dataset."""
        if step.kind == "group":
            self._run_group(step)
        else:
            self._run_attach(step)

    def _run_attach(self, step: PlannedStep) -> None:
        began = time.monotonic()
        job = AttachJob(self.store, step, self.rows, self._sets())
        covered = self.store.coverage(job.bound.set_name)
        total = self.work.setdefault(step.name, StepWork())
        if left := job.left(covered):
            with self.progress.step(step.name, None) as line:

                def tick(rows: int) -> None:
                    line.advance(done=rows)
                    total.computed += rows
                    self.lease.require()

                covered = covered | job.compute(left, tick)
            total.seconds = time.monotonic() - began
        job.require_within_budget(covered)
        self.files[job.bound.set_name] = covered
        self.bound.append(job.bound)

    def _run_group(self, step: PlannedStep) -> None:
        began = time.monotonic()
        job = GroupJob(self.store, tuple(self.bound), step, self.rows, self.files, self._engine)
        bound = job.survey()
        covered = self.store.coverage(bound.set_name)
        total = self.work.setdefault(step.name, StepWork())
        if not job.is_covered(covered):
            with self.progress.step(step.name, None) as line:
                covered = job.compute(bound, lambda rows: line.advance(done=rows))
            total.computed, total.seconds = job.rows, time.monotonic() - began
        self.files[bound.set_name] = covered
        self.bound.append(bound)

    # The end

    def _publish(self) -> tuple[Current, bool]:
        recipe = yaml.safe_dump(document_of(self.plan.recipe), sort_keys=False, allow_unicode=True)
        with self.store.scratch() as folder:
            ledger = Ledger(self.store, chain([b.step for b in self.bound], self._sets()), self.id, folder)
            for shard in sorted(self.rows):
                view = ShardView(self.store, shard, self.rows[shard], self._sets(), self._files_of(shard))
                state = walk(view, self.bound, self._engine)
                ledger.add(shard, verdicts(view, self.bound, state))
                self.unsettled += unsettled(view, self.bound, state)
            return ledger.publish(recipe, self.rows, self.bound, self.files, self.lease.hold)

    def _record(self, status: str, started: datetime, seconds: float) -> None:
        sets = {b.step.name: b.set_name for b in self.bound}
        steps = [{"name": n, "set": sets.get(n, ""), **vars(w)} for n, w in self.work.items()]
        by_status, took = ({}, 0.0) if self._intake is None else (self._intake.by_status, self._intake.seconds)
        fetched = {"by_status": dict(by_status), "ingest_seconds": round(took, 3)}
        facts = {**fetched, "media_reads": self.media_reads, "steps": steps}
        write_record(self.store, self.id, status, started, seconds, self.options.runner, self.plan.recipe, facts)
