"""MosaicML streaming's MDS: `shard.00000.mds` … and `index.json`, written by its own MDSWriter (extra `mds`).

Column `image`: the bytes as stored (b"" = none), to be opened with Pillow: MDS's `jpeg` would encode them anew.
Numbers, truth values and texts without a NULL have MDS's own types; every other column is `json`, where NULL is
null, bytes are hex digits and times texts. Source: mosaicml-streaming 0.13, base/format/mds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from mmdata.errors import MissingExtra
from mmdata.export_plan import Plan
from mmdata.exporters.shape import Chunk, Format, sync
from mmdata.layout import json_value

__all__ = ["Mds"]


class Mds(Format):
    """One MDS file a shard; a shard is held in memory, hence 64 MB by default, as MDSWriter has it."""

    default_bytes = 1 << 26
    reserved = ("image",)
    notes = ".index"

    @classmethod
    def require(cls) -> None:
        """MissingExtra without mosaicml-streaming."""
        try:
            import streaming  # noqa: F401
        except ImportError:
            raise MissingExtra(
                "export.format mds needs MosaicML streaming: pip install 'mmdata[mds]' in an environment of its own, "
                "because it needs older packages than the rest may have"
            ) from None

    def files(self, shard: int, shards: int) -> tuple[str, ...]:
        """The shard, and what `index.json` will say of it."""
        return f".index/{shard:05d}.json", f"shard.{shard:05d}.mds"

    def is_data(self, name: str) -> bool:
        """Entries of the index are gathered by `finish`."""
        return not name.startswith(".index/")

    def _columns(self) -> dict[str, str]:
        full = set(self.shape.full_names)
        found = {f.name: _encoding(f.type) if f.name in full else "json" for f in self.shape.schema}
        return {**({self.shape.media_name: "bytes"} if self.shape.with_media else {}), **found}

    def write(self, shard: int, shards: int, chunks: Iterable[Chunk], folder: Path) -> None:
        """Let MDSWriter write one shard, and give it its number."""
        from streaming import MDSWriter

        columns = self._columns()
        # MDSWriter holds a shard's samples until it is closed; its own limit on bytes must not cut what the plan cut.
        with MDSWriter(columns=columns, out=str(folder / "mds"), size_limit=None) as writer:
            for sample in self._samples(chunks, columns):
                writer.write(sample)
        [entry] = json.loads((folder / "mds" / "index.json").read_bytes())["shards"]
        name = f"shard.{shard:05d}.mds"
        (folder / "mds" / entry["raw_data"]["basename"]).rename(folder / name)
        entry["raw_data"]["basename"] = name
        (folder / ".index").mkdir()
        index = folder / ".index" / f"{shard:05d}.json"
        index.write_text(json.dumps(entry, sort_keys=True), encoding="utf-8")
        sync(folder / name)
        sync(index)

    def _samples(self, chunks: Iterable[Chunk], columns: dict[str, str]) -> Iterator[dict[str, Any]]:
        for chunk in chunks:
            for row, record in enumerate(chunk.table.to_pylist()):
                sample = {n: _value(v, columns[n]) for n, v in record.items()}
                if self.shape.with_media:
                    media = chunk.media(row)
                    sample[self.shape.media_name] = b"" if media is None else media[1]
                yield sample

    def finish(self, folder: Path, plan: Plan) -> list[str]:
        """Write `index.json`."""
        path = folder / "index.json"
        with path.open("w", encoding="utf-8") as file:
            file.write('{"shards": [')
            for shard in range(plan.shards):
                file.write(", " if shard else "")
                file.write((folder / ".index" / f"{shard:05d}.json").read_text(encoding="utf-8"))
            file.write('], "version": 2}')
            file.flush()
            os.fsync(file.fileno())
        return ["index.json"]

    def opening(self) -> str:
        """By StreamingDataset."""
        return (
            "```python\nimport io\nfrom PIL import Image\nfrom streaming import StreamingDataset\n"
            'ds = StreamingDataset(local="path/to/this/folder", batch_size=1, shuffle=False)\n'
            'picture = Image.open(io.BytesIO(ds[0]["image"]))\n```\n'
        )


def _encoding(kind: pa.DataType) -> str:
    """MDS's type for a column without NULLs."""
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "str"
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return "bytes"
    if pa.types.is_boolean(kind):
        return "uint8"
    if pa.types.is_integer(kind):
        return str(kind)
    if pa.types.is_floating(kind):
        return {"halffloat": "float16", "float": "float32", "double": "float64"}[str(kind)]
    if pa.types.is_fixed_size_list(kind) and pa.types.is_floating(kind.value_type):
        return f"ndarray:{_encoding(kind.value_type)}:{kind.list_size}"
    return "json"


def _value(value: Any, encoding: str) -> Any:
    if encoding == "json":
        return json_value(value)
    if encoding.startswith("ndarray"):
        import numpy as np

        return np.asarray(value, encoding.split(":")[1])
    return value
