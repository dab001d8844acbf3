"""Boxes of a picture made unrecognisable: faces, number plates. Bytes of a picture in, bytes out; nothing is detected.

A box is [left, top, right, bottom] in px of the picture as it is decoded (upright), right and bottom exclusive, whole
or not; what lies outside the picture is cut off. Each box is padded by a tenth of its diagonal on every side and
blended into a Gaussian blur whose sigma is a tenth of the largest diagonal, through a mask blurred by the same sigma.
Source: Yang et al. 2022, A Study of Face Obfuscation in ImageNet (arXiv 2103.06191), section 3, and img2dataset's
blurrer.py, which DataComp used; unlike there the mask is 1 all over the box itself, so that nothing of what is in it
shines through, and the kernel reaches to 4 sigma.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mmdata.media.image import decode, encode, sniff

__all__ = ["Box", "blur_boxes", "blur_image", "boxes_of"]

Picture = npt.NDArray[np.uint8]  # (H, W, 3) RGB
Box = tuple[float, float, float, float]
_NAMES = ("left", "top", "right", "bottom")
_PADDING, _SIGMA = 0.1, 0.1
_MIN_SIGMA = 0.5  # px
_FORMATS: dict[str, tuple[Literal["jpg", "png", "webp"], int]] = {"jpeg": ("jpg", 95), "webp": ("webp", 95)}


def boxes_of(value: Sequence[Any] | None) -> list[Box]:
    """The boxes in a cell: a list of four numbers each, or of structs with left, top, right and bottom.

    ValueError for anything else, a number that is not finite, or a box whose right or bottom is not above its
    left or top.
    """
    found = []
    for box in value or ():
        numbers: list[Any] = [box.get(n) for n in _NAMES] if isinstance(box, Mapping) else list(box or ())
        if len(numbers) != 4 or not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
            raise ValueError(f"{box!r} is no box of four finite numbers: left, top, right, bottom")
        left, top, right, bottom = map(float, numbers)
        if right <= left or bottom <= top:
            raise ValueError(f"{box!r} is no box: right must be above left, and bottom above top")
        found.append((left, top, right, bottom))
    return found


def blur_image(data: bytes, boxes: Sequence[Box]) -> bytes:
    """The picture with the boxes blurred, encoded anew: jpeg and webp at quality 95, all else as png; no metadata.

    The same bytes when there is no box. DecodeError when the bytes are no picture.
    """
    if not boxes:
        return data
    form, quality = _FORMATS.get(sniff(data) or "", ("png", 6))
    return encode(blur_boxes(decode(data), boxes), form, quality)


def blur_boxes(picture: Picture, boxes: Sequence[Box]) -> Picture:
    """(H, W, 3) uint8 → the same shape; a new array."""
    import cv2

    height, width = picture.shape[:2]
    mask = np.zeros((height, width), np.float32)
    inner = np.zeros((height, width), bool)
    largest = 0.0
    for left, top, right, bottom in boxes:
        diagonal = math.hypot(right - left, bottom - top)
        largest = max(largest, diagonal)
        pad = _PADDING * diagonal
        mask[_window(top - pad, bottom + pad, height), _window(left - pad, right + pad, width)] = 1
        inner[_window(top, bottom, height), _window(left, right, width)] = True
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    result = picture.copy()
    if not len(rows):
        return result
    sigma = max(_SIGMA * largest, _MIN_SIGMA)
    reach = math.ceil(4 * sigma)
    around = 2 * reach  # as far as the mask is soft, and as far from there as the kernel reaches
    window = (
        slice(max(0, int(rows[0]) - around), int(rows[-1]) + 1 + around),
        slice(max(0, int(columns[0]) - around), int(columns[-1]) + 1 + around),
    )
    part = picture[window].astype(np.float32)
    kernel = (2 * reach + 1, 2 * reach + 1)
    blurred = cv2.GaussianBlur(part, kernel, sigma, borderType=cv2.BORDER_REPLICATE)
    soft = cv2.GaussianBlur(mask[window], kernel, sigma, borderType=cv2.BORDER_REPLICATE)
    soft = np.where(inner[window], np.float32(1), soft)[:, :, None]
    result[window] = np.clip(np.rint(part * (1 - soft) + blurred * soft), 0, 255).astype(np.uint8)
    return result


def _window(start: float, stop: float, size: int) -> slice:
    """The px that [start, stop) touches, inside the picture."""
    return slice(min(max(math.floor(start), 0), size), min(max(math.ceil(stop), 0), size))
