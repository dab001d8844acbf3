"""Star clusters against an O(n²) walk over the definition."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import held_rows
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from small_steps import small_steps

from mmdata.errors import RecipeError
from mmdata.groups.near_duplicates import NearDuplicates, NearDuplicatesOptions


def rows_of(hashes: list[int | None] | pa.Array) -> pa.Table:
    n = len(hashes)
    ids = pa.array([(i * 7919) % 1_000_003 for i in range(n)], pa.int64())
    phash = hashes if isinstance(hashes, pa.Array) else pa.array(hashes, pa.uint64())
    return pa.table({"row_id": ids, "key": pa.array([f"k{i:06d}" for i in range(n)], pa.string()), "phash": phash})


def compute(rows: pa.Table, distance: int) -> dict[str, list[Any]]:
    group = NearDuplicates(NearDuplicatesOptions(max_distance=distance))
    with tempfile.TemporaryDirectory() as scratch:
        columns = held_rows.compute(group, rows, Path(scratch), part_rows=max(1, len(rows) // 3))
    named = {name.removeprefix("near_duplicates_"): values for name, values in columns.items()}
    found = {k: v.to_pylist() if hasattr(v, "to_pylist") else v.tolist() for k, v in named.items()}
    assert group.remark.partition(";")[0] == remark(found)
    return found


def remark(found: dict[str, list[Any]]) -> str:
    """Of several largest clusters, that of the row visited first is named."""
    if not found["count"]:
        return "no rows"
    largest = max(found["count"])
    first = found["of"][found["count"].index(largest)]
    return f"{len(set(found['id'])):,} clusters, the largest of {largest:,} rows (first: {first})"


def brute_force(rows: pa.Table, radius: int) -> dict[str, list[Any]]:
    """The definition, row by row, in plain Python."""
    hashes = rows.column("phash").to_pylist()
    ids, keys = rows.column("row_id").to_pylist(), rows.column("key").to_pylist()
    opened_by: list[int | None] = [None] * len(hashes)
    members: dict[int, list[int]] = {}
    for i, mine in enumerate(hashes):
        if opened_by[i] is not None:
            continue
        members[i] = []
        for j, other in enumerate(hashes):
            near = i == j or (mine is not None and other is not None and (mine ^ other).bit_count() <= radius)
            if opened_by[j] is None and near:
                opened_by[j] = i
                members[i].append(j)
    firsts = [i for i in opened_by if i is not None]
    return {
        "id": [ids[i] for i in firsts],
        "rank": [members[i].index(j) + 1 for j, i in enumerate(firsts)],
        "count": [len(members[i]) for i in firsts],
        "of": [keys[i] for i in firsts],
        "distance": [0 if i == j else (hashes[i] ^ hashes[j]).bit_count() for j, i in enumerate(firsts)],
    }


def flip(value: int, *bits: int) -> int:
    for bit in bits:
        value ^= 1 << bit
    return value


@st.composite
def crowded(draw: st.DrawFn) -> list[int | None]:
    """Few centres and many small changes of them, so that distances lie on both sides of any radius."""
    centres = draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4))
    bits = st.lists(st.integers(0, 63), max_size=12)
    changed = st.builds(lambda c, b: flip(c, *b), st.sampled_from(centres), bits)
    return draw(st.lists(st.one_of(changed, changed, changed, st.none()), max_size=80))


@settings(max_examples=200, deadline=None)
@given(hashes=crowded(), distance=st.integers(0, 16))
def test_equals_brute_force(hashes: list[int | None], distance: int):
    rows = rows_of(hashes)
    assert compute(rows, distance) == brute_force(rows, distance)


@settings(max_examples=60, deadline=None)
@given(hashes=crowded(), distance=st.integers(0, 8))
def test_equals_brute_force_in_small_steps_over_files(hashes: list[int | None], distance: int):
    rows = rows_of(hashes)
    with small_steps():
        found = compute(rows, distance)
    assert found == brute_force(rows, distance)


@settings(max_examples=50, deadline=None)
@given(hashes=st.lists(st.integers(0, 2**64 - 1), max_size=80), distance=st.integers(0, 16))
def test_equals_brute_force_far_apart(hashes: list[int | None], distance: int):
    rows = rows_of(hashes)
    assert compute(rows, distance) == brute_force(rows, distance)


def test_no_pair_is_missed_among_many():
    # 1,500 pairs hidden among 20,000, in every split of up to six flipped bits over the word
    rng = np.random.default_rng(11)
    hashes = rng.integers(0, 2**64, 20_000, dtype=np.uint64)
    copies = hashes[:1500].copy()
    for row in range(1500):
        for bit in rng.choice(64, row % 7, replace=False):
            copies[row] ^= np.uint64(1) << np.uint64(bit)
    found = compute(rows_of(pa.array(np.concatenate([hashes, copies]))), 6)
    assert found["of"][20_000:] == [f"k{i:06d}" for i in range(1500)]
    assert found["distance"][20_000:] == [i % 7 for i in range(1500)]
    assert found["count"][:1500] == [2] * 1500


def test_a_chain_is_not_one_cluster():
    a = 0
    b = flip(a, 0, 1, 2)
    c = flip(b, 3, 4, 5)
    assert compute(rows_of([a, b, c]), 4)["rank"] == [1, 2, 1]
    # Seen from the middle it is: the order of visits decides.
    assert compute(rows_of([b, a, c]), 4)["rank"] == [1, 2, 3]


def test_first_come_takes_a_row_that_lies_nearer_to_a_later_one():
    a, late, between = 0, flip(0, 0, 1, 2, 3, 4), flip(0, 0, 1, 2, 3)
    found = compute(rows_of([a, late, between]), 4)
    assert found["of"] == ["k000000", "k000001", "k000000"]
    assert found["distance"] == [0, 0, 4]


def test_one_hash_a_hundred_thousand_times():
    found = compute(rows_of(pa.array(np.full(100_000, 2**63 + 5, np.uint64))), 4)
    assert found["rank"] == list(range(1, 100_001))
    assert set(found["distance"]) == {0}


def test_every_hash_of_a_small_ball():
    # 2^14 distinct hashes that differ only in 14 bits: candidates are plentiful, clusters few.
    low = np.random.default_rng(2).permutation(2**14).astype(np.uint64)
    hashes = low << np.uint64(25)
    found = compute(rows_of(pa.array(hashes)), 4)
    first_keys = sorted(set(found["of"]))
    centres = hashes[[int(k[1:]) for k in first_keys]]
    gaps = np.bitwise_count(centres[:, None] ^ centres[None, :])
    assert gaps[~np.eye(len(centres), dtype=bool)].min() > 4  # no centre lies within the radius of another
    assert max(found["distance"]) == 4
    assert found == brute_force_by_numpy(hashes, rows_of(pa.array(hashes)), 4)


def brute_force_by_numpy(hashes: np.ndarray, rows: pa.Table, radius: int) -> dict[str, list[Any]]:
    ids, keys = rows.column("row_id").to_numpy(), np.array(rows.column("key").to_pylist())
    first = np.full(len(hashes), -1)
    rank = np.zeros(len(hashes), int)
    for i in range(len(hashes)):
        if first[i] < 0:
            near = np.flatnonzero((np.bitwise_count(hashes ^ hashes[i]) <= radius) & (first < 0))
            first[near] = i
            rank[near] = np.arange(1, len(near) + 1)
    return {
        "id": ids[first].tolist(),
        "rank": rank.tolist(),
        "count": np.bincount(first, minlength=len(first))[first].tolist(),
        "of": keys[first].tolist(),
        "distance": np.bitwise_count(hashes ^ hashes[first]).tolist(),
    }


def test_signed_hashes_and_wrong_types():
    signed = rows_of(pa.array([-1, -1, None, 2**62], pa.int64()))
    assert compute(signed, 4)["rank"] == [1, 2, 1, 1]
    with pytest.raises(RecipeError, match="'phash' is of type string"):
        compute(rows_of(pa.array(["ff", "fe"])), 4)


def test_distance_has_a_cap():
    with pytest.raises(ValidationError):
        NearDuplicatesOptions(max_distance=17)
