"""In what order an epoch visits the kept rows, and which of them each consumer takes. Numbers only; nothing is read.

In: the kept rows of every shard, a seed, an epoch. The rows of an epoch stand in one line: shards in the epoch's order,
rows of a shard in its order. A consumer takes one stretch of that line, so that every row has exactly one consumer
whatever their number, also where there are fewer shards than consumers, and no two stretches differ by more than a row.
Within its stretch a consumer mixes the rows of several shards. Everything is a function of the arguments: the same on
every machine, and no consumer need know of another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt

__all__ = ["EpochOrder", "Indexes", "Uneven", "stretch"]

Indexes = npt.NDArray[np.int64]
Uneven = Literal["keep", "drop", "repeat"]


def stretch(rows: int, index: int, parts: int, uneven: Uneven = "keep") -> tuple[int, int]:
    """`[start, stop)` of part `index` of `parts` of a line of `rows`.

    `keep`: the parts cover the line, and differ by at most one. `drop`: all are as long as the shortest, the end of
    the line has no part. `repeat`: all are as long as the longest; positions from `rows` on are the line's beginning
    again.
    """
    if uneven == "keep":
        return rows * index // parts, rows * (index + 1) // parts
    each = rows // parts if uneven == "drop" else -(-rows // parts)
    return index * each, (index + 1) * each


class EpochOrder:
    """The line of one epoch. `counts`: shard → kept rows."""

    def __init__(self, counts: Mapping[int, int], shuffle: bool, seed: int, epoch: int) -> None:
        shards = np.array(sorted(counts), np.int64)
        self._shuffle = shuffle
        self._entropy = (seed, epoch)
        if shuffle:
            shards = shards[np.random.default_rng(self._entropy).permutation(len(shards))]
        self._shards = shards
        self._ends = np.cumsum([counts[int(s)] for s in shards], dtype=np.int64)
        self.rows = int(self._ends[-1]) if len(shards) else 0

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, Indexes]]:
        """The stretch `[start, stop)` of the line as (shard, positions among its kept rows).

        Past its end the line begins anew. Rows of a shard come in the epoch's order for it, whoever asks.
        """
        while start < stop and self.rows:
            first = start % self.rows
            last = min(self.rows, first + stop - start)
            yield from self._pieces(first, last)
            start += last - first

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, Indexes]]:
        begin = int(np.searchsorted(self._ends, start, "right"))
        for place in range(begin, len(self._shards)):
            before = int(self._ends[place - 1]) if place else 0
            end = int(self._ends[place])
            if before >= stop:
                return
            if end > before:
                shard = int(self._shards[place])
                rows = self._rows(shard, end - before)
                yield shard, rows[max(0, start - before) : stop - before]

    def _rows(self, shard: int, count: int) -> Indexes:
        if not self._shuffle:
            return np.arange(count)
        return np.random.default_rng((*self._entropy, shard)).permutation(count)

    def windows(self, start: int, stop: int, buffer: int) -> Iterator[tuple[list[tuple[int, Indexes]], Indexes]]:
        """The stretch in windows of `buffer` pieces: the pieces, and the order over all their rows as they stand."""
        pieces = list(self.pieces(start, stop))
        for first in range(0, len(pieces), buffer):
            window = pieces[first : first + buffer]
            rows = sum(len(r) for _, r in window)
            if self._shuffle:
                mix = np.random.default_rng((*self._entropy, start, first, 1)).permutation(rows)
            else:
                mix = np.arange(rows)
            yield window, mix
