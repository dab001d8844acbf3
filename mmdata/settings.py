"""What a recipe may say about reading and writing the outside: the options of export."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Literal

from pydantic import Field, field_validator

from mmdata.stage import Options

__all__ = ["ExportOptions", "parse_size"]

DEFAULT_SHARD_ROWS = 10_000
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    f"{p}IB": 1 << (10 * i) for i, p in enumerate("KMGT", 1)
}


def parse_size(text: str | int) -> int:
    """Bytes from `1GB` (10^9), `512MiB` (2^20) or a plain number; ValueError when it is neither, or zero."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(text).strip())
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"cannot read the size {text!r}; expected a number and a unit, such as 1GB or 512MiB")
    size = int(Decimal(match[1]) * _UNITS[match[2].upper()])
    if size < 1:
        raise ValueError(f"the size {text!r} is not above zero")
    return size


class ExportOptions(Options):
    """What to write, and where."""

    format: Literal["webdataset", "parquet"] = Field(
        "webdataset", description="webdataset: img2dataset's tars with a Parquet beside each; parquet: images inside"
    )
    path: str = Field(min_length=1, description="folder to write, relative to the current directory")
    shard_size: str | int | None = Field(
        None, description="largest shard, such as 1GB or 512MiB, in bytes of the tar (parquet: uncompressed)"
    )
    shard_rows: int | None = Field(
        None, ge=1, description="most samples of a shard; 10,000 when shard_size is not given either"
    )
    columns: tuple[str, ...] | None = Field(
        None, description="columns beside img2dataset's own; default: the source's extra columns and every step's"
    )
    json_nulls: bool = Field(
        False, description="write columns that hold NULLs into the .json too, as img2dataset does; some readers fail"
    )
    include_media: bool = Field(True, description="parquet: hold the images; false writes the columns only")
    row_group_bytes: str | int = Field("64MB", description="parquet: largest row group, uncompressed")

    @field_validator("shard_size", "row_group_bytes")
    @classmethod
    def _is_size(cls, value: str | int | None) -> str | int | None:
        if value is not None:
            parse_size(value)
        return value

    @property
    def max_bytes(self) -> int | None:
        """`shard_size` in bytes; None = no bound."""
        return None if self.shard_size is None else parse_size(self.shard_size)

    @property
    def max_rows(self) -> int | None:
        """Most samples of a shard; None = no bound."""
        return self.shard_rows or (DEFAULT_SHARD_ROWS if self.shard_size is None else None)

    @property
    def max_group_bytes(self) -> int:
        """`row_group_bytes` in bytes."""
        return parse_size(self.row_group_bytes)
