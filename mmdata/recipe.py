"""The recipe: what to build, as YAML, read into frozen pydantic models; its JSON schema is generated from them.

A recipe names a dataset folder, a source, how to fetch, the steps in order, and an export. Operators' options are
checked by the planner, which knows the classes; this module knows the shape. Errors name the place and the nearest
word.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    InstanceOf,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

from mmdata import operator_files, registry
from mmdata.block_lists import BlockOptions
from mmdata.errors import RecipeError, nearest
from mmdata.operator_files import OperatorFile
from mmdata.options import Written
from mmdata.recipe_yaml import from_yaml, text_of
from mmdata.secret_urls import require_no_credentials
from mmdata.settings import ExportOptions, FetchOptions, RecipeName
from mmdata.sources.kinds import KINDS, Source

__all__ = [
    "STEP_KEYS",
    "FilterStep",
    "OperatorStep",
    "Recipe",
    "describe_errors",
    "document_of",
    "load",
    "parse",
    "with_overrides",
]

STEP_KEYS = ("as", "on_error", "max_failed", "over")
_NAME = re.compile(r"[a-z][a-z0-9_]*")


class OperatorStep(Written):
    """A stage or group: the operator's name, its options as written, and the keys every step may have."""

    operator: str
    options: dict[str, Any] = Field(default_factory=dict)
    alias: str | None = Field(None, description="`as`: prefix of the step's columns, and its name")
    on_error: Literal["drop", "keep"] = "drop"
    max_failed: float = Field(0.05, ge=0, le=1, description="share of rows that may fail, judged from 200 rows on")
    over: Literal["kept", "all"] = Field("kept", description="the rows a group sees: those that reach it, or all")

    @property
    def name(self) -> str:
        """What the step is called: its `as`, else its operator."""
        return self.alias or self.operator


class FilterStep(BaseModel):
    """One SQL expression over columns; rows for which it is TRUE go on."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    sql: str


# A path where people write and read it; the file itself, read and run once, in the recipe.
_OperatorFile = Annotated[
    InstanceOf[OperatorFile],
    PlainSerializer(lambda file: file.path, return_type=str),
    WithJsonSchema({"type": "string"}),
]


class Recipe(Written):
    """A recipe as the user wrote it, with defaults filled in."""

    name: RecipeName = Field(pattern=r"\S", max_length=200, description="a short name, used in cards and reports")
    seed: int = Field(0, ge=0, lt=1 << 63, description="enters every operator that draws random numbers")
    dataset: str = Field(pattern=r"\S", description="the dataset folder: made, or resumed")
    source: Source | tuple[Source, ...] = Field(description="where the rows come from; a list grows by appending to it")
    fetch: FetchOptions = Field(default_factory=FetchOptions, description="how media is fetched and stored")
    block: BlockOptions | None = Field(None, description="lists of what must never get in")
    operators: tuple[_OperatorFile, ...] = Field((), description="Python files with stages and groups of your own")
    steps: tuple[OperatorStep | FilterStep, ...] = Field((), description="stages, groups and filters, in order")
    export: ExportOptions | None = Field(None, description="what to write when the steps are done")

    @property
    def own(self) -> registry.Own:
        """Operator name → class, of the recipe's own files."""
        return operator_files.operators_of(self.operators)

    @property
    def sources(self) -> tuple[Source, ...]:
        """The sources in order, one or several; lists also read the columns that `fetch` names."""
        several = self.source if isinstance(self.source, tuple) else (self.source,)
        return tuple(s.with_given(self.fetch.given) if s.kind == "urls" else s for s in several)

    @field_validator("source", mode="before")
    @classmethod
    def _read_sources(cls, source: Any) -> Any:
        if isinstance(source, Sequence) and not isinstance(source, str):
            if not source:
                raise ValueError("expected at least one source")
            return tuple(_read_source(("source", str(number)), one) for number, one in enumerate(source))
        return _read_source(("source",), source)

    @field_validator("operators", mode="before")
    @classmethod
    def _read_operators(cls, paths: Any) -> Any:
        if paths is None:
            return ()
        if not isinstance(paths, Sequence) or isinstance(paths, str):
            raise ValueError("expected a list of files, such as [my_ops.py]")
        for path in paths:
            if not isinstance(path, str | Path | OperatorFile):
                raise ValueError("expected the path of a Python file")
        files = tuple(p if isinstance(p, OperatorFile) else operator_files.read(str(p)) for p in paths)
        operator_files.operators_of(files)
        return files

    @field_validator("steps", mode="before")
    @classmethod
    def _read_steps(cls, steps: Any, info: ValidationInfo) -> Any:
        if steps is None:
            return ()
        if not isinstance(steps, Sequence) or isinstance(steps, str):
            raise ValueError("expected a list of steps")
        own = operator_files.operators_of(info.data.get("operators", ()))
        return tuple(read for position, step in enumerate(steps, 1) for read in _read_step(position, step, own))


