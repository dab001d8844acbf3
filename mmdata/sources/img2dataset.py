"""The source `img2dataset`: a folder that img2dataset wrote, adopted where it lies.

In: a folder of shards in any of its output formats (webdataset, files, parquet). Out: one row per row of a shard's
Parquet, in its order, failures too, their messages mapped to our statuses; keys, sizes, hashes and EXIF as given there.
A shard without a Parquet gives its tar's samples. SourceError: no shards there, or a Parquet that was left torn.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any, Literal

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from mmdata.columns import BASE_COLUMNS, STATUSES
from mmdata.errors import SourceError, nearest
from mmdata.sources.adopted import Adopted, AdoptingSource, Part, Row, missing_media, no_columns
from mmdata.sources.list_files import reading
from mmdata.sources.places import Place, absolute, fingerprint_of, is_local, open_place, place_of
from mmdata.sources.plain_columns import check_extra_names, plain_column, plain_type, require_distinct
from mmdata.sources.tar_samples import TarSamples
from mmdata.sources.webdataset import WebDatasetSource

__all__ = ["Img2datasetSource", "status_of"]

_MEDIA = ("jpg", "png", "webp")
_SAME = {  # our base column → theirs
    "key": "key",
    "url": "url",
    "sha256": "sha256",
    "exif": "exif",
    "width_px": "width",
    "height_px": "height",
    "original_width_px": "original_width",
    "original_height_px": "original_height",
}
# Further base columns that mmdata's own layout has
_FINER = ("status_detail", "http_status", "final_url", "content_type", "size_bytes", "attempts", "fetch_ms")
_HTTP = re.compile(r"HTTP Error (\d{3})")
# What urllib and img2dataset say, in the order in which it is looked for → our status.
_MESSAGES: tuple[tuple[str, str], ...] = (
    (r"hash mismatch", "hash_mismatch"),
    (r"image too small|image area too large|aspect ratio too large", "filtered"),
    (r"disallowed by X-Robots-Tag", "opted_out"),
    (r"redirect error that would lead to an infinite loop", "too_many_redirects"),
    (r"unknown url type|no host given|control characters|nonnumeric port|Invalid IPv6|codec can't encode", "bad_url"),
    (r"timed out|timeout", "timeout"),
    (r"Name or service not known|name resolution|No address associated|nodename nor servname|getaddrinfo", "dns"),
    (r"CERTIFICATE|SSL|TLS|ssl\.c", "tls"),
)


def status_of(status: str | None, message: str | None) -> tuple[str, int | None]:
    """Our status for img2dataset's `status` and `error_message`, and the HTTP status where it tells one.

    What it reports as failed_to_download without a reason we know is `connect`, as failed_to_resize `decode`.
    """
    text = message or ""
    if status == "success":
        return "ok", None
    if (match := _HTTP.search(text)) is not None and "infinite loop" not in text:
        code = int(match[1])
        if code == 429:
            return "http_429", code
        return ("http_5xx" if code >= 500 else "http_4xx" if code >= 400 else "too_many_redirects"), code
    for pattern, ours in _MESSAGES:
        if re.search(pattern, text):
            return ours, int(match[1]) if match is not None else None
    return ("decode" if status == "failed_to_resize" else "connect"), None


class Img2datasetSource(AdoptingSource):
    """A folder that img2dataset wrote. One of its shards is one shard; keys and the order of its Parquet are kept."""

    kind: Literal["img2dataset"] = "img2dataset"
    path: str = Field(min_length=1, description="its output folder; an fsspec URL too")
    caption: str | None = Field("caption", description="column of the captions; null = there are none")
    uid: str | None = Field(None, description="column of each row's own uid; null = made from URL and caption")
    columns: tuple[str, ...] = Field((), description="further columns of its Parquet to carry along")

    @property
    def has_captions(self) -> bool:
        """Whether the recipe names a column of captions."""
        return self.caption is not None

    def folder(self) -> str:
        """Where the shards are."""
        return self.path

    def schema(self) -> pa.Schema:  # type: ignore[override]
        """The columns asked for, in the types of the first shard's Parquet; SourceError when one is not there."""
        check_extra_names(self.columns)
        found: pa.Schema | None = None
        for part in self.shards():
            place = part.file(".parquet")
            if place is None:
                continue
            with reading(place.url), open_place(place.url) as file:
                found = pq.read_schema(file)
            break
        if found is None:
            if self.columns:
                raise SourceError(
                    f"{self.path} has no Parquet beside its shards, so no columns: leave out source.columns"
                )
            return pa.schema([])
        asked = [("uid", self.uid), *(("columns", c) for c in self.columns)]
        for option, name in [*asked, ("caption", None if self.caption == "caption" else self.caption)]:
            if name is not None and name not in found.names:
                raise SourceError(
                    f"{place.url if place else self.path} has no column {name!r} (source.{option})"
                    f"{nearest(name, found.names)}"
                )
        return pa.schema([(n, plain_type(found.field(n).type)) for n in self.columns])

    def fingerprint(self) -> str:
        """See `AdoptingSource`: names, sizes and times of change of the shards' files."""
        return fingerprint_of(place for part in self.shards() for place in part.files)

    def parts(self, shard_rows: int) -> Iterator[Part]:
        """One of its shards each, by number."""
        yield from self.shards()

    def shards(self) -> list[Part]:
        """The shards there are: `<n>.tar`, `<n>.parquet` and folders `<n>`, all of a number together."""
        where = absolute(self.folder())
        with reading(where):
            fs, root = fsspec.core.url_to_fs(where)
            if not fs.isdir(root):
                raise SourceError(f"there is no folder {where}; source.path is the output folder of img2dataset")
            entries = sorted(fs.ls(root, detail=True), key=lambda e: str(e["name"]))
        found: dict[str, list[Place]] = {}
        for entry in entries:
            name = str(entry["name"]).rstrip("/").rpartition("/")[2]
            match = re.fullmatch(r"(\d+)(\.tar|\.parquet|)", name)
            if match is None or (match[2] == "") != (entry["type"] == "directory"):
                continue
            if match[2] == ".parquet" and entry.get("size") == 0:
                raise SourceError(
                    f"{entry['name']} is empty: img2dataset was stopped in that shard; run it again, or remove the "
                    "shard's files"
                )
            found.setdefault(match[1], []).append(place_of(fs, str(entry["name"]), name, entry))
        if not found:
            raise SourceError(f"{where} holds no shards of img2dataset (00000.tar, 00000.parquet)")
        return [Part(tuple(found[n]), label=n) for n in sorted(found, key=lambda n: (int(n), n))]

    def read(self, part: Part, extra: pa.Schema) -> Adopted:
        """The rows of the shard's Parquet, else the samples of its tar."""
        parquet = part.file(".parquet")
        if parquet is None:
            return self._without_parquet(part, extra)
        with reading(parquet.url), open_place(parquet.url) as file:
            rows, carried = self._rows(pq.ParquetFile(file), parquet, extra)
        tar, folder = part.file(".tar"), part.file("")
        cells = [row.pop("_cell", None) for row in rows]
        if any(cells):
            _refer(rows, lambda index, key: cells[index], "the Parquet holds no bytes for it")
        elif tar is not None:
            members, why = _members(tar)
            _refer(rows, lambda index, key: members.get(key), why)
        elif folder is not None:
            files = _files_below(folder)
            _refer(rows, lambda index, key: files.get(key), f"not in {folder.url}")
        else:
            _refer(rows, lambda index, key: None, "the shard has no media, only its Parquet")
        return Adopted(rows, carried)

    def _rows(self, file: pq.ParquetFile, place: Place, extra: pa.Schema) -> tuple[list[Row], pa.Table]:
        names = file.schema_arrow.names
        require_distinct(place.url, names)
        absent = [n for n in ("key", "status", *extra.names) if n not in names]
        if absent:
            raise SourceError(
                f"{place.url} has no column {absent[0]!r}; it is not as img2dataset writes it, or not as "
                "the first shard's"
            )
        media = next(
            (m for m in _MEDIA if m in names and pa.types.is_binary(plain_type(file.schema_arrow.field(m).type))), None
        )
        taken = {**_SAME, "caption": self.caption, "uid": self.uid, "_status": "status", "_message": "error_message"}
        if "mmdata_status" in names:  # written by mmdata in this layout: it says more
            taken |= {name: name for name in _FINER} | {"_ours": "mmdata_status"}
        found: dict[str, list[Any]] = {}
        carried: list[pa.Table] = []
        wanted = [n for n in dict.fromkeys([*taken.values(), *extra.names, media]) if n in names]
        row = 0
        for batch in file.iter_batches(4096, columns=wanted, use_threads=False):
            for ours, theirs in taken.items():
                known = theirs in batch.schema.names
                values = _typed(batch.column(theirs), ours, place) if known else [None] * len(batch)
                found.setdefault(ours, []).extend(values)
            cells: list[Row | None] = [None] * len(batch)
            if media is not None:
                lengths = pc.binary_length(batch.column(media)).to_pylist()
                cells = [_cell(f"{place.url}#{media}", row + i, n, media) for i, n in enumerate(lengths)]
            found.setdefault("_cell", []).extend(cells)
            row += len(batch)
            carried.append(pa.table([plain_column(batch.column(f.name), f.type) for f in extra], schema=extra))
            if not len(extra):
                carried.clear()
        table = pa.concat_tables(carried) if carried else no_columns(extra, row)
        rows = [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)] if row else []
        return [_mapped(r) for r in rows], table

    def _without_parquet(self, part: Part, extra: pa.Schema) -> Adopted:
        """A tar alone, as some published copies are: its .json members say what the Parquet would have said."""
        tar = part.file(".tar")
        if tar is None:
            raise SourceError(f"{part.files[0].url} has no Parquet beside it; adopt the folder with source.kind images")
        caption = None if self.caption is None else f"txt;json.{self.caption}"
        uid = None if self.uid is None else f"json.{self.uid}"
        reader = WebDatasetSource(path=tar.url, caption=caption, url="json.url", uid=uid, columns=())
        found = reader.read(Part((tar,)), reader.schema())
        return Adopted(found.rows, no_columns(extra, len(found.rows)))


