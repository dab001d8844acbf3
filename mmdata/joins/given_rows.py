"""The values of given files, row by number: any rows of what does not fit in memory.

In: a `Given`. Out: its columns for rows in any order. Tables are copied to scratch as an Arrow file that is mapped,
arrays are mapped from where they lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mmdata.joins.arrays import as_arrow
from mmdata.joins.given import Given, Part
from mmdata.joins.tables import batches
from mmdata.sources.list_files import ListFile

__all__ = ["GivenRows"]

_BAD = "\\0bad"  # a name that no column has


class GivenRows:
    """The values of all rows of some files; anything that is not mapped from where it lies is put into `folder`."""

    def __init__(self, given: Given, folder: Path) -> None:
        self._given = given
        self._arrays = {
            name: [part.arrays[place].mapped(folder) for part in given.parts] for place, name in enumerate(given.arrays)
        }
        self._starts = [0]
        self._batches: list[pa.RecordBatch] = []
        if given.table:
            self._stage(folder / "table.arrow")
        lengths = [[len(a) for a in arrays] for arrays in self._arrays.values()]
        self._array_starts = np.cumsum([0, *(lengths[0] if lengths else [])])

    def _stage(self, path: Path) -> None:
        """The table's columns as an Arrow file, of which any batch is read alone."""
        given = self._given
        read = pa.schema([(source, given.types[name]) for name, source in given.table.items()])
        fields = [(name, given.types[name]) for name in given.table]
        schema = pa.schema([*fields, (_BAD, pa.bool_())])
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for part in given.parts:
                for batch, bad in batches(_table_of(part), read):
                    writer.write_batch(pa.record_batch([*batch.columns, pa.array(bad)], schema=schema))
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._starts = np.cumsum([0, *(len(b) for b in self._batches)]).tolist()

    def take(self, rows: npt.NDArray[np.int64]) -> tuple[pa.Table, npt.NDArray[np.object_]]:
        """The columns for these rows, in their order, and per row why it has none: None, `bad_value`, `not_finite`."""
        order = np.argsort(rows, kind="stable")
        back = np.empty(len(rows), np.int64)
        back[order] = np.arange(len(rows))
        ascending = rows[order]
        found: dict[str, Any] = {}
        reasons = np.full(len(rows), None, object)
        if self._given.table:
            table = self._from_table(ascending)
            found |= {name: table.column(name) for name in self._given.table}
            reasons[table.column(_BAD).to_numpy(zero_copy_only=False).astype(bool)] = "bad_value"
        for name, arrays in self._arrays.items():
            values = _gathered(arrays, self._array_starts, ascending)
            found[name], endless = as_arrow(values, self._given.types[name])
            reasons[endless] = "not_finite"
        for name in self._given.table:
            reasons[_not_finite(found[name])] = "not_finite"
        taken = pa.table({name: found[name] for name in self._given.types}).take(pa.array(back))
        return taken, reasons[back]

    def _from_table(self, rows: npt.NDArray[np.int64]) -> pa.Table:
        """For rows in ascending order; each batch they touch is read once."""
        edges = np.searchsorted(rows, self._starts)
        parts = [
            batch.take(pa.array(rows[edges[i] : edges[i + 1]] - self._starts[i]))
            for i, batch in enumerate(self._batches)
            if edges[i] < edges[i + 1]
        ]
        return pa.Table.from_batches(parts) if parts else pa.Table.from_batches([], self._empty())

    def _empty(self) -> pa.Schema:
        return pa.schema([*((name, self._given.types[name]) for name in self._given.table), (_BAD, pa.bool_())])


def _table_of(part: Part) -> ListFile:
    assert part.table is not None
    return part.table


def _gathered(
    arrays: Sequence[npt.NDArray[Any]], starts: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]
) -> npt.NDArray[Any]:
    edges = np.searchsorted(rows, starts)
    parts = [a[rows[edges[i] : edges[i + 1]] - starts[i]] for i, a in enumerate(arrays)]
    return np.concatenate(parts) if len(parts) > 1 else np.asarray(parts[0])


def _not_finite(column: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    """Rows with NaN or an infinity, also within a vector."""
    if pa.types.is_floating(column.type):
        finite = pc.fill_null(pc.is_finite(column), True)
        return ~np.asarray(finite.to_numpy(zero_copy_only=False), bool)
    if not pa.types.is_fixed_size_list(column.type) or not pa.types.is_floating(column.type.value_type):
        return np.zeros(len(column), bool)
    found = []
    for chunk in column.chunks:
        flat = pc.fill_null(chunk.flatten(), 0).to_numpy(zero_copy_only=False)  # of the rows that are not NULL
        marks = np.zeros(len(chunk), bool)
        there = ~chunk.is_null().to_numpy(zero_copy_only=False)
        marks[there] = ~np.isfinite(flat.reshape(-1, column.type.list_size)).all(axis=1)
        found.append(marks)
    return np.concatenate(found) if found else np.zeros(0, bool)
