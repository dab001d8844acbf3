"""DuckDB for expressions that users write: a connection that reaches nothing but the rows it is given.

In: Arrow rows. Out: a connection in which they have a name, and its errors as one line of text. Fails: Refused for rows
of a type that DuckDB does not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pyarrow as pa

from mmdata.filters_allowed import Refused

__all__ = ["MAX_DEPTH", "ROWS", "TOO_DEEP", "connect", "rows_of", "sentence", "shown"]

MAX_DEPTH = 100  # levels of nesting; chains of AND and OR count as one level
TOO_DEEP = f"is nested too deeply; the limit is {MAX_DEPTH} levels"
ROWS = "mmdata_rows"  # the table in every query
_MEMORY = "200MB"


def connect(spill: Path | None = None) -> duckdb.DuckDBPyConnection:
    """A connection that reaches no file, no network, no extension and no Python variable, in UTC, one thread.

    With `spill`, a folder, it takes some 200 MB of memory and writes what it sorts beyond that there.
    """
    connection = duckdb.connect(
        ":memory:",
        config={
            "threads": 1,
            "enable_external_access": False,
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "python_enable_replacements": False,
            "preserve_insertion_order": True,
            **({} if spill is None else {"temp_directory": str(spill), "memory_limit": _MEMORY}),
        },
    )
    for setting in (f"max_expression_depth = {MAX_DEPTH}", "TimeZone = 'UTC'", "enable_progress_bar = false"):
        connection.execute(f"SET {setting}")
    # Found by the property tests: DuckDB 2.0 computes a common subexpression before the TRY it stands in, so that one
    # bad row of `caption::INT > 1 AND caption::INT < 9` fails them all. As written is fast enough, and right.
    connection.execute("PRAGMA disable_optimizer")
    connection.execute("SET lock_configuration = true")
    return connection


@contextmanager
def rows_of(connection: duckdb.DuckDBPyConnection, table: pa.Table | pa.RecordBatchReader) -> Iterator[str]:
    """The rows under a name that queries of this connection can use."""
    try:
        connection.register(ROWS, table)
    except duckdb.NotImplementedException as error:
        raise Refused(sentence(error)) from None
    try:
        yield ROWS
    finally:
        connection.unregister(ROWS)


def sentence(error: duckdb.Error | str) -> str:
    """What DuckDB complains of, on one line, without its hints and its picture of the query."""
    first = str(error).strip().partition("\n")[0]
    if "expression depth" in first:
        return TOO_DEEP
    return "does not work as SQL: " + re.sub(r"^[A-Z][A-Za-z ]* Error: ", "", first).rstrip(".")[:300]


def shown(text: str) -> str:
    """Quoted, and cut at 80 characters."""
    return repr(text if len(text) <= 80 else text[:77] + "…")
