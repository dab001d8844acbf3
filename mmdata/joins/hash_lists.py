"""Lists of perceptual hashes: what is blocked at ingest, and what evaluation sets hold.

In: an opened `KeyList`: text of 16 hex digits, whole numbers of 64 bits (signed ones by their bits), or `.npy` of
either 64-bit type. Out: the hashes some at a time, with the row each stands in. SourceError for any other value; rows
without a value are passed over.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mmdata.errors import SourceError
from mmdata.joins.arrays import ArrayFile
from mmdata.joins.lists import KeyList

__all__ = ["phashes"]

Hashes = npt.NDArray[np.uint64]
_HASH = re.compile("[0-9a-fA-F]{16}")


def phashes(given: KeyList, folder: Path, where: str) -> Iterator[tuple[Hashes, npt.NDArray[np.int64]]]:
    """(hashes, rows from 0 over all files); `where` begins the messages, `folder` is scratch."""
    problem = f"{where}: {given.path} holds what is no phash (16 hex digits, or whole numbers of 64 bits)"
    first = 0
    for file in given.files:
        if isinstance(file, ArrayFile):
            if file.header().dtype.kind not in "ui" or file.header().dtype.itemsize != 8:
                raise SourceError(problem)
            values = np.asarray(file.mapped(folder)).astype(file.header().dtype.newbyteorder("=")).view(np.uint64)
            yield values, first + np.arange(len(values))
            first += len(values)
            continue
        if file.format == "parquet":
            with file.open() as opened:
                column = pq.ParquetFile(opened).read([given.column], use_threads=False).column(0)
            if pa.types.is_integer(column.type) and column.type.bit_width == 64:
                there = np.flatnonzero(column.is_valid().to_numpy())
                yield column.drop_null().to_numpy().view(np.uint64), first + there
                first += len(column)
                continue
        for texts in replace(given, files=(file,)).texts(folder):
            cells = [(row, t.strip()) for row, t in enumerate(texts.to_pylist()) if t and t.strip()]
            bad = [t for _, t in cells if not _HASH.fullmatch(t)]
            if bad:
                raise SourceError(f"{problem}, such as {bad[0][:80]!r}")
            yield np.array([int(t, 16) for _, t in cells], np.uint64), np.array([r + first for r, _ in cells], np.int64)
            first += len(texts)
