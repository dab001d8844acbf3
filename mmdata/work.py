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

import numpy as np
import numpy.typing as npt

from mmdata.batch import Batch, DecodedCache
from mmdata.chunks import Chunks
from mmdata.column_buffer import ColumnBuffer
from mmdata.column_files import ColumnFile, ColumnFooter, canonical_json, publish_columns
from mmdata.decode_ahead import DecodeAhead, decode_threads, first_wanted
from mmdata.filters import FilterEngine
from mmdata.isolate import DeviceLost, compute_rows
from mmdata.media_reader import MediaReader
from mmdata.open_stages import opened
from mmdata.scratch import scratch_root
from mmdata.stage import Failed
from mmdata.store import Store
from mmdata.survivors import (
    COMPUTED,
    NOT_COVERED,
    PERMANENT,
    TRANSIENT,
    BoundStep,
    Mask,
    ShardView,
    Walk,
    apply_filter,
    input_coverage,
    start,
    take_failed,
    tracks,
    walk,
)
from mmdata.verdict_work import Settled, settle, settle_shard
from mmdata.worker_journal import Journal

__all__ = ["PassContext", "PassResult", "StepWork", "finished_pass", "journal_folder", "run_pass"]

DECODED_BYTES = 256 << 20  # of one chunk: pictures in full and their variants
ROWS_PER_CALL = 256  # of a stage without a model


@dataclass(frozen=True)
class PassContext:
    """What every shard of a pass shares. `steps` are all steps from the first; those of this pass begin at `begin`."""

    store: Store
    dataset_id: str
    steps: tuple[BoundStep, ...]
    begin: int
    threads: int = 1
    run: str = ""  # the run whose workers do it; empty where the worker is the run's own process
    verdicts: str = ""  # of the last pass: the folder for the verdicts, which are then part of its work

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
    """`work` maps position → what was done; `files` set name → the newest column file.

    `reads` are media reads, `decodes` pictures decoded in full.
    `settled` are the verdicts, after the last pass where nothing is to be tried again.
    """

    shard: int
    rows: int
    alive: int
    work: dict[int, StepWork]
    files: dict[str, ColumnFile] = field(default_factory=dict)
    reads: int = 0
    decodes: int = 0
    settled: Settled | None = None


def run_pass(
    context: PassContext,
    shard: int,
    rows_file: str,
    files: Mapping[str, ColumnFile],
    engine: FilterEngine,
    proven: frozenset[str] = frozenset(),
    earlier: str = "",
) -> PassResult:
    """Compute what this pass still lacks for one shard, commit it, and say where the rows stand.

    `proven` names the sets of which some row is known to have succeeded elsewhere; `earlier` as in `settle`.

    Rows that an earlier run or pass covered are not touched; where nothing is missing no media is read and no stage
    is opened. Every set of the pass has a column file for the shard afterwards, if only with `uncovered` rows.
    """
    view = ShardView(context.store, shard, rows_file, context.sets, files)
    lanes = _lanes(context, view, engine)
    job = _ShardJob(context, view, engine, proven, files)
    if any(walk(view, mine, engine, before, final=False).missing for before, mine in lanes):
        job.compute(lanes)
    job.commit()
    states = [walk(view, mine, engine, before, final=True) for before, mine in lanes]
    result = replace(_result(view, lanes, states, job.work), files=job.files, reads=job.reads, decodes=job.decodes)
    if not context.verdicts or any(w.transient for w in result.work.values()):
        return result
    # Another attempt at the shard may have committed first, so that what stands is not what is in memory.
    stands, folder = {**files, **job.files}, context.verdicts
    settled = settle_shard(context.store, context.steps, shard, rows_file, stands, folder, earlier, engine)
    return replace(result, settled=settled)


def finished_pass(
    context: PassContext,
    shard: int,
    rows_file: str,
    files: Mapping[str, ColumnFile],
    engine: FilterEngine,
    earlier: str = "",
) -> PassResult | None:
    """The result of a pass that has nothing left to compute for this shard; None when it has."""
    if any(name not in files for name in context.sets.values()):
        return None
    view = ShardView(context.store, shard, rows_file, context.sets, files)
    view.expect(context.steps)
    lanes = _lanes(context, view, engine)
    states = []
    for before, mine in lanes:
        states.append(walk(view, mine, engine, before, final=False))
        if states[-1].missing:
            return None
    result = _result(view, lanes, states, {b.step.position: StepWork() for b in lanes[0][1]})
    if context.verdicts:
        result.settled = settle(context.steps, view, states[0], context.verdicts, earlier)
    return result


# Where the rows of one track (see `survivors.tracks`) stand before the pass, and the track's steps in it.
_Lane = tuple[Walk, list[BoundStep]]


