"""Colours by an ICC profile → sRGB. The profile is foreign: a broken one, or one of another kind, changes nothing.

In: a picture and the bytes of its profile. Out: the picture in sRGB, by Little CMS with the perceptual intent, as
Pillow's `ImageCms.profileToProfile` converts it. A profile that *is* sRGB (no colour of a 9x9x9 grid moves by more
than a level) costs a look-up. What a profile means is kept for the last 32 of them. Fails: never.
Source: ICC.1:2022; IEC 61966-2-1.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from mmdata.media.picture import Picture

__all__ = ["Transform", "cmyk_to_rgb", "transform_of"]

Space = Literal["RGB", "GRAY", "CMYK"]
_MODES: dict[Space, str] = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_KEPT = 32
_MAX_PROFILE = 4 << 20  # bytes; the largest printing profiles have 2 MB
_BAND_PX = 1 << 20


class Transform:
    """A profile's way to sRGB. Used by many threads at once."""

    def __init__(self, space: Space, transform: Any) -> None:
        self._space = space
        self._transform = transform

    def apply(self, picture: Picture) -> Picture:
        """(H, W, 3) uint8, in RGB or three equal channels of grey → the same shape in sRGB, band by band."""
        height, width = picture.shape[:2]
        result = picture if picture.flags.writeable and picture.flags.owndata else np.empty_like(picture)
        rows = max(1, _BAND_PX // max(1, width))
        for top in range(0, height, rows):
            band = picture[top : top + rows]
            source = band[:, :, 0] if self._space == "GRAY" else band
            result[top : top + rows] = self.of(Image.fromarray(np.ascontiguousarray(source), _MODES[self._space]))
        return result

    def of(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """The array in sRGB of a Pillow image in the profile's mode."""
        return np.asarray(self._transform.apply(image))


_kept: OrderedDict[tuple[Space, bytes], Transform | None] = OrderedDict()
_lock = threading.Lock()


def transform_of(profile: bytes | None, space: Space) -> Transform | None:
    """What brings a picture of `space` with this profile to sRGB; None: nothing has to, or nothing can."""
    if not profile or len(profile) > _MAX_PROFILE or profile[16:20] != space.ljust(4).encode():
        return None
    key = (space, hashlib.sha256(profile).digest())
    with _lock:
        if key in _kept:
            _kept.move_to_end(key)
            return _kept[key]
    made = _made(profile, space)
    with _lock:
        _kept[key] = made
        while len(_kept) > _KEPT:
            _kept.popitem(last=False)
    return made


def _made(profile: bytes, space: Space) -> Transform | None:
    import io

    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        made = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), _MODES[space], "RGB")
        transform = Transform(space, made)
        return transform if space == "CMYK" or _moves(transform, space) else None
    except Exception:  # noqa: BLE001  a broken profile costs the conversion, not the picture
        return None


def _moves(transform: Transform, space: Space) -> bool:
    levels = np.rint(np.linspace(0, 255, 9)).astype(np.uint8)
    if space == "GRAY":
        grid = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    else:
        grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(1, -1, 3)
    moved = transform.apply(grid.view()).astype(int)
    return bool(np.abs(moved - grid).max() > 1)


def cmyk_to_rgb(inks: npt.NDArray[np.uint8], profile: bytes | None) -> Picture:
    """(H, W, 4) uint8, 255 = full ink → (H, W, 3) RGB by the profile, or without one as Pillow does it.

    Works in `inks`' own memory, which is lost: the result is a view of it.
    """
    height, width = inks.shape[:2]
    transform = transform_of(profile, "CMYK")
    flat = inks.reshape(-1)
    rows = max(1, _BAND_PX // max(1, width))
    for top in range(0, height, rows):
        band = Image.fromarray(inks[top : top + rows].copy(), "CMYK")
        rgb = transform.of(band) if transform is not None else np.asarray(band.convert("RGB"))
        start = top * width * 3  # three bytes are written where four were read: never ahead of the reading
        flat[start : start + rgb.size] = rgb.reshape(-1)
    return flat[: height * width * 3].reshape(height, width, 3)
