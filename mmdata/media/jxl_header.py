"""The size that a JPEG XL stream announces, read before a decoder sees it: Pillow's plugin decodes as it opens.

In: foreign bytes that start as JPEG XL does, bare or in boxes. Out: width and height in px as stored. Fails:
DecodeError (`decode`) when they are cut short or hold no stream. Source: ISO/IEC 18181-1 (SizeHeader), 18181-2 (boxes).
"""

from __future__ import annotations

from mmdata.media.picture import DecodeError

__all__ = ["size"]

_BITS = (9, 13, 18, 30)
_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
_MAX_BOXES = 1024


def size(data: bytes) -> tuple[int, int]:
    """Width and height in px."""
    stream = _stream(data)
    if not stream.startswith(b"\xff\x0a") or len(stream) < 12:
        raise DecodeError("decode", "jpegxl header: cut short")
    bits, at = int.from_bytes(stream[2:12], "little"), 0

    def read(count: int) -> int:
        nonlocal at
        at += count
        return bits >> (at - count) & ((1 << count) - 1)

    def side(by_eight: int) -> int:
        return 8 * (1 + read(5)) if by_eight else 1 + read(_BITS[read(2)])

    small = read(1)
    height = side(small)
    ratio = read(3)
    if ratio:
        by, to = _RATIOS[ratio - 1]
        return height * by // to, height
    return side(small), height


def _stream(data: bytes) -> bytes:
    """The first bytes of the codestream."""
    if data.startswith(b"\xff\x0a"):
        return data[:64]
    at = 0
    for _ in range(_MAX_BOXES):
        length, name, body = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8], at + 8
        if length == 1:
            length, body = int.from_bytes(data[at + 8 : at + 16], "big"), at + 16
        if name in (b"jxlc", b"jxlp"):
            start = body + (4 if name == b"jxlp" else 0)
            return data[start : start + 64]
        if length < 8 or at + length >= len(data):
            break
        at += length
    raise DecodeError("decode", "jpegxl header: no stream in it")
