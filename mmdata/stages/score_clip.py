"""How well a caption fits its picture, by a CLIP model."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from mmdata.batch import Batch
from mmdata.errors import RecipeError
from mmdata.media.boxes import holds_boxes
from mmdata.models.clip import ClipModel, Precision, bring_weights, embedding_size, image_size, weights_of
from mmdata.stage import ColumnName, Columns, Contract, Needs, Options, Pixels, Stage, TextColumn, parse_schema

__all__ = ["ScoreClip", "ScoreClipOptions"]

_TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 3e-2}


class ScoreClipOptions(Options):
    """Which model, which weights, and how pictures are prepared for them."""

    model: str = Field("ViT-B-32", description="open_clip architecture, or local-dir:PATH of a folder open_clip saved")
    pretrained: str = Field(
        "datacomp_xl_s13b_b90k", description="open_clip tag, or path of a checkpoint; a local-dir folder has its own"
    )
    column: TextColumn = Field("caption", description="text column to compare with the picture")
    precision: Precision = Field("fp32", description="number format of the weights and of most sums")
    fit: Literal["center_crop", "stretch"] = Field(
        "center_crop", description="how pictures become square; SigLIP, CLIPA and PE models want stretch"
    )
    resample: Literal["bicubic", "bilinear"] = Field(
        "bicubic", description="resize filter; CLIPA, MobileCLIP and PE models want bilinear"
    )
    image_size: int | None = Field(
        None, gt=0, description="side of the square in px, where the weights want another than the architecture says"
    )
    flipped: bool = Field(False, description="look at the picture mirrored left to right")
    masked: ColumnName | None = Field(
        None, description="column of boxes, such as ocr_boxes, which are painted over before the model looks"
    )
    batch_size: int = Field(32, gt=0, le=4096, description="pairs of a model call; a score's last bits depend on it")
    embeddings: tuple[Literal["image", "text"], ...] = Field(
        (), description="which embeddings to keep: image, text, or both; a row costs 2 bytes for each of their numbers"
    )

    @field_validator("embeddings")
    @classmethod
    def _in_order(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(set(value)))  # written in another order it is the same question


class ScoreClip(Stage[ScoreClipOptions]):
    """Cosine similarity of picture and caption under one CLIP checkpoint.

    Reads image (a square of the model's size, such as Pixels 224) and the caption (or `column`), cut at the model's
    context (77 tokens). Writes `clip_score`, float32 in [-1, 1]: the raw cosine, for related pairs mostly 0.2 to 0.4.
    Compare scores of one checkpoint only. NULL without a reason: the caption is NULL, or the boxes to be masked are.
    NULL with a reason: the picture is missing or does not decode, or a cell of boxes holds none (`bad_boxes`).

    `flipped` scores the mirrored picture. `masked` paints over the boxes of a column, such as the text that
    `detect_text` found, each in the average colour around it, before the picture is scaled: how well the caption fits
    what is seen and not what is written. A picture with no box (an empty list) has the very score it has unmasked.
    Source of the masked score: T-MARS (Maini et al. 2023, arXiv 2307.03132); how wide "around" is there could not be
    verified, here it is a quarter of the box's shorter side.

    With `embeddings`, also `clip_image_embedding` or `clip_text_embedding`: fixed-size list of float16 of the model's
    width, of length 1 before they were rounded to 16 bits; NULL as the score is, but that a picture without a caption
    has its own. They stand in this step's set (`columns."<set>"`), not in `samples`, and are exported where
    `export.columns` names them. Asking for them computes the step anew, and gives the same scores.

    A tag is downloaded before the first row; the fingerprint of its file is part of the column's identity. Pictures
    are prepared as the checkpoint wants it, or the run stops before the first row and says which options to set.
    Source: Radford et al. 2021 (arXiv 2103.00020), section 2.3; not CLIPScore, which is 2.5 · max(cos, 0) with a
    prompt before the caption (Hessel et al. 2021). DataComp keeps ViT-L-14 cosines in the top 30 %, LAION-2B-en
    ViT-B-32 cosines ≥ 0.28.
    """

    name = "score_clip"
    version = 1
    label = "clip"
    additions = ("embeddings",)
    on_request = (("clip_image_embedding", "embeddings: [image]"), ("clip_text_embedding", "embeddings: [text]"))

    @classmethod
    def contract(cls, options: ScoreClipOptions) -> Contract:
        """Size and weights as the options say; RecipeError for a model or a file that is not there."""
        # Without open_clip the width is not known; the plan then stops for the missing package.
        vector = pa.list_(pa.float16(), embedding_size(options.model) or 1) if options.embeddings else None
        embeddings = [pa.field(f"clip_{kind}_embedding", vector) for kind in options.embeddings]
        return Contract(
            writes=pa.schema([*parse_schema("clip_score: float32"), *embeddings]),
            reads=("image", *dict.fromkeys(filter(None, [options.column, options.masked]))),
            pixels=(_pixels(options),),
            batch_shape=options.batch_size,
            precision=options.precision,
            weights=weights_of(options.model, options.pretrained),
            needs=Needs(modules=("open_clip", "torch", "torchvision"), extra="clip", gpu=0.25, threads=2),
            tolerance=_TOLERANCE[options.precision],
        )

    @classmethod
    def check_types(cls, options: ScoreClipOptions, schema: pa.Schema) -> None:
        """RecipeError where `column` is no text, or `masked` holds no boxes."""
        super().check_types(options, schema)
        kind = schema.field(options.masked).type if options.masked in schema.names else None
        if kind is not None and not holds_boxes(kind):
            raise RecipeError(
                f"{cls.name}: masked names column {options.masked!r}, which is {kind}; expected a list of boxes, each "
                "[left, top, right, bottom] in px of the stored picture, such as the ocr_boxes that detect_text writes"
            )

    @classmethod
    def resolve_weights(cls, options: ScoreClipOptions) -> dict[str, str]:
        """The sha256 of a tag's checkpoint, downloaded if need be; MissingExtra when it cannot be."""
        return bring_weights(options.model, options.pretrained)

    def open(self, device: str) -> None:
        """Load the checkpoint and run one full batch through both encoders."""
        options = self.options
        self._pixels = _pixels(options)
        rows = self.batch_shape or options.batch_size
        self._model = ClipModel(options.model, options.pretrained, self._pixels, options.precision, device, rows)
        self._model.warm_up()
        self._vector = pa.list_(pa.float16(), embedding_size(options.model) or 1)

    def compute(self, batch: Batch) -> Columns:
        """One cosine per row that has a caption, and the embeddings asked for."""
        captions = batch[self.options.column]
        is_seen = np.ones(len(captions), bool)
        if self.options.masked is not None:  # where no boxes are known, what is written cannot be told from the rest
            is_seen = batch.column(self.options.masked).is_valid().to_numpy(zero_copy_only=False)
        rows = np.array([i for i, text in enumerate(captions) if text is not None and is_seen[i]], np.int64)
        pictured = np.flatnonzero(is_seen) if "image" in self.options.embeddings else rows
        scores, mask = np.zeros(len(captions)), np.ones(len(captions), bool)
        mask[rows] = False
        pictures = batch.pictures(self._pixels)
        images, texts = self._model.both([pictures[i] for i in pictured], [captions[i] for i in rows])
        if len(rows):
            own = images[np.searchsorted(pictured, rows)]
            # In float64 and clipped, for rounding may carry the cosine of equal vectors above 1.
            scores[rows] = np.clip((own.astype(np.float64) * texts).sum(axis=1), -1, 1)
        columns = {"clip_score": pa.array(scores, pa.float32(), mask=mask)}
        for kind, at, vectors in (("image", pictured, images), ("text", rows, texts)):
            if kind in self.options.embeddings:
                there = dict(zip(at.tolist(), vectors.astype(np.float16), strict=True))
                cells = [there.get(i) for i in range(len(captions))]
                columns[f"clip_{kind}_embedding"] = pa.array(cells, self._vector)
        return columns


def _pixels(options: ScoreClipOptions) -> Pixels:
    # Without open_clip the size is not known; the plan then stops for the missing package.
    size = options.image_size or image_size(options.model) or 224
    return Pixels(size, options.fit, options.resample, flipped=options.flipped, masked=options.masked)
