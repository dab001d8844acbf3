"""Names, sizes and `__all__` of modules; errors that pickle; operators that are documented."""

from __future__ import annotations

import ast
import importlib
import inspect
import pickle
from collections.abc import Iterator

import pytest
from house import ROOT, modules
from pydantic import ValidationError

from mmdata import registry
from mmdata.errors import MmdataError
from mmdata.media.image import DecodeError

MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
LONG = "# long because:"
VAGUE = {"utils", "util", "core", "common", "helpers", "helper", "base", "manager", "misc"}


def _sources() -> Iterator[tuple[str, str]]:
    for folder in ("mmdata", "scripts"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


def test_no_file_and_no_function_is_long_without_saying_why() -> None:
    too_long = []
    for name, text in _sources():
        lines = text.splitlines()
        if len(lines) > MAX_FILE_LINES and LONG not in text:
            too_long.append(f"{name}: {len(lines)} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                size = node.end_lineno - node.lineno + 1
                if size > MAX_FUNCTION_LINES and LONG not in "\n".join(lines[node.lineno - 1 : node.end_lineno]):
                    too_long.append(f"{name}: {node.name} has {size} lines")
    assert too_long == []


def test_no_file_has_a_name_that_says_nothing() -> None:
    for folder in ("mmdata", "scripts", "tests"):
        assert [str(p) for p in (ROOT / folder).rglob("*") if p.stem in VAGUE] == []


def _public(tree: ast.Module) -> set[str]:
    """Classes and functions that a module defines for others; a command of the command line is no such function."""
    return {
        node.name
        for node in tree.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and not node.name.startswith("_")
        and not any(".command" in ast.unparse(d) or ".callback" in ast.unparse(d) for d in node.decorator_list)
    }


def _sort_key(name: str) -> tuple[int, str]:
    """Constants, classes, functions: the order that ruff's RUF022 keeps."""
    return (0 if name.isupper() else 1 if name[:1].isupper() else 2, name)


@pytest.mark.parametrize("name", sorted(modules()))
def test_all_is_there_complete_and_sorted(name: str) -> None:
    module = importlib.import_module(name)
    exported = getattr(module, "__all__", None)
    if exported is None:
        assert modules()[name].body == [] or name.count(".") == 1, f"{name} has no __all__"
        assert _public(modules()[name]) == set(), f"{name} has no __all__"
        return
    assert len(set(exported)) == len(exported)
    assert [n for n in exported if not hasattr(module, n)] == []
    assert _public(modules()[name]) - set(exported) - {"__getattr__"} == set()
    assert list(exported) == sorted(exported, key=_sort_key)


def _subclasses(of: type[BaseException]) -> list[type[BaseException]]:
    return [
        of,
        *(deeper for c in of.__subclasses__() if c.__module__.startswith("mmdata") for deeper in _subclasses(c)),
    ]


def _arguments(kind: type[BaseException]) -> int:
    """How many arguments its `__init__` asks for; one, the message, where it has none of its own."""
    if kind.__init__ is BaseException.__init__ or kind.__init__ is Exception.__init__:
        return 1
    return len([p for p in inspect.signature(kind).parameters.values() if p.default is p.empty])


def test_every_error_pickles() -> None:
    for name in modules():
        importlib.import_module(name)
    kinds = _subclasses(MmdataError)
    assert len(kinds) >= 8
    for kind in kinds:
        error = kind(*["step clip, shard 3: what it is", "clip", "third"][: _arguments(kind)])
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), vars(again)) == (kind, str(error), vars(error))


def test_a_decoders_error_pickles_with_its_kind() -> None:
    error = DecodeError("decode", "cut short")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.kind, str(again)) == (DecodeError, "decode", "cut short")


@pytest.mark.parametrize("name", registry.names())
def test_every_operator_is_documented(name: str) -> None:
    operator = registry.operator(name)
    text = operator.__doc__ or ""
    assert len(text.strip().splitlines()) >= 3, "a docstring says what is read, what is written, and what NULL means"
    assert "Reads" in text
    assert "Writes" in text
    assert "NULL" in text or "never" in text.lower()
    for field, info in operator.options_type.model_fields.items():
        assert info.description, f"option {field} of {name} has no description"
    written = operator.contract(operator.options_type()).writes.names if _has_defaults(name) else []
    prefix = operator.label + "_"
    missing = [c for c in written if c not in text and f"_{c.removeprefix(prefix)}" not in text]
    assert missing == []


def _has_defaults(name: str) -> bool:
    """Whether it has a default for everything, and those go together."""
    try:
        registry.operator(name).options_type()
    except ValidationError:
        return False
    return True
