"""Text labels against transformers' own pipeline on a tiny random model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from batches import make_batch
from tiny_transformers import LABELS, save_tiny_left_to_right, save_tiny_text_classifier
from transformers import pipeline

from mmdata.errors import RecipeError
from mmdata.stages.classify_text import ClassifyText, ClassifyTextOptions

CAPTIONS = ["a red dog", "", "the old man reads the newspaper, long sales", "x", "naïve café 自転車 🐈", "x dog " * 40]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_text_classifier(tmp_path_factory.mktemp("bert") / "softmax")


def opened(shape: int | None = None, **options: object) -> ClassifyText:
    stage = ClassifyText(ClassifyTextOptions(**options))
    stage.batch_shape = shape
    stage.open("cpu")
    return stage


def classify(stage: ClassifyText, captions: list[str | None]) -> dict[str, list[object]]:
    answer = stage.compute(make_batch(None, caption=pa.array(captions, pa.string())))
    return {n: v.to_pylist() for n, v in answer.items()}


def oracle(folder: str, captions: list[str]) -> list[dict[str, float]]:
    ask = pipeline("text-classification", model=folder, device="cpu")
    return [{o["label"]: o["score"] for o in ask(c, top_k=None, truncation=True, max_length=48)} for c in captions]


def test_equals_transformers_pipeline(tiny: str):
    found = classify(opened(2, model=tiny, labels=["Not Safe!"], top=9), CAPTIONS)
    expected = oracle(tiny, CAPTIONS)
    best = [sorted(e, key=e.__getitem__, reverse=True) for e in expected]
    assert found["classify_text_label"] == [b[0] for b in best]
    assert len(set(found["classify_text_label"])) > 1
    assert found["classify_text_score"] == pytest.approx([max(e.values()) for e in expected], abs=1e-5)
    assert [[one["label"] for one in row] for row in found["classify_text_top"]] == best
    assert found["classify_text_not_safe"] == pytest.approx([e["Not Safe!"] for e in expected], abs=1e-5)


def test_independent_labels(tmp_path: Path):
    folder = save_tiny_text_classifier(tmp_path / "many", LABELS, "multi_label_classification")
    found = classify(opened(model=folder, labels=["clean"]), CAPTIONS)
    assert found["classify_text_clean"] == pytest.approx([e["clean"] for e in oracle(folder, CAPTIONS)], abs=1e-5)
    sums = [sum(one["score"] for one in row) for row in found["classify_text_top"]]
    assert max(abs(s - 1) for s in sums) > 0.1


def test_a_model_that_reads_from_left_to_right(tmp_path: Path):
    """Its answer stands at the last token, whatever the padding; a text without a token has none."""
    folder = save_tiny_left_to_right(tmp_path / "gpt")
    texts = ["a red dog", "x", "the old man reads the newspaper one dog " * 3]
    stage = opened(4, model=folder, labels=["clean"])
    found = classify(stage, [*texts, "", " "])
    expected = [e["clean"] for e in oracle(folder, texts)]
    assert found["classify_text_clean"] == [*(pytest.approx(e, abs=1e-5) for e in expected), None, None]
    assert len({round(e, 3) for e in expected}) == 3
    with pytest.raises(RecipeError, match="no padding token"):
        opened(model=save_tiny_left_to_right(tmp_path / "unpadded", None))


def test_no_caption_is_no_label(tiny: str):
    stage = opened(model=tiny, labels=["clean"])
    for values in classify(stage, [None, "a dog", None]).values():
        assert [v is None for v in values] == [True, False, True]
    assert all(v == [None, None] for v in classify(stage, [None, None]).values())


def test_only_the_beginning_of_a_long_caption_is_looked_at(tiny: str):
    """48 tokens, 40 characters for each of them: 10 MB more change nothing."""
    stage = opened(model=tiny)
    long = classify(stage, ["red dog " * 1_300_000, "red dog " * 48, " " * 10_000_000 + "red"])
    assert long["classify_text_top"][0] == long["classify_text_top"][1]
    assert long["classify_text_top"][2] == classify(stage, [" "])["classify_text_top"][0]


def test_fewer_tokens_on_request(tiny: str):
    short = classify(opened(model=tiny, max_tokens=5), ["a red dog reads", "a red dog"])  # with [CLS] and [SEP]
    assert short["classify_text_top"][0] == short["classify_text_top"][1]
    with pytest.raises(RecipeError, match="room for 48 tokens; max_tokens is 49"):
        opened(model=tiny, max_tokens=49)
    with pytest.raises(RecipeError, match="max_tokens is 2, of which the tokenizer takes 2"):
        opened(model=tiny, max_tokens=2)


def test_a_picture_model_is_refused(tiny: str, tmp_path: Path):
    from tiny_transformers import save_tiny_vit

    with pytest.raises(RecipeError, match="no model of transformers for this task"):
        opened(model=save_tiny_vit(tmp_path / "vit"))
    shutil.copytree(tiny, tmp_path / "half")
    (tmp_path / "half" / "model.safetensors").write_bytes(b"PK not tensors")
    with pytest.raises(RecipeError, match="no model of transformers for this task"):
        opened(model=str(tmp_path / "half"))


def test_a_pickle_in_place_of_weights_is_not_run(tiny: str, tmp_path: Path):
    import os
    import pickle

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (os.mkdir, (str(tmp_path / "ran"),))

    shutil.copytree(tiny, tmp_path / "evil")
    (tmp_path / "evil" / "model.safetensors").unlink()
    (tmp_path / "evil" / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(RecipeError, match="no model of transformers for this task"):
        opened(model=str(tmp_path / "evil"))
    assert not (tmp_path / "ran").exists()


def test_labels_are_checked_at_plan(tiny: str):
    with pytest.raises(RecipeError, match="no label 'cleen'; did you mean 'clean'"):
        ClassifyText.contract(ClassifyTextOptions(model=tiny, labels=["cleen"]))
