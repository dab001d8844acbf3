"""Caption statistics against counts done by hand."""

from __future__ import annotations

import pyarrow as pa
import pytest
from batches import make_batch

from mmdata.stages.probe_text import ProbeText, ProbeTextOptions


def probe(*texts: str | None) -> list[dict[str, object]]:
    columns = ProbeText(ProbeTextOptions()).compute(make_batch(caption=pa.array(texts, pa.string())))
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def test_counts_of_a_caption():
    (row,) = probe("Two red dogs, 2 Dogs!")
    # T w o _ r e d _ d o g s , _ 2 _ D o g s ! : 21 code points, 4 of them spaces, 2 marks, 1 digit
    assert row["text_char_count"] == 21
    assert row["text_word_count"] == 5  # Two, red, dogs,  2, Dogs!
    assert row["text_repetition_ratio"] == 0  # "dogs," and "dogs!" are different words
    assert row["text_alphanumeric_ratio"] == 15 / 21
    assert row["text_digit_ratio"] == 1 / 21


@pytest.mark.parametrize(
    ("text", "repeated"),
    [("a a a b", 0.5), ("A a", 0.5), ("one two three", 0.0), ("ho ho ho ho", 0.75)],  # CC12M: 1 - unique / total
)
def test_repetition(text: str, repeated: float):
    assert probe(text)[0]["text_repetition_ratio"] == repeated


def test_datacomp_basic_filter_cases():
    # more than 2 words and more than 5 characters: "a dog" falls, "a red dog" stays (3 words, 9 characters)
    dog, red = probe("a dog", "a red dog")
    assert (dog["text_word_count"], dog["text_char_count"]) == (2, 5)
    assert (red["text_word_count"], red["text_char_count"]) == (3, 9)


def test_scripts_other_than_latin():
    chinese, arabic_digits, family = probe("两只红狗", "٣٤", "👩‍👩‍👧")
    assert chinese["text_char_count"] == 4
    assert chinese["text_alphanumeric_ratio"] == 1
    assert arabic_digits["text_digit_ratio"] == 1
    assert family["text_char_count"] == 5  # three faces and two joiners
    assert family["text_alphanumeric_ratio"] == 0


def test_null_has_no_values_and_an_empty_caption_no_ratios():
    missing, empty, blank = probe(None, "", " \n ")
    assert set(missing.values()) == {None}
    assert (empty["text_char_count"], empty["text_word_count"], empty["text_has_url"]) == (0, 0, False)
    assert [empty[f"text_{r}_ratio"] for r in ("repetition", "alphanumeric", "digit")] == [None, None, None]
    assert (blank["text_char_count"], blank["text_alphanumeric_ratio"], blank["text_repetition_ratio"]) == (3, 0, None)


@pytest.mark.parametrize(
    ("text", "has_url", "is_file_name"),
    [
        ("see https://example.org/x", True, False),
        ("WWW.EXAMPLE.ORG", True, False),
        ("IMG_1234.JPG", False, True),
        (" photo.jpeg\n", False, True),
        ("a photo.jpeg of me", False, False),
        ("www. what a day", False, False),
        ("jpg", False, False),
    ],
)
def test_urls_and_file_names(text: str, has_url: bool, is_file_name: bool):
    (row,) = probe(text)
    assert (row["text_has_url"], row["text_is_file_name"]) == (has_url, is_file_name)


def test_another_column():
    stage = ProbeText(ProbeTextOptions(column="title"))
    assert ProbeText.contract(stage.options).reads == ("title",)
    assert stage.compute(make_batch(title=["a b"]))["text_word_count"] == [2]
