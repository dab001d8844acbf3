"""Equal 64-bit hashes collapsed, out of core: rows that share a hash share their fate, so each hash is visited once.

In: a hash per row, in visit order, and which rows have one. Out: the distinct hashes in the order in which they first
stand, where that is, and per row which one it is. Fails: StoreError when scratch is full.

Rows are dealt into buckets by a hash of the hash, so that equal ones meet in one, and each bucket is sorted in memory:
of a million rows at most; a bucket of more, where many rows are equal, goes by stretches of a million.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mmdata.groups.mapped import Mapped, Positions, stretches
from mmdata.models.xxh64 import xxh64

__all__ = ["Distinct", "collapse"]

Hashes = npt.NDArray[np.uint64]

_BUCKET = 1 << 20  # rows sorted together
_NONE = -1


@dataclass(frozen=True)
class Distinct:
    """`hashes`, (D,) uint64; `where`, (D,) the visit of the first row of each; `which`, (N,) one per row, -1: none."""

    hashes: Hashes
    where: Positions
    which: Positions


def collapse(hashes: Hashes, there: npt.NDArray[np.bool_], mapped: Mapped) -> Distinct:
    """The distinct ones of `hashes`, (N,) in visit order, as far as they are `there`."""
    first: Positions = mapped.array(np.int64, len(hashes))  # visit of the first row of the same hash
    first[:] = _NONE
    for values, visits in _buckets(hashes, there, mapped):
        _find_first(values, visits, first)
    which: Positions = mapped.array(np.int64, len(hashes))
    with mapped.growing(np.uint64) as distinct, mapped.growing(np.int64) as where:
        count = 0
        for some in stretches(len(hashes)):
            own = np.flatnonzero(first[some] == np.arange(some.start, some.stop)) + some.start
            which[own] = np.arange(count, count + len(own))
            distinct.append(hashes[own])
            where.append(own)
            count += len(own)
        for some in stretches(len(hashes)):
            which[some] = np.where(first[some] == _NONE, _NONE, which[first[some]])
        return Distinct(distinct.array(), where.array(), which)


def _buckets(hashes: Hashes, there: npt.NDArray[np.bool_], mapped: Mapped) -> Iterator[tuple[Hashes, Positions]]:
    """The hashes that are there and their visits; equal ones come together."""
    many = -(-len(hashes) // _BUCKET)
    if many <= 1:
        visits = np.flatnonzero(there)
        yield hashes[visits], visits
        return
    # Dealt out in two rounds: counted, then written.
    ends = np.zeros(many + 1, np.int64)
    for _, bucket in _dealt(hashes, there, many):
        ends[1:] += np.bincount(bucket, minlength=many)
    ends = np.cumsum(ends)
    values, visits = mapped.array(np.uint64, int(ends[-1])), mapped.array(np.int64, int(ends[-1]))
    next_at = ends[:-1].copy()
    for some, bucket in _dealt(hashes, there, many):
        order = np.argsort(bucket, kind="stable")
        counts = np.bincount(bucket, minlength=many)
        to = np.repeat(next_at - (np.cumsum(counts) - counts), counts) + np.arange(len(some))
        values[to], visits[to] = hashes[some[order]], some[order]
        next_at += counts
    for number in range(many):
        mine = slice(ends[number], ends[number + 1])
        yield values[mine], visits[mine]


def _dealt(
    hashes: Hashes, there: npt.NDArray[np.bool_], many: int
) -> Iterator[tuple[Positions, npt.NDArray[np.uint32]]]:
    """Visits of rows that have a hash, and the bucket of each."""
    for some in stretches(len(hashes)):
        visits = np.flatnonzero(there[some]) + some.start
        yield visits, (xxh64([hashes[visits]]) % np.uint64(many)).astype(np.uint32)


def _find_first(values: Hashes, visits: Positions, first: Positions) -> None:
    """Write the first visit of each value of a bucket at all its visits."""
    known, at = np.zeros(0, np.uint64), np.zeros(0, np.int64)
    for some in stretches(len(values), _BUCKET):
        both, both_at = np.concatenate([known, values[some]]), np.concatenate([at, visits[some]])
        order = np.argsort(both)
        both, both_at = both[order], both_at[order]
        starts = np.flatnonzero(np.append(True, both[1:] != both[:-1]))
        known, at = both[starts], np.minimum.reduceat(both_at, starts)
        if some.stop - some.start == len(values):
            first[both_at] = np.repeat(at, np.diff(np.append(starts, len(both))))
            return
    for some in stretches(len(values), _BUCKET):
        order = np.argsort(values[some])
        first[visits[some][order]] = at[np.searchsorted(known, values[some][order])]
