"""What a picture looks like in numbers: sharp, bright, colourful, grey, framed. Needs no model."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from pydantic import Field

from mmdata.batch import Batch
from mmdata.media import looks
from mmdata.media.picture import Picture
from mmdata.stage import Columns, Contract, Options, Pixels, Stage, parse_schema

__all__ = ["MeasureImage", "MeasureImageOptions"]

_WRITES = parse_schema(
    "measure_sharpness: float32, measure_brightness: float32, measure_contrast: float32, measure_entropy: float32, "
    "measure_colourfulness: float32, measure_is_grayscale: bool, measure_border_left_ratio: float32, "
    "measure_border_top_ratio: float32, measure_border_right_ratio: float32, measure_border_bottom_ratio: float32, "
    "measure_is_framed: bool"
)


class MeasureImageOptions(Options):
    """At what size a picture is measured, and what still counts as grey and as plain."""

    max_side_px: int | None = Field(
        None, ge=16, description="shrink a larger picture to this longest side before all but the borders are measured"
    )
    grey_tolerance: int = Field(
        4, ge=0, le=255, description="largest difference between a px's channels in a picture that counts as greyscale"
    )
    border_tolerance: int = Field(
        8, ge=0, le=255, description="how far a channel of a plain border's px may be from the first one's"
    )
    frame_share: float = Field(
        0.01, gt=0, lt=0.5, description="share of height and width that every side of a frame takes at least"
    )


class MeasureImage(Stage[MeasureImageOptions]):
    """Sharpness, tones, colour and plain borders of a picture.

    Reads image, as stored: what exports hold is what is judged. Sharpness grows with the size at which a picture is
    stored and falls where it was enlarged, so compare it within one `image_size`, or set `max_side_px` (area average,
    nothing is enlarged); the other numbers hardly depend on the size. Y is the luma 0.299 R + 0.587 G + 0.114 B,
    rounded to 8 bits. Writes

    - `measure_sharpness` ≥ 0: variance of the Laplacian of Y (kernel 0 1 0 / 1 −4 1 / 0 1 0, edges mirrored);
    - `measure_brightness` in [0, 1]: mean of Y / 255; `measure_contrast` in [0, 0.5]: standard deviation of Y / 255;
    - `measure_entropy` in [0, 8] bits: −Σ p log₂ p over the 256 values of Y;
    - `measure_colourfulness` ≥ 0: √(σ²_rg + σ²_yb) + 0.3 √(μ²_rg + μ²_yb) with rg = R − G and yb = (R + G) / 2 − B in
      −255 to 255: 0 for greys, about 110 for vivid pictures;
    - `measure_is_grayscale`: no px has channels further apart than `grey_tolerance` of 255 (JPEG moves them a little);
    - `measure_border_left_ratio`, `measure_border_top_ratio`, `measure_border_right_ratio` and
      `measure_border_bottom_ratio` in [0, 1]: columns (of the width) or rows (of the height) from that edge on whose px
      are all within `border_tolerance` of the edge's first px; 1 on all sides for a plain picture;
    - `measure_is_framed`: plain borders of at least `frame_share` on all four sides, around something.

    NULL only with a reason, when the picture is missing or does not decode.
    Source: Pech-Pacheco et al. 2000 (variance of the Laplacian), Peli 1990 (RMS contrast), Hasler and Süsstrunk 2003
    (colourfulness, eq. 8). The borders and their tolerances are ours. `probe_image` has four of these numbers, at the
    stored size.
    """

    name = "measure_image"
    version = 1
    label = "measure"
    pixels = (Pixels(),)

    @classmethod
    def contract(cls, options: MeasureImageOptions) -> Contract:
        """The picture as stored, whatever the options."""
        return Contract(writes=_WRITES, reads=("image",), pixels=cls.pixels)

    def compute(self, batch: Batch) -> Columns:
        """One row of numbers per picture."""
        rows = [self._measure(picture) for picture in batch.pixels()]
        return {name: [row[i] for row in rows] for i, name in enumerate(_WRITES.names)}

    def _measure(self, picture: Picture) -> tuple[Any, ...]:
        options = self.options
        shown = _shrunk(picture, options.max_side_px)
        grey = looks.luma(shown)
        height, width = picture.shape[:2]
        left, top, right, bottom = looks.borders(picture, options.border_tolerance)
        shares = (left / width, top / height, right / width, bottom / height)
        return (
            looks.sharpness(grey),
            *looks.tones(grey),
            looks.colourfulness(shown),
            looks.channel_spread(shown) <= options.grey_tolerance,
            *shares,
            min(shares) >= options.frame_share and max(shares) < 1,
        )


def _shrunk(picture: Picture, longest: int | None) -> Picture:
    height, width = picture.shape[:2]
    if longest is None or max(height, width) <= longest:
        return picture
    factor = longest / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)
