"""How likely a caption is its picture's, by BLIP's image-text matching head."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from pydantic import Field

from mmdata.batch import Batch
from mmdata.models.blip import ItmModel, picture_size
from mmdata.models.pretrained import Precision, bring_folder, folder_here, pretrained_weights
from mmdata.stage import Columns, Contract, FilePath, Needs, Options, Pixels, Stage, TextColumn, Weights, parse_schema

__all__ = ["ScoreItm", "ScoreItmOptions"]

_DEFAULT = "Salesforce/blip-itm-base-coco"
_TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}


class ScoreItmOptions(Options):
    """Which checkpoint, and which text."""

    model: FilePath = Field(
        _DEFAULT,
        description="folder that transformers' save_pretrained wrote, of any BLIP ITM checkpoint, or a hub name",
    )
    revision: str | None = Field(None, description="commit of a hub's model, 40 hex digits; a folder has none")
    column: TextColumn = Field("caption", description="text column to compare with the picture")
    max_tokens: int = Field(35, gt=2, description="tokens of a text that the model sees, with the two at its ends")
    precision: Precision = Field("fp32", description="number format of the weights and of most sums")
    batch_size: int = Field(16, gt=0, le=4096, description="pairs of a model call; a score's last bits depend on it")


class ScoreItm(Stage[ScoreItmOptions]):
    """Probability that picture and caption belong together, by BLIP's image-text matching head.

    Reads image (a square of the model's size, Pixels 384 stretched, bicubic) and the caption (or `column`), cut at
    `max_tokens`; of a longer one 40 characters a token are looked at. Writes `itm_score`, float32 in [0, 1]: the
    softmax over "no match" and "match". BLIP's CapFilt keeps a caption where match is the likelier, `itm_score > 0.5`.
    NULL without a reason: the caption is NULL. NULL with a reason: the picture is missing or does not decode.

    Unlike a cosine it looks at both together, so a pair costs several times what `score_clip` costs. Weights that lack
    the head are refused, and code beside them is never run. Source: Li et al. 2022 (arXiv 2201.12086), sections 3.2
    and 3.3, by transformers' BlipForImageTextRetrieval; pictures are scaled by Pillow as in the authors' code.
    """

    name = "score_itm"
    version = 1
    label = "itm"

    @classmethod
    def contract(cls, options: ScoreItmOptions) -> Contract:
        """Size and weights as the model says; RecipeError for a folder that holds no BLIP model."""
        if options.model == _DEFAULT and options.revision is None and folder_here(_DEFAULT, None) is None:
            words = f"{_DEFAULT} needs `revision`, the 40 hex digits of a commit; or give a folder as `model`"
            weights: tuple[Weights, ...] = (Weights("model", missing=words),)
        else:
            weights = pretrained_weights(cls.name, options.model, options.revision)
        return Contract(
            writes=parse_schema("itm_score: float32"),
            reads=("image", options.column),
            pixels=(_pixels(options),),
            batch_shape=options.batch_size,
            precision=options.precision,
            weights=weights,
            needs=Needs(modules=("torch", "transformers"), extra="models", gpu=0.25, threads=2),
            tolerance=_TOLERANCE[options.precision],
        )

    def open(self, device: str) -> None:
        """Load the checkpoint and run one full batch."""
        options = self.options
        folder = bring_folder(self.name, options.model, options.revision)
        rows = self.batch_shape or options.batch_size
        self._pixels = _pixels(options)
        self._model = ItmModel(self.name, folder, options.precision, device, rows, options.max_tokens)
        self._model.warm_up()

    def compute(self, batch: Batch) -> Columns:
        """One probability per row that has a caption."""
        captions = batch[self.options.column]
        rows = [i for i, text in enumerate(captions) if text is not None]
        pictures = batch.pictures(self._pixels)
        scores, mask = np.zeros(len(captions)), np.ones(len(captions), bool)
        mask[rows] = False
        scores[rows] = self._model.matches([pictures[i] for i in rows], [captions[i] for i in rows])
        return {"itm_score": pa.array(scores, pa.float32(), mask=mask)}


def _pixels(options: ScoreItmOptions) -> Pixels:
    size = picture_size(ScoreItm.name, folder_here(options.model, options.revision))
    return Pixels(size, "stretch", "bicubic")
