"""Which rows of a shard are alive before each step, and why the others are not.

This is the algebra of the dataset in one place (P₀ = rows with status ok; a stage or group takes away the rows it
failed; a filter keeps the rows where it is TRUE). Workers, groups, verdicts and `plan` all walk the same way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mmdata.base_rows import read_base
from mmdata.column_files import UNCOVERED, ColumnFile
from mmdata.errors import StoreError
from mmdata.filters import FilterEngine
from mmdata.plan import Input, PlannedStep, Resolved
from mmdata.store import Store

__all__ = [
    "COMPUTED",
    "NOT_COVERED",
    "PERMANENT",
    "STILL_IN",
    "TRANSIENT",
    "BoundStep",
    "Columns",
    "Committed",
    "Mask",
    "ShardView",
    "Walk",
    "apply_filter",
    "input_coverage",
    "rows_digest",
    "start",
    "take_failed",
    "tracks",
    "walk",
]

Mask = npt.NDArray[np.bool_]
STILL_IN = -1


@dataclass(frozen=True)
class BoundStep:
    """A planned step with the column set that holds its values; filters have none."""

    step: PlannedStep
    set_name: str = ""
    document: Mapping[str, Any] = field(default_factory=dict)  # what the set's identity is the hash of
    full_hash: str = ""
    resolved: Resolved = field(default_factory=Resolved)
    is_repeat: bool = False  # an earlier step has the same set: nothing is computed here, not even transient failures


# What a column set knows of a row, as codes: a walk over many rows looks at these, not at words.
COMPUTED, PERMANENT, TRANSIENT, NOT_COVERED = 0, 1, 2, 3


class Columns(Protocol):
    """One column set of one shard, committed or being computed."""

    codes: npt.NDArray[np.int8]  # (N,) COMPUTED, PERMANENT, TRANSIENT or NOT_COVERED

    def take(self, own: str, rows: npt.NDArray[np.int64]) -> pa.Array | pa.ChunkedArray:
        """The values of a column for the rows at these indexes."""

    def reasons(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.object_]:
        """Their reasons: None, an error kind, `!kind` or `uncovered`."""


class Committed:
    """A column set as it stands in the dataset. `read` None = no file yet.

    Values are read when asked for, those of the columns `soon` at once.
    """

    def __init__(
        self,
        row_ids: npt.NDArray[np.int64],
        name: str,
        read: Callable[[list[str]], pa.Table] | None = None,
        soon: Iterable[str] = (),
    ) -> None:
        self._read = read
        self._columns: dict[str, pa.ChunkedArray] = {}
        rows = len(row_ids)
        self.codes = np.full(rows, NOT_COVERED, np.int8)
        if read is not None:
            owns = list(dict.fromkeys(["row_id", "reason", *soon]))
            self._columns = dict(zip(owns, read(owns).columns, strict=True))
            found, reason = self._columns.pop("row_id"), self._columns["reason"]
            if not np.array_equal(found.to_numpy(), row_ids):
                raise StoreError(f"{name} does not have the rows of its shard; remove it and run the recipe again")
            self.codes[:] = PERMANENT if reason.null_count < rows else COMPUTED
            if reason.null_count < rows:
                self.codes[pc.is_null(reason).to_numpy()] = COMPUTED
                self.codes[pc.fill_null(pc.starts_with(reason, "!"), False).to_numpy()] = TRANSIENT
                self.codes[pc.fill_null(pc.equal(reason, UNCOVERED), False).to_numpy()] = NOT_COVERED

    @property
    def is_there(self) -> bool:
        """Whether anything is committed for this shard."""
        return self._read is not None

    def column(self, own: str) -> pa.ChunkedArray:
        """A whole column; StoreError when nothing is committed."""
        if own not in self._columns:
            if self._read is None:
                raise StoreError(f"column {own} is read before it was computed; run the recipe again")
            self._columns[own] = self._read([own]).column(0)
        return self._columns[own]

    def take(self, own: str, rows: npt.NDArray[np.int64]) -> pa.Array | pa.ChunkedArray:
        """See `Columns`; StoreError when nothing is committed."""
        return self.column(own).take(pa.array(rows))

    def reasons(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.object_]:
        """See `Columns`."""
        if not self.is_there:
            return np.full(len(rows), UNCOVERED, object)
        return np.asarray(self.take("reason", rows).to_numpy(zero_copy_only=False))


class ShardView:
    """One shard's base rows and column sets, read when first asked for.

    `sets` maps position of a step → its set name; `files` set name → its newest column file, where there is one.
    """

    def __init__(
        self, store: Store, shard: int, rows_file: str, sets: Mapping[int, str], files: Mapping[str, ColumnFile]
    ) -> None:
        self.store = store
        self.shard = shard
        self.sets = dict(sets)
        self._rows_file = rows_file
        self._files = dict(files)
        self._base: dict[str, pa.ChunkedArray] = {}
        self._columns: dict[str, Columns] = {}
        self._soon: dict[str, dict[str, None]] = {}
        self._read_base(("row_id", "status"))

    def __len__(self) -> int:
        return len(self._base["row_id"])

    @property
    def row_ids(self) -> npt.NDArray[np.int64]:
        """(N,) int64, in row order."""
        return np.asarray(self._base["row_id"].to_numpy())

    def _read_base(self, names: Iterable[str]) -> None:
        missing = [n for n in dict.fromkeys(names) if n not in self._base]
        if missing:
            table = read_base(self.store, self._rows_file, missing)
            self._base.update({n: table.column(n) for n in missing})

    def base(self, names: Sequence[str]) -> pa.Table:
        """Base columns by name, all rows."""
        self._read_base(names)
        return pa.table({n: self._base[n] for n in names})

    def columns(self, set_name: str) -> Columns:
        """The set's columns for this shard; what is committed is proved to be the same rows."""
        if set_name not in self._columns:
            file = self._files.get(set_name)
            read = None if file is None else partial(self.store.read_table, file.name)
            soon = self._soon.get(set_name, ())
            self._columns[set_name] = Committed(self.row_ids, file.name if file else set_name, read, soon)
        return self._columns[set_name]

    def expect(self, steps: Iterable[BoundStep]) -> None:
        """What filters among these steps read will be asked for: every file is then opened once."""
        for item in (i for bound in steps if bound.step.kind == "filter" for i in bound.step.inputs):
            if item.made_by is not None:
                self._soon.setdefault(self.sets[item.made_by], {})[item.own] = None

    def replace(self, set_name: str, columns: Columns) -> None:
        """Read the set from here from now on (it is being computed)."""
        self._columns[set_name] = columns

    def gather(self, inputs: Sequence[Input], rows: npt.NDArray[np.int64]) -> pa.Table:
        """row_id and the inputs under their visible names, for the rows at these indexes."""
        self._read_base(i.own for i in inputs if i.made_by is None)
        indexes = pa.array(rows)
        columns = {"row_id": self._base["row_id"].take(indexes)}
        for item in inputs:
            if item.made_by is None:
                columns[item.visible] = self._base[item.own].take(indexes)
            else:
                columns[item.visible] = self.columns(self.sets[item.made_by]).take(item.own, rows)
        return pa.table(columns)


