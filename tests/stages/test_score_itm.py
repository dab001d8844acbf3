"""Matching probabilities against transformers' own forward pass, on a tiny BLIP with random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from batches import make_batch, noise
from PIL import Image
from tiny_blip import MEAN, SIZE, STD, save_tiny_blip
from transformers import AutoTokenizer, BlipForImageTextRetrieval, BlipImageProcessor

import mmdata
from mmdata.errors import RecipeError
from mmdata.stage import Pixels
from mmdata.stages.score_itm import ScoreItm, ScoreItmOptions

CAPTIONS = ["a red dog", "", "the old man reads a newspaper " * 20, "sale 50% off", "x" * 10_000_000]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_blip(tmp_path_factory.mktemp("blip") / "tiny")


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    return [skimage.data.coffee(), skimage.data.astronaut(), skimage.data.cat(), noise(32, 32, 1), noise(90, 31, 2)]


@pytest.fixture(scope="module")
def stage(tiny: str) -> ScoreItm:
    made = ScoreItm(ScoreItmOptions(model=tiny, batch_size=4))
    made.open("cpu")
    return made


def oracle(tiny: str, pictures: list[np.ndarray], captions: list[str]) -> list[float]:
    """One pair at a time, unpadded; pictures scaled by Pillow, as the authors' own transform does."""
    network = BlipForImageTextRetrieval.from_pretrained(tiny).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    found = []
    for picture, caption in zip(pictures, captions, strict=True):
        small = np.asarray(Image.fromarray(picture).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        planes = (torch.tensor(small / 255.0).float() - torch.tensor(MEAN)) / torch.tensor(STD)
        words = tokenizer(caption[:9999], truncation=True, max_length=35, return_tensors="pt")
        with torch.no_grad():
            answer = network(words["input_ids"], planes.permute(2, 0, 1)[None], attention_mask=words["attention_mask"])
        found.append(float(answer.itm_score.softmax(dim=-1)[0, 1]))
    return found


def test_equals_transformers(tiny: str, stage: ScoreItm, pictures: list[np.ndarray]) -> None:
    found = stage.compute(make_batch(pictures, caption=CAPTIONS))["itm_score"].to_pylist()
    assert found == pytest.approx(oracle(tiny, pictures, CAPTIONS), abs=1e-5)
    assert np.ptp(found) > 0.05  # or the oracle could not tell pairs apart
    assert all(0 <= p <= 1 for p in found)


def test_its_processor_gives_nearly_the_same(tiny: str, stage: ScoreItm) -> None:
    """Its own scales tensors where the authors scale Pillow's pictures; where nothing is scaled they agree."""
    picture = noise(SIZE, SIZE, 4)
    planes = BlipImageProcessor.from_pretrained(tiny)(Image.fromarray(picture), return_tensors="pt")["pixel_values"]
    words = AutoTokenizer.from_pretrained(tiny)(CAPTIONS[0], return_tensors="pt")
    network = BlipForImageTextRetrieval.from_pretrained(tiny).eval()
    with torch.no_grad():
        answer = network(words["input_ids"], planes, attention_mask=words["attention_mask"]).itm_score.softmax(dim=-1)
    [found] = stage.compute(make_batch([picture], caption=CAPTIONS[:1]))["itm_score"].to_pylist()
    assert found == pytest.approx(float(answer[0, 1]), abs=1e-5)


def test_no_caption_is_no_score(stage: ScoreItm, pictures: list[np.ndarray]) -> None:
    found = stage.compute(make_batch(pictures[:3], caption=[None, "a dog", None]))["itm_score"].to_pylist()
    assert [p is None for p in found] == [True, False, True]
    assert len(stage.compute(make_batch([], caption=[]))["itm_score"]) == 0


def test_what_a_plan_knows(tiny: str, tmp_path: Path) -> None:
    contract = ScoreItm.contract(ScoreItmOptions(model=tiny))
    assert contract.pixels == (Pixels(SIZE, "stretch", "bicubic"),)
    assert {Path(w.path or "").name for w in contract.weights} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert ScoreItm.contract(ScoreItmOptions()).pixels == (Pixels(384, "stretch", "bicubic"),)
    with pytest.raises(RecipeError, match="room for 48 tokens; max_tokens is 49"):
        ScoreItm(ScoreItmOptions(model=tiny, max_tokens=49)).open("cpu")
    (tmp_path / "other").mkdir()
    for name, text in (("config.json", '{"model_type": "vit"}'), ("model.safetensors", "")):
        (tmp_path / "other" / name).write_text(text)
    with pytest.raises(RecipeError, match="not a BLIP model"):
        ScoreItm.contract(ScoreItmOptions(model=str(tmp_path / "other")))


def test_the_hub_model_needs_its_commit_before_anything_runs(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    recipe = {
        "name": "x",
        "dataset": str(tmp_path / "d"),
        "source": {"kind": "images", "path": str(tmp_path)},
        "steps": ["score_itm"],
    }
    with pytest.raises(RecipeError, match=r"score_itm.*needs `revision`, the 40 hex digits of a commit"):
        mmdata.run(recipe, runner="inline")
    assert not (tmp_path / "d").exists()
