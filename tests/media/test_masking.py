"""Boxes painted over: colours by hand, and what must stay as it was."""

from __future__ import annotations

import numpy as np
import pytest
from batches import noise

from mmdata.media.masking import mask_boxes


def test_a_box_becomes_the_mean_of_what_is_around_it() -> None:
    picture = np.full((40, 60, 3), 100, np.uint8)
    picture[10:18, 20:36] = 255  # 16 x 8 px of text, a rim of a quarter of 8: 2 px
    picture[8, 18:38] = (0, 40, 100)  # a line in the rim: 20 of its (20 · 12 − 16 · 8) = 112 px
    painted = mask_boxes(picture, [(20, 10, 36, 18)])
    # (92 · 100 + 20 · 0) / 112 = 82.14, (9200 + 800) / 112 = 89.29, 100
    assert (painted[10:18, 20:36] == (82, 89, 100)).all()
    painted[10:18, 20:36] = 255
    assert (painted == picture).all()


def test_other_boxes_are_not_what_is_around() -> None:
    picture = np.full((20, 40, 3), 50, np.uint8)
    picture[5:10, 5:15] = 200
    picture[5:10, 15:30] = 250
    painted = mask_boxes(picture, [(5, 5, 15, 10), (15, 5, 30, 10)])
    assert (painted == 50).all()


def test_where_boxes_fill_all_there_is_the_mean_of_the_picture() -> None:
    picture = np.zeros((10, 10, 3), np.uint8)
    picture[:5] = 101
    # A half is rounded up: (101 + 0) / 2 = 50.5.
    assert (mask_boxes(picture, [(-5, -5, 50, 50)]) == 51).all()
    # Nothing around the inner box but the outer one; outside both is the last column, of 30.
    picture[:, 9] = 30
    assert (mask_boxes(picture, [(0, 0, 9, 10), (3, 3, 5, 5)])[:, :9] == 30).all()


@pytest.mark.parametrize("boxes", [[], [(70, 0, 90, 10)], [(-9, -9, 0, 0)]])
def test_no_box_in_the_picture_changes_no_bit(boxes: list[tuple[float, float, float, float]]) -> None:
    picture = noise(40, 60, 1)
    assert mask_boxes(picture, boxes) is picture


def test_parts_of_px_count_and_the_given_picture_is_left_as_it_was() -> None:
    picture = noise(40, 60, 2)
    picture.flags.writeable = False
    painted = mask_boxes(picture, [(10.9, 5.2, 12.1, 6.9)])
    assert len(np.unique(painted[5:7, 10:13].reshape(-1, 3), axis=0)) == 1
    changed = np.argwhere((painted != picture).any(axis=2))
    assert changed.min(axis=0).tolist() >= [5, 10]
    assert changed.max(axis=0).tolist() <= [6, 12]
