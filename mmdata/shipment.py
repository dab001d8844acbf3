"""A context on its way to workers: files of operators as bytes, then the rest, which names their classes.

In: what the items of a pass share. Out: bytes that another process opens, on another machine too. A worker runs the
files first, so that their names are known there; a file system that both see is not needed. The bytes go from a driver
to workers it started, and nowhere else. RecipeError when an operator cannot be sent, MissingExtra when a worker cannot
import what it needs.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mmdata.errors import MissingExtra, RecipeError
from mmdata.operator_files import OperatorFile, loaded

__all__ = ["Shipment", "packed", "unpacked"]


@dataclass(frozen=True)
class Shipment:
    """What travels: the operator files that are needed, and the pickled rest."""

    files: tuple[OperatorFile, ...]
    payload: bytes

    @classmethod
    def of(cls, context: Any, dumps: Callable[[Any], bytes]) -> Shipment:
        """Pack it with `dumps`, which may send by value what a notebook or a script defines itself."""
        try:
            payload = dumps(context)
        except Exception as error:
            raise RecipeError(
                f"an operator of this script or notebook cannot be sent to workers ({type(error).__name__}: {error}); "
                "put it into a file of its own and name that under `operators:`, or use --runner inline"
            ) from error
        return cls(tuple(f for f in loaded() if f.module.encode() in payload), payload)

    def open(self) -> Any:
        """The context, in a worker."""
        for file in self.files:
            _ = file.operators
        try:
            return pickle.loads(self.payload)
        except ImportError as error:
            raise MissingExtra(
                f"a worker on {os.uname().nodename} cannot import what an operator needs ({error}): install it there, "
                "or put the operator into a file and name that under `operators:`"
            ) from error


def packed(value: Any) -> bytes:
    """A message between a driver and a worker process that it started."""
    return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)


def unpacked(data: bytes) -> Any:
    """Back from `packed`: read from a pipe that nobody but the two has, never from a file or the network."""
    return pickle.loads(data)