_TYPES = {c.name: c.type for c in BASE_COLUMNS}


def _typed(column: pa.Array, ours: str, place: Place) -> list[Any]:
    """A column of theirs in the type of ours; numbers that went through pandas are floats with NaN for NULL."""
    try:
        if pa.types.is_floating(column.type):
            column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
        values: list[Any] = plain_column(column, _TYPES.get(ours, pa.string())).to_pylist()
    except pa.ArrowException as error:
        why = " ".join(str(error).split())[:200]
        raise SourceError(f"{place.url}: the column for {ours} is {column.type}, {why}") from None
    return values


def _cell(path: str, row: int, size: int | None, extension: str) -> Row | None:
    if size is None:
        return None
    return {"image_path": path, "image_offset": row, "image_size": size, "image_ext": extension}


def _mapped(row: Row) -> Row:
    """A row of their Parquet under our names; a success waits for its media."""
    status, http_status = status_of(row.pop("_status"), message := row.pop("_message"))
    if (ours := row.pop("_ours", None)) in STATUSES:
        return {**row, "status": ours, **({"_cell": None} if ours != "ok" else {})}
    if status != "ok":
        row |= {"status_detail": message, "http_status": http_status, "_cell": None}
    return {**row, "status": status}


def _refer(rows: list[Row], find: Any, why: str) -> None:
    """Give every success its media; one that has none is `missing_media`."""
    for index, row in enumerate(rows):
        if row["status"] == "ok":
            row |= find(index, row["key"]) or {**missing_media(why), "width_px": None, "height_px": None}


