"""Image labels against transformers' own pipeline on a tiny random model, and real labels of real photographs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import skimage
from batches import make_batch, noise
from PIL import Image
from tiny_transformers import LABELS, save_tiny_vit
from transformers import pipeline

from mmdata.errors import MissingExtra, RecipeError
from mmdata.stages.classify_image import ClassifyImage, ClassifyImageOptions


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    data = skimage.data
    return [data.coffee(), data.astronaut(), data.cat(), noise(48, 48, 1), noise(500, 49, 2), noise(1, 1, 3)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_vit(tmp_path_factory.mktemp("vit") / "softmax")


def opened(shape: int | None = None, **options: object) -> ClassifyImage:
    stage = ClassifyImage(ClassifyImageOptions(**options))
    stage.batch_shape = shape
    stage.open("cpu")
    return stage


def oracle(folder: str, pictures: list[np.ndarray]) -> list[dict[str, float]]:
    classify = pipeline("image-classification", model=folder, device="cpu")
    answers = [classify(Image.fromarray(p), top_k=100) for p in pictures]
    return [{one["label"]: one["score"] for one in answer} for answer in answers]


def test_equals_transformers_pipeline(tiny: str, pictures: list[np.ndarray]):
    stage = opened(4, model=tiny, labels=["watermark", "Not Safe!"], top=2)
    found = {n: v.to_pylist() for n, v in stage.compute(make_batch(pictures)).items()}
    expected = oracle(tiny, pictures)
    best = [sorted(e, key=e.__getitem__, reverse=True) for e in expected]
    assert found["classify_image_label"] == [b[0] for b in best]
    assert len(set(found["classify_image_label"])) > 1  # or the oracle could not tell pictures apart
    assert found["classify_image_score"] == pytest.approx([max(e.values()) for e in expected], abs=1e-5)
    assert [[one["label"] for one in row] for row in found["classify_image_top"]] == [b[:2] for b in best]
    for row, e in zip(found["classify_image_top"], expected, strict=True):
        assert [one["score"] for one in row] == pytest.approx([e[one["label"]] for one in row], abs=1e-5)
    assert found["classify_image_watermark"] == pytest.approx([e["watermark"] for e in expected], abs=1e-5)
    assert found["classify_image_not_safe"] == pytest.approx([e["Not Safe!"] for e in expected], abs=1e-5)


def test_neighbours_change_no_bit(tiny: str, pictures: list[np.ndarray]):
    stage = opened(4, model=tiny)
    whole = stage.compute(make_batch(pictures))["classify_image_top"].to_pylist()
    for some in ([3], [5, 0], [4, 3, 2, 1, 0]):
        found = stage.compute(make_batch([pictures[i] for i in some]))["classify_image_top"].to_pylist()
        assert found == [whole[i] for i in some]


@pytest.mark.parametrize(
    ("labels", "problem"),
    [(LABELS, "multi_label_classification"), (("quality",), None), (("quality",), "regression")],
)
def test_scores_are_what_the_configuration_says(
    tmp_path: Path, pictures: list[np.ndarray], labels: tuple[str, ...], problem: str | None
):
    """Each label alone, the only label, and a bare number, as transformers' pipeline has them."""
    folder = save_tiny_vit(tmp_path / "other", labels, problem)
    stage = opened(model=folder, labels=labels)
    found = {n: v.to_pylist() for n, v in stage.compute(make_batch(pictures)).items()}
    expected = oracle(folder, pictures)
    for label in labels:
        name = f"classify_image_{label.lower().replace(' ', '_').rstrip('!')}"
        assert found[name] == pytest.approx([e[label] for e in expected], abs=1e-5)


def test_a_thin_picture_is_not_enlarged_without_end(tiny: str, tmp_path: Path):
    """A processor that scales by the short side of 224 px makes 9 GB of a row of 60,000 px, and keeps the middle."""
    from transformers import CLIPImageProcessor

    folder = str(shutil.copytree(tiny, tmp_path / "short"))
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    stage = opened(model=folder)
    picture = noise(2, 400, 4)
    pictures = [picture, picture.transpose(1, 0, 2), noise(90, 40, 5)]
    rows = stage.compute(make_batch(pictures))["classify_image_top"].to_pylist()
    for row, expected in zip(rows, oracle(folder, pictures), strict=True):
        assert {one["label"]: one["score"] for one in row} == pytest.approx(expected, abs=1e-5)
    sides: list[tuple[int, ...]] = []
    model = stage._scores.__self__
    seen = model._processor
    model._processor = lambda images, **given: sides.append(images.size) or seen(images=images, **given)
    stage.compute(make_batch([np.zeros((1, 60_000, 3), np.uint8), np.zeros((60_000, 2, 3), np.uint8), picture]))
    assert sides == [(32, 1), (2, 64), (64, 2)]


