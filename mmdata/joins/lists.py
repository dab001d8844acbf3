"""Lists of keys: which rows are meant, given as a file. What `keep_list` keeps and what block lists keep out.

In: a path (file, folder, glob, fsspec URL) of text with a value a line, a table with one column or a named one, or a
`.npy` array (text, or DataComp's subset file of uids as `u8,u8`). Out: the values as keys or text, some at a time, and
a fingerprint of the content. SourceError for what is not there or holds no keys.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mmdata.errors import SourceError, nearest
from mmdata.joins.arrays import ArrayFile
from mmdata.joins.key_files import array_files, key_batches, key_texts, rows_of
from mmdata.joins.keys import JoinColumn, Keys
from mmdata.joins.tables import names_of, types_of
from mmdata.sources.list_files import ListFile, find_files, fingerprint

__all__ = ["KeyList", "open_list"]


@dataclass(frozen=True)
class KeyList:
    """The files of a list, looked at but not read; `column` holds the values in tables, empty elsewhere."""

    path: str
    files: tuple[ListFile | ArrayFile, ...]
    column: str

    def rows(self) -> int:
        """Values in the list, repeated ones too; text is read for it."""
        return sum(rows_of(file, self.column) for file in self.files)

    def fingerprint(self) -> str:
        """64 hex digits over the content; names and places do not count."""
        files = [f.file if isinstance(f, ArrayFile) else f for f in self.files]
        return fingerprint([replace(f, name=str(number)) for number, f in enumerate(files)])

    def keys(self, on: JoinColumn, folder: Path) -> Iterator[tuple[Keys, npt.NDArray[np.bool_]]]:
        """Keys of the values, and which are keys at all; `folder` is scratch."""
        for file in self.files:
            yield from key_batches(file, on, self.column, folder)

    def texts(self, folder: Path) -> Iterator[pa.Array]:
        """The values as text."""
        for file in self.files:
            yield from key_texts(file, self.column, folder)


def open_list(path: str, wanted: str, column: str | None = None, is_text: bool = True) -> KeyList:
    """The list at a path; `wanted` is the column of a table unless `column` names it, or there is only one."""
    path = os.path.expanduser(path)
    arrays = array_files(path)
    if arrays is not None:
        if arrays[0].format == "npz":
            raise SourceError(f"{path}: a list of keys in NumPy's format is a .npy file; save that array alone")
        files = tuple(ArrayFile(f) for f in arrays)
        for array in files:
            if len(array.header().shape) != 1:
                raise SourceError(f"{array.where} has the shape {array.header().shape}; a list has one dimension")
        return KeyList(path, files, "")
    tables = find_files(path, "auto")
    there = names_of(tables[0])
    if tables[0].format == "txt":
        if column is not None:
            raise SourceError(f"{path} has a value a line and no columns; leave `column` out")
        return KeyList(path, tuple(tables), "")
    chosen = column or (wanted if wanted in there or len(there) != 1 else there[0])
    if chosen not in there:
        raise SourceError(f"{tables[0].path} has no column {chosen!r}{nearest(chosen, there)}; name it with `column`")
    if is_text:
        types_of(tables, [chosen], [])
    return KeyList(path, tuple(tables), chosen)
