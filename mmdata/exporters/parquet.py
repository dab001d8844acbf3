"""`00000.parquet` …, with media in a column `image` (or `audio` …): struct of `bytes` and `path` (`<key>.<extension>`).

That is the form Hugging Face datasets decodes as Image (the file's metadata says so). `shard_size` and
`row_group_bytes` count uncompressed bytes of images and values; a row group holds at least one row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmdata.column_files import PARQUET
from mmdata.exporters.shape import Chunk, Format, Media, sync, value_bytes
from mmdata.sample_media import FEATURES

__all__ = ["ParquetFiles"]


class _RowBuffer:
    """Rows of one or several tables, in order, kept as slices until they are taken as one table."""

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        self._slices: list[tuple[pa.Table, int, int]] = []
        self.rows = 0

    def append(self, table: pa.Table, row: int) -> None:
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


class ParquetFiles(Format):
    """Parquet files, with the images inside unless `include_media` is false."""

    reserved = ("image",)

    def files(self, shard: int, shards: int) -> tuple[str, ...]:
        """One."""
        return (f"{shard:05d}.parquet",)

    def schema(self) -> pa.Schema:
        """Of the files: the image first, then the exported columns."""
        if not self.shape.with_media:
            return self.shape.schema
        name = self.shape.media_name
        found = pa.schema([_media_field(name), *self.shape.schema])
        if name not in FEATURES:
            return found
        features = {"info": {"features": {name: {"_type": FEATURES[name]}}}}
        return found.with_metadata({"huggingface": json.dumps(features)})

    def write(self, shard: int, shards: int, chunks: Iterable[Chunk], folder: Path) -> None:
        """Write the file, a row group at a time."""
        path = folder / self.files(shard, shards)[0]
        path.parent.mkdir(exist_ok=True)
        schema = self.schema()
        writer = pq.ParquetWriter(path, schema, **PARQUET)
        try:
            for group in self._groups(chunks, schema):
                writer.write_table(group, row_group_size=max(1, len(group)))
        except BaseException:
            with suppress(OSError):  # the first error is the one to be told
                writer.close()
            raise
        writer.close()
        sync(path)

    def _groups(self, chunks: Iterable[Chunk], schema: pa.Schema) -> Iterable[pa.Table]:
        rows, held = _RowBuffer(self.shape.schema), 0
        images: list[dict[str, Any] | None] = []
        limit, with_media = self.shape.options.max_group_bytes, self.shape.with_media

        def take() -> pa.Table:
            group = rows.take()
            if with_media:
                group = pa.table(
                    [pa.array(images, schema.field(self.shape.media_name).type), *group.columns], schema=schema
                )
                images.clear()
            return group

        for chunk in chunks:
            sizes = self._value_sizes(chunk.table)
            keys = chunk.table.column("key").to_pylist()
            for row, key in enumerate(keys):
                media = chunk.media(row) if with_media else None
                size = sizes[row] + (len(media[1]) if media else 0)
                if rows.rows and held + size > limit:
                    yield take()
                    held = 0
                images.append(_image(key, media)) if with_media else None
                rows.append(chunk.table, row)
                held += size
        if rows.rows:
            yield take()

    def _value_sizes(self, table: pa.Table) -> list[int]:
        return [sum(value_bytes(v) for v in row.values()) for row in table.to_pylist()]

    def sizes(self, table: pa.Table, image_sizes: Sequence[int]) -> list[int]:
        """Bytes of values and image, uncompressed."""
        media = image_sizes if self.shape.with_media else [0] * len(image_sizes)
        return [a + b for a, b in zip(self._value_sizes(table), media, strict=True)]

    def header(self) -> dict[str, Any]:
        """Which files are data."""
        return {"configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "*.parquet"}]}]}

    def opening(self) -> str:
        """By Hugging Face datasets and DuckDB."""
        return (
            "```python\nfrom datasets import load_dataset\n"
            'ds = load_dataset("parquet", data_files={"train": "*.parquet"})["train"]\n```\n\n'
            "```sql\nSELECT key, caption FROM '*.parquet' LIMIT 5;  -- DuckDB\n```\n"
        )


def _media_field(name: str) -> pa.Field:
    return pa.field(name, pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())]))


def _image(key: str, media: Media | None) -> dict[str, Any] | None:
    return {"bytes": media[1], "path": f"{key}.{media[0]}"} if media else None
