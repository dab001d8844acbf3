"""A fetched body → what is stored of it: checked, decoded, resized, encoded. One body at a time, in a decode thread.

In: the bytes and the fetch options. Out: `Prepared`, whatever the bytes are. Fails: never; a bad body is a status.
Memory: all decode threads of a process together hold about 320 MB, whatever the bodies are, with the default options.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mmdata.block_lists import BlockLists
from mmdata.media import blur, formats, image
from mmdata.media.memory import DECODING
from mmdata.settings import FetchOptions

__all__ = ["Earlier", "Prepared", "prepare"]

# Containers that may hold sound alone.
_MAYBE_SOUND = frozenset(("mp4", "mov", "3gp", "webm", "mkv"))
_FAST_SHARE = 1.5  # a fast decode keeps this many px for each px of the result


class Earlier(Protocol):
    """What other datasets hold; `body` gives the words for `status_detail`, None when they do not have it."""

    def body(self, sha256: str) -> str | None:
        """`sha256` in lower-case hex, of a body as fetched."""


@dataclass(frozen=True)
class Prepared:
    """A fetched body after all checks: with status ok, `data` is what is stored, `ext` and the sizes describe it.

    `original_*` are those of the body, upright, None when its header did not parse; `sha256` is of the body, and
    `extra_hash` its hash of the kind `compute_hash` in hex. `original` is the body itself where both are stored.
    Sound and film have no sizes.
    """

    status: str
    detail: str | None = None
    data: bytes | None = None
    ext: str | None = None
    width_px: int | None = None
    height_px: int | None = None
    original_width_px: int | None = None
    original_height_px: int | None = None
    exif: str | None = None
    sha256: str | None = None
    size_bytes: int | None = None
    extra_hash: str | None = None
    original: bytes | None = None
    original_ext: str | None = None


def prepare(
    data: bytes,
    fetch: FetchOptions,
    blocks: BlockLists | None = None,
    expected_hash: str | None = None,
    boxes: Sequence[Any] | None = None,
    earlier: Earlier | None = None,
) -> Prepared:
    """Check, decode, resize and encode one body; never raises: what decoders and encoders raise becomes a status.

    `expected_hash`: hex, of the kind that `fetch.verify_hash` names; where that is set, a body with another hash is
    `hash_mismatch`, and so is every body whose row names none. `boxes`: [left, top, right, bottom] each, in 0 to 1 of
    the upright picture, blurred once it is resized; None or none blurs nothing; what is no box costs the row
    (`filtered`), because unblurred it is not stored.
    """
    known: dict[str, Any] = {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
    try:
        if fetch.compute_hash is not None:
            known["extra_hash"] = _hash(data, fetch.compute_hash, known)
        if fetch.verify_hash is not None:
            kind = fetch.verify_hash[1]
            found, expected = _hash(data, kind, known), (expected_hash or "").strip().lower()
            if found != expected:
                return Prepared("hash_mismatch", f"{kind} {found}, expected {expected[:128] or 'none given'}", **known)
        if earlier is not None and (words := earlier.body(known["sha256"])) is not None:
            return Prepared("filtered", words, **known)
        if blocks is not None and (words := blocks.body(known["sha256"])) is not None:
            return Prepared("blocked", words, **known)
        if fetch.media != "image" and (fetch.media != "any" or image.sniff(data) is None):
            return _sound_or_film(data, fetch, known)
        return _picture(data, fetch, known, blocks, boxes)
    except image.DecodeError as error:
        return Prepared(error.kind, error.detail, **known)
    except Exception as error:  # noqa: BLE001  row isolation: whatever a picture does to a library, it costs this row
        return Prepared("decode", f"{type(error).__name__}: {error}"[:200], **known)


def _hash(data: bytes, kind: str, known: dict[str, Any]) -> str:
    return str(known["sha256"]) if kind == "sha256" else hashlib.new(kind, data, usedforsecurity=False).hexdigest()


def _sound_or_film(data: bytes, fetch: FetchOptions, known: dict[str, Any]) -> Prepared:
    found = formats.media_kind(data)
    if found is None:
        kind = image.sniff(data)
        words = f"{kind}, no {fetch.media}" if kind else formats.describe(data).replace("no image", "no media")
        return Prepared("not_media", words.replace("no known image format", "no known format"), **known)
    role, ext = found
    if fetch.media not in ("any", role) and not (fetch.media == "audio" and ext in _MAYBE_SOUND):
        return Prepared("not_media", f"{role} ({ext}), no {fetch.media}", **known)
    return Prepared("ok", None, data, ext, **known)


def _picture(
    data: bytes,
    fetch: FetchOptions,
    known: dict[str, Any],
    blocks: BlockLists | None,
    boxes: Sequence[Any] | None,
) -> Prepared:
    _one_thread_each()
    opened = image.Opened(data)
    info = opened.info
    known |= {"original_width_px": info.width, "original_height_px": info.height}
    if fetch.extract_exif:
        known["exif"] = image.exif_json(opened)
    refused = _filtered(info, fetch)
    try:
        found = blur.boxes_of(boxes)
    except ValueError as error:
        return Prepared("filtered", f"not stored, because it cannot be blurred: {error}"[:200], **known)
    if refused is None and fetch.animated == "error" and opened.is_animated():
        refused = "animated"
    if refused:
        return Prepared("filtered", refused, **known)
    least = None
    if fetch.decode == "fast":
        looks = blocks is not None and blocks.looks
        # A reduced scale reads every coefficient, so that a cut picture is found out all the same.
        least = _least_side(info, fetch) if not _keeps_bytes(fetch) else None if looks else 1
    with DECODING.held(opened.bytes_needed(least, fetch.decode == "fast")):
        return _stored(opened, least, fetch, known, blocks, found)


@functools.cache
def _one_thread_each() -> None:
    """OpenCV's own threads would only stand in the way of the decode threads, of which there is one a CPU."""
    import cv2

    cv2.setNumThreads(1)


