"""What a JPEG says before its first scan, read in one walk over its segments; nothing is decoded.

In: foreign bytes. Out: `JpegHeader`. Fails: DecodeError (`decode`) when there is no frame or no scan, when there are
two frames (so that none can hide another's size), or more segments than any camera writes. Cost: some 10 µs.
Source: ITU-T T.81 annex B; Exif 2.32 section 4.5; ICC.1:2022 annex B.4 (profiles in several segments).
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from mmdata.media.picture import DecodeError

__all__ = ["JpegHeader", "read", "tiff_orientation", "xmp_orientation"]

_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # the others of the row are tables
_PROGRESSIVE = frozenset((0xC2, 0xC6, 0xCA, 0xCE))
_ALONE = frozenset((0x01, *range(0xD0, 0xD9)))  # markers without a length
_MAX_SEGMENTS = 4096
_MAX_ICC = 4 << 20
# What lies between segments, and fill bytes, are passed over; possessive, so that no bytes are looked at twice.
_MARKER = re.compile(rb"[^\xff]*+(?:\xff++\x00[^\xff]*+)*+\xff++([^\xff\x00])", re.DOTALL)
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')


@dataclass(frozen=True)
class JpegHeader:
    """Size in px as stored. `orientation` is EXIF's, 1 to 8 (XMP's where EXIF has none), 1 where there is none.

    `samples` is what a px has of all components, 1.5 with 4:2:0. `is_buffered`: the decoder holds all coefficients of
    the picture (progressive, or several scans), 2 bytes a sample. `exif` is the TIFF block, `icc` the whole profile.
    """

    width: int
    height: int
    components: int
    samples: float
    is_buffered: bool
    orientation: int
    exif: bytes | None
    icc: bytes | None


def read(data: bytes) -> JpegHeader:
    """See the module."""
    frame: tuple[int, bytes] | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    profile: list[bytes] = []
    at = 2
    for _ in range(_MAX_SEGMENTS):
        marker, start, end = _segment(data, at)
        body = data[start:end]
        if marker == 0xDA:
            if frame is None:
                raise DecodeError("decode", "jpeg header: a scan without a frame")
            turned = tiff_orientation(exif) if exif is not None else None
            turned = turned or (xmp_orientation(xmp) if xmp is not None else None)
            return _header(frame, body, turned or 1, exif, _profile(profile))
        if marker in _FRAMES:
            if frame is not None:
                raise DecodeError("decode", "jpeg header: two frames")
            frame = marker, body
        elif marker == 0xE1 and exif is None and body.startswith(b"Exif\0\0"):
            exif = body[6:]
        elif marker == 0xE1 and xmp is None and body.startswith(_XMP):
            xmp = body
        elif marker == 0xE2 and body.startswith(b"ICC_PROFILE\0"):
            profile.append(body)
        at = end
    raise DecodeError("decode", f"jpeg header: more than {_MAX_SEGMENTS} segments")


def _segment(data: bytes, at: int) -> tuple[int, int, int]:
    """The next marker from `at` on and [start, end) of its body, which is empty where the marker has none."""
    found = _MARKER.match(data, at)
    if found is None:
        raise DecodeError("decode", "jpeg header: cut short")
    marker, start = found[1][0], found.end()
    if marker == 0xD9:
        raise DecodeError("decode", "jpeg header: ends before its first scan")
    if marker in _ALONE:
        return marker, start, start
    end = start + int.from_bytes(data[start : start + 2], "big")
    if end < start + 2 or end > len(data):
        raise DecodeError("decode", "jpeg header: cut short")
    return marker, start + 2, end


def _header(frame: tuple[int, bytes], scan: bytes, turned: int, exif: bytes | None, icc: bytes | None) -> JpegHeader:
    marker, body = frame
    if len(body) < 6 or len(body) < 6 + 3 * body[5] or not scan:
        raise DecodeError("decode", "jpeg header: cut short")
    height, width = struct.unpack(">HH", body[1:5])
    factors = [(body[7 + 3 * i] >> 4, body[7 + 3 * i] & 15) for i in range(body[5])]
    if not factors or not width or not height or any(not 1 <= f <= 4 for pair in factors for f in pair):
        raise DecodeError("decode", f"jpeg header: a frame of {width}x{height} px, {len(factors)} components")
    whole = max(h for h, _ in factors) * max(v for _, v in factors)
    samples = sum(h * v for h, v in factors) / whole
    buffered = marker in _PROGRESSIVE or scan[0] < len(factors)
    return JpegHeader(width, height, len(factors), samples, buffered, turned, exif, icc)


def _profile(parts: list[bytes]) -> bytes | None:
    """The profile of `parts`, each after its name with its number and their count; None where one is missing."""
    if not parts or any(len(part) < 14 for part in parts) or sum(map(len, parts)) > _MAX_ICC:
        return None
    by_number = {part[12]: part[14:] for part in parts}
    if len(by_number) != len(parts) or sorted(by_number) != list(range(1, len(parts) + 1)):
        return None
    return b"".join(by_number[number] for number in sorted(by_number))


def tiff_orientation(tiff: bytes) -> int | None:
    """The orientation in the first directory of a TIFF block, 1 to 8; None where there is none, or it is broken."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 10:
        return None
    (start,) = struct.unpack_from(order + "I", tiff, 4)
    if start + 2 > len(tiff):
        return None
    (count,) = struct.unpack_from(order + "H", tiff, start)
    for at in range(start + 2, min(start + 2 + 12 * count, len(tiff) - 11), 12):
        tag, kind, number = struct.unpack_from(order + "HHI", tiff, at)
        if tag == 0x0112:
            value = 0
            if kind in (3, 4) and number == 1:
                (value,) = struct.unpack_from(order + ("H" if kind == 3 else "I"), tiff, at + 8)
            return value if 1 <= value <= 8 else 1
    return None


def xmp_orientation(xmp: bytes) -> int | None:
    """The orientation that XMP states in TIFF's namespace, 1 to 8; None where it states none."""
    found = _XMP_ORIENTATION.search(xmp)
    value = int(found[1]) if found else 0
    return value if 1 <= value <= 8 else None
