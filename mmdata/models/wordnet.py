"""WordNet's dictionary files: which synset a word names first, and what all synsets are called.

In: a folder (or NLTK's `wordnet.zip`) with WordNet 3.0's `index.*`, `data.*` and `*.exc` files. Out: synset ids as
ImageNet writes them, one letter for the part of speech and eight digits, and names. Fails: MissingExtra where no
WordNet lies in any of the usual places, RecipeError for a place that holds none, or another version, whose ids are
others'.

Licence of the data: WordNet's own, which allows use and copies for any purpose.
"""

from __future__ import annotations

import os
import re
import sys
import zipfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from mmdata.errors import MissingExtra, RecipeError

__all__ = ["FILES", "WordNet", "find_wordnet"]

_SUFFIXES = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}  # in the order in which NLTK asks them
FILES = tuple(f"{kind}.{suffix}" for kind in ("index", "data") for suffix in _SUFFIXES.values()) + tuple(
    f"{suffix}.exc" for suffix in _SUFFIXES.values()
)
# Endings that WordNet's morphology takes off and puts on (morphy(7WN)); those of nouns ending in `ful` are not NLTK's.
_ENDINGS = {
    "n": "s: ses:s ves:f xes:x zes:z ches:ch shes:sh men:man ies:y",
    "v": "s: ies:y es:e es: ed:e ed: ing:e ing:",
    "a": "er: est: er:e est:e",
    "r": "",
}
_WORDS = 1 << 18  # remembered, of which each caption brings some
_LONGEST = 100  # characters; the longest word of WordNet's has 71
_COMMAND = "apt install wordnet-base, or: pip install nltk && python -m nltk.downloader wordnet"


def _places() -> Iterator[Path]:
    """Where WordNet may lie: WordNet's and NLTK's variables, NLTK's folders, then what Debian's package fills."""
    if os.environ.get("WNSEARCHDIR"):
        yield Path(os.environ["WNSEARCHDIR"])
    if os.environ.get("WNHOME"):
        yield Path(os.environ["WNHOME"]) / "dict"
    folders = [Path(p) for p in os.environ.get("NLTK_DATA", "").split(os.pathsep) if p]
    folders += [Path.home() / "nltk_data"]
    folders += [Path(sys.prefix) / part / "nltk_data" for part in ("", "share", "lib")]
    folders += [Path(root) / "nltk_data" for root in ("/usr/share", "/usr/local/share", "/usr/lib", "/usr/local/lib")]
    for folder in folders:
        yield folder / "corpora" / "wordnet"
        yield folder / "corpora" / "wordnet.zip"
    yield Path("/usr/share/wordnet")


def _holds_wordnet(place: Path) -> bool:
    if place.is_dir():
        return all((place / name).is_file() for name in FILES)
    return place.suffix == ".zip" and zipfile.is_zipfile(place)


def find_wordnet(given: str | None = None) -> dict[str, Path]:
    """What names the content of WordNet's files → where it lies: each file of a folder, or one archive.

    `given` is a folder or an archive; without it the usual places are searched, the first that holds it counts.
    """
    if given is not None:
        place = Path(given).expanduser()
        if not _holds_wordnet(place):
            raise RecipeError(f"{given} holds no WordNet: expected {FILES[0]} and so on, or NLTK's wordnet.zip")
    else:
        found = next((p for p in _places() if _holds_wordnet(p)), None)
        if found is None:
            raise MissingExtra(
                f"match_concepts needs WordNet 3.0, which is in none of the usual places: {_COMMAND}; or name its "
                "folder by the option wordnet"
            )
        place = found
    return {f"wordnet {n}": place / n for n in FILES} if place.is_dir() else {"wordnet": place}


class WordNet:
    """Words and synsets of WordNet 3.0 at a place that `find_wordnet` found."""

    def __init__(self, given: str | None = None) -> None:
        first = next(iter(find_wordnet(given).values()))
        self._place = first if first.suffix == ".zip" else first.parent
        self._first: dict[str, dict[str, str]] = {pos: {} for pos in _SUFFIXES}
        self._exceptions: dict[str, dict[str, list[str]]] = {}
        self._endings = {p: [tuple(e.split(":")) for e in text.split()] for p, text in _ENDINGS.items()}
        for pos, suffix in _SUFFIXES.items():
            lines = self._lines(f"index.{suffix}")
            for line in lines:
                fields = line.split()
                # lemma pos synset_cnt p_cnt [ptr_symbol...] sense_cnt tagsense_cnt synset_offset...
                self._first[pos][fields[0]] = f"{pos}{int(fields[int(fields[3]) + 6]):08d}"
            self._exceptions[pos] = {w[0]: w[1:] for w in map(str.split, self._lines(f"{suffix}.exc")) if w}
        self._remembered = lru_cache(_WORDS)(self._first_synset)

    def _lines(self, name: str) -> list[str]:
        """The lines of a file but for those of its licence, which begin with a space."""
        try:
            if self._place.suffix == ".zip":
                with zipfile.ZipFile(self._place) as archive:
                    data = archive.read(f"wordnet/{name}")
            else:
                data = (self._place / name).read_bytes()
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise RecipeError(f"WordNet in {self._place}: cannot read {name} ({error})") from None
        lines = data.decode("utf-8", errors="replace").splitlines()
        licence = [line for line in lines[:40] if line.startswith(" ")]
        if licence and not any("WordNet 3.0 " in line for line in licence):
            raise RecipeError(f"WordNet in {self._place} is not version 3.0, which the ids are of: {_COMMAND}")
        return [line for line in lines if line and not line.startswith(" ")]

    def _forms(self, word: str, pos: str) -> Iterator[str]:
        """The word, then what WordNet's exceptions for it are, or where it has none, its rules make of it."""
        yield word
        if word in self._exceptions[pos]:
            yield from self._exceptions[pos][word]
        else:
            yield from (word[: -len(old)] + new for old, new in self._endings[pos] if word.endswith(old))

    def first_synset(self, word: str) -> str | None:
        """Id of the first sense of a word, such as `n02121620` for `Cats`, None for a word that WordNet lacks.

        What `synsets(word)[0]` of NLTK 3.10's WordNet reader is: nouns before verbs, adjectives and adverbs, in each
        the word before its base forms. (Until NLTK 3.9 rules were applied again where one application found nothing.)
        """
        return None if len(word) > _LONGEST else self._remembered(word)

    def _first_synset(self, word: str) -> str | None:
        word = word.lower()
        for pos, known in self._first.items():
            for form in self._forms(word, pos):
                if form in known:
                    return known[form]
        return None

    def synset_names(self) -> list[str]:
        """What synsets are called, each once, sorted: the first lemma in lower case, spaces for underscores."""
        names = set()
        for suffix in _SUFFIXES.values():
            for line in self._lines(f"data.{suffix}"):
                # synset_offset lex_filenum ss_type w_cnt word lex_id ...; adjectives end in (a), (p) or (ip)
                names.add(re.sub(r"\([^()]*\)$", "", line.split(maxsplit=5)[4]).lower().replace("_", " "))
        return sorted(names)
