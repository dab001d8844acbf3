"""One group over the whole dataset: the surviving rows of every shard in, one column file a shard out.

The group's identity holds the digest of the rows it saw, so any change of the set, larger or smaller, is a new column
set. Which rows those are stands in `survivors.tracks`.

The input columns of all its rows are held in memory at once, as Arrow (never media, never Python objects), and so is
its answer: for duplicates of a 64-bit value some 100 bytes a row beside what the group itself needs, 1 GB for ten
million; twice the inputs while rows are put into the order of `prefer`. A group that fails single rows (cells of
`Failed`) or writes lists is looked at cell by cell, at some hundred bytes more. A group that `streams` reads a shard's
inputs at a time, and as often as it likes; of its rows only the answer is held, and where that is arrays over files in
scratch (`groups.visited_rows`) it is not copied: a shard's part of it is read when that shard is published.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mmdata.column_files import UNCOVERED, ColumnFile, ColumnFooter, canonical_json, publish_columns
from mmdata.columns import row_id
from mmdata.errors import ContractError, MmdataError, StoreError
from mmdata.filters import FilterEngine
from mmdata.group_rows import SurvivingRows
from mmdata.isolate import checked_columns
from mmdata.older_rows import OlderDatasets, names_older
from mmdata.operator_files import at
from mmdata.plan import PlannedStep, Resolved, identity
from mmdata.scratch import scratch_folder
from mmdata.stage import Contract, Failed, Group
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
        # The rows it sees went through all steps, or past the filters through the stages it reads (survivors.tracks).
        self._seen = [b for b in before if step.over == "kept" or step.position in b.step.ungated_for]
        self._alive: dict[int, npt.NDArray[np.bool_]] = {}
        self._older: OlderDatasets | None = None
        self.rows = 0

    def _view(self, shard: int) -> ShardView:
        there = {name: found[shard] for name, found in self._files.items() if shard in found}
        return ShardView(self._store, shard, self._rows_files[shard], self._sets, there)

    def survey(self) -> BoundStep:
        """Walk every shard to find the survivors, and give the column set its identity."""
        digest = rows_digest(self._survivors())
        older = None
        if names_older(self._step):
            known = {b.step.position: (b.set_name, b.document) for b in self._before if b.set_name}
            self._older = OlderDatasets(self._step, self._store)
            self._older.require_same(known)
            older = self._older.digest()
        name, document, full = identity(self._step, Resolved(), self._sets, digest, older)
        return BoundStep(self._step, name, document, full)

    def _survivors(self) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]]:
        """Per shard, row_ids of the rows the group sees, and whether all its inputs have a value or an error."""
        for shard in sorted(self._rows_files):
            view = self._view(shard)
            state = walk(view, self._seen, self._engine)
            if state.missing:
                raise StoreError(
                    f"shard {shard}: step {min(state.missing)}, which {self._step.name} waits for, is not complete; "
                    "run the recipe again"
                )
            self._alive[shard] = state.alive
            alive = np.flatnonzero(state.alive)
            self.rows += len(alive)
            yield view.row_ids[alive], input_coverage(view, self._step, alive)

    def is_covered(self, files: Mapping[int, ColumnFile]) -> bool:
        """Whether every surviving row has a value or a permanent error in these files of the group's set."""
        return all(s in files and files[s].covered >= alive.sum() for s, alive in self._alive.items())

    def compute(
        self, bound: BoundStep, tick: Callable[[int], None], say: Callable[[str], None] = lambda _: None
    ) -> dict[int, ColumnFile]:
        """Run the group over all rows, in its order, and publish each shard's part. Returns shard → column file.

        `say` is told the group's remark, where it has one.
        """
        operator, contract = self._step.operator, self._step.contract
        assert operator is not None
        assert issubclass(operator, Group)
        assert contract is not None
        with ExitStack() as stack:
            try:
                group = operator(self._step.options)
                if operator.streams:
                    # Kept until the answer is published: it may lie there.
                    answered = self._streamed(group, contract, stack.enter_context(scratch_folder()))
                else:
                    answered = self._at_once(group, contract)
            except MmdataError:
                raise
            except Exception as error:
                raise ContractError(
                    f"group {self._step.name} failed over its {self.rows} rows ({type(error).__name__}: {error}"
                    f"{at(error)}); mend the group or its options and run again"
                ) from error
            if group.remark:
                say(group.remark)
            return self._publish(bound, answered, tick)

    def _streamed(self, group: Group[Any], contract: Contract, scratch: Path) -> pa.Table:
        """The answer of a group that streams, in row order."""
        rows = SurvivingRows(self._step, self._alive, self._view, self._engine, self._older)
        return _answered(group.name, contract, group.compute_streamed(rows, scratch), len(rows))

    def _at_once(self, group: Group[Any], contract: Contract) -> pa.Table:
        """The answer of a group that sees all rows at once, put back into row order."""
        rows = SurvivingRows(self._step, self._alive, self._view, self._engine).read(
            [i.visible for i in self._step.inputs]
        )
        # Without terms they are in order as they are: row_id ascends through the shards.
        order = self._engine.order(rows, self._step.order) if self._step.order else None
        ordered = rows if order is None else rows.take(pa.array(order))
        del rows
        answer = group.compute(ordered) if self._older is None else group.compute_against(ordered, self._older)
        answered = _answered(group.name, contract, answer, len(ordered))
        del ordered
        if order is None:
            return answered
        back = np.empty(len(order), np.int64)
        back[order] = np.arange(len(order))
        return answered.take(pa.array(back))

    def _publish(self, bound: BoundStep, answered: pa.Table, tick: Callable[[int], None]) -> dict[int, ColumnFile]:
        base = ColumnFooter.of(canonical_json(dict(bound.document)))
        published, first = {}, 0
        for shard, alive in self._alive.items():
            seen = int(alive.sum())
            table = _shard_table(shard, alive, answered.slice(first, seen))
            first += seen
            known = self._files.get(bound.set_name, {}).get(shard)
            published[shard] = publish_columns(self._store, bound.set_name, shard, table, base, known)
            tick(len(alive))
        return published


