"""Caption statistics against counts done by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from batches import make_batch

from mmdata.errors import RecipeError
from mmdata.plan import base_identity, plan_recipe
from mmdata.recipe import parse
from mmdata.stages.probe_text import ProbeText, ProbeTextOptions


def probe(*texts: str | None, **options: Any) -> list[dict[str, Any]]:
    stage = ProbeText(ProbeTextOptions(**options))
    stage.open("cpu")
    columns = stage.compute(make_batch(caption=pa.array(texts, pa.string())))
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def test_counts_of_a_caption():
    (row,) = probe("Two red dogs, 2 Dogs!")
    # T w o _ r e d _ d o g s , _ 2 _ D o g s ! : 21 code points, 4 of them spaces, 2 marks, 1 digit
    assert row["text_char_count"] == 21
    assert row["text_word_count"] == 5  # Two, red, dogs,  2, Dogs!
    assert row["text_repetition_ratio"] == 0  # "dogs," and "dogs!" are different words
    assert row["text_alphanumeric_ratio"] == 15 / 21
    assert row["text_digit_ratio"] == 1 / 21
    assert row["text_symbol_ratio"] == 2 / 21
    assert row["text_collapsed_char_count"] == 21
    assert row["text_mean_word_length"] == 17 / 5
    # letters: Two red dogs Dogs = 14, of which T and D are capitals; words that begin with one: all but "2"
    assert row["text_capital_ratio"] == 2 / 14
    assert row["text_capital_word_ratio"] == 2 / 4
    assert row["text_starts_capital"] is True


@pytest.mark.parametrize(
    ("text", "repeated"),
    [("a a a b", 0.5), ("A a", 0.5), ("one two three", 0.0), ("ho ho ho ho", 0.75)],  # CC12M: 1 - unique / total
)
def test_repetition(text: str, repeated: float):
    (row,) = probe(text)
    assert row["text_repetition_ratio"] == repeated
    assert row["text_type_token_ratio"] == 1 - repeated


def test_white_space_is_collapsed_before_coyo_counts_characters():
    (row,) = probe(" I   a \n m ")
    assert (row["text_char_count"], row["text_collapsed_char_count"]) == (11, 5)


@pytest.mark.parametrize(
    ("text", "word_ngram", "ratio"),
    [
        ("the cat the cat sat", 2, 2 / 4),  # the-cat twice, cat-the, cat-sat
        ("the cat the cat the cat", 2, 5 / 5),  # the-cat three times, cat-the twice
        ("the cat the cat the cat", 3, 4 / 4),  # the-cat-the and cat-the-cat, each twice
        ("one two three", 2, 0.0),
        ("one", 2, 0.0),
        ("", 1, 0.0),
    ],
)
def test_repeated_ngrams_of_words(text: str, word_ngram: int, ratio: float):
    assert probe(text, word_ngram=word_ngram)[0]["text_word_ngram_ratio"] == ratio


@pytest.mark.parametrize(
    ("text", "char_ngram", "ratio"),
    [
        ("abcabcab", 3, 2 / 6),  # abc, bca, cab, each twice: of three distinct ones the root is 1
        ("ababcd", 2, 2 / 5),  # ab twice, ba, bc, cd: two would be taken, but only one comes twice
        ("abab cdcd", 2, 4 / 8),  # ab twice, ba, "b ", " c", cd twice, dc: the root of six is 2
        ("aaaa", 2, 3 / 3),  # aa three times
        ("abcdef", 2, 0.0),
        ("ab", 3, 0.0),
    ],
)
def test_repeated_ngrams_of_characters(text: str, char_ngram: int, ratio: float):
    assert probe(text, char_ngram=char_ngram)[0]["text_char_ngram_ratio"] == ratio


@pytest.mark.parametrize(
    ("text", "run", "top"),
    [("soooo good", 4, 0.5), ("!!!!!! a A b", 6, 0.5), ("ab", 1, 1.0), ("a\n\nb", 2, 0.5)],
)
def test_the_longest_run_and_the_commonest_word(text: str, run: int, top: float):
    (row,) = probe(text)
    assert (row["text_char_run_count"], row["text_top_word_ratio"]) == (run, top)


@pytest.mark.parametrize(
    ("text", "letters", "words", "starts"),
    [
        ("BUY NOW", 1.0, 1.0, True),
        ("a Cat", 1 / 4, 1 / 2, False),
        ("5 Stars", 1 / 5, 1.0, True),
        ("Ähre über ΔΈΛΤΑ", 6 / 13, 2 / 3, True),
        ("两只红狗", 0.0, 0.0, False),
        ("ⒶⒷ a Ⅷ", 0.0, 0.0, False),  # upper case to Unicode, but symbols and a number: the only letter is a
        ("50 %", None, None, False),
    ],
)
def test_capitals(text: str, letters: float | None, words: float | None, starts: bool):
    (row,) = probe(text)
    assert (row["text_capital_ratio"], row["text_capital_word_ratio"]) == (letters, words)
    assert row["text_starts_capital"] is starts


def test_symbols_of_any_script_and_no_marks():
    euro, dash, accent, blank = probe("€5", "—", "e\u0301", " \t")  # a symbol, punctuation, a combining mark, space
    assert [r["text_symbol_ratio"] for r in (euro, dash, accent, blank)] == [0.5, 1.0, 0.0, 0.0]


def test_all_but_the_length_of_a_huge_caption_is_told_from_its_beginning():
    (row,) = probe("ab " * 1_000_000)
    assert row["text_char_count"] == 3_000_000
    assert row["text_word_count"] == 33_334  # 100,000 characters: 33,333 times "ab " and one "a"
    assert row["text_collapsed_char_count"] == 100_000


def test_rare_words_are_those_the_vocabulary_lacks(tmp_path: Path):
    words = tmp_path / "words.tsv"
    words.write_text("Dog\t100\nred\t5\nbasenji\t4\nthe\n", encoding="utf-8")
    texts = ["The red dog, the basenji!", "red - DOG", "naïve Qwxz 42", None, ""]
    counts = [r["text_rare_word_count"] for r in probe(*texts, vocabulary=str(words))]
    assert counts == [1, 0, 3, None, 0]  # basenji comes 4 times: under five
    counts = [r["text_rare_word_count"] for r in probe(*texts, vocabulary=str(words), vocabulary_min_count=6)]
    assert counts == [2, 1, 3, None, 0]  # red too


def test_a_vocabulary_is_known_by_its_content(tmp_path: Path):
    def identity(path: Path) -> str:
        recipe = {"name": "x", "dataset": "x", "source": {"kind": "urls", "path": "l.csv", "caption": "caption"}}
        step = {"probe_text": {"vocabulary": str(path)}}
        return base_identity(plan_recipe(parse({**recipe, "steps": [step]})).steps[0], {})

    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    for path, text in ((one, "dog\n"), (two, "dog\n"), (three, "cat\n")):
        path.write_text(text)
    assert identity(one) == identity(two) != identity(three)


@pytest.mark.parametrize("text", [None, b"dog\tmany\n", b"\xff\xfe"])
def test_a_vocabulary_that_cannot_be_read(text: bytes | None, tmp_path: Path):
    words = tmp_path / "words.tsv"
    if text is not None:
        words.write_bytes(text)
    with pytest.raises(RecipeError, match=r"words\.tsv"):
        ProbeText.contract(ProbeTextOptions(vocabulary=str(words)))


def test_a_vocabulary_whose_path_can_be_none():
    with pytest.raises(RecipeError, match="embedded null byte"):
        ProbeText.contract(ProbeTextOptions(vocabulary="words\0.tsv"))


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
