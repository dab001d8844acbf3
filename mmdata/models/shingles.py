"""Texts as sets of shingles: runs of `size` words or characters, each as one 64-bit hash.

In: texts and a `Shingling`, which says how they are normalised and cut. Out: `Shingled`, the hashes of all texts one
after the other, repeated ones too, and where each text begins; a text that is NULL, or empty once it is normalised, has
none. Nothing fails. Only the first `LONGEST` code points of a text are looked at, before and after normalising, which
bounds time and memory whatever the text.

The hash of a character shingle is XXH64 of its code points as UTF-32-LE, that of a word shingle XXH64 of the XXH64s (of
UTF-8, seed 0) of its words, 8 bytes each, little-endian: the same on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from string import punctuation
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mmdata.models.xxh64 import xxh64

__all__ = [
    "LONGEST",
    "Normal",
    "Shingled",
    "Shingling",
    "Unit",
    "cut",
    "digests",
    "jaccard",
    "lengths",
    "pieces",
    "shingle",
]

LONGEST = 10_000  # code points; combining marks are sorted in quadratic time when a text is normalised
_HELD = 1 << 22  # code points of a piece

Unit = Literal["words", "characters"]
Normal = Literal["nfkc", "lower", "punctuation", "whitespace"]
Hashes = npt.NDArray[np.uint64]
Positions = npt.NDArray[np.int64]

_ASCII_SPACE = " \t\n\v\f\r\x1c\x1d\x1e\x1f"


@dataclass(frozen=True)
class Shingling:
    """How a text is cut: `size` of the `unit`, after the steps of `normalise`, done in the order of `Normal`.

    `nfkc`: Unicode's compatibility composition. `lower`: lower case, letter by letter. `punctuation`: every code point
    of the categories P and S becomes a space. `whitespace`: a run of white space becomes one space, none at the ends.
    Words are what white space parts, whatever was normalised. A text shorter than one shingle is one shingle, unless
    `whole_short` is false: then it has none.
    """

    unit: Unit
    size: int
    normalise: tuple[Normal, ...] = get_args(Normal)
    whole_short: bool = True


@dataclass(frozen=True)
class Shingled:
    """`hashes` of text i stand at [offsets[i], offsets[i + 1])."""

    hashes: Hashes
    offsets: Positions

    def only(self, chosen: npt.NDArray[np.bool_]) -> Shingled:
        """The texts that are chosen, (N,) bool."""
        counts = np.diff(self.offsets)
        begins = np.concatenate([[0], np.cumsum(counts[chosen])]).astype(np.int64)
        return Shingled(self.hashes[np.repeat(chosen, counts)], begins)

    def sets(self) -> Shingled:
        """Each text's hashes sorted and once."""
        text = np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))
        order = np.lexsort((self.hashes, text))
        hashes, text = self.hashes[order], text[order]
        new = np.ones(len(hashes), bool)
        new[1:] = (hashes[1:] != hashes[:-1]) | (text[1:] != text[:-1])
        counts = np.bincount(text[new], minlength=len(self.offsets) - 1)
        return Shingled(hashes[new], np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))


