"""Clusters of 64-bit hashes within a Hamming radius: the star rule and components, exact, memory bounded.

In: distinct hashes, (N,) uint64 in visit order, and a radius, 0 to 63. Out: per hash the position of its cluster's
first. Fails: StoreError when scratch is full. Close pairs come from `near_pairs`; up to 2²⁵ of them are held, at 8
bytes. Where there are more (many thousand hashes close to one another), the star rule goes over a first part of the
visit order, everything close to the clusters opened there leaves, and the rest follows in the same way.

Pairs, and whatever has a value per hash, lie in scratch where the caller gives some: about 35 bytes a hash. In memory
is what a million of them need.
"""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

from mmdata.groups.mapped import IN_MEMORY, Mapped, count_up, gathered, stretches
from mmdata.groups.near_pairs import Skew, close_between, each_pair

__all__ = ["close_between", "component_clusters", "distinct_in_order", "roots", "star_clusters", "to_roots", "unite"]

Hashes = npt.NDArray[np.uint64]
Positions = npt.NDArray[np.int64]
Marks = npt.NDArray[np.bool_]

_HELD = 1 << 25  # pairs
_SMALL = 4096  # hashes whose pairs are always held
_TOGETHER = 1 << 20  # pairs to which the star rule is applied at once
_FAR = np.iinfo(np.int64).max
_LOW = np.uint64(0xFFFFFFFF)


def star_clusters(hashes: Hashes, radius: int, skew: Skew | None = None, mapped: Mapped = IN_MEMORY) -> Positions:
    """(N,) int64: for every hash, all distinct, the position of the one that opened its cluster.

    Hashes are visited in order; one that is in no cluster yet opens one and takes all that are in none and differ from
    it in at most `radius` bits (0 to 63). Members may differ from one another in up to twice as many.
    """
    rows = len(hashes)
    centre: Positions = count_up(mapped.array(np.int64, rows))
    if radius == 0 or rows < 2:
        return centre
    waiting, size = count_up(mapped.array(np.int64, rows)), rows  # in no cluster yet, and how many are looked at
    while len(waiting):
        block, rest = waiting[:size], waiting[size:]
        looked_at = hashes if len(block) == rows else gathered(mapped, hashes, block)
        try:
            pairs = _held_pairs(looked_at, radius, skew, mapped)
        except _TooManyError:
            size = max(_SMALL, len(block) // 8)
            continue
        found = _star(len(block), pairs, mapped)
        del pairs, looked_at
        opened = mapped.growing(np.int64)
        with opened:
            for some in stretches(len(block)):
                centre[block[some]] = block[found[some]]
                opened.append(block[some][centre[block[some]] == block[some]])
            waiting = _take_close(hashes, radius, opened.array(), rest, centre, skew, mapped)
        size *= 8
    return centre


def component_clusters(hashes: Hashes, radius: int, skew: Skew | None = None, mapped: Mapped = IN_MEMORY) -> Positions:
    """(N,) int64: for every hash, all distinct, the position of the first one of its component.

    A component holds all hashes that a chain of steps of at most `radius` bits (0 to 63) connects; its ends may lie
    any distance apart.
    """
    # What a star takes is connected, and most of what is: fewer pairs are left to look at.
    parent = star_clusters(hashes, radius, skew, mapped)
    if radius and len(hashes) > 1:
        each_pair(
            hashes,
            radius,
            lambda left, right: unite(parent, left, right),
            threads=_threads(),
            tree=lambda some: _roots(parent, some),
            skew=skew,
            mapped=mapped,
        )
    to_roots(parent)
    return parent


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


def to_roots(parent: Positions) -> None:
    """Put its root at every position, in place."""
    for some in stretches(len(parent)):
        _roots(parent, np.arange(some.start, some.stop))


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


def _take_close(
    hashes: Hashes,
    radius: int,
    opened: Positions,
    rest: Positions,
    centre: Positions,
    skew: Skew | None,
    mapped: Mapped,
) -> Positions:
    """Give those of `rest` that are close to an opened cluster to the first such one; returns the others."""
    nearest = mapped.array(np.int64, len(rest))
    nearest[:] = _FAR
    if len(rest):
        for i, j in close_between(
            gathered(mapped, hashes, opened), gathered(mapped, hashes, rest), radius, skew, mapped
        ):
            np.minimum.at(nearest, j, i)
    with mapped.growing(np.int64) as waiting:
        for some in stretches(len(rest)):
            is_close = nearest[some] < _FAR
            centre[rest[some][is_close]] = opened[nearest[some][is_close]]
            waiting.append(rest[some][~is_close])
        return waiting.array()


def _held_pairs(hashes: Hashes, radius: int, skew: Skew | None, mapped: Mapped) -> Hashes:
    """Every close pair, left position << 32 | right position, ascending."""
    held = 0
    with mapped.growing(np.uint64) as found:

        def take(left: Positions, right: Positions) -> None:
            nonlocal held
            held += len(left)
            if held > _HELD and len(hashes) > _SMALL:
                raise _TooManyError
            found.append(left.astype(np.uint64) << np.uint64(32) | right.astype(np.uint64))

        threads = _threads() if len(hashes) > _SMALL else 1
        each_pair(hashes, radius, take, threads=threads, skew=skew, mapped=mapped)
        pairs: Hashes = found.array()
    pairs.sort()
    return pairs


def _star(rows: int, pairs: Hashes, mapped: Mapped) -> Positions:
    """The star rule over positions in visit order, given their close pairs, ascending.

    A stretch of pairs decides for every left position in it whether it opens a cluster: whatever may take that one
    stands to the left in an earlier pair.
    """
    taken: Marks = mapped.array(np.bool_, rows)  # who is taken by another's cluster; all others open one
    behind: Marks = mapped.array(np.bool_, rows)
    centre = count_up(mapped.array(np.int64, rows))
    for some in stretches(len(pairs), _TOGETHER):
        left, right = (pairs[some] >> np.uint64(32)).astype(np.int64), (pairs[some] & _LOW).astype(np.int64)
        may_open = ~taken[left]
        left, right = left[may_open], right[may_open]
        _open(left, right, taken, behind)
        settled = ~taken[left]
        # Pairs ascend: of several clusters that reach a position, the first in visit order takes it.
        members, where = np.unique(right[settled], return_index=True)
        new = centre[members] == members
        centre[members[new]] = left[settled][where[new]]
    return centre


def _open(left: Positions, right: Positions, taken: Marks, behind: Marks) -> None:
    """Mark in `taken` whoever a cluster takes that is opened at a left position; `behind` is all False, and left so."""
    waits = ~taken[right]
    left, right = left[waits], right[waits]
    # Whoever has no earlier neighbour that may still open a cluster opens one, and takes all its neighbours.
    while len(left) > 1000:
        behind[right] = True
        first = ~behind[left]
        behind[right] = False
        taken[right[first]] = True
        waits = ~(taken[left] | taken[right])
        if 20 * np.count_nonzero(~waits) < len(waits):
            break  # a long chain of waiting: one by one is quicker
        left, right = left[waits], right[waits]
    _one_by_one(left, right, taken)


def _one_by_one(left: Positions, right: Positions, taken: Marks) -> None:
    """The rest of the star rule, in visit order."""
    lefts, starts = np.unique(left, return_index=True)
    ends = np.append(starts, len(left))[1:]
    for position, start, end in zip(lefts.tolist(), starts.tolist(), ends.tolist(), strict=True):
        if not taken[position]:
            taken[right[start:end]] = True
