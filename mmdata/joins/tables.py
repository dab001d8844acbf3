"""Given tables (Parquet, CSV, TSV, JSON, JSON lines, a line a value), streamed: some columns, some rows at a time.

In: files as `list_files.find_files` gives them and the names wanted. Out: their types, and record batches in file
order. Text files get their types from their first 10,000 rows; a later cell that does not fit is NULL and marked as
bad. SourceError, naming file and column: no such column, types that differ between files, text that was expected.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mmdata.errors import SourceError, nearest
from mmdata.sources.list_files import ListFile, reading
from mmdata.sources.list_rows import FIRST_BLOCK, column_names, converted, inferred_type, text_rows
from mmdata.sources.plain_columns import plain_column, plain_type

__all__ = ["BATCH_ROWS", "batches", "names_of", "parquet_rows", "types_of"]

BATCH_ROWS = 16_384


def names_of(file: ListFile) -> list[str]:
    """The columns of a file; of a text file with a value a line, one without a name."""
    if file.format == "txt":
        return [""]
    with file.open() as opened:
        if file.format == "parquet":
            return list(pq.ParquetFile(opened).schema_arrow.names)
        return column_names(opened, file.format, file.path)


def parquet_rows(file: ListFile) -> int | None:
    """Rows of a Parquet file; None for any other, which would have to be read."""
    if file.format != "parquet":
        return None
    with file.open() as opened:
        return int(pq.ParquetFile(opened).metadata.num_rows)


def types_of(files: Sequence[ListFile], text: Sequence[str], values: Sequence[str]) -> pa.Schema:
    """Types of the columns `values` over all files, after `text`, columns that must hold text (keys)."""
    wanted = list(dict.fromkeys([*text, *values]))
    if files[0].format != "parquet":
        return _text_types(files, text, wanted)
    found: list[pa.Schema] = []
    for file in files:
        with file.open() as opened:
            schema = pq.ParquetFile(opened).schema_arrow
        _require(file, schema.names, wanted)
        found.append(pa.schema([_field(file, schema.field(name), name in text) for name in wanted]))
        if found[-1] != found[0]:
            try:
                found = [pa.unify_schemas([found[0], found[-1]], promote_options="permissive")]
            except pa.ArrowException as error:
                raise SourceError(
                    f"the columns of {file.path} do not have the types of {files[0].path} ({error}); make them alike"
                ) from None
    return pa.schema([f if f.type != pa.null() else pa.field(f.name, pa.string()) for f in found[0]])


def _require(file: ListFile, there: Sequence[str], wanted: Sequence[str]) -> None:
    for name in wanted:
        if name not in there:
            raise SourceError(f"{file.path} has no column {name!r}{nearest(name, there)}")
        if there.count(name) > 1:
            raise SourceError(f"{file.path} has {there.count(name)} columns {name!r}; rename all but one")


def _field(file: ListFile, field: pa.Field, is_text: bool) -> pa.Field:
    kind = _plain(field.type)
    if is_text:
        if kind not in (pa.string(), pa.binary(), pa.null()):
            raise SourceError(f"column {field.name!r} of {file.path} is {field.type}, but keys are text; cast it")
        kind = pa.string()
    return pa.field(field.name, kind)


def _plain(kind: pa.DataType) -> pa.DataType:
    """As in base rows, but vectors of floats stay so, of 16 or 32 bits, and what has only NULLs may be anything."""
    storage = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    if pa.types.is_fixed_size_list(storage) and pa.types.is_floating(storage.value_type):
        half = pa.types.is_float16(storage.value_type)
        return pa.list_(pa.float16() if half else pa.float32(), storage.list_size)
    return storage if pa.types.is_null(storage) else plain_type(kind)


def _text_types(files: Sequence[ListFile], text: Sequence[str], wanted: Sequence[str]) -> pa.Schema:
    first: list[list[Any]] = []
    for number, file in enumerate(files):
        there = names_of(file)
        # A key of JSON may be absent from a later file, as it may be from a row; a column of CSV may not.
        if file.format in ("csv", "tsv", "txt") or number == 0:
            _require(file, there, wanted)
        if len(first) < FIRST_BLOCK:
            with file.open() as opened:
                first += islice(text_rows(opened, file.format, list(wanted), file.path), FIRST_BLOCK - len(first))
    kinds = [inferred_type([row[i] for row in first], files[0].format) for i in range(len(wanted))]
    return pa.schema([(n, pa.string() if n in text else k) for n, k in zip(wanted, kinds, strict=True)])


def batches(file: ListFile, schema: pa.Schema) -> Iterator[tuple[pa.RecordBatch, npt.NDArray[np.bool_]]]:
    """The columns of `schema` in its types, and (N,) bool: True where a cell of the row did not fit its type."""
    wanted = schema.names
    with file.open() as opened, reading(file.path):
        if file.format == "parquet":
            parquet = pq.ParquetFile(opened)
            for batch in parquet.iter_batches(BATCH_ROWS, columns=wanted, use_threads=False):
                columns = [_cast(batch.column(batch.schema.get_field_index(f.name)), f.type) for f in schema]
                yield pa.record_batch(columns, schema=schema), np.zeros(len(batch), bool)
            return
        rows = text_rows(opened, file.format, wanted, file.path)
        while block := list(islice(rows, BATCH_ROWS)):
            cells = list(zip(*block, strict=True))
            columns = [converted(list(c), f.type) for c, f in zip(cells, schema, strict=True)]
            bad = np.zeros(len(block), bool)
            for given, column in zip(cells, columns, strict=True):
                if column.null_count:
                    bad |= np.array([c is not None for c in given]) & column.is_null().to_numpy(zero_copy_only=False)
            yield pa.record_batch(columns, schema=schema), bad


def _cast(column: pa.Array, kind: pa.DataType) -> pa.Array:
    if pa.types.is_fixed_size_list(kind):
        storage = column.storage if isinstance(column, pa.ExtensionArray) else column
        return storage.cast(kind, safe=False)
    return plain_column(column, kind)
