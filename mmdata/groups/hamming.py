"""Clusters of 64-bit hashes within a Hamming radius, and close pairs of two lists: every pair found, memory bounded.

The 64 bits are cut into radius + k blocks. Two hashes that differ in at most `radius` bits agree in at least k whole
blocks, so sorting by every choice of k blocks brings each such pair into one run of equal keys (Manku et al. 2007, the
block-permutation index). A larger k means more sorts and shorter runs; it is chosen by the number of hashes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise
from math import comb

import numpy as np
import numpy.typing as npt

__all__ = ["close_between", "component_clusters", "distinct_in_order", "roots", "star_clusters", "unite"]

Positions = npt.NDArray[np.int64]

_PAIRS = 1 << 22  # compared at once: about 100 MB
_INDEX_BYTES = 3 << 30  # of all sorts of an index, at 12 bytes a hash and sort
_SORT_COST = 64  # of one element in one sort, in units of one comparison


def star_clusters(hashes: npt.NDArray[np.uint64], radius: int) -> Positions:
    """(N,) int64: for every hash the position of the one that opened its cluster.

    Hashes are visited in order; one that is in no cluster yet opens one and takes all that are in none and differ from
    it in at most `radius` bits (0 to 63). Members may differ from one another in up to twice as many.
    """
    distinct, first, which = distinct_in_order(hashes)
    return first[_star_of_distinct(distinct, radius)][which]


def component_clusters(hashes: npt.NDArray[np.uint64], radius: int) -> Positions:
    """(N,) int64: for every hash the position of the first one of its component.

    A component holds all hashes that a chain of steps of at most `radius` bits (0 to 63) connects; its ends may lie
    any distance apart.
    """
    distinct, first, which = distinct_in_order(hashes)
    parent = _star_of_distinct(distinct, radius)  # what a star takes is connected: fewer pairs are left to look at
    if radius and len(distinct) > 1:
        for mask in _masks(len(distinct), radius):
            parent = roots(parent)
            for left, right in _pairs_across(distinct, mask, parent):
                near = np.bitwise_count(distinct[left] ^ distinct[right]) <= radius
                unite(parent, left[near], right[near])
    return first[roots(parent)][which]


def close_between(
    earlier: npt.NDArray[np.uint64], hashes: npt.NDArray[np.uint64], radius: int
) -> Iterator[tuple[Positions, Positions]]:
    """Blocks of (i, j) with `earlier[i]` and `hashes[j]` at most `radius` bits apart; a pair may come more than once.

    Memory is that of both lists and of one block, whatever the number of pairs.
    """
    if not len(earlier) or not len(hashes):
        return
    for mask in _masks(len(earlier), radius):
        keys = earlier & mask
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        wanted = hashes & mask
        begins, ends = np.searchsorted(keys, wanted, "left"), np.searchsorted(keys, wanted, "right")
        for some in _blocks(ends - begins):
            right = np.repeat(some, ends[some] - begins[some])
            left = order[_ranges(begins[some], ends[some])]
            near = np.bitwise_count(earlier[left] ^ hashes[right]) <= radius
            if near.any():
                yield left[near], right[near]


def distinct_in_order(hashes: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.uint64], Positions, Positions]:
    """The distinct hashes in the order in which they first stand, those places, and per hash which one it is.

    Equal hashes share their fate, so each is visited once, where it first stands.
    """
    distinct, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.argsort(first)
    visited = np.empty_like(order)
    visited[order] = np.arange(len(order))
    return distinct[order], first[order].astype(np.int64), visited[inverse].astype(np.int64)


def unite(parent: Positions, left: Positions, right: Positions) -> None:
    """Join the trees of each pair, in place; a root stays the smallest position of its tree, which is its parent."""
    while len(left):
        roots = _roots(parent, left), _roots(parent, right)
        low, high = np.minimum(*roots), np.maximum(*roots)
        apart = low != high
        left, right = low[apart], high[apart]
        np.minimum.at(parent, right, left)


def roots(parent: Positions) -> Positions:
    """The root of every position."""
    return _roots(parent, np.arange(len(parent)))


def _roots(parent: Positions, some: Positions) -> Positions:
    found = parent[some]
    while True:
        above = parent[found]
        if np.array_equal(above, found):
            parent[some] = found
            return found
        found = above


def _pairs_across(
    hashes: npt.NDArray[np.uint64], mask: np.uint64, parent: Positions
) -> Iterator[tuple[Positions, ...]]:
    """Blocks of pairs that agree in the bits of `mask`; runs that are one tree already are left out."""
    keys = hashes & mask
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
    ends = np.append(starts[1:], len(keys))
    trees = parent[order]
    mixed = np.minimum.reduceat(trees, starts) != np.maximum.reduceat(trees, starts)
    place = _ranges(starts[mixed], ends[mixed])
    end = np.repeat(ends[mixed], (ends - starts)[mixed])
    for some in _blocks(end - place - 1):
        left = np.repeat(place[some], end[some] - place[some] - 1)
        right = _ranges(place[some] + 1, end[some])
        apart = trees[left] != trees[right]
        yield order[left[apart]], order[right[apart]]


def _ranges(begins: Positions, ends: Positions) -> Positions:
    """The numbers of every [begin, end), one range after the other."""
    counts = ends - begins
    offsets = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    places: Positions = np.repeat(begins, counts) + offsets
    return places


def _blocks(counts: Positions) -> Iterator[Positions]:
    """Positions with something to compare, as many at a time as fit the bound on pairs, at least one."""
    some = np.flatnonzero(counts)
    total = np.cumsum(counts[some])
    first = 0
    while first < len(some):
        before = int(total[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(total, before + _PAIRS)))
        yield some[first:last]
        first = last


def _star_of_distinct(hashes: npt.NDArray[np.uint64], radius: int) -> Positions:
    centre = np.full(len(hashes), -1, np.int64)
    if radius == 0 or len(hashes) < 2:
        return np.arange(len(hashes))
    left = np.arange(len(hashes))  # positions in no cluster yet, ascending
    while len(left):
        index = _Index(hashes[left], radius)
        local = np.full(len(left), -1, np.int64)
        _visit(index, local, radius)
        taken = local >= 0
        centre[left[taken]] = left[local[taken]]
        left = left[~taken]
    return centre


class _Index:
    """Hashes sorted once per choice of blocks. `later[i]` counts the candidates after i, over all sorts."""

    def __init__(self, hashes: npt.NDArray[np.uint64], radius: int) -> None:
        self.hashes = hashes
        self.sorts: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32]]] = []
        self.later = np.zeros(len(hashes), np.int64)
        for mask in _masks(len(hashes), radius):
            keys = hashes & mask
            order = np.argsort(keys, kind="stable")
            keys = keys[order]
            ends = np.append(np.flatnonzero(keys[1:] != keys[:-1]) + 1, len(keys))
            lengths = np.diff(ends, prepend=0)
            end = np.empty(len(keys), np.int32)
            end[order] = np.repeat(ends, lengths)
            begin = np.empty(len(keys), np.int32)
            begin[order] = np.arange(1, len(keys) + 1)
            # The sort is stable: the rest of a run after i holds exactly the candidates visited after i.
            self.sorts.append((order.astype(np.int32), begin, end))
            self.later += end - begin

    def close_pairs(self, some: Positions, radius: int) -> tuple[Positions, Positions]:
        """(i, j) with i in `some`, j visited later, at most `radius` bits apart; a pair may come more than once."""
        found: list[tuple[Positions, Positions]] = []
        for order, begin, end in self.sorts:
            left = np.repeat(some, end[some] - begin[some])
            right = order[_ranges(begin[some].astype(np.int64), end[some].astype(np.int64))].astype(np.int64)
            near = np.bitwise_count(self.hashes[left] ^ self.hashes[right]) <= radius
            found.append((left[near], right[near]))
        return np.concatenate([a for a, _ in found]), np.concatenate([b for _, b in found])


def _visit(index: _Index, centre: Positions, radius: int) -> None:
    """Give every position its centre, or stop early when so many have one that a smaller index pays."""
    rows = len(centre)
    cursor, candidates = 0, np.arange(rows)
    while cursor < rows:
        waiting = candidates[cursor:][centre[cursor:] < 0]
        if not len(waiting):
            return
        if 2 * len(waiting) < rows - cursor and index.later[waiting].sum() > 16 * _PAIRS:
            return
        # As many as fit the bound on pairs, at least one; none of them needs more than a pass over the hashes.
        many = max(1, int(np.searchsorted(np.cumsum(index.later[waiting]), _PAIRS)))
        block = waiting[:many]
        left, right = index.close_pairs(block, radius)
        _assign(block, left, right, centre)
        cursor = int(block[-1]) + 1


def _assign(block: Positions, left: Positions, right: Positions, centre: Positions) -> None:
    """The star rule over one block, in visit order; `left` and `right` are its close pairs."""
    order = np.argsort(left, kind="stable")
    left, right = left[order], right[order]
    opens, starts = np.unique(left, return_index=True)
    ends = np.append(starts, len(left))[1:]
    for position, start, end in zip(opens.tolist(), starts.tolist(), ends.tolist(), strict=True):
        if centre[position] < 0:
            centre[position] = position
            near = right[start:end]
            centre[near[centre[near] < 0]] = position
    alone = block[centre[block] < 0]
    centre[alone] = alone


def _masks(rows: int, radius: int) -> list[np.uint64]:
    """One mask per sort: the choice of k among radius + k blocks that costs least for this many hashes."""

    def sorts_bytes(kept: int) -> int:
        return comb(radius + kept, kept) * 12 * rows

    def cost(kept: int) -> float:
        sorts = comb(radius + kept, kept)
        run: float = rows / 2.0 ** (64 * kept / (radius + kept))
        return sorts * (_SORT_COST + run)

    kept = min(range(1, min(4, 64 - radius) + 1), key=lambda k: (sorts_bytes(k) > _INDEX_BYTES and k > 1, cost(k)))
    edges = np.linspace(0, 64, radius + kept + 1).round().astype(int).tolist()
    blocks = [(1 << high) - (1 << low) for low, high in pairwise(edges)]
    return [np.uint64(sum(chosen)) for chosen in combinations(blocks, kept)]
