"""CLIP scores against open_clip's own transform and forward pass, on a tiny checkpoint with random weights."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import pytest
import skimage
import torch
from batches import make_batch, noise
from PIL import Image
from tiny_clip import save_tiny_clip

from mmdata.errors import MissingExtra, RecipeError
from mmdata.models import clip
from mmdata.models.clip import image_size
from mmdata.stage import Pixels
from mmdata.stages.score_clip import ScoreClip, ScoreClipOptions

CAPTIONS = ["a cup of coffee", "", "a cat 🐈", "an astronaut " * 200, "naïve café\nterrace", "&amp; <b>bold</b>"]


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    data = skimage.data
    return [data.coffee(), data.astronaut(), data.cat(), noise(48, 48, 1), noise(500, 49, 2), noise(30, 200, 3)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny")


def opened(**options: object) -> ScoreClip:
    stage = ScoreClip(ScoreClipOptions(**options))
    stage.open("cpu")
    return stage


def score(stage: ScoreClip, pictures: list[np.ndarray], captions: list[str | None]) -> list[float | None]:
    batch = make_batch(pictures, caption=pa.array(captions, pa.string()))
    return stage.compute(batch)["clip_score"].to_pylist()


def oracle(model_name: str, pictures: list[np.ndarray], captions: list[str]) -> list[float]:
    """One pair at a time: open_clip's transform for PIL images, its tokenizer, its whole forward pass."""
    model, _, transform = open_clip.create_model_and_transforms(model_name)
    tokenizer = open_clip.get_tokenizer(model_name)
    model.eval()
    found = []
    for picture, caption in zip(pictures, captions, strict=True):
        with torch.no_grad():
            answer = model(transform(Image.fromarray(picture))[None], tokenizer([caption]))
        found.append(float((answer[0] * answer[1]).sum()))
    return found


def test_equals_open_clip(tiny: str, pictures: list[np.ndarray]):
    found = score(opened(model=tiny), pictures, CAPTIONS)
    assert found == pytest.approx(oracle(tiny, pictures, CAPTIONS), abs=1e-5)
    assert np.ptp(found) > 0.01  # or the oracle could not tell pairs apart


def test_equals_open_clip_with_stretched_bilinear_pictures(tmp_path: Path, pictures: list[np.ndarray]):
    name = save_tiny_clip(tmp_path / "stretched", resize_mode="squash", interpolation="bilinear")
    stage = opened(model=name, fit="stretch", resample="bilinear")
    assert score(stage, pictures, CAPTIONS) == pytest.approx(oracle(name, pictures, CAPTIONS), abs=1e-5)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_lower_precisions_stay_within_their_tolerance(tiny: str, pictures: list[np.ndarray], precision: str):
    found = score(opened(model=tiny, precision=precision), pictures, CAPTIONS)
    tolerance = ScoreClip.contract(ScoreClipOptions(model=tiny, precision=precision)).tolerance
    expected = oracle(tiny, pictures, CAPTIONS)
    assert found == pytest.approx(expected, abs=tolerance)
    assert found != expected


def test_no_caption_is_no_score(tiny: str, pictures: list[np.ndarray]):
    stage = opened(model=tiny)
    assert score(stage, pictures[:3], [None, "a", None])[::2] == [None, None]
    assert score(stage, pictures[:2], [None, None]) == [None, None]
    assert score(stage, [], []) == []


def test_more_rows_than_a_batch(tiny: str):
    many = [noise(48, 48, seed) for seed in range(5)]
    stage = ScoreClip(ScoreClipOptions(model=tiny))
    stage.batch_shape = 2
    stage.open("cpu")
    assert score(stage, many, ["x"] * 5) == pytest.approx(oracle(tiny, many, ["x"] * 5), abs=1e-5)


def test_size_comes_from_open_clips_configurations():
    expected = {name: open_clip.get_model_config(name)["vision_cfg"]["image_size"] for name in open_clip.list_models()}
    square = {n: s for n, s in expected.items() if not isinstance(s, list) or len(set(s)) == 1}
    assert len(square) > 100
    sides = {n: s[0] if isinstance(s, list) else s for n, s in square.items()}
    assert {name: image_size(name) for name in square} == sides
    assert ScoreClip.contract(ScoreClipOptions(model="ViT-L/14")).pixels == (Pixels(224),)


def test_unknown_model_is_told_at_plan():
    with pytest.raises(RecipeError, match=r"no model 'ViT-B-33'; near: .*ViT-B-32"):
        ScoreClip.contract(ScoreClipOptions(model="ViT-B-33"))


