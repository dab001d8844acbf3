"""Which items run again after their worker died or its device failed, and when that stops the run instead.

The pool repeats nothing by itself, so that every death is counted here once.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import replace

import pyarrow.compute as pc

from mmdata.column_files import ColumnFile
from mmdata.errors import RetryableError
from mmdata.isolate import DeviceLost, DeviceOutOfMemory, FailsEverywhere
from mmdata.pool import Finished, Item
from mmdata.store import Store
from mmdata.survivors import BoundStep

__all__ = ["Repeats"]

DEATHS_OF_ITEM = 200  # each death makes the journal narrower, so this is never reached by a few bad rows
DEATHS_OF_RESOLVE = 3
_SMALLER = ("batch_shape", "batch_size", "precision", "model")  # options that make a model smaller, where it has them


class Repeats:
    """The deaths and device failures of one run. `files` and `bound` are the driver's own, and always up to date."""

    def __init__(
        self, store: Store, files: Mapping[str, MutableMapping[int, ColumnFile]], bound: Sequence[BoundStep]
    ) -> None:
        self._store, self._files, self._bound = store, files, bound
        self._deaths: Counter[tuple[str, int]] = Counter()  # (context, shard) → workers lost
        self._out_of_memory: set[tuple[str, int]] = set()

    def again(self, finished: Finished) -> Item | None:
        """The item to submit once more; None when it ended well. Raises the errors that a repeat does not mend."""
        item, error = finished.item, finished.error
        if finished.died is not None or isinstance(error, DeviceLost):
            self._count_death(item, finished.died or str(error))
        elif isinstance(error, DeviceOutOfMemory):
            if (item.context, item.shard) in self._out_of_memory:
                raise RetryableError(f"{error}, also after a restart; {self._smaller(error.step)}") from error
            self._out_of_memory.add((item.context, item.shard))
        elif isinstance(error, FailsEverywhere) and (proven := self._succeeded(item, error.step)):
            item = replace(item, proven=item.proven | proven)
        elif error is not None:
            raise error
        else:
            return None
        return self._renewed(item)

    def _count_death(self, item: Item, cause: str) -> None:
        self._deaths[item.context, item.shard] += 1
        limit = DEATHS_OF_RESOLVE if item.kind == "resolve" else DEATHS_OF_ITEM
        if self._deaths[item.context, item.shard] >= limit:
            raise RetryableError(f"the {item.name} lost its worker {limit} times ({cause}); the same command resumes")

    def _renewed(self, item: Item) -> Item:
        """The item as it is now: the dead worker may have committed columns, or a tar under its attempt's name."""
        if item.kind == "ingest":
            return replace(item, attempt=f"{item.attempt.rpartition('-')[0]}-{secrets.token_hex(4)}")
        if item.kind == "resolve":
            return item
        found = {}
        for name in self._files:
            file = self._store.newest_column_file(name, item.shard)
            if file is not None:
                found[name] = self._files[name][item.shard] = file
        return replace(item, files=found)

    def _succeeded(self, item: Item, step: str) -> frozenset[str]:
        """The set of the step, when some row of it has a value in this dataset and the item did not know."""
        for bound in self._bound:
            if bound.step.name == step and bound.set_name not in item.proven:
                for file in self._store.coverage(bound.set_name).values():
                    reasons = self._store.read_table(file.name, ["reason"]).column(0)
                    if pc.any(pc.is_null(reasons)).as_py():
                        return frozenset([bound.set_name])
        return frozenset()

    def _smaller(self, step: str) -> str:
        """What makes the step fit, and what that costs."""
        options = next((b.step.options for b in self._bound if b.step.name == step), None)
        names = [n for n in _SMALLER if n in type(options).model_fields] if options is not None else []
        cost = f"which computes the columns of {step}, and what reads them, anew"
        sets = " or ".join(f"--set steps.{step}.{name}=…" for name in names)
        sets = sets or f"--set steps.{step}.…"
        return f"free the device and run again, or make the model smaller with {sets}, {cost}"
