"""A user's own operators: Python files that a recipe names under `operators:`.

In: the path of a file. Out: an `OperatorFile` with the Stage and Group classes it defines, by decorator or by class.
The file runs once a process, from its bytes as they were read, as a module of a private name; nothing else sees it, and
two recipes with different files never mix. The sha256 of the file is the `version` of every operator in it, whatever
the class says: edit the file, and what it computes is computed anew. It is sent to workers as those same bytes.
What a file imports beside it is neither hashed nor sent: a file stands alone, on installed packages.

RecipeError names file and line: the file is not there, does not run, defines no operator, or a name is taken.
"""

from __future__ import annotations

import ast
import hashlib
import linecache
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from types import ModuleType
from typing import Any

from mmdata import registry
from mmdata.errors import MmdataError, RecipeError, StoreError
from mmdata.stage import Group, Operator, Stage

__all__ = ["OperatorFile", "at", "loaded", "operators_of", "read"]

_PREFIX = "mmdata_operators_"
_modules: dict[str, tuple[OperatorFile, tuple[type[Operator[Any]], ...]]] = {}
_lock = RLock()


@dataclass(frozen=True)
class OperatorFile:
    """A file of operators as it was read: `path` as the recipe names it. Pickles as its bytes, never as its classes."""

    path: str
    content: bytes = field(repr=False)
    sha256: str

    @property
    def module(self) -> str:
        """The private name it is loaded under: of this path and content, in every process."""
        return _PREFIX + hashlib.sha256(self.path.encode() + b"\0" + self.sha256.encode()).hexdigest()[:16]

    @property
    def operators(self) -> tuple[type[Operator[Any]], ...]:
        """The classes of the file, which runs now unless it has in this process."""
        with _lock:
            if self.module not in _modules:
                if hashlib.sha256(self.content).hexdigest() != self.sha256:
                    raise StoreError(f"the operators of {self.path} did not arrive whole; run the same command again")
                _modules[self.module] = self, _load(self)
            return _modules[self.module][1]

    def line_of(self, class_name: str) -> int:
        """Where a class or function of this name is defined; 1 where nobody knows."""
        for node in ast.walk(ast.parse(self.content)):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == class_name:
                return node.lineno
        return 1


def read(path: str) -> OperatorFile:
    """Read a file of this machine and run it."""
    if "://" in path:
        raise RecipeError(f"operators: {path}: name a file on this machine; code is not fetched")
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise RecipeError(f"operators: there is no file {path}, seen from {Path.cwd()}") from None
    except OSError as error:
        raise RecipeError(f"operators: cannot read {path}: {error.strerror}") from None
    file = OperatorFile(path, content, hashlib.sha256(content).hexdigest())
    _ = file.operators
    return file


def _load(file: OperatorFile) -> tuple[type[Operator[Any]], ...]:
    module = ModuleType(file.module)
    module.__file__ = file.path
    # A class that is looked up by its module while the file runs (pydantic does) must find it.
    sys.modules[file.module] = module
    text = file.content.decode(errors="replace")
    linecache.cache[file.path] = (len(text), None, text.splitlines(keepends=True), file.path)
    try:
        with registry.collect() as found:
            exec(compile(file.content, file.path, "exec", dont_inherit=True), module.__dict__)
            for value in list(vars(module).values()):
                if _is_operator(value) and value.__module__ == file.module and value.name and value not in found:
                    _register(file, value)
        if not found:
            nameless = [v.__name__ for v in vars(module).values() if _is_operator(v) and v.__module__ == file.module]
            hint = f" (class {nameless[0]} has no `name`)" if nameless else ""
            raise RecipeError(f"operators: {file.path} defines no operator{hint}; see mmdata.stage")
    except BaseException as error:
        del sys.modules[file.module]
        if isinstance(error, SyntaxError):
            raise RecipeError(f"operators: {file.path}:{error.lineno or 1}: {error.msg}") from None
        if not isinstance(error, Exception | SystemExit):
            raise
        if isinstance(error, MmdataError) and str(error).startswith("operators: "):
            raise
        what = str(error) if isinstance(error, MmdataError) else f"{type(error).__name__}: {error}"
        raise RecipeError(f"operators: {at(error).removeprefix(' at ') or file.path}: {what}") from error
    for operator in found:
        operator.version = file.sha256
    return tuple(found)


def _is_operator(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Stage | Group)


def _register(file: OperatorFile, operator: type[Operator[Any]]) -> None:
    try:
        registry.register(operator)
    except RecipeError as error:
        raise RecipeError(f"operators: {file.path}:{file.line_of(operator.__name__)}: {error}") from None


def operators_of(files: Sequence[OperatorFile]) -> dict[str, type[Operator[Any]]]:
    """Operator name → class, over the files of one recipe; RecipeError when a name is there twice."""
    found: dict[str, type[Operator[Any]]] = {}
    homes: dict[str, OperatorFile] = {}
    for file in files:
        for operator in file.operators:
            name = operator.name
            if name in found:
                here, there = file.line_of(operator.__name__), homes[name].line_of(found[name].__name__)
                raise RecipeError(
                    f"operators: {file.path}:{here}: {homes[name].path}:{there} has an operator {name!r} too; "
                    "rename one of them"
                )
            found[name], homes[name] = operator, file
    return found


def loaded() -> list[OperatorFile]:
    """Every file that has run in this process."""
    return [file for file, _ in _modules.values()]


def at(error: BaseException) -> str:
    """Where in a user's own code something was raised, as ` at my_ops.py:12`: the innermost such frame.

    Own code is a file of operators, or the script or notebook that runs; empty where none is on the way.
    """
    found = ""
    trace = error.__traceback__
    while trace is not None:
        if str(trace.tb_frame.f_globals.get("__name__")).startswith((_PREFIX, "__main__")):
            found = f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found
