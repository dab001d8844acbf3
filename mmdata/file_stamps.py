"""Which files lie in a folder of the dataset, how big each is, and a stamp that another file would not have.

In: a store and a folder. Out: names, sizes in bytes and stamps, by listing alone: no file is opened. The stamp is the
time of writing in ns on a local disk, and a digest of the ETag (or generation) on an object store; a copy of a file has
another stamp. What was once proved of a file holds as long as its size and its stamp are those that were recorded.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from mmdata.store import Store

__all__ = ["Listing", "list_folder", "mix"]


@dataclass
class Listing:
    """The files directly in one folder: equally long lists, in no order; hidden files and folders are left out."""

    names: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    stamps: list[int] = field(default_factory=list)

    def by_name(self) -> dict[str, tuple[int, int]]:
        """Name → (size, stamp)."""
        return dict(zip(self.names, zip(self.sizes, self.stamps, strict=True), strict=True))


def list_folder(store: Store, folder: str) -> Listing:
    """The files of a folder; empty when there is no such folder."""
    found = Listing()
    if store.is_local:
        _scan(f"{store.root}/{folder}", found)
        return found
    for name, size, tag in store.versions(folder):
        if not name.startswith("."):
            found.names.append(name)
            found.sizes.append(size)
            found.stamps.append(int.from_bytes(hashlib.sha256(tag.encode()).digest()[:8], "little", signed=True))
    return found


def _scan(path: str, found: Listing) -> None:
    add_name, add_size, add_stamp = found.names.append, found.sizes.append, found.stamps.append
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(path) as entries:
        for entry in entries:
            name = entry.name
            if name[0] == "." or entry.is_dir():
                continue
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:  # it went away between listing and looking
                continue
            add_name(name)
            add_size(status.st_size)
            add_stamp(status.st_mtime_ns)


def mix(*parts: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """(N,) uint64 out of several such arrays: equal parts give equal numbers, and any other part another number.

    The finaliser of SplitMix64 (Steele, Lea and Flood 2014) over the parts in turn; 64 bits, so that two of a billion
    files meet by chance once in 10^10 datasets. It guards against mistakes, not against forgers.
    """
    found = np.zeros(len(parts[0]), np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            found = found * np.uint64(0x9E3779B97F4A7C15) + part.astype(np.uint64) + np.uint64(0x632BE59BD9B4E019)
            found = (found ^ (found >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            found = (found ^ (found >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            found ^= found >> np.uint64(31)
    return found
