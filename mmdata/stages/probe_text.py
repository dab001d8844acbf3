"""Counts and ratios of a caption, in the units that published filters use.

In: a text column, and a vocabulary file where rare words are to be counted. Out: one row of numbers per caption. Fails:
RecipeError for a vocabulary that is not there or cannot be read; no caption fails.
"""

from __future__ import annotations

import math
import os
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from pydantic import Field

from mmdata.batch import Batch
from mmdata.errors import RecipeError
from mmdata.stage import Columns, Contract, FilePath, Options, Stage, TextColumn, Weights, parse_schema

__all__ = ["ProbeText", "ProbeTextOptions"]

_LONGEST = 100_000  # code points of a caption that are looked at
_URL = re.compile(r"(?:https?://|www\.)\S", re.IGNORECASE)
_FILE_NAME = re.compile(r"\S+\.(?:jpe?g|png|gif|webp|bmp|tiff?|svg|avif|heic)", re.IGNORECASE)

_RUN = re.compile(r"(.)\1+", re.DOTALL)
_DIGITS, _CAPITALS, _SMALL = (text.encode() for text in (string.digits, string.ascii_uppercase, string.ascii_lowercase))
_SYMBOLS = string.punctuation.encode()

_WRITES = parse_schema(
    "text_char_count: int64, text_collapsed_char_count: int64, text_word_count: int64, text_mean_word_length: float64, "
    "text_type_token_ratio: float64, text_repetition_ratio: float64, text_top_word_ratio: float64, "
    "text_word_ngram_ratio: float64, text_char_ngram_ratio: float64, text_char_run_count: int64, "
    "text_alphanumeric_ratio: float64, text_digit_ratio: float64, text_symbol_ratio: float64, "
    "text_capital_ratio: float64, text_capital_word_ratio: float64, text_starts_capital: bool, text_has_url: bool, "
    "text_is_file_name: bool"
)
_RARE = parse_schema("text_rare_word_count: int64")


class ProbeTextOptions(Options):
    """Which text to probe, how long its n-grams are, and which words are known."""

    column: TextColumn = Field("caption", description="text column to probe")
    word_ngram: int = Field(2, ge=1, le=20, description="words in an n-gram of text_word_ngram_ratio")
    char_ngram: int = Field(10, ge=1, le=100, description="code points in an n-gram of text_char_ngram_ratio")
    vocabulary: FilePath | None = Field(
        None, description="UTF-8 text, a word a line, or a word, a tab and its count: asks for text_rare_word_count"
    )
    vocabulary_min_count: int = Field(5, ge=1, description="words with a smaller count in the vocabulary are rare")


class ProbeText(Stage[ProbeTextOptions]):
    """Lengths, repetition and ratios of a caption, as given: a word is what stands between white space.

    Reads the caption (or `column`). Characters are Unicode code points; words are compared case-folded, their
    punctuation is part of them. Writes
    `text_char_count` (as LAION counts them) and `text_collapsed_char_count` (trimmed, white space collapsed: COYO);
    `text_word_count` (Python's split: DataComp, CC12M, ALIGN's unigrams) and `text_mean_word_length` in characters;
    `text_type_token_ratio` in (0, 1] (distinct words / words), `text_repetition_ratio` in [0, 1) (1 minus that: CC12M),
    `text_top_word_ratio` in (0, 1] (share of the commonest word among the words);
    `text_word_ngram_ratio` in [0, 1] (n-grams of `word_ngram` words that come more than once / all n-grams) and
    `text_char_ngram_ratio` in [0, 1] (occurrences of the k commonest n-grams of `char_ngram` characters / all, k the
    integer root of the number of distinct ones, of those that come more than once): 0 for a text shorter than one;
    `text_char_run_count` (longest run of one character);
    `text_alphanumeric_ratio`, `text_digit_ratio`, `text_symbol_ratio` in [0, 1] (share of the characters that are
    letters or numbers, decimal digits, punctuation or symbols, of any script);
    `text_capital_ratio` in [0, 1] (upper-case and title-case letters / letters), `text_capital_word_ratio` in [0, 1]
    (words that begin with such a letter / words that begin with a letter), `text_starts_capital` (the first letter of
    the text is one); `text_has_url` (`http://`, `https://` or `www.` stands somewhere) and `text_is_file_name` (the
    trimmed caption is one word that ends in an image file's extension);
    with `vocabulary` also `text_rare_word_count`: words that the vocabulary does not list, compared case-folded and
    without the marks at their ends; words without a letter or number are not counted.

    NULL: the caption is NULL, in all columns; ratios and the mean also where there is nothing to divide by (no word,
    no letter, no character). Neither is a failure. Marks that combine with a letter, as Indic vowels do, are no letters
    to Unicode and lower `text_alphanumeric_ratio`. Everything but `text_char_count` is told from a caption's first
    100,000 code points.
    Source: Schuhmann et al. 2021 (LAION-400M: ≥ 5 characters), Gadre et al. 2023 (DataComp basic filter: > 2 words,
    > 5 characters), Changpinyo et al. 2021 (CC12M: 3 to 256 words, repetition ≤ 0.2); the two n-gram ratios are those
    of ROOTS (Laurençon et al. 2022, arXiv 2303.03915), which data-juicer computes with 10 words and 10 characters.
    """

    name = "probe_text"
    version = 2
    on_request = (("text_rare_word_count", "vocabulary: FILE"),)
    label = "text"
    _vocabulary: frozenset[str] | None = None

    @classmethod
    def contract(cls, options: ProbeTextOptions) -> Contract:
        """Reads the column that the options name; a vocabulary enters by its content."""
        if options.vocabulary is None:
            return Contract(writes=_WRITES, reads=(options.column,))
        _vocabulary_of(options.vocabulary, options.vocabulary_min_count)
        files = (Weights("vocabulary", path=options.vocabulary),)
        return Contract(writes=_WRITES.append(_RARE.field(0)), reads=(options.column,), weights=files)

    def open(self, device: str) -> None:
        """Read the vocabulary, where there is one."""
        if self.options.vocabulary is not None:
            self._vocabulary = _vocabulary_of(self.options.vocabulary, self.options.vocabulary_min_count)

    def compute(self, batch: Batch) -> Columns:
        """One row of counts per caption."""
        options, vocabulary = self.options, self._vocabulary
        names = [*_WRITES.names, *(_RARE.names if options.vocabulary is not None else ())]
        rows: list[Sequence[int | float | bool | None]] = []
        for text in batch[options.column]:
            if text is None:
                rows.append((None,) * len(names))
                continue
            shown = text[:_LONGEST]
            words = shown.split()
            row = (len(text), *_probe(shown, words, options.word_ngram, options.char_ngram))
            rows.append(row if vocabulary is None else (*row, _rare(words, vocabulary)))
        return {name: [row[i] for row in rows] for i, name in enumerate(names)}


