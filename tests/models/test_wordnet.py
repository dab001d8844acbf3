"""WordNet's files beside NLTK's own reader of the same files."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
from nltk_wordnet import DEBIAN, reader
from stamps import stamp_pairs

from mmdata.errors import MissingExtra, RecipeError
from mmdata.models import wordnet
from mmdata.models.wordnet import FILES, WordNet, find_wordnet


@pytest.fixture(scope="module")
def ours() -> WordNet:
    return WordNet(str(DEBIAN))


@pytest.fixture(scope="module")
def theirs() -> Any:
    return reader()


def test_first_synsets_are_nltks(ours: WordNet, theirs) -> None:
    lemmas = sorted(theirs.all_lemma_names())[::40]
    inflected = [f"{lemma}{end}" for lemma in lemmas[::3] for end in ("s", "es", "ed", "ing", "er", "est", "men")]
    irregular = [line.split()[0] for line in (DEBIAN / "noun.exc").read_text().splitlines()[::20]]
    irregular += [line.split()[0] for line in (DEBIAN / "verb.exc").read_text().splitlines()[::20]]
    spoken = {word for _, caption in stamp_pairs() for word in caption.split()}
    words = [*lemmas, *inflected, *irregular, *spoken, "Cats", "PARIS", "it's", "(dog)", "", "犬", "x" * 99, "9"]
    assert len(words) > 10_000
    found = 0
    for word in words:
        senses = theirs.synsets(word)
        expected = f"{senses[0].pos().replace('s', 'a')}{senses[0].offset():08d}" if senses else None
        assert ours.first_synset(word) == expected, word
        found += expected is not None
    assert found > 4000


def test_names_are_those_of_nltks_synsets(ours: WordNet, theirs) -> None:
    expected = {synset.name().rsplit(".", 2)[0].replace("_", " ") for synset in theirs.all_synsets("v")}
    names = ours.synset_names()
    assert expected < set(names)
    assert len(expected) > 5000
    assert names == sorted(set(names))
    assert len(names) == 86_571  # lines of data.*, first words lower-cased and without (a), (p) and (ip), told apart
    assert {"ice cream", "dog", "afloat", "new york"} <= set(names)


def test_first_synsets_known_by_heart(ours: WordNet) -> None:
    """Ids as ImageNet lists them: dog n02084071, cat n02121620, goose n01855672; `dog,` is no word."""
    assert ours.first_synset("dog") == ours.first_synset("Dogs") == "n02084071"
    assert ours.first_synset("cat") == "n02121620"
    assert ours.first_synset("geese") == "n01855672"
    assert ours.first_synset("dog,") is None
    assert ours.first_synset("the") is None
    assert ours.first_synset("d" * 5_000_000) is None


def test_a_long_word_is_not_remembered(ours: WordNet) -> None:
    """Captions may bring any number of them, each up to a caption's length."""
    ours.first_synset("dog")
    before = ours._remembered.cache_info().currsize
    assert ours.first_synset("d" * 101) is None
    assert ours._remembered.cache_info().currsize == before > 0


def test_an_archive_of_nltks_says_the_same(ours: WordNet, tmp_path: Path) -> None:
    archive = tmp_path / "wordnet.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for name in FILES:
            file.write(DEBIAN / name, f"wordnet/{name}")
    assert list(find_wordnet(str(archive)).values()) == [archive]
    zipped = WordNet(str(archive))
    assert [zipped.first_synset(w) for w in ("mice", "running")] == [ours.first_synset(w) for w in ("mice", "running")]


def test_where_it_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wordnet, "_places", lambda: iter([tmp_path / "no"]))
    with pytest.raises(MissingExtra, match="apt install wordnet-base"):
        find_wordnet()
    with pytest.raises(RecipeError, match="holds no WordNet"):
        find_wordnet(str(tmp_path))
    monkeypatch.undo()
    corpora = tmp_path / "corpora"
    corpora.mkdir()
    (corpora / "wordnet").symlink_to(DEBIAN)
    monkeypatch.delenv("WNSEARCHDIR", raising=False)
    monkeypatch.delenv("WNHOME", raising=False)
    monkeypatch.setenv("NLTK_DATA", str(tmp_path))
    assert find_wordnet()["wordnet index.noun"] == corpora / "wordnet" / "index.noun"
    monkeypatch.setenv("WNSEARCHDIR", str(DEBIAN))
    assert find_wordnet()["wordnet index.noun"] == DEBIAN / "index.noun"


def test_another_version_is_refused(tmp_path: Path) -> None:
    """Its ids are others: those of ImageNet are WordNet 3.0's."""
    for name in FILES:
        (tmp_path / name).write_text("  1 WordNet 3.1 Copyright 2011 by Princeton University.\n" if "." in name else "")
    with pytest.raises(RecipeError, match=r"not version 3\.0"):
        WordNet(str(tmp_path))