def _lanes(context: PassContext, view: ShardView, engine: FilterEngine) -> list[_Lane]:
    """The track that decides the verdicts, with every step of the pass, then those past the filters."""
    lanes = []
    for track in tracks(context.steps):
        earlier = [b for b in track if b.step.position <= context.begin]
        lanes.append((walk(view, earlier, engine, start(view)), track[len(earlier) :]))
    return [lane for lane in lanes if lane is lanes[0] or lane[1]]


def _result(view: ShardView, lanes: Sequence[_Lane], states: Sequence[Walk], work: dict[int, StepWork]) -> PassResult:
    """Counted are the rows that reached a step on any track."""
    reached = {position: np.zeros(len(view), bool) for position in work}
    for (_, mine), state in zip(lanes, states, strict=True):
        for bound in mine:
            reached[bound.step.position] |= state.alive | (state.left >= bound.step.position)
    for bound in lanes[0][1]:
        was_in, done = reached[bound.step.position], work[bound.step.position]
        done.rows_in = int(was_in.sum())
        if bound.set_name:
            codes = view.columns(bound.set_name).codes[was_in]
            done.failed = int((codes != COMPUTED).sum())
            done.transient = int((codes == TRANSIENT).sum())
    return PassResult(view.shard, len(view), int(states[0].alive.sum()), work)


