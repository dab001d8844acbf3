"""The rows of an export, in its order, each with the place of its media; no media is read here.

In: the parts with how many samples each gives, the columns, shuffle and seed. Out: a stream of pairs, what is exported
and the places (`export_plan.PLACES`), which is a function of the rows, their row_ids and the seed. Each part comes in
the order that `export_order` gives it, pass by pass; several are interleaved evenly, so that every stretch of the
export holds them in their proportions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mmdata.errors import RecipeError
from mmdata.export_order import chosen, ordered
from mmdata.export_plan import PLACES
from mmdata.layout import ExportColumn, columns_to_ask, project
from mmdata.mixing import Part, interleaved_counts
from mmdata.sample_media import with_medium
from mmdata.settings import ExportOptions

__all__ = ["MIXED_FROM", "Rows"]

MIXED_FROM = "mixed_from"  # the column that names a sample's dataset in a mix
_MOST_REPEATS = 100
_STRETCH = 4096
_ROW_ID_BITS = 56  # row_ids stay below 2^56
_CHOICE = -1 & 0xFFFFFFFF  # instead of a pass number, where hashes choose rows


class Rows:
    """Reads the kept rows of parts as an export's rows. `boxes_type`: of the column `options.blur`, if there is one."""

    def __init__(
        self,
        parts: Sequence[Part],
        columns: Sequence[ExportColumn],
        options: ExportOptions,
        boxes_type: pa.DataType | None = None,
    ) -> None:
        self._parts, self._columns, self._options = parts, columns, options
        self._boxes_type = boxes_type or pa.null()
        self._names = [c.name for c in columns]

    def once(self, part: Part, shard: int, passing: int = 0) -> pa.Table:
        """A part's kept rows of a shard, with the keys they are exported with, and in a mix the column `mixed_from`."""
        options = self._options
        asked = columns_to_ask(options.columns)
        if asked is not None:
            asked = list(dict.fromkeys([*asked, *filter(None, (options.blur, options.repeat))]))
        table = with_medium(part.dataset.kept(shard, asked))
        if part.name:
            place = table.schema.get_field_index("key")
            table = table.set_column(place, "key", part.key_of(table.column("key"), passing))
            table = table.append_column(MIXED_FROM, pa.array([part.name] * len(table), pa.string()))
        return table

    def repeated(self, kept: pa.Table) -> pa.Table:
        """With `options.repeat` each row so often, one after the other; keys of repeats end in `-r1`, `-r2`, …."""
        name = self._options.repeat
        if name is None:
            return kept
        if name not in kept.column_names or not pa.types.is_integer(kept.schema.field(name).type):
            raise RecipeError(f"export.repeat: the dataset has no column of whole numbers {name!r}")
        times = kept.column(name).cast(pa.int64(), safe=False).fill_null(-1).to_numpy()
        wrong = np.flatnonzero((times < 0) | (times > _MOST_REPEATS))
        if len(wrong):
            key, value = (kept.column(n)[int(wrong[0])].as_py() for n in ("key", name))
            raise RecipeError(
                f"export.repeat: row {key} has {'NULL' if value is None else value} in {name!r}; expected 0 to "
                f"{_MOST_REPEATS}"
            )
        table = kept.take(pa.array(np.repeat(np.arange(len(kept)), times)))
        before = _times_before(np.asarray(table.column("row_id").to_numpy(), np.int64))
        ends = pa.array(["" if n == 0 else f"-r{n}" for n in before.tolist()], pa.string())
        place = table.schema.get_field_index("key")
        return table.set_column(place, "key", pc.binary_join_element_wise(table.column("key"), ends, ""))

    def stream(self, counts: Sequence[int], scratch: Path) -> Iterator[tuple[pa.Table, pa.Table]]:
        """All rows in order; `scratch` is an empty folder on local disk."""
        streams = [self._part(part, n, scratch) for part, n in zip(self._parts, counts, strict=True)]
        first = 1 + len(PLACES)
        for table in streams[0] if len(streams) == 1 else _interleave(streams, counts):
            exported = table.select(range(first, table.num_columns)).rename_columns(self._names)
            yield exported, table.select(range(1, first)).rename_columns(PLACES)

    def _part(self, part: Part, count: int, scratch: Path) -> Iterator[pa.Table]:
        """The samples of one part, as `_placed` makes them."""
        passes, rest = divmod(count, part.rows) if part.rows else (0, 0)
        options = self._options
        shards = part.dataset.shards()
        folder = scratch / f"part-{part.number}"
        folder.mkdir()
        for passing in range(passes + (rest > 0)):
            masks = None
            if passing == passes:
                mask = chosen(np.concatenate(part.row_ids), rest, options.seed, part.number, _CHOICE)
                masks = dict(zip(shards, np.split(mask, np.cumsum([len(r) for r in part.row_ids])[:-1]), strict=True))

            def read(shard: int, passing: int = passing, masks: dict[int, np.ndarray] | None = masks) -> pa.Table:
                table = self._placed(part, shard, passing)
                return table if masks is None else table.filter(pa.array(masks[shard]))

            seeds = (options.seed, part.number, passing)
            yield from ordered(shards, read, options.shuffle, seeds, folder, part.value_bytes)

    def _placed(self, part: Part, shard: int, passing: int) -> pa.Table:
        """One table with `row_id`, the places, then the exported columns, under names that cannot collide."""
        kept = self.repeated(self.once(part, shard, passing))
        blur = self._options.blur
        boxes = kept.column(blur) if blur in kept.column_names else pa.nulls(len(kept), self._boxes_type)
        places = [
            pa.array(np.full(len(kept), part.number, np.int16)),
            *(kept.column(name) for name in PLACES[1:-1]),
            boxes.cast(self._boxes_type),
        ]
        exported = project(kept, self._columns)
        names = ["row_id", *(f"place:{n}" for n in PLACES), *(f"={n}" for n in self._names)]
        row_ids = kept.column("row_id")
        if self._options.repeat is not None:  # no two of a row together where rows are shuffled
            ids = np.asarray(row_ids.to_numpy(), np.int64)
            row_ids = pa.array(ids + (_times_before(ids) << _ROW_ID_BITS))
        return pa.table([row_ids, *places, *exported.columns], names=names)


