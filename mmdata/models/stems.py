"""Stems of English words, by nltk's Porter stemmer; it needs no data of its own.

In: a word. Out: its stem, `running` → `run`. A bounded number of words is remembered.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

__all__ = ["Stemmer"]

_REMEMBERED = 100_000
_LONGEST = 100  # code points; a longer word is its own stem


class Stemmer:
    """Porter 1980, in nltk's form with later corrections of the author."""

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer

        stemmer: Any = PorterStemmer()
        self._remembered = lru_cache(_REMEMBERED)(lambda word: str(stemmer.stem(word)))

    def stem(self, word: str) -> str:
        """What the word ends up as."""
        return word if len(word) > _LONGEST else self._remembered(word)