def _answered(operator: str, contract: Contract, answer: Any, rows: int) -> pa.Table:
    """A group's answer as its columns and `reason`, in the order it gave.

    Whole arrays of finite numbers and text stay arrays; anything else is looked at cell by cell.
    """
    arrays = _plain_arrays(contract.writes, answer, rows)
    reason = _no_reasons(rows)
    if arrays is None:
        results = checked_columns(operator, contract, answer, rows)
        reason = pa.array([r.reason if isinstance(r, Failed) else None for r in results], pa.string())
        arrays = [
            pa.array([None if isinstance(r, Failed) else r[f.name] for r in results], f.type) for f in contract.writes
        ]
    return pa.table([*arrays, reason], names=[*contract.writes.names, "reason"])


def _no_reasons(rows: int) -> pa.ChunkedArray:
    """NULLs, in the memory of a few."""
    few = pa.nulls(min(rows, 1 << 16), pa.string())
    chunks = [few] * (rows // len(few)) + [few.slice(0, rows % len(few))] if rows else [few]
    return pa.chunked_array(chunks, pa.string())


def _plain_arrays(schema: pa.Schema, answer: Any, rows: int) -> list[Any] | None:
    if not isinstance(answer, Mapping) or sorted(answer) != sorted(schema.names):
        return None
    arrays = []
    for field in schema:
        values = answer[field.name]
        if isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype.kind in "biuf":
            values = pa.array(values)
        if not isinstance(values, pa.Array | pa.ChunkedArray) or len(values) != rows or pa.types.is_nested(values.type):
            return None
        try:
            converted = values.cast(field.type)
        except pa.ArrowException:
            return None  # the look at every cell says which
        if pa.types.is_floating(field.type) and not pc.all(pc.is_finite(converted), min_count=0).as_py():
            return None
        arrays.append(converted)
    return arrays


def _shard_table(shard: int, alive: npt.NDArray[np.bool_], mine: pa.Table) -> pa.Table:
    """The rows of a shard, those that the group did not see as `uncovered`; `mine` has the others, in row order."""
    row_ids = row_id(shard, 0) + np.arange(len(alive))  # rows of a shard are never moved
    unseen = pa.array(~alive)
    taken = mine.take(pa.array(np.cumsum(alive) - 1, mask=~alive))
    reason = pc.if_else(unseen, UNCOVERED, taken.column("reason"))
    columns = [taken.column(name) for name in mine.column_names[:-1]]
    return pa.table([pa.array(row_ids), *columns, reason], names=["row_id", *mine.column_names])
