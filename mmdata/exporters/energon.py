"""Tars for Megatron Energon: WebDataset shards and the folder `.nv-meta/` that `energon prepare` makes.

Beside each tar `00000.tar.idx` (offset of each sample, uint64 little-endian, and of the end); in `.nv-meta/`:
`.info.json` (samples of each tar), `split.yaml` (all in train), `dataset.yaml` (sample type and which member is what),
`index.sqlite` (every sample and member with offset and size), `index.uuid` (from the export's identity). So no second
pass over the tars is needed. Source: megatron-energon 7.4.1, flavors/webdataset: prepare.py, indexing.py, itar.py.
RecipeError when two samples of the export have one key: Energon finds samples by it.
"""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

from mmdata.errors import RecipeError
from mmdata.export_plan import Plan
from mmdata.exporters.shape import Chunk, sync
from mmdata.exporters.webdataset import WebDataset

__all__ = ["Energon", "tar_members"]

_VERSION = "7.4.1"  # of Energon, whose `prepare` this follows
_BLOCK = 512
_TABLES = """
CREATE TABLE samples (
    tar_file_id INTEGER NOT NULL, sample_key TEXT NOT NULL UNIQUE, sample_index INTEGER NOT NULL,
    byte_offset INTEGER, byte_size INTEGER);
CREATE TABLE sample_parts (
    tar_file_id INTEGER, sample_index INTEGER, part_name TEXT, content_byte_offset INTEGER, content_byte_size INTEGER);
"""
_INDEXES = """
CREATE INDEX idx_samples_by_tar_and_idx ON samples(tar_file_id, sample_index);
CREATE INDEX idx_sample_parts_seq ON sample_parts(tar_file_id, sample_index, content_byte_offset);
CREATE INDEX idx_sample_parts_full
    ON sample_parts(tar_file_id, sample_index, part_name, content_byte_offset, content_byte_size);
"""


class Energon(WebDataset):
    """WebDataset shards, and Energon's metadata."""

    def files(self, shard: int, shards: int) -> tuple[str, ...]:
        """Those of WebDataset, and the tar's index."""
        return f"{shard:05d}.tar.idx", *super().files(shard, shards)

    def write(self, shard: int, shards: int, chunks: Iterable[Chunk], folder: Path) -> None:
        """Write the shard, then the offsets of its samples."""
        super().write(shard, shards, chunks, folder)
        path = folder / f"{shard:05d}.tar.idx"
        offsets, last = [0], ""
        for key, _, header, _, end in tar_members(folder / f"{shard:05d}.tar"):
            if key != last:
                offsets[-1], last = header, key
                offsets.append(end)
            offsets[-1] = end
        path.write_bytes(struct.pack(f"<{len(offsets)}Q", *offsets))
        sync(path)

    def finish(self, folder: Path, plan: Plan) -> list[str]:
        """Write `.nv-meta/`."""
        meta = folder / ".nv-meta"
        meta.mkdir(exist_ok=True)
        tars = [f"{shard:05d}.tar" for shard in range(plan.shards)]
        counts = {
            tar: n - (plan.ends[i - 1] if i else 0) for i, (tar, n) in enumerate(zip(tars, plan.ends, strict=True))
        }
        self._index(folder, tars, meta / "index.sqlite")
        info = {"energon_version": _VERSION, "shard_counts": counts}
        texts = {
            ".info.json": json.dumps(info, indent=2),
            "split.yaml": yaml.safe_dump({"split_parts": {"train": tars, "val": [], "test": []}, "exclude": []}),
            "dataset.yaml": yaml.safe_dump(self._sample_type(), sort_keys=False),
            "index.uuid": str(uuid.UUID(self.shape.identity[:32])),
        }
        for name, text in texts.items():
            (meta / name).write_text(text, encoding="utf-8")
            sync(meta / name)
        return sorted(f".nv-meta/{name}" for name in [*texts, "index.sqlite"])

    @classmethod
    def require_media(cls, name: str) -> None:
        """Energon's types of samples that are written here are those of images."""
        if name != "image":
            raise RecipeError(f"export.format: energon is written for images, and this is {name}; choose webdataset")

    def _sample_type(self) -> dict[str, object]:
        """Energon's type for image and caption, for images alone, or for texts; `json` stays in the tar."""
        image, text = self.shape.extension, self.shape.has_text
        name = "CaptioningSample" if image and text else "ImageSample" if image else "TextSample"
        fields: dict[str, str] = {"image": image} if image else {}
        if text:
            fields["caption" if image else "text"] = "txt"
        elif not image:
            fields["text"] = "json"
        return {"sample_type": {"__module__": "megatron.energon", "__class__": name}, "field_map": fields}

    def _index(self, folder: Path, tars: list[str], path: Path) -> None:
        for left in folder.glob(".nv-meta/index.sqlite*"):
            left.unlink()
        with sqlite3.connect(path) as database:
            database.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;" + _TABLES)
            try:
                for number, tar in enumerate(tars):
                    samples, parts = _rows(number, folder / tar)
                    database.executemany("INSERT INTO samples VALUES (?, ?, ?, ?, ?)", samples)
                    database.executemany("INSERT INTO sample_parts VALUES (?, ?, ?, ?, ?)", parts)
            except sqlite3.IntegrityError:
                raise RecipeError(
                    "export: two samples of the export have the same key, and Energon finds samples by their keys; "
                    "set export.format to webdataset"
                ) from None
            database.executescript(_INDEXES)
        database.close()
        with path.open("rb") as file:
            os.fsync(file.fileno())

    def opening(self) -> str:
        """By Energon."""
        return (
            "```python\nfrom megatron.energon import WorkerConfig, get_loader, get_train_dataset\n"
            "ds = get_train_dataset(\n"
            '    "path/to/this/folder", batch_size=8, shuffle_buffer_size=100, max_samples_per_sequence=100,\n'
            "    worker_config=WorkerConfig.default_worker_config(0),\n)\n"
            "for batch in get_loader(ds):\n    ...\n```\n\n" + super().opening()
        )


def tar_members(path: Path) -> Iterator[tuple[str, str, int, int, int]]:
    """Members of a tar that `TarAppender` wrote: key, extension, offset of header, bytes of payload, end."""
    with path.open("rb") as file:
        offset = 0
        while True:
            header = file.read(_BLOCK)
            if len(header) < _BLOCK or not header[0]:
                return
            name = header[:100].rstrip(b"\0").decode()
            size = int(header[124:135], 8)
            end = offset + _BLOCK + -(-size // _BLOCK) * _BLOCK
            folders, slash, base = name.rpartition("/")
            key, _, extension = base.partition(".")
            key = folders + slash + key
            yield key, extension, offset, size, end
            file.seek(end)
            offset = end


def _rows(number: int, tar: Path) -> tuple[list[tuple[int, str, int, int, int]], list[tuple[int, int, str, int, int]]]:
    """The rows of both tables for one tar."""
    samples: list[tuple[int, str, int, int, int]] = []
    parts: list[tuple[int, int, str, int, int]] = []
    for key, extension, offset, size, end in tar_members(tar):
        if not samples or samples[-1][1] != key:
            samples.append((number, key, len(samples), offset, 0))
        start = samples[-1][3]
        samples[-1] = (*samples[-1][:4], end - start)
        parts.append((number, len(samples) - 1, extension, offset + _BLOCK, size))
    return samples, parts