@dataclass
class Walk:
    """Where every row of a shard stands after some steps.

    `left` is the position at which a row went (0 = ingest, -1 = still in); `reason` says why. `rows_in` maps position
    → rows before it. `missing` maps position → indexes of rows that are alive there but not computed yet; the walk
    stops at the first such step.
    """

    left: npt.NDArray[np.int16]
    reason: npt.NDArray[np.object_]
    rows_in: dict[int, int] = field(default_factory=dict)
    missing: dict[int, npt.NDArray[np.int64]] = field(default_factory=dict)

    @property
    def alive(self) -> Mask:
        """(N,) bool."""
        return np.asarray(self.left == STILL_IN)

    def take_out(self, rows: npt.NDArray[np.int64], position: int, reasons: Any) -> None:
        """These rows go at this step, for these reasons."""
        self.left[rows] = position
        self.reason[rows] = reasons

    def copy(self) -> Walk:
        """An independent copy."""
        return Walk(self.left.copy(), self.reason.copy(), dict(self.rows_in), dict(self.missing))


def start(view: ShardView) -> Walk:
    """P₀: rows with status ok; the others failed at ingest with their status as the reason."""
    status = view.base(["status"]).column(0).to_numpy(zero_copy_only=False)
    made = Walk(np.full(len(view), STILL_IN, np.int16), np.full(len(view), None, object))
    failed = np.flatnonzero(status != "ok")
    made.take_out(failed, 0, status[failed])
    made.rows_in[0] = len(view)
    return made


def tracks(steps: Sequence[BoundStep]) -> list[list[BoundStep]]:
    """The ways rows go through `steps`: first all of them, which decides the verdicts, then `over: all` groups' own.

    Such a group sees P₀ minus the rows that failed at the stages it reads, directly or through others. So its rows walk
    those stages only, past every filter, and each of them is computed for every row that reaches it on any track.
    """
    groups = sorted({g for bound in steps for g in bound.step.ungated_for})
    sides = [[b for b in steps if g in b.step.ungated_for] for g in groups]
    different = {tuple(b.step.position for b in side): side for side in sides}
    return [list(steps), *different.values()]


