"""DuckDB views over a dataset: `samples`, `rows`, `hosts`, `verdicts`, `runs` and `columns."<set>"`.

Column sets are stitched to the rows by position, over the explicit file lists of `current.json`: every file of a set
has the rows of its shard in the same order, which the run proved row by row when it wrote them. The selection records
the size and the stamp of each file. Here they are compared with a listing once per connection, and where they differ
the footer is read, so that a torn file or one of another shard is an error and never a wrong answer. Reading by
position lets DuckDB leave out the sets that a question does not touch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import duckdb
import pyarrow as pa

from mmdata.base_rows import rows_differ
from mmdata.columns import ROWS_PER_SHARD_BITS
from mmdata.errors import StoreError
from mmdata.host_summary import HOSTS_SQL
from mmdata.numbered_files import stamps_of
from mmdata.selections import Current, CurrentStep
from mmdata.store import Store

__all__ = ["connect", "quote", "require_rows", "run_records", "samples_sql"]


def quote(name: str) -> str:
    """An SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def _files(store: Store, names: Sequence[str]) -> str:
    paths = ", ".join("'" + store.path_for_duckdb(n).replace("'", "''") + "'" for n in names)
    return f"read_parquet([{paths}])"


def _rows_files(store: Store, names: Sequence[str]) -> str:
    """Base rows as a table function: where appended sources brought further columns, these are NULL in older shards."""
    found = _files(store, names)
    return f"{found[:-1]}, union_by_name = true)" if rows_differ(store) else found


def connect(store: Store, current: Current) -> duckdb.DuckDBPyConnection:
    """A connection with the views of what readers see now; StoreError when a file does not hold its shard's rows."""
    connection = duckdb.connect(":memory:")
    connection.execute("SET enable_progress_bar = false")
    connection.execute("SET parquet_metadata_cache = true")  # every question opens every file of the shards
    if not store.is_local:
        connection.register_filesystem(store.fs)
    _require_same_rows(connection, store, current)
    connection.execute(f"CREATE VIEW rows AS SELECT * FROM {_rows_files(store, current.rows)}")
    connection.execute(f"CREATE VIEW verdicts AS SELECT * FROM {_files(store, current.verdicts)}")
    connection.execute("CREATE SCHEMA columns")
    for name, files in current.sets.items():
        connection.execute(f"CREATE VIEW columns.{quote(name)} AS SELECT * FROM {_files(store, files)}")
    connection.execute(f"CREATE VIEW samples AS {samples_sql(store, current)}")
    connection.execute(f"CREATE VIEW hosts AS {HOSTS_SQL}")
    # As text: making an Arrow table out of Python values would load pandas, which takes longer than most questions.
    read = f"SELECT unnest(from_json(?, '{json.dumps([_RUNS])}')) AS run"
    connection.execute(f"CREATE TABLE run_records AS {read}", [json.dumps(run_records(store))])
    connection.execute("CREATE VIEW runs AS SELECT run.* FROM run_records")
    return connection


def _require_same_rows(connection: duckdb.DuckDBPyConnection, store: Store, current: Current) -> None:
    """Every file is the one that the run proved, or at least has the rows of its shard, from the first to the last.

    A file with the recorded size and stamp is that file. One with another stamp (of a copied dataset, or put in its
    place) has to show in its footer as many rows as its shard, with the smallest and largest row_id; another size is
    another file. That the order in a file is that of its shard was proved when it was written.
    """
    for what, shown in (("rows", "base rows"), ("verdicts", "verdicts"), *((n, n) for n in current.set_names)):
        listed = current.listed(what)
        store.expect(listed.names)
        doubtful, resized = [], set()
        stamps = stamps_of(store, listed.names, whole_folders=True)
        for place, (name, found, size, stamp) in enumerate(
            zip(listed.names, stamps, listed.sizes, listed.stamps, strict=True)
        ):
            if found is None:
                raise StoreError(f"{store.url}: a file of {shown} is missing or torn ({name} is not there)")
            if found != (size, stamp):
                doubtful.append(place)
                if found[0] != size:
                    resized.add(place)
        if doubtful:
            extents = _extents(connection, store, shown, [listed.names[place] for place in doubtful])
            for place, extent in zip(doubtful, extents, strict=True):
                _require_extent(store, shown, current.shards[place], current.row_counts[place], extent)
        for place in resized:
            raise StoreError(
                f"{store.url}: {listed.names[place]} is not the file that the run wrote (its size differs); "
                "run the recipe again"
            )


