"""CLIPScore by hand and against open_clip's own forward pass with the published prompt and factor."""

from __future__ import annotations

from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pytest
import skimage
import torch
from batches import make_batch
from PIL import Image
from tiny_clip import save_tiny_clip

from mmdata.errors import RecipeError
from mmdata.stage import Pixels
from mmdata.stages.score_clipscore import ScoreClipscore, ScoreClipscoreOptions, clipscore, ref_clipscore

CAPTIONS = ["a cup of coffee", "", "a cat 🐈", None]
REFERENCES = [["coffee in a cup", "a spoon", None], ["nothing"], None, ["a rocket"]]


@pytest.fixture(scope="module")
def unlike(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model to which all of these pairs are unlike: their cosines are below 0."""
    return save_tiny_clip(tmp_path_factory.mktemp("clipscore") / "unlike")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same with all texts turned round, so that pairs are alike."""
    folder = tmp_path_factory.mktemp("clipscore") / "tiny"
    name, path = save_tiny_clip(folder), folder / "open_clip_model.pth"
    state = torch.load(path, weights_only=True)
    torch.save({**state, "text_projection": -state["text_projection"]}, path)
    return name


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    return [skimage.data.coffee(), skimage.data.astronaut(), skimage.data.cat(), skimage.data.rocket()]


def opened(**options: Any) -> ScoreClipscore:
    stage = ScoreClipscore(ScoreClipscoreOptions(**options))
    stage.open("cpu")
    return stage


def test_the_published_arithmetic() -> None:
    assert clipscore(0.3) == pytest.approx(0.75)
    assert clipscore(-0.1) == 0
    assert clipscore(1.0000001) == 2.5
    assert ref_clipscore(0.75, 0.5) == pytest.approx(0.6)
    assert ref_clipscore(0.75, -0.2) == ref_clipscore(0.0, 0.5) == ref_clipscore(0.0, 0.0) == 0


def test_equals_open_clip_with_the_prompt(tiny: str, pictures: list[np.ndarray]) -> None:
    stage = opened(model=tiny, references="refs", batch_size=2)
    refs = pa.array(REFERENCES, pa.list_(pa.string()))
    found = stage.compute(make_batch(pictures, caption=CAPTIONS, refs=refs))
    scores, ref_scores = (found[c].to_pylist() for c in ("clipscore_score", "clipscore_ref_score"))

    model, _, transform = open_clip.create_model_and_transforms(tiny)
    model.eval()
    tokenizer = open_clip.get_tokenizer(tiny)

    def text(words: str) -> torch.Tensor:
        return model.encode_text(tokenizer(["A photo depicts " + words]), normalize=True)[0].double()

    with torch.no_grad():
        for row, caption in enumerate(CAPTIONS[:3]):
            assert caption is not None
            image = model.encode_image(transform(Image.fromarray(pictures[row]))[None], normalize=True)[0].double()
            expected = 2.5 * max(0.0, float(image @ text(caption)))
            assert scores[row] == pytest.approx(expected, abs=1e-5)
            if row < 2:
                nearest = max(float(text(caption) @ text(r)) for r in REFERENCES[row] or () if r is not None)
                harmonic = 2 * expected * nearest / (expected + nearest) if expected > 0 < nearest else 0
                assert ref_scores[row] == pytest.approx(harmonic, abs=1e-5)
        plain = float(image @ model.encode_text(tokenizer(["a cat 🐈"]), normalize=True)[0].double())
    assert min(scores[:3]) > 0  # or the factor was not tried
    assert scores[2] != pytest.approx(2.5 * max(0.0, plain), abs=1e-4)  # the prompt tells
    assert scores[3] is None
    assert ref_scores[2:] == [None, None]  # no references; no caption


def test_below_zero_is_zero(unlike: str, pictures: list[np.ndarray]) -> None:
    found = opened(model=unlike).compute(make_batch(pictures, caption=CAPTIONS))
    assert found["clipscore_score"].to_pylist() == [0, 0, 0, None]
    assert list(found) == ["clipscore_score"]


def test_the_published_setting() -> None:
    options = ScoreClipscoreOptions()
    contract = ScoreClipscore.contract(options)
    assert contract.pixels == (Pixels(224, "center_crop", "bicubic"),)
    assert (options.model, options.pretrained) == ("ViT-B-32-quickgelu", "openai")
    assert contract.reads == ("image", "caption")
    assert contract.writes.names == ["clipscore_score"]


def test_one_reference_as_a_string_and_empty_batches(tiny: str, pictures: list[np.ndarray]) -> None:
    stage = opened(model=tiny, references="ref")
    one = pa.array([["a bowl"], ["a bowl"]], pa.list_(pa.string()))
    word = pa.array(["a bowl", "a bowl"])
    listed, bare = (
        stage.compute(make_batch(pictures[:2], caption=CAPTIONS[:2], ref=ref))["clipscore_ref_score"]
        for ref in (one, word)
    )
    assert listed == bare
    none = stage.compute(make_batch([], caption=pa.array([], pa.string()), ref=pa.array([], pa.string())))
    assert [len(v) for v in none.values()] == [0, 0]


def test_references_that_hold_no_text_are_refused_before_anything_runs(tiny: str) -> None:
    text, options = pa.string(), ScoreClipscoreOptions(model=tiny, references="refs")
    for right in (text, pa.list_(text), pa.large_string(), pa.large_list(pa.large_string())):
        ScoreClipscore.check_types(options, pa.schema([("caption", text), ("refs", right)]))
    for wrong in (pa.int64(), pa.list_(pa.int64())):
        with pytest.raises(RecipeError, match=r"references names column 'refs', which is .*; expected text"):
            ScoreClipscore.check_types(options, pa.schema([("caption", text), ("refs", wrong)]))
