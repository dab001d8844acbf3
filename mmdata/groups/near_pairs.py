"""All pairs of 64-bit hashes within a Hamming radius: none missed, each given once, memory bounded.

In: hashes, (N,) uint64, and a radius, 0 to 63. Out: blocks of pairs of positions. Fails: nothing.

The bits in which the hashes differ at all are cut into radius + k blocks. Two hashes that differ in at most `radius`
bits agree in at least k whole blocks, so sorting by every choice of k blocks brings each such pair into one run of
equal keys (Manku, Jain and Das Sarma 2007, the block-permutation index). A larger k means more sorts and shorter runs;
it is chosen by the number of hashes; k = 0 compares all with all. A pair is given by the first choice that finds it.

Skew: a run that is much longer than the average is not compared pair by pair. Its hashes agree in the key's bits, which
therefore are left out, and the same search is made among them over the bits that are left, as often as it takes.
Nothing is capped; `Skew` tells how much there was of it.

Memory: what is sorted, 8 bytes a hash and thread, lies in scratch where the caller gives some, and is compared a
million hashes at a time (of more than two threads: each fewer), with some 100 bytes each. Bit-flip probes (Norouzi,
Punjani and Fleet 2012) find the same pairs; over whole lists, sorts took less time here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise
from math import comb

import numpy as np
import numpy.typing as npt

from mmdata.groups.mapped import IN_MEMORY, Mapped, gathered, stretches

__all__ = ["LONG_RUN", "Skew", "close_between", "each_pair"]

Hashes = npt.NDArray[np.uint64]
Positions = npt.NDArray[np.int64]
Pairs = tuple[Positions, Positions]
Trees = Callable[[Positions], Positions]

_KEY_BITS = 32
_ROWS = 1 << 20  # compared at once, but for the rows of a longer run
_PAIRS = 1 << 20  # compared at once in a long run
_SHORT = 64  # rows of a run whose pairs are compared shift by shift, with all other runs
_HALF, _LOW = np.uint64(32), np.uint64(0xFFFFFFFF)
LONG_RUN = 4096  # rows of a run that is searched like a list of its own
_SORT_COST = 24  # of one hash in one sort, in units of one comparison


@dataclass
class Skew:
    """What a search met: `long_runs` runs of equal keys above 4,096 rows, `longest` rows the largest of all."""

    long_runs: int = 0
    longest: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def met(self, runs: npt.NDArray[np.int64]) -> None:
        """Count runs of these lengths."""
        with self.lock:
            self.long_runs += int((runs > LONG_RUN).sum())
            self.longest = max(self.longest, int(runs.max(initial=0)))


@dataclass(frozen=True)
class _Search:
    """`split`: of pairs only those with left < split <= right. `tree`: no pairs of equal trees, where a run has one."""

    radius: int
    split: int | None
    tree: Trees | None
    skew: Skew
    mapped: Mapped
    rows: int  # compared at once


def each_pair(
    hashes: Hashes,
    radius: int,
    take: Callable[[Positions, Positions], None],
    *,
    threads: int = 1,
    tree: Trees | None = None,
    skew: Skew | None = None,
    mapped: Mapped = IN_MEMORY,
) -> None:
    """Call `take(left, right)`, left < right, with blocks of all pairs at most `radius` bits apart, one at a time.

    An exception of `take` ends the search. `tree` gives a number for each of some positions, never while `take` is at
    work: pairs of equal ones may be left out. What is sorted lies in `mapped`.
    """
    blocks, kept = _blocks(hashes, radius)
    lock = threading.Lock()
    failed = threading.Event()

    def known(some: Positions) -> Positions:
        assert tree is not None
        with lock:
            return tree(some)

    rows = max(1, _ROWS // max(1, threads // 2))
    search = _Search(radius, None, known if tree else None, skew or Skew(), mapped, rows)

    def run(chosen: tuple[int, ...]) -> None:
        try:
            for left, right in _agreeing(hashes, blocks, chosen, search):
                if failed.is_set():
                    return
                with lock:
                    take(left, right)
        except BaseException:
            failed.set()
            raise

    choices = list(combinations(range(len(blocks)), kept))
    if threads == 1 or len(choices) == 1:
        for chosen in choices:
            run(chosen)
    else:
        with ThreadPoolExecutor(threads) as pool:
            futures = [pool.submit(lambda c: None if failed.is_set() else run(c), chosen) for chosen in choices]
        for error in filter(None, (f.exception() for f in futures)):
            raise error


def close_between(
    earlier: Hashes, hashes: Hashes, radius: int, skew: Skew | None = None, mapped: Mapped = IN_MEMORY
) -> Iterator[Pairs]:
    """Blocks of (i, j) with `earlier[i]` and `hashes[j]` at most `radius` bits apart, each pair once.

    Memory is that of one sort, whatever the number of pairs; both lists once more, and what is sorted, are in `mapped`.
    """
    if not len(earlier) or not len(hashes):
        return
    both = mapped.array(np.uint64, len(earlier) + len(hashes))
    both[: len(earlier)] = earlier
    both[len(earlier) :] = hashes
    blocks, kept = _blocks(both, radius)
    search = _Search(radius, len(earlier), None, skew or Skew(), mapped, _ROWS)
    for chosen in combinations(range(len(blocks)), kept):
        for left, right in _agreeing(both, blocks, chosen, search):
            yield left, right - len(earlier)


def _blocks(hashes: Hashes, radius: int) -> tuple[list[np.uint64], int]:
    """The blocks as masks, over the bits in which the hashes differ, and how many of them a pair shares at least."""
    if len(hashes) < 2:
        return [], 0
    differing = 0
    for some in stretches(len(hashes)):
        differing |= int(np.bitwise_or.reduce(hashes[some] ^ hashes[0]))
    bits = [b for b in range(64) if differing >> b & 1]

    def cost(kept: int) -> float:
        key_bits = min(_KEY_BITS, len(bits) * kept / (radius + kept)) if kept else 0
        run = len(hashes) / 2.0 ** (key_bits + 1)
        return comb(radius + kept, kept) * ((_SORT_COST if kept else 0) + run)

    kept = min(range(max(0, min(4, len(bits) - radius)) + 1), key=cost)
    if not kept:
        return [], 0
    edges = np.linspace(0, len(bits), radius + kept + 1).round().astype(int).tolist()
    return [np.uint64(sum(1 << b for b in bits[low:high])) for low, high in pairwise(edges)], kept


def _agreeing(hashes: Hashes, blocks: list[np.uint64], chosen: tuple[int, ...], search: _Search) -> Iterator[Pairs]:
    """The close pairs that agree in the chosen blocks, and not in k that come before."""
    for order, starts in _runs(hashes, [blocks[c] for c in chosen], search):
        values = gathered(_for(search, len(order)), hashes, order)
        ends = np.append(starts[1:], len(order))
        lengths = ends - starts
        search.skew.met(lengths)
        for left, right in _within_runs(values, order, starts, lengths, search):
            left, right = order[left], order[right]
            if search.split is not None:
                across = (left < search.split) & (right >= search.split)
                left, right = left[across], right[across]
            first = _is_first(hashes[left] ^ hashes[right], blocks, chosen)
            if first.any():
                yield left[first], right[first]


def _is_first(differing: Hashes, blocks: list[np.uint64], chosen: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """Whether the chosen blocks are the first of those in which each pair agrees."""
    found = np.ones(len(differing), bool)
    for index in range(max(chosen, default=-1) + 1):
        found &= ((differing & blocks[index]) == 0) == (index in chosen)
    return found


def _runs(hashes: Hashes, masks: list[np.uint64], search: _Search) -> Iterator[tuple[Positions, Positions]]:
    """Positions sorted by the bits of the masks, ascending among equals, and where each run of equal bits starts.

    Some at a time; a run is never cut.
    """
    if not masks:
        yield np.arange(len(hashes)), np.zeros(min(1, len(hashes)), np.int64)
        return
    with _for(search, len(hashes)).lent(np.uint64, len(hashes)) as both:  # key << 32 | position
        for some in stretches(len(hashes)):
            both[some] = _keys(hashes[some], masks).astype(np.uint64) << _HALF
            both[some] |= np.arange(some.start, some.stop, dtype=np.uint64)
        both.sort()
        first = 0
        while first < len(both):
            last = _whole_runs(both, first, first + search.rows)
            order = _for(search, last - first).array(np.int64, last - first)
            for some in stretches(last - first):
                order[some] = both[first:last][some] & _LOW
            starts = np.zeros(1, np.int64)
            if last - first <= search.rows:  # else it is one run
                keys = (both[first:last] >> _HALF).astype(np.uint32)
                starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
                del keys
            yield order, starts
            first = last


def _for(search: _Search, rows: int) -> Mapped:
    """Where to put as many values: what is compared at once lies in memory."""
    return IN_MEMORY if rows <= search.rows else search.mapped


def _whole_runs(both: Hashes, first: int, last: int) -> int:
    """Where to end so that no run is cut: at `last` or before, beyond it where the run at `first` goes further."""
    if last >= len(both):
        return len(both)
    begins = int(np.searchsorted(both, both[last] >> _HALF << _HALF))
    return begins if begins > first else int(np.searchsorted(both, both[last] | _LOW, side="right"))


def _keys(hashes: Hashes, masks: list[np.uint64]) -> npt.NDArray[np.uint32]:
    """The bits of the masks side by side, at most 32 of them."""
    pieces = []  # (lowest bit, length) of each stretch of set bits
    for mask in masks:
        text = f"{int(mask):064b}"[::-1]
        start = text.find("1")
        while start >= 0:
            end = (text + "0").find("0", start)
            pieces.append((start, end - start))
            start = text.find("1", end)
    keys = np.zeros(len(hashes), np.uint32)
    used = 0
    for low, length in pieces:
        many = min(length, _KEY_BITS - used)
        if many:
            piece = (hashes >> np.uint64(low)) & np.uint64((1 << many) - 1)
            keys |= piece.astype(np.uint32) << np.uint32(used)
            used += many
    return keys


def _within_runs(
    values: Hashes, order: Positions, starts: Positions, lengths: Positions, search: _Search
) -> Iterator[Pairs]:
    """Pairs of places in the sort that are close: of every run, and perhaps of neighbours beyond its end."""
    short = lengths <= _SHORT
    if short.any():
        after = np.zeros(len(values), np.uint8)  # how many rows of its run come after each
        many = lengths[short]
        at = np.repeat(starts[short], many) + _counted(many)
        after[at] = np.repeat(many, many) - 1 - _counted(many)
        yield from _by_shifts(values, after, int(many.max()), search.radius)
    for start, length in zip(starts[~short].tolist(), lengths[~short].tolist(), strict=True):
        for left, right in _within_run(values[start : start + length], order[start : start + length], search):
            yield left + start, right + start


def _counted(lengths: Positions) -> Positions:
    """0, 1, … for each length, one after the other."""
    return np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _by_shifts(values: Hashes, after: npt.NDArray[np.uint8], longest: int, radius: int) -> Iterator[Pairs]:
    """Every place against the one `shift` further on, as long as runs reach so far."""
    left: Positions | None = None
    for shift in range(1, longest):
        if left is None and 4 * np.count_nonzero(after >= shift) < len(values):
            left = np.flatnonzero(after >= shift)
        if left is None:
            near = np.flatnonzero(np.bitwise_count(values[:-shift] ^ values[shift:]) <= radius)
            near = near[after[near] >= shift]
        else:
            left = left[after[left] >= shift]
            near = left[np.bitwise_count(values[left] ^ values[left + shift]) <= radius]
        if len(near):
            yield near, near + shift


def _within_run(values: Hashes, order: Positions, search: _Search) -> Iterator[Pairs]:
    """All close pairs of one long run."""
    tree = search.tree
    if tree is not None and _is_one_tree(tree, order):
        return
    # Positions ascend in a run: those before the split stand first.
    split = None if search.split is None else int(np.searchsorted(order, search.split))
    if split in (0, len(order)):
        return
    if len(values) > LONG_RUN:
        within = replace(search, split=split, tree=None if tree is None else lambda some: tree(order[some]))
        blocks, kept = _blocks(values, search.radius)
        if kept:
            for chosen in combinations(range(len(blocks)), kept):
                yield from _agreeing(values, blocks, chosen, within)
            return
    yield from _all_pairs(values, split, search.radius)


def _is_one_tree(tree: Trees, order: Positions) -> bool:
    first = None
    for some in stretches(len(order)):
        trees = tree(order[some])
        first = trees[0] if first is None else first
        if (trees != first).any():
            return False
    return True


def _all_pairs(values: Hashes, split: int | None, radius: int) -> Iterator[Pairs]:
    """Each with all that come after it, or that come after the split."""
    rows = len(values) if split is None else split
    many = max(1, _PAIRS // len(values))
    for top in range(0, rows, many):
        first = top + 1 if split is None else split
        some = values[top : min(top + many, rows)]
        near = np.bitwise_count(some[:, None] ^ values[None, first:]) <= radius
        left, right = np.nonzero(near)
        left, right = left + top, right + first
        if split is None:
            later = right > left
            left, right = left[later], right[later]
        if len(left):
            yield left, right
