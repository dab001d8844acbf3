"""XXH64 over many short records at once: the hash of shingles, bands and signatures.

In: the words of each record as columns, one numpy array a column, so that record i is the i-th value of every column
one after the other, little-endian. Out: (N,) uint64, bit for bit what `xxhash.xxh64_intdigest` gives for those bytes.
Values alone decide it, so it is the same on every machine. ValueError for columns of other types than uint32 and
uint64, or of both.

Source: the specification of XXH64 (xxHash fast digest algorithm, version 0.1.1, section "XXH64 algorithm description").
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["xxh64"]

Words = npt.NDArray[np.uint64]

_P1, _P2, _P3, _P4, _P5 = (
    np.uint64(p)
    for p in (
        0x9E3779B185EBCA87,
        0xC2B2AE3D27D4EB4F,
        0x165667B19E3779F9,
        0x85EBCA77C2B2AE63,
        0x27D4EB2F165667C5,
    )
)
_STRIPE = 4  # lanes of 8 bytes that go through the four accumulators together
_MASK = (1 << 64) - 1


def xxh64(columns: Sequence[npt.NDArray[np.uint32] | npt.NDArray[np.uint64]], seed: int = 0) -> Words:
    """Hash of each record; `columns` are equally long, all uint32 or all uint64. `seed` in [0, 2⁶⁴)."""
    kinds = {c.dtype for c in columns}
    if kinds not in ({np.dtype(np.uint32)}, {np.dtype(np.uint64)}):
        raise ValueError(f"expected columns of uint32 or of uint64, not {sorted(map(str, kinds))}")
    if kinds == {np.dtype(np.uint32)}:
        whole = len(columns) // 2
        lanes = [_joined(columns[2 * i], columns[2 * i + 1]) for i in range(whole)]
        rest = columns[-1].astype(np.uint64) if len(columns) % 2 else None
        size = 4 * len(columns)
    else:
        lanes, rest, size = [np.asarray(c, np.uint64) for c in columns], None, 8 * len(columns)
    stripes = len(lanes) // _STRIPE * _STRIPE
    found = _begin(lanes[:stripes], len(columns[0]), seed)
    found += np.uint64(size)
    for lane in lanes[stripes:]:
        found ^= _round(None, lane)
        found = _rotated(found, 27)
        found *= _P1
        found += _P4
    if rest is not None:
        found ^= rest * _P1
        found = _rotated(found, 23)
        found *= _P2
        found += _P3
    return _avalanche(found)


def _joined(low: npt.NDArray[np.uint32] | Words, high: npt.NDArray[np.uint32] | Words) -> Words:
    joined: Words = high.astype(np.uint64)
    joined <<= np.uint64(32)
    joined |= low
    return joined


def _begin(lanes: Sequence[Words], rows: int, seed: int) -> Words:
    """The state after all whole stripes of four lanes."""
    if not lanes:
        return np.full(rows, np.uint64((seed + int(_P5)) & _MASK))
    starts = (seed + int(_P1) + int(_P2), seed + int(_P2), seed, seed - int(_P1))
    accumulators = [np.full(rows, np.uint64(s & _MASK)) for s in starts]
    for number, lane in enumerate(lanes):
        accumulators[number % _STRIPE] = _round(accumulators[number % _STRIPE], lane)
    found = np.zeros(rows, np.uint64)
    for accumulator, bits in zip(accumulators, (1, 7, 12, 18), strict=True):
        found += _rotated(accumulator, bits)
    for accumulator in accumulators:
        found ^= _round(None, accumulator)
        found *= _P1
        found += _P4
    return found


def _round(accumulator: Words | None, lane: Words) -> Words:
    found: Words = lane * _P2
    if accumulator is not None:
        found += accumulator
    found = _rotated(found, 31)
    found *= _P1
    return found


def _rotated(values: Words, bits: int) -> Words:
    left: Words = values << np.uint64(bits)
    left |= values >> np.uint64(64 - bits)
    return left


def _avalanche(values: Words) -> Words:
    for shift, factor in ((33, _P2), (29, _P3), (32, None)):
        values ^= values >> np.uint64(shift)
        if factor is not None:
            values *= factor
    return values
