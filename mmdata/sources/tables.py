"""Pictures that are cells of table files (Parquet, Arrow), adopted where they lie: what `parquet` and `hf` share.

In: table files of one schema, the column that holds pictures (binary, or a struct of `bytes` and `path` as HF's Image;
none where the table is metadata alone), and the columns for captions, URLs, uids and keys. Out: one row per row of the
files, in their order. The bytes are read once for their length and the picture's size, and stay where they are; a
reference is `<file>#<column>` and the row.
SourceError: a column that is not there or not of its kind, files of different schemas, a file that does not read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from mmdata.errors import SourceError, nearest
from mmdata.sources.adopted import HEAD_BYTES, Adopted, AdoptingSource, Part, Row, missing_media, pictured
from mmdata.sources.list_files import reading
from mmdata.sources.places import Place, is_local, open_place
from mmdata.sources.plain_columns import check_extra_names, plain_column, plain_type, require_distinct

__all__ = ["TableSource", "place_at"]

_BATCH = 1024


@dataclass(frozen=True)
class _Table:
    """One file's shape: rows, and the fields it has."""

    place: Place
    rows: int
    schema: pa.Schema


class TableSource(AdoptingSource):
    """Rows of table files with a picture in each; subclasses say which files."""

    media: Literal["image", "none"] = Field(
        "image", description="none: the table is metadata alone, as of a pool that is filtered before it is downloaded"
    )
    image: str | None = Field(None, description="column of the pictures; null = the first that holds bytes of pictures")
    width: str | None = Field(None, description="column of the originals' widths in px, where media is none")
    height: str | None = Field(None, description="column of the originals' heights in px, where media is none")
    caption: str | None = Field(
        "text;caption", description="column of the captions, or several, the first that is there; null = there are none"
    )
    url: str | None = Field(None, description="column of the URLs; null = there is none")
    uid: str | None = Field(None, description="column of each row's own uid; null = made by mmdata")
    key: str | None = Field(None, description="column of each row's own key; null = made by mmdata")
    columns: tuple[str, ...] = Field((), description="further columns to carry along")

    @model_validator(mode="after")
    def _sides_or_picture(self) -> TableSource:
        if self.media == "image" and (self.width or self.height):
            raise ValueError("width and height are read out of the pictures; they are for media: none")
        if self.media == "none" and self.image is not None:
            raise ValueError("image names a column of pictures, and media: none says there are none")
        return self

    @property
    def has_captions(self) -> bool:
        """Whether the recipe names a column of captions."""
        return self.caption is not None

    def places(self) -> list[Place]:
        """The files, in order."""
        raise NotImplementedError

    def folders(self) -> list[str]:
        """Local folders in which a cell that has only a path may refer to a file; none unless a subclass knows some."""
        return []

    def schema(self) -> pa.Schema:  # type: ignore[override]
        """`path` (`<file>#<row>`), then the columns asked for, in the types of the first file."""
        check_extra_names(self.columns)
        tables = self._tables()
        first = tables[0].schema
        asked = [("url", self.url), ("uid", self.uid), ("key", self.key), *(("columns", c) for c in self.columns)]
        asked += [("width", self.width), ("height", self.height)]
        if self.caption != "text;caption":
            asked += [("caption", self._caption(first) or self.caption)]
        for table in tables:
            if self.media == "image":
                self._image_column(table)
            for option, name in asked:
                if name is not None and name not in table.schema.names:
                    raise SourceError(
                        f"{table.place.url} has no column {name!r} (source.{option}){nearest(name, table.schema.names)}"
                    )
            for name in self.columns:
                ours, theirs = plain_type(first.field(name).type), plain_type(table.schema.field(name).type)
                if ours != theirs:
                    raise SourceError(
                        f"column {name!r} is {theirs} in {table.place.url} but {ours} in {tables[0].place.url}: make "
                        "them alike"
                    )
        return pa.schema([("path", pa.string()), *((n, plain_type(first.field(n).type)) for n in self.columns)])

    def parts(self, shard_rows: int) -> Iterator[Part]:
        """`shard_rows` rows each, over the files as if they were one."""
        held: list[Place] = []
        first = rows = 0
        for table in self._tables():
            start = 0
            while start < table.rows:
                if not held:
                    first = start
                took = min(table.rows - start, shard_rows - rows)
                held.append(table.place)
                start, rows = start + took, rows + took
                if rows == shard_rows:
                    yield Part(tuple(held), first, rows, label=held[0].name)
                    held, rows = [], 0
        if held:
            yield Part(tuple(held), first, rows, label=held[0].name)

    def read(self, part: Part, extra: pa.Schema) -> Adopted:
        """One row per row of the range; a NULL cell is `missing_media`."""
        rows: list[Row] = []
        carried: list[pa.Table] = []
        first, left = part.first, part.rows or 0
        for place in part.files:
            for start, table in _batches(place, self._wanted(place, extra)):
                skip = max(0, first - start)
                table = table.slice(skip, left) if skip < len(table) else table.slice(0, 0)
                if not len(table):
                    continue
                at = start + skip
                rows += self._rows(place, table, at)
                paths = pa.array([f"{place.name}#{at + i}" for i in range(len(table))], pa.string())
                columns = [paths if f.name == "path" else _column(table, f) for f in extra]
                carried.append(pa.table(columns, schema=extra))
                left -= len(table)
                first = start + skip + len(table)
                if not left:
                    break
            first = 0
        return Adopted(rows, pa.concat_tables(carried) if carried else extra.empty_table())

    def _rows(self, place: Place, table: pa.Table, at: int) -> list[Row]:
        found = self._pictures(place, table, at) if self.media == "image" else self._without_media(table)
        known = {"caption": self._caption(table.schema), "url": self.url, "uid": self.uid, "key": self.key}
        for name, source in known.items():
            if source is not None:
                values = plain_column(table.column(source).combine_chunks(), pa.string()).to_pylist()
                for row, value in zip(found, values, strict=True):
                    row[name] = value
        return found

    def _without_media(self, table: pa.Table) -> list[Row]:
        """Rows that refer to nothing: stages that want a picture fail them, everything else works."""
        sides = {"width": self.width, "height": self.height}
        columns = {
            f"original_{side}_px": _whole_numbers(f"column {name!r} (source.{side})", table.column(name))
            for side, name in sides.items()
            if name is not None
        }
        return [{"status": "ok", **{name: values[i] for name, values in columns.items()}} for i in range(len(table))]

    def _pictures(self, place: Place, table: pa.Table, at: int) -> list[Row]:
        column, field = self._image_column(_Table(place, 0, table.schema))
        cells = table.column(column).combine_chunks()
        cells = cells.storage if isinstance(cells, pa.ExtensionArray) else cells
        paths: Sequence[str | None] = [None] * len(table)
        if field:
            names = [f.name for f in cells.type]
            values = cells.flatten()
            if "path" in names:
                paths = values[names.index("path")].to_pylist()
            cells = values[names.index("bytes")]
        reference = f"{place.url}#{column}.bytes" if field else f"{place.url}#{column}"
        return [self._picture(reference, at + i, cells[i], path) for i, path in enumerate(paths)]

    def _picture(self, reference: str, row: int, cell: Any, path: str | None) -> Row:
        if not cell.is_valid:
            return missing_media("the cell is NULL") if path is None else self._beside(path)
        data = memoryview(cell.as_buffer())
        head, rest = bytes(data[:HEAD_BYTES]), bytes(data[HEAD_BYTES:]) if len(data) > HEAD_BYTES else b""
        made = {"image_path": reference, "image_offset": row, "image_size": len(data), "image_ext": None}
        return pictured(made, head, lambda count: rest[:count])

    def _beside(self, path: str) -> Row:
        """A cell with only a path: a file in the folders this source may refer into, and nowhere else."""
        place = place_at(path, self.folders())
        if place is None:
            return missing_media("the cell has no bytes, only a path that leads out of the source")
        reference = {"image_path": place.url, "image_offset": 0, "image_size": place.size, "image_ext": None}
        with reading(place.url), open_place(place.url) as file:
            return pictured(reference, file.read(HEAD_BYTES), file.read)

    # Shape

    def _tables(self) -> list[_Table]:
        return [_table(place) for place in self.places()]

    def _caption(self, schema: pa.Schema) -> str | None:
        names = [] if self.caption is None else [n.strip() for n in self.caption.split(";")]
        return next((n for n in names if n in schema.names and _is_text(schema.field(n).type)), None)

    def _wanted(self, place: Place, extra: pa.Schema) -> list[str]:
        table = _table(place)
        named = [self.url, self.uid, self.key, self.width, self.height, *self.columns]
        names = [self._image_column(table)[0] if self.media == "image" else None, self._caption(table.schema), *named]
        return [n for n in dict.fromkeys(names) if n is not None]

    def _image_column(self, table: _Table) -> tuple[str, bool]:
        """The column of pictures, and whether it is a struct of bytes and path."""
        for field in table.schema:
            kind = field.type.storage_type if isinstance(field.type, pa.BaseExtensionType) else field.type
            is_struct = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
            is_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
            if field.name == self.image or (self.image is None and (is_struct or is_bytes)):
                if not is_struct and not is_bytes:
                    raise SourceError(
                        f"column {field.name!r} of {table.place.url} (source.image) is {field.type}; expected bytes, "
                        "or a struct of bytes and path"
                    )
                return field.name, is_struct
        if self.image is None:
            raise SourceError(f"{table.place.url} has no column that holds bytes; say which with source.image")
        names = table.schema.names
        raise SourceError(f"{table.place.url} has no column {self.image!r} (source.image){nearest(self.image, names)}")


