"""What mmdata offers, generated from the registry: the table of operators, one operator in full, shipped recipes."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from mmdata import registry
from mmdata.columns import BASE_COLUMNS, VERDICT_COLUMNS, Column, media_reference
from mmdata.errors import MissingExtra, RecipeError
from mmdata.recipe_schema import json_schema
from mmdata.shipped import recipe_folder, shipped_recipe, shipped_recipes
from mmdata.stage import Contract, Group, Lookup, Operator

__all__ = ["describe", "generated", "markdown_table", "recipe_folder", "shipped_recipe", "shipped_recipes", "table"]


def _contract(operator: type[Operator[Any]]) -> Contract | None:
    """The contract under default options; None when an option is required, or its data is not on this machine."""
    try:
        return registry.contract(operator, operator.options_type())
    except (ValidationError, RecipeError, MissingExtra):
        return None


def _row(name: str) -> tuple[str, str, str, str, str]:
    operator = registry.operator(name)
    contract = _contract(operator)
    shape = "group" if issubclass(operator, Group) else "stage"
    if issubclass(operator, Lookup):
        shape = "filter" if operator.is_filter else "attach"
    reads = ", ".join(contract.reads) if contract else ""
    writes = ", ".join(f.name for f in contract.writes) if contract else ""
    return name, shape, _summary(operator), reads, writes


def _summary(operator: type[Operator[Any]]) -> str:
    return (inspect.getdoc(operator) or "").split("\n\n")[0].replace("\n", " ").strip()


def table() -> str:
    """Every operator, a line each, for a terminal; those of installed packages say which.

    A package whose operator cannot be loaded has a line that says why.
    """
    names = registry.names()
    width = max(map(len, names))
    lines = []
    for name in names:
        try:
            _, shape, summary, *_ = _row(name)
            origin = registry.origin(name)
            lines.append(f"{name:<{width}}  {shape}  {summary}" + ("" if origin == "mmdata" else f" [{origin}]"))
        except RecipeError as error:
            lines.append(f"{name:<{width}}  -      {error}")
    return "\n".join(lines)


def markdown_table() -> str:
    """Every operator of mmdata itself as a Markdown table, for the README."""
    lines = ["| operator | shape | what it does | reads | adds |", "| --- | --- | --- | --- | --- |"]
    for name, shape, summary, reads, writes in map(_row, registry.built_in()):
        reads_, writes_ = (", ".join(f"`{c}`" for c in text.split(", ") if c) for text in (reads, writes))
        lines.append(f"| `{name}` | {shape} | {summary} | {reads_} | {writes_} |")
    return "\n".join(lines)


def generated() -> dict[str, str]:
    """The files under `schemas/`, name → text: JSON Schema of a recipe, and the columns of base rows and verdicts."""
    described = {
        "recipe.schema.json": json_schema(),
        "base_rows.json": _columns([*BASE_COLUMNS, *media_reference("image")]),
        "verdicts.json": _columns(VERDICT_COLUMNS),
    }
    return {name: json.dumps(value, indent=2, ensure_ascii=False) + "\n" for name, value in described.items()}


def _columns(columns: Iterable[Column]) -> list[dict[str, str]]:
    return [{"name": c.name, "arrow_type": str(c.type), "unit": c.unit, "meaning": c.meaning} for c in columns]


def describe(name: str) -> str:
    """One operator: its documentation, options with defaults, and the columns it adds."""
    operator = registry.operator(name)
    origin = registry.origin(name)
    parts = [name, *([] if origin == "mmdata" else [f"[{origin}]"]), "", inspect.getdoc(operator) or "", "", "Options:"]
    for option, info in operator.options_type.model_fields.items():
        default = "required" if info.is_required() else _default(info)
        parts.append(f"  {option} ({default}): {info.description or ''}".rstrip())
    if not operator.options_type.model_fields:
        parts.append("  none")
    contract = _contract(operator)
    if contract is not None:
        parts += ["", "Adds:", *(f"  {f.name}: {f.type}" for f in contract.writes)]
        if contract.needs.extra:
            parts += ["", f"Needs: pip install 'mmdata[{contract.needs.extra}]'"]
    return "\n".join(parts)


def _default(info: Any) -> str:
    return repr(info.get_default(call_default_factory=True))
