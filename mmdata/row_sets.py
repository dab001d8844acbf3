"""What a group is shown of rows, where it does not see all of them at once.

Only promises: `older_rows` keeps those of `OlderRows`, `group_rows` those of `GroupRows`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = ["GroupRows", "OlderRows"]


class OlderRows(Protocol):
    """The kept rows of other datasets, in the order of the option that names them, then in row order."""

    def parts(self) -> Iterator[pa.Table]:
        """All rows, some at a time: `place` (int64, from 0 in that order) and the columns the group's options name."""

    def look_up(self, places: npt.NDArray[np.int64]) -> pa.Table:
        """row_id, key and `dataset` (as the option names it) of the rows at these places, which ascend."""


class GroupRows(Protocol):
    """The rows that survive to a group that streams; nothing of them is held between two questions.

    Columns are those of the contract's `reads` and of the `prefer` terms; every table has `row_id` besides.
    """

    @property
    def older(self) -> OlderRows | None:
        """Kept rows of the datasets that an option of type `DatasetPath` names; None where none does."""

    def __len__(self) -> int: ...

    def row_ids(self) -> npt.NDArray[np.int64]:
        """(N,) int64, ascending."""

    def parts(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """All rows in row order, a shard at a time; may be asked for again."""

    def read(self, columns: Sequence[str]) -> pa.Table:
        """All rows in row order, at once: for narrow columns."""

    def visit_order(self) -> npt.NDArray[np.int64]:
        """(N,) int64: positions in row order, in the order of the `prefer` terms, ties by row_id."""

    def visit_order_in(self, scratch: Path) -> npt.NDArray[np.int64] | None:
        """As `visit_order`, in bounded memory: the array lies in a file in `scratch`. None: in row order."""
