"""The errors of mmdata, named by who must act.

MmdataError
├─ RecipeError      the recipe is wrong; nothing has run               the user edits YAML; exit 2
├─ SourceError      the input cannot be read or has the wrong shape    the user; exit 2
├─ MissingExtra     a package or weights are not there                 the user types the command given; exit 2
├─ ContractError    a stage broke its promise                          its author; the run stops
├─ StoreError       the folder disagrees with itself, or the disk is full   the operator; the run stops, nothing is lost
│  └─ MissingMedia  media that a dataset adopted is gone or changed   nobody: it costs that row; an export stops
├─ RetryableError   network trouble or a lost worker                   the runner, then the operator
└─ BudgetError      too many bad rows                                  the operator looks at the data

A bad *sample* is never an exception beyond its row: it is a `Failed` cell (see `mmdata.stage`) and a reason in the
ledger. Every error here pickles, so that workers can raise it in another process.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BudgetError",
    "ContractError",
    "MissingExtra",
    "MissingMedia",
    "MmdataError",
    "RecipeError",
    "RetryableError",
    "SourceError",
    "StoreError",
    "nearest",
]


class MmdataError(Exception):
    """Root of everything mmdata raises on purpose; `exit_code` is what the command line returns for it."""

    exit_code = 1


class RecipeError(MmdataError):
    """The recipe, or an option on the command line, is wrong; nothing has run."""

    exit_code = 2


class SourceError(MmdataError):
    """The input cannot be read, or does not have the shape the recipe says."""

    exit_code = 2


class MissingExtra(MmdataError):
    """A package or a weights file is not there; the message is the command that brings it."""

    exit_code = 2


class ContractError(MmdataError):
    """A stage or group broke its promise (wrong columns, lengths or types, or it fails on every row)."""


class StoreError(MmdataError):
    """The dataset folder disagrees with itself, is held by another run, or cannot be written."""


class MissingMedia(StoreError):
    """Adopted media is not where the row says, or has another size; `transient`: it could not be reached just now."""

    def __init__(self, message: str, transient: bool = False) -> None:
        super().__init__(message, transient)
        self.transient = transient

    def __str__(self) -> str:
        """The message alone."""
        return str(self.args[0])


class RetryableError(MmdataError):
    """Trouble that another attempt may cure: a lost worker, a storage timeout."""


class BudgetError(MmdataError):
    """More rows of a step failed than its `max_failed` allows; finished work is kept."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or the known words when none is near, for the end of a message."""
    choices = sorted(known)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(choices[:40])}" if choices else ""