def _read_source(place: tuple[str, ...], source: Any) -> Any:
    """One source by its kind; `place` is where it stands, for messages."""
    if isinstance(source, BaseModel):
        return source
    if not isinstance(source, Mapping):
        raise RecipeError(
            f"{'.'.join(place)}: expected a mapping such as {{kind: images, path: photos}}, got {_short(source)}"
        )
    kind = source.get("kind", "urls")
    if not isinstance(kind, str) or kind not in KINDS:
        raise RecipeError(f"{'.'.join(place)}.kind: no source is called {kind!r}{nearest(str(kind), KINDS)}")
    try:
        return KINDS[kind].model_validate(dict(source))
    except ValidationError as error:
        raise RecipeError(_described(error, KINDS[kind], place=place)) from None


def _read_step(position: int, step: Any, own: registry.Own) -> Iterable[OperatorStep | FilterStep]:
    where = f"step {position}"
    if isinstance(step, OperatorStep | FilterStep):
        return [step]
    if step == "filter":
        return _read_filters(where, None)
    if isinstance(step, str):
        return [OperatorStep(operator=_known(where, step, own))]
    if not isinstance(step, Mapping) or len(step) != 1:
        raise RecipeError(f"{where}: expected a name, or one 'name: {{options}}', got {_short(step)}")
    [(name, body)] = step.items()
    if name == "filter":
        return _read_filters(where, body)
    return [_read_operator(where, _known(where, name, own), {} if body is None else body)]


def _read_filters(where: str, body: Any) -> list[FilterStep]:
    if not isinstance(body, Mapping) or not body:
        raise RecipeError(f"{where}: a filter is '{{name: SQL expression}}', got {_short(body)}")
    for name, sql in body.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise RecipeError(f"{where}: filter name {name!r} must be lower-case letters, digits and underscores")
        if not isinstance(sql, str):
            raise RecipeError(f"{where}: filter {name} must be an SQL expression in quotes, got {_short(sql)}")
    return [FilterStep(name=name, sql=sql) for name, sql in body.items()]


def _read_operator(where: str, name: str, body: Any) -> OperatorStep:
    if not isinstance(body, Mapping):
        raise RecipeError(f"{where} ({name}): options must be a mapping, got {_short(body)}")
    options = {str(k): v for k, v in body.items() if k not in STEP_KEYS}
    keys = {("alias" if k == "as" else k): v for k, v in body.items() if k in STEP_KEYS}
    alias = keys.get("alias")
    if alias is not None and not (isinstance(alias, str) and _NAME.fullmatch(alias)):
        raise RecipeError(f"{where} ({name}): as: {alias!r} must be lower-case letters, digits and underscores")
    try:
        return OperatorStep(operator=name, options=options, **keys)
    except ValidationError as error:
        raise RecipeError(describe_errors(f"{where} ({name})", error, OperatorStep)) from None


def _known(where: str, name: Any, own: registry.Own) -> str:
    known = [*registry.names(own), "filter"]
    if not isinstance(name, str) or name not in known:
        raise RecipeError(f"{where}: no operator is called {name!r}{nearest(str(name), known)}")
    return name


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with `--set` overrides applied; RecipeError names the file and the place."""
    return parse(text_of(path), where=str(path), overrides=overrides)


def parse(recipe: str | Mapping[str, Any] | Recipe, where: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from YAML text or a mapping; `where` begins every error message."""
    if isinstance(recipe, Recipe):
        return recipe
    try:
        document = from_yaml(recipe) if isinstance(recipe, str) else dict(recipe)
        if not isinstance(document, dict):
            raise RecipeError("expected a mapping with name, dataset, source and steps")
        document = with_overrides(document, overrides)
        require_no_credentials(document)
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise RecipeError(describe_errors(where, error, Recipe)) from None
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None


def describe_errors(where: str, error: ValidationError, model: type[BaseModel], also: Sequence[str] = ()) -> str:
    """One sentence for the first thing pydantic found, with the nearest name for one that is not known.

    `also`: names that are options at the top although `model` has no such field.
    """
    return f"{where}: {_described(error, model, also)}"


def _described(
    error: ValidationError, model: type[BaseModel], also: Sequence[str] = (), place: tuple[str, ...] = ()
) -> str:
    """As `describe_errors`, without its beginning; `place` is where the model stands in the recipe."""
    first = error.errors(include_url=False)[0]
    inner = [str(part) for part in first["loc"]]
    location = [*place, *inner]
    where = ".".join(location)
    more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        inside = "".join(f"{part}: " for part in location[:-1])
        known = [*_fields_at(model, inner[:-1]), *(also if len(location) == 1 else ())]
        return f"{inside}no option is called {location[-1]!r}{nearest(location[-1], known)}{more}"
    if first["type"] == "missing":
        return f"{where} is required but not given{more}"
    message = first["msg"].removeprefix("Value error, ")
    is_whole = first["type"] == "value_error" and isinstance(first.get("input"), Mapping)  # options that do not agree
    got = "" if is_whole else f", got {_short(first.get('input'))}"
    return f"{where + ': ' if where else ''}{message[:1].lower()}{message[1:]}{got}{more}"


