"""Which older row each hash of a dataset reaches first, in scratch.

In: hashes by number, and the places and hashes of older rows close to them, in any order. Out: the older rows that are
reached, each once, and which of them each hash follows. Fails: StoreError when scratch is full.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mmdata.groups.mapped import Mapped, Positions, stretches

__all__ = ["Reach", "Reached"]

Hashes = npt.NDArray[np.uint64]

_FAR = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Reached:
    """`places`, (P,) ascending, and `hashes` of older rows; `which`, (N,) one per hash, -1: it reaches none."""

    places: Positions
    hashes: Hashes
    which: Positions


class Reach:
    """The first older row that each of `many` hashes reaches; none to begin with."""

    def __init__(self, many: int, mapped: Mapped) -> None:
        self._mapped = mapped
        self._place: Positions = mapped.array(np.int64, many)
        self._place[:] = _FAR
        self._hash: Hashes = mapped.array(np.uint64, many)

    def add(self, at: Positions, places: Positions, hashes: Hashes) -> None:
        """These, each once, reach these older rows."""
        better = places < self._place[at]
        self._place[at[better]], self._hash[at[better]] = places[better], hashes[better]

    def spread(self, root: Positions) -> None:
        """Whatever one of a tree reaches, all of it do: the first of them."""
        best: Positions = self._mapped.array(np.int64, len(root))
        best[:] = _FAR
        best_hash: Hashes = self._mapped.array(np.uint64, len(root))
        for some in stretches(len(root)):
            np.minimum.at(best, root[some], self._place[some])
        for some in stretches(len(root)):
            mine = self._place[some] == best[root[some]]
            best_hash[root[some][mine]] = self._hash[some][mine]
        for some in stretches(len(root)):
            self._place[some], self._hash[some] = best[root[some]], best_hash[root[some]]

    def settled(self) -> Reached:
        """What was found."""
        with self._mapped.growing(np.int64) as all_places, self._mapped.growing(np.int64) as once:
            for some in stretches(len(self._place)):
                all_places.append(self._place[some][self._place[some] < _FAR])
            found = all_places.array()
            found.sort()
            last = -1
            for some in stretches(len(found)):
                once.append(found[some][np.diff(found[some], prepend=last) > 0])
                last = int(found[some][-1])
            places: Positions = once.array()
        hashes: Hashes = self._mapped.array(np.uint64, len(places))
        which: Positions = self._mapped.array(np.int64, len(self._place))
        for some in stretches(len(which)):
            reaches = self._place[some] < _FAR
            at = np.searchsorted(places, self._place[some][reaches])
            which[some] = -1
            which[some][reaches] = at
            hashes[at] = self._hash[some][reaches]
        return Reached(places, hashes, which)
