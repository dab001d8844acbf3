"""The source `images`: a folder of pictures with captions beside them or in a table, adopted where it lies.

In: a folder, on this machine or behind an fsspec URL, and where its captions are: `.txt` beside the picture, HF's
imagefolder `metadata.csv` / `.jsonl` / `.parquet` (in any folder, names relative to it), or one table for all. Out: one
row per picture, in the order of the walk (a folder's files by name, then its folders), one more for every further line
that a table has for it; lines without a picture come last, as `missing_media`.
SourceError: no such folder or table, a table without the columns. A link that leads out of the folder is not followed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import fsspec
import pyarrow as pa
from pydantic import Field

from mmdata.errors import SourceError
from mmdata.sources.adopted import HEAD_BYTES, Adopted, AdoptingSource, Part, Row, missing_media, pictured
from mmdata.sources.list_files import reading
from mmdata.sources.picture_tables import PictureTable, read_picture_table
from mmdata.sources.places import Place, absolute, fingerprint_of, is_local, open_place, place_of
from mmdata.sources.plain_columns import check_extra_names
from mmdata.sources.tar_samples import IMAGE_EXTENSIONS

__all__ = ["ImagesSource"]

_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_MAX_TEXT = 1 << 20  # bytes of a caption file
_OWN = ("path", "place", "size", "text", "why", "caption", "url", "uid")


class ImagesSource(AdoptingSource):
    """A folder of pictures, all below it. The uid is made of the path relative to it, the keys are made by mmdata."""

    kind: Literal["images"] = "images"
    path: str = Field(min_length=1, description="the folder; an fsspec URL too")
    captions: Literal["auto", "txt", "metadata", "none"] = Field(
        "auto", description="txt: beside the picture; metadata: a table; auto: the table's, else the .txt's; none"
    )
    metadata: str | None = Field(
        None, description="a table for all pictures (csv, tsv, jsonl, Parquet); null = metadata.* in the folders"
    )
    file_name: str = Field(
        "file_name", description="column of the table that names the picture, relative to the folder"
    )
    caption: str = Field("text;caption", description="column of the captions, or several, the first that is there")
    url: str | None = Field(None, description="column of the URLs; null = there is none")
    uid: str | None = Field(None, description="column of each row's own uid; null = made of path and caption")
    columns: tuple[str, ...] = Field((), description="further columns of the table to carry along")

    @property
    def has_captions(self) -> bool:
        """Whether captions are looked for at all."""
        return self.captions != "none"

    def schema(self) -> pa.Schema:  # type: ignore[override]
        """`path`, then the columns asked for, in the types of the first table."""
        check_extra_names(self.columns)
        wanted = [c for c in (*self.columns, self.url, self.uid) if c is not None]
        table = next(self._tables(), None)
        if table is None and (wanted or self.captions == "metadata"):
            raise SourceError(f"{self.path} has no metadata.csv, .jsonl or .parquet; name a table with source.metadata")
        if table is not None:
            table.require(wanted, self.caption if self.captions == "metadata" else None)
        next(self._walk(), None)
        types = [] if table is None else [(name, table.type_of(name)) for name in self.columns]
        return pa.schema([("path", pa.string()), *types])

    def fingerprint(self) -> str:
        """See `AdoptingSource`: names, sizes and times of change of the pictures, captions and tables."""

        def places() -> Iterator[Place]:
            if self.metadata is not None:
                yield _outside(self.metadata)
            for folder in self._walk():
                yield from folder.pictures
                yield from folder.beside

        return fingerprint_of(places())

    def parts(self, shard_rows: int) -> Iterator[Part]:
        """`shard_rows` rows each; what the tables say travels with them."""
        schema = self._part_schema()
        held: list[Row] = []
        for row in self._rows():
            held.append(row)
            if len(held) == shard_rows:
                yield Part(table=_table(held, schema), label=self.path)
                held = []
        if held:
            yield Part(table=_table(held, schema), label=self.path)

    def read(self, part: Part, extra: pa.Schema) -> Adopted:
        """The rows of one part, each with its picture's size and caption."""
        assert part.table is not None
        rows = [self._read_row(row) for row in part.table.select(list(_OWN)).to_pylist()]
        return Adopted(rows, part.table.select(extra.names).cast(extra))

    def _read_row(self, given: Row) -> Row:
        known = {"caption": given["caption"], "url": given["url"], "uid": given["uid"]}
        if known["caption"] is None and given["text"] is not None:
            known["caption"] = _text_at(given["text"])
        if given["place"] is None:
            return {**known, **missing_media(given["why"])}
        url, extension = given["place"], given["path"].rpartition(".")[2].lower()
        try:
            with open_place(url) as file:
                size = given["size"]
                reference = {"image_path": url, "image_offset": 0, "image_size": size, "image_ext": extension}
                return {**known, **pictured(reference, file.read(HEAD_BYTES), file.read)}
        except FileNotFoundError:
            return {**known, **missing_media("the file has gone")}
        except OSError as error:
            return {**known, **missing_media(f"the file cannot be read: {error.strerror or error}")}

    # The walk

    def _part_schema(self) -> pa.Schema:
        types = {"size": pa.int64()}
        own = [(name, types.get(name, pa.string())) for name in _OWN]
        return pa.schema([*own, *(f for f in self.schema() if f.name != "path")])

    def _rows(self) -> Iterator[Row]:
        whole = self._whole_table()
        open_tables: list[PictureTable] = [] if whole is None else [whole]
        for folder in self._walk():
            # A table holds for its folder and those below; the walk has left it when another folder is met.
            while open_tables and not open_tables[-1].holds_for(folder.name):
                yield from self._without_picture(open_tables.pop())
            if whole is None and self.captions in ("auto", "metadata"):
                open_tables += [self._read_table(place, folder.name) for place in folder.tables]
            for place in folder.pictures:
                yield from self._of_picture(place, folder, open_tables)
            for name, why in folder.refused:
                yield self._row(name, None, {}, why)
        while open_tables:
            yield from self._without_picture(open_tables.pop())

    def _of_picture(self, place: Place, folder: _Folder, tables: list[PictureTable]) -> Iterator[Row]:
        lines = [line for table in reversed(tables) for line in table.take(place.name)]
        text = None
        if self.captions in ("auto", "txt"):
            text = folder.texts.get(place.name.rpartition(".")[0])
        for line in lines or [{}]:
            yield {**self._row(place.name, place, line, ""), "text": text}

    def _without_picture(self, table: PictureTable) -> Iterator[Row]:
        for name, line in table.left():
            yield self._row(name, None, line, f"{table.name} names it, and it is not there")

    def _row(self, name: str, place: Place | None, line: dict[str, Any], why: str) -> Row:
        row = dict.fromkeys(_OWN) | {"path": name, "why": why}
        if place is not None:
            row |= {"place": place.url, "size": place.size}
        if self.captions in ("auto", "metadata"):
            names = [n.strip() for n in self.caption.split(";")]
            row["caption"] = next((str(line[n]) for n in names if line.get(n) is not None), None)
        for ours, theirs in (("url", self.url), ("uid", self.uid)):
            row[ours] = None if theirs is None or line.get(theirs) is None else str(line[theirs])
        return row | {name: line.get(name) for name in self.columns}

    def _tables(self) -> Iterator[PictureTable]:
        whole = self._whole_table()
        if whole is not None:
            yield whole
        elif self.captions in ("auto", "metadata"):
            for folder in self._walk():
                yield from (self._read_table(place, folder.name) for place in folder.tables)

    def _whole_table(self) -> PictureTable | None:
        return None if self.metadata is None else self._read_table(_outside(self.metadata), "")

    def _read_table(self, place: Place, folder: str) -> PictureTable:
        names = [n.strip() for n in self.caption.split(";")]
        wanted = [*names, *(c for c in (self.url, self.uid) if c is not None), *self.columns]
        return read_picture_table(place, folder, self.file_name, wanted, self.columns)

    def _walk(self) -> Iterator[_Folder]:
        where = absolute(self.path)
        found = _walk_local(where) if is_local(where) else _walk_remote(where)
        anything = False
        for folder in found:
            anything = anything or bool(folder.pictures or folder.refused)
            yield folder
        if not anything:
            raise SourceError(f"{where} holds no pictures ({', '.join(IMAGE_EXTENSIONS)})")