class _ShardJob:
    """The computing of one pass over one shard."""

    def __init__(
        self,
        context: PassContext,
        view: ShardView,
        engine: FilterEngine,
        proven: frozenset[str],
        known: Mapping[str, ColumnFile],
    ) -> None:
        self.context, self.view, self.engine, self.proven = context, view, engine, proven
        self.steps = context.steps[context.begin :]
        self.work = {b.step.position: StepWork() for b in self.steps}
        self.buffers: dict[str, ColumnBuffer] = {}
        self.files: dict[str, ColumnFile] = {}
        self.known = dict(known)  # set → its newest file
        self.reads = self.decodes = 0
        self._journals: dict[str, Journal] = {}
        self._reader = MediaReader(context.store)
        self._chunks = Chunks(view, self.steps, self._reader, context.threads)
        self._ahead: DecodeAhead | None = None
        self._ids = view.row_ids
        self._tried: dict[str, Mask] = {}
        for bound in self.steps:
            if bound.set_name and bound.set_name not in self.buffers:
                self._tried[bound.set_name] = np.zeros(len(view), bool)
                self.buffers[bound.set_name] = ColumnBuffer(view, bound)
                view.replace(bound.set_name, self.buffers[bound.set_name])

    def compute(self, lanes: Sequence[_Lane]) -> None:
        """Rows in chunks; those a dead worker was busy with come last, alone, after the others are committed."""
        folder = journal_folder(self.context.dataset_id)
        self._journals = {
            name: Journal(folder / f"{name}-{self.view.shard:05d}.json", self.context.run) for name in self.buffers
        }
        ahead = folder / f"{next(iter(self.buffers))}-{self.view.shard:05d}-ahead.json"
        self._journals["ahead"] = Journal(ahead, self.context.run, is_alone=False)
        rows = np.flatnonzero(np.any([before.alive for before, _ in lanes], axis=0))
        suspects = {r for journal in self._journals.values() for r in (*journal.suspects, *journal.deaths)}
        killers = {r for journal in self._journals.values() for r in journal.deaths}
        alone = [int(r) for r in rows if int(self._ids[r]) in suspects]
        # Rows that have killed a worker alone come after those that may be innocent, whose values are then committed.
        tried = [[r for r in alone if (int(self._ids[r]) in killers) is again] for again in (False, True)]
        try:
            self._run_chunks(lanes, np.setdiff1d(rows, np.array(alone, np.int64)))
            for some in tried:
                if some:
                    self.commit()
                for row in some:
                    one = np.array([row])
                    self._run_chunk(lanes, one, self._chunks.cache(one))
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
        finally:
            self._reader.close()

    def _run_chunks(self, lanes: Sequence[_Lane], rows: npt.NDArray[np.int64]) -> None:
        """Chunk after chunk; where threads may decode beside the model, they go on from one into the next."""
        threads = decode_threads(self.steps, self.context.threads)
        # Two chunks are in memory at a time, the one at hand and the one that is begun.
        chunks = self._chunks.cut(rows, DECODED_BYTES // 2 if threads else DECODED_BYTES)
        if not threads or not chunks:
            for chunk in chunks:
                self._run_chunk(lanes, chunk, self._chunks.cache(chunk))
            return
        self._ahead = DecodeAhead(threads, self._journals["ahead"])
        early, variants = first_wanted(self.view, self.engine, *lanes[0]) if len(chunks) > 1 else (rows[:0], ())
        cache = self._chunks.cache(chunks[0])
        try:
            for chunk, following in zip(chunks, [*chunks[1:], None], strict=True):
                then = self._chunks.cache(following) if following is not None else None
                if then is not None and following is not None:
                    soon = np.flatnonzero(np.isin(following, early)).tolist()
                    then.expect(soon)
                    self._ahead.expect_later((then, i, int(self._ids[following[i]]), variants) for i in soon)
                self._run_chunk(lanes, chunk, cache)
                cache = then
        finally:
            self._ahead.stop()
            self._ahead = None

    def _run_chunk(self, lanes: Sequence[_Lane], chunk: npt.NDArray[np.int64], cache: DecodedCache | None) -> None:
        in_chunk = np.zeros(len(self.view), bool)
        in_chunk[chunk] = True
        position_of = {int(r): i for i, r in enumerate(chunk)}
        for before, mine in lanes:
            state = before.copy()
            for bound in mine:
                rows = np.flatnonzero(state.alive & in_chunk)
                if not len(rows):
                    break
                if bound.step.kind == "filter":
                    apply_filter(self.view, bound, self.engine, state, rows)
                    continue
                needed = self._needed(bound, rows)
                if len(needed):
                    self._run_stage(bound, self.buffers[bound.set_name], needed, cache, position_of)
                take_failed(self.view, bound, state, rows)
        if cache is not None:
            self.reads += cache.reads
            self.decodes += cache.decodes

    def _needed(self, bound: BoundStep, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Which of these rows to compute: no row twice, for it would have been judged by a value it no longer has.

        So too between two steps that share a set: the second computes only what nobody asked for before.
        """
        codes, tried = self.buffers[bound.set_name].codes[rows], self._tried[bound.set_name]
        needed = rows[(codes == NOT_COVERED if bound.is_repeat else codes > PERMANENT) & ~tried[rows]]
        tried[needed] = True
        return needed

    def _run_stage(
        self,
        bound: BoundStep,
        buffer: ColumnBuffer,
        rows: npt.NDArray[np.int64],
        cache: DecodedCache | None,
        position_of: Mapping[int, int],
    ) -> None:
        began = time.perf_counter()
        contract = bound.step.contract
        assert contract is not None
        work = self.work[bound.step.position]
        if cache is not None and bound.step.media:
            cache.expect([position_of[int(r)] for r in rows])
        ready = input_coverage(self.view, bound.step, rows)
        for row in rows[~ready]:
            buffer.put(int(row), Failed("input", transient=True))
        journal = self._journals[bound.set_name]
        rows = self._without_given_up(rows[ready], journal, buffer)
        size = bound.resolved.batch_shape or ROWS_PER_CALL
        if self._ahead is not None and cache is not None:
            self._expect(bound, rows, cache, [position_of[int(r)] for r in rows])
        for first in range(0, len(rows), size):
            some = rows[first : first + size]
            batch = Batch(self.view.gather(bound.step.inputs, some), cache, [position_of[int(r)] for r in some])
            stage, tracker = opened(bound, journal)
            tracker.has_succeeded |= bound.set_name in self.proven
            if self._ahead is not None:
                self._ahead.go_on(len(some), bound.step.name)
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

    def _expect(
        self, bound: BoundStep, rows: npt.NDArray[np.int64], cache: DecodedCache, positions: Sequence[int]
    ) -> None:
        """Tell the threads beside the model what the step will ask of the chunk's pictures."""
        assert self._ahead is not None
        assert bound.step.contract is not None
        variants = bound.step.contract.pixels
        masks = {p.masked for p in variants}
        inputs = [i for i in bound.step.inputs if i.visible in masks]
        if inputs and len(rows):
            boxes = Batch(self.view.gather(inputs, rows), cache, positions)
            for pixels in variants:
                boxes.know_boxes(pixels)
        self._ahead.expect((cache, i, int(r), variants) for i, r in zip(positions, self._ids[rows], strict=True))

    def _without_given_up(
        self, rows: npt.NDArray[np.int64], journal: Journal, buffer: ColumnBuffer
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
                self.files[name] = publish_columns(
                    self.context.store, name, self.view.shard, table, base, self.known.get(name)
                )
                self.known[name] = self.files[name]
                buffer.changed, buffer.committed = False, True


def journal_folder(dataset_id: str) -> Path:
    """Where workers on this node keep their journals of one dataset."""
    return scratch_root() / "journal" / hashlib.sha256(dataset_id.encode()).hexdigest()[:16]