def walk(
    view: ShardView, steps: Sequence[BoundStep], engine: FilterEngine, begin: Walk | None = None, final: bool = True
) -> Walk:
    """Go through `steps`. With `final`, rows with a transient error have failed; without, they count as missing."""
    state = begin.copy() if begin is not None else start(view)
    ahead: dict[int, npt.NDArray[np.int8]] = {}
    for index, bound in enumerate(steps):
        position = bound.step.position
        rows = np.flatnonzero(state.alive)
        state.rows_in[position] = len(rows)
        if bound.step.kind == "filter":
            if position not in ahead:
                ahead |= _look_ahead(view, steps[index:], engine, rows)
            apply_filter(view, bound, engine, state, rows, ahead.get(position))
            continue
        codes = view.columns(bound.set_name).codes[rows]
        undone = codes == NOT_COVERED
        if not final and not bound.is_repeat:
            undone |= codes == TRANSIENT
        if undone.any():
            state.missing[position] = rows[undone]
            return state
        if bound.step.kind == "keep_list":
            _keep_listed(view, bound, state, rows)
            continue
        take_failed(view, bound, state, rows)
    return state


def _keep_listed(view: ShardView, bound: BoundStep, state: Walk, rows: npt.NDArray[np.int64]) -> None:
    """The rows that the list has stay; the others go as `<name>`, or as `<name>:null` where they have no key."""
    [(own, _)] = bound.step.outputs
    listed = view.columns(bound.set_name).take(own, rows)
    out = pc.equal(listed, False)
    state.take_out(rows[pc.fill_null(out, False).to_numpy(zero_copy_only=False)], bound.step.position, bound.step.name)
    unknown = listed.is_null().to_numpy(zero_copy_only=False)
    state.take_out(rows[unknown], bound.step.position, f"{bound.step.name}:null")


def take_failed(view: ShardView, bound: BoundStep, state: Walk, rows: npt.NDArray[np.int64]) -> None:
    """The rows a stage or group failed go, unless its step says `on_error: keep`."""
    if bound.step.on_error == "drop":
        columns = view.columns(bound.set_name)
        failed = rows[columns.codes[rows] != COMPUTED]
        if len(failed):
            state.take_out(failed, bound.step.position, columns.reasons(failed))


def _look_ahead(
    view: ShardView, steps: Sequence[BoundStep], engine: FilterEngine, rows: npt.NDArray[np.int64]
) -> dict[int, npt.NDArray[np.int8]]:
    """Position → (N,) outcomes at these rows, of the filters among `steps` whose columns are all committed.

    One question for all of them costs little more than one filter; what a filter says of a row depends on no other row.
    Nothing where they are fewer than two, or where one raises what TRY lets through: then each is asked in its turn.
    """
    there = [b for b in steps if b.step.kind == "filter" and _is_committed(view, b.step.inputs)]
    if len(there) < 2 or not len(rows):
        return {}
    inputs = list({i.visible: i for b in there for i in b.step.inputs}.values())
    expressions = [b.step.expression for b in there if b.step.expression is not None]
    found = engine.evaluate_together(view.gather(inputs, rows), expressions)
    outcomes = {}
    for bound, codes in zip(there, found or [], strict=False):
        outcomes[bound.step.position] = np.zeros(len(view), np.int8)
        outcomes[bound.step.position][rows] = codes
    return outcomes


def _is_committed(view: ShardView, inputs: Sequence[Input]) -> bool:
    makers = {i.made_by for i in inputs if i.made_by is not None}
    found = [view.columns(view.sets[m]) for m in makers]
    return all(isinstance(columns, Committed) and columns.is_there for columns in found)


def apply_filter(
    view: ShardView,
    bound: BoundStep,
    engine: FilterEngine,
    state: Walk,
    rows: npt.NDArray[np.int64],
    ahead: npt.NDArray[np.int8] | None = None,
) -> None:
    """The rows stay where the expression is TRUE; the others go as `<name>`, `<name>:null` or `<name>:error`.

    `ahead` has its outcomes by row where it was evaluated already.
    """
    assert bound.step.expression is not None
    if not len(rows):
        return
    if ahead is not None:
        codes = ahead[rows]
    else:
        codes = engine.evaluate(view.gather(bound.step.inputs, rows), bound.step.expression)
    for code, suffix in ((0, ""), (-1, ":null"), (-2, ":error")):
        state.take_out(rows[codes == code], bound.step.position, f"{bound.step.name}{suffix}")


def input_coverage(view: ShardView, step: PlannedStep, rows: npt.NDArray[np.int64]) -> Mask:
    """True where every column set the step reads has a value or a permanent error."""
    covered = np.ones(len(rows), bool)
    for position in {i.made_by for i in step.inputs if i.made_by is not None}:
        covered &= view.columns(view.sets[position]).codes[rows] <= PERMANENT
    return covered


def rows_digest(parts: Iterable[tuple[npt.NDArray[np.int64], Mask]]) -> str:
    """sha256 over (row_id as int64 LE, is every input covered as one byte), in order."""
    digest = hashlib.sha256()
    for row_ids, covered in parts:
        pairs = np.zeros(len(row_ids), dtype=[("row_id", "<i8"), ("covered", "u1")])
        pairs["row_id"], pairs["covered"] = row_ids, covered
        digest.update(pairs.tobytes())
    return digest.hexdigest()
