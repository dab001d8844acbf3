"""Rare n-grams against counts done by hand, and against a dictionary that counts texts, not hashes."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from held_rows import HeldRows
from pydantic import ValidationError

from mmdata.errors import RecipeError
from mmdata.groups.rare_ngrams import RareNgrams, RareNgramsOptions
from mmdata.models import shingles

TEXTS = ["a red dog", "A red  dog", "a red cat", "a dog", None, "", "zebra"]
# unigrams: a 4, red 3, dog 3, cat 1, zebra 1; bigrams: "a red" 3, "red dog" 2, "red cat" 1, "a dog" 1


def rare(texts: list[str | None], scratch: Path, part_rows: int = 100, **options: Any) -> list[int | None]:
    table = pa.table({"row_id": pa.array(range(len(texts))), "caption": pa.array(texts, pa.string())})
    answer = RareNgrams(RareNgramsOptions(**options)).compute_streamed(HeldRows(table, part_rows), scratch)
    return answer["rare_ngrams_count"].to_pylist()


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ({}, [0, 0, 0, 0, None, 0, 0]),  # all are among the 100 million
        ({"min_count": 2}, [0, 0, 2, 1, None, 0, 1]),  # cat, red cat | a dog | zebra
        ({"min_count": 3}, [1, 1, 2, 1, None, 0, 1]),  # red dog too
        ({"common": 1}, [4, 4, 4, 2, None, 0, 1]),  # only "a"
        ({"common": 2}, [1, 1, 2, 1, None, 0, 1]),  # the second comes three times, and so do two others
        ({"common": 5}, [0, 0, 2, 1, None, 0, 1]),  # red dog is the fifth
        ({"common": 5, "min_count": 3}, [1, 1, 2, 1, None, 0, 1]),
    ],
)
def test_counts_by_hand(options: dict[str, int], counts: list[int | None], tmp_path: Path):
    assert rare(TEXTS, tmp_path, **options) == counts


@pytest.mark.parametrize("part_rows", [97, 1000])
def test_against_a_dictionary_of_texts(part_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In many buckets, for their length asks for so many of 100 n-grams each; and in pieces of some ten texts."""
    monkeypatch.setattr(RareNgrams, "bucket_rows", 100)
    monkeypatch.setattr(shingles, "_HELD", 500)
    rng = np.random.default_rng(3)
    words = [f"w{i}" for i in range(300)]
    texts = [" ".join(words[min(299, rng.zipf(1.4))] for _ in range(rng.integers(0, 25))) for _ in range(1000)]

    def ngrams(text: str) -> list[tuple[str, ...]]:
        found = text.split()
        return [*((w,) for w in found), *pairwise(found)]

    counts = Counter(ngram for text in texts for ngram in ngrams(text))
    least = sorted(counts.values(), reverse=True)[399]
    expected = [sum(counts[ngram] < least for ngram in ngrams(text)) for text in texts]
    assert rare(texts, tmp_path, part_rows, common=400) == expected
    assert len(list(tmp_path.iterdir())) == 256
    assert 0 < sum(map(bool, expected)) < 1000


def test_the_package_that_hashes_words_is_asked_for():
    """So that a plan says what to install, where it is not there."""
    assert RareNgrams.contract(RareNgramsOptions()).needs.modules == ("xxhash",)


def test_no_rows(tmp_path: Path):
    assert rare([], tmp_path) == []


def test_a_column_without_text_is_refused():
    with pytest.raises(RecipeError, match="'size_bytes' is int64"):
        RareNgrams.check_types(RareNgramsOptions(column="size_bytes"), pa.schema([("size_bytes", pa.int64())]))
    with pytest.raises(ValidationError):
        RareNgramsOptions(common=0)
