"""What is made of one body: scales, hashes, boxes, frames, kinds of media. Bodies of whole shards: test_ingest.py."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from pydantic import ValidationError

from mmdata.media import image
from mmdata.media.resizing import resize
from mmdata.prepare import _least_side, prepare
from mmdata.settings import FetchOptions

PICTURES = Path(__file__).parent.parent / "mmdata" / "demo" / "pictures"


def scene(width: int, height: int, seed: int = 3) -> Image.Image:
    """Clouds of several sizes with hard edges in them, as photographs have."""
    rng = np.random.default_rng(seed)
    sizes = ((3, 4), (11, 15), (60, 80))
    layers = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    full = [np.asarray(layer.resize((width, height), Image.Resampling.BICUBIC), float) for layer in layers]
    mixed = 0.6 * full[0] + 0.3 * full[1] + 0.1 * full[2]
    mixed[height // 3 : height // 2, width // 4 : width // 2] = (240, 30, 60)
    return Image.fromarray(mixed.astype(np.uint8))


def saved(picture: Image.Image, **options: Any) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, **{"format": "JPEG", "quality": 90} | options)
    return sink.getvalue()


BODY = saved(scene(400, 300))


def pixels(body: bytes, **options: Any) -> npt.NDArray[np.float64]:
    found = prepare(body, FetchOptions(encode_format="png", **options))
    assert found.status == "ok"
    return image.decode(found.data or b"").astype(float)


def psnr(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    error = np.mean((one.astype(float) - other.astype(float)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def test_fast_decoding_keeps_one_and_a_half_times_the_size() -> None:
    opened = image.Opened(saved(scene(1500, 1000)))
    kept = [
        opened.decode(_least_side(opened.info, FetchOptions(image_size=n)), quick=True).picture.shape[0]
        for n in (80, 128, 200, 350)
    ]
    assert kept == [125, 250, 500, 1000]  # 1000 px by 8, 4, 2 and 1: the least that is 1.5 times the size


@pytest.mark.parametrize(
    ("size", "format"),
    [
        ((1700, 1601), "JPEG"),
        ((1001, 771), "JPEG"),
        ((700, 455), "JPEG"),
        ((512, 512), "JPEG"),
        ((257, 300), "JPEG"),
        ((140, 90), "JPEG"),
        ((1001, 771), "PNG"),
        ((899, 803), "WEBP"),
    ],
)
def test_fast_is_close_to_exact_and_of_the_same_size(size: tuple[int, int], format: str) -> None:
    body = saved(scene(*size), format=format)
    exact, fast = pixels(body, decode="exact"), pixels(body, decode="fast")
    assert exact.shape == fast.shape
    assert psnr(exact, fast) >= 33
    if min(size) < 256:
        assert np.array_equal(exact, fast)


@pytest.mark.parametrize("mode", ["keep_ratio", "keep_ratio_largest", "center_crop", "border", "no"])
def test_fast_has_the_sizes_of_exact_in_every_mode(mode: Any) -> None:
    for size in ((1037, 853), (1999, 201), (531, 803)):
        exact, fast = (
            prepare(saved(scene(*size)), FetchOptions(decode=d, resize_mode=mode)) for d in ("exact", "fast")
        )
        assert (exact.width_px, exact.height_px) == (fast.width_px, fast.height_px)
        assert (fast.original_width_px, fast.original_height_px) == size


@pytest.mark.parametrize("ratio", [1.02, 1.5, 2.0, 2.99])
def test_quick_shrinking_is_area_to_40_db(ratio: float) -> None:
    for name in sorted(PICTURES.glob("*.jpg"))[:4]:
        photograph = image.decode(name.read_bytes())
        size = int(min(photograph.shape[:2]) / ratio)
        assert psnr(resize(photograph, size), resize(photograph, size, quick=True)) >= 40
    assert len(list(PICTURES.glob("*.jpg"))) >= 4


def test_a_cut_picture_is_found_out_at_any_scale() -> None:
    body = saved(scene(1200, 900))
    for options in ({}, {"image_size": 100}, {"store": "original"}, {"decode": "exact"}):
        assert prepare(body[: len(body) * 2 // 3], FetchOptions(**options)).status == "decode"


def test_stored_as_fetched_resized_or_both() -> None:
    resized, original, both = (prepare(BODY, FetchOptions(store=s)) for s in ("resized", "original", "both"))
    assert (resized.original, resized.original_ext) == (None, None)
    assert (original.data, original.ext, original.original) == (BODY, "jpg", None)
    assert (original.width_px, original.height_px) == (400, 300)
    assert (both.data, both.ext, both.width_px) == (resized.data, "jpg", 341)
    assert (both.original, both.original_ext) == (BODY, "jpg")
    gif = saved(scene(40, 30), format="GIF")
    assert prepare(gif, FetchOptions(store="both")).original_ext == "gif"
    for cut in ("original", "both"):
        found = prepare(BODY[:-900], FetchOptions(store=cut))
        assert (found.status, found.data, found.original) == ("decode", None, None)


def test_hashes_are_those_of_hashlib() -> None:
    assert prepare(BODY, FetchOptions()).extra_hash is None
    for kind in ("md5", "sha512"):
        found = prepare(BODY, FetchOptions(compute_hash=kind))
        assert found.extra_hash == hashlib.new(kind, BODY).hexdigest()
        assert found.sha256 == hashlib.sha256(BODY).hexdigest()
    broken = prepare(b"<html>", FetchOptions(compute_hash="md5"))
    assert (broken.status, broken.extra_hash) == ("not_media", hashlib.md5(b"<html>").hexdigest())


@pytest.mark.parametrize("kind", ["sha256", "md5", "sha512"])
def test_a_body_with_another_hash_is_refused(kind: Any) -> None:
    options, right = FetchOptions(verify_hash=("digest", kind)), hashlib.new(kind, BODY).hexdigest()
    for expected in (right, right.upper(), f" {right}\n"):
        assert prepare(BODY, options, expected_hash=expected).status == "ok"
    for expected in ("0" * len(right), right[:-1], "", None):
        found = prepare(BODY, options, expected_hash=expected)
        assert (found.status, found.data) == ("hash_mismatch", None)
        assert right in (found.detail or "")
    assert prepare(BODY, FetchOptions(), expected_hash="0").status == "ok"  # nobody asked


class Held:
    """Another dataset that holds one body."""

    def body(self, sha256: str) -> str | None:
        return "in pets" if sha256 == hashlib.sha256(BODY).hexdigest() else None


def test_what_another_dataset_holds_is_not_stored_again() -> None:
    found = prepare(BODY, FetchOptions(), earlier=Held())
    assert (found.status, found.detail, found.data, found.size_bytes) == ("filtered", "in pets", None, len(BODY))
    assert prepare(BODY + b"\0", FetchOptions(), earlier=Held()).status == "ok"


BOX = [0.25, 0.25, 0.5, 0.75]


def test_boxes_are_blurred_and_nothing_else_is() -> None:
    rng = np.random.default_rng(1)
    noise = saved(Image.fromarray(rng.integers(0, 256, (600, 800, 3), dtype=np.uint8)), format="PNG")
    plain, blurred = pixels(noise), pixels(noise, bbox="faces")
    assert np.array_equal(plain, blurred)  # this row has no boxes
    found = prepare(noise, FetchOptions(encode_format="png", bbox="faces"), boxes=[BOX])
    blurred = image.decode(found.data or b"").astype(float)
    height, width = blurred.shape[:2]
    rows, columns = slice(height // 4, height * 3 // 4), slice(width // 4, width // 2)
    assert blurred[rows, columns].std() < 0.25 * plain[rows, columns].std()
    assert np.array_equal(blurred[:, width * 3 // 4 :], plain[:, width * 3 // 4 :])


def test_boxes_lie_on_the_upright_picture() -> None:
    rng = np.random.default_rng(1)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    noise = Image.fromarray(rng.integers(0, 256, (300, 300, 3), dtype=np.uint8))
    found = prepare(
        saved(noise, format="PNG", exif=exif), FetchOptions(encode_format="png", bbox="b"), boxes=[[0, 0, 0.4, 0.4]]
    )
    picture = image.decode(found.data or b"").astype(float)
    assert picture[:80, :80].std() < 0.5 * picture[-80:, -80:].std()


@pytest.mark.parametrize(
    "boxes", [[[0, 0, 1]], [[0.5, 0, 0.2, 1]], [["a", 0, 1, 1]], [[0, 0, float("nan"), 1]], [None]]
)
def test_what_cannot_be_blurred_is_not_stored(boxes: Any) -> None:
    found = prepare(BODY, FetchOptions(bbox="faces"), boxes=boxes)
    assert (found.status, found.data, found.original) == ("filtered", None, None)
    assert "cannot be blurred" in (found.detail or "")


@pytest.mark.parametrize("options", [{"store": "both"}, {"disable_all_reencoding": True}, {"media": "any"}])
def test_boxes_and_bytes_as_fetched_exclude_each_other(options: Any) -> None:
    with pytest.raises(ValidationError, match="bbox blurs"):
        FetchOptions(bbox="faces", **options)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "AVIF"])
def test_animations_give_their_first_frame_or_are_refused(format: str) -> None:
    frames = [Image.new("RGB", (60, 40), colour) for colour in ("red", "blue", "green")]
    moving = saved(frames[0], format=format, save_all=True, append_images=frames[1:], quality=90)
    still = saved(frames[0], format=format, quality=90)
    for body in (moving, still):
        found = prepare(body, FetchOptions(encode_format="png"))
        red, green, blue = image.decode(found.data or b"")[10, 10].tolist()
        assert red > 245
        assert max(green, blue) < 10
    strict = FetchOptions(animated="error")
    refused = prepare(moving, strict)
    assert (refused.status, refused.detail, refused.data) == ("filtered", "animated", None)
    assert prepare(still, strict).status == "ok"


MP3 = b"\xff\xfb\x90\x64" + b"\0" * 413
MP4 = b"\0\0\0\x20ftypisom\0\0\x02\0isomiso2avc1mp41"


@pytest.mark.parametrize(
    ("media", "body", "status", "found"),
    [
        ("audio", MP3, "ok", "mp3"),
        ("audio", MP4, "ok", "mp4"),  # may hold sound alone
        ("audio", BODY, "not_media", "jpeg, no audio"),
        ("video", MP4, "ok", "mp4"),
        ("video", MP3, "not_media", r"audio (mp3), no video"),
        ("any", MP3, "ok", "mp3"),
        ("any", MP4, "ok", "mp4"),
        ("any", BODY, "ok", "jpg"),
        ("any", b"<!DOCTYPE html><p>", "not_media", "html"),
        ("video", b'{"error": 404}', "not_media", "text, no media"),
        ("audio", b"", "not_media", "empty"),
        ("audio", b"\x01\x02\x03\x04", "not_media", "no known format, starts with 01020304"),
        ("image", MP3, "not_media", "audio (mp3), no image"),
    ],
)
def test_other_media_is_stored_as_fetched(media: Any, body: bytes, status: str, found: str) -> None:
    made = prepare(body, FetchOptions(media=media))
    assert made.status == status
    assert (made.sha256, made.size_bytes) == (hashlib.sha256(body).hexdigest(), len(body))
    if status == "ok":
        assert (made.data, made.ext, made.detail) == (body, found, None)
    else:
        assert (made.data, made.detail) == (None, found)


def test_a_drawing_is_refused_by_its_own_words() -> None:
    made = prepare(b"<svg xmlns='http://www.w3.org/2000/svg'/>", FetchOptions())
    assert (made.status, made.detail) == ("not_media", "svg: a drawing without pixels")
