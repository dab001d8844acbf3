"""Grey and shrunk pictures against Pillow, byte for byte."""

from __future__ import annotations

import threading
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from mmdata.media.grey import _filter, _taps, shrink

SIZES = [(32, 32), (9, 8), (8, 8)]
# Around the change of the passes' order, and of strips; a side of 1; long and thin; smaller than the result.
SHAPES = [(1, 1), (1, 300), (300, 1), (31, 40), (33, 33), (256, 341), (341, 256), (168, 100), (169, 100), (650, 341)]
SHAPES += [(651, 341), (20, 200), (29, 4), (2, 14), (8, 9), (32, 32), (1100, 700), (5000, 40), (40, 5000)]


def pillow(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).convert("L").resize(size, Image.Resampling.LANCZOS))


def pictures(height: int, width: int) -> list[np.ndarray]:
    rng = np.random.default_rng(height * 7919 + width)
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    edges = np.where(rng.random((height, width, 1)) < 0.5, 0, 255).astype(np.uint8).repeat(3, axis=2)  # overshoots
    small = Image.fromarray(noise[: height // 8 + 1, : width // 8 + 1])
    return [noise, edges, np.asarray(small.resize((width, height)))]


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_equals_pillow(height: int, width: int):
    for picture in pictures(height, width):
        for size, found in zip(SIZES, shrink(picture, SIZES), strict=True):
            assert np.array_equal(found, pillow(picture, size)), size


def test_equals_pillow_at_many_sizes():
    rng = np.random.default_rng(2)
    for _ in range(100):
        height, width = (int(np.exp(rng.uniform(0, np.log(400)))) for _ in range(2))
        picture = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        for size, found in zip(SIZES, shrink(picture, SIZES), strict=True):
            assert np.array_equal(found, pillow(picture, size)), (height, width, size)


@pytest.mark.parametrize(("length", "dtype"), [(33, "float32"), (341, "float32"), (2500, "float32"), (5700, "float64")])
def test_the_largest_sums_are_exact(length: int, dtype: str):
    # Row r is white where a part of the factors of result r has one sign: no picture has larger sums of that part.
    assert _taps(length, 32)[0][2].dtype == dtype
    factors = _filter(length, 32)[:, :32]
    coarse = np.rint(factors / 256)
    for part in (coarse, factors - 256 * coarse, factors):
        for sign in (1, -1):
            row = np.where(sign * part.T > 0, 255, 0).astype(np.uint8)
            picture = row[:, :, None].repeat(3, axis=2)
            assert np.array_equal(shrink(picture, [(32, 32)])[0], pillow(picture, (32, 32)))


@pytest.mark.parametrize("size", [(4, 1), (1, 4), (1, 1), (2, 2), (60, 5)])
@pytest.mark.parametrize("shape", [(1466, 777), (777, 1466), (1, 1), (4, 4)])
def test_results_of_few_px(size: tuple[int, int], shape: tuple[int, int]):
    picture = pictures(*shape)[0]
    assert np.array_equal(shrink(picture, [size])[0], pillow(picture, size))


def test_filters_of_many_large_sides_are_not_kept():
    tracemalloc.start()
    for length in range(3000, 6000, 30):  # some 300 kB each
        _taps(length, 32)
    assert tracemalloc.get_traced_memory()[0] < 12e6
    tracemalloc.stop()


def test_a_picture_of_that_size_is_its_luma():
    # Of random colours some 350,000 sums are rounded, each exactly.
    rng = np.random.default_rng(1)
    picture = rng.integers(0, 256, (700, 500, 3), dtype=np.uint8)
    assert np.array_equal(shrink(picture, [(500, 700)])[0], np.asarray(Image.fromarray(picture).convert("L")))


def test_pictures_that_are_read_only_turned_or_cut():
    picture = pictures(120, 90)[0]
    for view in (picture[:, ::-1], picture[10:90, 5:60], picture.transpose(1, 0, 2), picture[::2]):
        view.flags.writeable = False
        assert np.array_equal(shrink(view, [(32, 32)])[0], pillow(np.ascontiguousarray(view), (32, 32)))


def test_threads_do_not_share_room():
    found: dict[int, list[bool]] = {}

    def work(seed: int) -> None:
        picture = np.random.default_rng(seed).integers(0, 256, (200, 300, 3), dtype=np.uint8)
        expected = pillow(picture, (32, 32))
        found[seed] = [np.array_equal(shrink(picture, [(32, 32)])[0], expected) for _ in range(100)]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [all(found[seed]) for seed in range(4)] == [True] * 4
