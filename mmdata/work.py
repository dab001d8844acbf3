"""One unit of work: one pass over one shard, from base rows to committed columns. No Ray here.

In: a `PassContext` (the same for every shard) and a shard's newest files. Out: a `PassResult` with counts and the files
that now stand. What a bad row costs stands in `isolate`; what a dead worker costs is this: the rows it was working on
are found in the journal, everything else of the shard is computed and committed first, then they go one by one.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mmdata.batch import Batch, DecodedCache
from mmdata.column_files import UNCOVERED, ColumnFile, ColumnFooter, canonical_json, publish_columns
from mmdata.columns import media_reference
from mmdata.filters import FilterEngine
from mmdata.isolate import DeviceLost, Journal, RowResult, StepTracker, compute_rows, raise_not_opened
from mmdata.scratch import scratch_root
from mmdata.stage import Failed, Stage
from mmdata.store import Store
from mmdata.survivors import (
    COMPUTED,
    PERMANENT,
    TRANSIENT,
    BoundStep,
    Committed,
    ShardView,
    Walk,
    apply_filter,
    input_coverage,
    start,
    take_failed,
    walk,
)

__all__ = ["PassContext", "PassResult", "StepWork", "close_stages", "finished_pass", "journal_folder", "run_pass"]

DECODED_BYTES = 256 << 20  # of one chunk: pictures in full and their variants
ROWS_PER_CALL = 256  # of a stage without a model
IMAGE_COLUMNS = [c.name for c in media_reference("image")]


@dataclass(frozen=True)
class PassContext:
    """What every shard of a pass shares. `steps` are all steps from the first; those of this pass begin at `begin`."""

    store: Store
    dataset_id: str
    steps: tuple[BoundStep, ...]
    begin: int
    threads: int = 1
    run: str = ""  # the run whose workers do it; empty where the worker is the run's own process

    @property
    def sets(self) -> dict[int, str]:
        """Position → set name, of every step that makes columns."""
        return {b.step.position: b.set_name for b in self.steps if b.set_name}


@dataclass
class StepWork:
    """What was done for one step in one shard."""

    rows_in: int = 0
    failed: int = 0
    computed: int = 0
    transient: int = 0
    seconds: float = 0.0
    opened: int = 0
    examples: dict[str, str] = field(default_factory=dict)


@dataclass
class PassResult:
    """`work` maps position → what was done; `files` set name → the newest column file. `reads` are media reads."""

    shard: int
    rows: int
    alive: int
    work: dict[int, StepWork]
    files: dict[str, ColumnFile] = field(default_factory=dict)
    reads: int = 0


class _Buffer:
    """The columns of one set for one shard while rows are being computed; starts from what is committed."""

    def __init__(self, view: ShardView, bound: BoundStep) -> None:
        contract = bound.step.contract
        assert contract is not None
        before = view.columns(bound.set_name)
        assert isinstance(before, Committed)
        self.bound = bound
        self.changed = False
        self.committed = before.is_there
        self.codes = before.codes.copy()
        self._before = before
        self._row_ids = view.row_ids
        self._schema = contract.writes
        self._values: dict[str, list[Any]] = {}
        self._reasons: list[str | None] = []

    def _load(self) -> None:
        if not self._reasons:
            names, rows, before = self._schema.names, len(self._row_ids), self._before
            self._values = {n: before.column(n).to_pylist() if before.is_there else [None] * rows for n in names}
            self._reasons = before.column("reason").to_pylist() if before.is_there else [UNCOVERED] * rows

    def put(self, row: int, result: RowResult) -> None:
        """What was computed for the row at this index."""
        self._load()
        self.changed = True
        if isinstance(result, Failed):
            self._reasons[row] = result.reason
            self.codes[row] = TRANSIENT if result.transient else PERMANENT
            for values in self._values.values():
                values[row] = None
            return
        self._reasons[row], self.codes[row] = None, COMPUTED
        for name, values in self._values.items():
            values[row] = result[name]

    def take(self, own: str, rows: npt.NDArray[np.int64]) -> pa.Array | pa.ChunkedArray:
        """See `survivors.Columns`."""
        if self._before.is_there and not self._reasons:
            return self._before.take(own, rows)
        self._load()
        if own == "reason":
            return pa.array(self.reasons(rows).tolist(), pa.string())
        values = self._values[own]
        return pa.array([values[r] for r in rows.tolist()], self._schema.field(own).type)

    def reasons(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.object_]:
        """See `survivors.Columns`."""
        self._load()
        return np.array([self._reasons[r] for r in rows.tolist()], object)

    def table(self) -> pa.Table:
        """As a column file holds it."""
        self._load()
        columns = [pa.array(self._values[f.name], f.type) for f in self._schema]
        names = ["row_id", *self._schema.names, "reason"]
        return pa.table([pa.array(self._row_ids), *columns, pa.array(self._reasons, pa.string())], names)


def run_pass(
    context: PassContext,
    shard: int,
    rows_file: str,
    files: Mapping[str, ColumnFile],
    engine: FilterEngine,
    proven: frozenset[str] = frozenset(),
) -> PassResult:
    """Compute what this pass still lacks for one shard, commit it, and say where the rows stand.

    `proven` names the sets of which some row is known to have succeeded elsewhere.

    Rows that an earlier run or pass covered are not touched; where nothing is missing no media is read and no stage
    is opened. Every set of the pass has a column file for the shard afterwards, if only with `uncovered` rows.
    """
    view = ShardView(context.store, shard, rows_file, context.sets, files)
    before = walk(view, context.steps[: context.begin], engine, start(view))
    mine = context.steps[context.begin :]
    job = _ShardJob(context, view, mine, engine, proven)
    if walk(view, mine, engine, before, final=False).missing:
        job.compute(before)
    job.commit()
    result = _result(view, mine, walk(view, mine, engine, before, final=True), job.work)
    return replace(result, files=job.files, reads=job.reads)


def finished_pass(
    context: PassContext, shard: int, rows_file: str, files: Mapping[str, ColumnFile], engine: FilterEngine
) -> PassResult | None:
    """The result of a pass that has nothing left to compute for this shard; None when it has."""
    if any(name not in files for name in context.sets.values()):
        return None
    view = ShardView(context.store, shard, rows_file, context.sets, files)
    before = walk(view, context.steps[: context.begin], engine, start(view))
    mine = context.steps[context.begin :]
    state = walk(view, mine, engine, before, final=False)
    if state.missing:
        return None
    return _result(view, mine, state, {b.step.position: StepWork() for b in mine})


def _result(view: ShardView, steps: Sequence[BoundStep], state: Walk, work: dict[int, StepWork]) -> PassResult:
    for bound in steps:
        work[bound.step.position].rows_in = state.rows_in.get(bound.step.position, 0)
        if bound.set_name:
            was_in = state.alive | (state.left >= bound.step.position)
            codes = view.columns(bound.set_name).codes[was_in]
            work[bound.step.position].failed = int((codes != COMPUTED).sum())
            work[bound.step.position].transient = int((codes == TRANSIENT).sum())
    return PassResult(view.shard, len(view), int(state.alive.sum()), work)


class _ShardJob:
    """The computing of one pass over one shard."""

    def __init__(
        self,
        context: PassContext,
        view: ShardView,
        steps: Sequence[BoundStep],
        engine: FilterEngine,
        proven: frozenset[str],
    ) -> None:
        self.context, self.view, self.steps, self.engine, self.proven = context, view, steps, engine, proven
        self.work = {b.step.position: StepWork() for b in steps}
        self.buffers: dict[str, _Buffer] = {}
        self.files: dict[str, ColumnFile] = {}
        self.reads = 0
        self._journals: dict[str, Journal] = {}
        self._ids = view.row_ids
        for bound in steps:
            if bound.set_name and bound.set_name not in self.buffers:
                self.buffers[bound.set_name] = _Buffer(view, bound)
                view.replace(bound.set_name, self.buffers[bound.set_name])

    def compute(self, before: Walk) -> None:
        """Rows in chunks; those a dead worker was busy with come last, alone, after the others are committed."""
        folder = journal_folder(self.context.dataset_id)
        self._journals = {
            name: Journal(folder / f"{name}-{self.view.shard:05d}.json", self.context.run) for name in self.buffers
        }
        rows = np.flatnonzero(before.alive)
        suspects = {r for journal in self._journals.values() for r in (*journal.suspects, *journal.deaths)}
        killers = {r for journal in self._journals.values() for r in journal.deaths}
        alone = [int(r) for r in rows if int(self._ids[r]) in suspects]
        # Rows that have killed a worker alone come after those that may be innocent, whose values are then committed.
        tried = [[r for r in alone if (int(self._ids[r]) in killers) is again] for again in (False, True)]
        try:
            for chunk in self._chunks(np.setdiff1d(rows, np.array(alone, np.int64))):
                self._run_chunk(before, chunk)
            for some in tried:
                if some:
                    self.commit()
                for row in some:
                    self._run_chunk(before, np.array([row]))
            self.commit()
            for journal in self._journals.values():
                journal.clear([int(self._ids[r]) for r in alone])
        except BaseException as error:
            # What is computed stays computed, whatever stops the shard (Ctrl-C, a lost device, a broken stage).
            for journal in self._journals.values():
                if not isinstance(error, DeviceLost):
                    journal.end()
            self.commit()
            raise

    def _chunks(self, rows: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
        """Cut so that a chunk's media, with its pictures in all variants, stays within DECODED_BYTES."""
        if not len(rows) or not any(b.step.media for b in self.steps):
            return [rows] if len(rows) else []
        variants = {p for b in self.steps if b.step.contract for p in b.step.contract.pixels}
        sizes = self.view.base(["width_px", "height_px", "image_size"]).take(pa.array(rows))
        fixed = sum(p.size * p.size * 3 for p in variants if p.size)
        ends, held = [], 0
        for index, (width, height, stored) in enumerate(zip(*(c.to_pylist() for c in sizes.columns), strict=True)):
            # Media of unknown size (adopted, not probed) counts as 4 megapixels.
            pixels = (width or 2000) * (height or 2000) if variants else 0
            cost = pixels * 3 + fixed + (stored or 0)
            if held and held + cost > DECODED_BYTES:
                ends.append(index)
                held = 0
            held += cost
        return np.split(rows, ends)

    def _run_chunk(self, before: Walk, chunk: npt.NDArray[np.int64]) -> None:
        state = before.copy()
        in_chunk = np.zeros(len(self.view), bool)
        in_chunk[chunk] = True
        needs_media = any(b.step.media for b in self.steps)
        cache = self._cache(chunk) if needs_media else None
        position_of = {int(r): i for i, r in enumerate(chunk)}
        for bound in self.steps:
            rows = np.flatnonzero(state.alive & in_chunk)
            if not len(rows):
                break
            if bound.step.kind == "filter":
                apply_filter(self.view, bound, self.engine, state, rows)
                continue
            buffer = self.buffers[bound.set_name]
            needed = rows[buffer.codes[rows] > PERMANENT]
            # Done again between two steps that share it, a row would have been judged by a value it no longer has.
            if len(needed) and not bound.is_repeat:
                self._run_stage(bound, buffer, needed, cache, position_of)
            take_failed(self.view, bound, state, rows)
        if cache is not None:
            self.reads += cache.reads

    def _cache(self, chunk: npt.NDArray[np.int64]) -> DecodedCache:
        table = self.view.base(IMAGE_COLUMNS).take(pa.array(chunk))
        return DecodedCache(table, self.context.store.read_range, self.context.threads)

    def _run_stage(
        self,
        bound: BoundStep,
        buffer: _Buffer,
        rows: npt.NDArray[np.int64],
        cache: DecodedCache | None,
        position_of: Mapping[int, int],
    ) -> None:
        began = time.perf_counter()
        contract = bound.step.contract
        assert contract is not None
        work = self.work[bound.step.position]
        ready = input_coverage(self.view, bound.step, rows)
        for row in rows[~ready]:
            buffer.put(int(row), Failed("input", transient=True))
        journal = self._journals[bound.set_name]
        rows = self._without_given_up(rows[ready], journal, buffer)
        size = bound.resolved.batch_shape or ROWS_PER_CALL
        for first in range(0, len(rows), size):
            some = rows[first : first + size]
            batch = Batch(self.view.gather(bound.step.inputs, some), cache, [position_of[int(r)] for r in some])
            stage, tracker = _opened(bound, journal)
            tracker.has_succeeded |= bound.set_name in self.proven
            journal.begin(self._ids[some].tolist(), bound.step.name)
            results = compute_rows(stage, contract, batch, tracker)
            journal.end()
            for row, result in zip(some, results, strict=True):
                buffer.put(int(row), result)
            work.computed += len(some)
            work.examples.update(tracker.examples)
            work.opened += tracker.opened
            tracker.opened = 0
        work.seconds += time.perf_counter() - began

    def _without_given_up(
        self, rows: npt.NDArray[np.int64], journal: Journal, buffer: _Buffer
    ) -> npt.NDArray[np.int64]:
        given_up = [r for r in rows if journal.given_up(int(self._ids[r]))]
        for row in given_up:
            buffer.put(int(row), Failed("worker_died"))
        return np.setdiff1d(rows, np.array(given_up, np.int64)) if given_up else rows

    def commit(self) -> None:
        """Publish every set that changed, or that has no file for this shard yet."""
        for name, buffer in self.buffers.items():
            if buffer.changed or not buffer.committed:
                table = buffer.table()
                base = ColumnFooter.of(canonical_json(dict(buffer.bound.document)))
                self.files[name] = publish_columns(self.context.store, name, self.view.shard, table, base)
                buffer.changed, buffer.committed = False, True


_open_stages: dict[str, tuple[Stage[Any], StepTracker]] = {}


def _opened(bound: BoundStep, journal: Journal) -> tuple[Stage[Any], StepTracker]:
    """The stage of a column set, opened once per worker process."""
    if bound.set_name not in _open_stages:
        operator = bound.step.operator
        assert operator is not None
        assert issubclass(operator, Stage)
        stage = operator(bound.step.options)
        stage.batch_shape = bound.resolved.batch_shape
        stage.precision = bound.resolved.precision
        journal.opening(bound.step.name)
        try:
            stage.open(bound.resolved.device)
        except Exception as error:  # noqa: BLE001  raised again, as whose it is
            raise_not_opened(bound.step.name, error)
        tracker = StepTracker(bound.step.name, opened=1)
        _open_stages[bound.set_name] = (stage, tracker)
    return _open_stages[bound.set_name]


def close_stages() -> None:
    """Let go of every stage this process has open."""
    while _open_stages:
        _, (stage, _tracker) = _open_stages.popitem()
        stage.close()


def journal_folder(dataset_id: str) -> Path:
    """Where workers on this node keep their journals of one dataset."""
    return scratch_root() / "journal" / hashlib.sha256(dataset_id.encode()).hexdigest()[:16]
