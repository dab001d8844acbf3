"""Rows that are equal in one or several columns."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from mmdata.errors import RecipeError
from mmdata.groups.clusters import cluster_columns
from mmdata.stage import ColumnName, Columns, Contract, Group, Options, OrderBy, parse_schema

__all__ = ["ExactDuplicates", "ExactDuplicatesOptions"]


class ExactDuplicatesOptions(Options):
    """What makes two rows the same, and which of them comes first."""

    of: list[ColumnName] = Field(["sha256"], min_length=1, description="columns that must all be equal")
    prefer: list[OrderBy] = Field([], description="SQL ordering terms: the first row of a cluster has rank 1")


class ExactDuplicates(Group[ExactDuplicatesOptions]):
    """Clusters of rows whose values are equal in every column of `of`, byte for byte.

    Reads key and the columns named: `[sha256]` (the same file; the default), `[url]`, `[caption]`, `[url, caption]`, …
    Rows are visited in the order of `prefer`, ties by row_id. Writes `exact_duplicates_id` (row_id of the cluster's
    first row), `exact_duplicates_rank` (from 1, in visit order), `exact_duplicates_count` (rows in the cluster),
    `exact_duplicates_of` (key of the cluster's first row, its own for that row). Never NULL: a row with a NULL in a
    column of `of` equals no other row and has its own id, rank 1 and count 1. Keep one of each by filtering for
    `exact_duplicates_rank = 1`.

    Source: LAION-400M keys on url and caption, LAION-5B on url, COYO-700M on pHash and caption; here the key is named.
    """

    name = "exact_duplicates"
    version = 1
    label = "exact_duplicates"

    @classmethod
    def contract(cls, options: ExactDuplicatesOptions) -> Contract:
        """Reads key and the columns that the options name."""
        writes = parse_schema(
            "exact_duplicates_id: int64, exact_duplicates_rank: int32, exact_duplicates_count: int64, "
            "exact_duplicates_of: string"
        )
        return Contract(writes=writes, reads=tuple(dict.fromkeys(["key", *options.of])))

    def compute(self, rows: pa.Table) -> Columns:
        """One cluster per distinct value; RecipeError for a column whose type has no equality (lists)."""
        codes = np.zeros(len(rows), np.int64)
        missing = np.zeros(len(rows), bool)
        for name in self.options.of:
            column_codes, column_missing = _codes(rows, name)
            codes = _dense(codes * (int(column_codes.max(initial=0)) + 1) + column_codes)
            missing |= column_missing
        first = np.arange(len(rows))
        present = np.flatnonzero(~missing)
        first[present] = present[_first_of_each(codes[present])]
        return cluster_columns(self.label, rows, first)


def _codes(rows: pa.Table, name: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Per row a number that is the same for equal values (0 for NULL), and whether the value is NULL."""
    column = rows.column(name)
    try:
        encoded = column.dictionary_encode()
    except pa.ArrowNotImplementedError:
        raise RecipeError(
            f"exact_duplicates: column {name!r} is of type {column.type} and cannot be compared; name text or numbers"
        ) from None
    chunks = [np.asarray(c.indices.fill_null(0), np.int64) for c in encoded.chunks]
    codes = np.concatenate(chunks) if chunks else np.zeros(0, np.int64)
    return codes, np.asarray(column.is_null())


def _dense(codes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The same partition with numbers below N, so that products of codes cannot overflow."""
    return np.unique(codes, return_inverse=True)[1].astype(np.int64)


def _first_of_each(codes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Per row the position of the first row with the same code."""
    _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    return first[inverse].astype(np.int64)
