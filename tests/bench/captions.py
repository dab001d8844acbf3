"""Captions of a real vocabulary for benchmarks: dictionary definitions, stamps' texts, drawings' names, and edits."""

from __future__ import annotations

from pathlib import Path

import numpy as np

__all__ = ["captions"]

_WORDNET = ("data.noun", "data.verb", "data.adj", "data.adv")


def _phrases() -> list[str]:
    """Every distinct part of a gloss, first lines of stamps, and names of drawings."""
    found: dict[str, None] = {}
    for name in _WORDNET:
        for line in (Path("/usr/share/wordnet") / name).read_text(encoding="latin-1").splitlines():
            if not line.startswith(" "):  # the licence stands before the entries
                for part in line.partition("|")[2].split(";"):
                    found[part.strip(' "')] = None
    for path in sorted(Path("/usr/share/tuxpaint/stamps").rglob("*.txt")):
        found[path.read_text(encoding="utf-8").partition("\n")[0].strip()] = None
    for path in sorted(Path("/usr/share/openclipart/png").rglob("*.png")):
        found[path.stem.replace("_", " ")] = None
    return [text for text in found if len(text) >= 12]


def captions(rows: int, seed: int) -> list[str]:
    """So many captions in a random order.

    Of a hundred, 70 are new (two phrases put together), 20 are new ones with one to four words changed, 9 are the same
    with other capitals and marks, 1 is one and the same advertisement.
    """
    rng = np.random.default_rng(seed)
    phrases = _phrases()
    vocabulary = np.array(sorted({word for text in phrases for word in text.split()}), object)
    new, edited, same = rows * 70 // 100, rows * 20 // 100, rows * 9 // 100
    left, right = rng.integers(0, len(phrases), (2, new))
    made = [f"{phrases[a]}, {phrases[b]}" for a, b in zip(left.tolist(), right.tolist(), strict=True)]
    for at in rng.integers(0, new, edited).tolist():
        words = made[at].split()
        for place in rng.integers(0, len(words), int(rng.integers(1, 5))).tolist():
            words[place] = vocabulary[int(rng.integers(len(vocabulary)))]
        made.append(" ".join(words))
    for at in rng.integers(0, new, same).tolist():
        made.append(made[at].upper() + "!")
    made += ["Buy one, get one free: free delivery on all orders of running shoes"] * (rows - len(made))
    return [made[i] for i in rng.permutation(rows).tolist()]
