"""Reading, decoding and resizing on threads beside the model: while it works on one batch, the next ones are made.

In: the rows a step is about to work on, batch by batch, and those that come next. Out: pictures in their caches, before
they are asked for. No more rows are under way at a time than a model call or two takes, and only in the chunk at hand
and the next, which bound the bytes. The rows under way are noted in a journal of their own before they are begun, for a
decoder may take the worker with it: they are then tried alone, and only a death while alone charges a row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
    """The rows that the first step of a pass will look at, and what of them, where that is known before it begins.

    That is where nothing but filters comes before it: none of the columns they read is computed in the pass.
    """
    state = before.copy()
    for bound in steps:
        if bound.step.kind == "filter":
            apply_filter(view, bound, engine, state, np.flatnonzero(state.alive))
            continue
        contract = bound.step.contract
        if contract is None or not contract.pixels or any(p.masked for p in contract.pixels):
            break
        undone = view.columns(bound.set_name).codes > PERMANENT
        return np.flatnonzero(state.alive & undone), contract.pixels
    return np.empty(0, np.int64), ()


class DecodeAhead:
    """The threads, and the rows they are given, in order: those of the step at hand, then those of the next chunk."""

    def __init__(self, threads: int, journal: Journal) -> None:
        self._threads, self._journal = threads, journal
        self._pool: ThreadPoolExecutor | None = None
        self._now: deque[Wanted] = deque()
        self._later: deque[Wanted] = deque()
        self._under_way: dict[int, Future[None]] = {}  # row_id →
        self._is_noted = False

    def expect(self, wanted: Iterable[Wanted]) -> None:
        """What the step that begins now will ask for, in its order; in place of what the last one would have."""
        found = list(wanted)
        self._now = deque(found if any(cache.lacks(row, variants) for cache, row, _, variants in found) else [])

    def expect_later(self, wanted: Iterable[Wanted]) -> None:
        """What the next chunk will ask for first."""
        self._later = deque(wanted)

    def go_on(self, rows: int, step: str) -> None:
        """A batch of the step's next `rows` is about to be computed: begin these, and what comes after them."""
        most = max(LEAST_ROWS, 2 * rows)
        self._under_way = {r: f for r, f in self._under_way.items() if not f.done()}
        chosen = [self._now.popleft() for _ in range(min(rows, len(self._now)))]
        room = most - len(self._under_way)
        chosen += islice(self._now, max(0, room))  # begun, but still the step's: `begin` twice is once
        room -= len(self._now)
        while room > 0 and self._later:
            chosen.append(self._later.popleft())
            room -= 1
        fresh = [w for w in chosen if w[0].lacks(w[1], w[3])]
        if not fresh:
            if self._is_noted and not self._under_way:
                self._is_noted = False
                self._journal.end()
            return
        self._is_noted = True
        self._journal.begin([*self._under_way, *(w[2] for w in fresh)], step)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="decode")
        for cache, index, row_id, variants in fresh:
            self._under_way[row_id] = cache.begin(self._pool, index, variants)

    def stop(self) -> None:
        """Call off what has not begun and wait for what has; nobody is charged for anything from here on."""
        self._now.clear()
        self._later.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        self._under_way = {}
        if self._is_noted:
            self._is_noted = False
            self._journal.end()
