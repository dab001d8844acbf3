"""LAION-400M's rules 6 to 10: the truth table of three, by vectors whose closest categories are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pytest
import torch
from batches import make_batch
from tiny_clip import save_tiny_clip

from mmdata.errors import RecipeError
from mmdata.stages.score_nsfw_zero_shot import ScoreNsfwZeroShot, ScoreNsfwZeroShotOptions

NSFW, SAFE = ("bad one", "bad two"), ("good one", "good two", "good three")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="module")
def prompts(tiny: str) -> dict[str, np.ndarray]:
    """open_clip's own text encoder over every category of the test, one at a time."""
    model, _, _ = open_clip.create_model_and_transforms(tiny)
    tokenizer = open_clip.get_tokenizer(tiny)
    found = {}
    for name in (*NSFW, *SAFE, "a baby", "an adult", "an object", "a dog", "a person", "a place"):
        with torch.no_grad():
            found[name] = model.eval().encode_text(tokenizer([f"a photo of {name}"]), normalize=True)[0].numpy()
    return found


def opened(model: str, **options: Any) -> ScoreNsfwZeroShot:
    lists: dict[str, Any] = {
        "prompt": "a photo of {}",
        "nsfw": NSFW,
        "safe": SAFE,
        "minor": ["a baby"],
        "adult": ["an adult", "an object"],
        "animal": ["a dog"],
        "no_animal": ["a person", "a place"],
    }
    stage = ScoreNsfwZeroShot(ScoreNsfwZeroShotOptions(model=model, **{**lists, **options}))
    stage.open("cpu")
    return stage


Row = dict[str, Any]


def rows(stage: ScoreNsfwZeroShot, vectors: list[np.ndarray | None], captions: list[str | None]) -> list[Row]:
    column = pa.array([None if v is None else v.astype(np.float16) for v in vectors], pa.list_(pa.float16(), 32))
    found = stage.compute(make_batch(None, clip_image_embedding=column, caption=pa.array(captions, pa.string())))
    return [{n: found[n][i] for n in found} for i in range(len(vectors))]


def toward(prompts: dict[str, np.ndarray], names: tuple[str, ...], wanted: tuple[str, ...]) -> np.ndarray:
    """A vector whose cosines with these prompts are 0.9 and 0.8 for the two wanted, and 0 for the others."""
    matrix = np.stack([prompts[n] for n in names]).astype(np.float64)
    goal = np.array([0.9 - 0.1 * wanted.index(n) if n in wanted else 0.0 for n in names])
    return np.asarray(np.linalg.pinv(matrix) @ goal, np.float64)


@pytest.fixture(scope="module")
def stage(tiny: str) -> ScoreNsfwZeroShot:
    return opened(tiny)


def test_truth_table_of_three(stage: ScoreNsfwZeroShot, prompts: dict[str, np.ndarray]):
    table = {
        ("bad one", "bad two"): "NSFW",
        ("bad two", "bad one"): "NSFW",
        ("bad one", "good three"): "UNSURE",
        ("good one", "bad two"): "UNSURE",
        ("good two", "good one"): "UNLIKELY",
    }
    vectors = [toward(prompts, NSFW + SAFE, two) for two in table]
    found = rows(stage, vectors, ["x"] * len(table))
    assert [r["nsfw_label"] for r in found] == list(table.values())
    assert [tuple(r["nsfw_top"]) for r in found] == list(table)


def test_minors_and_animals_are_sought_among_the_best_two(stage: ScoreNsfwZeroShot, prompts: dict[str, np.ndarray]):
    people, beasts = ("a baby", "an adult", "an object"), ("a dog", "a person", "a place")
    found = rows(
        stage,
        [
            toward(prompts, people, ("a baby", "an adult")),
            toward(prompts, people, ("an object", "a baby")),
            toward(prompts, people, ("an object", "an adult")),
            toward(prompts, beasts, ("a person", "a dog")),
            toward(prompts, beasts, ("a person", "a place")),
        ],
        [None] * 5,
    )
    assert [r["nsfw_minor_image"] for r in found[:3]] == [True, True, False]
    assert [r["nsfw_animal_image"] for r in found[3:]] == [True, False]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("two Children at the sea", True),
        ("CHILDREN", True),
        ("a grown-up; a kid, a dog", True),
        ("childish kidneys", False),
        ("", False),
        ("an under-age drinker", True),
        ("girl's bicycle", True),
        ("自転車 🐈", False),
        (None, None),
        ("word " * 200_000 + "teen", True),
    ],
)
def test_words_for_minors_are_matched_whole(stage: ScoreNsfwZeroShot, caption: str | None, expected: bool | None):
    [row] = rows(stage, [np.ones(32)], [caption])
    assert row["nsfw_minor_words"] is expected


def test_other_words_and_none(tiny: str):
    assert rows(opened(tiny, minor_words=["K.I.N.D"]), [None], ["das K.i.n.d"])[0]["nsfw_minor_words"] is True
    assert rows(opened(tiny, minor_words=["a.b"]), [None], ["axb"])[0]["nsfw_minor_words"] is False
    assert rows(opened(tiny, minor_words=[]), [None], ["a child"])[0]["nsfw_minor_words"] is False


def test_no_embedding_is_no_label(stage: ScoreNsfwZeroShot):
    for vector in (None, np.zeros(32)):
        [row] = rows(stage, [vector], ["a child"])
        assert row == {
            "nsfw_label": None,
            "nsfw_top": None,
            "nsfw_minor_words": True,
            "nsfw_minor_image": None,
            "nsfw_animal_image": None,
        }


def test_what_is_refused(tiny: str, stage: ScoreNsfwZeroShot):
    with pytest.raises(RecipeError, match="'food' is twice in nsfw and safe"):
        ScoreNsfwZeroShot.contract(ScoreNsfwZeroShotOptions(model=tiny, nsfw=["food"], safe=["food", "art"]))
    with pytest.raises(ValueError, match="where the category goes, once"):
        ScoreNsfwZeroShotOptions(prompt="a photo")
    batch = make_batch(None, clip_image_embedding=pa.array([np.ones(8)], pa.list_(pa.float16(), 8)), caption=["x"])
    with pytest.raises(RecipeError, match=r"have 8 numbers, and model local-dir:.* wants 32"):
        stage.compute(batch)
    # Before anything has run, too: what is embedded has the width that the column's type says.
    for width, refused in ((32, False), (8, True)):
        columns = [("caption", pa.string()), ("clip_image_embedding", pa.list_(pa.float16(), width))]
        if refused:
            with pytest.raises(RecipeError, match=r"have 8 numbers, and model local-dir:.* wants 32"):
                ScoreNsfwZeroShot.check_types(stage.options, pa.schema(columns))
        else:
            ScoreNsfwZeroShot.check_types(stage.options, pa.schema(columns))
