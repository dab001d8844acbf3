"""All close pairs, each once, against comparing everything with everything; skew, slices and threads change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mmdata.groups import hamming, mapped, near_pairs
from mmdata.groups.mapped import IN_MEMORY, Mapped
from mmdata.groups.near_pairs import Skew, close_between, each_pair

Hashes = npt.NDArray[np.uint64]


def flipped(hashes: Hashes, most: int, rng: np.random.Generator) -> Hashes:
    """Each with up to `most` bits changed."""
    found = hashes.copy()
    for _ in range(most):
        found ^= np.where(rng.random(len(found)) < 0.7, np.uint64(1) << rng.integers(0, 64, len(found), np.uint64), 0)
    return found


def uneven(rows: int, seed: int) -> Hashes:
    """Random ones, ones near others, a ball around one, ones that share 40 bits, and numbers that count up."""
    rng = np.random.default_rng(seed)
    some = rng.integers(0, 2**64, rows, np.uint64)
    near = flipped(some[: rows // 2], 7, rng)
    ball = flipped(np.full(rows // 4, some[0]), 5, rng)
    shared = rng.integers(0, 2**24, rows, np.uint64) << np.uint64(17)
    count = np.arange(rows // 4, dtype=np.uint64)
    every = np.unique(np.concatenate([some, near, ball, shared, count]))
    rng.shuffle(every)
    return every


def brute(left: Hashes, right: Hashes, radius: int) -> set[tuple[int, int]]:
    found = np.argwhere(np.bitwise_count(left[:, None] ^ right[None, :]) <= radius)
    return {(i, j) for i, j in found.tolist()}


def pairs(hashes: Hashes, radius: int, **options: Any) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    each_pair(hashes, radius, lambda a, b: found.extend(zip(a.tolist(), b.tolist(), strict=True)), **options)
    return found


@pytest.fixture(params=["as it is", "small steps"])
def steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Mapped:
    """The same search with runs that are long from 20 rows on, 500 rows compared at once, and arrays in files."""
    if request.param == "small steps":
        monkeypatch.setattr(near_pairs, "_SHORT", 5)
        monkeypatch.setattr(near_pairs, "LONG_RUN", 20)
        monkeypatch.setattr(near_pairs, "_ROWS", 500)
        monkeypatch.setattr(near_pairs, "_PAIRS", 300)
        monkeypatch.setattr(hamming, "_TOGETHER", 500)
        monkeypatch.setattr(mapped, "_STRETCH", 100)
        monkeypatch.setattr(mapped, "_SHORT_BYTES", 1000)
        return Mapped(tmp_path)
    return IN_MEMORY


@pytest.mark.parametrize("radius", [1, 4, 6, 11])
def test_every_pair_once(radius: int, steps: Mapped):
    hashes = uneven(400, radius)
    expected = {(i, j) for i, j in brute(hashes, hashes, radius) if i < j}
    for threads in (1, 2):
        found = pairs(hashes, radius, threads=threads, mapped=steps)
        assert len(found) == len(set(found))
        assert set(found) == expected
    assert len(expected) > 300


@pytest.mark.parametrize("radius", [0, 4, 6, 11])
def test_every_pair_of_two_lists_once(radius: int, steps: Mapped):
    hashes = uneven(400, radius)
    earlier, later = np.concatenate([hashes[:400], hashes[:50]]), hashes[300:]  # some in both, some twice
    blocks = close_between(earlier, later, radius, None, steps)
    found = [p for a, b in blocks for p in zip(a.tolist(), b.tolist(), strict=True)]
    assert len(found) == len(set(found))
    assert set(found) == brute(earlier, later, radius)


def star(hashes: Hashes, radius: int) -> list[int]:
    """The rule as it is said."""
    centre = np.full(len(hashes), -1)
    for i in range(len(hashes)):
        if centre[i] < 0:
            near = np.bitwise_count(hashes ^ hashes[i]) <= radius
            centre[near & (centre < 0)] = i
    return centre.tolist()


@pytest.mark.parametrize("held", [1 << 25, 3000])
@pytest.mark.parametrize("radius", [4, 6])
def test_star_of_many_close_ones(radius: int, held: int, steps: Mapped, monkeypatch: pytest.MonkeyPatch):
    hashes = uneven(800, 40 + radius)
    monkeypatch.setattr(hamming, "_HELD", held)
    monkeypatch.setattr(hamming, "_SMALL", 100)
    assert hamming.star_clusters(hashes, radius, None, steps).tolist() == star(hashes, radius)


def test_components_of_many_close_ones(steps: Mapped):
    hashes = uneven(400, 9)
    first = np.arange(len(hashes))  # the smallest position that is reached, until nothing changes
    near = np.bitwise_count(hashes[:, None] ^ hashes[None, :]) <= 4
    while True:
        reached = np.where(near, first[None, :], len(hashes)).min(axis=1)
        if np.array_equal(reached, first):
            break
        first = reached
    assert hamming.component_clusters(hashes, 4, None, steps).tolist() == first.tolist()


def test_a_long_chain_is_walked_to_its_end():
    # Each is one bit from the next: of every three, in visit order, the first opens and takes the second.
    hashes = np.bitwise_xor(np.arange(6000, dtype=np.uint64), np.arange(6000, dtype=np.uint64) >> np.uint64(1))
    assert hamming.star_clusters(hashes, 1).tolist() == star(hashes, 1)


def test_equal_bits_of_many_are_reported_and_all_compared():
    rng = np.random.default_rng(8)
    hashes = np.unique(rng.integers(0, 2**40, 20_000, np.uint64))
    mixed = np.concatenate([hashes, rng.integers(0, 2**64, 20_000, np.uint64)])
    skew = Skew()
    found = pairs(mixed, 4, skew=skew)
    assert skew.longest >= len(hashes)  # the highest 24 bits are a block or more
    assert skew.long_runs >= 1
    few = mixed[:3000]
    assert {p for p in found if p[1] < 3000} == {(i, j) for i, j in brute(few, few, 4) if i < j}
    even = Skew()
    pairs(rng.integers(0, 2**64, 20_000, np.uint64), 4, skew=even)
    assert even.long_runs == 0


def test_what_the_taker_raises_ends_the_search():
    def stop(left: npt.NDArray[np.int64], right: npt.NDArray[np.int64]) -> None:
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        each_pair(uneven(400, 1), 4, stop, threads=2)
