"""A classifier's scores as columns: the best label, the best few, and labels that a recipe asks for by name.

In: labels and (N, labels) scores. Out: `<prefix>_label` string, `<prefix>_score` float32, `<prefix>_top`
list<struct<label: string, score: float32>>, best first, and `<prefix>_<name>` float32 per label asked for, its name in
lower case with `_` for whatever is no letter or digit. Fails: RecipeError for a label that the model does not have,
and for names that would be one column.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mmdata.errors import RecipeError, nearest
from mmdata.stage import Columns

__all__ = ["label_cells", "label_schema", "require_labels"]

_TOP = pa.list_(pa.struct([("label", pa.string()), ("score", pa.float32())]))


def label_schema(prefix: str, labels: Sequence[str]) -> pa.Schema:
    """The columns for these labels; RecipeError when two of them, or one and the others, would have one name."""
    fields = [
        pa.field(f"{prefix}_label", pa.string()),
        pa.field(f"{prefix}_score", pa.float32()),
        pa.field(f"{prefix}_top", _TOP),
    ]
    for label in labels:
        name = _column(prefix, label)
        if name in {f.name for f in fields} or name == f"{prefix}_reason":
            raise RecipeError(f"{prefix}: the label {label!r} makes a column {name!r}, which is there already")
        fields.append(pa.field(name, pa.float32()))
    return pa.schema(fields)


def _column(prefix: str, label: str) -> str:
    name = re.sub(r"[^a-z0-9]+", "_", label.lower()).strip("_")
    if not name:
        raise RecipeError(f"{prefix}: the label {label!r} has no letter or digit that a column can be named after")
    return f"{prefix}_{name}"


def require_labels(prefix: str, asked: Sequence[str], known: Sequence[str]) -> None:
    """RecipeError, with the nearest, for a label that the model does not have."""
    for label in asked:
        if label not in known:
            raise RecipeError(
                f"{prefix}: the model has no label {label!r}{nearest(label, list(known))}; it has {len(known)}, "
                f"such as {', '.join(known[:5])}"
            )


def label_cells(
    prefix: str,
    known: Sequence[str],
    asked: Sequence[str],
    top: int,
    scores: npt.NDArray[np.float32],
    rows: Sequence[int],
    count: int,
) -> Columns:
    """Columns of `count` rows, of which `rows` have the given scores and the others are NULL."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    best: list[list[dict[str, object]] | None] = [None] * count
    for place, row in enumerate(rows):
        best[row] = [{"label": known[i], "score": float(scores[place, i])} for i in order[place]]
    columns = {
        f"{prefix}_label": pa.array([None if b is None else b[0]["label"] for b in best], pa.string()),
        f"{prefix}_score": pa.array([None if b is None else b[0]["score"] for b in best], pa.float32()),
        f"{prefix}_top": pa.array(best, _TOP),
    }
    for label in asked:
        cells = np.zeros(count, np.float32)
        # Two of ImageNet's classes are called crane: their scores count together.
        cells[list(rows)] = scores[:, [i for i, name in enumerate(known) if name == label]].sum(axis=1)
        columns[_column(prefix, label)] = pa.array(cells, pa.float32(), mask=~np.isin(np.arange(count), rows))
    return columns