def _times_before(row_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Per row how often the same row stands right before it."""
    if not len(row_ids):
        return np.zeros(0, np.int64)
    starts = np.flatnonzero(np.r_[True, np.diff(row_ids) != 0])
    return np.arange(len(row_ids)) - np.repeat(starts, np.diff(np.r_[starts, len(row_ids)]))


class _Cursor:
    """Takes rows from a stream of tables, in any portions."""

    def __init__(self, tables: Iterable[pa.Table]) -> None:
        self._tables = iter(tables)
        self._held: list[pa.Table] = []

    def take(self, count: int) -> list[pa.Table]:
        taken: list[pa.Table] = []
        while count:
            if not self._held:
                self._held = [next(self._tables)]
            table = self._held.pop()
            taken.append(table.slice(0, count))
            if len(table) > count:
                self._held = [table.slice(count)]
            count -= len(taken[-1])
        return taken


def _interleave(streams: Sequence[Iterator[pa.Table]], counts: Sequence[int]) -> Iterator[pa.Table]:
    cursors = [_Cursor(stream) for stream in streams]
    steps = -(-sum(counts) // _STRETCH)
    done = [0] * len(counts)
    for step in range(1, steps + 1):
        upto = interleaved_counts(counts, step, steps)
        tables: list[pa.Table] = []
        places, numbers = [], []
        for part, (start, stop) in enumerate(zip(done, upto, strict=True)):
            tables += cursors[part].take(stop - start)
            places.append((2 * np.arange(start, stop) + 1) / (2 * max(1, counts[part])))
            numbers.append(np.full(stop - start, part))
        done = upto
        order = np.lexsort((np.concatenate(numbers), np.concatenate(places)))
        yield pa.concat_tables(tables).take(pa.array(order))
