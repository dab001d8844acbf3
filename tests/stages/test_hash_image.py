"""The perceptual hash against imagehash on real pictures, and against hand arithmetic on synthetic ones."""

from __future__ import annotations

import hashlib
import io

import imagehash
import numpy as np
import pytest
import skimage
import stamps
from batches import make_batch, noise
from PIL import Image
from pydantic import ValidationError

from mmdata.stages.hash_image import HashImage, HashImageOptions

HASHES = {"phash": imagehash.phash, "dhash": imagehash.dhash, "ahash": imagehash.average_hash}


def hashes(pictures: list[np.ndarray | bytes], name: str = "phash", **options: bool) -> np.ndarray:
    return np.asarray(HashImage(HashImageOptions(hashes=[name], **options)).compute(make_batch(pictures))[name])


def reference(picture: Image.Image, name: str = "phash") -> int:
    return int(str(HASHES[name](picture)), 16)


def on_white(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as opened:
        rgba = opened.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    # paste, not alpha_composite: the two round half-transparent pixels differently
    white.paste(rgba, mask=rgba.getchannel("A"))
    return white.convert("RGB")


def photographs() -> list[Image.Image]:
    names = ("astronaut", "coffee", "cat", "rocket", "camera", "coins", "page", "text", "moon", "clock", "chelsea")
    found = [Image.fromarray(getattr(skimage.data, n)()).convert("RGB") for n in names]
    rng = np.random.default_rng(5)
    for picture in list(found):  # crops make more of them
        for _ in range(6):
            width, height = (int(rng.integers(side // 3, side)) for side in picture.size)
            left, top = int(rng.integers(0, picture.width - width)), int(rng.integers(0, picture.height - height))
            found.append(picture.crop((left, top, left + width, top + height)))
    return found


def test_equals_imagehash_on_real_pictures():
    stored = [path.read_bytes() for path in sorted(stamps.STAMPS.rglob("*.png"))]
    pictures = [on_white(data) for data in stored]
    photos = photographs()
    assert len(stored) > 780
    assert len(photos) == 77
    options = HashImageOptions(hashes=["ahash", "phash", "dhash"])
    ours = HashImage(options).compute(make_batch([*stored, *(np.asarray(p) for p in photos)]))
    assert list(ours) == ["ahash", "phash", "dhash"]
    for name, column in ours.items():
        theirs = np.array([reference(p, name) for p in [*pictures, *photos]], np.uint64)
        distance = np.bitwise_count(column ^ theirs)
        if name == "phash":  # theirs is a float's where coefficients tie with the median
            assert (distance == 0).mean() >= 0.995
            assert distance.max() <= 2
        else:
            assert distance.max() == 0


def test_mirror_images_hash_alike_when_asked():
    pictures = [np.asarray(p) for p in photographs()[:20]]
    mirrored = [p[:, ::-1] for p in pictures]
    for name in HASHES:
        distance = np.bitwise_count(hashes(pictures, name) ^ hashes(mirrored, name))
        invariant = hashes(pictures, name, flip_invariant=True) ^ hashes(mirrored, name, flip_invariant=True)
        assert np.median(distance) >= 16
        assert (np.bitwise_count(invariant) <= 2).mean() >= 0.9
        # It is the hash of one of the two.
        of_shrunk = [reference(Image.fromarray(p).convert("L"), name) for p in pictures]
        assert any(a == b for a, b in zip(hashes(pictures, name, flip_invariant=True).tolist(), of_shrunk, strict=True))


def test_each_hash_is_named_once():
    with pytest.raises(ValidationError, match="name each hash once"):
        HashImageOptions(hashes=["phash", "phash"])


def test_first_bit_is_the_highest():
    # The first coefficient is the mean grey, above the median for any picture that is not black.
    found = hashes([noise(40, 60, seed) for seed in range(5)])
    assert (found >> np.uint64(63)).tolist() == [1] * 5


def test_flat_pictures_hash_alike():
    # All coefficients but the mean are 0, and so is the median: one bit for any grey, none for black.
    found = hashes([np.full((50, 70, 3), grey, np.uint8) for grey in (1, 77, 255, 0)])
    assert [hex(h) for h in found.tolist()] == ["0x8000000000000000"] * 3 + ["0x0"]


def test_symmetric_picture_has_no_odd_frequencies():
    # Mirrored left to right, every odd column of the 8 x 8 block is exactly 0: equal to each other, so equal in bits.
    half = noise(64, 32, 3)
    picture = np.concatenate([half, half[:, ::-1]], axis=1)
    bits = np.array(list(f"{hashes([picture])[0]:064b}"), int).reshape(8, 8)
    assert len(np.unique(bits[:, 1::2])) == 1


@pytest.mark.parametrize("change", ["half size", "jpeg 60", "brighter"])
def test_copies_stay_near_and_strangers_far(change: str):
    originals = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.cat()]
    copies = []
    for original in originals:
        picture = Image.fromarray(original)
        if change == "half size":
            picture = picture.resize((picture.width // 2, picture.height // 2))
        elif change == "jpeg 60":
            sink = io.BytesIO()
            picture.save(sink, format="JPEG", quality=60)
            picture = Image.open(io.BytesIO(sink.getvalue()))
        else:
            picture = picture.point(lambda v: int(v * 0.9 + 10))
        copies.append(np.asarray(picture))
    found = hashes([*originals, *copies])
    between = np.bitwise_count(found[:3, None] ^ found[None, 3:])
    assert np.diag(between).max() <= 4
    assert between[~np.eye(3, dtype=bool)].min() >= 16


def exact(pictures: list[np.ndarray | bytes]) -> list[str]:
    columns = HashImage(HashImageOptions(exact=True)).compute(make_batch(pictures))
    assert columns["phash"].tolist() == hashes(pictures).tolist()
    return columns["pixel_sha256"].to_pylist()


def stored(picture: np.ndarray, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, kind, **options)
    return buffer.getvalue()


def test_exact_is_the_sha256_of_size_and_pixels():
    # 2 wide, 1 high; red, then (1, 2, 3): width and height as little-endian uint32, six bytes of colour
    picture = np.array([[[255, 0, 0], [1, 2, 3]]], np.uint8)
    text = bytes([2, 0, 0, 0, 1, 0, 0, 0, 255, 0, 0, 1, 2, 3])
    assert exact([picture]) == [hashlib.sha256(text).hexdigest()]


def test_exact_is_equal_for_what_was_stored_anew_without_loss_and_only_for_that():
    picture = noise(37, 21, 4)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    same = [
        stored(picture, "PNG"),
        stored(picture, "PNG", compress_level=0),
        stored(picture, "WEBP", lossless=True, exact=True),
        stored(picture, "BMP"),
        stored(np.rot90(picture), "PNG", exif=turned.tobytes()),
    ]
    assert len(set(same)) == 5
    assert len(set(exact(same))) == 1
    off_by_one = picture.copy()
    off_by_one[3, 4, 1] ^= 1
    others = [picture, off_by_one, picture[:, ::-1], picture.transpose(1, 0, 2), stored(picture, "JPEG", quality=95)]
    assert len(set(exact(others))) == 5
    # The bytes of 37 x 21 black pixels are those of 21 x 37, the pictures are not.
    assert len(set(exact([np.zeros((37, 21, 3), np.uint8), np.zeros((21, 37, 3), np.uint8)]))) == 2
