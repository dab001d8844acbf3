"""MetaCLIP's substring matching: which entries of a list stand in a text as whole words.

In: entries, and texts. Out: for each text the entries found, each once, in the order of the list. A text longer than
`LONGEST` characters is looked at as far as that. Nothing fails; an entry that is empty matches nothing.

Source: metaclip/substr_matching.py of facebookresearch/MetaCLIP; Xu et al. 2023 (arXiv 2309.16671), section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["LONGEST", "EntryMatcher", "padded"]

LONGEST = 100_000  # characters of a text

_MARKS, _SPACES = ",.;:?!`", "\t\n\r"


def padded(text: str) -> str:
    """The text between two spaces, with spaces round , . ; : ? ! ` and for tabs and line breaks."""
    text = text[:LONGEST]
    for mark in _MARKS:
        if mark in text:
            text = text.replace(mark, f" {mark} ")
    for space in _SPACES:
        if space in text:
            text = text.replace(space, " ")
    return f" {text} "


class EntryMatcher:
    """Finds an entry where it stands between two spaces in the padded text; entries are taken as they are written."""

    def __init__(self, entries: Sequence[str]) -> None:
        import ahocorasick

        self._entries = entries
        self._automaton = ahocorasick.Automaton(ahocorasick.STORE_INTS)
        for number, entry in enumerate(entries):
            if entry and not self._automaton.exists(f" {entry} "):
                self._automaton.add_word(f" {entry} ", number)
        self._automaton.make_automaton()

    def find(self, text: str) -> list[str]:
        """Entries in the text."""
        if not len(self._automaton):
            return []
        found = sorted({number for _, number in self._automaton.iter(padded(text))})
        return [self._entries[number] for number in found]