@dataclass
class _Folder:
    """One folder of the walk; names are relative to the source. `beside`: whatever else enters the fingerprint."""

    name: str
    pictures: list[Place] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)  # name without extension → where the caption is
    tables: list[Place] = field(default_factory=list)
    beside: list[Place] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)  # (name, why)

    def take(self, place: Place) -> None:
        """One file, by what its name ends in."""
        base = place.name.rpartition("/")[2]
        extension = base.rpartition(".")[2].lower()
        if base in _METADATA:
            self.tables.append(place)
            self.beside.append(place)
        elif extension in IMAGE_EXTENSIONS:
            self.pictures.append(place)
        elif extension == "txt":
            self.texts[place.name[: -len(".txt")]] = place.url
            self.beside.append(place)


def _walk_local(top: str) -> Iterator[_Folder]:
    if not os.path.isdir(top):
        raise SourceError(f"there is no folder {top}")
    real = os.path.realpath(top)
    for folder, inner, files in os.walk(top, onerror=_raise):
        inner[:] = sorted(n for n in inner if not n.startswith((".", "_")))
        name = os.path.relpath(folder, top).replace(os.sep, "/")
        found = _Folder("" if name == "." else name)
        for base in [n for n in inner if os.path.islink(os.path.join(folder, n))]:
            found.refused.append((f"{found.name}/{base}".lstrip("/"), "a link to a folder, which is not followed"))
        for base in sorted(f for f in files if not f.startswith(".")):
            path = os.path.join(folder, base)
            relative = f"{found.name}/{base}".lstrip("/")
            target = os.path.realpath(path) if os.path.islink(path) else path
            if target is not path and os.path.commonpath([target, real]) != real:
                if _is_picture(base):
                    found.refused.append((relative, "a link that leads out of the folder"))
                continue
            if target is not path and not os.path.exists(target) and _is_picture(base):
                found.refused.append((relative, "a link to nothing"))
            if os.path.isfile(target):
                status = os.stat(target)
                found.take(Place(path, relative, status.st_size, str(status.st_mtime)))
        yield found


