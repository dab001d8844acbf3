"""Tables that name pictures by file: HF imagefolder's metadata files, or one of one's own (csv, tsv, json, Parquet).

In: a table and the folder its names are relative to. Out: its lines by the name relative to the source, each once. A
line that names nothing, or something above the source, is left over. SourceError: no such column, unreadable.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Sequence
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from mmdata.errors import SourceError, nearest
from mmdata.sources.list_files import FORMATS, ListFile, reading
from mmdata.sources.list_rows import column_names, converted, inferred_type, text_rows
from mmdata.sources.places import Place, open_place
from mmdata.sources.plain_columns import plain_column, plain_type

__all__ = ["PictureTable", "read_picture_table"]


class PictureTable:
    """The lines of one table, in memory; `name` is the file's."""

    def __init__(self, name: str, folder: str, there: Sequence[str], names: Sequence[Any], lines: pa.Table) -> None:
        self.name = name
        self._folder, self._there, self._schema = folder, list(there), lines.schema
        self._columns = {n: lines.column(n).to_pylist() for n in lines.column_names}
        self._given = [None if n is None else str(n) for n in names]
        self._by_name: dict[str, list[int]] = {}
        for number, given in enumerate(self._given):
            self._by_name.setdefault(self._relative(given) or "", []).append(number)

    def _relative(self, given: str | None) -> str | None:
        """The name relative to the source; None where it leads out of it, or is none."""
        if not given or given.startswith("/"):
            return None
        path = posixpath.normpath(posixpath.join(self._folder, given))
        return None if path == ".." or path.startswith("../") else path

    def holds_for(self, folder: str) -> bool:
        """Whether it may name pictures in a folder (relative to the source)."""
        return not self._folder or folder == self._folder or folder.startswith(f"{self._folder}/")

    def require(self, columns: Sequence[str], captions: str | None) -> None:
        """SourceError when one of the columns is not there, or none of the captions' (`a;b`)."""
        for column in columns:
            if column not in self._there:
                raise SourceError(f"{self.name} has no column {column!r}{nearest(column, self._there)}")
        names = [] if captions is None else [n.strip() for n in captions.split(";")]
        if names and not any(n in self._there for n in names):
            raise SourceError(
                f"{self.name} has no column {names[0]!r} (source.caption){nearest(names[0], self._there)}"
            )

    def type_of(self, column: str) -> pa.DataType:
        """The type of a column."""
        return self._schema.field(column).type

    def take(self, name: str) -> list[dict[str, Any]]:
        """The lines for a picture, named relative to the source, in the table's order; they are not given again."""
        numbers = self._by_name.pop(name, []) if name else []
        return [self._line(number) for number in numbers]

    def left(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """What no picture took, in the table's order: the name as given, and the line."""
        for number in sorted(number for numbers in self._by_name.values() for number in numbers):
            yield self._given[number] or "", self._line(number)

    def _line(self, number: int) -> dict[str, Any]:
        return {name: cells[number] for name, cells in self._columns.items()}


def read_picture_table(
    place: Place, folder: str, file_name: str, wanted: Sequence[str], typed: Sequence[str]
) -> PictureTable:
    """The table at a place; of the `wanted` columns those it has. Columns not in `typed` are text."""
    name = place.name or place.url
    extension = place.url.rpartition(".")[2].lower()
    format = FORMATS.get(extension)
    if format is None or format == "txt":
        raise SourceError(f"{place.url} is no table mmdata reads; expected csv, tsv, json, jsonl or parquet")
    if format == "parquet":
        with reading(place.url), open_place(place.url) as file, pq.ParquetFile(file) as parquet:
            there = parquet.schema_arrow.names
            columns = _present(place, file_name, wanted, there)
            table = parquet.read(columns=columns, use_threads=False)
            arrays = [
                plain_column(table.column(c).combine_chunks(), plain_type(table.schema.field(c).type)) for c in columns
            ]
    else:
        fs, root = fsspec.core.url_to_fs(place.url)
        listed = ListFile(fs, root, place.name, format)
        with listed.open() as file:
            there = column_names(file, format, place.url)
        columns = _present(place, file_name, wanted, there)
        with listed.open() as file:
            cells = list(zip(*text_rows(file, format, columns, place.url), strict=True)) or [()] * len(columns)
        arrays = [
            converted(list(c), inferred_type(list(c), format) if n in typed else pa.string())
            for n, c in zip(columns, cells, strict=True)
        ]
    lines = pa.table(arrays, names=columns)
    return PictureTable(name, folder, there, lines.column(file_name).to_pylist(), lines)


def _present(place: Place, file_name: str, wanted: Sequence[str], there: Sequence[str]) -> list[str]:
    if file_name not in there:
        raise SourceError(f"{place.url} has no column {file_name!r} (source.file_name){nearest(file_name, there)}")
    return list(dict.fromkeys([file_name, *(w for w in wanted if w in there)]))
