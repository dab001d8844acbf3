"""Locality-sensitive hashing of MinHash signatures: which pairs are looked at, and the clusters they make.

A signature is cut into `bands` of `rows` places each. Two texts of Jaccard similarity s agree in all places of some
band with probability 1 − (1 − s^rows)^bands, an S-shaped curve whose steep part lies near (1/bands)^(1/rows); such
pairs are the candidates, and only those are compared in full. In: for every band, the positions of texts that share
their key with another one (`Runs`), and a function that gives the similarity of pairs. Out: clusters. No pair of
candidates is left out, however many share a band; memory is bounded in pairs.

Source: Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, section 3.4; the choice of bands minimises the same
weighted areas under the curve as datasketch's `MinHashLSH`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from mmdata.groups.hamming import roots, unite

__all__ = ["Runs", "Similarity", "choose_bands", "collision", "component_clusters", "runs_of", "star_clusters"]

Positions = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
# (left, right), each (N,) positions → (N,) similarity in [0, 1]
Similarity = Callable[[Positions, Positions], Floats]

_PAIRS = 1 << 22  # candidates held at once, some 100 MB
_FIRST_PAIRS = 1 << 14  # blocks begin small and double: what the first clusters take is not looked at again
_STEPS = 1000  # of the integrals over the similarity


def collision(similarity: float | Floats, bands: int, rows: int) -> Floats:
    """Probability that two texts of this Jaccard similarity share a band: the S-curve."""
    found: Floats = 1 - (1 - np.asarray(similarity, np.float64) ** rows) ** bands
    return found


@cache
def choose_bands(threshold: float, permutations: int, recall_weight: float) -> tuple[int, int]:
    """(bands, rows), bands · rows ≤ permutations, of the least `recall_weight` · missed + (1 − it) · needless.

    `missed`: area of 1 − curve above the threshold; `needless`: area of the curve below it.
    """
    below, above = ((np.arange(_STEPS) + 0.5) / _STEPS * width for width in (threshold, 1 - threshold))
    best, least = (1, 1), np.inf
    for bands in range(1, permutations + 1):
        for rows in range(1, permutations // bands + 1):
            needless = collision(below, bands, rows).mean() * threshold
            missed = (1 - collision(threshold + above, bands, rows)).mean() * (1 - threshold)
            cost = float(recall_weight * missed + (1 - recall_weight) * needless)
            if cost < least:
                best, least = (bands, rows), cost
    return best


@dataclass(frozen=True)
class Runs:
    """One band: positions of texts whose key another text has too, run by run, ascending within a run.

    `order[i]` is a position, `end[i]` where its run ends; `sorted_positions` and `place` say where each stands.
    """

    order: npt.NDArray[np.int32]
    end: npt.NDArray[np.int32]
    sorted_positions: npt.NDArray[np.int32]
    place: npt.NDArray[np.int32]

    @classmethod
    def of(cls, order: npt.NDArray[np.int32], end: npt.NDArray[np.int32]) -> Runs:
        """With the inverse of `order`."""
        place = np.argsort(order).astype(np.int32)
        return cls(order, end, order[place], place)

    def places(self, some: Positions) -> Positions:
        """Where those of `some`, ascending, stand that are in a run."""
        if not len(self.order):
            return some[:0]
        at = np.searchsorted(self.sorted_positions, some.astype(np.int32))
        at[at == len(self.sorted_positions)] = 0
        there = self.sorted_positions[at] == some
        places: Positions = self.place[at[there]].astype(np.int64)
        return places

    def only(self, chosen: npt.NDArray[np.bool_]) -> Runs:
        """The runs without the positions that are not chosen."""
        kept = chosen[self.order]
        run = np.unique(self.end[kept], return_inverse=True)[1]
        sizes = np.bincount(run)
        end = np.repeat(np.cumsum(sizes), sizes).astype(np.int32)
        shared = np.repeat(sizes, sizes) > 1
        order = self.order[kept][shared]
        dropped = np.cumsum(~shared)
        return Runs.of(order, (end - dropped[end - 1])[shared].astype(np.int32))


def runs_of(keys: npt.NDArray[np.uint64]) -> Runs:
    """The runs of equal keys, positions being places in `keys` (fewer than 2³¹)."""
    by_key = np.argsort(keys)
    ordered = keys[by_key]
    edge = np.ones(len(keys) + 1, bool)
    edge[1:-1] = ordered[1:] != ordered[:-1]
    shared = ~(edge[1:] & edge[:-1])
    run = np.cumsum(edge[:-1][shared], dtype=np.uint64)
    # Sorted as one number: by run, then by position.
    both = np.sort(run << np.uint64(32) | by_key[shared].astype(np.uint64))
    last = np.flatnonzero(np.append(both[1:] >> np.uint64(32) != both[:-1] >> np.uint64(32), True)[: len(both)]) + 1
    order = (both & np.uint64(0xFFFFFFFF)).astype(np.int32)
    return Runs.of(order, np.repeat(last, np.diff(last, prepend=0)).astype(np.int32))


def star_clusters(
    bands: Sequence[Runs], texts: int, similarity: Similarity, threshold: float
) -> tuple[Positions, npt.NDArray[np.float32]]:
    """(N,) the position that opened each one's cluster, its own where it did, and the similarity to it.

    Positions are visited in order; one in no cluster opens one and takes every later candidate that is in none and
    has at least the threshold.
    """
    centre = np.full(texts, -1, np.int64)
    alike = np.ones(texts, np.float32)
    later = _later(bands, texts)
    waiting, bound = np.flatnonzero(later), min(_PAIRS, _FIRST_PAIRS)
    while len(waiting):
        # As many as fit the bound on pairs, at least one.
        many = max(1, int(np.searchsorted(np.cumsum(later[waiting]), bound)))
        block, left = waiting[:many], waiting[many:]
        _assign(*_close_later(bands, block, centre, similarity, threshold), centre, alike)
        left = left[centre[left] < 0]
        if 2 * len(left) < len(waiting):
            chosen = centre < 0
            chosen[: int(block[-1]) + 1] = False
            bands = [runs.only(chosen) for runs in bands]
            later = _later(bands, texts)
            left = left[later[left] > 0]
        waiting, bound = left, min(_PAIRS, 2 * bound)
    return np.where(centre < 0, np.arange(texts), centre), alike


def component_clusters(bands: Sequence[Runs], texts: int, similarity: Similarity, threshold: float) -> Positions:
    """(N,) the first position of each one's component: all that chains of close candidates connect."""
    parent = star_clusters(bands, texts, similarity, threshold)[0]  # what a star takes is connected
    for runs in bands:
        # What follows in the same tree is passed over, and more of it with every block that joins trees.
        cursor, bound = 0, min(_PAIRS, _FIRST_PAIRS)
        while cursor < len(runs.order):
            trees = roots(parent)[runs.order]
            other = np.append(np.flatnonzero(trees[1:] != trees[:-1]) + 1, len(trees))
            begin = np.repeat(other, np.diff(other, prepend=0))[cursor:]
            counts = np.maximum(runs.end[cursor:].astype(np.int64) - begin, 0)
            some = np.flatnonzero(counts)
            some = some[: max(1, int(np.searchsorted(np.cumsum(counts[some]), bound)))]
            if not len(some):
                break
            left, right = _pairs(runs, cursor + some, begin[some], counts[some])
            tree = roots(parent)
            apart = tree[left] != tree[right]
            left, right = left[apart], right[apart]
            near = similarity(left, right) >= threshold
            unite(parent, left[near], right[near])
            cursor, bound = cursor + int(some[-1]) + 1, min(_PAIRS, 2 * bound)
    return roots(parent)