def test_weights_of_files_and_tags(tiny: str):
    folder = Path(tiny.removeprefix("local-dir:"))
    local = ScoreClip.contract(ScoreClipOptions(model=tiny)).weights
    assert [(w.name, w.path) for w in local] == [
        ("config", str(folder / "open_clip_config.json")),
        ("clip", str(folder / "open_clip_model.pth")),
    ]
    (tag,) = ScoreClip.contract(ScoreClipOptions()).weights
    assert (tag.fingerprint, tag.path) == (None, None)
    with pytest.raises(RecipeError, match=r"no file nowhere/model\.pt"):
        ScoreClip.contract(ScoreClipOptions(pretrained="nowhere/model.pt"))
    assert ScoreClip.resolve_weights(ScoreClipOptions(model=tiny)) == {}


def test_folder_with_two_checkpoints(tiny: str, tmp_path: Path):
    save_tiny_clip(tmp_path / "two")
    (tmp_path / "two" / "other.safetensors").write_bytes(b"")
    with pytest.raises(RecipeError, match=r"one checkpoint, but holds open_clip_model\.pth, other\.safetensors"):
        ScoreClip.contract(ScoreClipOptions(model=f"local-dir:{tmp_path / 'two'}"))


def test_weights_of_the_other_activation_are_refused():
    """open_clip lists ViT-L-14 with openai's weights, and warns that they want QuickGELU."""
    with pytest.raises(RecipeError, match=r"trained with QuickGELU.*set model: ViT-L-14-quickgelu"):
        ScoreClip.resolve_weights(ScoreClipOptions(model="ViT-L-14", pretrained="openai"))


def test_unknown_tag_and_missing_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with pytest.raises(RecipeError, match="no weights called 'datacomp'; open_clip knows: openai, "):
        ScoreClip.resolve_weights(ScoreClipOptions(pretrained="datacomp"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingExtra, match=r"cannot be downloaded .* type: python -c .*create_model\('ViT-B-32'"):
        ScoreClip.resolve_weights(ScoreClipOptions())


@pytest.mark.parametrize(
    ("preprocess", "message"),
    [
        ({"resize_mode": "squash"}, "set image_size: 48, fit: stretch, resample: bicubic"),
        ({"interpolation": "bilinear"}, "set image_size: 48, fit: center_crop, resample: bilinear"),
        ({"resize_mode": "longest"}, "resized by 'longest', which is not supported"),
    ],
)
def test_pictures_prepared_in_another_way(tmp_path: Path, preprocess: dict[str, str], message: str):
    name = save_tiny_clip(tmp_path / "other", **preprocess)
    with pytest.raises(RecipeError, match=message):
        opened(model=name)


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return (os.mkdir, (str(self.path),))


def test_a_checkpoint_that_is_a_pickle_is_not_run(tiny: str, tmp_path: Path):
    config = Path(tiny.removeprefix("local-dir:")) / "open_clip_config.json"
    (tmp_path / "open_clip_config.json").write_bytes(config.read_bytes())
    torch.save({"state_dict": _Bomb(tmp_path / "ran")}, tmp_path / "open_clip_model.pth")
    with pytest.raises(RecipeError, match="not one of tensors for this architecture"):
        opened(model=f"local-dir:{tmp_path}")
    (tmp_path / "open_clip_model.pth").write_bytes(pickle.dumps(_Bomb(tmp_path / "ran")))
    with pytest.raises(RecipeError, match="not one of tensors for this architecture"):
        opened(model=f"local-dir:{tmp_path}")
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_another_architecture(tiny: str, tmp_path: Path):
    folder = Path(tiny.removeprefix("local-dir:"))
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["width"] = 96
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    (tmp_path / "open_clip_model.pth").write_bytes((folder / "open_clip_model.pth").read_bytes())
    with pytest.raises(RecipeError, match="not one of tensors for this architecture"):
        opened(model=f"local-dir:{tmp_path}")


def test_built_in_architecture_with_a_checkpoint_path(tmp_path: Path):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = open_clip.create_model("ViT-S-32-alt")
    path = tmp_path / "epoch_1.pt"
    torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, path)
    stage = ScoreClip(ScoreClipOptions(model="ViT-S-32-alt", pretrained=str(path)))
    assert [w.path for w in stage.contract(stage.options).weights] == [str(path)]
    stage.batch_shape = 2
    stage.open("cpu")
    picture = skimage.data.coffee()
    _, _, transform = open_clip.create_model_and_transforms("ViT-S-32-alt")
    model.eval()
    with torch.no_grad():
        tokens = open_clip.get_tokenizer("ViT-S-32-alt")(["coffee"])
        answer = model(transform(Image.fromarray(picture))[None], tokens)
    expected = float((answer[0] * answer[1]).sum())
    assert score(stage, [picture], ["coffee"]) == [pytest.approx(expected, abs=1e-5)]


