"""Image bytes ↔ arrays: (H, W, 3) uint8 RGB, upright, alpha on white. Knows nothing of datasets.

The bytes are foreign. A format is told by its first bytes, never by a name or by what the server says; pixels are
counted in the header before anything is decoded; a picture that is cut short is an error, never a half grey picture.
ICC profiles are ignored, as img2dataset does; of an animation the first frame is taken.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageFile

from mmdata.media import exif

__all__ = [
    "MAX_PIXELS",
    "DecodeError",
    "ImageInfo",
    "decode",
    "encode",
    "exif_json",
    "probe",
    "resize",
    "sniff",
    "transform",
]

Picture = npt.NDArray[np.uint8]  # (H, W, 3) RGB

MAX_PIXELS = 2**28 // 3  # 256 MiB decoded; the number at which Pillow starts to warn
_HARD_LIMIT = 2 * MAX_PIXELS  # Pillow refuses more, whatever max_pixels says
# We count pixels ourselves, per call, and a broken tag is no news: Pillow would print a line for every such picture.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\..*ImagePlugin")

_PILLOW_FORMATS = {
    "jpeg": ("JPEG", "MPO"),
    "png": ("PNG",),
    "webp": ("WEBP",),
    "gif": ("GIF",),
    "bmp": ("BMP",),
    "tiff": ("TIFF",),
    "avif": ("AVIF",),
    "jpeg2000": ("JPEG2000",),
}
# libjpeg's warnings that leave every pixel decoded; any other warning means that pixels were invented.
_HARMLESS = ("before marker 0xd9", "Invalid SOS parameters", "Unknown Adobe color transform")


class DecodeError(Exception):
    """Bytes that give no picture. `kind` is `not_media`, `decode` or `too_many_pixels`; str() is a short detail."""

    def __init__(self, kind: Literal["not_media", "decode", "too_many_pixels"], detail: str) -> None:
        super().__init__(kind, detail)
        self.kind = kind
        self.detail = detail

    def __str__(self) -> str:
        """The detail alone."""
        return self.detail


@dataclass(frozen=True)
class ImageInfo:
    """What a header says: `format` as in `sniff`; `width` and `height` in px, upright.

    `orientation` is the EXIF one (1 to 8), 1 where there is none. `is_plain`: a jpeg, png or webp of which any reader
    sees what `decode` gives (RGB or grey, upright, opaque, one frame).
    """

    format: str
    width: int
    height: int
    orientation: int
    is_plain: bool = True


def sniff(data: bytes) -> str | None:
    """The format the first bytes announce (jpeg, png, webp, gif, bmp, tiff, avif, jpeg2000); None for all else."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if data[4:8] == b"ftyp" and any(brand in data[8:40] for brand in (b"avif", b"avis")):
        return "avif"
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "tiff"
    if data.startswith((b"\0\0\0\x0cjP  \r\n", b"\xff\x4f\xff\x51")):
        return "jpeg2000"
    if data.startswith(b"BM") and len(data) > 26:
        return "bmp"
    return None


def _describe(data: bytes) -> str:
    head = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not data:
        return "empty"
    if b"<svg" in head:
        return "svg"
    if head.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "html"
    if head.startswith((b"<", b"{", b"[")):
        return "text, no image"
    if data[4:8] == b"ftyp":
        return f"{data[8:12].decode('ascii', 'replace')} is not decoded"
    return f"no known image format, starts with {data[:8].hex()}"


def probe(data: bytes) -> ImageInfo:
    """Format and upright size from the header alone; DecodeError (`not_media`, `decode`) when there is none."""
    header, kind = _open(data, None)
    with header:
        return _info(header, kind)


def _open(data: bytes, max_pixels: int | None) -> tuple[Image.Image, str]:
    """Pillow's lazy image of `data` and its format, its pixels counted against `max_pixels`."""
    kind = sniff(data)
    if kind is None:
        raise DecodeError("not_media", _describe(data))
    # Another library may have switched this on for the process; it fills what is missing with grey.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        header = Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS[kind])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DecodeError("too_many_pixels", f"more than {_HARD_LIMIT} px") from None
    except Exception as error:  # noqa: BLE001  decoders raise anything
        raise DecodeError("decode", _short(f"{kind} header: {error}")) from None
    width, height = header.size
    if max_pixels is not None and width * height > max_pixels:
        header.close()
        raise DecodeError("too_many_pixels", f"{width}x{height} px, allowed {max_pixels}")
    return header, kind


def _info(header: Image.Image, kind: str) -> ImageInfo:
    orientation = exif.orientation(header)
    width, height = header.size
    # Pillow announces (and loads) TIFF upright already.
    if orientation >= 5 and kind != "tiff":
        width, height = height, width
    opaque = header.mode in ("RGB", "L") and "transparency" not in header.info
    # A JPEG's further pictures (MPO) are seen by nobody; other formats are not asked, it may mean reading them whole.
    one_frame = kind == "jpeg" or (kind in ("png", "webp") and not getattr(header, "is_animated", False))
    return ImageInfo(kind, width, height, orientation, opaque and orientation == 1 and one_frame)


