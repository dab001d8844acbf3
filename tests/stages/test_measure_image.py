"""Measures of constructed pictures by hand, of real ones by scikit-image, scipy and plain numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import skimage
from batches import make_batch, noise
from scipy.ndimage import convolve
from skimage.measure import shannon_entropy
from skimage.transform import downscale_local_mean

from mmdata.media.image import decode, encode
from mmdata.stages.measure_image import MeasureImage, MeasureImageOptions


def measure(picture: np.ndarray, **options: Any) -> dict[str, Any]:
    found = MeasureImage(MeasureImageOptions(**options)).compute(make_batch([picture]))
    return {name.removeprefix("measure_"): values[0] for name, values in found.items()}


def sides(found: dict[str, Any]) -> list[float]:
    return [found[f"border_{side}_ratio"] for side in ("left", "top", "right", "bottom")]


def flat(*colour: int, height: int = 8, width: int = 12) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


def test_plain_picture():
    found = measure(flat(51, 51, 51))
    assert found["brightness"] == pytest.approx(0.2)
    assert [found[n] for n in ("sharpness", "contrast", "entropy", "colourfulness")] == [0, 0, 0, 0]
    assert found["is_grayscale"]
    assert sides(found) == [1, 1, 1, 1]
    assert not found["is_framed"]


def test_half_black_half_white():
    picture = flat(0, 0, 0)
    picture[:, 6:] = 255
    found = measure(picture)
    assert found["brightness"] == pytest.approx(0.5)
    assert found["contrast"] == pytest.approx(0.5)  # every px is half the range from the mean
    assert found["entropy"] == pytest.approx(1)
    # Two of twelve columns answer, with 255 and −255: the mean is 0, the variance 255² / 6.
    assert found["sharpness"] == pytest.approx(255**2 / 6)
    assert sides(found) == [0.5, 0, 0.5, 0]


def test_one_white_px_on_black():
    picture = flat(0, 0, 0, height=5, width=5)
    picture[2, 2] = 255
    found = measure(picture)
    answers = np.array([-4, 1, 1, 1, 1] + [0] * 20) * 255.0
    assert found["sharpness"] == pytest.approx(answers.var())
    assert found["entropy"] == pytest.approx(-(0.04 * math.log2(0.04) + 0.96 * math.log2(0.96)))
    assert found["contrast"] == pytest.approx(math.sqrt(0.04 * 0.96))


def test_colourfulness_by_hand():
    picture = flat(255, 0, 0)
    picture[:, 6:] = [0, 0, 255]
    # rg: half 255, half 0; yb: half 127.5, half −255.
    spread = math.sqrt(127.5**2 + 191.25**2)
    offset = math.sqrt(127.5**2 + 63.75**2)
    found = measure(picture)
    assert found["colourfulness"] == pytest.approx(spread + 0.3 * offset)
    assert not found["is_grayscale"]


@pytest.mark.parametrize("name", ["astronaut", "coffee", "cat", "camera"])
def test_photographs_equal_independent_tools(name: str):
    picture = getattr(skimage.data, name)()
    picture = picture if picture.ndim == 3 else np.stack([picture] * 3, axis=2)
    found = measure(picture)
    grey = np.rint(picture @ [0.299, 0.587, 0.114])  # OpenCV's fixed point may differ by one level in a px
    kernel = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
    assert found["sharpness"] == pytest.approx(convolve(grey, kernel, mode="mirror").var(), rel=2e-3)
    assert found["brightness"] == pytest.approx(grey.mean() / 255, abs=1e-4)
    assert found["contrast"] == pytest.approx(grey.std() / 255, abs=1e-4)
    assert found["entropy"] == pytest.approx(shannon_entropy(grey), abs=2e-3)
    red, green, blue = np.moveaxis(picture.astype(float), 2, 0)
    rg, yb = red - green, (red + green) / 2 - blue
    expected = math.sqrt(rg.var() + yb.var()) + 0.3 * math.sqrt(rg.mean() ** 2 + yb.mean() ** 2)
    assert found["colourfulness"] == pytest.approx(expected, abs=1e-3)
    assert found["is_grayscale"] == (name == "camera")


def test_grey_survives_jpeg_and_tinted_is_not_grey():
    grey = np.stack([skimage.data.camera()] * 3, axis=2)
    assert measure(decode(encode(grey, "jpg", 60)))["is_grayscale"]
    sepia = np.clip(grey * [1.0, 0.95, 0.8], 0, 255).astype(np.uint8)
    assert not measure(sepia)["is_grayscale"]
    one_px = grey.copy()
    one_px[100, 100] = [10, 10, 15]
    assert not measure(one_px)["is_grayscale"]
    assert measure(one_px, grey_tolerance=5)["is_grayscale"]


def test_borders_and_frames():
    inside = noise(60, 80, 3)
    framed = np.pad(inside, ((6, 14), (10, 10), (0, 0)), constant_values=250)
    found = measure(framed)
    assert sides(found) == pytest.approx([10 / 100, 6 / 80, 10 / 100, 14 / 80])
    assert found["is_framed"]
    assert measure(framed, frame_share=0.08)["is_framed"] is False
    letterboxed = np.pad(inside, ((10, 10), (0, 0), (0, 0)))
    found = measure(letterboxed)
    assert sides(found) == pytest.approx([0, 1 / 8, 0, 1 / 8])
    assert not found["is_framed"]
    assert sides(measure(inside)) == [0, 0, 0, 0]


def test_a_frame_survives_jpeg_within_the_tolerance():
    framed = np.pad(skimage.data.coffee(), ((40, 40), (40, 40), (0, 0)), constant_values=255)
    found = measure(decode(encode(framed, "jpg", 85)))
    assert found["is_framed"]
    # Blocks of 8 px that lie across the edge of the frame ring.
    assert sides(found) == pytest.approx([40 / 680, 40 / 480, 40 / 680, 40 / 480], abs=0.02)
    assert not measure(skimage.data.coffee())["is_framed"]


def test_shrunk_first_where_asked():
    small = noise(64, 64, 5)
    large = np.kron(small, np.ones((4, 4, 1), np.uint8))
    assert (downscale_local_mean(large, (4, 4, 1)) == small).all()
    there, here = measure(large, max_side_px=64), measure(small)
    assert there == here
    assert measure(large)["sharpness"] < here["sharpness"] / 2
    assert measure(small, max_side_px=64) == here  # nothing is enlarged


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (2, 3)])
def test_thin_pictures(shape: tuple[int, int]):
    found = measure(noise(*shape, seed=7), max_side_px=16)
    assert all(math.isfinite(v) for v in found.values())
    assert not found["is_framed"]
