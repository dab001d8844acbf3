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
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, Literal

import pyarrow as pa
from pydantic import ValidationError

from mmdata import registry
from mmdata.column_files import canonical_json
from mmdata.columns import FORMAT_VERSION, base_schema, fetched_schema, is_aside
from mmdata.errors import MissingExtra, RecipeError, SourceError, nearest
from mmdata.filters import check_filter, check_order, renamed
from mmdata.planned import Input, Pass, Plan, PlannedStep, Resolved
from mmdata.recipe import STEP_KEYS, FilterStep, OperatorStep, Recipe, describe_errors
from mmdata.stage import Contract, Group, Lookup, Operator, Options, column_options, file_options, order_options
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
    base = _base_rows(recipe, extra)
    hidden = [] if any(source.has_captions for source in recipe.sources) else ["caption"]
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
    steps = _ungated(planned)
    return Plan(recipe, tuple(steps), names.schema(), tuple(_warnings(steps)))


def _base_rows(recipe: Recipe, extra: pa.Schema | None) -> pa.Schema:
    """The columns of base rows; RecipeError where fetching and the source's own columns do not go together."""
    fetch = recipe.fetch
    if not any(source.is_fetched for source in recipe.sources):
        return base_schema(extra)
    found = fetched_schema(extra, fetch.media, fetch.store, fetch.compute_hash)
    if found.names != base_schema(extra).names and not all(source.is_fetched for source in recipe.sources):
        options = {"media": "image", "store": "resized", "compute_hash": None}
        name = next(n for n, usual in options.items() if getattr(fetch, n) != usual)
        raise RecipeError(
            f"fetch.{name}: {getattr(fetch, name)} gives rows columns that adopted media has not; make a dataset of "
            "the list alone"
        )
    if fetch.compute_hash is not None and [n.lower() for n in found.names].count(fetch.compute_hash) > 1:
        raise RecipeError(
            f"fetch.compute_hash writes a column {fetch.compute_hash!r}, and source.columns names one: leave one of "
            "them out (fetch.verify_hash reads its column anyway)"
        )
    return found


def _ungated(steps: Sequence[PlannedStep]) -> list[PlannedStep]:
    """The steps, each knowing the `over: all` groups that read it: for those it covers all rows, filters or not.

    RecipeError when such a group reads, through whatever stages, a group that saw only the rows that reached it.
    """
    readers: dict[int, set[int]] = {}
    for group in (s for s in steps if s.over == "all"):
        open_steps, seen = [group], {group.position}
        while open_steps:
            for position in {i.made_by for i in open_steps.pop().inputs if i.made_by is not None} - seen:
                step = steps[position - 1]
                if step.kind == "keep_list":
                    continue  # it covers all rows, and as a filter it takes none away here
                if step.kind == "group" and step.over != "all":
                    raise RecipeError(
                        f"step {group.position} ({group.name}): over: all needs values for all rows, but step "
                        f"{step.name}, which it builds on, sees only those that reach it; give {step.name} over: all"
                    )
                readers.setdefault(position, set()).add(group.position)
                seen.add(position)
                open_steps.append(step)
    return [replace(s, ungated_for=frozenset(readers.get(s.position, ()))) for s in steps]


def _made_later(recipe: Recipe) -> dict[str, tuple[int, str]]:
    """Visible column → (position, step name) of the first step that makes it; steps with faults are left out."""
    found: dict[str, tuple[int, str]] = {}
    for position, step in enumerate(recipe.steps, 1):
        if isinstance(step, OperatorStep):
            try:
                operator = registry.operator(step.operator, recipe.own)
                contract = registry.contract(operator, operator.options_type.model_validate(step.options))
            except (ValidationError, RecipeError, SourceError, MissingExtra):
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
    operator = registry.operator(step.operator, recipe.own)
    where = f"step {position} ({step.name})"
    if step.over != "kept" and not issubclass(operator, Group):
        raise RecipeError(f"{where}: only a group can be `over: {step.over}`; a stage looks at one row at a time")
    options = _bind_options(where, operator, step, recipe.seed)
    try:
        contract = registry.contract(operator, options)
    except (RecipeError, SourceError) as error:
        raise type(error)(f"{where}: {error}") from None
    if require_packages:
        _require_modules(where, contract)
        contract = with_fingerprints(where, contract)
    reads = [c for c in contract.reads if c != "image"]
    if len(reads) < len(contract.reads):
        _require_images(where, recipe)
    order = tuple(
        check_order(f"{where}: {option}", term, names.schema())
        for option, terms in order_options(options).items()
        for term in terms
    )
    wanted = dict.fromkeys([*reads, *(c for term in order for c in term.columns)])
    for column in wanted:
        _require_column(where, column, names, unmade)
    _check_types(where, operator, options, names.schema())
    outputs: list[tuple[str, str]] = []
    aside: list[tuple[str, str]] = []
    inputs = tuple(names.input(c) for c in wanted)
    for column in contract.writes:
        visible = _visible(operator.label, column.name, step.alias)
        names.add(where, position, step.name, column.name, visible, column.type)
        (aside if is_aside(column) else outputs).append((column.name, visible))
    reason_column = f"{step.alias or operator.label}_reason"
    names.add(where, position, step.name, "reason", reason_column, pa.string())
    return PlannedStep(
        position,
        step.name,
        _kind(where, operator, step),
        step.on_error,
        # What a file from outside does not have is no fault: no budget for it unless one is given.
        1.0 if issubclass(operator, Lookup) and "max_failed" not in step.model_fields_set else step.max_failed,
        operator,
        options,
        contract,
        inputs,
        tuple(outputs),
        tuple(aside),
        reason_column,
        "image" in contract.reads,
        order,
        over=step.over,
    )


