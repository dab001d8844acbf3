"""The plan of an export: every sample in its place, and where shards begin and end, fixed before any media is read.

In: the rows of the export in order (exported columns, and the place of their media), the limits of a shard. Out: a
folder with `rows.arrow`, the rows in batches of bounded size, and `plan.json`, written last, with the identity of the
export, the versions that made it, the batches and the shards. Each shard is a function of the plan and the media it
names, so a killed export goes on at its first missing shard. A plan of another identity or version is no plan.
Memory: one batch; 8 bytes for each batch and each shard.
"""

from __future__ import annotations

import json
import os
import platform
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pyarrow as pa

from mmdata import __version__

__all__ = ["PLACES", "Plan", "find_plan", "write_plan"]

PLACES = ("part", "image_path", "image_offset", "image_size", "image_ext", "boxes")  # of a row, before what is exported
_ROWS, _PLAN = "rows.arrow", "plan.json"
_BATCH_ROWS, _BATCH_BYTES = 4096, 32 << 20
_PREFIX = "place:"


@dataclass(frozen=True)
class Plan:
    """`ends`: for each shard, the number of samples in it and all before it."""

    folder: Path
    ends: tuple[int, ...]
    batches: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Samples in all."""
        return self.ends[-1] if self.ends else 0

    @property
    def shards(self) -> int:
        """How many shards."""
        return len(self.ends)

    def shard(self, number: int, most: int) -> Iterator[tuple[pa.Table, pa.Table]]:
        """A shard's samples in order, at most so many at a time: what is exported, and the places of their media."""
        start = self.ends[number - 1] if number else 0
        return _read(self.folder, self.batches, start, self.ends[number], most)

    def all(self, most: int) -> Iterator[tuple[pa.Table, pa.Table]]:
        """All samples in order, likewise."""
        return _read(self.folder, self.batches, 0, self.rows, most)


def _made_by() -> dict[str, str]:
    """What decides an export's bytes beside its content."""
    return {"mmdata": __version__, "python": platform.python_version(), "pyarrow": metadata.version("pyarrow")}


def find_plan(folder: Path, identity: str) -> Plan | None:
    """The whole plan of this export in `folder`, None when there is none."""
    try:
        found = json.loads((folder / _PLAN).read_bytes())
    except (OSError, ValueError):
        return None
    if found.get("identity") != identity or found.get("made_by") != _made_by():
        return None
    return Plan(folder, tuple(found["ends"]), tuple(found["batches"]))


def write_plan(
    folder: Path,
    identity: str,
    rows: Iterable[tuple[pa.Table, pa.Table]],
    cut: Callable[[Iterator[tuple[pa.Table, pa.Table]]], Sequence[int]],
) -> Plan:
    """Write the plan of `rows`, pairs as `Plan.shard` gives them; `cut` says from all of them where shards end."""
    batches = tuple(_write_rows(folder / _ROWS, rows))
    count = batches[-1] if batches else 0
    ends = tuple(cut(_read(folder, batches, 0, count, _BATCH_ROWS)))
    if (ends[-1] if ends else 0) != count:
        raise AssertionError(f"{count} rows were planned, the shards hold {ends[-1] if ends else 0}")
    found = {"identity": identity, "made_by": _made_by(), "ends": ends, "batches": batches}
    temporary = folder / f"{_PLAN}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(found, file)
        file.flush()
        os.fsync(file.fileno())
    os.link(temporary, folder / _PLAN)
    temporary.unlink()
    return Plan(folder, ends, batches)


def _write_rows(path: Path, rows: Iterable[tuple[pa.Table, pa.Table]]) -> Iterator[int]:
    """Write the batches; yields, for each, the number of rows up to its end."""
    writer: pa.RecordBatchFileWriter | None = None
    count = 0
    try:
        for table, places in rows:
            joined = pa.table(
                [*places.columns, *table.columns],
                schema=pa.schema([*(pa.field(_PREFIX + f.name, f.type) for f in places.schema), *table.schema]),
            ).combine_chunks()
            if writer is None:
                writer = pa.ipc.new_file(str(path), joined.schema, options=pa.ipc.IpcWriteOptions(compression="lz4"))
            size = max(1, min(_BATCH_ROWS, _BATCH_BYTES * len(joined) // max(1, joined.nbytes)))
            for start in range(0, len(joined), size):
                for batch in joined.slice(start, size).to_batches():
                    writer.write_batch(batch)
                    count += len(batch)
                    yield count
    finally:
        if writer is not None:
            writer.close()
    if writer is not None:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _read(
    folder: Path, batches: Sequence[int], start: int, stop: int, most: int
) -> Iterator[tuple[pa.Table, pa.Table]]:
    if start >= stop:
        return
    with pa.memory_map(str(folder / _ROWS)) as file:
        reader = pa.ipc.open_file(file)
        count = len(PLACES)
        number = bisect_right(batches, start)
        while start < stop:
            first = batches[number - 1] if number else 0
            batch = reader.get_batch(number)
            end = min(stop, first + len(batch))
            while start < end:
                part = pa.Table.from_batches([batch.slice(start - first, min(most, end - start))])
                yield part.select(range(count, part.num_columns)), part.select(range(count)).rename_columns(PLACES)
                start += len(part)
            number += 1
