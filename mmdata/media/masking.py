"""Boxes of a picture painted over with the colour around them: text, so that a model cannot read it.

In: (H, W, 3) uint8 RGB and boxes [left, top, right, bottom] in px, right and bottom exclusive, whole or not; what lies
outside the picture is cut off. Out: a new array, or the picture itself when no box touches it. Each box becomes one
colour, the mean of the px in a rim around it that are in no box themselves; where there are none, of all px outside
the boxes; where there are none of these either, of the whole picture. All means are taken of the picture as it came,
so the order of the boxes does not matter but where they overlap: there the later one is on top.

Source: T-MARS (Maini et al. 2023, arXiv 2307.03132) fills detected text with the average of the pixels around it; how
wide "around" is could not be verified. Here the rim is a quarter of the box's shorter side, and 2 px at least.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mmdata.media.picture import Picture

__all__ = ["mask_boxes"]

Box = tuple[float, float, float, float]
_RIM = 0.25  # of the box's shorter side
_MIN_RIM_PX = 2


def mask_boxes(picture: Picture, boxes: Sequence[Box]) -> Picture:
    """(H, W, 3) uint8 → the same shape."""
    height, width = picture.shape[:2]
    inside = np.zeros((height, width), bool)
    windows = []
    for left, top, right, bottom in boxes:
        rows, columns = _span(top, bottom, height), _span(left, right, width)
        if rows[0] < rows[1] and columns[0] < columns[1]:
            windows.append((rows, columns))
            inside[slice(*rows), slice(*columns)] = True
    if not windows:
        return picture
    result = picture.copy()
    elsewhere: npt.NDArray[np.uint8] | None = None
    for rows, columns in windows:
        rim = max(_MIN_RIM_PX, round(_RIM * min(rows[1] - rows[0], columns[1] - columns[0])))
        around = slice(max(0, rows[0] - rim), rows[1] + rim), slice(max(0, columns[0] - rim), columns[1] + rim)
        colour = _mean(picture[around][~inside[around]])
        if colour is None:
            colour = elsewhere = _mean(picture[~inside]) if elsewhere is None else elsewhere
        if colour is None:
            colour = elsewhere = _mean(picture.reshape(-1, 3))
        assert colour is not None  # of a picture of no px no box has any
        result[slice(*rows), slice(*columns)] = colour
    return result


def _span(start: float, stop: float, size: int) -> tuple[int, int]:
    """The px that [start, stop) touches, inside the picture."""
    return min(max(math.floor(start), 0), size), min(max(math.ceil(stop), 0), size)


def _mean(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8] | None:
    """(N, 3) → (3,), rounded half up in whole numbers, so that it is the same everywhere; None of none."""
    count = len(pixels)
    if not count:
        return None
    return np.asarray((2 * pixels.sum(axis=0, dtype=np.int64) + count) // (2 * count), np.uint8)