def cut(costs: Positions, most: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of what costs at most so much together; at least one, whatever that costs."""
    total = np.cumsum(costs)
    start = 0
    while start < len(costs):
        before = int(total[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(total, before + most, "right")))
        yield start, stop
        start = stop


def pieces(texts: pa.Array | pa.ChunkedArray) -> Iterator[tuple[int, int]]:
    """[start, stop) of texts to cut together, so that many long ones take no more than some 400 MB."""
    return cut(lengths(texts), _HELD)


def lengths(texts: pa.Array | pa.ChunkedArray) -> Positions:
    """Code points that are looked at of each text, before it is normalised."""
    found: Positions = np.minimum(np.asarray(pc.fill_null(pc.utf8_length(texts), 0), np.int64), LONGEST)
    return found


def shingle(texts: pa.Array | pa.ChunkedArray, how: Shingling) -> Shingled:
    """The shingles of each text."""
    normal = _normalised(texts, how.normalise)
    units, offsets = _words(normal) if how.unit == "words" else _characters(normal)
    return _windows(units, offsets, how)


def jaccard(a: Shingled, b: Shingled) -> npt.NDArray[np.float64]:
    """|A∩B| / |A∪B| of text i of `a` and text i of `b`, both as `sets`; NaN where both are empty."""
    texts = len(a.offsets) - 1
    sizes = np.diff(a.offsets), np.diff(b.offsets)
    text = np.concatenate([np.repeat(np.arange(texts), s) for s in sizes])
    hashes = np.concatenate([a.hashes, b.hashes])
    order = np.lexsort((hashes, text))
    hashes, text = hashes[order], text[order]
    shared = (hashes[1:] == hashes[:-1]) & (text[1:] == text[:-1])
    both = np.bincount(text[1:][shared], minlength=texts)
    with np.errstate(invalid="ignore"):
        found: npt.NDArray[np.float64] = both / (sizes[0] + sizes[1] - both)
    return found


# RE2 knows no class of all white space that Unicode has: separators, and the controls that count as white space.
_SPACE, _MARK = r"\p{Z}\t-\r\x{1c}-\x{1f}\x{85}", r"\p{P}\p{S}"


def _normalised(texts: pa.Array | pa.ChunkedArray, steps: tuple[Normal, ...]) -> pa.Array:
    array = texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts
    found = pc.utf8_slice_codeunits(array.cast(pa.large_string()).fill_null(""), 0, LONGEST)
    plain = pc.string_is_ascii(found)
    if pc.all(plain, min_count=0).as_py():
        return _ascii(found, steps)
    changed = pc.replace_with_mask(found, plain, _ascii(found.filter(plain), steps))
    other = pc.invert(plain)
    return pc.replace_with_mask(changed, other, _unicode(found.filter(other), steps))


def _unicode(found: pa.Array, steps: tuple[Normal, ...]) -> pa.Array:
    if "nfkc" in steps:
        found = pc.utf8_slice_codeunits(pc.utf8_normalize(found, form="NFKC"), 0, LONGEST)
    if "lower" in steps:
        found = pc.utf8_lower(found)
    if "punctuation" in steps and "whitespace" in steps:
        found = pc.replace_substring_regex(found, f"[{_MARK}{_SPACE}]+", " ")
    elif "punctuation" in steps:
        found = pc.replace_substring_regex(found, f"[{_MARK}]", " ")
    elif "whitespace" in steps:
        found = pc.replace_substring_regex(found, f"[{_SPACE}]+", " ")
    return pc.utf8_trim_whitespace(found) if "whitespace" in steps else found


def _ascii(found: pa.Array, steps: tuple[Normal, ...]) -> pa.Array:
    """The same for ASCII, which most captions are: one table for all bytes instead of a regex compiled each time."""
    table = bytes(_ascii_byte(chr(byte), steps) for byte in range(256))
    _, offsets, data = found.buffers()
    begins = np.frombuffer(offsets, np.int64)[found.offset : found.offset + len(found) + 1] if len(found) else _NONE
    first = int(begins[0])
    held = b"" if data is None else data.slice(first, int(begins[-1]) - first).to_pybytes()
    letters, begins = np.frombuffer(held.translate(table), np.uint8), begins - first
    if "whitespace" in steps:
        space = letters == ord(" ")
        starts = np.zeros(len(letters) + 1, bool)
        starts[begins] = True
        after_space = np.append(True, space[:-1])[: len(space)] | starts[:-1]
        letters, begins = _kept(letters, begins, ~(space & after_space))
        last = begins[1:][np.diff(begins) > 0] - 1
        last = last[letters[last] == ord(" ")]
        kept = np.ones(len(letters), bool)
        kept[last] = False
        letters, begins = _kept(letters, begins, kept)
    buffers = [None, pa.py_buffer(np.ascontiguousarray(begins)), pa.py_buffer(letters.tobytes())]
    return pa.Array.from_buffers(pa.large_string(), len(found), buffers)


_NONE = np.zeros(1, np.int64)


def _kept(
    letters: npt.NDArray[np.uint8], begins: Positions, kept: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.uint8], Positions]:
    before = np.concatenate([[0], np.cumsum(kept)]).astype(np.int64)
    return letters[kept], before[begins]


def _ascii_byte(letter: str, steps: tuple[Normal, ...]) -> int:
    if "punctuation" in steps and letter in punctuation:
        return ord(" ")
    if "whitespace" in steps and letter in _ASCII_SPACE:
        return ord(" ")
    return ord(letter.lower()) if "lower" in steps and letter.isascii() else ord(letter)


def _words(texts: pa.Array) -> tuple[Hashes, Positions]:
    """The hash of every word, and where each text's words begin."""
    import xxhash

    lists = pc.utf8_split_whitespace(pc.utf8_trim_whitespace(texts))
    words = lists.flatten().dictionary_encode()
    known = [xxhash.xxh64_intdigest(w.encode()) for w in words.dictionary.to_pylist()]
    hashes = np.array(known, np.uint64)[words.indices.to_numpy()] if known else np.empty(0, np.uint64)
    counts = pc.list_value_length(lists).to_numpy().astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    # Splitting the empty text gives one empty word, which is none.
    empty = pc.equal(lists.flatten(), "").to_numpy(zero_copy_only=False)
    kept_before = np.concatenate([[0], np.cumsum(~empty)]).astype(np.int64)
    return hashes[~empty], kept_before[offsets]


def _characters(texts: pa.Array) -> tuple[npt.NDArray[np.uint32], Positions]:
    """Every code point, and where each text's begin."""
    counts = pc.utf8_length(texts).to_numpy().astype(np.int64)
    points = np.frombuffer("".join(texts.to_pylist()).encode("utf-32-le"), "<u4").astype(np.uint32)
    return points, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _windows(units: Hashes | npt.NDArray[np.uint32], offsets: Positions, how: Shingling) -> Shingled:
    lengths = np.diff(offsets)
    counts = np.where(lengths >= how.size, lengths - how.size + 1, lengths > 0 if how.whole_short else 0)
    begins = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    hashes = np.empty(int(begins[-1]), np.uint64)
    for width in np.unique(np.minimum(lengths, how.size)).tolist():
        some = np.flatnonzero((np.minimum(lengths, how.size) == width) & (counts > 0))
        if len(some):
            mine = counts[some]
            within = np.arange(int(mine.sum())) - np.repeat(np.cumsum(mine) - mine, mine)
            first = np.repeat(offsets[some], mine) + within
            hashes[np.repeat(begins[some], mine) + within] = xxh64([units[first + k] for k in range(width)])
    return Shingled(hashes, begins)


def digests(sets: Shingled) -> Hashes:
    """One hash per text, the same for equal sets; `sets` as `Shingled.sets` gives them."""
    import xxhash

    data, ends = memoryview(np.ascontiguousarray(sets.hashes, "<u8").tobytes()), (sets.offsets * 8).tolist()
    found = [xxhash.xxh64_intdigest(data[a:b]) for a, b in pairwise(ends)]
    return np.array(found, np.uint64)
