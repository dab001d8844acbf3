"""Shards of an export: where they are cut, and how those that are missing are written.

In: a plan, the media it names, one of `exporters`. Out: in the attempt folder, each shard's files under their names,
renamed from a folder of the shard's own once they are whole and on disk. Any order and number of writers gives the
same bytes.
StoreError: media is cut short or cannot be blurred. RecipeError: two samples of a shard would have one name.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mmdata.errors import RecipeError, StoreError
from mmdata.export_plan import Plan
from mmdata.exporters import shape
from mmdata.exporters.shape import Chunk, Format
from mmdata.media.blur import blur_image, boxes_of
from mmdata.media.image import DecodeError
from mmdata.mixing import Exportable
from mmdata.publish import Attempt

__all__ = ["Media", "cut_shards", "write_shards"]

_PAGE, _CHUNK = 4096, 256  # samples whose media is planned together; samples between two ticks


class Media:
    """Reads the images of planned samples; those with boxes come blurred. Used by several threads at once."""

    def __init__(self, datasets: Sequence[Exportable], wanted: bool) -> None:
        self._datasets, self._wanted = datasets, wanted

    def expect(self, places: pa.Table) -> None:
        """Say what will be read next, for datasets whose media is far away."""
        for number, dataset in enumerate(self._datasets if self._wanted else ()):
            expect = getattr(getattr(dataset, "media", None), "expect", None)
            if expect is not None:
                mine = places.filter(pc.equal(places.column("part"), number))
                columns = (mine.column(n).to_pylist() for n in ("image_path", "image_offset", "image_size"))
                expect(r for r in zip(*columns, strict=True) if r[0] is not None)

    def read(self, places: list[dict[str, Any]], keys: list[str], row: int) -> shape.Media | None:
        """Extension and bytes of a sample's image; None when it has none, or none are exported."""
        place = places[row]
        path, size = place["image_path"], place["image_size"]
        if path is None or not self._wanted:
            return None
        data = self._datasets[place["part"]].read_media(path, place["image_offset"], size)
        if len(data) != size:
            raise StoreError(f"{path} is cut short: {len(data)} of {size} bytes at {place['image_offset']}")
        if place["boxes"]:
            try:
                data = blur_image(data, boxes_of(place["boxes"]))
            except (DecodeError, ValueError) as error:
                raise StoreError(
                    f"the picture of sample {keys[row]} cannot be blurred ({error}), and unblurred it is not exported; "
                    "add a filter that drops the sample"
                ) from None
        return place["image_ext"] or "bin", data


def cut_shards(writer: Format, pairs: Iterable[tuple[pa.Table, pa.Table]]) -> list[int]:
    """Where shards end: for each, the number of samples in it and before it. RecipeError for a name twice in one."""
    options = writer.shape.options
    max_rows, max_bytes = options.max_rows, options.max_bytes
    if options.shard_rows is None and max_bytes is None and writer.default_bytes is not None:
        max_rows, max_bytes = None, writer.default_bytes
    if not writer.is_sharded:
        max_rows = max_bytes = None
    ends: list[int] = []
    total = count = size = 0
    keys: dict[str, str | None] = {}  # of the shard, with the extension of the image
    for table, places in pairs:
        names = table.column("key").to_pylist() if writer.keys_name_files else [""] * len(table)
        image_sizes = [n or 0 for n in places.column("image_size").to_pylist()]
        sizes = writer.sizes(table, image_sizes) if max_bytes is not None else [0] * len(table)
        extensions = places.column("image_ext").to_pylist()
        for name, extension, more in zip(names, extensions, sizes, strict=True):
            is_full = max_rows is not None and count >= max_rows
            if count and (is_full or (max_bytes is not None and size + more + writer.end_bytes > max_bytes)):
                writer.require_names(len(ends), keys)
                ends.append(total)
                count = size = 0
                keys.clear()
            if writer.keys_name_files:
                if name in keys:
                    raise RecipeError(
                        f"export: shard {len(ends):05d} would hold two samples with the same key {name!r}; "
                        "set export.format to parquet"
                    )
                keys[name] = extension
            total, count, size = total + 1, count + 1, size + more
    writer.require_names(len(ends), keys)
    return [*ends, total] if count else ends


def write_shards(
    writer: Format, plan: Plan, attempt: Attempt, media: Media, tick: Callable[[int], None] | None
) -> list[str]:
    """Write the shards that the attempt lacks; returns the data files of all."""
    todo = []
    for number in range(plan.shards):
        if all((attempt.folder / name).exists() for name in writer.files(number, plan.shards)):
            attempt.keep = True
            if tick is not None:
                tick(plan.ends[number] - (plan.ends[number - 1] if number else 0))
        else:
            todo.append(number)
    for left in attempt.folder.glob(".part-*"):
        shutil.rmtree(left)
    work = _Work(writer, plan, attempt, media, tick)
    workers = min(writer.shape.options.workers, len(todo))
    if workers > 1:
        with ThreadPoolExecutor(workers, "export") as pool:
            try:
                list(pool.map(work.write, todo))
            except BaseException:
                work.stopped = True
                pool.shutdown(cancel_futures=True)
                raise
    else:
        for number in todo:
            work.write(number)
    names = [name for n in range(plan.shards) for name in writer.files(n, plan.shards)]
    return [name for name in names if writer.is_data(name)]


class _Work:
    """What writes one shard after the other, in one thread or several."""

    def __init__(
        self, writer: Format, plan: Plan, attempt: Attempt, media: Media, tick: Callable[[int], None] | None
    ) -> None:
        self.writer, self.plan, self.attempt, self.media, self.tick = writer, plan, attempt, media, tick
        self.stopped = False
        self._lock = threading.Lock()

    def write(self, number: int) -> None:
        part = self.attempt.folder / f".part-{number:05d}"
        part.mkdir()
        self.writer.write(number, self.plan.shards, self._chunks(number), part)
        for name in self.writer.files(number, self.plan.shards):
            _move(part / name, self.attempt.folder / name)
        shutil.rmtree(part)
        self.attempt.keep = True

    def _chunks(self, number: int) -> Iterator[Chunk]:
        for page, all_places in self.plan.shard(number, _PAGE):
            self.media.expect(all_places)
            for start in range(0, len(page), _CHUNK):
                if self.stopped:
                    raise InterruptedError("another shard failed")
                table, places = page.slice(start, _CHUNK), all_places.slice(start, _CHUNK).to_pylist()
                yield Chunk(table, partial(self.media.read, places, table.column("key").to_pylist()))
                if self.tick is not None:
                    with self._lock:
                        self.tick(len(table))


def _move(source: Path, goal: Path) -> None:
    """Put a whole file or folder in its place, where a killed attempt may have left one already."""
    goal.parent.mkdir(parents=True, exist_ok=True)
    if goal.is_dir():
        shutil.rmtree(goal)
    source.replace(goal)
