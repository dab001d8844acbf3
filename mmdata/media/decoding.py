"""Foreign bytes → a picture: the header first, then the pixels, at a smaller scale where that is asked for.

In: bytes. Out: `Opened`, what the header says, which gives (H, W, 3) uint8 RGB, upright, alpha on white, in sRGB.
Fails: DecodeError. A format is told by its first bytes, never by a name or by what the server says; pixels are counted
in the header before anything is decoded; a picture that is cut short is an error, never a half grey picture.
JPEG is read by simplejpeg, still WebP by OpenCV (a third of Pillow's memory, the same library), all else by Pillow,
with the plugins of the extras `heic` and `jxl`.
"""

from __future__ import annotations

import importlib.util
import io
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageFile, UnidentifiedImageError

from mmdata.media import colour, exif, jpeg_header, jxl_header, memory, webp_header
from mmdata.media.formats import EXTRAS, describe, sniff
from mmdata.media.picture import MAX_PIXELS, DecodeError, Picture, short_text
from mmdata.media.resizing import boxed

__all__ = ["Decoded", "ImageInfo", "Opened"]

_HARD_LIMIT = 2 * MAX_PIXELS  # Pillow refuses more, whatever max_pixels says
# We count pixels ourselves, per call, and a broken tag is no news: Pillow would print a line for every such picture.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\..*ImagePlugin")

_PILLOW_FORMATS = {
    "png": ("PNG",),
    "webp": ("WEBP",),
    "gif": ("GIF",),
    "bmp": ("BMP",),
    "tiff": ("TIFF",),
    "avif": ("AVIF",),
    "jpeg2000": ("JPEG2000",),
    "heic": ("HEIF",),
    "jpegxl": ("JXL",),
}
# libjpeg's warnings that leave every pixel decoded; any other warning means that pixels were invented.
_HARMLESS = ("before marker 0xd9", "Invalid SOS parameters", "Unknown Adobe color transform")
_MOST_AT_ONCE = 1 << 26  # px; of a format whose plugin decodes as it opens
_BAND_PX = 1 << 20
_MOST_FACTOR = 32  # the rows of a band are a multiple of it
_plugins = threading.Lock()


@dataclass(frozen=True)
class ImageInfo:
    """What a header says: `format` as in `sniff`; `width` and `height` in px, upright.

    `orientation` is the EXIF one (1 to 8), 1 where there is none. `is_plain`: a jpeg, png or webp of which any reader
    sees what `decode` gives (RGB or grey, sRGB, upright, opaque, one frame).
    """

    format: str
    width: int
    height: int
    orientation: int
    is_plain: bool = True


class Decoded(NamedTuple):
    """`picture` (H, W, 3) uint8 RGB, and what still brings its colours to sRGB; None = they are."""

    picture: Picture
    to_srgb: colour.Transform | None


