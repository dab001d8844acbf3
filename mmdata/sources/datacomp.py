"""The source `datacomp`: a pool as DataComp's download_upstream.py leaves it, adopted where it lies.

In: img2dataset's shards with a column of uids, and the pool's metadata beside them. Out: the shards' rows, then those
of the metadata that no shard has. SourceError: no shards, or no column of uids.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import Literal

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from mmdata.errors import SourceError
from mmdata.sources.adopted import Adopted, Part, missing_media, no_columns
from mmdata.sources.img2dataset import Img2datasetSource
from mmdata.sources.list_files import reading
from mmdata.sources.places import Place, absolute, fingerprint_of, open_place, place_of

__all__ = ["DataCompSource"]

_HEX = re.compile(r"[0-9a-f]{32}")


class DataCompSource(Img2datasetSource):
    """A DataComp pool: img2dataset's shards with the pool's uids, and the metadata beside them.

    `path` is the pool (`shards/` or `shards/<scale>/`, perhaps `metadata/`) or the folder of its shards. Keys and uids
    are kept. A row of the metadata whose uid is in no shard is `missing_media`, in shards after those of the tars. The
    metadata's scores are joined with the step `attach`.
    """

    kind: Literal["datacomp"] = "datacomp"  # type: ignore[assignment]  # pydantic tells kinds apart by it
    uid: str | None = Field("uid", description="column of the pool's uids")
    metadata: str | None = Field(None, description="folder of the metadata's Parquet files; null = <path>/metadata")

    def folder(self) -> str:
        """Where the shards are."""
        fs, root = fsspec.core.url_to_fs(absolute(self.path))
        if not fs.isdir(f"{root}/shards"):
            return self.path
        with reading(self.path):
            entries = [str(e["name"]).rstrip("/") for e in fs.ls(f"{root}/shards", detail=True)]
        # The script puts a folder named after the scale between.
        scale = entries[0].rpartition("/")[2] if len(entries) == 1 and fs.isdir(entries[0]) else "0"
        return f"{absolute(self.path)}/shards" + ("" if scale.isdigit() else f"/{scale}")

    def _metadata(self) -> list[Place]:
        where = absolute(self.metadata or f"{absolute(self.path)}/metadata")
        with reading(where):
            fs, root = fsspec.core.url_to_fs(where)
            if not fs.isdir(root):
                if self.metadata is not None:
                    raise SourceError(f"there is no folder {where} (source.metadata)")
                return []
            names = sorted(p for p in fs.find(root) if p.endswith(".parquet"))
            return [place_of(fs, p, p.removeprefix(root).lstrip("/"), fs.info(p)) for p in names]

    def fingerprint(self) -> str:
        """As of `img2dataset`, the metadata's files too."""
        return fingerprint_of([place for part in self.shards() for place in part.files] + self._metadata())

    def parts(self, shard_rows: int) -> Iterator[Part]:
        """The shards by number, then `shard_rows` rows at a time what the metadata has beyond them."""
        yield from self.shards()
        metadata = self._metadata()
        if not metadata:
            return
        known = _known([p.file(".parquet") for p in self.shards()], self.uid or "uid")
        held: list[pa.Table] = []
        for place in metadata:
            with reading(place.url), open_place(place.url) as file:
                table = _left_over(pq.ParquetFile(file), place, self.uid or "uid", known)
            held.append(table)
            while sum(len(t) for t in held) >= shard_rows:
                whole = pa.concat_tables(held)
                yield Part(table=whole.slice(0, shard_rows).combine_chunks(), label="metadata")
                held = [whole.slice(shard_rows)]
        rest = pa.concat_tables(held)
        if len(rest):
            yield Part(table=rest.combine_chunks(), label="metadata")

    def read(self, part: Part, extra: pa.Schema) -> Adopted:
        """As of `img2dataset`; what only the metadata has is `missing_media`."""
        if part.table is None:
            return super().read(part, extra)
        gone = missing_media("in the metadata, in no shard")
        rows = [{**row, **gone} for row in part.table.to_pylist()]
        return Adopted(rows, no_columns(extra, len(rows)))


_METADATA = {"uid": "uid", "url": "url", "caption": "text", "sha256": "sha256"} | {
    f"original_{side}_px": f"original_{side}" for side in ("width", "height")
}


def _left_over(file: pq.ParquetFile, place: Place, uid: str, known: npt.NDArray[np.bytes_]) -> pa.Table:
    """The rows of a metadata file whose uid is in no shard, under our names."""
    if uid not in file.schema_arrow.names:
        raise SourceError(f"{place.url} has no column {uid!r} (source.uid)")
    theirs = {ours: uid if ours == "uid" else name for ours, name in _METADATA.items()}
    there = {ours: name for ours, name in theirs.items() if name in file.schema_arrow.names}
    table = file.read(columns=list(dict.fromkeys(there.values())), use_threads=False)
    here = np.frombuffer(b"".join(map(_packed, table.column(uid).to_pylist())), "S16")
    at = np.minimum(np.searchsorted(known, here), max(len(known) - 1, 0))
    inside = known[at] == here if len(known) else np.zeros(len(here), bool)
    left = table.filter(pa.array(~inside))
    types = {"original_width_px": pa.int64(), "original_height_px": pa.int64()}
    return pa.table({ours: left.column(name).cast(types.get(ours, pa.string())) for ours, name in there.items()})


def _known(places: Sequence[Place | None], uid: str) -> npt.NDArray[np.bytes_]:
    """The uids of the shards, sorted; 16 bytes each."""
    found = bytearray()
    for place in places:
        if place is not None:
            with reading(place.url), open_place(place.url) as file:
                for batch in pq.ParquetFile(file).iter_batches(65_536, columns=[uid], use_threads=False):
                    found += b"".join(map(_packed, batch.column(0).to_pylist()))
    return np.sort(np.frombuffer(bytes(found), "S16"))


def _packed(uid: str | None) -> bytes:
    """A uid in 16 bytes: the 32 hex digits of DataComp's, a hash of anything else."""
    text = str(uid).lower()
    if _HEX.fullmatch(text):
        return bytes.fromhex(text)
    return hashlib.md5(text.encode("utf-8", "surrogatepass"), usedforsecurity=False).digest()
