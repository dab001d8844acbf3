"""The computing of one pass over one shard: its rows in chunks, its columns in buffers, what is computed committed.

In: where the rows stand before the pass, and its steps. Out: column files, and counts of what was done. The media of a
chunk is read and decoded on threads beside the model where there are such; they go on from a chunk into the next one,
and from the last one into the first chunk of the shard that comes next, if its job was told to `look_ahead`. So there
are two chunks in memory at a time, the one at hand and the one that is begun, and each takes half of the bytes.
What a dead worker was doing stands in journals in node scratch: rows it was busy with come last, alone.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
from mmdata.media_cells import HELD_BYTES
from mmdata.media_reader import MediaReader
from mmdata.open_stages import opened
from mmdata.scratch import scratch_root
from mmdata.stage import Failed
from mmdata.store import Store
from mmdata.survivors import (
    NOT_COVERED,
    PERMANENT,
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
from mmdata.worker_journal import Journal

__all__ = ["Lane", "PassContext", "Prepare", "ShardFiles", "ShardJob", "StepWork", "journal_folder", "lanes_of"]

DECODED_BYTES = 256 << 20  # of one chunk: pictures in full and their variants
ROWS_PER_CALL = 256  # of a stage without a model
Rows = npt.NDArray[np.int64]


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


@dataclass(frozen=True)
class ShardFiles:
    """A shard as it stands: the name of its base rows, and set name → its newest column file."""

    number: int
    rows_file: str
    files: Mapping[str, ColumnFile]


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


# Where the rows of one track (see `survivors.tracks`) stand before the pass, and the track's steps in it.
Lane = tuple[Walk, list[BoundStep]]
# Called when the last chunk of a shard begins: whatever comes next may use the same threads.
Prepare = Callable[[DecodeAhead], None]


def lanes_of(context: PassContext, view: ShardView, engine: FilterEngine) -> list[Lane]:
    """The track that decides the verdicts, with every step of the pass, then those past the filters."""
    lanes = []
    for track in tracks(context.steps):
        earlier = [b for b in track if b.step.position <= context.begin]
        lanes.append((walk(view, earlier, engine, start(view)), track[len(earlier) :]))
    return [lane for lane in lanes if lane is lanes[0] or lane[1]]


@dataclass
class _Begun:
    """The first chunk of a shard whose turn has not come yet; its pictures are made meanwhile."""

    chunk: Rows
    cache: DecodedCache | None
    ahead: DecodeAhead


class ShardJob:
    """The computing of one pass over one shard. Whether it is computed or not, somebody must `let_go` of it.

    `lanes` say where the rows stand; `engine` and `proven` may be set anew before it is computed.
    """

    def __init__(self, context: PassContext, shard: ShardFiles, engine: FilterEngine) -> None:
        self.context, self.shard, self.engine = context, shard, engine
        self.proven: frozenset[str] = frozenset()  # sets of which some row is known to have succeeded elsewhere
        self.view = view = ShardView(context.store, shard.number, shard.rows_file, context.sets, shard.files)
        self.lanes = lanes_of(context, view, engine)
        self.steps = context.steps[context.begin :]
        self.work = {b.step.position: StepWork() for b in self.steps}
        self.buffers: dict[str, ColumnBuffer] = {}
        self.files: dict[str, ColumnFile] = {}
        self.known = dict(shard.files)  # set → its newest file
        self.reads = self.decodes = 0
        self._journals: dict[str, Journal] = {}
        self._threads = decode_threads(self.steps, context.threads)
        # Where threads decode ahead, two chunks are in memory at a time, which may be of two shards.
        self._share = 2 if self._threads else 1
        self._reader = MediaReader(context.store, HELD_BYTES // self._share)
        self._chunks = Chunks(view, self.steps, self._reader, context.threads)
        self._ahead: DecodeAhead | None = None
        self._begun: _Begun | None = None
        self._ids = view.row_ids
        self._tried: dict[str, Mask] = {}
        for bound in self.steps:
            if bound.set_name and bound.set_name not in self.buffers:
                self._tried[bound.set_name] = np.zeros(len(view), bool)
                self.buffers[bound.set_name] = ColumnBuffer(view, bound)
                view.replace(bound.set_name, self.buffers[bound.set_name])
        self.is_missing = any(walk(view, mine, engine, before, final=False).missing for before, mine in self.lanes)

    def _journal_path(self, of: str) -> Path:
        first = next(iter(self.buffers))
        name = f"{of}-{self.view.shard:05d}" if of in self.buffers else f"{first}-{self.view.shard:05d}-{of}"
        return journal_folder(self.context.dataset_id) / f"{name}.json"

    def _open_journals(self) -> None:
        run = self.context.run
        self._journals = {name: Journal(self._journal_path(name), run) for name in self.buffers}
        self._journals["ahead"] = Journal(self._journal_path("ahead"), run, is_alone=False)
        self._journals["next"] = Journal(self._journal_path("next"), run, is_alone=False, of_others=True)

    def look_ahead(self, ahead: DecodeAhead) -> None:
        """Have the pictures of the first chunk made, after those of the shard at hand, whose `ahead` that is.

        Not where any journal of this shard tells of a death: it is then tried in its turn, with nothing beside it.
        """
        if not self.is_missing or any(self._journal_path(n).exists() for n in (*self.buffers, "ahead", "next")):
            return
        chunks = self._cut(self._alive())
        early, variants = first_wanted(self.view, self.engine, *self.lanes[0])
        soon = np.flatnonzero(np.isin(chunks[0], early)).tolist() if chunks else []
        cache = self._chunks.cache(chunks[0]) if soon else None
        if cache is None:
            return
        cache.expect(soon)
        mine = ahead.for_next(Journal(self._journal_path("next"), self.context.run, is_alone=False))
        self._begun = _Begun(chunks[0], cache, mine)
        mine.expect((cache, i, int(self._ids[chunks[0][i]]), variants) for i in soon)
        ahead.expect_next(mine)

    def let_go(self) -> None:
        """Call off what is begun ahead, and close what is open."""
        if self._begun is not None:
            self._begun.ahead.stop()
        self._begun = None
        self._reader.close()

    def compute(self, prepare: Prepare | None = None) -> None:
        """Rows in chunks; those a dead worker was busy with come last, alone, after the others are committed.

        `prepare` is called when the last chunk begins, if there are threads and nothing has to go alone after it.
        """
        self._open_journals()
        rows = self._alive()
        suspects = {r for journal in self._journals.values() for r in (*journal.suspects, *journal.deaths)}
        killers = {r for journal in self._journals.values() for r in journal.deaths}
        alone = [int(r) for r in rows if int(self._ids[r]) in suspects]
        # Rows that have killed a worker alone come after those that may be innocent, whose values are then committed.
        tried = [[r for r in alone if (int(self._ids[r]) in killers) is again] for again in (False, True)]
        try:
            self._run_chunks(np.setdiff1d(rows, np.array(alone, np.int64)), None if alone else prepare)
            for some in tried:
                if some:
                    self.commit()
                for row in some:
                    one = np.array([row])
                    self._run_chunk(one, self._chunks.cache(one))
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

    def _alive(self) -> Rows:
        return np.flatnonzero(np.any([before.alive for before, _ in self.lanes], axis=0))

    def _cut(self, rows: Rows) -> list[Rows]:
        return self._chunks.cut(rows, DECODED_BYTES // self._share)

    def _run_chunks(self, rows: Rows, prepare: Prepare | None) -> None:
        """Chunk after chunk; where threads may decode beside the model, they go on from one into the next."""
        chunks = self._cut(rows)
        if not self._threads or not chunks:
            for chunk in chunks:
                self._run_chunk(chunk, self._chunks.cache(chunk))
            return
        early, variants = first_wanted(self.view, self.engine, *self.lanes[0]) if len(chunks) > 1 else (rows[:0], ())
        self._ahead, cache = self._first(chunks[0])
        try:
            for chunk, following in zip(chunks, [*chunks[1:], None], strict=True):
                then = self._chunks.cache(following) if following is not None else None
                if then is not None and following is not None:
                    soon = np.flatnonzero(np.isin(following, early)).tolist()
                    then.expect(soon)
                    self._ahead.expect_later((then, i, int(self._ids[following[i]]), variants) for i in soon)
                elif prepare is not None:
                    prepare(self._ahead)
                self._run_chunk(chunk, cache)
                cache = then
        finally:
            self._ahead.stop()
            self._ahead = None

    def _first(self, chunk: Rows) -> tuple[DecodeAhead, DecodedCache | None]:
        """For the first chunk: what is begun already, if it is that chunk."""
        begun, self._begun = self._begun, None
        if begun is not None and np.array_equal(begun.chunk, chunk):
            begun.ahead.take_over(self._journals["ahead"])
            return begun.ahead, begun.cache
        if begun is not None:
            begun.ahead.stop()
        return DecodeAhead(self._threads, self._journals["ahead"]), self._chunks.cache(chunk)

    def _run_chunk(self, chunk: Rows, cache: DecodedCache | None) -> None:
        in_chunk = np.zeros(len(self.view), bool)
        in_chunk[chunk] = True
        position_of = {int(r): i for i, r in enumerate(chunk)}
        for before, mine in self.lanes:
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

    def _needed(self, bound: BoundStep, rows: Rows) -> Rows:
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
        rows: Rows,
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
            is_alone = self._ahead is None or self._ahead.is_quiet()
            journal.begin(self._ids[some].tolist(), bound.step.name, is_alone)
            results = compute_rows(stage, contract, batch, tracker)
            journal.end()
            for row, result in zip(some, results, strict=True):
                buffer.put(int(row), result)
            work.computed += len(some)
            work.examples.update(tracker.examples)
            work.opened += tracker.opened
            tracker.opened = 0
        work.seconds += time.perf_counter() - began

    def _expect(self, bound: BoundStep, rows: Rows, cache: DecodedCache, positions: Sequence[int]) -> None:
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

    def _without_given_up(self, rows: Rows, journal: Journal, buffer: ColumnBuffer) -> Rows:
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
