"""Samples: exact sizes, chances beside those computed by going through every order of draws, no matter which shards."""

from __future__ import annotations

from collections import Counter
from itertools import permutations
from pathlib import Path

import held_rows
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from binomial import within
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import mmdata
from mmdata.errors import RecipeError
from mmdata.groups.sample import Sample, SampleOptions

NOWHERE = Path("/nonexistent")


def run(rows, part_rows=100, uids=None, groups=None, weights=None, **options):
    table = pa.table(
        {
            "row_id": pa.array(range(rows), pa.int64()),
            "uid": pa.array(uids if uids is not None else [f"{i:032x}" for i in range(rows)], pa.string()),
            "g": pa.array(groups if groups is not None else [None] * rows, pa.string()),
            "w": pa.array(weights if weights is not None else [None] * rows, pa.float64()),
        }
    )
    if groups is not None:
        options["per"] = "g"
    if weights is not None:
        options["weight"] = "w"
    answer = held_rows.compute(Sample(SampleOptions(**options)), table, NOWHERE, part_rows)
    repeats = np.asarray(answer["sample_repeats"])
    assert (np.asarray(answer["sample_kept"]) == (repeats > 0)).all()
    return repeats.tolist()


def test_sizes_are_exact():
    assert sum(run(1000, count=137)) == 137
    assert sum(run(100, fraction=0.29)) == 29  # 0.29 * 100 is 28.999999999999996
    assert run(5, count=7) == [1] * 5
    assert run(0, count=7) == []
    assert sum(run(3, fraction=0.3)) == 0


def test_per_group():
    groups = ["a"] * 50 + ["b"] * 10 + [None] * 4 + ["c"]
    taken = np.array(run(65, groups=groups, count=10))
    assert [taken[:50].sum(), taken[50:60].sum(), taken[60:64].sum(), taken[64]] == [10, 10, 4, 1]
    taken = np.array(run(65, groups=groups, fraction=0.5))
    assert [taken[:50].sum(), taken[50:60].sum(), taken[60:64].sum(), taken[64]] == [25, 5, 2, 0]


def test_groups_of_numbers_are_the_same_in_every_shard():
    """NaN is not equal to itself, and is one group nevertheless, another one than NULL."""
    numbers = [float("nan")] * 20 + [1.5] * 20 + [None] * 20
    rows = {"row_id": range(60), "uid": [f"{i:032x}" for i in range(60)], "g": pa.array(numbers, pa.float32())}
    for part_rows in (60, 7):
        answer = held_rows.compute(Sample(SampleOptions(count=3, per="g")), pa.table(rows), NOWHERE, part_rows)
        taken = np.asarray(answer["sample_repeats"])
        assert [taken[:20].sum(), taken[20:40].sum(), taken[40:].sum()] == [3, 3, 3]


def test_small_groups_are_repeated_up_to_the_cap():
    groups = ["a"] * 50 + ["b"] * 4 + ["c"]
    taken = np.array(run(55, groups=groups, count=10, repeats=7))
    assert taken[:50].sum() == 10
    assert taken[:50].max() == 1
    assert sorted(taken[50:54]) == [2, 2, 3, 3]
    assert taken[54] == 7
    assert run(3, count=1000, repeats=100) == [100] * 3
    with pytest.raises(ValidationError, match="less than or equal to 100"):
        SampleOptions(count=10, repeats=101)


def chances(weights: list[float], count: int) -> list[float]:
    """Probability that each is among the first `count`, drawn one by one without replacement: every order, summed."""
    found = [0.0] * len(weights)
    for order in permutations(range(len(weights)), count):
        left, p = sum(weights), 1.0
        for i in order:
            p *= weights[i] / left
            left -= weights[i]
        for i in order:
            found[i] += p
    return found