def _short(text: str) -> str:
    return " ".join(text.split())[:160]


def decode(data: bytes, min_side: int | None = None, max_pixels: int | None = None) -> Picture:
    """(H, W, 3) uint8 RGB in [0, 255], upright, alpha on white, grey and CMYK as RGB, of 16 bits the high byte.

    `min_side`: JPEG may be decoded at a reduced DCT scale (n/8) whose short side is no less; without it, and for any
    other format, in full. `max_pixels` is counted in the header; None means MAX_PIXELS.
    Raises DecodeError: `not_media` (no image format), `too_many_pixels`, `decode` (cut short, corrupt, or a pixel
    type that has no agreed range, such as 32-bit samples).
    """
    limit = MAX_PIXELS if max_pixels is None else max_pixels
    header, kind = _open(data, limit)
    with header:
        orientation = exif.orientation(header)
        try:
            if kind == "jpeg":
                picture = _decode_jpeg(data, header, min_side, limit)
            else:
                picture = _decode_pillow(header, limit)
        except DecodeError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise DecodeError("too_many_pixels", _short(str(error))) from None
        except Exception as error:  # noqa: BLE001  decoders raise anything
            raise DecodeError("decode", _short(f"{kind}: {error}")) from None
    if kind != "tiff":
        picture = _upright(picture, orientation)
    return np.ascontiguousarray(picture)


def _decode_jpeg(data: bytes, header: Image.Image, min_side: int | None, limit: int) -> Picture:
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    if width * height > limit:  # the two parsers may be made to disagree
        raise DecodeError("too_many_pixels", f"{width}x{height} px, allowed {limit}")
    if colours in ("CMYK", "YCCK"):
        _strict_jpeg(data, "CMYK", None)
        return _decode_pillow(header, limit)
    return _strict_jpeg(data, "RGB", min_side)


def _strict_jpeg(data: bytes, colours: str, min_side: int | None) -> Picture:
    side = min_side or 0
    # A DCT scale must only ever shrink: a side larger than the picture asks for the whole picture.
    scale = {"min_height": side, "min_width": side} if side > 0 else {}
    try:
        picture: Picture = simplejpeg.decode_jpeg(data, colours, strict=True, **scale)
    except ValueError as error:
        if not any(words in str(error) for words in _HARMLESS):
            raise
        picture = simplejpeg.decode_jpeg(data, colours, strict=False, **scale)
    return picture


def _decode_pillow(header: Image.Image, limit: int) -> Picture:
    header.load()
    width, height = header.size
    if width * height > limit:
        raise DecodeError("too_many_pixels", f"{width}x{height} px, allowed {limit}")
    mode = header.mode
    if mode.startswith("I;16"):
        return _sixteen_bit_grey(header)
    if mode in ("I", "F"):
        raise DecodeError("decode", f"samples of mode {mode} have no agreed range")
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in header.info:
        with_alpha = header.convert("RGBA")
        white = Image.new("RGB", header.size, (255, 255, 255))
        white.paste(with_alpha, mask=with_alpha.getchannel("A"))
        return np.asarray(white)
    return np.asarray(header if mode == "RGB" else header.convert("RGB"))


def _sixteen_bit_grey(header: Image.Image) -> Picture:
    values = np.asarray(header).astype(np.uint16, copy=False)
    grey = (values >> 8).astype(np.uint8)
    transparent = header.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return np.repeat(grey[:, :, None], 3, axis=2)


def _upright(picture: Picture, orientation: int) -> Picture:
    """Undo the EXIF orientation (Exif 2.32, tag 0x0112): 2 to 4 mirror or turn, 5 to 8 also swap the axes."""
    turns: dict[int, Callable[[Picture], Picture]] = {
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.swapaxes(0, 1),
        6: lambda p: p.swapaxes(0, 1)[:, ::-1],
        7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
        8: lambda p: p.swapaxes(0, 1)[::-1],
    }
    return turns[orientation](picture) if orientation in turns else picture


_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "area": Image.Resampling.BOX,
}


