"""The columns of a duplicate group over rows that need not fit into memory.

In: the rows of a group that streams, and per row, in visit order, which row is the first of its cluster: one of its own
or an older one. Out: what `clusters.cluster_columns` and `older_columns` write, in row order, and the remark. Keys,
numbers and answers lie in scratch; a few hundred thousand rows are in memory at a time. Fails: StoreError when scratch
is full.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mmdata.groups.clusters import remark_of
from mmdata.groups.mapped import Mapped, Positions, stretches
from mmdata.stage import GroupRows, OlderRows

__all__ = ["OlderFirsts", "VisitedRows"]


class _Texts:
    """Text, one a row, in scratch: appended within a `with`, then taken."""

    def __init__(self, mapped: Mapped) -> None:
        self._ends, self._bytes = mapped.growing(np.int64), mapped.growing(np.uint8)
        self._ends.append(np.zeros(1, np.int64))
        self._length = self._rows = 0
        self._whole: pa.Array | None = None

    def __enter__(self) -> _Texts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._ends, self._bytes:
            if error is None:
                buffers = [None, pa.py_buffer(self._ends.array()), pa.py_buffer(self._bytes.array())]
                self._whole = pa.Array.from_buffers(pa.large_string(), self._rows, buffers, 0)

    def append(self, column: pa.ChunkedArray) -> None:
        for chunk in column.chunks:
            wide = chunk.cast(pa.large_string())
            if not len(wide):
                continue
            _, offsets, data = wide.buffers()
            ends = np.frombuffer(offsets, np.int64)[wide.offset : wide.offset + len(wide) + 1]
            self._ends.append(ends[1:] - ends[0] + self._length)
            if data is not None:
                self._bytes.append(np.frombuffer(data, np.uint8)[ends[0] : ends[-1]].copy())
            self._length += int(ends[-1] - ends[0])
            self._rows += len(wide)

    def take(self, at: Positions) -> pa.Array:
        assert self._whole is not None
        return self._whole.take(pa.array(at)).cast(pa.string())


class OlderFirsts:
    """Older rows that are the first of a cluster: row_id, key and dataset of those at `places`, which ascend."""

    def __init__(self, older: OlderRows, places: Positions, mapped: Mapped) -> None:
        self.row_ids: Positions = mapped.array(np.int64, len(places))
        self.keys = _Texts(mapped)
        self._names: dict[str, int] = {}
        self._dataset: npt.NDArray[np.int32] = mapped.array(np.int32, len(places))
        with self.keys:
            for some in stretches(len(places)):
                found = older.look_up(places[some])
                self.row_ids[some] = found.column("row_id").to_numpy()
                self.keys.append(found.column("key"))
                encoded = found.column("dataset").combine_chunks().dictionary_encode()
                numbers = [self._names.setdefault(name, len(self._names)) for name in encoded.dictionary.to_pylist()]
                self._dataset[some] = np.array(numbers, np.int32)[encoded.indices.to_numpy()]

    def __len__(self) -> int:
        return len(self.row_ids)

    def datasets(self, at: Positions) -> pa.Array:
        """Their datasets, as the option names them; NULL where `at` is negative."""
        numbers = self._dataset[np.maximum(at, 0)] if len(self) else np.zeros(len(at), np.int32)
        return pa.array(list(self._names), pa.string()).take(pa.array(numbers, mask=at < 0))


class VisitedRows:
    """Rows by row and by visit; `read` them first, to the end."""

    def __init__(self, rows: GroupRows, scratch: Path) -> None:
        self._rows, self._scratch, self.mapped = rows, scratch, Mapped(scratch)
        self._order = rows.visit_order_in(scratch)  # visit → row; None = the same
        self._visit: Positions | None = None  # row → visit
        if self._order is not None:
            self._visit = self.mapped.array(np.int64, len(rows))
            for some in stretches(len(rows)):
                self._visit[self._order[some]] = np.arange(some.start, some.stop)
        self._row_ids: Positions = self.mapped.array(np.int64, len(rows))
        self._keys = _Texts(self.mapped)

    def __len__(self) -> int:
        return len(self._row_ids)

    def read(self, columns: Sequence[str]) -> Iterator[tuple[Positions, pa.Table]]:
        """Parts of the rows, in row order, and the visit of each."""
        first = 0
        with self._keys:
            for part in self._rows.parts(["key", *columns]):
                some = slice(first, first + len(part))
                self._row_ids[some] = part.column("row_id").to_numpy()
                self._keys.append(part.column("key"))
                yield self.visits(some), part
                first = some.stop

    def visits(self, rows: slice) -> Positions:
        """The visits of these rows."""
        return np.arange(rows.start, rows.stop) if self._visit is None else self._visit[rows]

    def _at(self, visits: Positions) -> Positions:
        return visits if self._order is None else self._order[visits]

    def columns(self, label: str, cluster: Positions, firsts: OlderFirsts | None = None) -> tuple[dict[str, Any], str]:
        """Columns in row order, and a remark on the clusters.

        `cluster`, (N,) by visit: the visit of the first row of its cluster, or N and more: of `firsts`, from 0. With
        `firsts` the older row has rank 1 and is counted, and there is `<label>_against`.
        """
        many, older = len(self), 0 if firsts is None else len(firsts)
        sizes: Positions = self.mapped.array(np.int64, many + older)
        for some in stretches(many):
            np.add.at(sizes, cluster[some], 1)
        rank = self._ranks(cluster, sizes)
        found: dict[str, Any] = {
            f"{label}_id": self.mapped.array(np.int64, many),
            f"{label}_rank": self.mapped.array(np.int32, many),
            f"{label}_count": self.mapped.array(np.int64, many),
        }
        names = [f"{label}_of", *([f"{label}_against"] if firsts is not None else [])]
        schema = pa.schema([(name, pa.string()) for name in names])
        path = self._scratch / f"{label}.arrow"
        with self.mapped.writing():
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
                for some in stretches(many):
                    visits = self.visits(some)
                    first, is_older = cluster[visits], cluster[visits] >= many
                    found[f"{label}_rank"][some] = rank[visits] + is_older
                    found[f"{label}_count"][some] = sizes[first] + is_older
                    found[f"{label}_id"][some], texts = self._first_rows(first, is_older, firsts)
                    writer.write_batch(pa.record_batch(texts, schema=schema))
            texts = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        return {**found, **{n: texts.column(n) for n in names}}, self._remark(cluster, sizes, firsts)

    def _first_rows(
        self, first: Positions, is_older: npt.NDArray[np.bool_], firsts: OlderFirsts | None
    ) -> tuple[Positions, list[pa.Array]]:
        """row_id of the first rows of some rows' clusters, and their text columns."""
        own = self._at(first[~is_older])
        if firsts is None:
            return self._row_ids[own], [self._keys.take(own)]
        theirs = first[is_older] - len(self)
        row_ids = np.empty(len(first), np.int64)
        row_ids[~is_older], row_ids[is_older] = self._row_ids[own], firsts.row_ids[theirs]
        place = np.empty(len(first), np.int64)
        place[~is_older], place[is_older] = np.arange(len(own)), np.arange(len(own), len(first))
        keys = pa.concat_arrays([self._keys.take(own), firsts.keys.take(theirs)]).take(pa.array(place))
        return row_ids, [keys, firsts.datasets(np.where(is_older, first - len(self), -1))]

    def _ranks(self, cluster: Positions, sizes: Positions) -> npt.NDArray[np.int32]:
        """By visit: how many rows of its cluster were visited up to each row."""
        rank: npt.NDArray[np.int32] = self.mapped.array(np.int32, len(cluster))
        seen: Positions = self.mapped.array(np.int64, len(sizes))
        for some in stretches(len(cluster)):
            rank[some] = 1
            several = np.flatnonzero(sizes[cluster[some]] > 1)
            mine = cluster[some][several]
            order = np.argsort(mine, kind="stable")
            starts = np.flatnonzero(np.append(True, np.diff(mine[order]) > 0)[: len(mine)])
            counts = np.diff(np.append(starts, len(mine)))
            within = np.arange(len(mine)) - np.repeat(starts, counts)
            rank[some.start + several[order]] = seen[mine[order]] + within + 1
            seen[mine[order][starts]] += counts
        return rank

    def _remark(self, cluster: Positions, sizes: Positions, firsts: OlderFirsts | None) -> str:
        """Of several largest clusters, the one that a row visited first is in."""
        many, clusters, largest, at = len(cluster), 0 if firsts is None else len(firsts), 0, 0
        for some in stretches(many):
            clusters += int((cluster[some] == np.arange(some.start, some.stop)).sum())
            counts = sizes[cluster[some]] + (cluster[some] >= many)
            best = int(np.argmax(counts))
            if counts[best] > largest:
                largest, at = int(counts[best]), int(cluster[some.start + best])
        if not many:
            return "no rows"
        key = self._keys.take(self._at(np.array([at]))) if at < many or firsts is None else None
        if key is None:
            assert firsts is not None
            key = firsts.keys.take(np.array([at - many]))
        return remark_of(clusters, largest, key[0].as_py())
