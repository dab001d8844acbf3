"""Parts of speech of captions, against sentences that were parsed by hand."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from batches import make_batch

from mmdata.models.english import LONGEST, EnglishPipeline
from mmdata.stages.tag_text import TagText, TagTextOptions

PARTS = ("noun", "determiner", "preposition", "verb", "adjective")


@pytest.fixture(scope="module")
def stage() -> TagText:
    opened = TagText(TagTextOptions())
    opened.open("cpu")
    return opened


def tag(stage: TagText, *texts: str | None) -> list[dict[str, Any]]:
    columns = stage.compute(make_batch(caption=pa.array(texts, pa.string())))
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


@pytest.mark.parametrize(
    ("text", "tokens", "counts"),  # counts of nouns, determiners, prepositions, verbs, adjectives, by hand
    [
        ("a dog on the grass", 5, (2, 2, 1, 0, 0)),
        ("A man riding a red bicycle down the street", 9, (3, 3, 1, 1, 1)),
        ("The old house stands by the quiet river in winter .", 11, (3, 2, 2, 1, 2)),
        ("Two children are playing with a ball in the park", 10, (3, 2, 2, 2, 0)),
        ("sunset", 1, (1, 0, 0, 0, 0)),
        ("the cat", 2, (1, 1, 0, 0, 0)),
        ("slowly and carefully", 3, (0, 0, 0, 0, 0)),
        ("The tower of London in England", 6, (3, 1, 2, 0, 0)),  # two of the nouns are names
    ],
)
def test_sentences_parsed_by_hand(stage: TagText, text: str, tokens: int, counts: tuple[int, ...]):
    (row,) = tag(stage, text)
    assert row["pos_token_count"] == tokens
    assert tuple(row[f"pos_{part}_count"] for part in PARTS) == counts
    assert tuple(row[f"pos_{part}_ratio"] for part in PARTS) == tuple(count / tokens for count in counts)


def test_null_has_no_values_and_an_empty_caption_no_ratios(stage: TagText):
    missing, empty, blank = tag(stage, None, "", " \n\t ")
    assert set(missing.values()) == {None}
    for row in (empty, blank):
        assert {v for name, v in row.items() if name.endswith("_count")} == {0}
        assert {v for name, v in row.items() if name.endswith("_ratio")} == {None}


def test_only_the_beginning_of_a_huge_caption_is_tagged(stage: TagText):
    (row,) = tag(stage, "dogs " * 2_000_000)
    assert row["pos_token_count"] == LONGEST // 5
    (row,) = tag(stage, "dogs " + "!" * 2_000_000 + " dogs")
    assert 1 <= row["pos_token_count"] <= 201


def test_words_that_were_read_are_forgotten(stage: TagText):
    """Memory must not grow with the number of words ever seen."""
    tag(stage, "warm up")
    known = len(stage._pipeline._pipeline.vocab.strings)
    tag(stage, *(f"qzx{i} vbn{i}" for i in range(2_000)))
    assert len(stage._pipeline._pipeline.vocab.strings) - known < 100


def test_another_column(stage: TagText):
    assert TagText.contract(TagTextOptions(column="title")).reads == ("title",)


def test_persons_are_found_where_they_stand():
    text = "x" * 300 + " Barack Obama and Angela Merkel in the White House"
    [spans, nobody] = EnglishPipeline("persons").persons([text, "a red bicycle"])
    assert [text[start:stop] for start, stop in spans] == ["Barack Obama", "Angela Merkel"]
    assert nobody == []