def transform(
    picture: Picture,
    size: int,
    fit: Literal["center_crop", "pad", "stretch"] = "center_crop",
    resample: Literal["bicubic", "bilinear", "area"] = "bicubic",
) -> Picture:
    """(H, W, 3) uint8 → (size, size, 3) uint8 by Pillow's filters, with antialiasing.

    `center_crop` scales the short side to `size` (the long one is cut to whole px) and takes the middle: bit-equal to
    torchvision's `Resize(size)` + `CenterCrop(size)` on Pillow images (strips that would grow above MAX_PIXELS are cut
    before they are scaled). `pad` centres the picture on a white square,
    then scales (a square above MAX_PIXELS is never made: such a strip is scaled first). `stretch` ignores the ratio.
    """
    height, width = picture.shape[:2]
    image = Image.fromarray(picture)
    filter_ = _FILTERS[resample]
    if fit == "stretch":
        return np.array(image.resize((size, size), filter_))
    if fit == "pad":
        side = max(height, width)
        if side * side <= MAX_PIXELS:
            return np.array(_on_white_square(image, side).resize((size, size), filter_))
        thin = (max(1, round(width * size / side)), max(1, round(height * size / side)))
        return np.array(_on_white_square(image.resize(thin, filter_), size))
    short = min(height, width)
    new_width, new_height = int(size * width / short), int(size * height / short)
    if new_width * new_height > MAX_PIXELS:  # a strip: scaled whole it would take gigabytes
        middle = ((width - 2 * short) // 2, 0) if width > height else (0, (height - 2 * short) // 2)
        y, x = middle[1], middle[0]
        return transform(picture[y : y + 2 * short, x : x + 2 * short], size, fit, resample)
    if (new_width, new_height) != (width, height):
        image = image.resize((new_width, new_height), filter_)
    left, top = round((new_width - size) / 2.0), round((new_height - size) / 2.0)
    return np.array(image.crop((left, top, left + size, top + size)))


def _on_white_square(image: Image.Image, side: int) -> Image.Image:
    square = Image.new("RGB", (side, side), (255, 255, 255))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


ResizeMode = Literal["no", "border", "keep_ratio", "keep_ratio_largest", "center_crop"]


def resize(
    picture: Picture,
    size: int,
    mode: ResizeMode = "keep_ratio",
    only_if_bigger: bool = False,
    upscale_interpolation: str = "lanczos",
    downscale_interpolation: str = "area",
) -> Picture:
    """img2dataset's resize modes, by OpenCV; (H, W, 3) uint8 in and out, the same array when there is nothing to do.

    `keep_ratio` brings the short side to `size`; `center_crop` does the same and cuts the middle square;
    `keep_ratio_largest` brings the long side to `size`; `border` does the same and pads to a white square; `no` leaves
    the picture. The other side is rounded half to even. With `only_if_bigger`, a picture whose deciding side does
    not exceed `size` is left as it is, not cropped or padded either.
    Source: img2dataset resizer.py and albumentations' SmallestMaxSize, LongestMaxSize, CenterCrop, PadIfNeeded; unlike
    these a strip never gets a side of 0 px, and one that would be scaled above MAX_PIXELS raises DecodeError.
    """
    height, width = picture.shape[:2]
    if mode == "no":
        return picture
    by_short = mode in ("keep_ratio", "center_crop")
    side = min(height, width) if by_short else max(height, width)
    if only_if_bigger and side <= size:
        return picture
    interpolation = downscale_interpolation if side > size else upscale_interpolation
    if side != size:
        scale = size / side
        shape = (max(1, round(width * scale)), max(1, round(height * scale)))
        if shape[0] * shape[1] > MAX_PIXELS:
            raise DecodeError("too_many_pixels", f"{width}x{height} px would be scaled to {shape[0]}x{shape[1]}")
        picture = _cv2_resize(picture, shape, interpolation)
        height, width = picture.shape[:2]
    if mode == "center_crop":
        top, left = (height - size) // 2, (width - size) // 2
        picture = picture[top : top + size, left : left + size]
    elif mode == "border":
        square = np.full((size, size, 3), 255, np.uint8)
        top, left = (size - height) // 2, (size - width) // 2
        square[top : top + height, left : left + width] = picture
        picture = square
    return np.ascontiguousarray(picture)


def _cv2_resize(picture: Picture, shape: tuple[int, int], interpolation: str) -> Picture:
    import cv2

    names = {
        "nearest": cv2.INTER_NEAREST,
        "linear": cv2.INTER_LINEAR,
        "bilinear": cv2.INTER_LINEAR,
        "cubic": cv2.INTER_CUBIC,
        "bicubic": cv2.INTER_CUBIC,
        "area": cv2.INTER_AREA,
        "lanczos": cv2.INTER_LANCZOS4,
        "lanczos4": cv2.INTER_LANCZOS4,
    }
    return np.asarray(cv2.resize(picture, shape, interpolation=names[interpolation]), np.uint8)


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
    return bytes(cv2.imencode(".jpg", swapped, [cv2.IMWRITE_JPEG_QUALITY, quality])[1])


def exif_json(data: bytes) -> str | None:
    """EXIF tags by name as a JSON object with sorted keys (see `exif.tags`); None where there are none."""
    try:
        header, _ = _open(data, None)
        with header:
            found = exif.tags(header)
    except Exception:  # noqa: BLE001  broken EXIF costs the metadata, not the picture
        return None
    return json.dumps(found, sort_keys=True, ensure_ascii=False, allow_nan=False) if found else None
