"""EXIF tags of an opened picture, as plain values. The bytes are foreign: broken EXIF never costs the picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from PIL import ExifTags, Image

__all__ = ["orientation", "read", "tags"]

_MAX_CHUNKS = 1 << 16
_MAX_VALUE = 1024  # longer texts and number lists are maker notes and thumbnails, not metadata


def read(header: Image.Image, data: bytes) -> Image.Exif:
    """EXIF of an opened picture, `data` being its bytes; no pixel is decoded.

    Pillow's own way for PNG decodes the whole picture to look for EXIF behind it, before anybody has counted its px.
    """
    if header.format == "PNG" and "exif" not in header.info and (late := _png_exif(data)):
        header.info["exif"] = b"Exif\0\0" + late
    return Image.Image.getexif(header)


def _png_exif(data: bytes) -> bytes | None:
    """The chunk eXIf of a PNG, wherever it stands; None where there is none."""
    at = 8
    for _ in range(_MAX_CHUNKS):
        length = int.from_bytes(data[at : at + 4], "big")
        if at + 12 + length > len(data):
            return None
        if data[at + 4 : at + 8] == b"eXIf":
            return data[at + 8 : at + 8 + length]
        at += 12 + length
    return None


def orientation(header: Image.Image, data: bytes) -> int:
    """EXIF orientation, 1 to 8; 1 where there is none or it does not parse."""
    try:
        value = read(header, data).get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001  broken EXIF costs the orientation, not the picture
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def tags(exif: Image.Exif) -> dict[str, Any]:
    """Tags by name: text, numbers and lists of these; empty where there are none.

    Tags of the Exif and interoperability parts stand beside the main ones, GPS tags too (their names start with GPS).
    Rationals are numbers (0/0 is None); binary blobs, maker notes and values above 1,024 characters are left out.
    Raises what Pillow raises on EXIF that does not parse.
    """
    found = _named(exif, ExifTags.TAGS)
    for part in (ExifTags.IFD.Exif, ExifTags.IFD.Interop):
        found |= _named(exif.get_ifd(part), ExifTags.TAGS)
    return found | _named(exif.get_ifd(ExifTags.IFD.GPSInfo), ExifTags.GPSTAGS)


def _named(tags: Mapping[int, Any], names: Mapping[int, str]) -> dict[str, Any]:
    pointers = {int(part) for part in ExifTags.IFD}
    found = {}
    for tag, value in tags.items():
        plain = _plain(value)
        if tag not in pointers and plain is not None and len(str(plain)) <= _MAX_VALUE:
            found[names.get(tag, f"0x{tag:04x}")] = plain
    return found


def _plain(value: Any) -> Any:
    """An EXIF value as JSON: text, number, list; None for what is not printable or not finite."""
    if isinstance(value, bytes):
        text = value.rstrip(b"\0").decode("ascii", "replace")
        return text if text and text.isprintable() and "\ufffd" not in text else None
    if isinstance(value, str):
        return value.rstrip("\0").encode("utf-8", "replace").decode()
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, int):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError, ArithmeticError):
        return None
    return number if math.isfinite(number) else None
