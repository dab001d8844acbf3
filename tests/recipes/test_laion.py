"""The thresholds of LAION-400M and LAION-5B on rows that stand on either side of them, by the shipped filters."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from tiny_clip import save_tiny_clip
from tiny_transformers import save_tiny_vit

from mmdata import catalogue
from mmdata.filters import FilterEngine, check_filter
from mmdata.plan import plan_recipe
from mmdata.recipe import parse

TYPES = {
    "text_char_count": pa.int64(),
    "size_bytes": pa.int64(),
    "clip_score": pa.float32(),
    "mclip_score": pa.float32(),
    "language": pa.string(),
    "nsfw_label": pa.string(),
    "nsfw_minor_words": pa.bool_(),
    "nsfw_minor_image": pa.bool_(),
    "nsfw_animal_image": pa.bool_(),
}


def keeps(recipe: str, name: str, **row: Any) -> bool:
    """Whether the filter of that name, as the recipe has it, keeps a row with these values."""
    steps = yaml.safe_load(catalogue.shipped_recipe(recipe))["steps"]
    [sql] = [s["filter"][name] for s in steps if isinstance(s, dict) and name in s.get("filter", {})]
    table = pa.table({n: pa.array([row.get(n)], t) for n, t in TYPES.items()})
    return bool(FilterEngine().evaluate(table, check_filter(name, sql, table.schema)).tolist() == [1])


@pytest.mark.parametrize("recipe", ["laion400m", "laion5b"])
def test_five_characters_and_five_kilobytes(recipe: str):
    assert not keeps(recipe, "long_enough", text_char_count=4)
    assert keeps(recipe, "long_enough", text_char_count=5)
    assert not keeps(recipe, "long_enough", text_char_count=None)
    assert not keeps(recipe, "heavy_enough", size_bytes=5119)
    assert keeps(recipe, "heavy_enough", size_bytes=5120)


def test_laion400m_keeps_a_cosine_of_three_tenths():
    assert not keeps("laion400m", "aligned", clip_score=0.2999)
    assert keeps("laion400m", "aligned", clip_score=0.3)
    assert not keeps("laion400m", "aligned", clip_score=None)


def test_laion5b_has_a_threshold_for_english_and_one_for_the_rest():
    def kept(language: str | None, **scores: float | None) -> bool:
        return keeps("laion5b", "aligned", language=language, **scores)

    assert not kept("en", clip_score=0.2799, mclip_score=0.9)
    assert kept("en", clip_score=0.28, mclip_score=0.1)
    assert not kept("de", clip_score=0.9, mclip_score=0.2599)
    assert kept("de", clip_score=0.1, mclip_score=0.26)
    assert kept(None, clip_score=0.1, mclip_score=0.26)  # in no language
    assert not kept(None, clip_score=0.9, mclip_score=0.2599)
    assert not kept("en", clip_score=None, mclip_score=None)
    assert not kept("de", clip_score=None, mclip_score=None)


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("no_minor_words", "nsfw_minor_words"),
        ("no_minors", "nsfw_minor_image"),
        ("no_animals", "nsfw_animal_image"),
    ],
)
def test_laion400m_drops_what_looks_unsafe_with_minors_or_animals(name: str, column: str):
    truth = {
        ("NSFW", True): False,
        ("UNSURE", True): False,
        ("UNLIKELY", True): True,
        ("NSFW", False): True,
        ("UNSURE", False): True,
        ("UNLIKELY", False): True,
        (None, True): False,  # not known is not safe
        ("NSFW", None): False,
    }
    assert {c: keeps("laion400m", name, nsfw_label=c[0], **{column: c[1]}) for c in truth} == truth


def test_the_steps_that_laion5b_only_shows_are_steps(tmp_path: Path):
    """Its tags and its aesthetic subset, with the comment signs taken away and models in their places."""
    text = catalogue.shipped_recipe("laion5b")
    text, count = re.subn(r"^  # (- .*)$", r"  \1", text, flags=re.M)
    assert count == 6
    clip = save_tiny_clip(tmp_path / "clip")
    vit = save_tiny_vit(tmp_path / "vit", ("nsfw", "watermark", "other"))
    (tmp_path / "head.pth").write_bytes(b"read when it is opened")
    text = text.replace("FOLDER", vit).replace("FILE", str(tmp_path / "head.pth"))
    document = yaml.safe_load(text)
    for step in document["steps"]:
        if isinstance(step, dict) and "score_clip" in step:
            step["score_clip"] |= {"model": clip}
            del step["score_clip"]["pretrained"]
    steps = plan_recipe(parse(document)).steps
    assert [s.name for s in steps[-7:]] == [
        "unsafe",
        "marked",
        "safe",
        "unmarked",
        "large",
        "score_aesthetic",
        "pretty",
    ]
    # LAION's announcement: unsafe above 0.5, marked above 0.8, LAION-Aesthetics from 4.5 on
    for name, column, stays, goes in (
        ("safe", "unsafe_nsfw", 0.5, 0.5001),
        ("unmarked", "marked_watermark", 0.8, 0.8001),
        ("pretty", "aesthetic_score", 4.5, 4.4999),
    ):
        [expression] = [s.expression for s in steps if s.name == name]
        assert expression is not None
        table = pa.table({column: pa.array([stays, goes, None], pa.float64())})
        assert FilterEngine().evaluate(table, expression).tolist() == [1, 0, -1]
