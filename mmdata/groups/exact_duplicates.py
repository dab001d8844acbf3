"""Rows that are equal in one or several columns."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from mmdata.errors import RecipeError
from mmdata.groups.clusters import VisitOrder, cluster_columns, cluster_remark, cluster_schema, older_columns
from mmdata.stage import (
    ColumnName,
    Columns,
    Contract,
    DatasetPath,
    Group,
    OlderRows,
    parse_schema,
)

__all__ = ["ExactDuplicates", "ExactDuplicatesOptions"]


class ExactDuplicatesOptions(VisitOrder):
    """What makes two rows the same, and which of them comes first."""

    of: list[ColumnName] = Field(["sha256"], min_length=1, description="columns that must all be equal")
    against: list[DatasetPath] = Field(
        [], description="older dataset folders (`pets`, or `pets#strict` for a selection): their kept rows come first"
    )


class ExactDuplicates(Group[ExactDuplicatesOptions]):
    """Clusters of rows whose values are equal in every column of `of`, byte for byte.

    Reads key and the columns named: `[sha256]` (the same file; the default), `[url]`, `[caption]`, `[url, caption]`, …
    Rows are visited in the order of `prefer`, ties by row_id. Writes `exact_duplicates_id` (row_id of the cluster's
    first row), `exact_duplicates_rank` (from 1, in visit order), `exact_duplicates_count` (rows in the cluster),
    `exact_duplicates_of` (key of the cluster's first row, its own for that row). Never NULL: a row with a NULL in a
    column of `of` equals no other row and has its own id, rank 1 and count 1. Keep one of each by filtering for
    `exact_duplicates_rank = 1`.

    With `against`, the kept rows of other datasets come first, in the order given, then in row order. A row that
    equals one follows the first such row from rank 2 on, and the columns name that row: its row_id and key there, and
    in `exact_duplicates_against` the dataset as the option names it, NULL for a cluster of this dataset alone. The
    count is that row and the rows of this dataset. Base columns are compared by name; a column that a step made must
    be the same set there: same operator, version, options.

    Source: LAION-400M keys on url and caption, LAION-5B on url, COYO-700M on pHash and caption; here the key is named.
    """

    name = "exact_duplicates"
    version = 1
    label = "exact_duplicates"

    @classmethod
    def contract(cls, options: ExactDuplicatesOptions) -> Contract:
        """Reads key and the columns that the options name."""
        writes = parse_schema(cluster_schema(cls.label, bool(options.against)))
        return Contract(writes=writes, reads=tuple(dict.fromkeys(["key", *options.of])))

    @classmethod
    def check_types(cls, options: ExactDuplicatesOptions, schema: pa.Schema) -> None:
        """RecipeError for a column whose type has no equality (lists)."""
        super().check_types(options, schema)
        for name in options.of:
            _codes(pa.table({name: pa.array([], schema.field(name).type)}), name)

    def compute(self, rows: pa.Table) -> Columns:
        """One cluster per distinct value; RecipeError for a column whose type has no equality (lists)."""
        columns = cluster_columns(self.label, rows, self._first(rows))
        self.remark = cluster_remark(self.label, columns)
        return columns

    def compute_against(self, rows: pa.Table, older: OlderRows) -> Columns:
        """As `compute`; of the older rows only those are held whose every value occurs here."""
        of = self.options.of
        here = {name: _unique(rows, name) for name in of}
        found = []
        for part in older.parts():
            known = np.ones(len(part), bool)
            for name in of:
                _require_type(name, rows.schema.field(name).type, part.schema.field(name).type)
                known &= np.asarray(pc.is_in(part.column(name), here[name], skip_nulls=True))
            found.append(part.filter(pa.array(known)).select(["place", *of]))
        theirs = pa.concat_tables(found) if found else rows.slice(0, 0).select(of).append_column("place", _NO_PLACES)
        first = self._first(pa.concat_tables([theirs.select(of), rows.select(of)]))[len(theirs) :]
        is_older = first < len(theirs)
        places = np.full(len(rows), -1)
        places[is_older] = theirs.column("place").to_numpy()[first[is_older]]
        columns = older_columns(self.label, rows, np.maximum(first - len(theirs), 0), places, older)
        self.remark = cluster_remark(self.label, columns)
        return columns

    def _first(self, rows: pa.Table) -> npt.NDArray[np.int64]:
        """Per row the position of the first row that is equal to it, its own when a value is NULL."""
        codes = np.zeros(len(rows), np.int64)
        missing = np.zeros(len(rows), bool)
        for name in self.options.of:
            column_codes, column_missing = _codes(rows, name)
            codes = _dense(codes * (int(column_codes.max(initial=0)) + 1) + column_codes)
            missing |= column_missing
        first = np.arange(len(rows))
        present = np.flatnonzero(~missing)
        first[present] = present[_first_of_each(codes[present])]
        return first


_NO_PLACES = pa.chunked_array([pa.array([], pa.int64())])


def _unique(rows: pa.Table, name: str) -> pa.Array:
    try:
        return pc.unique(rows.column(name)).drop_null()
    except pa.ArrowNotImplementedError:
        raise _no_equality(rows, name) from None


def _require_type(name: str, here: pa.DataType, there: pa.DataType) -> None:
    if here != there:
        raise RecipeError(f"exact_duplicates: column {name!r} is {there} in a dataset of `against`, and {here} here")


def _no_equality(rows: pa.Table, name: str) -> RecipeError:
    kind = rows.column(name).type
    return RecipeError(
        f"exact_duplicates: column {name!r} is of type {kind} and cannot be compared; name text or numbers"
    )


def _codes(rows: pa.Table, name: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Per row a number that is the same for equal values (0 for NULL), and whether the value is NULL."""
    column = rows.column(name)
    try:
        encoded = column.dictionary_encode()
    except pa.ArrowNotImplementedError:
        raise _no_equality(rows, name) from None
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