def _later(bands: Sequence[Runs], texts: int) -> Positions:
    """(N,) candidates after each position, over all bands."""
    later = np.zeros(texts, np.int64)
    for runs in bands:
        later[runs.order] += runs.end - np.arange(len(runs.order)) - 1
    return later


def _later_in_runs(runs: Runs, places: Positions) -> tuple[Positions, Positions]:
    """Pairs of what stands at each of these places and all that follows it in its run."""
    return _pairs(runs, places, places + 1, runs.end[places] - places - 1)


def _pairs(runs: Runs, places: Positions, begins: Positions, counts: Positions) -> tuple[Positions, Positions]:
    """Pairs of what stands at each place and at so many from its `begin` on."""
    offsets = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    right = runs.order[np.repeat(begins, counts) + offsets].astype(np.int64)
    return np.repeat(runs.order[places].astype(np.int64), counts), right


def _close_later(
    bands: Sequence[Runs], block: Positions, centre: Positions, similarity: Similarity, threshold: float
) -> tuple[Positions, Positions, Floats]:
    """(i, j, similarity) with i in `block` and j a later candidate that is in no cluster; each pair once."""
    texts = np.uint64(len(centre))
    codes = [np.empty(0, np.uint64)]
    for runs in bands:
        left, right = _later_in_runs(runs, runs.places(block))
        free = centre[right] < 0
        codes.append(left[free].astype(np.uint64) * texts + right[free].astype(np.uint64))
        if sum(map(len, codes)) > 2 * _PAIRS:  # what many bands share is there many times
            codes = [np.unique(np.concatenate(codes))]
    pairs = np.unique(np.concatenate(codes))
    left, right = (pairs // texts).astype(np.int64), (pairs % texts).astype(np.int64)
    alike = similarity(left, right)
    near = alike >= threshold
    return left[near], right[near], alike[near]


def _assign(left: Positions, right: Positions, near: Floats, centre: Positions, alike: npt.NDArray[np.float32]) -> None:
    """The star rule over close pairs, which are in the order of `left`."""
    opens, starts = np.unique(left, return_index=True)
    ends = np.append(starts, len(left))[1:]
    for position, start, end in zip(opens.tolist(), starts.tolist(), ends.tolist(), strict=True):
        if centre[position] < 0:
            centre[position] = position
            others = right[start:end]
            free = centre[others] < 0
            centre[others[free]] = position
            alike[others[free]] = near[start:end][free]
