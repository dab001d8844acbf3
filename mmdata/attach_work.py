"""An `attach` or `keep_list` step over the whole dataset: one column file a shard, of all its rows, whatever survives.

In: the base rows' key columns, a shard at a time, and the given files, indexed in scratch once. Out: the step bound to
its column set, and shard → column file; what an earlier run covered is left alone, so appended shards alone are
computed, and a stopped run goes on where it stood. Fails with SourceError when the files are wrong or change meanwhile,
BudgetError when more rows lack a value than `max_failed` allows, StoreError as the store does.

Memory: a shard's columns on each of a few threads, and what the index of the keys maps. The files themselves are never
held (see `mmdata.joins`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmdata.column_files import UNCOVERED, ColumnFile, ColumnFooter, canonical_json, publish_columns
from mmdata.errors import BudgetError, ContractError, SourceError
from mmdata.plan import identity
from mmdata.planned import PlannedStep, Resolved
from mmdata.scratch import scratch_folder
from mmdata.stage import Lookup
from mmdata.store import Store
from mmdata.survivors import BoundStep

__all__ = ["AttachJob", "check_files", "summaries"]

_THREADS = 4
_SHARDS_AT_ONCE = 16  # handed to the threads together, so that a lost lease stops the work soon
_BUDGET_FROM_ROWS = 200


def check_files(steps: Sequence[PlannedStep], store: Store) -> None:
    """Raise what is wrong with the files of these steps, before anything is written: their keys are read for it.

    Not again where the dataset has columns of those very files: then it was done.
    """
    for step in steps:
        if step.kind in ("attach", "keep_list"):
            operator, options = _lookup(step), step.options
            if not store.list(f"columns/{identity(step, Resolved(), {})[0]}"):
                with scratch_folder() as folder:
                    try:
                        operator.check(options, folder)
                    except SourceError as error:
                        raise SourceError(f"step {step.position} ({step.name}): {error}") from None


def summaries(steps: Sequence[PlannedStep]) -> list[str]:
    """What the files of these steps are, a line each, for `plan`."""
    found = [s for s in steps if s.kind in ("attach", "keep_list")]
    return [f"{step.name}: {_lookup(step).summary(step.options)}" for step in found]


def _lookup(step: PlannedStep) -> type[Lookup]:  # type: ignore[type-arg]
    assert step.operator is not None
    assert issubclass(step.operator, Lookup)
    return step.operator


class AttachJob:
    """One step over all shards. `rows_files`: shard → its base rows; `sets`: position → set name of earlier steps."""

    def __init__(self, store: Store, step: PlannedStep, rows_files: Mapping[int, str], sets: Mapping[int, str]) -> None:
        contract = step.contract
        assert contract is not None
        self._operator = _lookup(step)
        self._store, self._step, self._contract, self._rows_files = store, step, contract, rows_files
        self._known: Mapping[int, ColumnFile] = {}
        [self._key] = contract.reads
        name, document, full = identity(step, Resolved(), sets)
        self.bound = BoundStep(step, name, document, full, is_repeat=name in sets.values())

    def left(self, files: Mapping[int, ColumnFile]) -> list[int]:
        """Shards with rows that these files of the set do not cover."""
        self._known = files
        return [s for s, rows in sorted(self._rows_files.items()) if s not in files or self._lacks(rows, files[s])]

    def _lacks(self, rows_file: str, file: ColumnFile) -> bool:
        """Whether a row that came in is not covered: only where a row may get its key later (see `_table`)."""
        if file.covered == file.rows:
            return False
        ok = pc.equal(self._store.read_table(rows_file, ["status"]).column(0), "ok")
        reasons = self._store.read_table(file.name, ["reason"]).column(0)
        return bool(pc.any(pc.and_(ok, pc.fill_null(pc.equal(reasons, UNCOVERED), False))).as_py())

    def compute(self, shards: Sequence[int], tick: Callable[[int], None]) -> dict[int, ColumnFile]:
        """Look up every row of these shards and publish each; `tick` is told how many rows are done, and may raise."""
        step = self._step
        published: dict[int, ColumnFile] = {}
        with self._store.scratch() as folder, ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
            lookup = self._operator(step.options)
            lookup.open(folder)
            if self._operator.contract(step.options).weights != self._contract.weights:
                raise SourceError(f"step {step.name}: its files were changed while the run went on; run it again")
            footer = ColumnFooter.of(canonical_json(dict(self.bound.document)))
            for first in range(0, len(shards), _SHARDS_AT_ONCE):
                some = shards[first : first + _SHARDS_AT_ONCE]
                for shard, file in zip(some, pool.map(lambda s: self._publish(lookup, s, footer), some), strict=True):
                    published[shard] = file
                    tick(file.rows)
        return published

    def _publish(self, lookup: Lookup, shard: int, footer: ColumnFooter) -> ColumnFile:  # type: ignore[type-arg]
        return publish_columns(
            self._store, self.bound.set_name, shard, self._table(lookup, shard), footer, self._known.get(shard)
        )

    def _table(self, lookup: Lookup, shard: int) -> pa.Table:  # type: ignore[type-arg]
        """The shard's part as a column file holds it."""
        rows = self._store.read_table(self._rows_files[shard], ["row_id", self._key, "status"])
        answer = lookup.compute(rows.column(self._key))
        wanted = pa.schema([*self._contract.writes, ("reason", pa.string())])
        if not answer.schema.equals(wanted) or len(answer) != len(rows):
            raise ContractError(
                f"{self._operator.name} gave {answer.schema.names} for {len(answer)} rows where {wanted.names} for "
                f"{len(rows)} were expected"
            )
        reasons = answer.column("reason")
        if self._key == "sha256":
            # A later attempt to fetch the row may bring it other bytes: until it came in, nothing is settled.
            reasons = pc.if_else(pc.equal(rows.column("status"), "ok"), reasons, UNCOVERED)
            hidden = pc.not_equal(rows.column("status"), "ok").to_numpy()
            places = pa.array(np.arange(len(rows)), mask=hidden)
            answer = answer.take(places) if hidden.any() else answer
        columns = [answer.column(name) for name in self._contract.writes.names]
        return pa.table([rows.column("row_id"), *columns, reasons], names=["row_id", *wanted.names])

    def require_within_budget(self, files: Mapping[int, ColumnFile]) -> None:
        """BudgetError when more rows that came in have a reason than the step's own `max_failed` allows."""
        step = self._step
        if step.max_failed >= 1 or step.kind == "keep_list":
            return
        total = failed = 0
        for shard, rows_file in self._rows_files.items():
            ok = pc.equal(self._store.read_table(rows_file, ["status"]).column(0), "ok")
            reasons = self._store.read_table(files[shard].name, ["reason"]).column(0)
            total += pc.sum(ok).as_py() or 0
            failed += pc.sum(pc.and_(ok, pc.is_valid(reasons))).as_py() or 0
        if total >= _BUDGET_FROM_ROWS and failed > step.max_failed * total:
            raise BudgetError(
                f"step {step.name}: {failed} of {total} rows have no value in the files, more than its max_failed of "
                f"{step.max_failed:.0%}; look at {step.reason_column} with mmdata sql, then bring other files or raise "
                "its max_failed"
            )