# Embeddings


def encoded(model_name: str, pictures: list[np.ndarray], captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """open_clip's own encoders with its own normalisation, one row at a time."""
    model, _, transform = open_clip.create_model_and_transforms(model_name)
    tokenizer = open_clip.get_tokenizer(model_name)
    model.eval()
    with torch.no_grad():
        images = [model.encode_image(transform(Image.fromarray(p))[None], normalize=True)[0] for p in pictures]
        texts = [model.encode_text(tokenizer([c]), normalize=True)[0] for c in captions]
    return np.stack([i.numpy() for i in images]), np.stack([t.numpy() for t in texts])


def test_embeddings_equal_open_clips_encoders(tiny: str, pictures: list[np.ndarray]):
    columns = opened(model=tiny, embeddings=["text", "image"]).compute(
        make_batch(pictures, caption=pa.array(CAPTIONS, pa.string()))
    )
    for kind, expected in zip(("image", "text"), encoded(tiny, pictures, CAPTIONS), strict=True):
        found = columns[f"clip_{kind}_embedding"]
        assert found.type == pa.list_(pa.float16(), 32)
        values = np.array(found.to_pylist(), np.float32)
        np.testing.assert_allclose(values, expected, atol=1e-5, rtol=2**-11)  # half a step of float16
        np.testing.assert_allclose(np.linalg.norm(values, axis=1), 1, atol=1e-3)


def test_embeddings_where_the_caption_is_missing(tiny: str, pictures: list[np.ndarray]):
    captions = ["a", None, "b"]
    batch = make_batch(pictures[:3], caption=pa.array(captions, pa.string()))
    both = opened(model=tiny, embeddings=["image", "text"]).compute(batch)
    assert both["clip_score"].is_null().to_pylist() == [False, True, False]
    assert both["clip_text_embedding"].is_null().to_pylist() == [False, True, False]
    assert both["clip_image_embedding"].null_count == 0
    alone = opened(model=tiny, embeddings=["image"]).compute(batch)
    assert alone["clip_image_embedding"].equals(both["clip_image_embedding"])
    assert sorted(alone) == ["clip_image_embedding", "clip_score"]
    empty = opened(model=tiny, embeddings=["image", "text"]).compute(make_batch([], caption=pa.array([], pa.string())))
    assert [len(empty[name]) for name in sorted(empty)] == [0, 0, 0]


def test_the_scores_are_the_same_bits_with_and_without_embeddings(tiny: str, pictures: list[np.ndarray]):
    captions = [*CAPTIONS[:2], None, *CAPTIONS[3:]]
    batch = make_batch(pictures, caption=pa.array(captions, pa.string()))
    plain = opened(model=tiny).compute(batch)["clip_score"]
    assert plain.null_count == 1
    for kinds in (["image"], ["text"], ["image", "text"]):
        assert opened(model=tiny, embeddings=kinds).compute(batch)["clip_score"].equals(plain)


def test_the_order_of_the_embeddings_does_not_count():
    assert ScoreClipOptions(embeddings=["text", "image", "text"]) == ScoreClipOptions(embeddings=["image", "text"])
    with pytest.raises(ValueError, match="embeddings"):
        ScoreClipOptions(embeddings=["audio"])
    fields = ScoreClip.contract(ScoreClipOptions(embeddings=["text"])).writes
    assert [f.name for f in fields] == ["clip_score", "clip_text_embedding"]
    assert fields.field(1).type.list_size == open_clip.get_model_config("ViT-B-32")["embed_dim"]


def test_a_caption_of_ten_megabytes_costs_what_its_beginning_costs(tiny: str):
    """One word of ten million letters would keep open_clip's tokenizer busy for days."""
    stage, picture = opened(model=tiny), noise(48, 48, 1)
    word = "".join(np.random.default_rng(0).choice(list("abcdefgh"), 10_000_000))
    seen = 77 * 40
    assert score(stage, [picture], [word]) == score(stage, [picture], [word[:seen]])


def test_the_tokenizer_forgets_words(tiny: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(clip, "_WORDS", 50)
    stage = opened(model=tiny, batch_size=4)
    pictures = [noise(48, 48, 1)] * 40
    captions = [f"{chr(97 + i % 26) * 3}{chr(97 + i // 26) * 4}" for i in range(40)]
    first = score(stage, pictures, captions)
    assert len(stage._model._tokenizer.cache) < 60
    assert score(stage, pictures, captions) == first
