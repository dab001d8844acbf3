"""The columns of one set for one shard while its rows are being computed.

In: what is committed for the shard, then one result per row as it comes. Out: a table as a column file holds it, and,
meanwhile, the values for the steps that read them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mmdata.column_files import UNCOVERED
from mmdata.columns import vector_rows
from mmdata.isolate import RowResult
from mmdata.stage import Failed
from mmdata.survivors import COMPUTED, PERMANENT, TRANSIENT, BoundStep, Committed, ShardView

__all__ = ["ColumnBuffer"]


class ColumnBuffer:
    """The columns of one set for one shard while rows are being computed; starts from what is committed."""

    def __init__(self, view: ShardView, bound: BoundStep) -> None:
        contract = bound.step.contract
        assert contract is not None
        before = view.columns(bound.set_name)
        assert isinstance(before, Committed)
        self.bound = bound
        self.changed = False
        self.committed = before.is_there
        self.codes = before.codes.copy()
        self._before = before
        self._row_ids = view.row_ids
        self._schema = contract.writes
        self._values: dict[str, list[Any]] = {}
        self._reasons: list[str | None] = []

    def _load(self) -> None:
        if not self._reasons:
            schema, rows, before = self._schema, len(self._row_ids), self._before
            self._values = {f.name: _rows(before.column(f.name)) if before.is_there else [None] * rows for f in schema}
            self._reasons = before.column("reason").to_pylist() if before.is_there else [UNCOVERED] * rows

    def put(self, row: int, result: RowResult) -> None:
        """What was computed for the row at this index."""
        self._load()
        self.changed = True
        if isinstance(result, Failed):
            self._reasons[row] = result.reason
            self.codes[row] = TRANSIENT if result.transient else PERMANENT
            for values in self._values.values():
                values[row] = None
            return
        self._reasons[row], self.codes[row] = None, COMPUTED
        for name, values in self._values.items():
            values[row] = result[name]

    def take(self, own: str, rows: npt.NDArray[np.int64]) -> pa.Array | pa.ChunkedArray:
        """See `survivors.Columns`."""
        if self._before.is_there and not self._reasons:
            return self._before.take(own, rows)
        self._load()
        if own == "reason":
            return pa.array(self.reasons(rows).tolist(), pa.string())
        values = self._values[own]
        return pa.array([values[r] for r in rows.tolist()], self._schema.field(own).type)

    def reasons(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.object_]:
        """See `survivors.Columns`."""
        self._load()
        return np.array([self._reasons[r] for r in rows.tolist()], object)

    def table(self) -> pa.Table:
        """As a column file holds it."""
        self._load()
        columns = [pa.array(self._values[f.name], f.type) for f in self._schema]
        names = ["row_id", *self._schema.names, "reason"]
        return pa.table([pa.array(self._row_ids), *columns, pa.array(self._reasons, pa.string())], names)


def _rows(column: pa.ChunkedArray) -> list[Any]:
    return vector_rows(column) if pa.types.is_fixed_size_list(column.type) else list(column.to_pylist())
