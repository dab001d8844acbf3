"""Kept samples one by one, in an epoch's order, for one consumer of several: what the PyTorch reader is made of.

In: a dataset, and which part of which epoch. Out: dictionaries `key`, `image`, `caption` and the columns asked for.
Only references are held (of `buffer` shards); media is read when a sample is due, by a few threads that read ahead.
SourceError: a picture that does not decode, or adopted media that is gone, unless such samples are to be left out.
Knows nothing of torch.
"""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mmdata.columns import ROWS_PER_SHARD_BITS
from mmdata.errors import MissingMedia, RecipeError, SourceError, StoreError, nearest
from mmdata.media.image import DecodeError, decode
from mmdata.media_ranges import STREAM_SHARE
from mmdata.readers.order import EpochOrder
from mmdata.sample_media import with_medium
from mmdata.sources.places import is_local

if TYPE_CHECKING:
    from mmdata.dataset import Dataset

__all__ = ["Decode", "OnError", "Samples", "kept_counts", "require_columns"]

Decode = Literal["tensor", "pil", "bytes"]
OnError = Literal["raise", "skip"]
_REFERENCE = ("image_path", "image_offset", "image_size")
_ALWAYS = ("key", "caption")
_ROWS_AT_ONCE = 512  # of references turned into Python objects


def require_columns(dataset: Dataset, columns: Sequence[str]) -> None:
    """RecipeError, with the nearest name, for a column that the samples of a dataset do not have."""
    if isinstance(columns, str):
        raise RecipeError(f"columns={columns!r}: expected a list of columns, such as [{columns!r}]")
    known = [str(c) for c in dataset.sql("SELECT * FROM samples").columns]
    known += [visible for step in dataset.current.steps for _, visible in step.aside] if dataset.current else []
    for name in columns:
        if name not in known:
            raise RecipeError(f"{dataset.store.url} has no column {name!r}{nearest(name, known)}")


def kept_counts(dataset: Dataset) -> dict[int, int]:
    """Shard → kept rows, of shards that have any."""
    found = dataset.sql(
        f"SELECT row_id >> {ROWS_PER_SHARD_BITS}, count(*) FROM verdicts WHERE verdict = 'kept' GROUP BY 1 ORDER BY 1"
    ).fetchall()
    return {int(shard): int(rows) for shard, rows in found}


@dataclass
class Samples:
    """How samples of a dataset are read. `counts`: as `kept_counts` gives them. `threads` read media ahead."""

    dataset: Dataset
    counts: dict[int, int]
    columns: tuple[str, ...]
    decode: Decode | None
    buffer: int
    threads: int
    on_error: OnError
    make_image: Callable[[npt.NDArray[np.uint8]], Any]
    transform: Callable[[dict[str, Any]], Any] | None = None
    medium: str = "image"  # see `sample_media.media_name`
    process: int = 0  # the one that `dataset` was opened in

    def read(self, order: EpochOrder, start: int, stop: int, skip: int = 0) -> Iterator[tuple[int, Any]]:
        """The samples of the stretch `[start, stop)` of an epoch, but the first `skip`, with how many come before each.

        A sample that is left out because it does not decode counts like the others.
        """
        if self.process != os.getpid():  # open files and connections do not survive a fork
            self.dataset, self.process = self.dataset.again(), os.getpid()
        place = 0
        with ThreadPoolExecutor(self.threads, "mmdata-read") as pool:
            ahead: deque[tuple[int, Future[Any]]] = deque()
            try:
                for row in self._references(order, start, stop, skip):
                    ahead.append((skip + place, pool.submit(self._sample, row)))
                    place += 1
                    if len(ahead) > 2 * self.threads:
                        yield from _settled(ahead.popleft())
                while ahead:
                    yield from _settled(ahead.popleft())
            finally:
                for _, future in ahead:
                    future.cancel()

    def _references(self, order: EpochOrder, start: int, stop: int, skip: int) -> Iterator[dict[str, Any]]:
        """Rows as dictionaries, without media."""
        for pieces, mix in order.windows(start, stop, self.buffer):
            if skip >= len(mix):
                skip -= len(mix)
                continue
            table = pa.concat_tables([self._rows(shard, rows) for shard, rows in pieces])
            sparse = self._expect_whole_files(table)
            for first in range(skip, len(mix), _ROWS_AT_ONCE):
                rows = table.take(pa.array(mix[first : first + _ROWS_AT_ONCE])).to_pylist()
                self.dataset.media.expect(_reference(r) for r in rows if sparse and r["image_path"] in sparse)
                yield from rows
            skip = 0

    def _expect_whole_files(self, table: pa.Table) -> set[str]:
        """Have remote files of which this window wants the most part brought once; returns the other remote ones.

        Of those a few rows are asked for at a time: in shuffled order the ranges of all would be held at once.
        """
        if self.decode is None:
            return set()
        paths = [p for p in table["image_path"].unique().to_pylist() if p is not None and self._is_far(p)]
        sparse = set()
        for path in paths:
            mine = table.filter(pc.equal(table["image_path"], path)).select(list(_REFERENCE))
            end = pc.max(pc.add(mine["image_offset"], mine["image_size"])).as_py()
            if pc.sum(mine["image_size"]).as_py() >= STREAM_SHARE * end:
                self.dataset.media.expect(_reference(row) for row in mine.to_pylist())
            else:
                sparse.add(path)
        return sparse

    def _is_far(self, path: str) -> bool:
        is_name = "://" not in path and not path.startswith("/")
        return not self.dataset.store.is_local if is_name else not is_local(path)

    def _rows(self, shard: int, rows: npt.NDArray[np.int64]) -> pa.Table:
        table = with_medium(self.dataset.kept(shard, list(self.columns)))
        if len(table) != self.counts[shard]:
            raise StoreError(
                f"{self.dataset.store.url}: shard {shard:05d} has {len(table)} kept rows, the verdicts count "
                f"{self.counts[shard]}; run the recipe again"
            )
        names = dict.fromkeys([*_ALWAYS, *(_REFERENCE if self.decode is not None else ()), *self.columns])
        return table.select(list(names)).take(pa.array(rows))

    def _sample(self, row: dict[str, Any]) -> tuple[bool, Any]:
        """(whether there is one, the sample)."""
        sample = {"key": row["key"], "caption": row["caption"], **{c: row[c] for c in self.columns}}
        if self.decode is not None:
            try:
                sample[self.medium] = self._image(row)
            except (DecodeError, MissingMedia) as error:
                what = "does not decode" if isinstance(error, DecodeError) else "is not there"
                said = f"the picture of sample {row['key']} of {self.dataset.store.url} {what} ({error})"
                if self.on_error == "raise":
                    raise SourceError(f"{said}; on_error='skip' leaves such samples out") from error
                warnings.warn(f"{said}; left out", stacklevel=2)
                return False, None
        return True, sample if self.transform is None else self.transform(sample)

    def _image(self, row: dict[str, Any]) -> Any:
        path, offset, size = _reference(row)
        if path is None:
            return None
        data = self.dataset.read_media(path, offset, size)
        return data if self.decode == "bytes" else self.make_image(decode(data))


def _reference(row: dict[str, Any]) -> tuple[Any, Any, Any]:
    return row["image_path"], row["image_offset"], row["image_size"]


def _settled(due: tuple[int, Future[Any]]) -> Iterator[tuple[int, Any]]:
    place, future = due
    there, sample = future.result()
    if there:
        yield place, sample
