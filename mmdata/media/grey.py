"""Pictures shrunk and grey: Pillow's `convert("L")` and Lanczos `resize`, bit for bit, several times as fast.

In: (H, W, 3) uint8 RGB, any size from 1 × 1. Out: (height, width) uint8 for each size asked for. Nothing fails.
Memory: 2 MB a thread, whatever the size of the picture; while it works, for 32 results, 160 bytes for each of its rows
(columns, where they go first); and a process keeps the filters of the sides it met last, 80 MB at most for sides up to
20,000 px.

Every sum here is one of whole numbers (over a power of two) that float32 or float64 holds exactly, whatever the order
of the additions: products of matrices do the work, and the result is the same on every machine. Luma is
(19595 R + 38470 G + 7471 B + 32768) / 65536, rounded down, below 2²⁴ before the division. A filter's factors are
numbers of 22 binary digits. float32 takes them in two parts, the lower 8 digits apart; the filters of the widest
pictures (from some 5,600 px for 32 results, 1,400 px for 8) have too many factors for that, and take float64.

Source: Pillow's resampling (Resample.c): two passes, each rounded to 8 bits. Which goes first shows in the last bit;
here, as in Pillow 13, it is the vertical one where H − height > max(0, 2 (W − width)). Earlier versions begin with the
horizontal one always.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["shrink"]

_COEFFICIENTS = np.array([[19595, 38470, 7471, 32768]]) / 65536  # of red, green, blue, and what rounds
_FRACTION = 1 << 22  # of a factor
_FINE = 1 << 8  # that part of it which is summed apart in float32
_UNIT = _FINE / _FRACTION
_STRIP_PX = 1 << 17  # worked on at once
_LONG = 1 << 10  # px; of larger sides fewer filters are kept, for they are large, and quickly made beside decoding
_BAND = 8  # values of the result that share a product
_SMALL_PRODUCT = 999_999  # multiplications; OpenBLAS copies its operands from a million on, which takes twice as long

Picture = npt.NDArray[np.uint8]
Grey = npt.NDArray[np.float32]
# Per band of results, which values they begin and end at, and the factors: float64, (_BAND, end - begin), or float32,
# (2 · _BAND, end - begin), each result's coarse part, in units, before its fine one, in fractions of a unit.
Taps = tuple[tuple[int, int, npt.NDArray[Any]], ...]


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
    found = {w: np.empty((w, rows), np.uint8) for w, _ in sizes}
    many = max(1, _STRIP_PX // length)
    for top in range(0, rows, many):
        grey = _luma(picture[top : top + many])
        for width, part in found.items():
            part[:, top : top + many] = _filtered(grey, width)
    across = {w: part.astype(np.float32) for w, part in found.items()}
    return [_filtered(across[w], h) for w, h in sizes]


class _Room(threading.local):
    """Arrays that each thread makes once: fresh ones cost more than what is done in them."""

    def __init__(self) -> None:
        self.colours = np.empty(0, np.float32)
        self.grey = np.empty(0, np.float32)

    def require(self, px: int) -> None:
        if len(self.grey) < px:
            self.colours, self.grey = np.zeros(3 * px, np.float32), np.empty(px, np.float32)


_room = _Room()


def _luma(picture: Picture) -> Grey:
    """(R, N, 3) → (R, N) whole grey values, in the thread's room."""
    import cv2  # here, as the import of every module must be fast

    rows, length = picture.shape[:2]
    px = rows * length
    _room.require(px if px > _STRIP_PX else _STRIP_PX)
    colours = _room.colours[: 3 * px].reshape(rows, length, 3)
    cv2.accumulateWeighted(picture, colours, 1.0)  # a copy, and the quickest one to float32
    grey = cv2.transform(colours, _COEFFICIENTS, _room.grey[:px].reshape(rows, length))
    return np.floor(grey, out=grey)


def _filtered(rows: Grey, out: int) -> Picture:
    """(R, N) → (out, R), turned: what the filter makes of each row, rounded, halves upwards, and clipped to 0 … 255."""
    import cv2

    taps = _taps(rows.shape[1], out)
    across = len(taps[0][2])
    sums = np.empty((len(taps) * across, len(rows)), taps[0][2].dtype)
    for band, (begin, end, factors) in enumerate(taps):
        results = sums[band * across : (band + 1) * across]
        many = max(1, _SMALL_PRODUCT // factors.size)
        for top in range(0, len(rows), many):
            np.matmul(factors, rows[top : top + many, begin:end].T, out=results[:, top : top + many])
    # OpenCV rounds halves to even and clips. A quarter of a unit more sends them up, and moves nothing else.
    if sums.dtype == np.float64:
        # All bands, for 4 numbers alone would pass for what is added to each: OpenCV reads the float as 4 × 1, too.
        return cv2.add(sums, 0.25 / _FRACTION, dtype=cv2.CV_8U)[:out]  # type: ignore[call-overload, no-any-return]
    np.floor(sums, out=sums)  # whole units: what is below one never decides
    parts = sums.reshape(-1, 2 * len(rows))  # coarse beside fine
    coarse, fine = parts[:, : len(rows)], parts[:, len(rows) :]
    return cv2.addWeighted(coarse, _UNIT, fine, _UNIT, _UNIT / 4, dtype=cv2.CV_8U)[:out]  # type: ignore[return-value]


def _taps(size: int, out: int) -> Taps:
    """The filter from `size` to `out` values, in two parts where float32 holds every sum."""
    return (_short_taps if size <= _LONG else _long_taps)(size, out)


def _made_taps(size: int, out: int) -> Taps:
    whole = _filter(size, out)
    coarse = np.rint(whole / _FINE)
    parts = np.stack([coarse, whole - coarse * _FINE], axis=2)
    if (255 * np.abs(parts).sum(axis=0) < 1 << 24).all():
        return _banded((parts / (1, _FINE)).astype(np.float32).reshape(size, -1), 2 * _BAND)
    return _banded(whole / _FRACTION, _BAND)


_short_taps = lru_cache(maxsize=512)(_made_taps)  # some 30 kB for a side of 300 px
_long_taps = lru_cache(maxsize=16)(_made_taps)  # some 100 kB for each 1,000 px


def _filter(size: int, out: int) -> npt.NDArray[np.float64]:
    """(size, out rounded up to whole bands): the factors of each result, times _FRACTION, whole numbers."""
    if size == out:
        return np.eye(size, -(-out // _BAND) * _BAND) * _FRACTION
    scale = size / out
    stretch = max(scale, 1.0)
    factors = np.zeros((size, -(-out // _BAND) * _BAND))
    for column in range(out):
        centre = (column + 0.5) * scale
        first, last = max(int(centre - 3 * stretch + 0.5), 0), min(int(centre + 3 * stretch + 0.5), size)
        at = (np.arange(first, last) - centre + 0.5) / stretch
        weights = np.where(np.abs(at) < 3, np.sinc(at) * np.sinc(at / 3), 0.0)
        factors[first:last, column] = np.rint(weights / weights.sum() * _FRACTION)
    return factors


def _banded(factors: npt.NDArray[Any], across: int) -> Taps:
    bands = []
    for column in range(0, factors.shape[1], across):
        band = factors[:, column : column + across]
        used = np.flatnonzero(band.any(axis=1))
        begin, end = int(used[0]), int(used[-1]) + 1
        band = np.ascontiguousarray(band[begin:end])
        band.flags.writeable = False
        bands.append((begin, end, band.T))
    return tuple(bands)
