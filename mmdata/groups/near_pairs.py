"""All pairs of 64-bit hashes within a Hamming radius: none missed, each given once, memory bounded.

In: hashes, (N,) uint64, and a radius, 0 to 63. Out: blocks of pairs of positions. Fails: nothing.

The bits in which the hashes differ at all are cut into radius + k blocks. Two hashes that differ in at most `radius`
bits agree in at least k whole blocks, so sorting by every choice of k blocks brings each such pair into one run of
equal keys (Manku, Jain and Das Sarma 2007, the block-permutation index). A larger k means more sorts and shorter runs;
it is chosen by the number of hashes; k = 0 compares all with all. A pair is given by the first choice that finds it.

Skew: a run that is much longer than the average is not compared pair by pair. Its hashes agree in the key's bits, which
therefore are left out, and the same search is made among them over the bits that are left, as often as it takes.
Nothing is capped; `Skew` tells how much there was of it.

Memory: a sort takes 4 M hashes at a time (larger lists go by ranges of the key), some 200 MB per thread, and 4 bytes a
hash for the keys. Bit-flip probes (Norouzi, Punjani and Fleet 2012) find the same pairs; over whole lists, sorts took
less time here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from math import comb

import numpy as np
import numpy.typing as npt

__all__ = ["LONG_RUN", "Skew", "close_between", "each_pair"]

Hashes = npt.NDArray[np.uint64]
Positions = npt.NDArray[np.int64]
Pairs = tuple[Positions, Positions]

_KEY_BITS = 32
_ROWS = 1 << 22  # sorted at once
_PAIRS = 1 << 20  # compared at once in a long run
_SHORT = 64  # rows of a run whose pairs are compared shift by shift, with all other runs
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
    tree: Positions | None
    skew: Skew


def each_pair(
    hashes: Hashes,
    radius: int,
    take: Callable[[Positions, Positions], None],
    *,
    threads: int = 1,
    tree: Callable[[], Positions] | None = None,
    skew: Skew | None = None,
) -> None:
    """Call `take(left, right)`, left < right, with blocks of all pairs at most `radius` bits apart, one at a time.

    An exception of `take` ends the search. `tree` gives a number per hash: pairs of equal ones may be left out.
    """
    blocks, kept = _blocks(hashes, radius)
    lock = threading.Lock()
    failed = threading.Event()
    met = skew or Skew()

    def run(chosen: tuple[int, ...]) -> None:
        with lock:
            known = tree() if tree else None
        search = _Search(radius, None, known, met)
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


def close_between(earlier: Hashes, hashes: Hashes, radius: int, skew: Skew | None = None) -> Iterator[Pairs]:
    """Blocks of (i, j) with `earlier[i]` and `hashes[j]` at most `radius` bits apart, each pair once.

    Memory is that of both lists twice and of one sort, whatever the number of pairs.
    """
    if not len(earlier) or not len(hashes):
        return
    both = np.concatenate([earlier, hashes])
    blocks, kept = _blocks(both, radius)
    search = _Search(radius, len(earlier), None, skew or Skew())
    for chosen in combinations(range(len(blocks)), kept):
        for left, right in _agreeing(both, blocks, chosen, search):
            yield left, right - len(earlier)


def _blocks(hashes: Hashes, radius: int) -> tuple[list[np.uint64], int]:
    """The blocks as masks, over the bits in which the hashes differ, and how many of them a pair shares at least."""
    if len(hashes) < 2:
        return [], 0
    differing = int(np.bitwise_or.reduce(hashes ^ hashes[0]))
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
    for order, starts in _runs(hashes, [blocks[c] for c in chosen]):
        values = hashes[order]
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


def _runs(hashes: Hashes, masks: list[np.uint64]) -> Iterator[tuple[Positions, Positions]]:
    """Positions sorted by the bits of the masks, ascending among equals, and where each run of equal bits starts.

    Some at a time; a run is never cut.
    """
    if not masks:
        yield np.arange(len(hashes)), np.zeros(min(1, len(hashes)), np.int64)
        return
    keys, bits = _keys(hashes, masks)
    parts = 1
    while len(hashes) / parts > _ROWS and parts < 1 << bits:
        parts *= 2
    for part in range(parts):
        some = None if parts == 1 else np.flatnonzero(keys >> np.uint32(bits - parts.bit_length() + 1) == part)
        chosen = keys if some is None else keys[some]
        both = chosen.astype(np.uint64) << np.uint64(32)
        both |= np.arange(len(chosen), dtype=np.uint64)
        both.sort()
        sorted_keys = (both >> np.uint64(32)).astype(np.uint32)
        order = (both & np.uint64(0xFFFFFFFF)).astype(np.int64)
        del both
        starts = np.flatnonzero(np.append(True, sorted_keys[1:] != sorted_keys[:-1])[: len(order)])
        yield order if some is None else some[order], starts


def _keys(hashes: Hashes, masks: list[np.uint64]) -> tuple[npt.NDArray[np.uint32], int]:
    """The bits of the masks side by side, at most 32 of them, and how many they are."""
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
    return keys, used


def _within_runs(
    values: Hashes, order: Positions, starts: Positions, lengths: Positions, search: _Search
) -> Iterator[Pairs]:
    """Pairs of places in the sort that are close: of every run, and perhaps of neighbours beyond its end."""
    short = lengths <= _SHORT
    after = np.zeros(len(values), np.uint8)  # how many rows of its run come after each
    if short.any():
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
    if search.tree is not None:
        trees = search.tree[order]
        if (trees == trees[0]).all():
            return
    # Positions ascend in a run: those before the split stand first.
    split = None if search.split is None else int(np.searchsorted(order, search.split))
    if split in (0, len(order)):
        return
    if len(values) > LONG_RUN:
        tree = None if search.tree is None else search.tree[order]
        within = _Search(search.radius, split, tree, search.skew)
        blocks, kept = _blocks(values, search.radius)
        if kept:
            for chosen in combinations(range(len(blocks)), kept):
                yield from _agreeing(values, blocks, chosen, within)
            return
    yield from _all_pairs(values, split, search.radius)


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
