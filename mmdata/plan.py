"""A recipe proved against its source: every step bound to its class, its options checked, its columns named.

In: a `Recipe` and the Arrow schema of the source's own columns. Out: a `Plan` of `PlannedStep`s cut into passes, and,
as sets become known, the identity of each column set. What is wrong raises RecipeError or MissingExtra before anything
has run. No model package is imported.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal

import pyarrow as pa
from pydantic import ValidationError

from mmdata import registry
from mmdata.column_files import canonical_json
from mmdata.columns import FORMAT_VERSION, base_schema
from mmdata.errors import MissingExtra, RecipeError, nearest
from mmdata.filters import CheckedExpression, check_filter, check_order
from mmdata.recipe import STEP_KEYS, FilterStep, OperatorStep, Recipe, describe_errors
from mmdata.stage import Contract, Group, Operator, Options, column_options, order_options
from mmdata.weights import with_fingerprints

__all__ = [
    "Input",
    "Pass",
    "Plan",
    "PlannedStep",
    "Resolved",
    "base_identity",
    "chain",
    "device_class",
    "identity",
    "plan_recipe",
]

# Base columns that `samples` adds itself, so that no step may write them.
_LEDGER = ("verdict", "step", "step_name", "reason")


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
    kind: Literal["stage", "group", "filter"]
    on_error: Literal["drop", "keep"] = "drop"
    max_failed: float = 0.05
    operator: type[Operator[Any]] | None = None
    options: Options | None = None
    contract: Contract | None = None
    inputs: tuple[Input, ...] = ()
    outputs: tuple[tuple[str, str], ...] = ()  # (own, visible)
    reason_column: str = ""
    media: bool = False
    order: tuple[CheckedExpression, ...] = ()  # the `prefer` terms of a group
    expression: CheckedExpression | None = None


@dataclass(frozen=True)
class Pass:
    """Stages and filters that share one decode, then at most one group that needs the whole dataset."""

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
        """The steps cut after every group; the last pass may be empty."""
        made: list[Pass] = []
        current: list[PlannedStep] = []
        for step in self.steps:
            if step.kind == "group":
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


class _Names:
    """The columns visible so far: who made each, under which own name, of which type."""

    def __init__(self, base: pa.Schema, hidden: Sequence[str]) -> None:
        self.types: dict[str, pa.DataType] = {f.name: f.type for f in base if f.name not in hidden}
        self.makers: dict[str, tuple[int | None, str]] = {name: (None, name) for name in self.types}
        # In lower case: SQL does not tell Score from score.
        self.taken: dict[str, str] = {name.lower(): "the base rows" for name in [*base.names, *_LEDGER]}

    def schema(self) -> pa.Schema:
        return pa.schema(list(self.types.items()))

    def input(self, visible: str) -> Input:
        made_by, own = self.makers[visible]
        return Input(visible, made_by, own)

    def add(self, where: str, position: int, step_name: str, own: str, visible: str, kind: pa.DataType) -> None:
        if visible.lower() in self.taken:
            cure = "give the step another `as:`"
            raise RecipeError(f"{where}: column {visible!r} is already made by {self.taken[visible.lower()]}; {cure}")
        self.taken[visible.lower()] = f"step {step_name}"
        self.types[visible] = kind
        self.makers[visible] = (position, own)


def plan_recipe(recipe: Recipe, extra: pa.Schema | None = None, require_packages: bool = True) -> Plan:
    """Prove every step of a recipe against a source whose extra columns are `extra`.

    Raises RecipeError with the step, the problem and the nearest name; MissingExtra when a step's packages are not
    installed (unless `require_packages` is false, for listings).
    """
    base = base_schema(extra)
    hidden = [] if recipe.source.caption is not None else ["caption"]
    names = _Names(base, hidden)
    later = _made_later(recipe)
    planned: list[PlannedStep] = []
    used: dict[str, int] = {}
    for position, step in enumerate(recipe.steps, 1):
        if step.name in used:
            cure = "give one of them an `as:`" if isinstance(step, OperatorStep) else "rename one"
            raise RecipeError(f"step {position}: the name {step.name!r} is taken by step {used[step.name]}; {cure}")
        used[step.name] = position
        unmade = {c: n for c, (p, n) in later.items() if p >= position and c not in names.types}
        if isinstance(step, FilterStep):
            planned.append(_plan_filter(position, step, names, unmade))
        else:
            planned.append(_plan_operator(position, step, recipe, names, unmade, require_packages))
    return Plan(recipe, tuple(planned), names.schema(), tuple(_warnings(planned)))


def _made_later(recipe: Recipe) -> dict[str, tuple[int, str]]:
    """Visible column → (position, step name) of the first step that makes it; steps with faults are left out."""
    found: dict[str, tuple[int, str]] = {}
    for position, step in enumerate(recipe.steps, 1):
        if isinstance(step, OperatorStep):
            try:
                operator = registry.operator(step.operator)
                contract = operator.contract(operator.options_type.model_validate(step.options))
            except (ValidationError, RecipeError, MissingExtra):
                continue
            for own in contract.writes.names:
                found.setdefault(_visible(operator.label, own, step.alias), (position, step.name))
    return found


def _visible(label: str, own: str, alias: str | None) -> str:
    """The name a step's own column is seen under: with `as: x`, `<label>_y` → `x_y` and any other c → `x_c`."""
    if alias is None:
        return own
    prefix = f"{label}_"
    return f"{alias}_{own[len(prefix) :] if own.startswith(prefix) else own}"


