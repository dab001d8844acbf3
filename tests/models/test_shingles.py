"""Shingles against plain Python: unicodedata, str and the xxhash package."""

from __future__ import annotations

import re
import unicodedata

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdata.models import shingles
from mmdata.models.shingles import LONGEST, Shingled, Shingling, jaccard, pieces, shingle


def characters(text: str, size: int) -> list[int]:
    pieces = [text[i : i + size] for i in range(max(len(text) - size + 1, min(1, len(text))))]
    return [xxhash.xxh64_intdigest(piece.encode("utf-32-le")) for piece in pieces]


def words(text: str, size: int) -> list[int]:
    hashes = [xxhash.xxh64_intdigest(word.encode()).to_bytes(8, "little") for word in text.split()]
    pieces = [hashes[i : i + size] for i in range(max(len(hashes) - size + 1, min(1, len(hashes))))]
    return [xxhash.xxh64_intdigest(b"".join(piece)) for piece in pieces]


def normal(text: str) -> str:
    lowered = "".join(c.lower() if len(c.lower()) == 1 else c for c in unicodedata.normalize("NFKC", text))
    return " ".join("".join(" " if unicodedata.category(c)[0] in "PS" else c for c in lowered).split())


def split(found: Shingled) -> list[list[int]]:
    return [p.tolist() for p in np.split(found.hashes, found.offsets[1:-1])]


CAPTIONS = [
    "Two dogs, one BALL!",
    "  ﬁne   café\u00a0\u2003latte №5 ",
    "自転車に乗る人",
    "เด็กผู้หญิง อ่านหนังสือ",
    "ٱلسَّلَامُ عَلَيْكُمْ",
    "🐈🏽‍🦺 + 🐕 = ❤️",
    "x",
    "",
    " \n\t",
    "!?",
    "SALE 50% OFF https://example.org/a?b=c",
]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
def test_shingles_of_real_captions(size: int):
    array = pa.array(CAPTIONS)
    expected = [characters(normal(t), size) for t in CAPTIONS]
    assert split(shingle(array, Shingling("characters", size))) == expected
    assert split(shingle(array, Shingling("words", size))) == [words(normal(t), size) for t in CAPTIONS]


# Letters that Python and Arrow, which know different versions of Unicode, write alike.
ALPHABET = st.characters(codec="utf-8", max_codepoint=0x2FF)


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(st.text(ALPHABET, max_size=20), max_size=6), size=st.integers(1, 6))
def test_raw_shingles_of_any_text(texts: list[str], size: int):
    array = pa.array(texts, pa.string())
    assert split(shingle(array, Shingling("characters", size, ()))) == [characters(t, size) for t in texts] or not texts
    assert split(shingle(array, Shingling("words", size, ()))) == [words(t, size) for t in texts] or not texts


def test_pieces_hold_no_more_than_the_bound_or_one_text(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shingles, "_HELD", 10)
    texts = pa.chunked_array([["abcd", None, "é" * 6], ["x", "y" * 50, "", "z"]])
    assert list(pieces(texts)) == [(0, 3), (3, 4), (4, 5), (5, 7)]
    monkeypatch.setattr(shingles, "LONGEST", 8)
    assert list(pieces(texts)) == [(0, 3), (3, 7)]
    assert list(pieces(texts.slice(0, 0))) == []


def test_null_has_none_and_chunks_do_not_matter():
    whole = shingle(pa.array(["a b", None, "c"]), Shingling("words", 1))
    parts = shingle(pa.chunked_array([["a b"], [None, "c"]]), Shingling("words", 1))
    assert whole.offsets.tolist() == parts.offsets.tolist() == [0, 2, 2, 3]
    assert (whole.hashes == parts.hashes).all()
    assert shingle(pa.array([], pa.string()), Shingling("words", 1)).offsets.tolist() == [0]


def test_a_short_text_is_one_shingle_or_none():
    texts = pa.array(["one two", "one two three"])
    assert np.diff(shingle(texts, Shingling("words", 3)).offsets).tolist() == [1, 1]
    assert np.diff(shingle(texts, Shingling("words", 3, whole_short=False)).offsets).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("steps", "same", "other"),
    [
        (("lower",), ("A b", "a B"), ("a b", "a  b")),
        (("whitespace",), ("a\u2003 b", " a\nb "), ("a b", "A b")),
        (("punctuation",), ("a-b", "a+b"), ("a b", "a, b")),
        (("nfkc",), ("ﬁ", "fi"), ("fi", "Fi")),
    ],
)
def test_each_step_does_its_own(steps: tuple, same: tuple[str, str], other: tuple[str, str]):
    for pair, equal in ((same, True), (other, False)):
        left, right = split(shingle(pa.array(pair), Shingling("characters", 2, steps)))
        assert (left == right) is equal


def test_a_book_as_a_caption_is_read_to_its_bound():
    long = "word " * 2_000_000  # 10 MB
    bomb = "a" + "\u0301" * 5000 + "\u0323" * 5_000_000
    found = shingle(pa.array([long, bomb, long[:LONGEST]]), Shingling("characters", 5))
    assert max(np.diff(found.offsets)) <= LONGEST
    assert split(found)[0] == split(found)[2]


def test_jaccard_by_hand():
    # {the, cat, sat, down} and {the, cat, ran}: 2 shared of 5; a repeated word counts once
    a = shingle(pa.array(["the cat sat sat down", "a b", "", "x"]), Shingling("words", 1)).sets()
    b = shingle(pa.array(["The cat ran", "a b", "", "y"]), Shingling("words", 1)).sets()
    assert re.sub("nan", "-", str(jaccard(a, b).tolist())) == "[0.4, 1.0, -, 0.0]"


@settings(max_examples=300, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(codec="ascii"), max_size=12), max_size=8),
    steps=st.sets(st.sampled_from(["nfkc", "lower", "punctuation", "whitespace"])),
    start=st.integers(0, 3),
)
def test_ascii_takes_a_short_way_to_the_same(texts: list[str], steps: set, start: int):
    array = pa.array(texts, pa.string()).slice(start)
    how = Shingling("characters", 1, tuple(s for s in ("nfkc", "lower", "punctuation", "whitespace") if s in steps))
    with_others = pa.concat_arrays([array, pa.array(["é ."], pa.string())])
    assert shingles._ascii(array.cast(pa.large_string()), how.normalise).equals(
        shingles._unicode(array.cast(pa.large_string()), how.normalise)
    )
    assert split(shingle(with_others, how))[:-1] == (split(shingle(array, how)) if len(array) else [])
