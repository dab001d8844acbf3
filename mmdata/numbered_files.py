"""The newest file of every shard in a folder of numbered files: `rows/00000.g0.parquet`, `columns/x/00000.c1.parquet`.

In: a listing. Out: equally long arrays, a row a shard, in the order of the shards; some thirty bytes a shard, however
many rows it has. A file's mark is one number for its place in the sequence, its size and its stamp: another file has
another mark. Names that are no such file are a StoreError.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mmdata.errors import StoreError
from mmdata.file_stamps import Listing, list_folder, mix
from mmdata.store import Store

__all__ = ["NumberedFiles", "newest_files", "stamps_of"]

Integers = npt.NDArray[np.int64]
Marks = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class NumberedFiles:
    """The newest file of every shard; `letter` is g for rows and c for columns."""

    folder: str
    letter: str
    shards: Integers
    numbers: Integers
    sizes: Integers
    stamps: Integers

    def name(self, shard: int, number: int) -> str:
        """As the store knows it."""
        return f"{self.folder}/{shard:05d}.{self.letter}{number}.parquet"

    def names(self) -> list[str]:
        """Of every file, in order."""
        prefix, letter = self.folder, self.letter
        pairs = zip(self.shards.tolist(), self.numbers.tolist(), strict=True)
        return [f"{prefix}/{shard:05d}.{letter}{number}.parquet" for shard, number in pairs]

    def marks(self) -> Marks:
        """(N,) uint64."""
        return mix(*(a.view(np.uint64) for a in (self.numbers, self.sizes, self.stamps)))

    def marks_of(self, shards: Integers) -> Marks:
        """The marks of these shards; 0 where a shard has no file."""
        found = np.zeros(len(shards), np.uint64)
        places, there = self.places(shards)
        found[there] = self.marks()[places[there]]
        return found

    def places(self, shards: Integers) -> tuple[Integers, npt.NDArray[np.bool_]]:
        """(index of each shard, whether it is there); an index means nothing where it is not."""
        places = np.minimum(np.searchsorted(self.shards, shards), max(0, len(self.shards) - 1))
        there = self.shards[places] == shards if len(self.shards) else np.zeros(len(shards), bool)
        return places, there

    def at(self, places: Integers) -> NumberedFiles:
        """Only the files at these places."""
        arrays = (a[places] for a in (self.shards, self.numbers, self.sizes, self.stamps))
        return NumberedFiles(self.folder, self.letter, *arrays)

    def with_files(self, store: Store, numbers: dict[int, int]) -> NumberedFiles:
        """With these (shard → number) in place of what it has for them; a file that is gone is left out."""
        if not numbers:
            return self
        shards = np.array(sorted(numbers), np.int64)
        latest = np.array([numbers[s] for s in shards.tolist()], np.int64)
        names = [self.name(s, n) for s, n in zip(shards.tolist(), latest.tolist(), strict=True)]
        found = stamps_of(store, names)
        there = np.array([f is not None for f in found], bool)
        sizes, stamps = (np.array([f[i] if f else 0 for f in found], np.int64) for i in (0, 1))
        stays = ~np.isin(self.shards, shards)
        merged = [
            np.concatenate([old[stays], new[there]])
            for old, new in (
                (self.shards, shards),
                (self.numbers, latest),
                (self.sizes, sizes),
                (self.stamps, stamps),
            )
        ]
        order = np.argsort(merged[0], kind="stable")
        return NumberedFiles(self.folder, self.letter, *(m[order] for m in merged))


def newest_files(store: Store, folder: str, letter: str) -> NumberedFiles:
    """What a folder holds now, the highest number of every shard."""
    listing = list_folder(store, folder)
    shards, numbers = _parsed(store, folder, letter, listing)
    sizes, stamps = np.array(listing.sizes, np.int64), np.array(listing.stamps, np.int64)
    order = np.lexsort((numbers, shards))
    shards = shards[order]
    is_last = np.append(shards[1:] != shards[:-1], True) if len(shards) else np.zeros(0, bool)
    chosen = order[is_last]
    return NumberedFiles(folder, letter, shards[is_last], numbers[chosen], sizes[chosen], stamps[chosen])


def _parsed(store: Store, folder: str, letter: str, listing: Listing) -> tuple[Integers, Integers]:
    names = pa.array(listing.names, pa.string())
    parts = pc.extract_regex(names, rf"^(?P<shard>\d{{5,18}})\.{letter}(?P<number>\d{{1,9}})\.parquet$")
    if parts.null_count:
        name = names.filter(pc.is_null(parts))[0].as_py()
        raise StoreError(
            f"{folder}/{name} of {store.url} is not a file of mmdata (00000.{letter}0.parquet is); move it away"
        )
    shards, numbers = (np.asarray(parts.field(i).cast(pa.int64()).to_numpy()) for i in (0, 1))
    return shards, numbers


def stamps_of(store: Store, names: Sequence[str], whole_folders: bool = False) -> list[tuple[int, int] | None]:
    """(size, stamp) of each of these files, None where it is absent.

    Folders are listed on an object store, and with `whole_folders`: when most of what lies in them is asked for.
    """
    if store.is_local and not whole_folders:
        return [_stat(f"{store.root}/{name}") for name in names]
    listed = {folder: list_folder(store, folder).by_name() for folder in {n.rpartition("/")[0] for n in names}}
    return [listed[name.rpartition("/")[0]].get(name.rpartition("/")[2]) for name in names]


def _stat(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path, follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_size, found.st_mtime_ns
