"""Real models over real pictures: what people see in them (`named_pictures`) and what the models say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from batches import make_batch
from named_pictures import NAMED, NamedPicture

from mmdata.batch import Batch
from mmdata.models.offline import CLASSIFIER_SIZE, ConseEncoder
from mmdata.stage import Pixels, Stage
from mmdata.stages.detect_faces import DetectFaces, DetectFacesOptions
from mmdata.stages.detect_language import DetectLanguage, DetectLanguageOptions
from mmdata.stages.detect_nudity import DetectNudity, DetectNudityOptions
from mmdata.stages.detect_text import DetectText, DetectTextOptions
from mmdata.stages.embed_text import EmbedText, EmbedTextOptions

SIDES = ("left", "top", "right", "bottom")
SUBJECTS = [named for named in NAMED if named.subject]
SAID = [named for named in NAMED if named.said]

by_name = pytest.mark.parametrize("named", NAMED, ids=lambda named: named.name.rpartition("/")[2])


def answers(stage: Stage[Any], batch: Batch) -> dict[str, list[Any]]:
    stage.batch_shape = stage.contract(stage.options).batch_shape
    stage.open("cpu")
    return {n: v.to_pylist() if isinstance(v, pa.Array) else list(v) for n, v in stage.compute(batch).items()}


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    """Picture's name → everything that the detectors say of it."""
    batch = make_batch([n.pixels for n in NAMED], caption=[n.caption for n in NAMED])
    columns: dict[str, list[Any]] = {}
    # Smaller than the defaults, for the test's time; more than enough for these letters.
    columns |= answers(DetectText(DetectTextOptions(max_side_px=640, min_side_px=320)), batch)
    columns |= answers(DetectFaces(DetectFacesOptions()), batch)
    columns |= answers(DetectNudity(DetectNudityOptions()), batch)
    return {n.name: {c: values[i] for c, values in columns.items()} for i, n in enumerate(NAMED)}


def test_there_are_twenty_and_more():
    assert len({n.name for n in NAMED}) >= 20


@by_name
def test_words(found: dict[str, dict[str, Any]], named: NamedPicture):
    read = found[named.name]["ocr_text"].upper().replace(".", " ").replace("-", " ").split()
    if named.name == "page":
        assert set(named.words) <= set(read)
    else:
        assert sorted(read) == sorted(named.words)
    written = sum(box["right"] > box["left"] for box in found[named.name]["ocr_boxes"])
    assert (written > 0) == (found[named.name]["ocr_area_ratio"] > 0) == bool(named.words)


def test_caption_words_seen(found: dict[str, dict[str, Any]]):
    """Hand arithmetic: one of the three words of `a stop sign` is written, and all that is written is in it."""
    expected = {
        "town/roadsigns/stop": (1 / 3, 1),
        "town/roadsigns/give_way_sign": (2 / 4, 1),
        "sports/australian_rules_football": (0, 0),
        "coffee": (0, None),
    }
    for name, shares in expected.items():
        row = found[name]
        assert (row["ocr_caption_ratio"], row["ocr_in_caption_ratio"]) == pytest.approx(shares)


@by_name
def test_faces(found: dict[str, dict[str, Any]], named: NamedPicture):
    row = found[named.name]
    assert row["faces_count"] == len(row["faces_boxes"]) == (named.face is not None)
    if named.face is not None:
        left, top, right, bottom = (row["faces_boxes"][0][side] for side in SIDES)
        assert left <= named.face[0] < named.face[2] <= right
        assert top <= named.face[1] < named.face[3] <= bottom
        # And hardly more than the head.
        assert (right - left) * (bottom - top) < 3 * (named.face[2] - named.face[0]) * (named.face[3] - named.face[1])


@by_name
def test_nudity(found: dict[str, dict[str, Any]], named: NamedPicture):
    """Nobody is naked in these; the detector's false alarms are known, below 0.75, and no other is raised."""
    row = found[named.name]
    assert (row["nudity_score"] > 0) == (named.alarm is not None)
    assert row["nudity_score"] < 0.75
    if named.alarm is not None:
        assert named.alarm in row["nudity_labels"]
    if named.face is not None:
        assert [label.partition("_")[0] for label in row["nudity_labels"]] == ["FACE"]


def test_conse_tells_subjects_apart():
    """Each picture with each subject, as `score_conse` scores them: its own is the best of all."""
    variant = Pixels(size=CLASSIFIER_SIZE, fit="pad", resample="bilinear")
    encoder = ConseEncoder("cpu", 16)
    images = encoder.images(make_batch([n.pixels for n in SUBJECTS]).pixels(variant))
    best = (images @ encoder.texts([str(n.subject) for n in SUBJECTS]).T).argmax(axis=1)
    assert [SUBJECTS[i].subject for i in best] == [n.subject for n in SUBJECTS]
    assert len(SUBJECTS) >= 8


def test_sentences_find_their_captions():
    """A sentence in other words is nearer to its caption than to any other of the table."""
    texts = [n.caption for n in NAMED] + [n.said for n in SAID]
    vectors = np.array(answers(EmbedText(EmbedTextOptions()), make_batch(caption=texts))["text_embedding"], np.float32)
    captions, said = vectors[: len(NAMED)], vectors[len(NAMED) :]
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-2)
    nearest = (said @ captions.T).argmax(axis=1)
    assert [NAMED[i].caption for i in nearest] == [n.caption for n in SAID]
    assert len(SAID) >= 10


def test_languages_of_a_caption():
    """The stop sign's caption in languages of nine scripts, named by who translated it."""
    codes = ["ar", "bg", "cs", "de", "el", "es", "fi", "fr", "hu", "it", "ja", "ko", "nl", "pl", "pt", "ru", "sv", "th"]
    texts = [NAMED[0].translations[code] for code in codes]
    found = answers(DetectLanguage(DetectLanguageOptions()), make_batch(caption=[*texts, NAMED[0].caption]))
    assert found["language"] == [*codes, "en"]
