"""WebDataset in img2dataset's layout: `00000.tar`, `00000.parquet` (the same samples, in order), `00000_stats.json`.

Members of a sample: `<key>.<extension>`, `<key>.txt` when any kept row has a caption, `<key>.json`. The same members
for every sample: readers take the first one's for all. `shard_size` bounds the bytes of the tar; a single sample larger
than that has a tar of its own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa

from mmdata.exporters.shape import Chunk, Format, RowGroups, stats_text, sync
from mmdata.layout import json_value, records
from mmdata.media.tar import TarAppender

__all__ = ["WebDataset", "json_texts", "open_tars"]


def json_texts(table: pa.Table, names: Sequence[str]) -> Iterator[bytes]:
    """The `.json` of each sample."""
    for record in records(table, names):
        yield json.dumps(json_value(record), ensure_ascii=False).encode()


def _member_bytes(size: int) -> int:
    """A header of 512 bytes, and the payload in whole blocks of 512."""
    return 512 + -(-size // 512) * 512


class WebDataset(Format):
    """Tars, each with a Parquet file beside it."""

    media: ClassVar[Literal["always", "asked", "never"]] = "always"
    same_members = True
    keys_name_files = True
    end_bytes = 1024  # two blocks of zeros
    tags = ("webdataset",)

    def files(self, shard: int, shards: int) -> tuple[str, ...]:
        """Tar, Parquet, statistics."""
        return f"{shard:05d}.parquet", f"{shard:05d}_stats.json", f"{shard:05d}.tar"

    def sizes(self, table: pa.Table, image_sizes: Sequence[int]) -> list[int]:
        """Bytes in the tar, exactly (of the stored image, where it is blurred)."""
        captions = [len((c or "").encode()) for c in table.column("caption").to_pylist()]
        found = []
        for text, caption, image in zip(json_texts(table, self.shape.json_names), captions, image_sizes, strict=True):
            size = _member_bytes(len(text)) + (_member_bytes(caption) if self.shape.has_text else 0)
            found.append(size + (_member_bytes(image) if self.shape.extension is not None else 0))
        return found

    def write(self, shard: int, shards: int, chunks: Iterable[Chunk], folder: Path) -> None:
        """Write the three files."""
        started, count, shape = time.time(), 0, self.shape
        tar_path = folder / f"{shard:05d}.tar"
        with TarAppender(tar_path) as tar, RowGroups(folder / f"{shard:05d}.parquet", shape.schema) as rows:
            for chunk in chunks:
                keys = chunk.table.column("key").to_pylist()
                captions = chunk.table.column("caption").to_pylist()
                for row, text in enumerate(json_texts(chunk.table, shape.json_names)):
                    if shape.extension is not None:
                        media = chunk.media(row)
                        assert media is not None, keys[row]
                        tar.append(f"{keys[row]}.{shape.extension}", media[1])
                    if shape.has_text:
                        tar.append(f"{keys[row]}.txt", (captions[row] or "").encode())
                    tar.append(f"{keys[row]}.json", text)
                rows.add(chunk.table)
                count += len(keys)
        sync(tar_path)
        stats = folder / f"{shard:05d}_stats.json"
        stats.write_text(stats_text(count, started, time.time()), encoding="utf-8")
        sync(stats)

    def header(self) -> dict[str, Any]:
        """Only the tars are data: statistics and Parquet files beside them are left alone."""
        return {"configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "*.tar"}]}]}

    def opening(self) -> str:
        """By webdataset, Hugging Face datasets and DuckDB."""
        members = [f"`<key>.{self.shape.extension}`"] if self.shape.extension else []
        members += ["`<key>.txt` (the caption, empty where there is none)"] if self.shape.has_text else []
        return open_tars() + f"\nEach sample of a tar: {', '.join([*members, '`<key>.json`'])}.\n"


def open_tars() -> str:
    """Markdown: how to open tars with Parquet files beside them."""
    return (
        "```python\nfrom datasets import load_dataset\n"
        'ds = load_dataset("webdataset", data_files={"train": "*.tar"})["train"]\n```\n\n'
        "```sql\nSELECT key, caption FROM '*.parquet' LIMIT 5;  -- DuckDB; the tars' samples, in their order\n```\n"
    )
