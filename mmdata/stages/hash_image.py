"""Perceptual hashes of a picture: 64 bits that survive resizing and recompression; on request a hash of its pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, field_validator

from mmdata.batch import Batch
from mmdata.media.grey import shrink
from mmdata.stage import Columns, Contract, Options, Pixels, Stage, parse_schema

__all__ = ["HashImage", "HashImageOptions", "image_hashes", "phash"]

_SIDE = 32  # px the picture is shrunk to
_LOW = 8  # lowest frequencies kept in each direction
_FRACTION_BITS = 22  # 8 (pixel) + 2 · 22 (cosines) + 2 · 5 (sums of 32) bits stay below 63

Small = npt.NDArray[np.uint8]  # (N, height, width) grey


class HashImageOptions(Options):
    """Which hashes are computed, and what beside them."""

    hashes: list[Literal["phash", "dhash", "ahash"]] = Field(
        ["phash"], min_length=1, description="each writes a column of its name"
    )
    flip_invariant: bool = Field(False, description="a picture and its mirror image have the same hashes")
    exact: bool = Field(False, description="also write pixel_sha256, the same for pictures of equal pixels only")

    @field_validator("hashes")
    @classmethod
    def _each_once(cls, hashes: list[str]) -> list[str]:
        if len(set(hashes)) < len(hashes):
            raise ValueError("name each hash once")
        return hashes


class HashImage(Stage[HashImageOptions]):
    """64-bit perceptual hashes of the luma of a picture.

    Reads image (as stored). Writes a uint64 column for each of `hashes`. The picture as grey is shrunk (Lanczos, aspect
    ratio ignored), and the 64 bits are, row by row, the first the highest:
    `phash`: of 32 × 32 px, the 8 × 8 lowest frequencies of the 2-D DCT-II from the mean grey on; above their median?
    `dhash`: of 9 × 8 px (width × height), every px but the last of a row; is the one to its right brighter?
    `ahash`: of 8 × 8 px, every px; brighter than their mean?
    `printf('%016x', phash)` is what imagehash prints. Compare by Hamming distance: 0 to 64, about 32 for unrelated
    pictures; copies that were resized or recompressed mostly stay within 4 of each other's `phash`.

    With `flip_invariant` a hash is the smaller of that of the shrunk picture and of its mirror image (left and right
    exchanged), so that both have the same; it is then not what imagehash prints, unrelated pictures lie a little
    closer, and of a picture that is nearly symmetric a copy may fall to the other side.

    With `exact`, also `pixel_sha256`, 64 lower-case hex digits: the sha256 of width and height (two
    little-endian uint32) and of the RGB bytes, row by row, of the picture as every stage sees it: upright, 8 bits a
    channel, alpha on white. Pictures that were only stored anew without loss (PNG as WebP, metadata removed, rotated
    by EXIF or in pixels) are equal, where `sha256` of the file is not; one pixel off by one is another. Give it to
    `exact_duplicates: {of: [pixel_sha256]}`. NULL only with a reason, when the picture is missing or does not decode.

    Source: Zauner 2010 (pHash), Krawetz 2011 and 2013 (aHash, dHash), each in the form of `imagehash` over Pillow 13.
    Where `imagehash.phash` computes in floats, this sums whole numbers (cosines of 22 binary digits), so that symmetric
    and flat pictures, whose coefficients tie with the median, hash to the same bits on every machine; only there do the
    two differ.
    """

    name = "hash_image"
    version = 1
    label = "image_hash"
    pixels = (Pixels(),)
    on_request = (("dhash", "hashes: [dhash]"), ("ahash", "hashes: [ahash]"), ("pixel_sha256", "exact: true"))

    @classmethod
    def contract(cls, options: HashImageOptions) -> Contract:
        """A column per hash, `pixel_sha256` only where asked for."""
        columns = [f"{name}: uint64" for name in options.hashes]
        writes = parse_schema(", ".join([*columns, "pixel_sha256: string"] if options.exact else columns))
        return Contract(writes=writes, reads=("image",), pixels=cls.pixels)

    def compute(self, batch: Batch) -> Columns:
        """The hashes of every picture."""
        pictures = batch.pixels()
        columns: dict[str, Any] = dict(image_hashes(pictures, self.options.hashes, self.options.flip_invariant))
        if self.options.exact:
            columns["pixel_sha256"] = pa.array([_exact(p) for p in pictures], pa.string())
        return columns


def image_hashes(
    pictures: Sequence[npt.NDArray[np.uint8]], names: Sequence[str] = ("phash",), flip_invariant: bool = False
) -> dict[str, npt.NDArray[np.uint64]]:
    """Name → (N,) hashes of the pictures, (H, W, 3) uint8 RGB each: see `HashImage`."""
    small = {name: np.empty((len(pictures), *_HASHES[name][0]), np.uint8) for name in names}
    sizes = [_HASHES[name][0][::-1] for name in names]
    for index, picture in enumerate(pictures):
        for name, shrunk in zip(names, shrink(picture, sizes), strict=True):
            small[name][index] = shrunk
    found = {}
    for name in names:
        _, bits = _HASHES[name]
        found[name] = _packed(bits(small[name]))
        if flip_invariant:
            found[name] = np.minimum(found[name], _packed(bits(small[name][:, :, ::-1])))
    return found


def phash(pictures: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint64]:
    """The `phash` of each picture, (H, W, 3) uint8 RGB."""
    return image_hashes(pictures)["phash"]


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


def _phash(small: Small) -> npt.NDArray[np.bool_]:
    # Products of 22 binary digits by sums of 32 px are exact in float64; the second sum needs 62.
    half = (small.astype(np.float64) @ _COSINES.T.astype(np.float64)).astype(np.int64)
    low = (_COSINES @ half).reshape(len(small), _LOW * _LOW)
    # The median of 64 values is the mean of the 32nd and 33rd; what exceeds the 32nd exceeds that mean, and only that.
    above: npt.NDArray[np.bool_] = low > np.partition(low, 31, axis=1)[:, 31:32]
    return above


def _dhash(small: Small) -> npt.NDArray[np.bool_]:
    return small[:, :, 1:] > small[:, :, :-1]


def _ahash(small: Small) -> npt.NDArray[np.bool_]:
    above: npt.NDArray[np.bool_] = 64 * small.astype(np.int64) > small.sum(axis=(1, 2), keepdims=True, dtype=np.int64)
    return above


# (height, width) that a picture is shrunk to, and its bits
_HASHES: dict[str, tuple[tuple[int, int], Callable[[Small], npt.NDArray[np.bool_]]]] = {
    "phash": ((_SIDE, _SIDE), _phash),
    "dhash": ((8, 9), _dhash),
    "ahash": ((8, 8), _ahash),
}


def _packed(bits: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint64]:
    """(N, …) of 64 bits each → (N,), the first bit the highest."""
    return np.packbits(bits.reshape(len(bits), 64), axis=1).view(">u8").astype(np.uint64).ravel()