def _plan_filter(position: int, step: FilterStep, names: _Names, unmade: Mapping[str, str]) -> PlannedStep:
    checked = check_filter(step.name, step.sql, names.schema(), unmade)
    inputs = tuple(names.input(c) for c in checked.columns)
    return PlannedStep(position, step.name, "filter", inputs=inputs, expression=checked)


def _plan_operator(
    position: int,
    step: OperatorStep,
    recipe: Recipe,
    names: _Names,
    unmade: Mapping[str, str],
    require_packages: bool,
) -> PlannedStep:
    operator = registry.operator(step.operator)
    where = f"step {position} ({step.name})"
    options = _bind_options(where, operator, step, recipe.seed)
    contract = operator.contract(options)
    if require_packages:
        _require_modules(where, contract)
        contract = with_fingerprints(where, contract)
    reads = [c for c in contract.reads if c != "image"]
    order = tuple(
        check_order(f"{where}: {option}", term, names.schema())
        for option, terms in order_options(options).items()
        for term in terms
    )
    wanted = dict.fromkeys([*reads, *(c for term in order for c in term.columns)])
    for column in wanted:
        _require_column(where, column, names, unmade)
    outputs = []
    inputs = tuple(names.input(c) for c in wanted)
    for column in contract.writes:
        visible = _visible(operator.label, column.name, step.alias)
        names.add(where, position, step.name, column.name, visible, column.type)
        outputs.append((column.name, visible))
    reason_column = f"{step.alias or operator.label}_reason"
    names.add(where, position, step.name, "reason", reason_column, pa.string())
    return PlannedStep(
        position,
        step.name,
        "group" if issubclass(operator, Group) else "stage",
        step.on_error,
        step.max_failed,
        operator,
        options,
        contract,
        inputs,
        tuple(outputs),
        reason_column,
        "image" in contract.reads,
        order,
    )


def _bind_options(where: str, operator: type[Operator[Any]], step: OperatorStep, seed: int) -> Options:
    given = dict(step.options)
    if "seed" in operator.options_type.model_fields:
        given.setdefault("seed", seed)
    try:
        return operator.options_type.model_validate(given)
    except ValidationError as error:
        raise RecipeError(describe_errors(where, error, operator.options_type, STEP_KEYS)) from None


def _require_modules(where: str, contract: Contract) -> None:
    missing = [m for m in contract.needs.modules if find_spec(m) is None]
    if missing:
        package = f"'mmdata[{contract.needs.extra}]'" if contract.needs.extra else missing[0]
        command = f"pip install {package}"
        raise MissingExtra(f"{where} needs {' and '.join(missing)}, not installed here: {command}")


