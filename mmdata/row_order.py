"""The order in which a group visits rows, without holding them: sorted by DuckDB, which spills into scratch.

In: the rows a part at a time and the `prefer` terms. Out: their positions in that order. Fails: RecipeError for what
`filters.FilterEngine.order` refuses, StoreError when scratch is full.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mmdata.errors import MmdataError, StoreError
from mmdata.filters import CheckedExpression, order_error, ordering
from mmdata.sealed_duckdb import connect, rows_of

__all__ = ["order_of_parts"]

_BATCH = 1 << 17


def order_of_parts(
    parts: Iterator[pa.Table], terms: Sequence[CheckedExpression], scratch: Path, into: npt.NDArray[np.int64]
) -> None:
    """Write positions into `into`, (N,), in the order of the terms; ties by column `row_id`, ascending.

    `parts` are the N rows, at least one part, with row_id and the columns that the terms read.
    """
    read, position, query = ordering(terms)
    failed: list[MmdataError] = []  # DuckDB tells of it in words only

    def batches() -> Iterator[pa.RecordBatch]:
        first = 0
        try:
            for part in chain([head], parts):
                numbers = pa.array(np.arange(first, first + len(part)))
                first += len(part)
                yield from part.select(read).append_column(position, numbers).to_batches()
        except MmdataError as error:
            failed.append(error)
            raise

    head = next(parts)
    schema = head.schema.empty_table().select(read).append_column(position, pa.array([], pa.int64())).schema
    written = 0
    with connect(scratch) as connection, rows_of(connection, pa.RecordBatchReader.from_batches(schema, batches())):
        try:
            for batch in connection.sql(query).to_arrow_reader(_BATCH):
                into[written : written + len(batch)] = batch.column(0).to_numpy()
                written += len(batch)
        except (duckdb.Error, pa.ArrowException, OSError) as error:
            if failed:
                raise failed[0] from None
            if isinstance(error, duckdb.ProgrammingError | duckdb.DataError):
                raise order_error(terms, error) from None
            raise StoreError(f"cannot sort rows in scratch at {scratch}: {error}") from error
    if written != len(into):
        raise StoreError(f"{written} of {len(into)} rows were sorted; files changed meanwhile, run again")