def _require_extent(store: Store, what: str, shard: int, rows: int, extent: _Extent) -> None:
    if extent[0] != rows:
        raise StoreError(
            f"{store.url}: shard {shard:05d} of {what} has {extent[0]} rows where the base rows have {rows}; remove "
            "that file and run the recipe again"
        )
    first = shard << ROWS_PER_SHARD_BITS
    if rows and extent != (rows, first, first + rows - 1):
        raise StoreError(_misplaced(store, what, shard))


_Extent = tuple[int, int | None, int | None]  # rows, smallest row_id, largest row_id


def _extents(connection: duckdb.DuckDBPyConnection, store: Store, what: str, names: Sequence[str]) -> list[_Extent]:
    paths = [store.path_for_duckdb(n) for n in names]
    try:
        found = connection.execute(
            "SELECT file_name, sum(row_group_num_rows), min(stats_min_value::BIGINT), max(stats_max_value::BIGINT) "
            "FROM parquet_metadata($paths) WHERE path_in_schema = 'row_id' GROUP BY 1",
            {"paths": paths},
        ).fetchall()
    except duckdb.Error as error:
        first = str(error).splitlines()[0]
        raise StoreError(f"{store.url}: a file of {what} is missing or torn ({first})") from None
    # DuckDB answers with plain paths: not as it was asked, with glob characters escaped.
    by_path = {store.plain_path(name): (int(rows), least, most) for name, rows, least, most in found}
    return [by_path.get(f"{store.root}/{name}", (0, None, None)) for name in names]  # no row groups without rows


def _misplaced(store: Store, what: str, shard: int) -> str:
    return (
        f"{store.url}: shard {shard:05d} of {what} holds other rows than the base rows (row_id differs); "
        "remove that file and run the recipe again"
    )


def require_rows(store: Store, what: str, shard: int, base: pa.ChunkedArray, found: pa.ChunkedArray) -> None:
    """StoreError unless a file of `what` has the row_ids of the base rows of its shard, in the same order."""
    if not base.equals(found):
        raise StoreError(_misplaced(store, what, shard))


def samples_sql(store: Store, current: Current) -> str:
    """The text of the `samples` view: base columns, verdict, then each step's columns where the row reached it."""
    aliases = {name: f"s{i}" for i, name in enumerate(current.sets)}
    chosen = ["r.*", "v.verdict", "v.step", "v.step_name", "v.reason"]
    for step in current.steps:
        if step.set_name:
            chosen += _step_columns(step, aliases[step.set_name])
    joins = "".join(
        f"\nPOSITIONAL JOIN {_files(store, current.sets[name])} AS {alias}" for name, alias in aliases.items()
    )
    listed = ",\n  ".join(chosen)
    return (
        f"SELECT {listed}\nFROM {_rows_files(store, current.rows)} AS r\n"
        f"POSITIONAL JOIN {_files(store, current.verdicts)} AS v{joins}"
    )


def _step_columns(step: CurrentStep, alias: str) -> list[str]:
    reached = f"(v.step IS NULL OR v.step >= {step.position})"
    columns = [
        f"CASE WHEN {reached} THEN {alias}.{quote(own)} END AS {quote(visible)}" for own, visible in step.outputs
    ]
    columns.append(f"CASE WHEN {reached} THEN {alias}.reason ELSE 'gated' END AS {quote(step.reason_column)}")
    return columns


# As DuckDB's from_json takes it: column → type.
_RUNS = {
    "run": "VARCHAR",
    "status": "VARCHAR",
    "started": "VARCHAR",
    "seconds": "DOUBLE",
    "runner": "VARCHAR",
    "media_reads": "BIGINT",
    "ingest_seconds": "DOUBLE",
    "steps": [{"name": "VARCHAR", "set": "VARCHAR", "computed": "BIGINT", "seconds": "DOUBLE"}],
}


def run_records(store: Store) -> list[dict[str, Any]]:
    """Every `runs/*.json`, oldest first, with the fields of the `runs` view."""
    found = []
    for name in store.list("runs"):
        try:
            document = json.loads(store.read(f"runs/{name}"))
        except ValueError as error:
            raise StoreError(f"runs/{name} of {store.url} is damaged ({error}); remove it") from None
        steps = [{k: s.get(k) for k in ("name", "set", "computed", "seconds")} for s in document.get("steps", [])]
        found.append({**{name: document.get(name) for name in _RUNS}, "steps": steps})
    return found
