"""Pictures in other sizes: `resize`, img2dataset's modes by OpenCV, and `transform`, torchvision's by Pillow.

In and out: (H, W, 3) uint8 RGB. Fails: DecodeError (`too_many_pixels`) where a strip would be scaled above MAX_PIXELS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from PIL import Image

from mmdata.media.picture import MAX_PIXELS, DecodeError, Picture

__all__ = ["ResizeMode", "boxed", "resize", "transform"]

_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "area": Image.Resampling.BOX,
}


def transform(
    picture: Picture,
    size: int,
    fit: Literal["center_crop", "pad", "stretch"] = "center_crop",
    resample: Literal["bicubic", "bilinear", "area"] = "bicubic",
) -> Picture:
    """(H, W, 3) uint8 → (size, size, 3) uint8 by Pillow's filters, with antialiasing.

    `center_crop` scales the short side to `size` (the long one is cut to whole px) and takes the middle: bit-equal to
    torchvision's `Resize(size)` + `CenterCrop(size)` on Pillow images (strips that would grow above MAX_PIXELS are cut
    before they are scaled). `pad` centres the picture on a white square,
    then scales (a square above MAX_PIXELS is never made: such a strip is scaled first). `stretch` ignores the ratio.
    """
    height, width = picture.shape[:2]
    image = Image.fromarray(picture)
    filter_ = _FILTERS[resample]
    if fit == "stretch":
        return np.array(image.resize((size, size), filter_))
    if fit == "pad":
        side = max(height, width)
        if side * side <= MAX_PIXELS:
            return np.array(_on_white_square(image, side).resize((size, size), filter_))
        thin = (max(1, round(width * size / side)), max(1, round(height * size / side)))
        return np.array(_on_white_square(image.resize(thin, filter_), size))
    short = min(height, width)
    new_width, new_height = int(size * width / short), int(size * height / short)
    if new_width * new_height > MAX_PIXELS:  # a strip: scaled whole it would take gigabytes
        middle = ((width - 2 * short) // 2, 0) if width > height else (0, (height - 2 * short) // 2)
        y, x = middle[1], middle[0]
        return transform(picture[y : y + 2 * short, x : x + 2 * short], size, fit, resample)
    if (new_width, new_height) != (width, height):
        image = image.resize((new_width, new_height), filter_)
    left, top = round((new_width - size) / 2.0), round((new_height - size) / 2.0)
    return np.array(image.crop((left, top, left + size, top + size)))


def _on_white_square(image: Image.Image, side: int) -> Image.Image:
    square = Image.new("RGB", (side, side), (255, 255, 255))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


ResizeMode = Literal["no", "border", "keep_ratio", "keep_ratio_largest", "center_crop"]
_MOST_BY_TWO = 3  # above, a linear filter would pass px over
_MOST_BY_TWO_PX = 1 << 22  # px of the result; the picture between has four times as many


def resize(
    picture: Picture,
    size: int,
    mode: ResizeMode = "keep_ratio",
    only_if_bigger: bool = False,
    upscale_interpolation: str = "lanczos",
    downscale_interpolation: str = "area",
    quick: bool = False,
    between: Callable[[Picture], Picture] | None = None,
    whole: tuple[int, int] | None = None,
) -> Picture:
    """img2dataset's resize modes, by OpenCV; (H, W, 3) uint8 in and out, the same array when there is nothing to do.

    `keep_ratio` brings the short side to `size`; `center_crop` does the same and cuts the middle square;
    `keep_ratio_largest` brings the long side to `size`; `border` does the same and pads to a white square; `no` leaves
    the picture. The other side is rounded half to even. With `only_if_bigger`, a picture whose deciding side does
    not exceed `size` is left as it is, not cropped or padded either.
    `quick`: `area` between 1 and 3 times the size goes by way of a picture of twice the size, by OpenCV's linear
    filter, and exact 2x2 boxes: a third of the time [on photographs 45 dB from `area` itself, in the median 53 dB].
    `whole`: width and height before a scaled decode, so that the result has the very size it would have without it.
    `between` is given the scaled picture before it is cropped or padded, or the picture itself when it is not scaled.
    Source: img2dataset resizer.py and albumentations' SmallestMaxSize, LongestMaxSize, CenterCrop, PadIfNeeded; unlike
    these a strip never gets a side of 0 px, and one that would be scaled above MAX_PIXELS raises DecodeError.
    """
    between = between or (lambda scaled: scaled)
    width, height = whole or (picture.shape[1], picture.shape[0])
    by_short = mode in ("keep_ratio", "center_crop")
    side = min(height, width) if by_short else max(height, width)
    if mode == "no" or (only_if_bigger and side <= size):
        return between(picture)
    interpolation = downscale_interpolation if side > size else upscale_interpolation
    scale = size / side
    shape = (max(1, round(width * scale)), max(1, round(height * scale)))
    if shape != (picture.shape[1], picture.shape[0]):
        if shape[0] * shape[1] > MAX_PIXELS:
            raise DecodeError("too_many_pixels", f"{width}x{height} px would be scaled to {shape[0]}x{shape[1]}")
        picture = _scaled(picture, shape, interpolation, quick)
    picture = between(picture)
    height, width = picture.shape[:2]
    if mode == "center_crop":
        top, left = (height - size) // 2, (width - size) // 2
        picture = picture[top : top + size, left : left + size]
    elif mode == "border":
        square = np.full((size, size, 3), 255, np.uint8)
        top, left = (size - height) // 2, (size - width) // 2
        square[top : top + height, left : left + width] = picture
        picture = square
    return np.ascontiguousarray(picture)


def _scaled(picture: Picture, shape: tuple[int, int], interpolation: str, quick: bool) -> Picture:
    import cv2

    names = {
        "nearest": cv2.INTER_NEAREST,
        "linear": cv2.INTER_LINEAR,
        "bilinear": cv2.INTER_LINEAR,
        "cubic": cv2.INTER_CUBIC,
        "bicubic": cv2.INTER_CUBIC,
        "area": cv2.INTER_AREA,
        "lanczos": cv2.INTER_LANCZOS4,
        "lanczos4": cv2.INTER_LANCZOS4,
    }
    ratio = min(picture.shape[1] / shape[0], picture.shape[0] / shape[1])
    by_two = quick and interpolation == "area" and shape[0] * shape[1] <= _MOST_BY_TWO_PX
    if by_two and 1 < ratio <= _MOST_BY_TWO:
        # OpenCV sums boxes of 2x2 px with vector code, all others sample by sample.
        picture = np.asarray(cv2.resize(picture, (2 * shape[0], 2 * shape[1]), interpolation=cv2.INTER_LINEAR))
    return np.asarray(cv2.resize(picture, shape, interpolation=names[interpolation]), np.uint8)


def boxed(picture: Picture, factor: int) -> Picture:
    """The picture shrunk by a whole number, each px the mean of a box; the last row and column are repeated to fill it.

    (H, W, 3) → (ceil(H / factor), ceil(W / factor), 3), as a JPEG's scaled decoding rounds.
    """
    import cv2

    height, width = picture.shape[:2]
    down, right = -height % factor, -width % factor
    if down or right:
        picture = np.asarray(cv2.copyMakeBorder(picture, 0, down, 0, right, cv2.BORDER_REPLICATE), np.uint8)
    shape = (picture.shape[1] // factor, picture.shape[0] // factor)
    return np.asarray(cv2.resize(picture, shape, interpolation=cv2.INTER_AREA), np.uint8)
