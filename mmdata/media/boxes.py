"""Boxes that detectors find, as arrays and as the cells of a column.

A box is left, top, right, bottom in px of the picture as it is decoded (upright), right and bottom exclusive. In:
(N, 4) numbers, whole or not. Out: the same inside the picture, their area, cells for `BOXES`. Nothing fails; a box
with nothing inside the picture is dropped by `inside`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = ["BOXES", "Boxes", "area_ratio", "cells", "holds_boxes", "inside", "overlap"]

Boxes = npt.NDArray[np.float32]  # (N, 4)

_SIDES = ("left", "top", "right", "bottom")
# What `export.blur` and `Pixels.masked` read.
BOXES = pa.list_(pa.struct([(side, pa.float32()) for side in _SIDES]))


def holds_boxes(kind: pa.DataType) -> bool:
    """Whether a column of this type may hold boxes: lists of structs with the four sides, or of lists."""
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    box: Any = kind.value_type
    if pa.types.is_struct(box):
        return set(_SIDES) <= {field.name for field in box}
    return any(is_one(box) for is_one in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list))


def inside(boxes: npt.NDArray[Any], width: int, height: int) -> tuple[Boxes, npt.NDArray[np.int64]]:
    """The boxes cut at the picture's edges, and which of them have anything left: (M, 4) float32, (M,) indexes."""
    cut = np.asarray(boxes, np.float64).reshape(-1, 4).clip(0, [width, height, width, height]).astype(np.float32)
    kept = np.flatnonzero((cut[:, 2] > cut[:, 0]) & (cut[:, 3] > cut[:, 1]))
    return cut[kept], kept


def area_ratio(boxes: Boxes, width: int, height: int) -> float:
    """Area of the union of the boxes, all inside the picture, over the picture's, in [0, 1]; exact, not a sum."""
    if not len(boxes):
        return 0.0
    exact = boxes.astype(np.float64)
    columns, rows = np.unique(exact[:, 0::2]), np.unique(exact[:, 1::2])
    covered = np.zeros((len(rows) - 1, len(columns) - 1), bool)
    for left, top, right, bottom in exact:
        below, beside = np.searchsorted(rows, [top, bottom]), np.searchsorted(columns, [left, right])
        covered[below[0] : below[1], beside[0] : beside[1]] = True
    return min(1.0, float(np.diff(rows) @ covered @ np.diff(columns)) / (width * height))


def overlap(box: npt.NDArray[Any], others: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Intersection over union of one box with each of (N, 4); 0 where both are empty."""
    shared = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    common = np.prod(shared.clip(0), axis=1, dtype=np.float64)
    areas = np.prod(others[:, 2:] - others[:, :2], axis=1, dtype=np.float64)
    union = areas + float(np.prod(box[2:] - box[:2])) - common
    found: npt.NDArray[np.float64] = np.divide(common, union, out=np.zeros(len(others)), where=union > 0)
    return found


def cells(boxes: Boxes) -> list[dict[str, float]]:
    """One cell of a `BOXES` column."""
    return [dict(zip(_SIDES, box, strict=True)) for box in boxes.tolist()]
