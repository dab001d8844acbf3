"""Picture statistics against hand arithmetic, scikit-image and plain numpy."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import skimage
from batches import make_batch, noise
from PIL import Image
from scipy.ndimage import convolve
from skimage.measure import shannon_entropy

from mmdata.stage import NoOptions
from mmdata.stages.probe_image import ProbeImage


def probe(*pictures: np.ndarray, **columns: pa.Array) -> dict[str, np.ndarray]:
    return {k: np.asarray(v) for k, v in ProbeImage(NoOptions()).compute(make_batch(pictures, **columns)).items()}


def flat(*colour: int) -> np.ndarray:
    return np.full((8, 12, 3), colour, np.uint8)


@pytest.fixture(scope="module")
def photographs() -> list[np.ndarray]:
    return [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.cat(), noise(50, 70, 1)]


def test_aspect_ratio_is_that_of_the_original():
    widths, heights = pa.array([900, 401, None], pa.int64()), pa.array([401, 900, None], pa.int64())
    found = probe(flat(0, 0, 0), flat(0, 0, 0), flat(0, 0, 0), original_width_px=widths, original_height_px=heights)
    assert found["aspect_ratio"].tolist() == [900 / 401, 900 / 401, 12 / 8]


def test_flat_pictures():
    found = probe(flat(0, 0, 0), flat(255, 255, 255), flat(255, 0, 0))
    # luma of red: 0.299 * 255 = 76.245, rounded 76
    assert found["brightness"].tolist() == [0, 1, np.float32(76 / 255)]
    assert found["entropy"].tolist() == [0, 0, 0]
    assert found["sharpness"].tolist() == [0, 0, 0]
    # rg = 255, yb = 127.5, no spread: 0.3 * sqrt(255**2 + 127.5**2) = 85.530
    assert found["colourfulness"] == pytest.approx([0, 0, 85.5296], abs=1e-3)


def test_a_chessboard_by_hand():
    board = np.indices((8, 8)).sum(axis=0) % 2 * 255
    found = probe(np.repeat(board[:, :, None], 3, axis=2).astype(np.uint8))
    assert found["brightness"] == pytest.approx([0.5])
    assert found["entropy"] == pytest.approx([1.0])  # two values, one bit
    # every neighbour is of the other colour, mirrored ones too: the Laplacian is +1020 or -1020
    assert found["sharpness"] == pytest.approx([1020.0**2])
    assert found["colourfulness"] == pytest.approx([0.0])


def test_against_scikit_image_and_numpy(photographs: list[np.ndarray]):
    found = probe(*photographs)
    for index, picture in enumerate(photographs):
        luma = np.rint(picture @ [0.299, 0.587, 0.114])
        kernel = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
        red, green, blue = picture.astype(float).transpose(2, 0, 1)
        rg, yb = red - green, (red + green) / 2 - blue
        # OpenCV's luma may round another way in a few pixels
        assert found["brightness"][index] == pytest.approx(luma.mean() / 255, abs=1e-3)
        assert found["entropy"][index] == pytest.approx(shannon_entropy(luma), abs=2e-3)
        assert found["sharpness"][index] == pytest.approx(convolve(luma, kernel, mode="mirror").var(), rel=5e-3)
        expected = np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean())
        assert found["colourfulness"][index] == pytest.approx(expected, rel=1e-5)


def test_blur_lowers_sharpness_and_a_single_pixel_has_none(photographs: list[np.ndarray]):
    small = Image.fromarray(photographs[0]).resize((64, 64))
    blurred = np.asarray(small.resize((512, 512)))
    found = probe(photographs[0], blurred, np.full((1, 1, 3), 9, np.uint8))
    assert found["sharpness"][1] < found["sharpness"][0] / 4
    assert found["sharpness"][2] == 0
