"""Base rows of a dataset that has grown: an appended source may bring extra columns that earlier shards do not have.

In: a rows file and the columns wanted. Out: the table, with NULL of the right type where the file is older than the
column. Types are those that `dataset.json` keeps for every source. StoreError where a column is of no source.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence

import pyarrow as pa

from mmdata.columns import MEDIA_ROLES, base_schema, media_reference
from mmdata.store import Store

__all__ = ["extra_columns", "read_base", "rows_differ", "with_extras"]

_OWN = frozenset(base_schema().names)


def _schemas(store: Store) -> list[pa.Schema]:
    """The extra columns of every source, in order."""
    data = store.read_if_there("dataset.json")
    sources = json.loads(data)["sources"] if data is not None else []
    encoded = [s["schema"] for s in sources if s.get("schema")]
    return [pa.ipc.read_schema(pa.py_buffer(base64.b64decode(e))) for e in encoded]


def extra_columns(store: Store) -> pa.Schema:
    """The extra columns of all sources together."""
    found = {f.name: f for schema in _schemas(store) for f in schema}
    return pa.schema(list(found.values()))


def rows_differ(store: Store) -> bool:
    """Whether some shards may lack columns that others have: sources were appended with further columns."""
    return len({tuple(schema.names) for schema in _schemas(store)}) > 1


def read_base(store: Store, name: str, columns: Sequence[str]) -> pa.Table:
    """These columns of a rows file, in this order; an extra column that it does not have is NULL throughout."""
    wanted = list(columns)
    if _OWN.issuperset(wanted):
        return store.read_table(name, wanted)
    there = store.column_names(name)
    absent = [c for c in wanted if c not in there]
    types = extra_columns(store) if absent else pa.schema([])
    if not absent or any(c not in types.names for c in absent):
        return store.read_table(name, wanted)
    table = store.read_table(name, [c for c in wanted if c in there] or ["row_id"])
    filled = {c: pa.nulls(len(table), types.field(c).type) for c in absent}
    return pa.table({c: filled[c] if c in filled else table.column(c) for c in wanted})


def with_extras(table: pa.Table, extra: pa.Schema) -> pa.Table:
    """A whole rows file with every extra column of the dataset, in the order of base rows."""
    absent = [f for f in extra if f.name not in table.column_names]
    if not absent:
        return table
    for field in absent:
        table = table.append_column(field, pa.nulls(len(table), field.type))
    own = base_schema(extra, ()).names
    places = {name: place for place, name in enumerate(own)}
    places |= {c.name: len(own) + 1 for role in MEDIA_ROLES for c in media_reference(role)}
    # What is neither, a further hash of fetching, stands between them.
    return table.select(sorted(table.column_names, key=lambda name: places.get(name, len(own))))
