"""How pleasing a picture is, by a linear score over its CLIP embedding."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from pydantic import Field

from mmdata.batch import Batch
from mmdata.models.linear_head import LinearHead
from mmdata.models.vectors import require_embedding, require_width, unit_rows
from mmdata.models.weight_files import bring_file, file_weights
from mmdata.stage import ColumnName, Columns, Contract, FilePath, Needs, Options, Stage, parse_schema

__all__ = ["ScoreAesthetic", "ScoreAestheticOptions"]


class ScoreAestheticOptions(Options):
    """Which weights, over which embeddings."""

    weights: FilePath = Field(description="path or http(s) URL of the linear head: a .pth or .safetensors of tensors")
    sha256: str | None = Field(None, description="the file's sha256, 64 hex digits; required for a URL")
    embedding: ColumnName = Field(
        "clip_image_embedding", description="column with the pictures' embeddings, by the CLIP the head was trained on"
    )


class ScoreAesthetic(Stage[ScoreAestheticOptions]):
    """Aesthetic score of a picture: a linear head over the CLIP embedding that an earlier step wrote.

    Reads the embedding (`embedding`), a fixed-size list of floats, made of length 1 again. Writes `aesthetic_score`,
    float32, about 1 to 10 with LAION's heads (the mean of people's marks). NULL without a reason: there is no
    embedding. No picture is decoded and no CLIP is run again; 16-bit embeddings move a score by thousandths.

    The head is one linear layer, or several without activations between them, told by the tensors' shapes. A head
    whose embeddings have another width is refused; one that was trained on another CLIP of the same width is not
    seen, and its scores mean nothing; nor is a head with activations, such as LAION's own `reluMSE`.
    Source: LAION-Aesthetics (Schuhmann et al. 2022, arXiv 2210.08402, section 3): predictor V1 is one layer over
    ViT-L/14, V2 five layers without activations over the same. LAION's subsets keep ≥ 4.5, 4.75, 5, 6 or 6.5.
    """

    name = "score_aesthetic"
    version = 1
    label = "aesthetic"

    @classmethod
    def contract(cls, options: ScoreAestheticOptions) -> Contract:
        """Reads the embedding; RecipeError for a file that is not there and for a URL without a checksum."""
        return Contract(
            writes=parse_schema("aesthetic_score: float32"),
            reads=(options.embedding,),
            weights=(file_weights(cls.name, "head", options.weights, options.sha256),),
            needs=Needs(modules=("torch", "safetensors"), extra="models"),
        )

    @classmethod
    def check_types(cls, options: ScoreAestheticOptions, schema: pa.Schema) -> None:
        """RecipeError where `embedding` is no embedding."""
        require_embedding(cls.name, options.embedding, schema)

    def open(self, device: str) -> None:
        """Bring and read the head, a few megabytes; it runs on the CPU whatever the device."""
        path = bring_file(self.name, self.options.weights, self.options.sha256)
        self._head = LinearHead(self.name, path)

    def compute(self, batch: Batch) -> Columns:
        """One score per row that has an embedding."""
        column = self.options.embedding
        rows, vectors = unit_rows(batch.column(column))
        require_width(self.name, column, vectors.shape[1], self._head.width, "the head")
        scores = np.zeros(len(batch))
        scores[rows] = self._head.scores(vectors)
        return {"aesthetic_score": pa.array(scores, pa.float32(), mask=~np.isin(np.arange(len(batch)), rows))}
