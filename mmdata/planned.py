"""What a proved recipe is made of: steps bound to classes and columns, cut into passes, and what a machine settled.

`mmdata.plan` makes them; they hold no data and read nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa

from mmdata.filters import CheckedExpression
from mmdata.recipe import Recipe
from mmdata.stage import Contract, Operator, Options

__all__ = ["Input", "Pass", "Plan", "PlannedStep", "Resolved"]


@dataclass(frozen=True)
class Input:
    """One column a step reads: the name it is seen under, and where it is: base rows, or the step that made it."""

    visible: str
    made_by: int | None  # position of the step; None = base rows
    own: str  # its name in that column set, or in the base rows


@dataclass(frozen=True)
class PlannedStep:
    """One step, checked. `position` counts from 1; 0 is ingest."""

    position: int
    name: str
    kind: Literal["stage", "group", "attach", "keep_list", "filter"]
    on_error: Literal["drop", "keep"] = "drop"
    max_failed: float = 0.05
    operator: type[Operator[Any]] | None = None
    options: Options | None = None
    contract: Contract | None = None
    inputs: tuple[Input, ...] = ()
    outputs: tuple[tuple[str, str], ...] = ()  # (own, visible) of what `samples` shows
    aside: tuple[tuple[str, str], ...] = ()  # the same of embeddings: shown where they are named, see columns.is_aside
    reason_column: str = ""
    media: bool = False
    order: tuple[CheckedExpression, ...] = ()  # the `prefer` terms of a group
    expression: CheckedExpression | None = None
    over: Literal["kept", "all"] = "kept"  # the rows a group sees: see survivors.tracks
    ungated_for: frozenset[int] = frozenset()  # positions of the `over: all` groups that read it, through others too

    @property
    def words(self) -> str:
        """What a filter keeps: its expression, or the list of a keep_list; empty for other steps."""
        if self.expression is not None:
            return self.expression.sql
        path = getattr(self.options, "path", "") if self.kind == "keep_list" else ""
        return f"{self.inputs[0].visible} is in {path}" if path else ""


@dataclass(frozen=True)
class Pass:
    """Stages and filters that share one decode, then at most one step over the whole dataset: a group or an attach."""

    steps: tuple[PlannedStep, ...]
    group: PlannedStep | None

    @property
    def uses_model(self) -> bool:
        """Whether a worker must keep a model open, so that actors are worth their start."""
        return any(s.contract is not None and s.contract.batch_shape is not None for s in self.steps)

    @property
    def gpu(self) -> float:
        """Share of an accelerator that a worker of this pass holds, where there is one."""
        return max((s.contract.needs.gpu for s in self.steps if s.contract is not None), default=0.0)

    @property
    def threads(self) -> int:
        """Decoding threads of a worker of this pass."""
        return max((s.contract.needs.threads for s in self.steps if s.contract is not None), default=1)


@dataclass(frozen=True)
class Resolved:
    """What a machine settled for one stage, once per dataset: kept in `state/`, taken from there by later runs."""

    batch_shape: int | None = None
    precision: str | None = None
    device: str = "cpu"
    weights: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A proved recipe. `columns` maps every visible column to its Arrow type, in order."""

    recipe: Recipe
    steps: tuple[PlannedStep, ...]
    columns: pa.Schema
    warnings: tuple[str, ...] = ()

    @property
    def passes(self) -> tuple[Pass, ...]:
        """The steps cut after every step over the whole dataset; the last pass may be empty."""
        made: list[Pass] = []
        current: list[PlannedStep] = []
        for step in self.steps:
            if step.kind in ("group", "attach", "keep_list"):
                made.append(Pass(tuple(current), step))
                current = []
            else:
                current.append(step)
        if current or not made:
            made.append(Pass(tuple(current), None))
        return tuple(made)

    @property
    def groups(self) -> bool:
        """Whether any step needs the whole dataset."""
        return any(s.kind == "group" for s in self.steps)