def _probe(text: str, words: list[str], word_ngram: int, char_ngram: int) -> tuple[int | float | bool | None, ...]:
    """Everything after `text_char_count`, in the order of the schema."""
    folded = [word.casefold() for word in words]
    counts = Counter(folded)
    distinct, total, length = len(counts), len(words), len(text)
    letters, numbers, digits, symbols, capitals = _kinds_ascii(text) if text.isascii() else _kinds(text)
    first_letters = [word[0] for word in words if word[0].isalpha()]
    first = next(filter(str.isalpha, text), None)
    in_words = sum(map(len, words))
    return (
        in_words + max(0, total - 1),
        total,
        in_words / total if words else None,
        distinct / total if words else None,
        1 - distinct / total if words else None,
        max(counts.values()) / total if words else None,
        _word_ngram_ratio(folded, word_ngram),
        _char_ngram_ratio(text, char_ngram),
        max((len(run[0]) for run in _RUN.finditer(text)), default=min(1, length)),
        (letters + numbers) / length if text else None,
        digits / length if text else None,
        symbols / length if text else None,
        capitals / letters if letters else None,
        sum(map(_is_capital, first_letters)) / len(first_letters) if first_letters else None,
        first is not None and _is_capital(first),
        _URL.search(text) is not None,
        total == 1 and _FILE_NAME.fullmatch(words[0]) is not None,
    )


def _kinds(text: str) -> tuple[int, int, int, int, int]:
    """How many letters, numbers, decimal digits, symbols and capitals."""
    letters = sum(map(str.isalpha, text))
    numbers = sum(map(str.isalnum, text)) - letters
    return letters, numbers, sum(map(str.isdecimal, text)), sum(map(_is_symbol, text)), sum(map(_is_capital, text))


def _kinds_ascii(text: str) -> tuple[int, int, int, int, int]:
    """As `_kinds`, ten times as fast."""
    data = text.encode()
    length = len(data)
    digits, capitals = (length - len(data.translate(None, kind)) for kind in (_DIGITS, _CAPITALS))
    letters = capitals + length - len(data.translate(None, _SMALL))
    return letters, digits, digits, length - len(data.translate(None, _SYMBOLS)), capitals


def _is_capital(character: str) -> bool:
    return character.isalpha() and (character.isupper() or character.istitle())  # Ⅷ and Ⓐ are no letters


def _is_symbol(character: str) -> bool:
    """Punctuation or a symbol: Unicode categories P and S."""
    return not character.isalnum() and unicodedata.category(character)[0] in "PS"


def _word_ngram_ratio(words: list[str], size: int) -> float:
    counts = Counter(zip(*(words[i:] for i in range(size)), strict=False)).values()
    return sum(c for c in counts if c > 1) / sum(counts) if counts else 0.0


def _char_ngram_ratio(text: str, size: int) -> float:
    counts = Counter(text[i : i + size] for i in range(len(text) - size + 1))
    if not counts:
        return 0.0
    repeated = sorted((c for c in counts.values() if c > 1), reverse=True)
    return sum(repeated[: math.isqrt(len(counts))]) / sum(counts.values())


def _bare(word: str) -> str:
    """The word case-folded, without what is neither letter nor number at its ends."""
    begin, end = 0, len(word)
    while begin < end and not word[begin].isalnum():
        begin += 1
    while end > begin and not word[end - 1].isalnum():
        end -= 1
    return word[begin:end].casefold()


def _rare(words: list[str], vocabulary: frozenset[str]) -> int:
    return sum(1 for word in map(_bare, words) if word and word not in vocabulary)


def _vocabulary_of(path: str, min_count: int) -> frozenset[str]:
    """The words of the file that come at least `min_count` times; a word without a count is in."""
    try:
        found = os.stat(path)
        return _read_vocabulary(path, min_count, found.st_mtime_ns, found.st_size)
    except (OSError, ValueError) as error:  # not UTF-8, or a path that cannot be one
        raise RecipeError(
            f"probe_text: cannot read the vocabulary {path!r} ({error}); expected UTF-8 text, a word a line"
        ) from None


@lru_cache(maxsize=2)
def _read_vocabulary(path: str, min_count: int, changed: int, size_bytes: int) -> frozenset[str]:
    """Remembered while the file stays as it is: a plan asks several times."""
    known = set()
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            word, tab, count = line.rstrip("\r\n").partition("\t")
            if tab and not (count.isascii() and count.isdecimal()):
                raise RecipeError(f"probe_text: {path}, line {number}: {count[:40]!r} after the tab is no count")
            if not tab or int(count[:19]) >= min_count:
                known.add(_bare(word))
    known.discard("")
    return frozenset(known)
