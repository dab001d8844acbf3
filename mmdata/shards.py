"""Writes the shards of an export: samples in order, cut by rows or bytes, a sample never split.

Two formats with one interface. The bytes of every tar and Parquet file are a function of the samples and the limits:
no clock, no user, no path enters them. Only `*_stats.json` of the WebDataset layout holds times, as img2dataset's does.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from mmdata.media.tar import TarAppender
from mmdata.store import PARQUET, write_parquet

__all__ = ["Media", "ParquetShards", "RowBuffer", "Shards", "WebDatasetShards"]

Media = tuple[str, bytes]  # extension without a dot, and the stored bytes of one image

_TAR_END = 1024  # two blocks of zeros


class Shards(Protocol):
    """A sink for samples. `files`: name → bytes of every data file closed so far."""

    files: dict[str, int]

    def add(self, record: dict[str, Any], table: pa.Table, row: int, media: Media | None) -> None:
        """Write one sample: its values for JSON, its row of the exported table, and its image."""

    def close(self) -> None:
        """Finish the last shard."""

    def abandon(self) -> None:
        """Let go of open files after an error; what they hold is worthless."""


class RowBuffer:
    """Rows of one or several tables, in order, kept as slices until they are taken as one table."""

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        self._slices: list[tuple[pa.Table, int, int]] = []
        self.rows = 0

    def append(self, table: pa.Table, row: int) -> None:
        """Add one row of `table`."""
        self.rows += 1
        if self._slices and self._slices[-1][0] is table and self._slices[-1][2] == row:
            self._slices[-1] = (table, self._slices[-1][1], row + 1)
        else:
            self._slices.append((table, row, row + 1))

    def take(self) -> pa.Table:
        """All rows as one table of single chunks; the buffer is empty afterwards."""
        parts = [t.slice(start, stop - start) for t, start, stop in self._slices]
        self._slices, self.rows = [], 0
        return (pa.concat_tables(parts) if parts else self._schema.empty_table()).combine_chunks()


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _member_bytes(size: int) -> int:
    return 512 + -(-size // 512) * 512


class WebDatasetShards:
    """img2dataset's layout: `00000.tar`, `00000.parquet` (the same samples, same order), `00000_stats.json`.

    Members of a sample: `<key>.<extension>`, `<key>.txt` when `with_text`, `<key>.json`. `max_bytes` bounds the
    bytes of the tar; a single sample larger than that has a tar of its own.
    """

    def __init__(
        self,
        folder: Path,
        schema: pa.Schema,
        max_rows: int | None,
        max_bytes: int | None,
        extension: str | None,
        with_text: bool,
    ) -> None:
        self.files: dict[str, int] = {}
        self._folder = folder
        self._limits = (max_rows, max_bytes)
        self._extension = extension
        self._with_text = with_text
        self._rows = RowBuffer(schema)
        self._tar: TarAppender | None = None
        self._size = 0
        self._shard = 0
        self._started = 0.0

    def add(self, record: dict[str, Any], table: pa.Table, row: int, media: Media | None) -> None:
        """Write one sample, in a new tar when this one is full."""
        key = str(table.column("key")[row].as_py())
        members: list[tuple[str, bytes]] = []
        if self._extension is not None:
            assert media is not None, key
            members.append((f"{key}.{self._extension}", media[1]))
        if self._with_text:
            members.append((f"{key}.txt", (table.column("caption")[row].as_py() or "").encode()))
        members.append((f"{key}.json", json.dumps(record, ensure_ascii=False).encode()))
        size = sum(_member_bytes(len(data)) for _, data in members)
        if self._rows.rows and self._is_full(size):
            self.close()
        tar = self._tar or self._open()
        for name, data in members:
            tar.append(name, data)
        self._size += size
        self._rows.append(table, row)

    def _is_full(self, more: int) -> bool:
        max_rows, max_bytes = self._limits
        return (max_rows is not None and self._rows.rows >= max_rows) or (
            max_bytes is not None and self._size + more + _TAR_END > max_bytes
        )

    def _open(self) -> TarAppender:
        self._started, self._size = time.time(), 0
        self._tar = TarAppender(self._folder / f"{self._shard:05d}.tar")
        return self._tar

    def close(self) -> None:
        """Finish the shard under way, with its Parquet and its statistics; nothing to do when there is none."""
        if self._tar is None:
            return
        self._tar.close()
        self._tar = None
        name, count = f"{self._shard:05d}", self._rows.rows
        _sync(self._folder / f"{name}.tar")
        write_parquet(self._rows.take(), self._folder / f"{name}.parquet")
        _sync(self._folder / f"{name}.parquet")
        for file in (f"{name}.tar", f"{name}.parquet"):
            self.files[file] = (self._folder / file).stat().st_size
        stats = self._folder / f"{name}_stats.json"
        stats.write_text(_stats(count, self._started, time.time()), encoding="utf-8")
        _sync(stats)
        self._shard += 1

    def abandon(self) -> None:
        """Close the tar under way without its end mark."""
        if self._tar is not None:
            with suppress(OSError):
                self._tar.__exit__(OSError, OSError(), None)


def _stats(count: int, start: float, end: float) -> str:
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


class ParquetShards:
    """`00000.parquet` …, with the image in a column `image`: struct of `bytes` and `path` (`<key>.<extension>`).

    That is the form Hugging Face datasets decodes as Image (the file's metadata says so). `max_bytes` and
    `row_group_bytes` count uncompressed bytes of images and values; a row group holds at least one row.
    """

    def __init__(
        self,
        folder: Path,
        schema: pa.Schema,
        max_rows: int | None,
        max_bytes: int | None,
        row_group_bytes: int,
        with_media: bool,
    ) -> None:
        self.files: dict[str, int] = {}
        self._folder = folder
        self._limits = (max_rows, max_bytes)
        self._group_limit = row_group_bytes
        self._with_media = with_media
        self._schema = _with_image(schema) if with_media else schema
        self._rows = RowBuffer(schema)
        self._images: list[dict[str, Any] | None] = []
        self._writer: pq.ParquetWriter | None = None
        self._group = self._size = self._count = self._shard = 0

    def add(self, record: dict[str, Any], table: pa.Table, row: int, media: Media | None) -> None:
        """Write one sample; rows reach the file a row group at a time."""
        size = (len(media[1]) if media else 0) + sum(_value_bytes(v) for v in record.values())
        max_rows, max_bytes = self._limits
        if self._count and (
            (max_rows is not None and self._count >= max_rows)
            or (max_bytes is not None and self._size + size > max_bytes)
        ):
            self.close()
        if self._rows.rows and self._group + size > self._group_limit:
            self._flush()
        if self._with_media:
            key = table.column("key")[row].as_py()
            self._images.append({"bytes": media[1], "path": f"{key}.{media[0]}"} if media else None)
        self._rows.append(table, row)
        self._group += size
        self._size += size
        self._count += 1

    def _flush(self) -> None:
        """Write the rows held as one row group."""
        if self._writer is None:
            path = self._folder / f"{self._shard:05d}.parquet"
            self._writer = pq.ParquetWriter(path, self._schema, **PARQUET)
        group = self._rows.take()
        if self._with_media:
            images = pa.array(self._images, self._schema.field("image").type)
            group = pa.table([images, *group.columns], schema=self._schema)
            self._images = []
        self._writer.write_table(group, row_group_size=max(1, len(group)))
        self._group = 0

    def close(self) -> None:
        """Finish the shard under way; nothing to do when there is none."""
        if not self._count:
            return
        self._flush()
        assert self._writer is not None
        self._writer.close()
        self._writer = None
        path = self._folder / f"{self._shard:05d}.parquet"
        _sync(path)
        self.files[path.name] = path.stat().st_size
        self._shard += 1
        self._size = self._count = 0

    def abandon(self) -> None:
        """Close the file under way; what it lacks does not matter."""
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()


def _with_image(schema: pa.Schema) -> pa.Schema:
    image = pa.field("image", pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())]))
    features = {"info": {"features": {"image": {"_type": "Image"}}}}
    return pa.schema([image, *schema], metadata={"huggingface": json.dumps(features)})


def _value_bytes(value: Any) -> int:
    """Roughly what a value takes uncompressed; only has to be a function of the value."""
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, Sequence):
        return sum(_value_bytes(v) for v in value)
    if isinstance(value, dict):
        return sum(_value_bytes(v) for v in value.values())
    return 8
