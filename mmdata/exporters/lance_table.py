"""A Lance table, `data.lance`, one fragment a shard, written by pylance (extra `lance`).

Column `image`: the bytes as stored, NULL = none. The data files are a function of the samples, as in every format; the
names of Lance's transaction and the time in its manifest are not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa

from mmdata.errors import MissingExtra
from mmdata.export_plan import Plan
from mmdata.exporters.shape import Chunk, Format, sync

__all__ = ["LanceTable"]

_TABLE = "data.lance"
_BATCH_BYTES = 32 << 20


class LanceTable(Format):
    """Fragments first, each with a note of what it is; one commit at the end."""

    reserved = ("image",)
    notes = ".fragments"

    @classmethod
    def require(cls) -> None:
        """MissingExtra without pylance."""
        try:
            import lance  # noqa: F401
        except ImportError:
            raise MissingExtra("export.format lance needs pylance: pip install 'mmdata[lance]'") from None

    def files(self, shard: int, shards: int) -> tuple[str, ...]:
        """The fragment's note, and its data."""
        return f".fragments/{shard:05d}.json", f"{_TABLE}/data/{shard:05d}.lance"

    def is_data(self, name: str) -> bool:
        """Notes are gathered by `finish`."""
        return not name.startswith(".fragments/")

    def _schema(self) -> pa.Schema:
        image = [pa.field(self.shape.media_name, pa.large_binary())] if self.shape.with_media else []
        return pa.schema([*image, *self.shape.schema])

    def write(self, shard: int, shards: int, chunks: Iterable[Chunk], folder: Path) -> None:
        """Write one fragment, and give its file the shard's number instead of a random name."""
        from lance.fragment import write_fragments

        failed: list[BaseException] = []

        def batches() -> Iterator[pa.RecordBatch]:
            try:
                for table in self._tables(chunks):
                    yield from table.to_batches()
            except BaseException as error:
                failed.append(error)  # Lance makes a text of it
                raise

        reader = pa.RecordBatchReader.from_batches(self._schema(), batches())
        try:
            [fragment] = write_fragments(reader, folder / _TABLE, mode="create", max_rows_per_file=1 << 30)
        except (OSError, ValueError, RuntimeError):
            if failed:
                raise failed[0] from None
            raise
        note = fragment.to_json()
        name = f"{shard:05d}.lance"
        [file] = note["files"]
        (folder / _TABLE / "data" / file["path"]).rename(folder / _TABLE / "data" / name)
        file["path"] = name
        (folder / ".fragments").mkdir()
        path = folder / ".fragments" / f"{shard:05d}.json"
        path.write_text(json.dumps(note, sort_keys=True), encoding="utf-8")
        sync(folder / _TABLE / "data" / name)
        sync(path)

    def _tables(self, chunks: Iterable[Chunk]) -> Iterator[pa.Table]:
        """The samples with their images, a bounded number of bytes at a time."""
        schema = self._schema()
        for chunk in chunks:
            start, held = 0, 0
            images: list[bytes | None] = []
            for row in range(len(chunk.table)):
                media = chunk.media(row) if self.shape.with_media else None
                images.append(None if media is None else media[1])
                held += 0 if media is None else len(media[1])
                if held >= _BATCH_BYTES or row + 1 == len(chunk.table):
                    part = chunk.table.slice(start, row + 1 - start)
                    image = [pa.array(images, pa.large_binary())] if self.shape.with_media else []
                    yield pa.table([*image, *part.columns], schema=schema)
                    start, held, images = row + 1, 0, []

    def finish(self, folder: Path, plan: Plan) -> list[str]:
        """Commit all fragments as the table's first version; a version that a killed attempt left is replaced."""
        import lance

        table = folder / _TABLE
        notes = [json.loads((folder / ".fragments" / f"{n:05d}.json").read_bytes()) for n in range(plan.shards)]
        if not notes:
            lance.write_dataset(self._schema().empty_table(), table, mode="overwrite")
            return []
        fragments = [lance.FragmentMetadata.from_json(json.dumps(note)) for note in notes]
        lance.LanceDataset.commit(table, lance.LanceOperation.Overwrite(self._schema(), fragments))
        return []

    def opening(self) -> str:
        """By pylance."""
        return (
            '```python\nimport lance\nds = lance.dataset("data.lance")\n'
            'rows = ds.take([0, 1], columns=["key", "caption", "image"]).to_pylist()\n```\n'
        )
