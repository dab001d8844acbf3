"""What a picture looks like, in numbers that need no model.

In: (H, W, 3) uint8 RGB, of at least one px. Out: plain numbers. Nothing fails. Y is the luma 0.299 R + 0.587 G +
0.114 B, rounded to 8 bits (ITU-R BT.601, as OpenCV rounds it). Sources: Pech-Pacheco et al. 2000 (variance of the
Laplacian), Peli 1990 (RMS contrast), Hasler and Süsstrunk 2003 (colourfulness, eq. 8).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from mmdata.media.picture import Picture

__all__ = ["Borders", "Tones", "borders", "channel_spread", "colourfulness", "luma", "sharpness", "tones"]

Luma = npt.NDArray[np.uint8]  # (H, W)


class Tones(NamedTuple):
    """What the histogram of Y tells: mean and standard deviation over 255, entropy in bits."""

    brightness: float
    contrast: float
    entropy: float


class Borders(NamedTuple):
    """Px of plain border on each side."""

    left: int
    top: int
    right: int
    bottom: int


def luma(picture: Picture) -> Luma:
    """(H, W, 3) → (H, W) uint8."""
    return np.asarray(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY))


def tones(grey: Luma) -> Tones:
    """Of Y: mean / 255 in [0, 1], standard deviation / 255 in [0, 0.5], −Σ p log₂ p over its 256 values in [0, 8]."""
    shares = np.bincount(grey.ravel(), minlength=256) / grey.size
    found = shares[shares > 0]
    levels = np.arange(256)
    mean = float(levels @ shares)
    variance = float((levels - mean) ** 2 @ shares)
    return Tones(mean / 255, math.sqrt(variance) / 255, max(0.0, float(-(found * np.log2(found)).sum())))


def sharpness(grey: Luma) -> float:
    """Variance of the Laplacian of Y (kernel 0 1 0 / 1 −4 1 / 0 1 0, edges mirrored, Y in 0 to 255), ≥ 0."""
    return _moments(cv2.Laplacian(grey, cv2.CV_16S))[1]


def colourfulness(picture: Picture) -> float:
    """√(σ²_rg + σ²_yb) + 0.3 √(μ²_rg + μ²_yb), rg = R − G, yb = (R + G) / 2 − B; 0 for greys, 110 for vivid ones."""
    red, green, blue = (channel.astype(np.int16) for channel in cv2.split(picture))
    mean_rg, variance_rg = _moments(red - green)
    # Twice yb stays a whole number; the factor comes out again below.
    mean_yb, variance_yb = _moments(red + green - 2 * blue)
    return math.sqrt(variance_rg + variance_yb / 4) + 0.3 * math.sqrt(mean_rg**2 + mean_yb**2 / 4)


def channel_spread(picture: Picture) -> int:
    """Largest difference between two channels of one px, 0 to 255: 0 where R = G = B everywhere."""
    red, green, blue = cv2.split(picture)
    return max(int(cv2.absdiff(a, b).max()) for a, b in ((red, green), (green, blue), (red, blue)))


def borders(picture: Picture, tolerance: int) -> Borders:
    """Rows and columns from each edge inwards that are of the colour of that edge's first px.

    A row counts when none of its channels is further than `tolerance` (of 255) from that px; the whole picture counts
    on all four sides when it is plain.
    """
    height, width = picture.shape[:2]
    top = _run(picture, tolerance)
    if top == height:
        return Borders(width, height, width, height)
    left, right = _run(picture.swapaxes(0, 1), tolerance), _run(picture[:, ::-1].swapaxes(0, 1), tolerance)
    return Borders(left, top, right, _run(picture[::-1], tolerance))


def _run(picture: Picture, tolerance: int) -> int:
    """How many rows from the first on are plain; looks at a few at a time, for most pictures have no border."""
    colour = picture[0, 0].astype(np.int16)
    lowest = np.clip(colour - tolerance, 0, 255).astype(np.uint8)
    highest = np.clip(colour + tolerance, 0, 255).astype(np.uint8)
    first, step = 0, 4
    while first < len(picture):
        some = picture[first : first + step]
        plain = ((some >= lowest) & (some <= highest)).all(axis=(1, 2))
        if not plain.all():
            return first + int(np.argmin(plain))
        first, step = first + step, step * 2
    return len(picture)


def _moments(values: npt.NDArray[Any]) -> tuple[float, float]:
    """Mean and variance, by OpenCV: one pass, no copy in floats."""
    mean, deviation = cv2.meanStdDev(values)
    return float(mean[0, 0]), float(deviation[0, 0]) ** 2
