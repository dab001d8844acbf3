"""Perceptual hash of a picture: 64 bits that survive resizing and recompression; on request a hash of its pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image
from pydantic import Field

from mmdata.batch import Batch
from mmdata.stage import Columns, Contract, Options, Pixels, Stage, parse_schema

__all__ = ["HashImage", "HashImageOptions", "phash"]

_SIDE = 32  # px the picture is shrunk to
_LOW = 8  # lowest frequencies kept in each direction
_FRACTION_BITS = 22  # 8 (pixel) + 2 · 22 (cosines) + 2 · 5 (sums of 32) bits stay below 63


class HashImageOptions(Options):
    """What is computed beside the perceptual hash."""

    exact: bool = Field(False, description="also write pixel_sha256, the same for pictures of equal pixels only")


class HashImage(Stage[HashImageOptions]):
    """64-bit pHash of the luma of a picture.

    Reads image (as stored). Writes `phash`, uint64: the picture as grey, shrunk to 32 × 32 (Lanczos, aspect ratio
    ignored), the 8 × 8 lowest frequencies of its 2-D DCT-II, each one bit: above their median or not. Row by row from
    the mean grey on, the first bit is the highest, so that `printf('%016x', phash)` is what imagehash prints. Compare
    by Hamming distance: 0 to 64, 32 for unrelated pictures; copies that were resized or recompressed mostly stay
    within 4. With `exact`, also `pixel_sha256`, 64 lower-case hex digits: the sha256 of width and height (two
    little-endian uint32) and of the RGB bytes, row by row, of the picture as every stage sees it: upright, 8 bits a
    channel, alpha on white. Pictures that were only stored anew without loss (PNG as WebP, metadata removed, rotated
    by EXIF or in pixels) are equal, where `sha256` of the file is not; one pixel off by one is another. Give it to
    `exact_duplicates: {of: [pixel_sha256]}`. NULL only with a reason, when the picture is missing or does not decode.

    Source: Zauner 2010 (pHash) in the form of `imagehash.phash`. Where that computes in floats, this sums whole
    numbers (cosines of 22 binary digits), so that symmetric and flat pictures, whose coefficients tie with the
    median, hash to the same bits on every machine; only there do the two differ.
    """

    name = "hash_image"
    version = 1
    label = "image_hash"
    pixels = (Pixels(),)

    @classmethod
    def contract(cls, options: HashImageOptions) -> Contract:
        """`pixel_sha256` only where asked for."""
        writes = parse_schema("phash: uint64, pixel_sha256: string" if options.exact else "phash: uint64")
        return Contract(writes=writes, reads=("image",), pixels=cls.pixels)

    def compute(self, batch: Batch) -> Columns:
        """The hashes of every picture."""
        pictures = batch.pixels()
        columns: dict[str, npt.NDArray[np.uint64] | pa.Array] = {"phash": phash(pictures)}
        if self.options.exact:
            columns["pixel_sha256"] = pa.array([_exact(p) for p in pictures], pa.string())
        return columns


def phash(pictures: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint64]:
    """The perceptual hash of each picture, (H, W, 3) uint8 RGB: see `HashImage`."""
    small = np.empty((len(pictures), _SIDE, _SIDE), np.int64)
    for index, picture in enumerate(pictures):
        grey = Image.fromarray(picture).convert("L")
        small[index] = np.asarray(grey.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS))
    return _hashes(small)


def _exact(picture: npt.NDArray[np.uint8]) -> str:
    height, width = picture.shape[:2]
    digest = hashlib.sha256(np.array([width, height], "<u4").tobytes())
    digest.update(np.ascontiguousarray(picture).data)
    return digest.hexdigest()


def _cosines() -> npt.NDArray[np.int64]:
    """(8, 32): the first rows of the DCT-II matrix, unnormalised, as fixed-point numbers."""
    angles = np.pi * np.outer(np.arange(_LOW), 2 * np.arange(_SIDE) + 1) / (2 * _SIDE)
    fixed: npt.NDArray[np.int64] = np.rint(np.cos(angles) * 2**_FRACTION_BITS).astype(np.int64)
    return fixed


_COSINES = _cosines()


def _hashes(small: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """(N, 32, 32) grey values → (N,) hashes."""
    low = (_COSINES @ small @ _COSINES.T).reshape(len(small), _LOW * _LOW)
    # The median of 64 values is the mean of the 32nd and 33rd; what exceeds the 32nd exceeds that mean, and only that.
    bits = low > np.sort(low, axis=1)[:, 31:32]
    return np.packbits(bits, axis=1).view(">u8").astype(np.uint64).ravel()