@pytest.mark.parametrize(("weights", "count"), [([1, 2, 3, 4], 2), ([1, 1, 1, 1, 96], 1), ([5, 1, 0.5, 3, 2], 3)])
def test_weights_give_the_chances_of_drawing_one_after_the_other(weights, count):
    """2,000 groups with the same weights each, so that one run is 2,000 independent samples."""
    trials, n = 2000, len(weights)
    groups = [str(i // n) for i in range(trials * n)]
    taken = np.array(run(trials * n, 5000, groups=groups, weights=weights * trials, count=count)).reshape(trials, n)
    assert (taken.sum(axis=1) == count).all()
    for column, p in zip(taken.T, chances(weights, count), strict=True):
        assert within(int(column.sum()), trials, p)


def test_equal_chances_without_weights():
    groups = [str(i // 5) for i in range(10_000)]
    taken = np.array(run(10_000, 5000, groups=groups, count=2)).reshape(-1, 5)
    assert all(within(int(column.sum()), 2000, 0.4) for column in taken.T)
    pairs = (taken[:, 0] & taken[:, 1]).sum()
    assert within(int(pairs), 2000, 0.1)  # 1 of the 10 pairs


def test_a_weight_of_nothing_is_never_taken():
    taken = run(6, weights=[None, 0, -3, float("nan"), 1e-300, 1e300], count=6, repeats=2)
    assert taken == [0, 0, 0, 0, 2, 2]
    assert run(2, weights=[0, None], count=1) == [0, 0]


def test_seeds_differ_and_one_seed_repeats_itself():
    assert run(500, count=250, seed=1) == run(500, count=250, seed=1)
    first, second = (np.array(run(500, count=250, seed=s)) for s in (1, 2))
    assert within(int((first & second).sum()), 500, 0.25)


def test_a_larger_sample_contains_the_smaller():
    small, large = (np.array(run(300, count=n)) for n in (50, 120))
    assert (small <= large).all()


@given(
    st.lists(st.tuples(st.sampled_from(["a", "b", None]), st.none() | st.floats(0, 10)), max_size=30),
    st.integers(1, 8),
    st.integers(1, 3),
)
def test_shards_change_nothing(rows, count, repeats):
    groups, weights = [r[0] for r in rows], [r[1] for r in rows]
    options = {"groups": groups, "weights": weights, "count": count, "repeats": repeats}
    whole = run(len(rows), 1000, **options)
    assert run(len(rows), 1, **options) == run(len(rows), 7, **options) == whole
    for group in set(groups):
        mine = [w for g, w in zip(groups, weights, strict=True) if g == group and w]
        taken = sum(t for g, t in zip(groups, whole, strict=True) if g == group)
        assert taken == min(count, repeats * len(mine))


def test_of_rows_with_one_uid_the_first_comes_first():
    assert run(4, uids=["same"] * 4, count=3) == [1, 1, 1, 0]


def test_options_that_contradict_one_another():
    for options in ({}, {"count": 1, "fraction": 0.5}, {"fraction": 0.5, "repeats": 2}, {"fraction": 1.5}):
        with pytest.raises(ValidationError):
            SampleOptions(**options)
    schema = pa.schema([("w", pa.string()), ("g", pa.list_(pa.string()))])
    with pytest.raises(RecipeError, match="hold numbers"):
        Sample.check_types(SampleOptions(count=1, weight="w"), schema)
    with pytest.raises(RecipeError, match="name text"):
        Sample.check_types(SampleOptions(count=1, per="g"), schema)


def test_in_a_recipe_with_its_export(tmp_path: Path):
    """40 rows of a, 5 of b, 1 of c; 8 of each, at most 3 times: 8, 5 with 3 of them twice, and 3 times the one."""
    names = ["a" if i % 9 else "b" for i in range(45)] + ["c"]
    pq.write_table(
        pa.table({"url": [f"http://127.0.0.1:1/{i}" for i in range(46)], "text": names, "kind": names}),
        tmp_path / "list.parquet",
    )
    exported = []
    for shard_rows in (100, 7):
        source = {"kind": "parquet", "media": "none", "path": str(tmp_path / "list.parquet"), "columns": ["kind"]}
        out = tmp_path / f"out-{shard_rows}"
        recipe = {
            "name": "drawn",
            "dataset": str(tmp_path / f"rows-{shard_rows}"),
            "source": {**source, "url": "url", "caption": "text"},
            "fetch": {"shard_rows": shard_rows},
            "steps": [
                {"sample": {"per": "kind", "count": 8, "repeats": 3, "seed": 2}},
                {"filter": {"drawn": "sample_kept"}},
            ],
            "export": {"path": str(out), "format": "parquet", "include_media": False, "repeat": "sample_repeats"},
        }
        ds = mmdata.run(recipe, runner="inline", quiet=True)
        found = ds.sql("SELECT reason, count(*) FROM samples GROUP BY 1 ORDER BY 1").fetchall()
        assert found == [("drawn", 32), (None, 14)]
        table = pa.concat_tables([pq.read_table(p) for p in sorted(out.glob("*.parquet"))])
        assert Counter(table.column("kind").to_pylist()) == {"a": 8, "b": 8, "c": 3}
        exported.append(table.column("url").to_pylist())
    assert exported[0] == exported[1]
    assert sorted(Counter(exported[0]).values()) == [1] * 10 + [2] * 3 + [3]
