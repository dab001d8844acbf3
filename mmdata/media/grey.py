"""Pictures shrunk and grey: Pillow's `convert("L")` and Lanczos `resize`, bit for bit, several times as fast.

In: (H, W, 3) uint8 RGB, any size from 1 × 1. Out: (height, width) uint8 for each size asked for. Nothing fails. Beside
its results a thread holds 4 MB, whatever the size of the picture.

Every sum here is one of whole numbers (over a power of two) that float32 or float64 holds exactly, whatever the order
of the additions: products of matrices do the work, and the result is the same on every machine. Luma is
(19595 R + 38470 G + 7471 B + 32768) / 65536, rounded down, below 2²⁴ before the division. A filter's factors are
numbers of 22 binary digits.

Source: Pillow's resampling (Resample.c): two passes, each rounded to 8 bits. Which goes first shows in the last bit;
here, as in Pillow 13, it is the vertical one where H − height > max(0, 2 (W − width)). Earlier versions begin with the
horizontal one always.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

__all__ = ["shrink"]

_COEFFICIENTS = np.array([[19595, 38470, 7471, 32768]]) / 65536  # of red, green, blue, and what rounds
_FRACTION = 1 << 22
_STRIP_PX = 1 << 17  # worked on at once
_BAND = 8  # values of the result that share a product

Picture = npt.NDArray[np.uint8]
Grey = npt.NDArray[np.float64]
# Per band of results, which values they begin and end at, and the factors, (end - begin, _BAND).
Taps = tuple[tuple[int, int, npt.NDArray[np.float64]], ...]


def shrink(picture: Picture, sizes: Sequence[tuple[int, int]]) -> list[Picture]:
    """(H, W, 3) RGB → per (width, height) the picture in that size as grey, (height, width).

    The filter is Lanczos's of 3 lobes, over the source's px where it shrinks. A picture that has the size is its luma.
    """
    tall, wide = picture.shape[:2]
    upright = [(w, h) for w, h in sizes if tall - h <= max(0, 2 * (wide - w))]
    lying = [(h, w) for w, h in sizes if (w, h) not in upright]
    found = dict(zip(upright, _both_ways(picture, upright), strict=True)) if upright else {}
    if lying:
        turned = _both_ways(picture.transpose(1, 0, 2), lying)
        found |= {(w, h): small.T for (h, w), small in zip(lying, turned, strict=True)}
    return [found[size] for size in sizes]


def _both_ways(picture: Picture, sizes: Sequence[tuple[int, int]]) -> list[Picture]:
    """Every row through the filters, then every column."""
    rows, length = picture.shape[:2]
    widths = dict.fromkeys(w for w, _ in sizes)
    found = {w: np.empty((-(-w // _BAND), _BAND, rows), np.uint8) for w in widths}
    many = max(1, _STRIP_PX // length)
    for top in range(0, rows, many):
        grey = _luma(picture[top : top + many])
        for width, part in found.items():
            part[:, :, top : top + many] = _filtered(grey, width)
    across = {w: part.reshape(-1, rows)[:w].astype(np.float64) for w, part in found.items()}
    return [_rounded(_whole(rows, h) @ across[w].T) for w, h in sizes]


class _Room(threading.local):
    """Arrays that each thread makes once: fresh ones cost more than what is done in them."""

    def __init__(self) -> None:
        self.colours = np.empty(0, np.float32)
        self.value = np.empty(0, np.float32)
        self.grey = np.empty(0)

    def require(self, px: int) -> None:
        if len(self.grey) < px:
            self.colours, self.value, self.grey = np.zeros(3 * px, np.float32), np.empty(px, np.float32), np.empty(px)


_room = _Room()


def _luma(picture: Picture) -> Grey:
    """(R, N, 3) → (R, N) whole grey values, in the thread's room."""
    import cv2  # here, as the import of every module must be fast

    rows, length = picture.shape[:2]
    px = rows * length
    _room.require(px if px > _STRIP_PX else _STRIP_PX)
    colours = _room.colours[: 3 * px].reshape(rows, length, 3)
    cv2.accumulateWeighted(picture, colours, 1.0)  # a copy, and the quickest one to float32
    value = cv2.transform(colours, _COEFFICIENTS, _room.value[:px].reshape(rows, length))
    np.floor(value, out=value)
    grey = _room.grey[:px].reshape(rows, length)
    np.copyto(grey, value)
    return grey


def _filtered(rows: Grey, out: int) -> Picture:
    """(R, N) → (bands, _BAND, R): the results of every row, rounded and clipped to 0 … 255, in a column."""
    taps = _taps(rows.shape[1], out)
    sums = np.empty((len(taps), len(rows), _BAND))
    for band, (begin, end, factors) in zip(sums, taps, strict=True):
        np.matmul(rows[:, begin:end], factors, out=band)
    return np.ascontiguousarray(_rounded(sums.reshape(-1, _BAND)).reshape(sums.shape).transpose(0, 2, 1))


def _rounded(sums: npt.NDArray[np.float64]) -> Picture:
    """To whole numbers of 0 … 255, halves upwards."""
    import cv2

    # OpenCV rounds halves to even and clips. Half a unit of the last digit more sends them up, and moves nothing else.
    return cv2.add(sums, 0.5 / _FRACTION, dtype=cv2.CV_8U)  # type: ignore[call-overload, no-any-return]


@lru_cache(maxsize=512)  # some 80 kB for a side of 300 px
def _whole(size: int, out: int) -> npt.NDArray[np.float64]:
    """(out, size): the filter as one matrix, for few rows."""
    matrix = np.zeros((out, size))
    for band, (begin, end, factors) in enumerate(_taps(size, out)):
        columns = factors.T[: out - band * _BAND]
        matrix[band * _BAND : band * _BAND + len(columns), begin:end] = columns
    return matrix


@lru_cache(maxsize=512)  # some 40 kB for a side of 300 px
def _taps(size: int, out: int) -> Taps:
    """The filter from `size` to `out` values."""
    if size == out:
        return _banded(np.eye(size, -(-out // _BAND) * _BAND))
    scale = size / out
    stretch = max(scale, 1.0)
    matrix = np.zeros((size, -(-out // _BAND) * _BAND))
    for column in range(out):
        centre = (column + 0.5) * scale
        first, last = max(int(centre - 3 * stretch + 0.5), 0), min(int(centre + 3 * stretch + 0.5), size)
        at = (np.arange(first, last) - centre + 0.5) / stretch
        weights = np.where(np.abs(at) < 3, np.sinc(at) * np.sinc(at / 3), 0.0)
        matrix[first:last, column] = np.rint(weights / weights.sum() * _FRACTION) / _FRACTION
    return _banded(matrix)


def _banded(matrix: npt.NDArray[np.float64]) -> Taps:
    bands = []
    for column in range(0, matrix.shape[1], _BAND):
        factors = matrix[:, column : column + _BAND]
        used = np.flatnonzero(factors.any(axis=1))
        begin, end = int(used[0]), int(used[-1]) + 1
        factors = np.ascontiguousarray(factors[begin:end])
        factors.flags.writeable = False
        bands.append((begin, end, factors))
    return tuple(bands)