def test_a_model_without_a_classifiers_head_is_refused(tiny: str, tmp_path: Path):
    """The library fills it with random numbers and warns."""
    from transformers import ViTForImageClassification

    shutil.copytree(tiny, tmp_path / "headless")
    ViTForImageClassification.from_pretrained(tiny).vit.save_pretrained(tmp_path / "headless")
    config = json.loads((Path(tiny) / "config.json").read_text())
    (tmp_path / "headless" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match=r"lack classifier\.bias, classifier\.weight, which would be random"):
        opened(model=str(tmp_path / "headless"))


def test_code_beside_the_weights_is_not_run(tiny: str, tmp_path: Path):
    folder = tmp_path / "stranger"
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "own.Own", "AutoModelForImageClassification": "own.Own"}
    config |= {"model_type": "stranger", "auto_map": code}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(RecipeError, match="needs no code of its own"):
        opened(model=str(folder))
    assert not (tmp_path / "ran").exists()


def test_what_a_plan_refuses(tiny: str, tmp_path: Path):
    def refused(message: str, **options: object) -> None:
        with pytest.raises(RecipeError, match=message):
            ClassifyImage.contract(ClassifyImageOptions(**options))

    refused("no label 'watermrk'; did you mean 'watermark'", model=tiny, labels=["watermrk"])
    refused("makes a column 'classify_image_top', which is there", model=tiny, labels=["TOP"])
    refused("no letter or digit", model=tiny, labels=["!!"])
    refused("is a folder, which has no `revision`", model=tiny, revision="0" * 40)
    refused("no folder nowhere/at/all", model="nowhere/at/all")
    refused("no folder org/name here, and as a name on the hub it needs `revision`", model="org/name")
    refused("40 hex digits of a commit", model="org/name", revision="main")
    refused("runs in fp32", precision="bf16")
    (tmp_path / "empty").mkdir()
    refused("holds no config.json", model=str(tmp_path / "empty"))
    (tmp_path / "empty" / "config.json").write_text("{}")
    refused("holds no weights", model=str(tmp_path / "empty"))


def test_every_file_of_a_folder_is_fingerprinted_and_a_hubs_commit(tiny: str):
    named = {w.name: w.path for w in ClassifyImage.contract(ClassifyImageOptions(model=tiny)).weights}
    assert set(named) == {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert named["config.json"] == f"{tiny}/config.json"
    [hub] = ClassifyImage.contract(ClassifyImageOptions(model="org/name", revision="ab" * 20)).weights
    assert hub.fingerprint == f"commit:{'ab' * 20}"


def test_a_hubs_model_that_is_in_the_cache_needs_no_network(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pictures: list[np.ndarray]
):
    commit = "cd" * 20
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingExtra, match=f"cannot be downloaded .* type: hf download org/tiny --revision {commit}"):
        opened(model="org/tiny", revision=commit)
    shutil.copytree(tiny, tmp_path / "models--org--tiny" / "snapshots" / commit)
    with pytest.raises(RecipeError, match="no label 'nsfw'"):
        ClassifyImage.contract(ClassifyImageOptions(model="org/tiny", revision=commit, labels=["nsfw"]))
    found = opened(model="org/tiny", revision=commit).compute(make_batch(pictures))
    assert found["classify_image_top"].equals(opened(model=tiny).compute(make_batch(pictures))["classify_image_top"])


def test_offline_names_what_is_in_photographs(pictures: list[np.ndarray]):
    stage = opened(labels=["Egyptian cat", "espresso"])
    rocket = skimage.data.rocket()
    found = {n: v.to_pylist() for n, v in stage.compute(make_batch([*pictures[:3], rocket])).items()}
    tops = [[one["label"] for one in row] for row in found["classify_image_top"]]
    assert "espresso" in tops[0]
    assert {"Egyptian cat", "tabby"} <= set(tops[2])
    assert "missile" in tops[3] or "projectile" in tops[3]
    assert {len(t) for t in tops} == {5}
    assert found["classify_image_espresso"][0] > 0.1 > found["classify_image_espresso"][2]
    assert found["classify_image_egyptian_cat"][2] > 0.1 > found["classify_image_egyptian_cat"][0]
    with pytest.raises(RecipeError, match="no label 'tabbi'; did you mean 'tabby'"):
        opened(labels=["tabbi"])
