"""The best part by a score: worked by hand, and DataComp's rule beside its own arithmetic."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mmdata.errors import RecipeError
from mmdata.groups.top_fraction import TopFraction, TopFractionOptions


def run(scores, **options):
    table = pa.table({"clip_score": pa.array(scores, pa.float64()), "lang": options.pop("lang", [""] * len(scores))})
    answer = TopFraction(TopFractionOptions(**options)).compute(table)
    return {name.removeprefix("top_fraction_"): column.to_pylist() for name, column in answer.items()}


TENTHS = [i / 10 for i in range(1, 11)]


def test_three_tenths_of_ten_are_three():
    found = run(TENTHS, fraction=0.3)
    assert found["kept"] == [False] * 7 + [True] * 3
    assert set(found["threshold"]) == {0.8}
    assert found["rank"] == list(range(10, 0, -1))


def test_datacomp_keeps_one_more():
    """Worked by hand: scores .1 to 1.0, fraction .3: n = 3, threshold .7, four rows."""
    found = run(TENTHS, fraction=0.3, datacomp=True)
    assert found["kept"] == [False] * 6 + [True] * 4
    assert set(found["threshold"]) == {0.7}
    assert run(TENTHS, fraction=1, datacomp=True)["kept"] == [True] * 10


def test_the_product_is_exact_but_for_datacomp():
    scores = list(range(100))
    assert int(100 * 0.29) == 28  # what floating point makes of it
    assert sum(run(scores, fraction=0.29)["kept"]) == 29
    assert sum(run(scores, fraction=0.29, datacomp=True)["kept"]) == 29  # 28 and one


def test_ties():
    scores = [5, 5, 5, 1]
    assert run(scores, fraction=0.5)["kept"] == [True, True, True, False]
    assert run(scores, fraction=0.5, ties="row_id")["kept"] == [True, True, False, False]
    assert run(scores, fraction=0.5)["rank"] == [1, 1, 1, 4]


def test_a_row_without_a_number_has_nothing_and_does_not_count():
    found = run([None, 3, None, 1], count=1)
    assert found == {
        "kept": [None, True, None, False],
        "threshold": [None, 3.0, None, 3.0],
        "rank": [None, 1, None, 2],
    }
    assert run([None, 2], fraction=0.5) == {"kept": [None, False], "threshold": [None, None], "rank": [None, 1]}
    assert run([], fraction=0.5) == {"kept": [], "threshold": [], "rank": []}


def test_an_infinite_number_is_one_but_no_threshold():
    """A threshold that is not finite would fail every row of the group."""
    inf = float("inf")
    assert run([inf, 1, -inf], count=1) == {"kept": [True, False, False], "threshold": [None] * 3, "rank": [1, 2, 3]}
    assert run([inf, 1, -inf], count=2)["threshold"] == [1.0] * 3


def test_lowest_and_more_than_there_are():
    assert run([3, 1, 2], count=1, best="lowest") == {
        "kept": [False, True, False],
        "threshold": [1.0] * 3,
        "rank": [3, 1, 2],
    }
    assert run([3, 1, 2], count=7)["kept"] == [True] * 3


def test_per_group_and_its_rows_without_one():
    found = run([1, 2, 3, 4, 5, 6], fraction=0.5, per="lang", lang=["a", None, "a", "b", "b", None])
    assert found["kept"] == [False, False, True, False, True, True]
    assert found["threshold"] == [3, 6, 3, 5, 5, 6]


@given(
    st.lists(st.one_of(st.none(), st.integers(-5, 5)), max_size=40),
    st.integers(1, 100),
    st.sampled_from(["highest", "lowest"]),
)
def test_the_threshold_says_the_same_as_kept(scores, percent, best):
    found = run(scores, fraction=percent / 100, best=best)
    present = [s for s in scores if s is not None]
    ordered = sorted(present, reverse=best == "highest")
    wanted = len(present) * percent // 100
    for score, kept, threshold in zip(scores, found["kept"], found["threshold"], strict=True):
        if score is None:
            assert kept is None
        elif wanted == 0:
            assert (kept, threshold) == (False, None)
        else:
            assert threshold == ordered[wanted - 1]
            assert kept == (score >= threshold if best == "highest" else score <= threshold)


@given(st.lists(st.floats(-1, 1, allow_nan=False), min_size=1, max_size=50), st.floats(0.01, 0.99))
def test_datacomp_as_its_code_computes_it(scores, fraction):
    """As published: thr = -sort(-s)[int(len * f)], keep s >= thr."""
    array = np.array(scores)
    threshold = -np.sort(-array)[int(len(array) * fraction)]
    found = run(scores, fraction=fraction, datacomp=True)
    assert found["kept"] == (array >= threshold).tolist()
    assert set(found["threshold"]) == {threshold}


def test_refuses():
    for wrong in ({}, {"fraction": 0.3, "count": 2}, {"fraction": 0.3, "datacomp": True, "ties": "row_id"}):
        with pytest.raises(ValidationError):
            TopFractionOptions(**wrong)
    with pytest.raises(RecipeError, match="is to hold numbers"):
        TopFraction.check_types(TopFractionOptions(count=1), pa.schema({"clip_score": pa.string()}))
    lists = pa.schema({"clip_score": pa.float32(), "concepts": pa.list_(pa.string())})
    with pytest.raises(RecipeError, match="'concepts' is of type list"):
        TopFraction.check_types(TopFractionOptions(count=1, per="concepts"), lists)
