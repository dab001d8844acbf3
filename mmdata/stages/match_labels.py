"""Whether a caption names what a classifier sees in the picture.

In: a text column and a column of labels. Out: how many labels the text names. Fails: RecipeError for a column of labels
that holds none; no caption fails.
"""

from __future__ import annotations

import re
from typing import Any

import pyarrow as pa
from pydantic import Field

from mmdata.batch import Batch
from mmdata.errors import RecipeError
from mmdata.models.stems import Stemmer
from mmdata.stage import ColumnName, Columns, Contract, Needs, Options, Stage, TextColumn, parse_schema

__all__ = ["MatchLabels", "MatchLabelsOptions"]

_LONGEST = 10_000  # code points of a caption that are looked at
_SHORTEST = 3  # letters; "of" in "cup of tea" says nothing
_WORD = re.compile(r"[^\W_]+")


class MatchLabelsOptions(Options):
    """Which text, and which labels."""

    column: TextColumn = Field("caption", description="text column, in English")
    labels: ColumnName = Field(
        "classify_image_top", description="column with a label, a list of labels, or such as classify_image writes"
    )


class MatchLabels(Stage[MatchLabelsOptions]):
    """How many of a picture's labels the caption names: a word of both has the same stem.

    Reads the caption (or `column`) and `labels`. Writes `matched_labels_count`, from 0 to the number of labels: a label
    such as `golden retriever` counts when one of its words of three letters or more, stemmed and in lower case, is the
    stem of a word of the caption ("three retrievers"). NULL: the caption or the labels are NULL. The first 10,000 code
    points of a caption are looked at.

    Source: Sharma et al. 2018 (CC3M), image & text-based filtering: 5 to 20 labels a picture, captions none of whose
    words maps to a label are dropped; CC12M left the rule as it was. Stems by Porter's algorithm (nltk): which stemmer
    they used is not published.
    """

    name = "match_labels"
    version = 1
    label = "matched_labels"

    @classmethod
    def contract(cls, options: MatchLabelsOptions) -> Contract:
        """Reads the two columns that the options name."""
        return Contract(
            writes=parse_schema("matched_labels_count: int64"),
            reads=tuple(dict.fromkeys((options.column, options.labels))),
            needs=Needs(modules=("nltk",), extra="text"),
        )

    @classmethod
    def check_types(cls, options: MatchLabelsOptions, schema: pa.Schema) -> None:
        """RecipeError when the labels are neither text, a list of text, nor a list of structs with a `label`."""
        super().check_types(options, schema)
        kind = schema.field(options.labels).type
        inner = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
        if pa.types.is_struct(inner) and inner.get_field_index("label") >= 0:
            inner = inner.field("label").type
        if not (pa.types.is_string(inner) or pa.types.is_large_string(inner)):
            raise RecipeError(f"match_labels: column {options.labels!r} is {kind}; name one that classify_image writes")

    def open(self, device: str) -> None:
        """Make the stemmer."""
        self._stem = Stemmer().stem

    def compute(self, batch: Batch) -> Columns:
        """One count per row that has a caption and labels."""
        pairs = zip(batch[self.options.column], batch[self.options.labels], strict=True)
        return {"matched_labels_count": [self._count(text, labels) for text, labels in pairs]}

    def _count(self, text: str | None, labels: Any) -> int | None:
        if text is None or labels is None:
            return None
        words = self._stems(text[:_LONGEST])
        return sum(1 for label in _texts(labels) if words & self._stems(label))

    def _stems(self, text: str) -> set[str]:
        return {self._stem(word) for word in _WORD.findall(text.lower()) if len(word) >= _SHORTEST}


def _texts(labels: Any) -> list[str]:
    """The labels as texts, whichever form the column has."""
    several = [labels] if isinstance(labels, str) else labels
    found = [each["label"] if isinstance(each, dict) else each for each in several]
    return [each for each in found if each is not None]
