"""What every format of an export is: files for a shard out of samples, and what goes beside the shards at the end.

In: a `Shape` (columns, names, limits; decided before any media is read) and, shard by shard, `Chunk`s of samples in
order. Out: files in a folder that holds this shard alone, synced to disk; their bytes are a function of the samples
and the shape: no clock, no user, no path enters them (but for `_stats.json`, which holds times as img2dataset's does).
Fails with StoreError where the media contradicts the dataset, OSError where the disk does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from mmdata.column_files import PARQUET
from mmdata.export_plan import Plan
from mmdata.settings import ExportOptions

__all__ = ["Chunk", "Format", "Media", "RowGroups", "Shape", "stats_text", "sync", "value_bytes"]

Media = tuple[str, bytes]  # extension without a dot, and the bytes of one image
_GROUP_ROWS = 10_000


@dataclass(frozen=True)
class Shape:
    """`schema`: the exported columns. `json_names`: those in each sample's `.json`; `full_names`: without a NULL.

    `extension`: the one that all images share (see `Survey.image_extension`), None when no row has an image.
    `identity`: of the export. `media_name`: what the samples' medium is called, see `sample_media`.
    """

    schema: pa.Schema
    json_names: tuple[str, ...]
    extension: str | None
    has_text: bool
    with_media: bool
    options: ExportOptions
    identity: str = ""
    full_names: tuple[str, ...] = ()
    media_name: str = "image"


@dataclass(frozen=True)
class Chunk:
    """Some samples of a shard: their exported columns, and `media(row)`, which reads an image when it is called."""

    table: pa.Table
    media: Callable[[int], Media | None]


class Format:
    """One format. Class attributes say what it needs; a format without shards does all its work in `finish`."""

    media: ClassVar[Literal["always", "asked", "never"]] = "asked"
    same_members: ClassVar[bool] = False  # every sample has an image, or none has
    json_nulls: ClassVar[bool] = False  # the .json holds every column, NULLs too
    keys_name_files: ClassVar[bool] = False
    is_sharded: ClassVar[bool] = True
    end_bytes: ClassVar[int] = 0  # of a shard, beside its samples
    default_bytes: ClassVar[int | None] = None  # of a shard, when no limit is given
    tags: ClassVar[tuple[str, ...]] = ()
    notes: ClassVar[str | None] = None  # a folder of what `finish` needs to know of the shards, not published
    reserved: ClassVar[tuple[str, ...]] = ()  # column names the format takes for itself, with media

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    @classmethod
    def require(cls) -> None:
        """MissingExtra when a package is not installed."""

    @classmethod
    def require_media(cls, name: str) -> None:
        """RecipeError for a medium (see `sample_media.media_name`) that the format cannot hold."""

    def files(self, shard: int, shards: int) -> tuple[str, ...]:
        """The files of a shard of so many; a name that ends with a slash is a folder."""
        raise NotImplementedError

    def is_data(self, name: str) -> bool:
        """Whether one of `files` is data that stays the same, neither statistics nor a note for `finish`."""
        return not name.endswith("_stats.json")

    def require_names(self, shard: int, keys: Mapping[str, str | None]) -> None:
        """RecipeError for samples of one shard, given as key → extension of the image, whose files would collide."""

    def sizes(self, table: pa.Table, image_sizes: Sequence[int]) -> list[int]:
        """The bytes each sample takes in its shard; `image_sizes`: bytes of the images, 0 = none."""
        texts = table.to_pylist()
        media = self.shape.with_media
        return [
            sum(value_bytes(v) for v in row.values()) + (size if media else 0)
            for row, size in zip(texts, image_sizes, strict=True)
        ]

    def write(self, shard: int, shards: int, chunks: Iterable[Chunk], folder: Path) -> None:
        """Write a shard's files into `folder`, which is empty."""
        raise NotImplementedError

    def finish(self, folder: Path, plan: Plan) -> list[str]:
        """Write what goes beside the shards, which all stand in `folder`; returns the names. Run anew after a kill."""
        return []

    def header(self) -> dict[str, Any]:
        """Fields of the card's YAML block."""
        return {}

    def opening(self) -> str:
        """Markdown: how to open the export."""
        raise NotImplementedError


def sync(path: Path) -> None:
    """Have a file's bytes on disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


class RowGroups:
    """A Parquet file of rows that come in any portions; its row groups have 10,000 rows, so equal rows, equal bytes."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path, self._schema = path, schema
        self._writer: pq.ParquetWriter | None = pq.ParquetWriter(path, schema, **PARQUET)
        self._waiting: list[pa.Table] = []
        self._count = 0

    def add(self, table: pa.Table) -> None:
        """Add rows."""
        start = 0
        while start < len(table):
            part = table.slice(start, _GROUP_ROWS - self._count)
            self._waiting.append(part)
            self._count += len(part)
            start += len(part)
            if self._count == _GROUP_ROWS:
                self._flush()

    def _flush(self) -> None:
        if self._count:
            assert self._writer is not None
            group = pa.concat_tables(self._waiting).combine_chunks()
            self._waiting, self._count = [], 0
            self._writer.write_table(group, row_group_size=len(group))

    def __enter__(self) -> RowGroups:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._writer is not None
        if error is None:
            self._flush()
            self._writer.close()
            sync(self._path)
            return
        try:
            self._writer.close()
        except OSError:
            pass  # the first error is the one to be told


def stats_text(count: int, start: float, end: float) -> str:
    """img2dataset's statistics of one shard; its failures stay in the dataset, so there are none here."""
    stats = {
        "count": count,
        "successes": count,
        "failed_to_download": 0,
        "failed_to_resize": 0,
        "duration": end - start,
        "start_time": start,
        "end_time": end,
        "status_dict": {"success": count},
    }
    return json.dumps(stats, indent=4)


def value_bytes(value: Any) -> int:
    """Roughly what a value takes uncompressed; only has to be a function of the value."""
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, Sequence):
        return sum(value_bytes(v) for v in value)
    if isinstance(value, dict):
        return sum(value_bytes(v) for v in value.values())
    return 8
