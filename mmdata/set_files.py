"""The column files of one set as the driver holds them: arrays, and a `ColumnFile` made when somebody asks for one.

In: what a listing found, and what is known of those files. Out: a mapping shard → ColumnFile that takes some eighty
bytes a shard, where as many objects would take a kilobyte. What a run adds lies above the arrays until `fold`.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping

import numpy as np
import numpy.typing as npt

from mmdata.column_files import ColumnFile
from mmdata.numbered_files import NumberedFiles
from mmdata.store import Store

__all__ = ["SetFiles"]

Integers = npt.NDArray[np.int64]


class SetFiles(MutableMapping[int, ColumnFile]):
    """Shard → its newest column file of one set. `files` is what is on disk, as far as it was folded in."""

    def __init__(self, files: NumberedFiles, rows: Integers, covered: Integers, digests: npt.NDArray[np.void]) -> None:
        self.files = files
        self.rows, self.covered, self.digests = rows, covered, digests  # in the order of `files`
        self.hash = ""
        self._new: dict[int, ColumnFile] = {}

    @classmethod
    def none(cls, folder: str) -> SetFiles:
        """A set without files, in this folder."""
        no = np.zeros(0, np.int64)
        return cls(NumberedFiles(folder, "c", no, no, no, no), no, no, np.zeros(0, "V32"))

    def _place(self, shard: int) -> int | None:
        shards = self.files.shards
        place = int(shards.searchsorted(shard))
        return place if place < len(shards) and shards[place] == shard else None

    def __getitem__(self, shard: int) -> ColumnFile:
        if shard in self._new:
            return self._new[shard]
        place = self._place(shard)
        if place is None:
            raise KeyError(shard)
        number = int(self.files.numbers[place])
        rows, covered = int(self.rows[place]), int(self.covered[place])
        digest = bytes(self.digests[place]).hex()
        return ColumnFile(self.files.name(shard, number), number, rows, covered, digest, self.hash)

    def __setitem__(self, shard: int, file: ColumnFile) -> None:
        self._new[shard] = file
        self.hash = self.hash or file.hash

    def __delitem__(self, shard: int) -> None:
        raise TypeError("a column file of a shard is only ever followed by another one")

    def __contains__(self, shard: object) -> bool:
        return shard in self._new or (isinstance(shard, int | np.integer) and self._place(int(shard)) is not None)

    def __iter__(self) -> Iterator[int]:
        yield from self.files.shards.tolist()
        yield from (shard for shard in self._new if self._place(shard) is None)

    def __len__(self) -> int:
        return len(self.files.shards) + sum(self._place(shard) is None for shard in self._new)

    @property
    def new(self) -> dict[int, ColumnFile]:
        """What was put in since the last `fold`."""
        return self._new

    def fold(self, store: Store) -> Integers:
        """Take what is new into the arrays, with its size and stamp; (N,) the places of it whose files are there."""
        if not self._new:
            return np.zeros(0, np.int64)
        before, added = self.files, self._new
        self.files = before.with_files(store, {shard: file.number for shard, file in added.items()})
        places, there = before.places(self.files.shards)
        rows, covered = np.zeros((2, len(there)), np.int64)
        digests = np.zeros(len(there), "V32")
        rows[there], covered[there] = self.rows[places[there]], self.covered[places[there]]
        digests[there] = self.digests[places[there]]
        folded = [(place, added[shard]) for shard in sorted(added) if (place := self._place(shard)) is not None]
        for place, file in folded:
            rows[place], covered[place] = file.rows, file.covered
            digests[place] = np.void(bytes.fromhex(file.digest))
        self.rows, self.covered, self.digests = rows, covered, digests
        self._new = {}
        return np.array([place for place, _ in folded], np.int64)