def _is_picture(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def _walk_remote(url: str) -> Iterator[_Folder]:
    with reading(url):
        fs, root = fsspec.core.url_to_fs(url)
        if not fs.isdir(root):
            raise SourceError(f"there is no folder {url}")
        top = root.rstrip("/")
        listed = sorted(fs.find(root, detail=True).items())
        places = [place_of(fs, p, p.removeprefix(top).lstrip("/"), info) for p, info in listed]
    folders: dict[str, _Folder] = {}
    for place in places:
        name = place.name.rpartition("/")[0]
        if not any(part.startswith((".", "_")) for part in place.name.split("/")):
            folders.setdefault(name, _Folder(name)).take(place)
    yield from (folders[name] for name in sorted(folders, key=lambda n: n.split("/") if n else []))


def _raise(error: OSError) -> None:
    raise SourceError(f"cannot list {error.filename}: {error.strerror}")


def _outside(path: str) -> Place:
    where = absolute(path)
    with reading(where):
        fs, root = fsspec.core.url_to_fs(where)
        if not fs.isfile(root):
            raise SourceError(f"there is no table {where} (source.metadata)")
        return place_of(fs, root, root.rpartition("/")[2], fs.info(root))


def _text_at(url: str) -> str | None:
    try:
        with open_place(url) as file:
            data = file.read(_MAX_TEXT)
    except OSError:
        return None
    return data.decode("utf-8", "replace").removeprefix("\ufeff").rstrip("\r\n")


def _table(rows: list[Row], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=schema)