def _filtered(info: image.ImageInfo, fetch: FetchOptions) -> str | None:
    short, long = sorted((info.width, info.height))
    if short < fetch.min_image_size:
        return f"short side {short} px, at least {fetch.min_image_size} asked"
    if fetch.max_image_area is not None and short * long > fetch.max_image_area:
        return f"area {short * long} px, at most {fetch.max_image_area:g} allowed"
    if fetch.max_aspect_ratio is not None and long > fetch.max_aspect_ratio * short:
        return f"aspect ratio {long / short:.2f}, at most {fetch.max_aspect_ratio:g} allowed"
    return None


def _keeps_bytes(fetch: FetchOptions) -> bool:
    return fetch.disable_all_reencoding or fetch.store == "original" or fetch.media == "any"


def _stored(
    opened: image.Opened,
    least: int | None,
    fetch: FetchOptions,
    known: dict[str, Any],
    blocks: BlockLists | None,
    boxes: Sequence[blur.Box],
) -> Prepared:
    fast = fetch.decode == "fast"
    picture, to_srgb = opened.decode(least, fetch.max_pixels, fast)
    if to_srgb is not None and not fast and not _keeps_bytes(fetch):
        picture, to_srgb = to_srgb.apply(picture), None
    if blocks is not None and (words := blocks.picture(picture)) is not None:
        return Prepared("blocked", words, **{**known, "exif": None})
    info, ext = opened.info, image.extension(opened.info.format)
    if _keeps_bytes(fetch):
        return Prepared("ok", None, opened.data, ext, info.width, info.height, **known)
    shape = picture.shape
    resized = image.resize(
        picture,
        fetch.image_size,
        fetch.resize_mode,
        fetch.resize_only_if_bigger,
        fetch.upscale_interpolation,
        fetch.downscale_interpolation,
        fast,
        _blurred(boxes) if boxes else None,
        (info.width, info.height),
    )
    del picture
    if to_srgb is not None:
        resized = to_srgb.apply(resized)
    height, width = resized.shape[:2]
    if fetch.store == "both":
        known |= {"original": opened.data, "original_ext": ext}
    same = resized.shape == shape == (info.height, info.width, 3) and not boxes
    if fetch.skip_reencode and same and ext == fetch.encode_format and info.is_plain:
        return Prepared("ok", None, opened.data, ext, width, height, **known)
    encoded = image.encode(resized, fetch.encode_format, fetch.encode_quality)
    return Prepared("ok", None, encoded, fetch.encode_format, width, height, **known)


def _blurred(boxes: Sequence[blur.Box]) -> Callable[[image.Picture], image.Picture]:
    def blurred(picture: image.Picture) -> image.Picture:
        height, width = picture.shape[:2]
        return blur.blur_boxes(picture, [(a * width, b * height, c * width, d * height) for a, b, c, d in boxes])

    return blurred


def _least_side(info: image.ImageInfo, fetch: FetchOptions) -> int | None:
    """Px of the short side that a fast decode keeps: at least 1.5 times what the resize makes of it; None = in full."""
    if fetch.resize_mode == "no":
        return None
    short, long = sorted((info.width, info.height))
    by_short = fetch.resize_mode in ("keep_ratio", "center_crop")
    target = fetch.image_size if by_short else fetch.image_size * short / long
    return math.ceil(_FAST_SHARE * target)