def _fields_at(model: type[BaseModel], location: Sequence[str]) -> list[str]:
    for part in location:
        info = model.model_fields.get(part)
        annotation = info.annotation if info else None
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        found = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not found:
            return []
        model = found[0]
    return list(model.model_fields)


def with_overrides(document: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`--set` assignments applied to a recipe document.

    `steps.<step name>.<option>=value` and `filters.<filter name>=SQL` address steps by name; any other dotted path
    addresses the document itself (`fetch.timeout_s=5`, `dataset=elsewhere`). Values are read as YAML, filters as text.
    """
    result: dict[str, Any] = _deep_copy(document)
    for assignment in overrides:
        path, equals, text = assignment.partition("=")
        parts = path.strip().split(".")
        if not equals or not all(parts):
            raise RecipeError(f"--set {assignment!r}: expected path=value, such as fetch.timeout_s=5")
        if parts[0] == "filters":
            _set_filter(result, parts, text)
        elif parts[0] == "steps":
            _set_option(result, parts, _value(path, text))
        else:
            _set_plain(result, parts, _value(path, text))
    return result


def _value(path: str, text: str) -> Any:
    try:
        return from_yaml(text)
    except RecipeError as error:
        raise RecipeError(f"--set {path}: {error}") from None


def _deep_copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _deep_copy(v) for k, v in value.items()}
    return [_deep_copy(v) for v in value] if isinstance(value, list | tuple) else value


def _set_filter(document: dict[str, Any], parts: list[str], sql: str) -> None:
    if len(parts) != 2:
        raise RecipeError(f"--set {'.'.join(parts)}: expected filters.<name>")
    known = []
    for step in document.get("steps") or []:
        body = step.get("filter") if isinstance(step, dict) else None
        if isinstance(body, dict):
            known += list(body)
            if parts[1] in body:
                body[parts[1]] = sql.strip()
                return
    near = nearest(parts[1], known) or "; the recipe has no filters"
    raise RecipeError(f"--set: no filter is called {parts[1]!r}{near}")


def _set_option(document: dict[str, Any], parts: list[str], value: Any) -> None:
    if len(parts) != 3:
        raise RecipeError(f"--set {'.'.join(parts)}: expected steps.<step name>.<option>")
    steps = document.get("steps") or []
    known = []
    for index, step in enumerate(steps):
        operator, body = (step, {}) if isinstance(step, str) else next(iter(step.items()), (None, None))
        if operator == "filter" or not isinstance(operator, str):
            continue
        body = dict(body or {})
        name = body.get("as") or operator
        known.append(name)
        if name == parts[1]:
            steps[index] = {operator: {**body, parts[2]: value}}
            return
    near = nearest(parts[1], known) or "; the recipe has no stages or groups"
    raise RecipeError(f"--set: no step is called {parts[1]!r}{near}")


def _set_plain(document: dict[str, Any], parts: list[str], value: Any) -> None:
    if parts[0] not in Recipe.model_fields:
        known = [*Recipe.model_fields, "filters"]
        raise RecipeError(f"--set: a recipe has no {parts[0]!r}{nearest(parts[0], known)}")
    target: Any = document
    for part in parts[:-1]:
        target = _inner(target, part, parts)
    if isinstance(target, list):
        target[_place_in(target, parts[-1], parts)] = value
    else:
        target[parts[-1]] = value


def _inner(target: Any, part: str, parts: list[str]) -> Any:
    """The mapping or list under `part`, made where nothing is there; a list (of sources) is addressed by number."""
    if isinstance(target, list):
        inner = target[_place_in(target, part, parts)]
    else:
        inner = target.get(part)
        if inner is None:
            inner = target[part] = {}
    if not isinstance(inner, dict | list):
        raise RecipeError(f"--set {'.'.join(parts)}: {part} is not a mapping")
    return inner


def _place_in(target: list[Any], part: str, parts: list[str]) -> int:
    if not part.isdigit() or int(part) >= len(target):
        raise RecipeError(f"--set {'.'.join(parts)}: expected a number from 0 to {len(target) - 1}, got {part!r}")
    return int(part)


def document_of(recipe: Recipe) -> dict[str, Any]:
    """The recipe as a user writes it, with every default filled in: `parse` gives the same recipe back."""
    document = recipe.model_dump(mode="json", exclude={"steps", "export"})
    document["steps"] = [_step_document(step) for step in recipe.steps]
    if recipe.export is not None:
        document["export"] = recipe.export.model_dump(mode="json")
    return document


def _step_document(step: OperatorStep | FilterStep) -> dict[str, Any]:
    if isinstance(step, FilterStep):
        return {"filter": {step.name: step.sql}}
    keys = {"as": step.alias, "on_error": step.on_error, "max_failed": step.max_failed, "over": step.over}
    defaults = {"as": None, **{k: OperatorStep.model_fields[k].default for k in keys if k != "as"}}
    return {step.operator: {**step.options, **{k: v for k, v in keys.items() if v != defaults[k]}}}
