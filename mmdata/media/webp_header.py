"""What the chunks of a WebP file say; nothing is decoded, no canvas is made.

In: foreign bytes that start as a WebP does. Out: `WebpHeader`. Fails: DecodeError (`decode`) without a picture's chunk.
Source: RFC 9649.
"""

from __future__ import annotations

from dataclasses import dataclass

from mmdata.media.picture import DecodeError

__all__ = ["WebpHeader", "read"]

_MAX_CHUNKS = 4096


@dataclass(frozen=True)
class WebpHeader:
    """Size of the canvas in px, as stored; `exif` is the TIFF block, `icc` the profile, `xmp` its text."""

    width: int
    height: int
    has_alpha: bool
    is_animated: bool
    exif: bytes | None
    icc: bytes | None
    xmp: bytes | None


def read(data: bytes) -> WebpHeader:
    """See the module; chunks that are cut off at the end are missing, which the decoder finds out."""
    size: tuple[int, int] | None = None
    alpha = animated = False
    kept: dict[bytes, bytes] = {}
    at = 12
    for _ in range(_MAX_CHUNKS):
        name, length = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        body = memoryview(data)[at + 8 : at + 8 + length]
        if name == b"VP8X" and len(body) >= 10 and size is None:
            alpha, animated = bool(body[0] & 0x10), bool(body[0] & 0x02)
            size = 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
        elif name in (b"VP8 ", b"VP8L") and size is None:
            size, alpha = _bitstream(name, bytes(body[:10]))
        elif name in (b"ICCP", b"EXIF", b"XMP ") and len(body) == length:
            kept.setdefault(bytes(name), bytes(body))
        at += 8 + length + (length & 1)
        if at >= len(data):
            break
    if size is None:
        raise DecodeError("decode", "webp header: no picture in it")
    exif = kept.get(b"EXIF")
    if exif is not None:
        exif = exif.removeprefix(b"Exif\0\0")
    return WebpHeader(*size, alpha, animated, exif, kept.get(b"ICCP"), kept.get(b"XMP "))


def _bitstream(name: bytes, body: bytes) -> tuple[tuple[int, int], bool]:
    if name == b"VP8 " and body[3:6] == b"\x9d\x01\x2a" and len(body) == 10:
        return (int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF), False
    if name == b"VP8L" and body[:1] == b"\x2f" and len(body) >= 5:
        bits = int.from_bytes(body[1:5], "little")
        return (1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)), bool(bits >> 28 & 1)
    raise DecodeError("decode", "webp header: cut short")
