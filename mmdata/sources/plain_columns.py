"""Columns of other people's Parquet and Arrow files in the few types that every reader of a dataset knows."""

from __future__ import annotations

import pyarrow as pa

from mmdata.columns import RESERVED_NAMES
from mmdata.errors import SourceError

__all__ = ["check_extra_names", "plain_column", "plain_type", "require_distinct"]


def check_extra_names(names: tuple[str, ...]) -> None:
    """SourceError for an extra column that mmdata uses itself, or that is named twice."""
    seen: set[str] = set()
    for name in names:
        if name.lower() in RESERVED_NAMES:  # SQL does not tell URL from url
            raise SourceError(
                f"source.columns names {name!r}, which mmdata uses itself for a column of every dataset: rename it "
                "in the list, or leave it out"
            )
        if name.lower() in seen:
            raise SourceError(f"source.columns names {name!r} twice (upper and lower case are not told apart)")
        seen.add(name.lower())


def require_distinct(where: str, names: list[str]) -> None:
    """SourceError when two columns of a file have one name: nobody could say which is meant."""
    twice = next((n for i, n in enumerate(names) if n in names[:i]), None)
    if twice is not None:
        raise SourceError(f"{where} has two columns {twice!r}; rename one of them")


def plain_type(type: pa.DataType) -> pa.DataType:
    """The type a column has in the dataset: no dictionaries, views, large or half types, which not all readers know."""
    if pa.types.is_dictionary(type):
        return plain_type(type.value_type)
    if isinstance(type, pa.BaseExtensionType):
        return plain_type(type.storage_type)
    if pa.types.is_large_string(type) or pa.types.is_string_view(type) or pa.types.is_null(type):
        return pa.string()
    if pa.types.is_large_binary(type) or pa.types.is_binary_view(type):
        return pa.binary()
    return pa.float32() if pa.types.is_float16(type) else type


def plain_column(column: pa.Array, type: pa.DataType) -> pa.Array:
    """The column as `type`; bytes that should be text and are not UTF-8 become U+FFFD. Raises what Arrow raises."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not pa.types.is_string(type):
        return column.cast(type)
    if not (pa.types.is_string(column.type) or pa.types.is_binary(column.type)):
        plain = plain_type(column.type)
        column = column.cast(plain if pa.types.is_binary(plain) else type)
    try:
        # Parquet readers do not look whether strings are UTF-8.
        text = column if pa.types.is_string(column.type) else column.cast(pa.string())
        text.validate(full=True)
        return text
    except pa.ArrowInvalid:
        raw = column.cast(pa.binary()).to_pylist()
        return pa.array([None if r is None else r.decode("utf-8", "replace") for r in raw], pa.string())
