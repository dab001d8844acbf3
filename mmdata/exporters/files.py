"""Plain files in img2dataset's layout: a folder `00000/` of `<key>.jpg`, `<key>.txt`, `<key>.json`, a Parquet beside.

Every picture keeps its own extension, every `.json` holds all columns, NULLs too, and a sample without a picture has
none: nobody infers types or members from the first sample here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from mmdata.errors import RecipeError
from mmdata.exporters.shape import Chunk, Format, RowGroups, stats_text, sync
from mmdata.exporters.webdataset import json_texts

__all__ = ["PlainFiles"]


class PlainFiles(Format):
    """A folder a shard."""

    keys_name_files = True
    json_nulls = True

    def files(self, shard: int, shards: int) -> tuple[str, ...]:
        """Folder, Parquet, statistics."""
        return f"{shard:05d}/", f"{shard:05d}.parquet", f"{shard:05d}_stats.json"

    def require_names(self, shard: int, keys: Mapping[str, str | None]) -> None:
        """On a disk no folder, such as that of the key `x.jpg/y`, has the name of a file, such as that of `x`."""
        for key in (k for k in keys if "." in k):  # keys have dots in their folders' names only
            for folder in PurePosixPath(key).parents:
                stem, _, extension = folder.name.partition(".")
                other = str(folder.with_name(stem)) if stem else ""
                if other in keys and extension in self._extensions(keys[other]):
                    raise RecipeError(
                        f"export: in shard {shard:05d} of the export {folder} would be a file of the sample {other!r} "
                        f"and the folder of the sample {key!r}; set export.format to parquet"
                    )

    def _extensions(self, image: str | None) -> set[str]:
        """Those of a sample's files; `image` as the dataset has it."""
        return (
            {"json"}
            | ({"txt"} if self.shape.has_text else set())
            | ({_image(image)} if self.shape.with_media else set())
        )

    def sizes(self, table: pa.Table, image_sizes: Sequence[int]) -> list[int]:
        """Bytes of the files of each sample."""
        captions = [len((c or "").encode()) for c in table.column("caption").to_pylist()]
        images = image_sizes if self.shape.with_media else [0] * len(table)
        texts = json_texts(table, self.shape.json_names)
        return [len(t) + c + i for t, c, i in zip(texts, captions, images, strict=True)]

    def write(self, shard: int, shards: int, chunks: Iterable[Chunk], folder: Path) -> None:
        """Write the folder and the two files beside it."""
        started, count = time.time(), 0
        name = f"{shard:05d}"
        inside = folder / name
        inside.mkdir()
        with RowGroups(folder / f"{name}.parquet", self.shape.schema) as rows:
            for chunk in chunks:
                keys, captions = (chunk.table.column(n).to_pylist() for n in ("key", "caption"))
                for row, text in enumerate(json_texts(chunk.table, self.shape.json_names)):
                    media = chunk.media(row)
                    if media is not None:
                        _write(inside / f"{keys[row]}.{_image(media[0])}", media[1])
                    if self.shape.has_text:
                        _write(inside / f"{keys[row]}.txt", (captions[row] or "").encode())
                    _write(inside / f"{keys[row]}.json", text)
                rows.add(chunk.table)
                count += len(keys)
        stats = folder / f"{name}_stats.json"
        stats.write_text(stats_text(count, started, time.time()), encoding="utf-8")
        sync(stats)
        _sync_filesystem(inside)

    def header(self) -> dict[str, Any]:
        """Hugging Face datasets reads the columns."""
        return {"configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "*.parquet"}]}]}

    def opening(self) -> str:
        """By any program; the columns by DuckDB."""
        return (
            "A sample's files are `<shard>/<key>.jpg` (or the picture's own extension), `.txt` (the caption) and "
            "`.json` (all columns).\n\n```python\nfrom pathlib import Path\n"
            'captions = {p.stem: p.read_text() for p in sorted(Path().glob("*/*.txt"))}\n```\n\n'
            "```sql\nSELECT key, caption FROM '*.parquet' LIMIT 5;  -- DuckDB; the same samples\n```\n"
        )


def _image(extension: str | None) -> str:
    return "jpg" if extension == "jpeg" else extension or "bin"


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)  # keys of adopted samples may have folders
    with path.open("xb") as file:
        file.write(data)


def _sync_filesystem(folder: Path) -> None:
    """Have all of a folder's files on disk: one call where there is one, a call a file elsewhere."""
    if hasattr(os, "sync"):
        os.sync()
        return
    for path in folder.iterdir():
        sync(path)