def _require_column(where: str, column: str, names: _Names, unmade: Mapping[str, str]) -> None:
    if column in names.types:
        return
    if column in unmade:
        raise RecipeError(f"{where} reads column {column!r}, which step {unmade[column]} makes only later; move it up")
    if column == "caption":
        raise RecipeError(f"{where} reads the caption, but source.caption names no column of the list")
    maker = registry.maker(column)
    cure = f"; put {maker} before it" if maker else nearest(column, names.types)
    raise RecipeError(f"{where} reads column {column!r}, which nothing before it makes{cure}")


def _warnings(steps: Sequence[PlannedStep]) -> list[str]:
    """A duplicate group whose first row a later filter drops loses the whole cluster: say so."""
    found = []
    for group in (s for s in steps if s.kind == "group" and any(o.endswith("_rank") for o, _ in s.outputs)):
        made = {visible for _, visible in group.outputs}
        for step in steps[group.position :]:
            if step.kind == "filter" and not made & {i.visible for i in step.inputs}:
                found.append(
                    f"filter {step.name} follows {group.name} without reading its columns: where it drops the first "
                    f"row of a cluster, the whole cluster is gone; filter before {group.name} if you can"
                )
    return found


def _digest(document: Any) -> str:
    return hashlib.sha256(canonical_json(document).encode()).hexdigest()


def _identity_document(
    step: PlannedStep, resolved: Resolved | None, sets: Mapping[int, str], digest: str | None
) -> dict[str, Any]:
    """What decides a column set's values: see design 3.2. Columns enter as (set id, own name) or the bare base name."""
    assert step.operator is not None
    assert step.options is not None
    assert step.contract is not None
    references = {
        i.visible: i.own if i.made_by is None else [sets[i.made_by].rpartition("-")[2], i.own] for i in step.inputs
    }
    options = step.options.model_dump(mode="json")
    for name, columns in column_options(step.options).items():
        options[name] = [references[c] for c in columns]
    for name in order_options(step.options):
        options[name] = [[term.sql, [references[c] for c in term.columns]] for term in step.order]
    # What an option names may change its name. What the operator reads by a name of its own keeps it: two columns that
    # change places would otherwise be the same set of columns.
    named = {c for columns in column_options(step.options).values() for c in columns}
    named |= {c for term in step.order for c in term.columns} - set(step.contract.reads)
    contract = step.contract
    weights = {w.name: w.fingerprint for w in contract.weights}
    document: dict[str, Any] = {
        "name": step.operator.name,
        "version": step.operator.version,
        "options": options,
        "weights": {**weights, **(resolved.weights if resolved else {})},
        "precision": resolved.precision if resolved else contract.precision,
        "batch_shape": resolved.batch_shape if resolved else contract.batch_shape,
        "pixels": [vars(p) for p in contract.pixels],
        "reads": sorted(json.dumps(r if name in named else [name, r]) for name, r in references.items()),
        "media": step.media,
    }
    if digest is not None:
        document["rows"] = digest
    return document


def base_identity(step: PlannedStep, sets: Mapping[int, str]) -> str:
    """Hash of everything that is known before a machine resolves shape, precision and weights; names the state file."""
    return _digest(_identity_document(step, None, sets, None))[:16]


def identity(
    step: PlannedStep, resolved: Resolved, sets: Mapping[int, str], digest: str | None = None
) -> tuple[str, dict[str, Any], str]:
    """(set name, identity document, full hash) of a stage, or of a group over the rows that `digest` names.

    `sets` gives the set name of every earlier step that makes columns.
    """
    assert step.operator is not None
    document = _identity_document(step, resolved, sets, digest)
    full = _digest(document)
    return f"{step.operator.name}-{full[:16]}", document, full


def chain(steps: Sequence[PlannedStep], sets: Mapping[int, str]) -> str:
    """16 hex digits: the format and, per step, what it keeps and by which identity."""
    parts: list[Any] = [FORMAT_VERSION]
    for step in steps:
        if step.kind == "filter":
            assert step.expression is not None
            references = [i.own if i.made_by is None else [sets[i.made_by], i.own] for i in step.inputs]
            parts.append(["filter", step.name, step.expression.sql, references])
        else:
            parts.append([step.on_error, step.name, sets[step.position]])
    return _digest(parts)[:16]


def device_class(device: str) -> str:
    """`cpu` or `cuda`, of a device such as `cuda:0`."""
    return re.split(r"[:.]", device)[0]
