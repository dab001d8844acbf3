"""Captions with words or pairs of words that are rare in the whole dataset.

In: one text column of all rows. Out: per row how many of its unigrams and bigrams are not among the dataset's
commonest. Fails: only a column that holds no text, before anything runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from mmdata.errors import RecipeError
from mmdata.models.shingles import Shingling, lengths, pieces, shingle
from mmdata.stage import ColumnName, Columns, Contract, Group, GroupRows, Needs, Options, parse_schema

__all__ = ["RareNgrams", "RareNgramsOptions"]

_SIZES = (1, 2)  # words in an n-gram
_LETTERS = 3  # code points to an n-gram: words of five and a space, in a unigram and a bigram each
_OCCURRENCE = np.dtype([("ngram", "<u8"), ("row", "<i8")])


class RareNgramsOptions(Options):
    """Which text, and how many of its n-grams are common."""

    column: ColumnName = Field("caption", description="text column")
    common: int = Field(100_000_000, ge=1, description="so many of the commonest unigrams and bigrams are not rare")
    min_count: int = Field(1, ge=1, description="an n-gram that comes less often is rare, however few there are")


class RareNgrams(Group[RareNgramsOptions]):
    """How many unigrams and bigrams of a caption are outside the commonest of the whole dataset.

    Reads the caption (or `column`). A unigram is a word between white space, in lower case; a bigram two words that
    follow one another. All of them, over all rows that reach the group, are counted together; common are the `common`
    ones that come most often (and those that come as often as the last of them), as far as they come `min_count` times.
    Writes `rare_ngrams_count`, the number of the caption's n-grams that are not, each as often as it stands there: keep
    the rows where it is 0. NULL: the caption is NULL. Of a caption the first 10,000 code points are looked at.

    It is a function of the whole set: a filter above it that changes moves the counts. They are exact, but for n-grams
    with the same 64-bit hash (of a thousand million, two are likely not to be told apart once in 37 datasets). Shards
    are read one at a time; n-grams lie in a scratch folder, 16 bytes each, and memory holds one in up to 1024 parts of
    them, some 64 MB and what the commonest n-gram has, and 8 bytes a row.
    Source: Jia et al. 2021 (ALIGN, arXiv 2102.05918): texts with a token outside the 100 million most frequent unigrams
    and bigrams of the raw data are dropped. Not verified: their tokens and case are recalled, not read.
    """

    name = "rare_ngrams"
    version = 1
    label = "rare_ngrams"
    streams = True
    bucket_rows = 4_000_000  # n-grams of a bucket, which is what is in memory at a time

    @classmethod
    def contract(cls, options: RareNgramsOptions) -> Contract:
        """Reads the column that the options name."""
        needs = Needs(modules=("xxhash",), extra="minhash")
        return Contract(writes=parse_schema("rare_ngrams_count: int64"), reads=(options.column,), needs=needs)

    @classmethod
    def check_types(cls, options: RareNgramsOptions, schema: pa.Schema) -> None:
        """RecipeError when the column holds no text."""
        kind = schema.field(options.column).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise RecipeError(f"rare_ngrams: column {options.column!r} is {kind}; name a column of text")

    def compute_streamed(self, rows: GroupRows, scratch: Path) -> Columns:
        """One count per row: n-grams go into buckets by hash, are counted, then compared with the threshold."""
        expected = sum(int(lengths(p.column(self.options.column)).sum()) for p in rows.parts([self.options.column]))
        buckets = 1
        while buckets < 1024 and buckets * self.bucket_rows < expected // _LETTERS:
            buckets *= 2
        missing = np.zeros(len(rows), bool)
        for ngrams, first, absent in _occurrences(rows, self.options.column):
            missing[first : first + len(absent)] = absent
            _spill(ngrams, buckets, scratch)
        files = sorted(scratch.glob("*.ngrams"))
        threshold = max(self.options.min_count, self._least_common(files))
        rare = np.zeros(len(rows), np.int64)
        for file in files:
            found = np.fromfile(file, _OCCURRENCE)
            _, which, counts = np.unique(found["ngram"], return_inverse=True, return_counts=True)
            np.add.at(rare, found["row"][counts[which] < threshold], 1)
        return {"rare_ngrams_count": pa.array(rare, mask=missing)}

    def _least_common(self, files: list[Path]) -> int:
        """How often the last of the `common` n-grams comes; 1 where there are not so many."""
        distinct: Counter[int] = Counter()  # count → n-grams that come so often
        for file in files:
            _, counts = np.unique(np.fromfile(file, _OCCURRENCE)["ngram"], return_counts=True)
            values, times = np.unique(counts, return_counts=True)
            distinct.update(dict(zip(values.tolist(), times.tolist(), strict=True)))
        left = self.options.common
        for count in sorted(distinct, reverse=True):
            left -= distinct[count]
            if left <= 0:
                return count
        return 1


def _occurrences(rows: GroupRows, column: str) -> Iterator[tuple[npt.NDArray[np.void], int, npt.NDArray[np.bool_]]]:
    """Of each piece of rows its n-grams with their rows, the position of its first, and which have no text."""
    first = 0
    for part in rows.parts([column]):
        for start, stop in pieces(part.column(column)):
            texts = part.column(column).slice(start, stop - start)
            for size in _SIZES:
                found = shingle(texts, Shingling("words", size, ("lower", "whitespace"), whole_short=False))
                ngrams = np.empty(len(found.hashes), _OCCURRENCE)
                ngrams["ngram"] = found.hashes
                ngrams["row"] = first + start + np.repeat(np.arange(len(texts)), np.diff(found.offsets))
                yield ngrams, first + start, np.asarray(texts.is_null())
        first += len(part)


def _spill(ngrams: npt.NDArray[np.void], buckets: int, scratch: Path) -> None:
    """Append each n-gram to the file of its bucket: the highest bits of its hash."""
    bucket = (ngrams["ngram"] >> np.uint64(54)).astype(np.int64) * buckets >> 10
    order = np.argsort(bucket, kind="stable")
    ends = np.searchsorted(bucket[order], np.arange(buckets + 1))
    ngrams = ngrams[order]
    for number in np.flatnonzero(np.diff(ends)).tolist():
        with open(scratch / f"{number:04d}.ngrams", "ab") as file:
            ngrams[ends[number] : ends[number + 1]].tofile(file)
