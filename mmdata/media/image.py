"""Image bytes ↔ arrays: (H, W, 3) uint8 RGB, upright, alpha on white, in sRGB. Knows nothing of datasets.

The door to the parts that read headers, decode, convert colours and resize. The bytes are foreign: see decoding.py for
what is promised of them. Of an animation the first frame is taken. Fails: DecodeError.
"""

from __future__ import annotations

import io
import json
from typing import Literal

import numpy as np
from PIL import Image

from mmdata.media import exif
from mmdata.media.decoding import Decoded, ImageInfo, Opened
from mmdata.media.formats import extension, sniff
from mmdata.media.picture import MAX_PIXELS, DecodeError, Picture
from mmdata.media.resizing import ResizeMode, resize, transform

__all__ = [
    "MAX_PIXELS",
    "DecodeError",
    "Decoded",
    "ImageInfo",
    "Opened",
    "Picture",
    "ResizeMode",
    "decode",
    "encode",
    "exif_json",
    "extension",
    "probe",
    "resize",
    "sniff",
    "transform",
]


def probe(data: bytes) -> ImageInfo:
    """Format and upright size from the header alone; DecodeError (`not_media`, `decode`) when there is none."""
    return Opened(data).info


def decode(data: bytes, min_side: int | None = None, max_pixels: int | None = None) -> Picture:
    """(H, W, 3) uint8 sRGB in [0, 255], upright, alpha on white, grey and CMYK as RGB, of 16 bits the high byte.

    `min_side`: JPEG may be decoded at a reduced DCT scale (n/8) whose short side is no less; without it, and for any
    other format, in full. `max_pixels` is counted in the header; None means MAX_PIXELS.
    Raises DecodeError: `not_media` (no image format), `too_many_pixels`, `decode` (cut short, corrupt, a pixel type
    that has no agreed range, such as 32-bit samples, or a format whose extra is not installed).
    """
    picture, to_srgb = Opened(data).decode(min_side, max_pixels)
    return picture if to_srgb is None else to_srgb.apply(picture)


def encode(picture: Picture, format: Literal["jpg", "png", "webp"], quality: int) -> bytes:
    """(H, W, 3) uint8 → bytes without metadata. `quality`: 0 to 100 for jpg and webp; png: zlib level 0 to 9.

    jpg has 4:2:0 chroma and the accurate DCT: the very bytes that img2dataset writes for a picture in colour.
    """
    if format == "jpg":
        return _encode_jpeg(picture, quality)
    sink = io.BytesIO()
    options = {"compress_level" if format == "png" else "quality": quality}
    Image.fromarray(picture).save(sink, format=format, **options)
    return sink.getvalue()


def _encode_jpeg(picture: Picture, quality: int) -> bytes:
    import cv2

    if max(picture.shape) > 65_500:
        raise DecodeError("decode", f"{picture.shape[1]}x{picture.shape[0]} px, a JPEG has at most 65500 a side")
    swapped = cv2.cvtColor(np.ascontiguousarray(picture), cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", swapped, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def exif_json(data: bytes | Opened) -> str | None:
    """EXIF tags by name as a JSON object with sorted keys (see `exif.tags`); None where there are none."""
    try:
        block = (data if isinstance(data, Opened) else Opened(data)).exif()
        found = exif.tags(block) if block is not None else {}
    except Exception:  # noqa: BLE001  broken EXIF costs the metadata, not the picture
        return None
    return json.dumps(found, sort_keys=True, ensure_ascii=False, allow_nan=False) if found else None
