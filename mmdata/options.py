"""Options of operators: frozen pydantic models, whose fields may be marked as naming columns, orders or datasets.

The planner treats a marked option by its kind: a column enters an identity as what it is, not as what it is called.
"""

from __future__ import annotations

from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

__all__ = [
    "ColumnName",
    "DatasetPath",
    "FilePath",
    "NoOptions",
    "Options",
    "OrderBy",
    "TextColumn",
    "Written",
    "column_options",
    "dataset_options",
    "file_options",
    "order_options",
    "text_options",
]


class Written(BaseModel):
    """What a user writes: frozen, unknown names refused, and neither is `true` a number nor `"yes"` or 1 a truth."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        _check_truths(value, cls.model_fields[str(info.field_name)].annotation)
        return value


class Options(Written):
    """Base of every operator's options: as `Written`, each field with a description."""


def _check_truths(value: Any, annotation: Any) -> None:
    kinds = _alternatives(annotation)
    if isinstance(value, bool):
        if bool not in kinds and any(kind in kinds for kind in (int, float)):
            raise ValueError("expected a number")
    elif isinstance(value, list | tuple):
        for kind in kinds:
            inner = get_args(kind)
            if get_origin(kind) in (list, tuple) and (len(inner) == 1 or inner[1:] == (...,)):
                for one in value:
                    _check_truths(one, inner[0])
    elif value is not None and set(kinds) <= {bool, type(None)}:
        raise ValueError("expected true or false")


def _alternatives(annotation: Any) -> list[Any]:
    """The types a value may have: the members of a union, of `Literal` the types of its values."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _alternatives(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [kind for member in get_args(annotation) for kind in _alternatives(member)]
    return [type(value) for value in get_args(annotation)] if origin is Literal else [annotation]


class NoOptions(Options):
    """For operators that have none."""


class _ColumnMarker:
    """Marks an option whose value names a column; the planner replaces it by that column's identity."""


class _TextMarker(_ColumnMarker):
    """Marks an option whose value names a column of text; the planner refuses one of another type."""


class _OrderMarker:
    """Marks an option that holds SQL ordering terms over columns, such as `width_px * height_px desc`."""


class _FileMarker:
    """Marks an option that says where a file is: what it holds enters the identity (as weights do), its path not."""


class _DatasetMarker:
    """Marks an option that names other datasets, whose kept rows a group compares its own with."""


ColumnName = Annotated[str, _ColumnMarker()]
TextColumn = Annotated[str, _TextMarker()]
FilePath = Annotated[str, _FileMarker()]
OrderBy = Annotated[str, _OrderMarker()]
DatasetPath = Annotated[str, _DatasetMarker()]


def _marked(options_type: type[Options], marker: type) -> list[str]:
    found = []
    for name, info in options_type.model_fields.items():
        annotations = [*info.metadata]
        for arg in _walk(info.annotation):
            annotations.extend(getattr(arg, "__metadata__", ()))
        if any(isinstance(a, marker) for a in annotations):
            found.append(name)
    return found


def _walk(annotation: Any) -> list[Any]:
    return [annotation] + [a for arg in get_args(annotation) for a in _walk(arg)]


def _values(options: Options, names: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        value = getattr(options, name)
        found[name] = [] if value is None else [value] if isinstance(value, str) else list(value)
    return found


def column_options(options: Options) -> dict[str, list[str]]:
    """Option name → the columns it names, for every option of type `ColumnName` or `TextColumn`."""
    return _values(options, _marked(type(options), _ColumnMarker))


def text_options(options: Options) -> dict[str, list[str]]:
    """Option name → the columns it names, for every option of type `TextColumn`."""
    return _values(options, _marked(type(options), _TextMarker))


def file_options(options: Options) -> list[str]:
    """The options of type `FilePath`, which say where files are."""
    return _marked(type(options), _FileMarker)


def dataset_options(options: Options) -> dict[str, list[str]]:
    """Option name → the datasets it names, for every option of type `DatasetPath`."""
    return _values(options, _marked(type(options), _DatasetMarker))


def order_options(options: Options) -> dict[str, list[str]]:
    """Option name → its ordering terms, for every option of type `OrderBy`."""
    return _values(options, _marked(type(options), _OrderMarker))
