"""Files of keys: a column of a table, text with a key a line, NumPy text, or DataComp's uids as pairs of uint64.

In: a file and the column or array that holds the keys. Out: the keys in file order, as text or as numbers, some rows at
a time. SourceError for what holds no keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mmdata.errors import SourceError
from mmdata.joins.arrays import ArrayFile, as_arrow
from mmdata.joins.keys import JoinColumn, Keys, keys_of, pair_keys
from mmdata.joins.tables import BATCH_ROWS, batches, parquet_rows
from mmdata.sources.list_files import ListFile, reading

__all__ = ["array_files", "key_batches", "key_texts", "rows_of"]

_ARRAYS = (".npy", ".npz")


def array_files(path: str) -> list[ListFile] | None:
    """The `.npy` or `.npz` files of a path, a glob, or a folder without tables; None where it is something else."""
    with reading(path):
        fs, root = fsspec.core.url_to_fs(path)
        if any(c in root for c in "*?["):
            found = sorted(p for p in fs.glob(root) if fs.isfile(p))
        elif fs.isdir(root):
            found = sorted(fs.find(root))
            if any(not p.endswith(_ARRAYS) for p in found):
                return None
        else:
            found = [root] if fs.isfile(root) else []
    if not found or not all(p.endswith(_ARRAYS) for p in found):
        return None
    if len({PurePosixPath(p).suffix for p in found}) > 1:
        raise SourceError(f"{path} holds .npy and .npz files: name one kind")
    return [ListFile(fs, p, PurePosixPath(p).name, PurePosixPath(p).suffix[1:]) for p in found]


def key_batches(
    file: ListFile | ArrayFile, on: JoinColumn, column: str, folder: Path
) -> Iterator[tuple[Keys, npt.NDArray[np.bool_]]]:
    """Keys of a table's column or of an array (text, or DataComp's `u8,u8` for uids), some rows at a time."""
    if isinstance(file, ArrayFile) and file.header().dtype.names:
        pairs = _pairs(file, on, folder)
        for first in range(0, len(pairs), BATCH_ROWS):
            found = pair_keys(np.asarray(pairs[first : first + BATCH_ROWS]))
            yield found, np.ones(len(found), bool)
        return
    for texts in key_texts(file, column, folder):
        yield keys_of(on, texts)


def _pairs(file: ArrayFile, on: JoinColumn, folder: Path) -> npt.NDArray[Any]:
    header = file.header()
    kinds = [header.dtype[name].newbyteorder("=") for name in header.dtype.names or ()]
    if on != "uid" or kinds != [np.dtype("u8")] * 2 or len(header.shape) != 1:
        raise SourceError(
            f"{file.where} holds {header.dtype}; only uids are given as pairs, of dtype u8,u8 and one dimension"
        )
    return file.mapped(folder)


def rows_of(file: ListFile | ArrayFile, column: str) -> int:
    """How many rows a file of keys has; text is read for it."""
    if isinstance(file, ArrayFile):
        return int(file.header().shape[0])
    rows = parquet_rows(file)
    return sum(len(batch) for batch, _ in batches(file, pa.schema([(column, pa.string())]))) if rows is None else rows


def key_texts(file: ListFile | ArrayFile, column: str, folder: Path) -> Iterator[pa.Array]:
    """The keys as text; `folder` is scratch for arrays that cannot be mapped from where they lie."""
    if isinstance(file, ListFile):
        for batch, _ in batches(file, pa.schema([(column, pa.string())])):
            yield batch.column(0)
        return
    header = file.header()
    if header.dtype.names:
        for pair in _pairs(file, "uid", folder):
            yield pa.array([f"{int(pair[0]):016x}{int(pair[1]):016x}"])
        return
    if len(header.shape) != 1 or header.dtype.kind not in "US":
        raise SourceError(f"{file.where} has the shape {header.shape} of {header.dtype}; keys are text, one a row")
    values = file.mapped(folder)
    for first in range(0, len(values), BATCH_ROWS):
        yield as_arrow(np.asarray(values[first : first + BATCH_ROWS]), pa.string())[0]