class Opened:
    """A picture whose header has been read. `info` describes it; DecodeError when there is no picture.

    Formats of extras whose package is missing are `decode` errors that name the extra.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        kind = sniff(data)
        if kind is None:
            raise DecodeError("not_media", describe(data))
        self._jpeg = jpeg_header.read(data) if kind == "jpeg" else None
        self._webp = webp_header.read(data) if kind == "webp" else None
        self._kind = kind
        self.info = self._info()

    @cached_property
    def _lazy(self) -> Image.Image:
        """Pillow's image, not loaded."""
        _use_plugin(self._kind)
        if self._kind == "jpegxl":
            width, height = jxl_header.size(self.data)
            if width * height > (most := memory.pixels_allowed("jpegxl", _MOST_AT_ONCE)):
                raise DecodeError("too_many_pixels", f"{width}x{height} px, allowed {most} (jpegxl takes more memory)")
        # Another library may have switched this on for the process; it fills what is missing with grey.
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        try:
            return Image.open(io.BytesIO(self.data), formats=_PILLOW_FORMATS[self._kind])
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise DecodeError("too_many_pixels", f"more than {_HARD_LIMIT} px") from None
        except UnidentifiedImageError:  # its words name a place in memory, another in every run
            raise DecodeError("decode", f"{self._kind} header: cannot be read") from None
        except Exception as error:  # noqa: BLE001  decoders raise anything
            raise DecodeError("decode", short_text(f"{self._kind} header: {error}")) from None

    def _info(self) -> ImageInfo:
        if self._jpeg is not None:
            width, height, turned = self._jpeg.width, self._jpeg.height, self._jpeg.orientation
            plain = self._jpeg.components in (1, 3)
        elif self._webp is not None:
            width, height = self._webp.width, self._webp.height
            tiff, xmp = self._webp.exif, self._webp.xmp
            by_exif = jpeg_header.tiff_orientation(tiff) if tiff else None
            turned = by_exif or (jpeg_header.xmp_orientation(xmp) if xmp else None) or 1
            plain = not self._webp.has_alpha and not self._webp.is_animated
        else:
            (width, height), turned = self._lazy.size, exif.orientation(self._lazy, self.data)
            if self._kind == "jpegxl" and not getattr(self._lazy, "jpeg", False):
                turned = 1  # its own orientation has been applied, EXIF's does not count
            # Other formats are not asked for their frames: it may mean reading them whole.
            plain = self._kind == "png" and not getattr(self._lazy, "is_animated", False)
            plain = plain and self._lazy.mode in ("RGB", "L") and "transparency" not in self._lazy.info
        # Pillow announces (and loads) TIFF upright already.
        if turned >= 5 and self._kind != "tiff":
            width, height = height, width
        plain = plain and turned == 1 and self._transform is None
        return ImageInfo(self._kind, width, height, turned, plain)

    @cached_property
    def _transform(self) -> colour.Transform | None:
        """From the profile's colours to sRGB; None for CMYK, which is converted as it is decoded."""
        if self._jpeg is not None:
            space = {1: "GRAY", 3: "RGB"}.get(self._jpeg.components)
            return colour.transform_of(self._jpeg.icc, space) if space else None  # type: ignore[arg-type]
        if self._webp is not None:
            return colour.transform_of(self._webp.icc, "RGB")
        profile = self._lazy.info.get("icc_profile")
        grey = self._lazy.mode in ("1", "L", "LA", "La") or self._lazy.mode.startswith("I;16")
        if not isinstance(profile, bytes) or self._lazy.mode == "CMYK":
            return None
        return colour.transform_of(profile, "GRAY" if grey else "RGB")

    def exif(self) -> Image.Exif | None:
        """EXIF, parsed as it is asked; None where there is none. Raises what Pillow raises when it is broken."""
        if self._jpeg is None and self._webp is None:
            return exif.read(self._lazy, self.data)
        block = self._jpeg.exif if self._jpeg is not None else self._webp.exif if self._webp is not None else None
        if not block:
            return None
        found = Image.Exif()
        found.load(b"Exif\0\0" + block)
        return found

    def is_animated(self) -> bool:
        """Whether there is more than one frame (pages of a TIFF and further pictures of a JPEG are none)."""
        if self._jpeg is not None or self._kind == "tiff":
            return False
        if self._webp is not None:
            return self._webp.is_animated
        return bool(getattr(self._lazy, "is_animated", False))

    def bytes_needed(self, least: int | None, quick: bool) -> int:
        """Bytes that `decode` holds at its height, about."""
        pixels = self.info.width * self.info.height
        if self._jpeg is None:
            animated = self._webp is not None and self._webp.is_animated
            cost = memory.BYTES_PER_PX["webp animated" if animated else self._kind]
            return int(pixels * (cost + (0 if quick and least else 3)))
        scale = _quick_factor(self.info, least) if quick and least else 1
        buffered = 2 * self._jpeg.samples if self._jpeg.is_buffered else 0
        turned = 3 if self.info.orientation != 1 else 0  # turning makes a copy
        return int(pixels * (buffered + (max(3, self._jpeg.components) + turned) / scale**2))

    def decode(self, least: int | None = None, max_pixels: int | None = None, quick: bool = False) -> Decoded:
        """The pixels. `least`: px that the short side needs not exceed, None = in full.

        JPEG is then decoded at the smallest DCT scale (n/8) whose short side is no less; with `quick` only at a half, a
        quarter or an eighth (the scales between gain nothing), and other formats are shrunk by a whole number, too, so
        that they are never held whole beside their decoder's own copy. `max_pixels` is counted in the header, None =
        MAX_PIXELS; decoders that hold more than 4.5 bytes a px are allowed fewer. CMYK comes in sRGB already.
        """
        limit = MAX_PIXELS if max_pixels is None else max_pixels
        self._count(limit)
        try:
            picture = self._pixels(least, quick, limit)
        except DecodeError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise DecodeError("too_many_pixels", short_text(str(error))) from None
        except Exception as error:  # noqa: BLE001  decoders raise anything
            raise DecodeError("decode", short_text(f"{self._kind}: {error}")) from None
        if self._kind != "tiff":
            picture = _upright(picture, self.info.orientation)
        return Decoded(np.ascontiguousarray(picture), self._transform)

    def _count(self, limit: int) -> None:
        width, height = self.info.width, self.info.height
        animated = self._webp is not None and self._webp.is_animated
        allowed = memory.pixels_allowed("webp animated" if animated else self._kind, limit)
        if width * height > allowed:
            words = f"allowed {allowed}" + (f" ({self._kind} takes more memory)" if allowed < limit else "")
            raise DecodeError("too_many_pixels", f"{width}x{height} px, {words}")

    def _pixels(self, least: int | None, quick: bool, limit: int) -> Picture:
        if self._jpeg is not None:
            return self._jpeg_pixels(self._jpeg, least, quick, limit)
        short = min(self.info.width, self.info.height)
        factor = min(_MOST_FACTOR, max(1, short // least)) if quick and least else 1
        if self._webp is not None and not self._webp.is_animated:
            return _webp_pixels(self.data, self._webp, factor)
        try:
            self._lazy.load()
        except Exception:
            del self._lazy  # Pillow would give what there is when asked again
            raise
        if self._lazy.width * self._lazy.height > limit:
            width, height = self._lazy.size
            raise DecodeError("too_many_pixels", f"{width}x{height} px, allowed {limit}")
        return _by_bands(self._lazy, factor)

    def _jpeg_pixels(self, header: jpeg_header.JpegHeader, least: int | None, quick: bool, limit: int) -> Picture:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(self.data, strict=False)
        if (width, height) != (header.width, header.height):
            raise DecodeError(
                "decode", f"jpeg: {width}x{height} px, and {header.width}x{header.height} px, in one header"
            )
        if quick and least:
            least = -(-min(width, height) // _quick_factor(self.info, least))
        held = width * height * 2 * header.samples if header.is_buffered else 0
        if held > 4.5 * limit:
            raise DecodeError("too_many_pixels", f"{width}x{height} px in several scans would take {held:.0f} bytes")
        if colours in ("CMYK", "YCCK"):
            inks = _strict_jpeg(self.data, "CMYK", least)  # Adobe's way: 255 = no ink, whoever wrote it
            return colour.cmyk_to_rgb(np.subtract(255, inks, out=inks), header.icc)
        return _strict_jpeg(self.data, "RGB", least)


def _quick_factor(info: ImageInfo, least: int) -> int:
    short = min(info.width, info.height)
    return next((factor for factor in (8, 4, 2) if short >= factor * least), 1)


def _use_plugin(kind: str) -> None:
    """Tell Pillow of an extra's format; DecodeError where its package is missing."""
    if kind not in EXTRAS:
        return
    extra, module = EXTRAS[kind]
    if importlib.util.find_spec(module) is None:
        raise DecodeError("decode", f"{kind} is decoded with the extra {extra}: pip install 'mmdata[{extra}]'")
    with _plugins:
        if kind == "heic":
            import pillow_heif

            pillow_heif.register_heif_opener(thumbnails=False, decode_threads=1)
        else:
            from pillow_jxl import JpegXLImagePlugin  # importing it registers it

            JpegXLImagePlugin.DECODE_THREADS = 0  # we have threads enough


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


def _webp_pixels(data: bytes, header: webp_header.WebpHeader, factor: int) -> Picture:
    import cv2

    # IMREAD_UNCHANGED alone leaves orientation and alpha to us.
    found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if found is None or found.shape[:2] != (header.height, header.width):
        raise DecodeError("decode", "webp: cut short or corrupt")
    order = cv2.COLOR_BGRA2RGBA if found.shape[2] == 4 else cv2.COLOR_BGR2RGB

    def band(top: int, bottom: int) -> Picture:
        return _on_white(Image.fromarray(cv2.cvtColor(found[top:bottom], order)))

    return _joined(band, header.width, header.height, factor)


def _by_bands(image: Image.Image, factor: int) -> Picture:
    if image.mode in ("I", "F"):
        raise DecodeError("decode", f"samples of mode {image.mode} have no agreed range")
    width, height = image.size
    return _joined(lambda top, bottom: _rgb(image.crop((0, top, width, bottom))), width, height, factor)


def _joined(band: Callable[[int, int], Picture], width: int, height: int, factor: int) -> Picture:
    """The picture whose rows [top, bottom) `band` gives, shrunk by `factor`: only the result is held whole."""
    rows = max(1, _BAND_PX // (width * factor)) * factor
    if factor == 1 and rows >= height:
        return band(0, height)
    result = np.empty((-(-height // factor), -(-width // factor), 3), np.uint8)
    for top in range(0, height, rows):
        bottom = min(height, top + rows)
        part = band(top, bottom)
        result[top // factor : -(-bottom // factor)] = part if factor == 1 else boxed(part, factor)
    return result


def _rgb(image: Image.Image) -> Picture:
    mode = image.mode
    if mode.startswith("I;16"):
        return _sixteen_bit_grey(image)
    if mode == "CMYK":
        profile = image.info.get("icc_profile")
        return colour.cmyk_to_rgb(np.array(image), profile if isinstance(profile, bytes) else None)
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return _on_white(image.convert("RGBA"))
    return np.asarray(image if mode == "RGB" else image.convert("RGB"))


def _on_white(image: Image.Image) -> Picture:
    if image.mode != "RGBA":
        return np.asarray(image)
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return np.asarray(white)


def _sixteen_bit_grey(image: Image.Image) -> Picture:
    values: npt.NDArray[np.uint16] = np.asarray(image).astype(np.uint16, copy=False)
    grey = (values >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")
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
