"""One shard of a dataset laid out as img2dataset does, at the top of the dataset folder, beside the dataset itself.

In: the committed rows of a shard, whose media lies in the dataset. Out, by `fetch.layout`: `00000.tar` (webdataset; on
a local disk a second name of the shard's own tar) or the folder `00000/` (files), `00000.parquet` with a row for every
row of the list, failures too (parquet: with the media inside), and at the end `00000_stats.json`, which says that the
rest is whole. All is made from the rows file, so an attempt that lost against another leaves nothing of its own here. A
later generation of the rows makes the shard's layout anew: statistics go first and come last. Done twice it changes
nothing. StoreError: disk, folder.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmdata.column_files import PARQUET
from mmdata.columns import MEDIA_ROLES, base_schema
from mmdata.errors import StoreError
from mmdata.media.tar import TarAppender
from mmdata.sample_layout import FINER, beside, layout_schema, member_name, record, their_status
from mmdata.settings import FetchOptions
from mmdata.store import Store, shard_name

__all__ = ["complete_layouts", "is_layout_name", "lay_out"]

_ROWS = "mmdata:rows"  # footer of the Parquet: the rows file it was made from
_COPY = 64 << 20
_GROUP_BYTES = 16 << 20  # of media in a row group
_GROUP_ROWS = 10_000
_ATTEMPTS = 3
_UPLOADS = 32
_NAME = re.compile(r"\d+(\.tar|\.parquet|_stats\.json)?")
_OWN = frozenset(base_schema(None, MEDIA_ROLES).names) | {"md5", "sha512"}

Row = dict[str, Any]


def is_layout_name(name: str) -> bool:
    """Whether a name at the top of a dataset folder may be part of a layout."""
    return _NAME.fullmatch(name) is not None


def lay_out(store: Store, shard: int, fetch: FetchOptions, has_captions: bool, started: float | None = None) -> None:
    """Write the layout of one shard from its newest rows file, unless it stands.

    `has_captions`: the shard's list names a column of captions. `started`: when the work on the shard began, in seconds
    since the epoch, for the statistics.
    """
    begun = time.time() if started is None else started
    for _ in range(_ATTEMPTS):
        rows_file = _newest_rows(store, shard)
        if _stands(store, shard, fetch, rows_file):
            return
        job = _Job(store, shard, fetch, has_captions, rows_file)
        job.unmake()
        # A worker that was taken for dead may have written meanwhile, from the same rows or from older ones.
        if job.make() and _newest_rows(store, shard) == rows_file:
            store.create(job.stats_name, job.stats(begun, time.time()))
            return
    raise StoreError(f"the layout of shard {shard_name(shard)} in {store.url} is being written by another process")


def complete_layouts(store: Store, sources: Sequence[Mapping[str, Any]], fetch: FetchOptions) -> int:
    """Lay out the shards that a crash or a new generation left without; returns how many.

    `sources` are the entries of `dataset.json`, whose shards are all known.
    """
    if fetch.layout == "none":
        return 0
    there, done = set(store.list("")), 0
    for shard, rows_file in store.row_files().items():
        source = _source_of(sources, shard)
        is_first = rows_file.endswith(".g0.parquet")
        if source is None or (is_first and f"{_name(shard, fetch)}_stats.json" in there):
            continue
        if not _stands(store, shard, fetch, rows_file):
            lay_out(store, shard, fetch, source["options"].get("caption") is not None)
            done += 1
    return done


def _source_of(sources: Sequence[Mapping[str, Any]], shard: int) -> Mapping[str, Any] | None:
    """The list that a shard is of; None for adopted media."""
    for entry in sources:
        first, count = entry.get("first_shard"), entry.get("shards")
        if first is not None and count is not None and first <= shard < first + count:
            return entry if entry["kind"] == "urls" else None
    return None


def _name(shard: int, fetch: FetchOptions) -> str:
    return f"{shard:0{fetch.oom_shard_count}d}"


def _newest_rows(store: Store, shard: int) -> str:
    """Its newest rows file: looked for by name, for there may be very many shards."""
    number, name = 0, f"rows/{shard_name(shard)}.g0.parquet"
    while store.exists(later := f"rows/{shard_name(shard)}.g{number + 1}.parquet"):
        number, name = number + 1, later
    return name


def _stands(store: Store, shard: int, fetch: FetchOptions, rows_file: str) -> bool:
    name = _name(shard, fetch)
    if not store.exists(f"{name}_stats.json"):
        return False
    return rows_file.endswith(".g0.parquet") or _made_from(store, f"{name}.parquet") == rows_file


def _made_from(store: Store, name: str) -> str | None:
    return store.footer(name).get(_ROWS) if store.exists(name) else None


class _Job:
    """The layout of one shard, made from one rows file."""

    def __init__(self, store: Store, shard: int, fetch: FetchOptions, has_captions: bool, rows_file: str) -> None:
        self._store, self._fetch, self._has_captions, self._rows_file = store, fetch, has_captions, rows_file
        self._name = _name(shard, fetch)
        self.stats_name = f"{self._name}_stats.json"
        self._table = store.read_table(rows_file)
        self._extra = pa.schema([f for f in self._table.schema if f.name not in _OWN])
        self._rows: list[Row] = self._table.to_pylist()
        self._records = [record(row, fetch, self._extra.names, has_captions) for row in self._rows]

    def unmake(self) -> None:
        """Remove what an earlier attempt or generation left, the mark that it is whole first."""
        there = dict(self._store.entries(""))
        for name in (self.stats_name, f"{self._name}.parquet", f"{self._name}.tar"):
            if name in there:
                self._store.remove(name)
        if self._name in there:
            for name in self._store.list(self._name):
                self._store.remove(f"{self._name}/{name}")

    def make(self) -> bool:
        """Write all but the statistics; whether the Parquet there is of our rows file."""
        with self._store.scratch() as folder:
            media = _Media(self._store, folder)
            if self._fetch.layout == "webdataset":
                self._make_tar(folder, media)
            elif self._fetch.layout == "files":
                self._make_folder(folder, media)
            path = folder / "layout.parquet"
            self._write_parquet(path, media)
            media.close()
            return self._store.commit(f"{self._name}.parquet", path) or (
                _made_from(self._store, f"{self._name}.parquet") == self._rows_file
            )

    # Media

    def _stored(self) -> Iterator[tuple[Row, str, tuple[str, int, int]]]:
        """Every stored row, with the name of its media as img2dataset has it, and where it lies."""
        for row in self._rows:
            if row["status"] == "ok":
                role = next(r for r in MEDIA_ROLES if row.get(f"{r}_path") is not None)
                place = row[f"{role}_path"], row[f"{role}_offset"], row[f"{role}_size"]
                yield row, member_name(row["key"], row[f"{role}_ext"], self._fetch), place

    def _make_tar(self, folder: Path, media: _Media) -> None:
        tars = {place[0] for _, _, place in self._stored()}
        name = f"{self._name}.tar"
        if len(tars) == 1 and self._rows_file.endswith(".g0.parquet"):  # ingest gave it the members already
            [tar] = tars
            if self._store.is_local:
                self._store.link(name, tar)
            else:
                media.copy(tar, folder / "copy.tar")
                self._store.commit(name, folder / "copy.tar")
            return
        with TarAppender(folder / "made.tar") as made:
            for member, data in self._files(media):
                made.append(member, data)
        self._store.commit(name, folder / "made.tar")

    def _make_folder(self, folder: Path, media: _Media) -> None:
        if self._store.is_local:
            self._store.commit_folder(self._name, self._files(media))
            return

        def upload(found: tuple[str, bytes]) -> None:
            local = folder / f"file-{found[0]}"
            local.write_bytes(found[1])
            self._store.commit(f"{self._name}/{found[0]}", local)

        with ThreadPoolExecutor(_UPLOADS) as pool:
            files = self._files(media)
            while batch := [found for found, _ in zip(files, range(_UPLOADS), strict=False)]:
                list(pool.map(upload, batch))

    def _files(self, media: _Media) -> Iterator[tuple[str, bytes]]:
        for row, name, place in self._stored():
            yield name, media.read(*place)
            for ext, data in beside(row, self._fetch, self._extra.names, self._has_captions):
                yield f"{row['key']}.{ext}", data

    # Rows

    def _write_parquet(self, path: Path, media: _Media) -> None:
        schema = layout_schema(self._extra, self._fetch, self._has_captions)
        cells = self._fetch.encode_format if self._fetch.layout == "parquet" else None
        columns = {}
        for field in schema:
            if field.name in FINER:
                columns[field.name] = self._table.column(FINER[field.name])
            elif field.name in self._extra.names:
                columns[field.name] = self._table.column(field.name)
            elif field.name != cells:
                columns[field.name] = pa.array([r[field.name] for r in self._records], field.type)
        schema = schema.with_metadata({_ROWS: self._rows_file})
        places = {row["key"]: place for row, _, place in self._stored()}
        with pq.ParquetWriter(path, schema, **PARQUET) as writer:
            for first, stop in self._groups(cells is not None):
                found = {name: values[first:stop] for name, values in columns.items()}
                if cells is not None:
                    keys = [row["key"] for row in self._rows[first:stop]]
                    found[cells] = pa.array([media.read(*places[k]) if k in places else None for k in keys])
                arrays = [found[f.name].cast(f.type) for f in schema]
                writer.write_table(pa.table(arrays, schema=schema), row_group_size=max(1, stop - first))

    def _groups(self, by_bytes: bool) -> Iterator[tuple[int, int]]:
        first = held = 0
        for index, row in enumerate(self._rows):
            size = sum(row.get(f"{role}_size") or 0 for role in MEDIA_ROLES) if by_bytes else 0
            if index - first == _GROUP_ROWS or (index > first and held + size > _GROUP_BYTES):
                yield first, index
                first, held = index, 0
            held += size
        yield first, len(self._rows)

    def stats(self, started: float, ended: float) -> bytes:
        """Img2dataset's statistics (logger.py, write_stats)."""
        statuses = Counter(their_status(row) for row in self._rows)
        messages = Counter(r["error_message"] or r["status"] for r in self._records)
        found = {
            "count": len(self._rows),
            "successes": statuses["success"],
            "failed_to_download": statuses["failed_to_download"],
            "failed_to_resize": statuses["failed_to_resize"],
            "duration": ended - started,
            "start_time": started,
            "end_time": ended,
            "status_dict": dict(messages),
        }
        return json.dumps(found, indent=4).encode()


class _Media:
    """Bytes of a shard's media: from the files of a local folder, from copies in scratch where they are far away."""

    def __init__(self, store: Store, folder: Path) -> None:
        self._store, self._folder = store, folder
        self._open: dict[str, Any] = {}

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Exactly these bytes; StoreError where the file is gone or shorter."""
        if self._store.is_local:
            return self._store.read_range(name, offset, size)
        if name not in self._open:
            path = self._folder / f"media-{len(self._open)}"
            self.copy(name, path)
            self._open[name] = path.open("rb")
        self._open[name].seek(offset)
        data: bytes = self._open[name].read(size)
        if len(data) != size:
            raise StoreError(
                f"{name} of {self._store.url} ends before byte {offset + size}; it was cut short: restore it"
            )
        return data

    def copy(self, name: str, path: Path) -> None:
        """A copy of one of the dataset's files."""
        with self._store.fs.open(f"{self._store.root}/{name}", "rb") as source, path.open("xb") as target:
            shutil.copyfileobj(source, target, _COPY)

    def close(self) -> None:
        """Let go of the copies."""
        for file in self._open.values():
            file.close()