def place_at(path: str, folders: Sequence[str]) -> Place | None:
    """The file at a path, if it is there and in one of these folders, links followed; None otherwise."""
    real = os.path.realpath(path)
    if not os.path.isfile(real) or not any(
        os.path.commonpath([real, os.path.realpath(f)]) == os.path.realpath(f) for f in folders
    ):
        return None
    return Place(os.path.abspath(path), os.path.basename(path), os.path.getsize(real))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(plain_type(kind)))


def _column(table: pa.Table, field: pa.Field) -> pa.Array:
    return plain_column(table.column(field.name).combine_chunks(), field.type)


def _whole_numbers(what: str, column: pa.ChunkedArray) -> list[int | None]:
    """The cells as integers. NaN is none: pandas writes it for a missing one, and the others as 640.0."""
    cells = column.combine_chunks()
    try:
        if pa.types.is_floating(cells.type):
            cells = pc.if_else(pc.is_nan(cells), pa.scalar(None, cells.type), cells)
        found: list[int | None] = plain_column(cells, pa.int64()).to_pylist()
    except pa.ArrowException as error:
        raise SourceError(f"{what} does not hold whole numbers: {error}") from None
    return found


def _is_arrow(place: Place) -> bool:
    return place.url.endswith(".arrow")


def _table(place: Place) -> _Table:
    with reading(place.url):
        if _is_arrow(place):
            table = _mapped(place)
            found = _Table(place, len(table), table.schema)
        else:
            with open_place(place.url) as file, pq.ParquetFile(file) as parquet:
                found = _Table(place, parquet.metadata.num_rows, parquet.schema_arrow)
    require_distinct(place.url, found.schema.names)
    return found


def _mapped(place: Place) -> pa.Table:
    """An Arrow file of either format, mapped into memory; a remote one is read."""
    if is_local(place.url):
        source: Any = pa.memory_map(place.url, "r")
    else:
        fs, root = fsspec.core.url_to_fs(place.url)
        source = pa.BufferReader(fs.cat_file(root))
    try:
        return pa.ipc.open_file(source).read_all()
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_stream(source).read_all()


def _batches(place: Place, columns: list[str]) -> Iterator[tuple[int, pa.Table]]:
    """(first row, table) of a file, a bounded number of rows at a time."""
    start = 0
    with reading(place.url):
        if _is_arrow(place):
            for batch in _mapped(place).select(columns).to_batches(max_chunksize=_BATCH):
                yield start, pa.Table.from_batches([batch])
                start += len(batch)
            return
        with open_place(place.url) as file, pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(_BATCH, columns=columns, use_threads=False):
                yield start, pa.Table.from_batches([batch])
                start += len(batch)
