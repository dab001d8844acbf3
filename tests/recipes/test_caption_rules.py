"""Rules of CC3M, CC12M, COYO-700M, ALIGN and MetaCLIP on rows on either side of them, as the recipes write them.

What needs a thousand rows, or a server that says something else, is asked here of the recipe's SQL alone; the other
rules are run from a list to an export in test_shipped.
"""

from __future__ import annotations

import re
from typing import Any

import pyarrow as pa
import pytest

from mmdata import catalogue
from mmdata.filters import FilterEngine, check_filter
from mmdata.recipe import FilterStep, load


def kept(recipe: str, name: str, column: str, values: list[Any], kind: pa.DataType) -> list[Any]:
    """Those of the values that the recipe's filter of that name keeps."""
    [sql] = [s.sql for s in load(catalogue.recipe_folder() / f"{recipe}.yaml").steps if getattr(s, "name", "") == name]
    table = pa.table({column: pa.array(values, kind)})
    found = FilterEngine().evaluate(table, check_filter(name, sql, table.schema))
    return [value for value, outcome in zip(values, found.tolist(), strict=True) if outcome == 1]


def kept_sizes(recipe: str, *sizes: tuple[int, int]) -> list[tuple[int, int]]:
    """Those of the (width, height) that every filter over sizes keeps."""
    steps = load(catalogue.recipe_folder() / f"{recipe}.yaml").steps
    table = pa.table({"original_width_px": [w for w, _ in sizes], "original_height_px": [h for _, h in sizes]})
    left = [True] * len(sizes)
    filters = [s for s in steps if isinstance(s, FilterStep) and "original_width_px" in s.sql]
    assert len(filters) == 2
    for step in filters:
        found = FilterEngine().evaluate(table, check_filter(step.name, step.sql, table.schema))
        left = [before and outcome == 1 for before, outcome in zip(left, found.tolist(), strict=True)]
    return [size for size, stays in zip(sizes, left, strict=True) if stays]


@pytest.mark.parametrize(
    ("recipe", "sizes", "expected"),
    [
        ("cc3m", [(802, 401), (400, 400), (803, 401), (401, 802), (401, 401)], [(802, 401), (401, 802), (401, 401)]),
        ("cc12m", [(900, 401), (400, 400), (1005, 402), (1003, 401)], [(900, 401), (1005, 402)]),
        ("coyo700m", [(200, 600), (199, 300), (200, 601)], [(200, 600)]),
        ("align", [(201, 602), (200, 300), (201, 603), (602, 201)], [(201, 602), (602, 201)]),
    ],
)
def test_sizes_and_shapes(recipe: str, sizes: list[tuple[int, int]], expected: list[tuple[int, int]]):
    assert kept_sizes(recipe, *sizes) == expected


@pytest.mark.parametrize(
    ("recipe", "name", "column", "values", "expected"),
    [
        ("align", "few_texts", "same_picture_count", [1, 1000, 1001, None], [1, 1000]),
        ("align", "few_pictures", "same_text_count", [10, 11], [10]),
        ("align", "common_words", "rare_ngrams_count", [0, 1, None], [0]),
        ("align", "unigrams", "text_word_count", [2, 3, 20, 21], [3, 20]),
        ("cc12m", "words", "text_word_count", [2, 3, 256, 257], [3, 256]),
        ("coyo700m", "heavy_enough", "size_bytes", [5119, 5120], [5120]),
        ("coyo700m", "characters", "text_collapsed_char_count", [5, 6, 1000, 1001], [6, 1000]),
        ("coyo700m", "words", "text_word_count", [2, 3, 256, 257], [3, 256]),
        ("coyo700m", "rare", "same_caption_count", [10, 11], [10]),
        ("coyo700m", "noun", "pos_noun_count", [0, 1, None], [1]),
        ("cc3m", "preposition", "pos_preposition_count", [0, 1, None], [1]),
        *((r, "noun", "pos_noun_count", [0, 1, None], [1]) for r in ("cc3m", "cc12m")),
        *((r, "determiner", "pos_determiner_count", [0, 1, None], [1]) for r in ("cc3m", "cc12m")),
        *((r, "labelled", "matched_labels_count", [0, 1, None], [1]) for r in ("cc3m", "cc12m")),
    ],
)
def test_counts(recipe: str, name: str, column: str, values: list[int | None], expected: list[int]):
    assert kept(recipe, name, column, values, pa.int64()) == expected


@pytest.mark.parametrize("recipe", ["cc3m", "cc12m"])
def test_only_jpeg(recipe: str):
    said = ["image/jpeg", "image/jpg", "image/png", "image/webp", None]
    assert kept(recipe, "jpeg", "content_type", said, pa.string()) == ["image/jpeg", "image/jpg", None]


@pytest.mark.parametrize(
    ("recipe", "name", "column", "values", "expected"),
    [
        ("cc12m", "repetition", "text_repetition_ratio", [0.0, 0.2, 0.201, None], [0.0, 0.2]),
        # Figures of ours
        ("cc3m", "distinct", "text_type_token_ratio", [0.699, 0.7, 1.0, None], [0.7, 1.0]),
        ("cc3m", "repetition", "text_word_ngram_ratio", [0.0, 0.2, 0.201, None], [0.0, 0.2]),
        ("cc3m", "capitals", "text_capital_word_ratio", [0.7, 0.701, None], [0.7, None]),
        ("cc3m", "few_nouns", "pos_noun_ratio", [0.7, 0.701, None], [0.7]),
        ("metaclip", "safe", "nudity_score", [0.0, 0.499, 0.5, None], [0.0, 0.499]),
    ],
)
def test_ratios(recipe: str, name: str, column: str, values: list[float | None], expected: list[float | None]):
    assert kept(recipe, name, column, values, pa.float64()) == expected


def test_stock_phrases_of_cc3m():
    texts = ["Click to enlarge the cat", "a click to enlarge", "a cat, stock photo", "a stock photo of a cat", "a cat"]
    expected = ["a click to enlarge", "a stock photo of a cat", "a cat"]
    assert kept("cc3m", "no_boilerplate", "caption", texts, pa.string()) == expected


@pytest.mark.parametrize("recipe", ["cc3m", "cc12m", "align", "dfn", "tmars", "semdedup"])
def test_recalled_rules_are_called_that(recipe: str):
    """What could not be read in the source says so where a user looks."""
    comment = " ".join(catalogue.shipped_recipe(recipe).partition("\nname:")[0].replace("\n#", "").split())
    assert re.search(r"(could not|neither .*? could) be verified", comment, re.I)
