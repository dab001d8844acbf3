"""Every row of an epoch has exactly one consumer, whatever the shards, nodes and workers; checked by counting."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdata.readers.order import EpochOrder, stretch

COUNTS = st.dictionaries(st.integers(0, 40), st.integers(0, 23), max_size=8)


def rows_of(order: EpochOrder, start: int, stop: int, buffer: int = 2) -> list[tuple[int, int]]:
    found = []
    for pieces, mix in order.windows(start, stop, buffer):
        rows = [(shard, int(r)) for shard, some in pieces for r in some]
        found += [rows[i] for i in mix]
    return found


@settings(deadline=None)
@given(COUNTS, st.integers(1, 4), st.integers(1, 4), st.booleans(), st.integers(0, 3), st.integers(1, 5))
def test_each_row_once(
    counts: dict[int, int], world: int, workers: int, shuffle: bool, epoch: int, buffer: int
) -> None:
    seen: Counter[tuple[int, int]] = Counter()
    lengths = []
    for rank in range(world):
        order = EpochOrder(counts, shuffle, 7, epoch)
        start, stop = stretch(order.rows, rank, world)
        lengths.append(stop - start)
        for worker in range(workers):
            first, last = stretch(stop - start, worker, workers)
            seen.update(rows_of(order, start + first, start + last, buffer))
    assert seen == {(shard, row): 1 for shard, n in counts.items() for row in range(n)}
    assert max(lengths) - min(lengths) <= 1


@settings(deadline=None)
@given(COUNTS, st.integers(1, 5), st.sampled_from(["drop", "repeat"]))
def test_even_nodes(counts: dict[int, int], world: int, uneven: str) -> None:
    total = sum(counts.values())
    order = EpochOrder(counts, True, 1, 0)
    parts = [rows_of(order, *stretch(total, rank, world, uneven)) for rank in range(world)]  # type: ignore[arg-type]
    assert {len(p) for p in parts} == {total // world if uneven == "drop" else -(-total // world)}
    seen = Counter(row for part in parts for row in part)
    if uneven == "drop":
        assert max(seen.values(), default=1) == 1
        assert total - len(seen) < world
    else:
        assert len(seen) == total
        assert sum(seen.values()) - total < world


def test_orders_differ_by_epoch_and_seed_and_are_reproducible() -> None:
    counts = {s: 50 for s in range(6)}
    lines = {
        (seed, epoch): rows_of(EpochOrder(counts, True, seed, epoch), 0, 300) for seed in (1, 2) for epoch in (0, 1)
    }
    assert len({tuple(line) for line in lines.values()}) == 4
    assert lines[1, 0] == rows_of(EpochOrder(dict(reversed(counts.items())), True, 1, 0), 0, 300)
    assert rows_of(EpochOrder(counts, False, 1, 5), 0, 300) == [(s, r) for s in range(6) for r in range(50)]


@pytest.mark.parametrize("buffer", [1, 3])
def test_shuffling_mixes_the_rows_of_as_many_shards_as_are_held(buffer: int) -> None:
    counts = {s: 100 for s in range(12)}
    line = rows_of(EpochOrder(counts, True, 3, 0), 0, 1200, buffer)
    window = [shard for shard, _ in line[: 100 * buffer]]
    assert len(set(window)) == buffer
    # Both halves of a window hold rows of all its shards, near half of each: 5 standard deviations are 25.
    first = Counter(window[: 50 * buffer])
    assert all(25 <= n <= 75 for n in first.values())
    assert [shard for shard, _ in line] != sorted(shard for shard, _ in line)
