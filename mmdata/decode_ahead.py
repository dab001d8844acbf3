"""Reading, decoding and resizing on threads beside the model: while it works on one batch, the next ones are made.

In: the rows a step is about to work on, batch by batch, and those that come next, at last those of another shard.
Out: pictures in their caches, before they are asked for. No more rows are under way at a time than a model call or two
takes, and only in the chunk at hand and the next, which bound the bytes. The rows under way are noted in a journal of
their own before they are begun, for a decoder may take the worker with it: they are then tried alone, and only a death
while alone charges a row. Rows of another shard are noted in that shard's journal: see `next_shard`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import islice

import numpy as np
import numpy.typing as npt

from mmdata.batch import DecodedCache
from mmdata.filters import FilterEngine
from mmdata.stage import Pixels
from mmdata.survivors import PERMANENT, BoundStep, ShardView, Walk, apply_filter
from mmdata.worker_journal import Journal

__all__ = ["DecodeAhead", "Wanted", "decode_threads", "first_wanted"]

LEAST_ROWS = 64  # under way at a time, where a model call takes fewer

# cache, index of the row in it, row_id, and the variants to make
Wanted = tuple[DecodedCache, int, int, Sequence[Pixels]]


def decode_threads(steps: Sequence[BoundStep], threads: int) -> int:
    """How many threads decode beside the model; 0 where a worker has one CPU for both, and nothing would be gained."""
    looking = [b for b in steps if b.step.contract is not None and b.step.contract.pixels]
    on_device = [b for b in looking if b.resolved.device != "cpu"]
    if on_device:
        asked = (b.step.contract.needs.threads for b in on_device if b.step.contract is not None)
        return max(threads, *asked)
    return threads if looking and threads > 1 else 0


def first_wanted(
    view: ShardView, engine: FilterEngine, before: Walk, steps: Sequence[BoundStep]
) -> tuple[npt.NDArray[np.int64], Sequence[Pixels]]:
    """The rows that the first step that looks at pictures will ask for, and what of them, where that is known before.

    That is where no filter before it reads a column that is computed in the pass. Of the rows found, the step does not
    see those that fail at a step before it.
    """
    state = before.copy()
    computed: set[int] = set()  # positions of steps
    for bound in steps:
        if bound.step.kind == "filter":
            if any(i.made_by in computed for i in bound.step.inputs if i.made_by is not None):
                break
            apply_filter(view, bound, engine, state, np.flatnonzero(state.alive))
            continue
        contract = bound.step.contract
        if contract is None or any(p.masked for p in contract.pixels):
            break
        if not contract.pixels:
            computed.add(bound.step.position)
            continue
        undone = view.columns(bound.set_name).codes > PERMANENT
        return np.flatnonzero(state.alive & undone), contract.pixels
    return np.empty(0, np.int64), ()


class _Threads:
    """Threads that the shard at hand and the one that comes next share; they end with the last who uses them."""

    def __init__(self, count: int) -> None:
        self.lock = threading.RLock()  # held by whoever gives the threads work, which two may do
        self._count = count
        self._users = 1
        self._pool: ThreadPoolExecutor | None = None

    @property
    def pool(self) -> ThreadPoolExecutor:
        """Started when first needed."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._count, thread_name_prefix="decode")
        return self._pool

    def shared(self) -> _Threads:
        """For one more user."""
        with self.lock:
            self._users += 1
        return self

    def leave(self) -> None:
        """To be called once by every user."""
        with self.lock:
            self._users -= 1
            ended = self._pool if not self._users else None
        if ended is not None:
            ended.shutdown(wait=True, cancel_futures=True)


