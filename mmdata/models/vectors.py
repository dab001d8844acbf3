"""Embeddings that an earlier step wrote, as rows of length 1 to compute with.

In: a fixed-size list column of floats, as `score_clip` and `embed_text` write it. Out: float64 rows and which rows of
the batch they are. Fails: RecipeError for a column that is no embedding, or one of another width than a model wants.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mmdata.columns import is_aside, vector_rows
from mmdata.errors import RecipeError

__all__ = ["require_embedding", "require_width", "unit_rows"]


def require_embedding(where: str, column: str, schema: pa.Schema) -> None:
    """RecipeError when the column, by its type in `schema`, is no embedding."""
    kind = schema.field(column).type
    if not is_aside(schema.field(column)) or not pa.types.is_floating(kind.value_type):
        raise RecipeError(
            f"{where}: {column!r} is {kind}, and an embedding is a fixed-size list of floats; name one, such as "
            f"`clip_image_embedding`, which score_clip writes when its option `embeddings` asks for image"
        )


def require_width(where: str, column: str, found: int, wanted: int, what: str) -> None:
    """RecipeError when embeddings have another number of numbers than `what` was made for."""
    if found != wanted:
        raise RecipeError(
            f"{where}: the embeddings in {column!r} have {found} numbers, and {what} wants {wanted}; "
            f"both must come from one model"
        )


def unit_rows(values: pa.Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Indexes of the rows that are not NULL, and their (N, D) float64 vectors of length 1; a zero vector becomes NaN.

    They are made of length 1 again, for 16 bits have moved their length by up to a thousandth.
    """
    vectors = vector_rows(values)
    rows = np.array([i for i, v in enumerate(vectors) if v is not None], np.int64)
    found = np.zeros((len(rows), values.type.list_size))
    for place, row in enumerate(rows):
        found[place] = vectors[row]
    with np.errstate(invalid="ignore", divide="ignore"):
        return rows, found / np.sqrt((found * found).sum(axis=1, keepdims=True))
