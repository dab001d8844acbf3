"""Scores of mirrored pictures and of those whose text is painted over, against open_clip on pictures made by numpy."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pytest
import skimage
import synthetic
import torch
from batches import make_batch, noise, png
from PIL import Image
from tiny_clip import save_tiny_clip

import mmdata
from mmdata import registry
from mmdata.errors import RecipeError
from mmdata.isolate import StepTracker, compute_rows
from mmdata.stage import Contract, Failed, Options, Pixels, Stage
from mmdata.stages.score_clip import ScoreClip, ScoreClipOptions

BOX = pa.struct([(side, pa.float32()) for side in ("left", "top", "right", "bottom")])
CAPTION = "a cup of coffee"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="module")
def stages(tiny: str) -> dict[str, ScoreClip]:
    given: dict[str, dict[str, Any]] = {"plain": {}, "flipped": {"flipped": True}, "masked": {"masked": "text_at"}}
    given["both"] = {"flipped": True, "masked": "text_at", "embeddings": ["image"]}
    found = {name: ScoreClip(ScoreClipOptions(model=tiny, **options)) for name, options in given.items()}
    for stage in found.values():
        stage.open("cpu")
    return found


def score(stage: ScoreClip, pictures: list[np.ndarray], boxes: list[Any]) -> list[float | None]:
    batch = make_batch(pictures, caption=[CAPTION] * len(pictures), text_at=pa.array(boxes, pa.list_(BOX)))
    return stage.compute(batch)["clip_score"].to_pylist()


@functools.cache
def loaded(tiny: str) -> tuple[Any, Any]:
    model, _, transform = open_clip.create_model_and_transforms(tiny)
    return model.eval(), transform


def oracle(tiny: str, picture: np.ndarray) -> float:
    model, transform = loaded(tiny)
    with torch.no_grad():
        answer = model(transform(Image.fromarray(picture))[None], open_clip.get_tokenizer(tiny)([CAPTION]))
    return float((answer[0] * answer[1]).sum())


def box(left: int, top: int, right: int, bottom: int) -> dict[str, float]:
    return {"left": left, "top": top, "right": right, "bottom": bottom}


def test_flipped_is_the_mirrored_picture(tiny: str, stages: dict[str, ScoreClip]) -> None:
    picture = skimage.data.coffee()
    [found] = score(stages["flipped"], [picture], [[]])
    assert found == pytest.approx(oracle(tiny, np.fliplr(picture)), abs=1e-5)
    assert found != pytest.approx(oracle(tiny, picture), abs=1e-4)
    mirrored = np.ascontiguousarray(np.fliplr(picture))
    assert score(stages["plain"], [mirrored], [[]]) == [found]


def test_no_text_found_is_the_very_score(stages: dict[str, ScoreClip]) -> None:
    pictures = [skimage.data.coffee(), noise(90, 70, 3)]
    assert score(stages["masked"], pictures, [[], []]) == score(stages["plain"], pictures, [[], []])


def test_masked_is_the_picture_with_its_boxes_painted_over(tiny: str, stages: dict[str, ScoreClip]) -> None:
    picture = np.full((120, 160, 3), (200, 150, 90), np.uint8)
    picture[10:100, 20:60] = skimage.data.coffee()[100:190, 100:140]
    clean = picture.copy()
    picture[20:60, 80:140] = noise(40, 60, 5)
    cells = [[box(80, 20, 140, 60)], None]
    found = score(stages["masked"], [picture, picture], cells)
    assert found[0] == pytest.approx(oracle(tiny, clean), abs=1e-5)
    assert found[0] != pytest.approx(oracle(tiny, picture), abs=1e-4)
    assert found[1] is None  # boxes that nobody knows: text cannot be told from the rest
    [both, _] = score(stages["both"], [picture, picture], cells)
    assert both == pytest.approx(oracle(tiny, np.fliplr(clean)), abs=1e-5)


def test_a_row_without_boxes_has_no_embedding_and_a_cell_that_holds_none_fails_alone(
    stages: dict[str, ScoreClip],
) -> None:
    stage = stages["both"]
    broken = [box(30, 30, 20, 40)]
    batch = make_batch(
        [noise(50, 50, i) for i in range(3)],
        caption=[CAPTION, None, CAPTION],
        text_at=pa.array([None, [], broken], pa.list_(BOX)),
    )
    results = compute_rows(stage, stage.contract(stage.options), batch, StepTracker("score_clip"))
    assert isinstance(results[0], dict)
    assert isinstance(results[1], dict)
    assert results[0] == {"clip_score": None, "clip_image_embedding": None}
    assert results[1]["clip_score"] is None
    assert np.linalg.norm(results[1]["clip_image_embedding"].astype(float)) == pytest.approx(1, abs=1e-3)
    assert results[2] == Failed("bad_boxes")


class FindBoxes(Stage[Options]):
    """The same box in every picture whose number is even."""

    name, label = "find_boxes", "found"

    @classmethod
    def contract(cls, options: Options) -> Contract:
        schema = pa.schema([("found_boxes", pa.list_(BOX))])
        return Contract(writes=schema, reads=("number", "image"), pixels=(Pixels(),))

    def compute(self, batch: Any) -> dict[str, Any]:
        return {"found_boxes": [[box(2, 2, 6, 6)] if n % 2 == 0 else [] for n in batch["number"]]}


def test_boxes_of_a_step_before_are_masked_in_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: str, stages: dict[str, ScoreClip]
) -> None:
    """Flat pictures with a bright box: painted over, they have the score of a picture that is all flat."""
    registry.register(FindBoxes)
    monkeypatch.setenv("MMDATA_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})

    def picture(number: int) -> bytes:
        flat = np.full((8, 8, 3), 90, np.uint8)
        if number % 2 == 0:
            flat[2:6, 2:6] = noise(4, 4, number)
        return png(flat)

    masked, bare = {"model": tiny, "masked": "found_boxes"}, {"model": tiny, "as": "bare"}
    steps = ["find_boxes", {"score_clip": masked}, {"score_clip": bare}]
    document = synthetic.make_dataset(tmp_path, [2, 3, 4, 5, 6], picture=picture)
    ds = mmdata.run({**document, "steps": steps}, runner="inline")
    rows = ds.sql("SELECT number, clip_score, bare_score FROM samples ORDER BY number").fetchall()
    captions = {n: f"picture of {n}" for n in (2, 3, 4, 5, 6)}
    flat = np.full((8, 8, 3), 90, np.uint8)
    expected = (
        stages["plain"].compute(make_batch([flat] * 5, caption=list(captions.values())))["clip_score"].to_pylist()
    )
    assert [masked for _, masked, _ in rows] == expected
    assert [masked == bare for _, masked, bare in rows] == [False, True, False, True, False]


@pytest.mark.parametrize("wrong", ["found_scores", "found_name"])
def test_a_column_that_can_hold_no_boxes_is_refused_before_anything_runs(tiny: str, wrong: str) -> None:
    four = pa.list_(pa.list_(pa.float64()))  # as a list of URLs has them
    kinds = {"caption": pa.string(), "found_boxes": pa.list_(BOX), "four": four}
    schema = pa.schema({**kinds, "found_scores": pa.list_(pa.float32()), "found_name": pa.string()})
    for right in ("found_boxes", "four", None):
        ScoreClip.check_types(ScoreClipOptions(model=tiny, masked=right), schema)
    with pytest.raises(RecipeError, match=f"masked names column '{wrong}', which is .*; expected a list of boxes"):
        ScoreClip.check_types(ScoreClipOptions(model=tiny, masked=wrong), schema)
    with pytest.raises(RecipeError, match=r"column names column 'found_boxes', which is .*; expected text"):
        ScoreClip.check_types(ScoreClipOptions(model=tiny, column="found_boxes"), schema)


def test_what_enters_the_identity() -> None:
    plain = {"size": 224, "fit": "center_crop", "resample": "bicubic", "scaled": False}
    assert Pixels(224).document == plain
    assert Pixels(224, flipped=True).document == {**plain, "flipped": True}
    assert Pixels(224, masked="a").document == Pixels(224, masked="b").document == {**plain, "masked": True}
    with pytest.raises(ValueError, match="cannot be decoded at a scale"):
        Pixels(224, masked="a", scaled=True)
