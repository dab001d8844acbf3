"""The source `urls`: a list of URLs in txt, csv, tsv, json, jsonl or Parquet files, streamed in tables of one shard."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, PrivateAttr

from mmdata.errors import SourceError, nearest
from mmdata.sources.list_files import ListFile, find_files, fingerprint, reading
from mmdata.sources.list_rows import FIRST_BLOCK, column_names, converted, inferred_type, text_rows
from mmdata.sources.plain_columns import check_extra_names, plain_column, plain_type
from mmdata.stage import Options

__all__ = ["GIVEN", "UrlSource"]

_PARQUET_ROWS = 16_384  # of one batch
# Columns of tables that say what is to be done with a row and are not stored → (type, the option that names them).
GIVEN: Mapping[str, tuple[pa.DataType, str]] = {
    "fetch:hash": (pa.string(), "fetch.verify_hash"),
    "fetch:boxes": (pa.list_(pa.list_(pa.float64())), "fetch.bbox"),
}


class UrlSource(Options):
    """A list of URLs, and what of it goes into the dataset.

    Types of extra columns are the file's (Parquet) or come from the first 10,000 rows: bool, int64, float64, else
    string; a later cell that does not fit its type is NULL, text always stays. Rows keep the list's order, files come
    in the order of their names. Bytes that are not UTF-8 become U+FFFD and cost that row (`bad_url`), not the run.
    """

    is_fetched: ClassVar[bool] = True
    kind: Literal["urls"] = "urls"
    path: str = Field(min_length=1, description="file, folder, glob or fsspec URL; .gz and the like are undone")
    url: str = Field("url", description="column of the URLs; a txt file has only that: a URL a line, blank lines apart")
    caption: str | None = Field(None, description="column of the captions; null = there are none")
    columns: tuple[str, ...] = Field((), description="further columns to carry along")
    uid: str | None = Field(None, description="column of each row's own uid; null = made from URL and caption")
    format: Literal["auto", "txt", "csv", "tsv", "json", "jsonl", "parquet"] = Field(
        "auto", description="format of the files; auto: told by their extension"
    )

    _given: dict[str, str] = PrivateAttr(default_factory=dict)
    _counted: dict[str, int] = PrivateAttr(default_factory=dict)  # `rows`, once known; its copies share it

    @property
    def known_rows(self) -> int | None:
        """Rows of the list, once a Parquet list has been looked at; None = nobody has counted them."""
        return self._counted.get("rows")

    def with_given(self, given: Mapping[str, str]) -> UrlSource:
        """The same source, whose tables also have these of the columns GIVEN: name there → column of the list."""
        made = self.model_copy()
        made._given = dict(given)
        return made

    @property
    def has_captions(self) -> bool:
        """Whether the recipe names a column of captions."""
        return self.caption is not None

    def schema(self) -> pa.Schema:  # type: ignore[override]  # hides pydantic's deprecated method of that name
        """Names and types of the extra columns, in the order asked for; opens every file and reads the first rows.

        SourceError: no such file or column, a name that mmdata uses itself, a list without rows, unreadable.
        """
        check_extra_names(self.columns)
        files = self._files()
        if files[0].format == "parquet":
            return self._parquet_schema(files)
        return self._text_schema(files)

    def fingerprint(self) -> str:
        """64 hex digits naming the content of the list: see `list_files.fingerprint`. Not the columns chosen."""
        return fingerprint(self._files())

    def tables(self, rows: int) -> Iterator[pa.Table]:
        """The list in tables of `rows` rows, the last one shorter: `url`, `caption`, `uid` if asked for, the extras.

        `url` and `caption` are strings; `caption` is NULL throughout where the list has none. Raises as `schema`.
        """
        extra = self.schema()
        held: list[pa.Table] = []
        count = 0
        for part in self._parts(extra):
            held.append(part)
            count += len(part)
            while count >= rows:
                whole = pa.concat_tables(held)
                yield whole.slice(0, rows).combine_chunks()
                held, count = [whole.slice(rows)], count - rows
        if count:
            yield pa.concat_tables(held).combine_chunks()

    # Names

    def _files(self) -> list[ListFile]:
        return find_files(self.path, self.format)

    def _wanted(self) -> dict[str, str]:
        """Column of the table → column of the list."""
        own = {"url": self.url, "caption": self.caption, "uid": self.uid}
        named = {k: v for k, v in own.items() if v is not None} | self._given
        return named | {name: name for name in self.columns}

    def _check_columns(self, file: ListFile, there: list[str]) -> None:
        if file.format == "txt":
            asked = [f"source.{k}" for k in ("caption", "uid", "columns") if getattr(self, k)]
            asked += [GIVEN[name][1] for name in self._given]
            if asked:
                raise SourceError(f"{file.path} is a txt list, which holds URLs only: leave out {' and '.join(asked)}")
            return
        for role, name in self._wanted().items():
            if name not in there:
                option = f"source.{role}" if role in ("url", "caption", "uid") else "source.columns"
                option = GIVEN[role][1] if role in self._given else option
                raise SourceError(f"{file.path} has no column {name!r} ({option}){nearest(name, there)}")
            if there.count(name) > 1:
                raise SourceError(f"{file.path} has {there.count(name)} columns {name!r}; rename all but one")

    # Text

    def _text_schema(self, files: list[ListFile]) -> pa.Schema:
        wanted = list(self._wanted().values())
        first: list[list[Any]] = []
        for number, file in enumerate(files):
            with file.open() as opened:
                there = column_names(opened, file.format, file.path)
            # A key of json may be absent from a later file, as it may be from a row; a column of csv may not.
            if there and (file.format in ("txt", "csv", "tsv") or number == 0):
                self._check_columns(file, there)
            if len(first) < FIRST_BLOCK and there:
                with file.open() as opened:
                    first += islice(text_rows(opened, file.format, wanted, file.path), FIRST_BLOCK - len(first))
        if not first:
            raise SourceError(f"the list {self.path} has no rows")
        places = {name: place for place, name in enumerate(wanted)}
        types = [(n, inferred_type([row[places[n]] for row in first], files[0].format)) for n in self.columns]
        return pa.schema(types)

    def _parts(self, extra: pa.Schema) -> Iterator[pa.Table]:
        for file in self._files():
            if file.format == "parquet":
                yield from self._parquet_parts(file, extra)
                continue
            with file.open() as opened:
                wanted = self._wanted()
                rows = text_rows(opened, file.format, list(wanted.values()), file.path)
                while block := list(islice(rows, FIRST_BLOCK)):
                    cells = dict(zip(wanted, zip(*block, strict=True), strict=True))
                    yield self._table({k: self._text_column(k, list(c), extra) for k, c in cells.items()}, extra)

    def _text_column(self, name: str, cells: list[Any], extra: pa.Schema) -> pa.Array:
        if name in self.columns:
            return converted(cells, extra.field(name).type)
        if name == "fetch:boxes":
            return _boxes(cells)
        # A URL that is no text is no URL; a caption or uid may have been written as a number.
        return converted([c if isinstance(c, str) else None for c in cells] if name == "url" else cells, pa.string())

    def _table(self, found: dict[str, pa.Array], extra: pa.Schema) -> pa.Table:
        found.setdefault("caption", pa.nulls(len(found["url"]), pa.string()))
        own = [name for name in ("url", "caption", "uid") if name in found]
        fields = [pa.field(name, pa.string()) for name in own] + list(extra)
        fields += [pa.field(name, GIVEN[name][0]) for name in self._given]
        return pa.table([found[f.name] for f in fields], schema=pa.schema(fields))

    # Parquet

    def _parquet_schema(self, files: list[ListFile]) -> pa.Schema:
        found: pa.Schema | None = None
        rows = 0
        for file in files:
            with file.open() as opened, pq.ParquetFile(opened) as parquet:
                schema = parquet.schema_arrow
                rows += parquet.metadata.num_rows
            self._check_columns(file, schema.names)
            for role in ("url", "caption", "uid"):
                if role in self._wanted():
                    _check_text(file, role, schema.field(self._wanted()[role]))
            extra = pa.schema([(name, plain_type(schema.field(name).type)) for name in self.columns])
            found = found or extra
            for ours, theirs in zip(extra, found, strict=True):
                if ours.type != theirs.type:
                    raise SourceError(
                        f"column {ours.name!r} is {ours.type} in {file.path} but {theirs.type} in {files[0].path}: "
                        "make them alike"
                    )
        if not rows or found is None:
            raise SourceError(f"the list {self.path} has no rows")
        self._counted["rows"] = rows
        return found

    def _parquet_parts(self, file: ListFile, extra: pa.Schema) -> Iterator[pa.Table]:
        wanted = self._wanted()
        with file.open() as opened, pq.ParquetFile(opened) as parquet:
            batches = parquet.iter_batches(
                _PARQUET_ROWS, columns=list(dict.fromkeys(wanted.values())), use_threads=False
            )
            for batch in batches:
                with reading(file.path):
                    found = {
                        name: self._parquet_column(name, batch.column(batch.schema.get_field_index(source)), extra)
                        for name, source in wanted.items()
                    }
                yield self._table(found, extra)

    def _parquet_column(self, name: str, column: pa.Array, extra: pa.Schema) -> pa.Array:
        if name == "fetch:boxes":
            return _boxes(column.to_pylist())
        return plain_column(column, extra.field(name).type if name in self.columns else pa.string())


def _boxes(cells: Sequence[Any]) -> pa.Array:
    """Cells of boxes as lists of four numbers each; what is none becomes a box without numbers, which costs that row.

    A cell is a list of [left, top, right, bottom] or of structs with these names, or that as JSON text; NULL and empty
    text: there are none.
    """
    return pa.array([_boxes_in(cell) for cell in cells], GIVEN["fetch:boxes"][0])


def _boxes_in(cell: Any) -> list[list[float]] | None:
    try:
        found = json.loads(cell) if isinstance(cell, str) and cell.strip() else cell or None
        if found is None:
            return None
        names = ("left", "top", "right", "bottom")
        boxes = [[float(box[n]) for n in names] if isinstance(box, Mapping) else list(map(float, box)) for box in found]
    except (ValueError, TypeError, KeyError, RecursionError):
        return [[]]
    return boxes if all(len(box) == 4 and all(map(math.isfinite, box)) for box in boxes) else [[]]


def _check_text(file: ListFile, role: str, field: pa.Field) -> None:
    kind = plain_type(field.type)
    textual = pa.types.is_string(kind) or pa.types.is_binary(kind)
    if not textual and (role == "url" or pa.types.is_nested(kind)):
        raise SourceError(f"column {field.name!r} of {file.path} (source.{role}) is {field.type}; text was expected")
