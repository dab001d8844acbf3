"""One group over the whole dataset: the surviving rows of every shard in, one column file a shard out.

The group's identity holds the digest of the rows it saw, so any change of the set, larger or smaller, is a new column
set. The rows' inputs are held in memory at once (their columns only, never media).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mmdata.column_files import UNCOVERED, ColumnFile, ColumnFooter, canonical_json, publish_columns
from mmdata.errors import ContractError, MmdataError, StoreError
from mmdata.filters import FilterEngine
from mmdata.isolate import RowResult, checked_columns
from mmdata.plan import PlannedStep, Resolved, identity
from mmdata.stage import Failed, Group
from mmdata.store import Store
from mmdata.survivors import BoundStep, ShardView, input_coverage, rows_digest, walk

__all__ = ["GroupJob"]


class GroupJob:
    """A group bound to the rows that survive to it; `bound` names its column set once `survey` has run."""

    def __init__(
        self,
        store: Store,
        before: Sequence[BoundStep],
        step: PlannedStep,
        rows_files: Mapping[int, str],
        files: Mapping[str, Mapping[int, ColumnFile]],
        engine: FilterEngine,
    ) -> None:
        self._store, self._before, self._step, self._engine = store, before, step, engine
        self._rows_files, self._files = rows_files, files
        self._sets = {b.step.position: b.set_name for b in before if b.set_name}
        self._alive: dict[int, npt.NDArray[np.int64]] = {}
        self._row_ids: dict[int, npt.NDArray[np.int64]] = {}
        self.rows = 0

    def _view(self, shard: int) -> ShardView:
        there = {name: found[shard] for name, found in self._files.items() if shard in found}
        return ShardView(self._store, shard, self._rows_files[shard], self._sets, there)

    def survey(self) -> BoundStep:
        """Walk every shard to find the survivors, and give the column set its identity."""
        parts = []
        for shard in sorted(self._rows_files):
            view = self._view(shard)
            state = walk(view, self._before, self._engine)
            if state.missing:
                raise StoreError(
                    f"shard {shard}: step {min(state.missing)}, which {self._step.name} waits for, is not complete; "
                    "run the recipe again"
                )
            alive = np.flatnonzero(state.alive)
            self._alive[shard], self._row_ids[shard] = alive, view.row_ids
            parts.append((view.row_ids[alive], input_coverage(view, self._step, alive)))
            self.rows += len(alive)
        name, document, full = identity(self._step, Resolved(), self._sets, rows_digest(parts))
        return BoundStep(self._step, name, document, full)

    def is_covered(self, files: Mapping[int, ColumnFile]) -> bool:
        """Whether every surviving row has a value or a permanent error in these files of the group's set."""
        return all(s in files and files[s].covered >= len(alive) for s, alive in self._alive.items())

    def compute(self, bound: BoundStep, tick: Callable[[int], None]) -> dict[int, ColumnFile]:
        """Run the group over all rows, in its order, and publish each shard's part. Returns shard → column file."""
        operator, contract = self._step.operator, self._step.contract
        assert operator is not None
        assert issubclass(operator, Group)
        assert contract is not None
        rows = pa.concat_tables(self._view(s).gather(self._step.inputs, alive) for s, alive in self._alive.items())
        order = self._engine.order(rows, self._step.order)
        ordered = rows.take(pa.array(order))
        try:
            answer = operator(self._step.options).compute(ordered)
            results = checked_columns(operator.name, contract, answer, len(ordered))
        except MmdataError:
            raise
        except Exception as error:
            raise ContractError(
                f"group {self._step.name} failed over its {len(ordered)} rows ({type(error).__name__}: {error}); mend "
                "the group or its options and run again"
            ) from error
        if len(results) != len(order):
            raise ContractError(f"group {operator.name} returned {len(results)} rows for {len(order)}")
        in_place: list[RowResult] = [Failed("lost")] * len(order)
        for position, result in zip(order.tolist(), results, strict=True):
            in_place[position] = result
        return self._publish(bound, contract.writes, in_place, tick)

    def _publish(
        self, bound: BoundStep, schema: pa.Schema, results: Sequence[RowResult], tick: Callable[[int], None]
    ) -> dict[int, ColumnFile]:
        base = ColumnFooter.of(canonical_json(dict(bound.document)))
        published, first = {}, 0
        for shard, alive in self._alive.items():
            mine = results[first : first + len(alive)]
            first += len(alive)
            table = _shard_table(schema, self._row_ids[shard], alive, mine)
            published[shard] = publish_columns(self._store, bound.set_name, shard, table, base)
            tick(len(self._row_ids[shard]))
        return published


def _shard_table(
    schema: pa.Schema, row_ids: npt.NDArray[np.int64], alive: npt.NDArray[np.int64], results: Sequence[RowResult]
) -> pa.Table:
    columns: dict[str, list[Any]] = {name: [None] * len(row_ids) for name in schema.names}
    reasons: list[str | None] = [UNCOVERED] * len(row_ids)
    for row, result in zip(alive.tolist(), results, strict=True):
        reasons[row] = result.reason if isinstance(result, Failed) else None
        if not isinstance(result, Failed):
            for name, values in columns.items():
                values[row] = result[name]
    arrays = [pa.array(columns[f.name], f.type) for f in schema]
    return pa.table([pa.array(row_ids), *arrays, pa.array(reasons, pa.string())], ["row_id", *schema.names, "reason"])