def _kind(
    where: str, operator: type[Operator[Any]], step: OperatorStep
) -> Literal["stage", "group", "attach", "keep_list"]:
    if not issubclass(operator, Lookup):
        return "group" if issubclass(operator, Group) else "stage"
    if operator.is_filter and {"on_error", "max_failed"} & step.model_fields_set:
        raise RecipeError(f"{where} is a filter, which fails no row: leave `on_error` and `max_failed` out")
    return "keep_list" if operator.is_filter else "attach"


def _bind_options(where: str, operator: type[Operator[Any]], step: OperatorStep, seed: int) -> Options:
    given = dict(step.options)
    if "seed" in operator.options_type.model_fields:
        given.setdefault("seed", seed)
    try:
        return operator.options_type.model_validate(given)
    except ValidationError as error:
        raise RecipeError(describe_errors(where, error, operator.options_type, STEP_KEYS)) from None


def _check_types(where: str, operator: type[Operator[Any]], options: Options, schema: pa.Schema) -> None:
    try:
        operator.check_types(options, schema)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None


def _require_modules(where: str, contract: Contract) -> None:
    missing = [m for m in contract.needs.modules if find_spec(m) is None]
    if missing:
        package = f"'mmdata[{contract.needs.extra}]'" if contract.needs.extra else missing[0]
        command = f"pip install {package}"
        raise MissingExtra(f"{where} needs {' and '.join(missing)}, not installed here: {command}")


def _require_images(where: str, recipe: Recipe) -> None:
    media = recipe.fetch.media
    if media in ("audio", "video") and all(source.is_fetched for source in recipe.sources):
        raise RecipeError(f"{where} reads images, and there are none: fetch.media is {media}; leave the step out")


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
    for group in (s for s in steps if s.kind == "group"):
        if not {"rank", "of"} <= {own.rpartition("_")[2] for own, _ in group.outputs}:
            continue
        made = {visible for _, visible in group.outputs}
        for step in steps[group.position :]:
            if step.kind in ("filter", "keep_list") and not made & {i.visible for i in step.inputs}:
                found.append(
                    f"filter {step.name} follows {group.name} without reading its columns: where it drops the first "
                    f"row of a cluster, the whole cluster is gone; filter before {group.name} if you can"
                )
        if group.over == "all":
            before = [s.name for s in steps[: group.position - 1] if s.kind in ("filter", "keep_list")]
            if before:
                found.append(
                    f"{group.name} is over all rows: where {', '.join(before)} drops the first row of a cluster, the "
                    f"whole cluster is gone; let `prefer` put the rows first that the filter keeps"
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
    options = step.options.model_dump(mode="json", exclude=set(file_options(step.options)))
    for name, columns in column_options(step.options).items():
        options[name] = [references[c] for c in columns if c in references]  # not read under the other options
    for name in order_options(step.options):
        options[name] = [renamed(term, {c: json.dumps(references[c]) for c in term.columns}) for term in step.order]
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
        "pixels": [p.document for p in contract.pixels],
        "reads": sorted(json.dumps(r if name in named else [name, r]) for name, r in references.items()),
        "media": step.media,
    }
    if step.operator.origin:
        document["origin"] = step.operator.origin
    if digest is not None:
        document["rows"] = digest
    if step.over != "kept":
        document["over"] = step.over
    return document


def base_identity(step: PlannedStep, sets: Mapping[int, str]) -> str:
    """Hash of everything that is known before a machine resolves shape, precision and weights; names the state file."""
    document = _identity_document(step, None, sets, None)
    added = step.operator.additions if step.operator is not None else ()
    document["options"] = {k: v for k, v in document["options"].items() if k not in added}
    return _digest(document)[:16]


def identity(
    step: PlannedStep,
    resolved: Resolved,
    sets: Mapping[int, str],
    digest: str | None = None,
    older: str | None = None,
) -> tuple[str, dict[str, Any], str]:
    """(set name, identity document, full hash) of a stage, or of a group over the rows that `digest` names.

    `sets` gives the set name of every earlier step that makes columns; `older` is the digest of the rows of other
    datasets that a group compares its own with.
    """
    assert step.operator is not None
    document = _identity_document(step, resolved, sets, digest)
    if older is not None:
        document["older_rows"] = older
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