def _members(tar: Place) -> tuple[dict[str, Row], str]:
    """Key → reference of every picture in a tar, and why one may not be there."""
    found: dict[str, Row] = {}
    with reading(tar.url), open_place(tar.url) as file:
        samples = TarSamples(file, tar.url, tar.size, _MEDIA, probe=False)
        for sample in samples:
            if sample.image is not None and "status" not in sample.image:
                found.setdefault(sample.key, sample.image)
    why = f"not in {tar.name}"
    return found, why if samples.damage is None else f"{why}, which is cut short: {samples.damage}"


def _files_below(folder: Place) -> dict[str, Row]:
    """Key → reference of every picture in a shard's folder (output_format files); links are not followed."""
    found: dict[str, Row] = {}
    if not is_local(folder.url):
        with reading(folder.url):
            fs, root = fsspec.core.url_to_fs(folder.url)
            listed = [place_of(fs, e["name"], "", e) for e in fs.ls(root, detail=True) if e["type"] == "file"]
    else:
        with reading(folder.url), os.scandir(folder.url) as entries:
            files = [e for e in entries if e.is_file(follow_symlinks=False)]
            listed = [Place(e.path, e.name, e.stat().st_size) for e in files]
    for place in listed:
        key, _, extension = place.url.rpartition("/")[2].partition(".")
        if extension in _MEDIA:
            found[key] = {"image_path": place.url, "image_offset": 0, "image_size": place.size, "image_ext": extension}
    return found
