"""The operator `keep_list`: a filter given as a file of keys."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
from pydantic import Field

from mmdata.joins.keys import IndexBuilder, JoinColumn, KeyIndex, keys_of
from mmdata.joins.lists import KeyList, open_list
from mmdata.stage import Contract, FilePath, Lookup, Options, Weights, parse_schema

__all__ = ["KeepList", "KeepListOptions"]


class KeepListOptions(Options):
    """Where the list is, and which column of the rows it names."""

    path: FilePath = Field(
        min_length=1,
        description="DataComp's subset .npy, text with a key a line, Parquet or CSV; a folder, glob or URL",
    )
    on: JoinColumn = Field("uid", description="the column of the rows that the list holds")
    column: str | None = Field(None, description="the list's column, where it has several; null = called like `on`")

    def listed(self) -> KeyList:
        """The list, looked at."""
        return open_list(self.path, self.on, self.column)


class KeepList(Lookup[KeepListOptions]):
    """Keep the rows whose uid, url, key or sha256 is in a given list: a filter.

    Reads the key. Writes `is_listed`, NULL (reason `no_key`) where the row has no key. Rows that are not in the list
    are dropped with the step's name as the reason, rows without a key with `<name>:null`. The list is DataComp's subset
    file (`.npy` of `u8,u8`: the two halves of a uid), text with a key a line, a `.npy` of text, or a column of Parquet,
    CSV, TSV or JSON lines. A uid of 32 hex digits and a sha256 match in upper and lower case; URLs and keys match as
    written. Its identity is the content of the list, not where it lies.

    Source: DataComp's subset file (mlfoundations/datacomp, `baselines/apply_filter.py`): sorted pairs of the first and
    last 16 hex digits of each uid.
    """

    name = "keep_list"
    version = 1
    is_filter = True

    @classmethod
    def contract(cls, options: KeepListOptions) -> Contract:
        """The list must be there."""
        files = (Weights("list", f"sha256:{options.listed().fingerprint()}"),)
        return Contract(writes=parse_schema("is_listed: bool"), reads=(options.on,), weights=files)

    @classmethod
    def summary(cls, options: KeepListOptions) -> str:
        """How many keys."""
        return f"{options.path}: {options.listed().rows():,} keys"

    @classmethod
    def check(cls, options: KeepListOptions, folder: Path) -> None:
        """Read every key."""
        for _ in options.listed().keys(options.on, folder):
            pass

    def open(self, folder: Path) -> None:
        """Sort the keys."""
        builder = IndexBuilder(folder)
        for keys, valid in self.options.listed().keys(self.options.on, folder):
            builder.add(keys, valid)
        self._index: KeyIndex = builder.finish()

    def compute(self, keys: pa.ChunkedArray) -> pa.Table:
        """TRUE or FALSE for each key, NULL with `no_key` for none."""
        asked, valid = keys_of(self.options.on, keys)
        listed = pa.array(self._index.find(asked, valid) >= 0, mask=~valid)
        reasons = pa.array([None if v else "no_key" for v in valid.tolist()], pa.string())
        return pa.table([listed, reasons], names=["is_listed", "reason"])
