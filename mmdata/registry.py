"""Operator name → class, loaded when asked for: listing the names imports no operator and no model package."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from pydantic import ValidationError

from mmdata.errors import MmdataError, RecipeError, nearest
from mmdata.stage import Group, Operator, Stage

__all__ = ["maker", "names", "operator", "register"]

_BUILT_IN = {
    "probe_image": "mmdata.stages.probe_image:ProbeImage",
    "probe_text": "mmdata.stages.probe_text:ProbeText",
    "detect_language": "mmdata.stages.detect_language:DetectLanguage",
    "hash_image": "mmdata.stages.hash_image:HashImage",
    "score_clip": "mmdata.stages.score_clip:ScoreClip",
    "score_conse": "mmdata.stages.score_conse:ScoreConse",
    "exact_duplicates": "mmdata.groups.exact_duplicates:ExactDuplicates",
    "near_duplicates": "mmdata.groups.near_duplicates:NearDuplicates",
}
_registered: dict[str, type[Operator[Any]]] = {}


def register(operator_class: type[Operator[Any]]) -> type[Operator[Any]]:
    """Make an operator known by its `name` in this process; registering a name again replaces it (notebooks do)."""
    if not issubclass(operator_class, Stage | Group):
        raise TypeError(f"{operator_class.__name__} is neither a Stage nor a Group")
    if operator_class.name in _BUILT_IN:
        raise RecipeError(f"operator name {operator_class.name!r} is taken by mmdata; choose another")
    _registered[operator_class.name] = operator_class
    return operator_class


def names() -> list[str]:
    """Every operator name, built-in ones first, in their order."""
    return [*_BUILT_IN, *sorted(_registered)]


def operator(name: str) -> type[Operator[Any]]:
    """The class of an operator; RecipeError with the nearest name when there is none."""
    if name in _registered:
        return _registered[name]
    if name not in _BUILT_IN:
        raise RecipeError(f"no operator is called {name!r}{nearest(name, names())}")
    module, _, attribute = _BUILT_IN[name].partition(":")
    found: type[Operator[Any]] = getattr(import_module(module), attribute)
    return found


def maker(column: str) -> str | None:
    """The operator that adds a column of this name under its default options; None when there is none."""
    for name in names():
        try:
            found = operator(name)
            writes = found.contract(found.options_type()).writes.names
        except (ValidationError, MmdataError):  # an option is required, or weights are not there
            continue
        if column in writes:
            return name
    return None