class DecodeAhead:
    """The threads, and the rows they are given, in order.

    First come those of the step at hand, then those of the next chunk, then those of the next shard, which has a
    DecodeAhead of its own over the same threads.
    """

    def __init__(self, threads: int | _Threads, journal: Journal) -> None:
        self._threads, self._journal = threads if isinstance(threads, _Threads) else _Threads(threads), journal
        self._now: deque[Wanted] = deque()
        self._later: deque[Wanted] = deque()
        self._under_way: dict[int, Future[None]] = {}  # row_id →
        self._is_noted = self._is_stopped = self._has_left = False
        self._step = ""
        self._spare = 0  # how many rows of the next shard may be under way; 0 while there are some of this one to begin
        self._next: DecodeAhead | None = None
        self.is_last = True  # whether no shard comes after this one; to be said before that shard begins anything

    def for_next(self, journal: Journal) -> DecodeAhead:
        """Another one over the same threads, for the shard that comes next."""
        return DecodeAhead(self._threads.shared(), journal)

    def expect(self, wanted: Iterable[Wanted]) -> None:
        """What the step that begins now will ask for, in its order; in place of what the last one would have."""
        found = list(wanted)
        self._now = deque(found if any(cache.lacks(row, variants) for cache, row, _, variants in found) else [])

    def expect_later(self, wanted: Iterable[Wanted]) -> None:
        """What the next chunk will ask for first."""
        self._later = deque(wanted)

    def expect_next(self, other: DecodeAhead) -> None:
        """The next shard knows what it will ask for: it is begun once all of this one is. Any thread may say so."""
        with self._threads.lock:
            self._next = other
            other._start(self._spare, self._step)

    def go_on(self, rows: int, step: str) -> None:
        """A batch of the step's next `rows` is about to be computed: begin these, and what comes after them."""
        with self._threads.lock:
            most = max(LEAST_ROWS, 2 * rows)
            self._forget_done()
            chosen = [self._now.popleft() for _ in range(min(rows, len(self._now)))]
            room = most - len(self._under_way)
            chosen += islice(self._now, max(0, room))  # begun, but still the step's: `begin` twice is once
            room -= len(self._now)
            while room > 0 and self._later:
                chosen.append(self._later.popleft())
                room -= 1
            self._begin(chosen, step)
            self._spare = max(0, room)
            if self._next is not None:
                self._next._start(self._spare, step)

    def _start(self, most: int, step: str) -> None:
        """Begin what is wanted now, as long as no more than `most` rows are under way."""
        self._forget_done()
        room = most - len(self._under_way)
        if not self._is_stopped and room > 0:
            self._begin([self._now.popleft() for _ in range(min(room, len(self._now)))], step)

    def _forget_done(self) -> None:
        self._under_way = {r: f for r, f in self._under_way.items() if not f.done()}

    def _begin(self, chosen: Sequence[Wanted], step: str) -> None:
        self._step = step
        fresh = [w for w in chosen if w[0].lacks(w[1], w[3])]
        if not fresh:
            if self._is_noted and not self._under_way:
                self._is_noted = False
                self._journal.end()
            return
        self._is_noted = True
        self._journal.begin([*self._under_way, *(w[2] for w in fresh)], step)
        for cache, index, row_id, variants in fresh:
            self._under_way[row_id] = cache.begin(self._threads.pool, index, variants)

    def is_quiet(self) -> bool:
        """Whether nothing is under way, nor will be before the next `go_on`: a death now is the model's."""
        with self._threads.lock:
            return self.is_last and all(f.done() for f in self._under_way.values())

    def take_over(self, journal: Journal) -> None:
        """The shard is at hand from now on: what is under way is noted in this journal, no longer in the other."""
        with self._threads.lock:
            self._forget_done()
            if self._under_way:
                journal.begin(list(self._under_way), self._step)
            self._is_noted = bool(self._under_way)
            self._journal.end()
            self._journal = journal

    def stop(self) -> None:
        """Call off what has not begun and wait for what has; nobody is charged for anything from here on.

        The next shard goes on with what it has begun.
        """
        with self._threads.lock:
            self._is_stopped = True
            self._now.clear()
            self._later.clear()
            under_way = list(self._under_way.values())
        wait([f for f in under_way if not f.cancel()])
        self._under_way = {}
        if self._is_noted:
            self._is_noted = False
            self._journal.end()
        if not self._has_left:
            self._has_left = True
            self._threads.leave()
