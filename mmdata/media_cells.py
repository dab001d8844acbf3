"""Media that is a cell of a table file: `<file>.parquet#image.bytes`, `<file>.arrow#image.bytes`, row by row.

In: a file, a column (a field of a struct by its dotted name) and a row. Out: the cell's bytes, None where it is NULL.
Parquet is read a row group at a time, and the last ones used are kept, at most `held_bytes` of them but never fewer
than one; Arrow files (stream or file format) are mapped into memory. What Arrow raises for a broken file goes through.
"""

from __future__ import annotations

import bisect
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from mmdata.sources.places import is_local

__all__ = ["HELD_BYTES", "Cells", "split_cell"]

HELD_BYTES = 256 << 20
_OPEN_FILES = 16
_CELL = re.compile(r"(.*\.(?:parquet|pq|arrow))#([^#/]+)", re.S)


def split_cell(path: str) -> tuple[str, str] | None:
    """File and column of a reference that is a cell; None for any other path."""
    match = _CELL.fullmatch(path)
    return (match[1], match[2]) if match is not None else None


class Cells:
    """Open table files, the last used of them; `bring` puts a remote file at a local path. For several threads."""

    def __init__(self, bring: Callable[[str], Path], held_bytes: int = HELD_BYTES) -> None:
        self._bring, self._held_bytes = bring, held_bytes
        self._lock = threading.Lock()
        self._files: OrderedDict[str, _Parquet | _Arrow] = OrderedDict()
        self._groups: OrderedDict[tuple[str, str, int], Any] = OrderedDict()

    def read(self, url: str, column: str, row: int) -> bytes | None:
        """The bytes of one cell; IndexError when the file has no such row, KeyError when it has no such column."""
        with self._lock:
            file = self._file(url)
            group, inside = file.locate(row)
            key = (url, column, group)
            if key not in self._groups:
                self._groups[key] = file.column(column, group)
                while len(self._groups) > 1 and sum(v.nbytes for v in self._groups.values()) > self._held_bytes:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(key)
            values = self._groups[key]
        cell = values[inside]
        return None if not cell.is_valid else bytes(cell.as_buffer())

    def _file(self, url: str) -> _Parquet | _Arrow:
        if url not in self._files:
            self._files[url] = _Arrow(url, self._bring) if url.endswith(".arrow") else _Parquet(url)
            if len(self._files) > _OPEN_FILES:
                old, _ = self._files.popitem(last=False)
                for key in [k for k in self._groups if k[0] == old]:
                    del self._groups[key]
        self._files.move_to_end(url)
        return self._files[url]

    def close(self) -> None:
        """Let go of every file."""
        with self._lock:
            self._groups.clear()
            self._files.clear()


def _field(values: Any, names: list[str]) -> Any:
    """A struct's field by its path; NULL structs give NULL."""
    for name in names:
        values = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
        if isinstance(values, pa.ExtensionArray):
            values = values.storage
        index = values.type.get_field_index(name)
        if index < 0:
            raise KeyError(name)
        values = values.flatten()[index]
    return values


def _split(column: str, names: list[str]) -> list[str]:
    """The dotted name as column and fields; a column whose own name has dots is found first."""
    parts = column.split(".")
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in names:
            return [".".join(parts[:end]), *parts[end:]]
    raise KeyError(column)


class _Parquet:
    def __init__(self, url: str) -> None:
        source: Any = url
        if not is_local(url):
            fs, root = fsspec.core.url_to_fs(url)
            source = fs.open(root, "rb", cache_type="readahead")
        self._file = pq.ParquetFile(source, pre_buffer=True)
        counts = [self._file.metadata.row_group(i).num_rows for i in range(self._file.metadata.num_row_groups)]
        self._starts = [0]
        for count in counts:
            self._starts.append(self._starts[-1] + count)

    def locate(self, row: int) -> tuple[int, int]:
        if not 0 <= row < self._starts[-1]:
            raise IndexError(row)
        group = bisect.bisect_right(self._starts, row) - 1
        return group, row - self._starts[group]

    def column(self, column: str, group: int) -> Any:
        names = _split(column, self._file.schema_arrow.names)
        table = self._file.read_row_group(group, columns=[column], use_threads=False)
        return _field(table.column(names[0]), names[1:])


class _Arrow:
    def __init__(self, url: str, bring: Callable[[str], Path]) -> None:
        source = pa.memory_map(url if is_local(url) else str(bring(url)), "r")
        try:
            self._table = pa.ipc.open_file(source).read_all()
        except pa.ArrowInvalid:
            source.seek(0)
            self._table = pa.ipc.open_stream(source).read_all()
        self._starts = [0]
        for batch in self._table.to_batches():
            self._starts.append(self._starts[-1] + len(batch))

    def locate(self, row: int) -> tuple[int, int]:
        if not 0 <= row < self._starts[-1]:
            raise IndexError(row)
        group = bisect.bisect_right(self._starts, row) - 1
        return group, row - self._starts[group]

    def column(self, column: str, group: int) -> Any:
        names = _split(column, self._table.schema.names)
        start, end = self._starts[group], self._starts[group + 1]
        return _field(self._table.column(names[0]).slice(start, end - start).combine_chunks(), names[1:])
