"""CLIPScore of a caption, as published: a rescaled cosine with a prompt before the caption."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from mmdata.batch import Batch
from mmdata.errors import RecipeError
from mmdata.models.clip import ClipModel, Precision, bring_weights, image_size, weights_of
from mmdata.stage import ColumnName, Columns, Contract, Needs, Options, Pixels, Stage, TextColumn, parse_schema

__all__ = ["PROMPT", "ScoreClipscore", "ScoreClipscoreOptions", "clipscore", "ref_clipscore"]

PROMPT = "A photo depicts "
_WEIGHT = 2.5
_TEXTS = (pa.types.is_string, pa.types.is_large_string)
_TOLERANCE: dict[Precision, float] = {"fp32": 2.5e-4, "fp16": 1.3e-2, "bf16": 7.5e-2}


class ScoreClipscoreOptions(Options):
    """Which checkpoint, and which texts."""

    model: str = Field(
        "ViT-B-32-quickgelu", description="open_clip architecture, or local-dir:PATH of a folder open_clip saved"
    )
    pretrained: str = Field("openai", description="open_clip tag, or path of a checkpoint; a local-dir has its own")
    column: TextColumn = Field("caption", description="text column to compare with the picture")
    references: ColumnName | None = Field(
        None, description="column of reference captions (list of string, or string), for RefCLIPScore"
    )
    precision: Precision = Field("fp32", description="number format of the weights and of most sums")
    batch_size: int = Field(32, gt=0, le=4096, description="pairs of a model call; a score's last bits depend on it")


class ScoreClipscore(Stage[ScoreClipscoreOptions]):
    """CLIPScore: 2.5 · max(cos, 0) of picture and caption, and RefCLIPScore where there are reference captions.

    Reads image (Pixels 224, bicubic, the middle), the caption (or `column`) and, where it is given, the column of
    `references`. Before every text stands "A photo depicts "; it is cut at the model's context (77 tokens). Writes
    `clipscore_score`, float32 in [0, 2.5], NULL without a reason where the caption is NULL; and with `references`
    `clipscore_ref_score`, float32, the harmonic mean of it and of the largest cosine between caption and a reference
    (0 where either is not above 0), NULL without a reason where there is no caption or no reference. NULL with a
    reason: the picture is missing or does not decode.

    Not what torchmetrics calls CLIPScore, which is 100 · max(cos, 0) without a prompt. Other weights than the defaults
    are possible and are then no published CLIPScore. Source: Hessel et al. 2021 (arXiv 2104.08718), section 3, and
    clipscore.py of jmhessel/clipscore; the similarity of captions is neither rescaled there nor here.
    """

    name = "score_clipscore"
    version = 1
    label = "clipscore"

    @classmethod
    def contract(cls, options: ScoreClipscoreOptions) -> Contract:
        """A second column where references are named; RecipeError for a model or a file that is not there."""
        references = "" if options.references is None else ", clipscore_ref_score: float32"
        return Contract(
            writes=parse_schema(f"clipscore_score: float32{references}"),
            reads=("image", *dict.fromkeys(filter(None, [options.column, options.references]))),
            pixels=(_pixels(options),),
            batch_shape=options.batch_size,
            precision=options.precision,
            weights=weights_of(options.model, options.pretrained),
            needs=Needs(modules=("open_clip", "torch", "torchvision"), extra="clip", gpu=0.25, threads=2),
            tolerance=_TOLERANCE[options.precision],
        )

    @classmethod
    def check_types(cls, options: ScoreClipscoreOptions, schema: pa.Schema) -> None:
        """RecipeError where `column` is no text, or `references` holds none."""
        super().check_types(options, schema)
        kind = schema.field(options.references).type if options.references in schema.names else None
        if kind is not None and not any(is_text(getattr(kind, "value_type", kind)) for is_text in _TEXTS):
            raise RecipeError(
                f"{cls.name}: references names column {options.references!r}, which is {kind}; expected text, or a "
                "list of texts"
            )

    @classmethod
    def resolve_weights(cls, options: ScoreClipscoreOptions) -> dict[str, str]:
        """The sha256 of a tag's checkpoint, downloaded if need be; MissingExtra when it cannot be."""
        return bring_weights(options.model, options.pretrained)

    def open(self, device: str) -> None:
        """Load the checkpoint and run one full batch through both encoders."""
        options = self.options
        self._pixels = _pixels(options)
        rows = self.batch_shape or options.batch_size
        self._model = ClipModel(options.model, options.pretrained, self._pixels, options.precision, device, rows)
        self._model.warm_up()

    def compute(self, batch: Batch) -> Columns:
        """One score per row that has a caption."""
        captions = batch[self.options.column]
        rows = [i for i, text in enumerate(captions) if text is not None]
        pictures = batch.pictures(self._pixels)
        images, texts = self._model.both([pictures[i] for i in rows], [PROMPT + captions[i] for i in rows])
        scores: list[float | None] = [None] * len(captions)
        if rows:
            for row, cosine in zip(rows, (images.astype(np.float64) * texts).sum(axis=1), strict=True):
                scores[row] = clipscore(float(cosine))
        columns = {"clipscore_score": pa.array(scores, pa.float32())}
        if self.options.references is not None:
            cells = [_references(cell) for cell in batch[self.options.references]]
            found = self._with_references(rows, texts, scores, cells)
            columns["clipscore_ref_score"] = pa.array(found, pa.float32())
        return columns

    def _with_references(
        self,
        rows: Sequence[int],
        texts: npt.NDArray[np.float32],
        scores: Sequence[float | None],
        cells: Sequence[list[str]],
    ) -> list[float | None]:
        flat = [PROMPT + reference for row in rows for reference in cells[row]]
        vectors = self._model.texts(flat).astype(np.float64)
        found: list[float | None] = [None] * len(scores)
        first = 0
        for place, row in enumerate(rows):
            own = vectors[first : first + len(cells[row])]
            first += len(own)
            score = scores[row]
            if len(own) and score is not None:
                found[row] = ref_clipscore(score, float((own @ texts[place].astype(np.float64)).max()))
        return found


def clipscore(cosine: float) -> float:
    """2.5 · max(cos, 0), of a cosine clipped to 1."""
    return _WEIGHT * min(max(cosine, 0.0), 1.0)


def ref_clipscore(score: float, text_cosine: float) -> float:
    """Harmonic mean of a CLIPScore and the largest cosine of caption and reference; 0 where one is not above 0."""
    similarity = min(max(text_cosine, 0.0), 1.0)
    return 2 * score * similarity / (score + similarity) if score > 0 and similarity > 0 else 0.0


def _references(cell: Any) -> list[str]:
    values = [cell] if isinstance(cell, str) else cell or []
    return [v for v in values if v is not None]


def _pixels(options: ScoreClipscoreOptions) -> Pixels:
    # Without open_clip the size is not known; the plan then stops for the missing package.
    return Pixels(image_size(options.model) or 224)
