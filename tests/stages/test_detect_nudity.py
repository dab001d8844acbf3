"""Body parts as the package itself finds them, in photographs that anyone may look at."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import skimage
from batches import make_batch
from nudenet import NudeDetector
from nudenet import nudenet as package
from PIL import Image
from pydantic import ValidationError

from mmdata.models.nudity import CLASSES
from mmdata.stages.detect_nudity import DetectNudity, DetectNudityOptions


@pytest.fixture(scope="module")
def stage() -> DetectNudity:
    opened = DetectNudity(DetectNudityOptions())
    opened.open("cpu")
    return opened


def three(picture: np.ndarray) -> np.ndarray:
    return picture if picture.ndim == 3 else np.stack([picture] * 3, axis=2)


def detect(stage: DetectNudity, *pictures: np.ndarray) -> list[dict[str, Any]]:
    cells = {name: column.to_pylist() for name, column in stage.compute(make_batch(list(pictures))).items()}
    return [{name.removeprefix("nudity_"): values[i] for name, values in cells.items()} for i in range(len(pictures))]


def test_equals_the_package(stage: DetectNudity):
    """Pictures wide, tall and square; boxes to within the px that the package rounds down to."""
    astronaut = skimage.data.astronaut()
    pictures = [astronaut, astronaut[:400, 100:350], np.tile(astronaut[:300], (1, 2, 1)), three(skimage.data.moon())]
    theirs = NudeDetector()
    found = detect(stage, *pictures)
    assert [len(row["boxes"]) for row in found] == [1, 1, 2, 2]
    for picture, row in zip(pictures, found, strict=True):
        expected = theirs.detect(picture[:, :, ::-1].copy())  # blue, green, red, as it reads a file
        assert row["labels"] == [e["class"] for e in expected]
        assert row["scores"] == pytest.approx([e["score"] for e in expected], abs=1e-5)
        for box, e in zip(row["boxes"], expected, strict=True):
            left, top, width, height = e["box"]
            ends = (left, top, left + width, top + height)
            assert [box[n] for n in ("left", "top", "right", "bottom")] == pytest.approx(ends, abs=2)


def test_classes_are_the_packages():
    assert list(CLASSES) == vars(package)["__labels"]


def test_only_what_counts_makes_the_score(stage: DetectNudity):
    """The moon passes for a bare belly, which is not among the classes that count; asked for, it is."""
    moon = three(skimage.data.moon())
    [row] = detect(stage, moon)
    assert set(row["labels"]) == {"BELLY_EXPOSED"}
    assert row["score"] == 0
    belly = DetectNudity(DetectNudityOptions(classes=("BELLY_EXPOSED", "FEET_EXPOSED")))
    belly._model = stage._model
    [row] = detect(belly, moon)
    assert row["score"] == max(row["scores"]) > 0.3


def test_the_surest_first_and_none_below_the_confidence(stage: DetectNudity):
    moon = three(skimage.data.moon())
    [row] = detect(stage, moon)
    assert row["scores"] == sorted(row["scores"], reverse=True)
    strict = DetectNudity(DetectNudityOptions(min_confidence=0.35))
    strict._model = stage._model
    assert detect(strict, moon)[0]["scores"] == [s for s in row["scores"] if s >= 0.35] == row["scores"][:1]


@pytest.mark.parametrize("shape", [(1, 1), (20, 20_000), (20_000, 20), (2, 3)])
def test_any_shape(stage: DetectNudity, shape: tuple[int, int]):
    [row] = detect(stage, np.full((*shape, 3), 128, np.uint8))
    assert row == {"boxes": [], "labels": [], "scores": [], "score": 0}


def test_a_very_large_picture_is_in_its_own_px(stage: DetectNudity):
    """From 5,120 px on a picture is shrunk before it is padded."""
    astronaut = skimage.data.astronaut()
    large = np.asarray(Image.fromarray(astronaut).resize((5200, 5200)))
    small, big = (stage._model.find(p, 0.25) for p in (astronaut, large))
    assert big.labels == small.labels == ["FACE_FEMALE"]
    assert big.boxes * (512 / 5200) == pytest.approx(small.boxes, abs=12)


@pytest.mark.parametrize("classes", [("BELLY",), ()])
def test_unknown_classes_are_refused(classes: tuple[str, ...]):
    with pytest.raises(ValidationError, match="BUTTOCKS_EXPOSED"):
        DetectNudityOptions(classes=classes)
