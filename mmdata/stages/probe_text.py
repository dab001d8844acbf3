"""Counts and ratios of a caption, in the units that published filters use."""

from __future__ import annotations

import re

from pydantic import Field

from mmdata.batch import Batch
from mmdata.stage import ColumnName, Columns, Contract, Options, Stage, parse_schema

__all__ = ["ProbeText", "ProbeTextOptions"]

_URL = re.compile(r"(?:https?://|www\.)\S", re.IGNORECASE)
_FILE_NAME = re.compile(r"\S+\.(?:jpe?g|png|gif|webp|bmp|tiff?|svg|avif|heic)", re.IGNORECASE)

_WRITES = parse_schema(
    "text_char_count: int64, text_word_count: int64, text_repetition_ratio: float64, text_alphanumeric_ratio: float64, "
    "text_digit_ratio: float64, text_has_url: bool, text_is_file_name: bool"
)


class ProbeTextOptions(Options):
    """Which text to probe."""

    column: ColumnName = Field("caption", description="text column to probe")


class ProbeText(Stage[ProbeTextOptions]):
    """Lengths and ratios of a caption, as given: no case folding of counts, no trimming.

    Reads the caption (or `column`). Writes `text_char_count` (Unicode code points, as LAION counts them),
    `text_word_count` (split at white space, DataComp's and CC12M's rule), `text_repetition_ratio` in [0, 1)
    (1 − unique words / words, words case-folded), `text_alphanumeric_ratio` and `text_digit_ratio` in [0, 1] (share of
    code points that are letters or numbers, and of those that are decimal digits, of any script), `text_has_url`
    (`http://`, `https://` or `www.` stands somewhere) and `text_is_file_name` (the trimmed caption is one word that
    ends in an image file's extension).

    NULL: the caption is NULL, in all columns; the ratios also where there is nothing to divide by (no word, or no
    character). Neither is a failure. Marks that combine with a letter, as Indic vowels do, are no letters to Unicode
    and lower `text_alphanumeric_ratio`.
    Source: Schuhmann et al. 2021 (LAION-400M: ≥ 5 characters), Gadre et al. 2023 (DataComp basic filter: > 2 words,
    > 5 characters), Changpinyo et al. 2021 (CC12M: 3 to 256 words, repetition ≤ 0.2).
    """

    name = "probe_text"
    version = 1
    label = "text"

    @classmethod
    def contract(cls, options: ProbeTextOptions) -> Contract:
        """Reads the column that the options name."""
        return Contract(writes=_WRITES, reads=(options.column,))

    def compute(self, batch: Batch) -> Columns:
        """One row of counts per caption."""
        rows = [_probe(text) for text in batch[self.options.column]]
        return {name: [row[i] for row in rows] for i, name in enumerate(_WRITES.names)}


def _probe(text: str | None) -> tuple[int | float | bool | None, ...]:
    if text is None:
        return (None,) * len(_WRITES)
    words = text.split()
    folded = {word.casefold() for word in words}
    return (
        len(text),
        len(words),
        1 - len(folded) / len(words) if words else None,
        sum(map(str.isalnum, text)) / len(text) if text else None,
        sum(map(str.isdecimal, text)) / len(text) if text else None,
        _URL.search(text) is not None,
        len(words) == 1 and _FILE_NAME.fullmatch(words[0]) is not None,
    )
