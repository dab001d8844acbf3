"""Keys of rows (uid, url, key, sha256) as 128-bit numbers, and a sorted index of them that need not fit in memory.

In: columns of text. Out: `(N, 2) uint64` keys, equal where and only where the texts mean the same row, and the row
number at which a key stands in a file of any size. A text that is no key (NULL, empty) is `valid` nowhere.

A uid of 32 hex digits is that number, upper or lower case alike, as in DataComp's subset files; a sha256 is its first
128 bits; any other text is its 128-bit BLAKE2b, so that two texts share a key with a chance of 2^-128.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = ["IndexBuilder", "JoinColumn", "KeyIndex", "Keys", "keys_of", "pair_keys"]

JoinColumn = Literal["uid", "url", "key", "sha256"]
Keys = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int64]

_HEX = {"uid": re.compile("[0-9a-fA-F]{32}"), "sha256": re.compile("[0-9a-fA-F]{64}")}
_HELD = 1 << 21  # entries in memory before they go to disk: 64 MB
_PARTS = 256
_ENTRY = np.dtype([("mixed", "<u8"), ("high", "<u8"), ("low", "<u8"), ("row", "<i8")])


def keys_of(on: JoinColumn, values: pa.Array | pa.ChunkedArray) -> tuple[Keys, npt.NDArray[np.bool_]]:
    """Keys of a column of text, (N, 2) uint64, and (N,) bool: False where the value is no key.

    NULL and empty text are no keys, nor is a sha256 that is not 64 hex digits. URLs and keys count as written.
    """
    digits = 64 if on == "sha256" else 32
    if on in _HEX:
        whole = _from_hex(values, digits)
        if whole is not None:
            return whole, np.ones(len(whole), bool)
    texts = values.to_pylist()
    found = np.zeros((len(texts), 2), np.uint64)
    valid = np.zeros(len(texts), bool)
    out = bytearray(16 * len(texts))
    for index, text in enumerate(texts):
        if not text:
            continue
        if on in _HEX and _HEX[on].fullmatch(text):
            out[16 * index : 16 * index + 16] = bytes.fromhex(text[:32])
        elif on == "sha256":
            continue
        else:
            raw = text.encode("utf-8", "surrogatepass")
            out[16 * index : 16 * index + 16] = hashlib.blake2b(raw, digest_size=16).digest()
        valid[index] = True
    found[:] = np.frombuffer(bytes(out), ">u8").reshape(-1, 2)
    return found, valid


def _from_hex(values: pa.Array | pa.ChunkedArray, digits: int) -> Keys | None:
    """The keys where every text is so many hex digits: the quick way for what is the rule."""
    column = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    if not len(column) or column.null_count or column.type != pa.string():
        return None
    _, edges, text = column.buffers()
    ends = np.frombuffer(edges, np.int32)[column.offset : column.offset + len(column) + 1]
    if text is None or (np.diff(ends) != digits).any():
        return None
    nibbles = _NIBBLES[np.frombuffer(text, np.uint8)[ends[0] : ends[-1]]]
    if (nibbles > 15).any():
        return None
    raw = (nibbles[::2] << 4) | nibbles[1::2]
    return raw.reshape(len(column), -1)[:, :16].copy().view(">u8").astype(np.uint64)


_NIBBLES = np.full(256, 255, np.uint8)
for _digit in b"0123456789abcdefABCDEF":
    _NIBBLES[_digit] = int(chr(_digit), 16)


def pair_keys(pairs: npt.NDArray[Any]) -> Keys:
    """Keys of DataComp's pairs of uint64, dtype `u8,u8`: the first and the last 16 hex digits of a uid."""
    high, low = pairs.dtype.names or ("", "")
    return np.stack([pairs[high].astype(np.uint64), pairs[low].astype(np.uint64)], axis=1)


def _mixed(keys: Keys) -> npt.NDArray[np.uint64]:
    """(N,) uint64 that spreads also where keys count up, so that parts of equal range hold about equally many."""
    high, low = keys[:, 0], keys[:, 1]
    mixed: npt.NDArray[np.uint64] = (high ^ (low * np.uint64(0x9E3779B97F4A7C15))) * np.uint64(0xD6E8FEB86659FD93)
    mixed ^= mixed >> np.uint64(32)
    mixed *= np.uint64(0xD6E8FEB86659FD93)
    return mixed


