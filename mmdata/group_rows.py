"""The rows that survive to a group, for one that streams: a shard's columns in memory at a time.

In: views of the shards and which of their rows the group sees. Out: `mmdata.stage.GroupRows`, read anew at every
question. Fails: a column that the step does not read is a ContractError, files that contradict the dataset are a
StoreError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mmdata.errors import ContractError
from mmdata.filters import FilterEngine
from mmdata.groups.mapped import Mapped
from mmdata.plan import PlannedStep
from mmdata.row_order import order_of_parts
from mmdata.stage import OlderRows
from mmdata.survivors import Mask, ShardView

__all__ = ["SurvivingRows"]


@dataclass(frozen=True)
class SurvivingRows:
    """See `mmdata.stage.GroupRows`. `alive` maps shard → (N,) bool, shards ascending; `view` opens a shard afresh."""

    step: PlannedStep
    alive: Mapping[int, Mask]
    view: Callable[[int], ShardView]
    engine: FilterEngine
    older: OlderRows | None = None

    def __len__(self) -> int:
        return sum(int(alive.sum()) for alive in self.alive.values())

    def row_ids(self) -> npt.NDArray[np.int64]:
        """See `GroupRows`."""
        found = [part.column("row_id").to_numpy() for part in self.parts(())]
        return np.concatenate([np.zeros(0, np.int64), *found])

    def parts(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """See `GroupRows`; a part is what is left of one shard."""
        known = {i.visible: i for i in self.step.inputs}
        if unknown := [c for c in columns if c not in known]:
            raise ContractError(f"group {self.step.name} asks for {unknown}, which its contract does not read")
        for shard, alive in self.alive.items():
            yield self.view(shard).gather([known[c] for c in columns], np.flatnonzero(alive))

    def read(self, columns: Sequence[str]) -> pa.Table:
        """See `GroupRows`."""
        return pa.concat_tables(self.parts(columns)).combine_chunks()

    def visit_order(self) -> npt.NDArray[np.int64]:
        """See `GroupRows`."""
        if not self.step.order:
            return np.arange(len(self))
        return self.engine.order(self.read(self._ordering()), self.step.order)

    def visit_order_in(self, scratch: Path) -> npt.NDArray[np.int64] | None:
        """See `GroupRows`."""
        if not self.step.order or not len(self):
            return None
        order: npt.NDArray[np.int64] = Mapped(scratch).array(np.int64, len(self))
        order_of_parts(self.parts(self._ordering()), self.step.order, scratch, order)
        return order

    def _ordering(self) -> list[str]:
        """The columns that the `prefer` terms read, without row_id."""
        named = dict.fromkeys(column for term in self.step.order for column in term.columns)
        return [c for c in named if c != "row_id"]
