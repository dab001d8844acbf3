"""Boxes: their union by hand and by painting them, their cells, what is left of them inside a picture."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmdata.media.blur import boxes_of
from mmdata.media.boxes import BOXES, area_ratio, cells, inside, overlap


def boxes(*rows: tuple[float, float, float, float]) -> np.ndarray:
    return np.array(rows, np.float32).reshape(-1, 4)


def test_union_by_hand():
    assert area_ratio(boxes(), 10, 10) == 0
    assert area_ratio(boxes((0, 0, 10, 10), (2, 2, 4, 4)), 10, 10) == 1
    # Two of 4 x 4 that share 2 x 2, and one apart of 1 x 2: 16 + 16 - 4 + 2.
    assert area_ratio(boxes((0, 0, 4, 4), (2, 2, 6, 6), (8, 8, 9, 10)), 10, 10) == pytest.approx(0.30)
    assert area_ratio(boxes((0.5, 0, 1.25, 2)), 3, 2) == pytest.approx(1.5 / 6)


coordinates = st.tuples(*[st.integers(0, 19)] * 2, *[st.integers(1, 20)] * 2).map(
    lambda v: (min(v[0], 19), min(v[1], 19), min(20, v[0] + v[2]), min(20, v[1] + v[3]))
)


@given(st.lists(coordinates, max_size=8))
def test_union_equals_painting(rows: list[tuple[int, int, int, int]]):
    painted = np.zeros((20, 20), bool)
    for left, top, right, bottom in rows:
        painted[top:bottom, left:right] = True
    assert area_ratio(boxes(*rows), 20, 20) == pytest.approx(painted.mean())


def test_inside_cuts_and_drops():
    found, kept = inside(np.array([[-3, -3, 5, 5], [30, 2, 40, 4], [1, 1, 1, 4], [18, 8, 25, 15]]), 20, 10)
    assert found.tolist() == [[0, 0, 5, 5], [18, 8, 20, 10]]
    assert kept.tolist() == [0, 3]
    assert found.dtype == np.float32


def test_overlap_by_hand():
    others = boxes((0, 0, 2, 2), (1, 1, 3, 3), (5, 5, 6, 6))
    assert overlap(boxes((0, 0, 2, 2))[0], others).tolist() == pytest.approx([1, 1 / 7, 0])


def test_cells_are_what_the_blur_reads():
    rows = boxes((1, 2, 3.5, 4), (0, 0, 1, 1))
    column = pa.array([cells(rows), []], BOXES)
    assert boxes_of(column.to_pylist()[0]) == [(1, 2, 3.5, 4), (0, 0, 1, 1)]
    assert boxes_of(column.to_pylist()[1]) == []
