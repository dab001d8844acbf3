"""The operator `attach`: columns of given files, joined to the rows by a key."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from mmdata.errors import SourceError
from mmdata.joins.given import Given, open_given
from mmdata.joins.given_rows import GivenRows
from mmdata.joins.keys import JoinColumn, KeyIndex, keys_of
from mmdata.stage import Contract, FilePath, Lookup, Options, Weights

__all__ = ["Attach", "AttachOptions"]

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class AttachOptions(Options):
    """Which files, joined on what, and which of their columns become columns of the dataset."""

    path: FilePath = Field(
        min_length=1, description="Parquet, CSV, TSV, JSON lines, .npz or .npy: a file, folder, glob or fsspec URL"
    )
    on: JoinColumn = Field("uid", description="the column of the rows that is looked up in the file")
    key_column: str | None = Field(None, description="the file's column with that key; null = it is called like `on`")
    columns: dict[str, str] | tuple[str, ...] = Field(
        min_length=1, description="new name → column of the file, or a list of columns that keep their names"
    )
    ids: FilePath | None = Field(
        None, description="for .npy and .npz: the file with the key of each row (text a line, Parquet, CSV, .npy)"
    )
    duplicates: Literal["refuse", "first"] = Field(
        "refuse", description="when a key stands in several rows of the file; first: its first row counts"
    )
    format: Literal["auto", "csv", "tsv", "json", "jsonl", "parquet"] = Field(
        "auto", description="format of tables; auto: told by their extension"
    )

    @field_validator("columns")
    @classmethod
    def _as_mapping(cls, given: Any) -> dict[str, str]:
        """New name → the file's, by name, so that one choice of columns has one identity however it is written."""
        columns = dict(given) if isinstance(given, Mapping) else {name: name for name in given}
        if len(columns) != len(given):
            raise ValueError("a column is named twice")
        for new in columns:
            if not _NAME.fullmatch(new) or new.lower() in ("row_id", "reason"):
                raise ValueError(
                    f"{new!r} cannot be a column's name; write `columns: {{a_new_name: {columns[new]!r}}}`"
                )
        return dict(sorted(columns.items()))

    @property
    def chosen(self) -> dict[str, str]:
        """New name → the file's name, sorted."""
        return dict(self.columns)  # type: ignore[arg-type]  # a mapping since the check

    def given(self) -> Given:
        """The files, opened as far as `plan` looks."""
        path, ids = os.path.expanduser(self.path), self.ids and os.path.expanduser(self.ids)
        return open_given(path, self.on, self.key_column, self.chosen, ids, self.format)


class Attach(Lookup[AttachOptions]):
    """Columns of given files (scores, metadata, embeddings), joined on uid, url, key or sha256.

    Reads the key. Writes the columns named, in the file's types: dictionaries are decoded, single numbers of 16 bits
    become float32, arrays of vectors and fixed-size lists of floats become embeddings of 16 or 32 bits. A table's
    missing columns are looked for in the `.npz` of its name beside it, as DataComp publishes metadata. Many rows may
    have one key; a key that stands in several rows of the file is refused, or its first row counts. NULL without a
    reason where the file has NULL; else with one: `no_key` (the row has none), `unmatched` (the file does not have
    it), `not_finite` (NaN or an infinity), `bad_value` (a cell of a text file that is not of its column's type). As
    for any step, rows with a reason fail unless it says `on_error: keep`; there is no budget of failures unless
    `max_failed` gives one.

    A uid of 32 hex digits and a sha256 match in upper and lower case; URLs and keys match as written. Covers all rows
    of the dataset at once, whatever survives; its identity is the content of the files, not where they lie.

    Source: the layout of DataComp's metadata (mlfoundations/datacomp): `<name>.parquet` with uid and scores, and
    `<name>.npz` with embeddings in the same order.
    """

    name = "attach"
    version = 1

    @classmethod
    def contract(cls, options: AttachOptions) -> Contract:
        """Types come from the files, which must be there."""
        given = options.given()
        writes = pa.schema([(name, given.types[name]) for name in options.chosen])
        files = (Weights("files", f"sha256:{given.fingerprint()}"),)
        return Contract(writes=writes, reads=(options.on,), weights=files)

    @classmethod
    def summary(cls, options: AttachOptions) -> str:
        """How many rows."""
        return f"{options.path}: {options.given().rows():,} rows"

    @classmethod
    def check(cls, options: AttachOptions, folder: Path) -> None:
        """Read every key: SourceError for one in several rows, none at all, and arrays of another length."""
        given = options.given()
        if not len(given.index(folder, options.duplicates)):
            raise SourceError(f"{options.path} has no row with a {given.key or options.on}, so nothing can be attached")

    def open(self, folder: Path) -> None:
        """Index the keys, and make the values readable by row."""
        given = self.options.given()
        self._types = given.types
        self._index: KeyIndex = given.index(folder, self.options.duplicates)
        self._rows = GivenRows(given, folder)

    def compute(self, keys: pa.ChunkedArray) -> pa.Table:
        """The file's values for each key."""
        asked, valid = keys_of(self.options.on, keys)
        found = self._index.find(asked, valid)
        reasons = np.where(valid, "unmatched", "no_key").astype(object)
        matched = found >= 0
        values, why = self._rows.take(found[matched])
        reasons[matched] = why
        # What has a reason has no value in any column.
        places = np.full(len(keys), -1)
        places[matched] = [-1 if reason is not None else place for place, reason in enumerate(why)]
        if values.num_rows == 0:
            columns = [pa.nulls(len(keys), values.schema.field(name).type) for name in self._types]
        else:
            taken = values.take(pa.array(places, mask=places < 0))
            columns = [taken.column(name) for name in self._types]
        return pa.table([*columns, pa.array(reasons.tolist(), pa.string())], names=[*self._types, "reason"])
