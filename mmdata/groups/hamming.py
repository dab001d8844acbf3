"""Clusters of 64-bit hashes within a Hamming radius: the star rule and components, exact, memory bounded.

In: hashes, (N,) uint64 in visit order, and a radius, 0 to 63. Out: per hash the position of its cluster's first. Fails:
nothing. Equal hashes are collapsed first. Close pairs come from `near_pairs`; up to 2²⁵ of them are held, at 8 bytes.
Where there are more (many thousand hashes close to one another), the star rule goes over a first part of the visit
order, everything close to the clusters opened there leaves, and the rest follows in the same way.

Beside the pairs about 40 bytes a hash.
"""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

from mmdata.groups.near_pairs import Skew, close_between, each_pair

__all__ = ["close_between", "component_clusters", "distinct_in_order", "roots", "star_clusters", "unite"]

Hashes = npt.NDArray[np.uint64]
Positions = npt.NDArray[np.int64]

_HELD = 1 << 25  # pairs
_SMALL = 4096  # hashes whose pairs are always held
_FAR = np.iinfo(np.int64).max
_LOW = np.uint64(0xFFFFFFFF)


def star_clusters(hashes: Hashes, radius: int, skew: Skew | None = None) -> Positions:
    """(N,) int64: for every hash the position of the one that opened its cluster.

    Hashes are visited in order; one that is in no cluster yet opens one and takes all that are in none and differ from
    it in at most `radius` bits (0 to 63). Members may differ from one another in up to twice as many.
    """
    distinct, first, which = distinct_in_order(hashes)
    return first[_star_of_distinct(distinct, radius, skew)][which]


def component_clusters(hashes: Hashes, radius: int, skew: Skew | None = None) -> Positions:
    """(N,) int64: for every hash the position of the first one of its component.

    A component holds all hashes that a chain of steps of at most `radius` bits (0 to 63) connects; its ends may lie
    any distance apart.
    """
    distinct, first, which = distinct_in_order(hashes)
    # What a star takes is connected, and most of what is: fewer pairs are left to look at.
    parent = _star_of_distinct(distinct, radius, skew)
    if radius and len(distinct) > 1:
        each_pair(
            distinct,
            radius,
            lambda left, right: unite(parent, left, right),
            threads=_threads(),
            tree=lambda: roots(parent),
            skew=skew,
        )
    return first[roots(parent)][which]


def distinct_in_order(hashes: Hashes) -> tuple[Hashes, Positions, Positions]:
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


def _threads() -> int:
    return min(8, len(os.sched_getaffinity(0)))


class _TooManyError(Exception):
    """More close pairs than are held."""


def _star_of_distinct(hashes: Hashes, radius: int, skew: Skew | None) -> Positions:
    rows = len(hashes)
    centre = np.full(rows, -1, np.int64)
    if radius == 0 or rows < 2:
        return np.arange(rows)
    waiting, size = np.arange(rows), rows  # positions in no cluster yet, ascending, and how many of them are looked at
    while len(waiting):
        block, rest = waiting[:size], waiting[size:]
        try:
            pairs = _held_pairs(hashes[block], radius, skew)
        except _TooManyError:
            size = max(_SMALL, len(block) // 8)
            continue
        found = _star(len(block), pairs)
        centre[block] = block[found]
        opened = block[found == np.arange(len(block))]
        nearest = np.full(len(rest), _FAR)
        if len(rest):
            for i, j in close_between(hashes[opened], hashes[rest], radius, skew):
                np.minimum.at(nearest, j, i)
        taken = nearest < _FAR
        centre[rest[taken]] = opened[nearest[taken]]
        waiting, size = rest[~taken], 8 * size
    return centre


def _held_pairs(hashes: Hashes, radius: int, skew: Skew | None) -> Hashes:
    """Every close pair, left position << 32 | right position, ascending."""
    found: list[Hashes] = []
    held = 0

    def take(left: Positions, right: Positions) -> None:
        nonlocal held
        held += len(left)
        if held > _HELD and len(hashes) > _SMALL:
            raise _TooManyError
        found.append(left.astype(np.uint64) << np.uint64(32) | right.astype(np.uint64))

    each_pair(hashes, radius, take, threads=_threads() if len(hashes) > _SMALL else 1, skew=skew)
    pairs = np.concatenate([np.zeros(0, np.uint64), *found])
    found.clear()
    pairs.sort()
    return pairs


def _star(rows: int, pairs: Hashes) -> Positions:
    """The star rule over positions in visit order, given their close pairs, ascending."""
    left, right = (pairs >> np.uint64(32)).astype(np.int64), (pairs & _LOW).astype(np.int64)
    taken = np.zeros(rows, bool)  # who is taken by another's cluster; all others open one
    open_left, open_right = left, right
    # Whoever has no earlier neighbour that may still open a cluster opens one, and takes all its neighbours.
    while len(open_left) > 1000:
        behind = np.zeros(rows, bool)
        behind[open_right] = True
        first = ~behind[open_left]
        taken[open_right[first]] = True
        waits = ~(taken[open_left] | taken[open_right])
        if 20 * np.count_nonzero(~waits) < len(waits):
            break  # a long chain of waiting: one by one is quicker
        open_left, open_right = open_left[waits], open_right[waits]
    _one_by_one(open_left, open_right, taken)
    centre = np.arange(rows)
    settled = ~taken[left] & taken[right]
    # Pairs ascend: of several clusters that reach a position, the first in visit order takes it.
    members, where = np.unique(right[settled], return_index=True)
    centre[members] = left[settled][where]
    return centre


def _one_by_one(left: Positions, right: Positions, taken: npt.NDArray[np.bool_]) -> None:
    """The rest of the star rule, in visit order."""
    lefts, starts = np.unique(left, return_index=True)
    ends = np.append(starts, len(left))[1:]
    for position, start, end in zip(lefts.tolist(), starts.tolist(), ends.tolist(), strict=True):
        if not taken[position]:
            taken[right[start:end]] = True
