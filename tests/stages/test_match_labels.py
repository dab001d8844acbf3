"""Labels that captions name, against pairs looked at by hand."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from batches import make_batch

from mmdata.errors import RecipeError
from mmdata.models.stems import Stemmer
from mmdata.stages.match_labels import MatchLabels, MatchLabelsOptions

TOP = pa.list_(pa.struct([("label", pa.string()), ("score", pa.float32())]))


@pytest.fixture(scope="module")
def stage() -> MatchLabels:
    opened = MatchLabels(MatchLabelsOptions())
    opened.open("cpu")
    return opened


def match(stage: MatchLabels, text: str | None, labels: Any, kind: pa.DataType = TOP) -> int | None:
    batch = make_batch(caption=pa.array([text], pa.string()), classify_image_top=pa.array([labels], kind))
    [count] = stage.compute(batch)["matched_labels_count"]
    return count


def top(*labels: str | None) -> list[dict[str, Any]]:
    return [{"label": label, "score": 0.1} for label in labels]


@pytest.mark.parametrize(
    ("text", "labels", "count"),
    [
        ("Three dogs running on grass", ["dog", "running", "cat"], 2),  # dogs, dog: run, running
        ("retrievers at play", ["golden retriever", "Labrador retriever"], 2),
        ("a cup of tea", ["bag of nails"], 0),  # they share "of" alone
        ("category theory", ["cat"], 0),
        ("PONIES!", ["pony"], 1),  # Porter: poni
        ("a red bicycle", [], 0),
        ("", ["dog"], 0),
        ("两只红狗", ["dog"], 0),
        (None, ["dog"], None),
    ],
)
def test_labels_that_a_caption_names(stage: MatchLabels, text: str | None, labels: list[str], count: int | None):
    assert match(stage, text, top(*labels)) == count
    assert match(stage, text, labels, pa.list_(pa.string())) == count


def test_a_single_label_and_none(stage: MatchLabels):
    assert match(stage, "a dog", "dogs", pa.string()) == 1
    assert match(stage, "a dog", None) is None
    assert match(stage, "a dog", top("dog", None)) == 1


@pytest.mark.parametrize(
    ("kind", "good"),
    [
        (TOP, True),
        (pa.string(), True),
        (pa.list_(pa.string()), True),
        (pa.float32(), False),
        (pa.list_(pa.int64()), False),
    ],
)
def test_a_column_without_labels_is_refused(kind: pa.DataType, good: bool):
    options, schema = MatchLabelsOptions(labels="seen"), pa.schema([("caption", pa.string()), ("seen", kind)])
    if good:
        MatchLabels.check_types(options, schema)
    else:
        with pytest.raises(RecipeError, match="'seen'"):
            MatchLabels.check_types(options, schema)


def test_a_long_word_is_its_own_stem_and_not_remembered():
    stemmer = Stemmer()
    assert stemmer.stem("running") == "run"
    assert stemmer.stem("running" * 20_000) == "running" * 20_000
    assert stemmer._remembered.cache_info().currsize == 1
