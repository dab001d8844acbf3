"""The rows of a shard cut into chunks whose media fits in memory, each with a cache of its pictures.

In: the rows that are alive before a pass, its steps, and a bound in bytes. Out: chunks in row order, and, per chunk, a
`DecodedCache`. A picture counts in full where some step of the pass needs it in full, else only its variants count.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mmdata.batch import DecodedCache, keeps_whole
from mmdata.columns import media_reference
from mmdata.media_reader import MediaReader
from mmdata.stage import Pixels
from mmdata.survivors import BoundStep, ShardView

__all__ = ["Chunks"]

Rows = npt.NDArray[np.int64]
_REFERENCE = [c.name for c in media_reference("image")]
_UNKNOWN_PX = 2000  # a side of media of unknown size (adopted, not probed): 4 megapixels


class Chunks:
    """Chunks of one shard for the steps of one pass; `threads` decode in each cache."""

    def __init__(self, view: ShardView, steps: Sequence[BoundStep], reader: MediaReader, threads: int) -> None:
        self._view, self._reader, self._threads = view, reader, threads
        contracts = [b.step.contract for b in steps if b.step.contract is not None and b.step.media]
        self.has_media = bool(contracts)
        self.variants: tuple[Pixels, ...] = tuple(dict.fromkeys(p for c in contracts for p in c.pixels))
        shapes = [b.resolved.batch_shape or 1 for b in steps if b.step.media]
        self._batch = max(shapes, default=1)

    def cut(self, rows: Rows, limit_bytes: int) -> list[Rows]:
        """A chunk's media, with its pictures as they are kept, stays within the limit, but one row is always taken.

        Chunks end where a full batch of the steps' largest model call ends, if they hold one.
        """
        if not len(rows) or not self.has_media:
            return [rows] if len(rows) else []
        costs = self._costs(rows)
        ends: list[int] = []
        begin, held = 0, 0
        for index, cost in enumerate(costs):
            if index > begin and held + cost > limit_bytes:
                count = index - begin
                begin += count // self._batch * self._batch or count
                ends.append(begin)
                held = sum(costs[begin:index])
            held += cost
        return np.split(rows, ends)

    def _costs(self, rows: Rows) -> list[int]:
        sizes = self._view.base(["width_px", "height_px", "image_size"]).take(pa.array(rows))
        fixed = sum(p.size * p.size * 3 for p in self.variants if p.size)
        copies = sum(p.size is None for p in self.variants if p != Pixels())
        whole = 3 * (1 + copies) if self.variants and keeps_whole(self.variants) else 0
        return [
            (width or _UNKNOWN_PX) * (height or _UNKNOWN_PX) * whole + fixed + (stored or 0)
            for width, height, stored in zip(*(c.to_pylist() for c in sizes.columns), strict=True)
        ]

    def cache(self, chunk: Rows) -> DecodedCache | None:
        """What will hold the chunk's pictures; None where no step of the pass looks at media."""
        if not self.has_media:
            return None
        table = self._view.base(_REFERENCE).take(pa.array(chunk))
        return DecodedCache(table, self._reader.read, self._threads, self._reader.expect, self.variants)
