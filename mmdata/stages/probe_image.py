"""What a picture looks like in five numbers, none of which needs a model."""

from __future__ import annotations

import numpy as np

from mmdata.batch import Batch
from mmdata.media import looks
from mmdata.media.picture import Picture
from mmdata.stage import Columns, NoOptions, Pixels, Stage

__all__ = ["ProbeImage"]


class ProbeImage(Stage[NoOptions]):
    """Shape, brightness, contrast, sharpness and colour of a picture.

    Reads image (as stored) and original_width_px, original_height_px. Writes

    - `aspect_ratio` ≥ 1: long side / short side as fetched, before any resize; of the stored picture where the
      original size is not known (media that was adopted);
    - `brightness` in [0, 1]: mean of the luma Y = 0.299 R + 0.587 G + 0.114 B, rounded to 8 bits, divided by 255;
    - `entropy` in [0, 8] bits: −Σ p log₂ p over the 256 values of Y; a plain surface is 0;
    - `sharpness` ≥ 0: variance of the Laplacian of Y (kernel 0 1 0 / 1 −4 1 / 0 1 0, edges mirrored, Y in 0 to 255);
      it grows with detail and depends on the stored size, so compare within one `image_size`;
    - `colourfulness` ≥ 0: √(σ²_rg + σ²_yb) + 0.3 √(μ²_rg + μ²_yb) with rg = R − G and yb = (R + G) / 2 − B, R, G, B in
      0 to 255; 0 for greys, about 110 for vivid pictures.

    NULL only with a reason, when the picture is missing or does not decode.
    Source: Pech-Pacheco et al. 2000 (variance of the Laplacian); Hasler and Süsstrunk 2003 (colourfulness, eq. 8).
    """

    name = "probe_image"
    version = 1
    label = "image_probe"
    reads = ("image", "original_width_px", "original_height_px")
    writes = "aspect_ratio: float64, brightness: float32, entropy: float32, sharpness: float32, colourfulness: float32"
    pixels = (Pixels(),)

    def compute(self, batch: Batch) -> Columns:
        """One row of numbers per picture."""
        pictures = batch.pixels()
        sizes = zip(batch["original_width_px"], batch["original_height_px"], strict=True)
        ratios = [_aspect_ratio(size, p.shape) for size, p in zip(sizes, pictures, strict=True)]
        looks = np.array([_look(p) for p in pictures], np.float32).reshape(len(pictures), 4)
        columns = dict(zip(("brightness", "entropy", "sharpness", "colourfulness"), looks.T, strict=True))
        return {"aspect_ratio": ratios, **columns}


def _aspect_ratio(original: tuple[int | None, int | None], stored: tuple[int, ...]) -> float:
    width, height = original
    if not width or not height:
        height, width = stored[:2]
    return max(width, height) / min(width, height)


def _look(picture: Picture) -> tuple[float, float, float, float]:
    grey = looks.luma(picture)
    tones = looks.tones(grey)
    return tones.brightness, tones.entropy, looks.sharpness(grey), looks.colourfulness(picture)