@dataclass(frozen=True)
class KeyIndex:
    """Sorted keys and the rows they stand at; arrays in memory or mapped from files, 32 bytes an entry.

    `repeated`: keys that stand in more than one row; `example`: the first row of one of them, -1 = there is none.
    """

    mixed: npt.NDArray[np.uint64]
    keys: Keys
    rows: Rows
    repeated: int
    example: int

    def __len__(self) -> int:
        return len(self.mixed)

    def find(self, keys: Keys, valid: npt.NDArray[np.bool_]) -> Rows:
        """(N,) int64: the row of each key, -1 where it is not in the index or not valid; of a repeated key, the first.

        Asked in ascending order of what the index is sorted by, so that pages of a mapped index are read once.
        """
        found = np.full(len(keys), -1, np.int64)
        mixed = _mixed(keys)
        ask = np.flatnonzero(valid)
        ask = ask[np.argsort(mixed[ask], kind="stable")]
        places = np.searchsorted(self.mixed, mixed[ask], "left")
        while len(ask):
            inside = places < len(self.mixed)
            ask, places = ask[inside], places[inside]
            same = self.mixed[places] == mixed[ask]  # almost all stop here, one way or the other
            ask, places = ask[same], places[same]
            hit = (self.keys[places] == keys[ask]).all(axis=1)
            found[ask[hit]] = self.rows[places[hit]]
            ask, places = ask[~hit], places[~hit] + 1
        return found


class IndexBuilder:
    """Takes the keys of a file, row by row, and sorts them; beyond `_HELD` entries through files in `folder`.

    Without a folder everything stays in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._held: list[npt.NDArray[Any]] = []
        self._count = 0
        self._spilled = False
        self.rows = 0

    def add(self, keys: Keys, valid: npt.NDArray[np.bool_]) -> None:
        """The next rows of the file; those that are not valid take a number and are never found."""
        entries = np.empty(int(valid.sum()), _ENTRY)
        chosen = keys[valid]
        entries["mixed"], entries["high"], entries["low"] = _mixed(chosen), chosen[:, 0], chosen[:, 1]
        entries["row"] = np.flatnonzero(valid) + self.rows
        self.rows += len(valid)
        self._held.append(entries)
        self._count += len(entries)
        if self._folder is not None and self._count >= _HELD:
            self._spill(self._folder)

    def _take(self) -> npt.NDArray[Any]:
        taken = np.concatenate(self._held) if self._held else np.empty(0, _ENTRY)
        self._held, self._count = [], 0
        return taken

    def _spill(self, folder: Path) -> None:
        self._spilled = True
        entries = self._take()
        parts = (entries["mixed"] >> np.uint64(56)).astype(np.int64)
        entries = entries[np.argsort(parts, kind="stable")]
        edges = np.searchsorted(np.sort(parts), np.arange(_PARTS + 1))
        for part in range(_PARTS):
            if edges[part] < edges[part + 1]:
                with open(folder / f"keys-{part}", "ab") as file:
                    entries[edges[part] : edges[part + 1]].tofile(file)

    def finish(self) -> KeyIndex:
        """The index; the folder must outlive it."""
        if not self._spilled:
            entries, repeated, example = _sorted(self._take())
            keys = np.stack([entries["high"], entries["low"]], axis=1)
            return KeyIndex(entries["mixed"].copy(), keys, entries["row"].copy(), repeated, example)
        assert self._folder is not None
        self._spill(self._folder)
        repeated, example, size = 0, -1, 0
        files = [self._folder / name for name in ("mixed", "keys", "rows")]
        with open(files[0], "wb") as mixed, open(files[1], "wb") as pairs, open(files[2], "wb") as rows:
            for entries, more, one in self._parts(self._folder):
                repeated, example, size = repeated + more, one if example < 0 else example, size + len(entries)
                entries["mixed"].tofile(mixed)
                np.stack([entries["high"], entries["low"]], axis=1).tofile(pairs)
                entries["row"].tofile(rows)
        return KeyIndex(
            np.memmap(files[0], np.uint64, "r", shape=(size,)),
            np.memmap(files[1], np.uint64, "r", shape=(size, 2)),
            np.memmap(files[2], np.int64, "r", shape=(size,)),
            repeated,
            example,
        )

    @staticmethod
    def _parts(folder: Path) -> Iterator[tuple[npt.NDArray[Any], int, int]]:
        for part in range(_PARTS):
            path = folder / f"keys-{part}"
            if path.exists():
                yield _sorted(np.fromfile(path, _ENTRY))
                path.unlink()


def _sorted(entries: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], int, int]:
    """One entry a key, ascending, the first row of each; how many keys were repeated, and the first row of one."""
    entries = entries[np.argsort(entries["mixed"], kind="stable")]
    if len(entries) < 2:
        return entries, 0, -1
    same_mixed = entries["mixed"][1:] == entries["mixed"][:-1]
    same = same_mixed & (entries["high"][1:] == entries["high"][:-1]) & (entries["low"][1:] == entries["low"][:-1])
    if (same_mixed & ~same).any():  # two keys with one mixed value: these few must stand together by key
        entries = entries[np.lexsort((entries["row"], entries["low"], entries["high"], entries["mixed"]))]
        same = (entries["high"][1:] == entries["high"][:-1]) & (entries["low"][1:] == entries["low"][:-1])
    first = np.concatenate([[True], ~same])
    begins = same & first[:-1]
    example = int(entries["row"][:-1][begins].min()) if begins.any() else -1
    return entries[first], int(begins.sum()), example
