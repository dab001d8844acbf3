"""What every source that adopts media has in common: light parts out of the driver, base rows out of a worker.

A `Part` describes one shard by the files it is made of, and travels. `read` turns it, in a worker, into `Adopted`: one
dict of base columns per row, in the source's order, and the extra columns asked for. Media is referred to where it
lies; it is neither copied nor decoded, only its header is looked at where nobody says how large the picture is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa

from mmdata.media import image
from mmdata.sources.places import Place
from mmdata.stage import Options

__all__ = ["HEAD_BYTES", "Adopted", "AdoptingSource", "Part", "Row", "missing_media", "no_columns", "pictured"]

HEAD_BYTES = 1 << 16  # of a picture: nearly every header lies in there
_EXTENSIONS = {"jpeg": "jpg", "jpeg2000": "jp2"}  # else the format's own name
_MOST_BYTES = 64 << 20  # a header further back is looked for in no larger file
_LARGEST = 512 << 20  # bytes of a picture: whoever decodes one holds it whole

Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One shard to be adopted. `first` and `rows` are a range of rows over `files` taken together (None = all).

    `table` holds rows that the driver has read already, `label` is for messages.
    """

    files: tuple[Place, ...] = ()
    first: int = 0
    rows: int | None = None
    table: pa.Table | None = None
    label: str = ""

    def file(self, suffix: str) -> Place | None:
        """Its file `<label><suffix>`, if it has one."""
        return next((p for p in self.files if p.name == f"{self.label}{suffix}"), None)


@dataclass
class Adopted:
    """The rows of one shard: `rows` with `status` and whatever else of the base columns is known, `extra` beside them.

    A row without `uid` or `key` is given one. `extra` has the source's extra columns, in the types of its schema.
    """

    rows: list[Row]
    extra: pa.Table


class AdoptingSource(Options):
    """A source whose media stays where it is. `is_fetched` tells it from a list of URLs."""

    is_fetched: ClassVar[bool] = False
    kind: str
    path: str

    @property
    def has_captions(self) -> bool:
        """Whether rows may have captions at all."""
        return True

    def schema(self) -> pa.Schema:  # type: ignore[override]  # hides pydantic's deprecated method of that name
        """Names and types of the extra columns; SourceError for what is wrong with the source or the options."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """64 hex digits that change when the source does; reads names, sizes and times, no media."""
        raise NotImplementedError

    def parts(self, shard_rows: int) -> Iterator[Part]:
        """The source's shards, in order: a tar or Parquet file of somebody's is one, small files are put together."""
        raise NotImplementedError

    def read(self, part: Part, extra: pa.Schema) -> Adopted:
        """The rows of one part, with the extra columns in the types that `schema` gave.

        SourceError names the file and the place when it cannot be read.
        """
        raise NotImplementedError


def no_columns(extra: pa.Schema, rows: int) -> pa.Table:
    """NULL in every extra column."""
    return pa.table([pa.nulls(rows, f.type) for f in extra], schema=extra)


def missing_media(detail: str) -> Row:
    """The columns of a row whose media is not there."""
    return {"status": "missing_media", "status_detail": detail}


def pictured(reference: Row, head: bytes, more: Callable[[int], bytes] | None) -> Row:
    """`reference` with the picture's size out of its header; without one, a status other than ok and no reference.

    `reference` has image_path, _offset, _size and _ext (None = as the header says); `head` is the beginning of the
    bytes, `more(n)` gives the next n of them. The size in px is the picture's as it lies there, and as far as anyone
    knows that of the original.
    """
    size = reference["image_size"]
    if size is not None and size > _LARGEST:
        why = f"{size} bytes, a picture that is adopted has at most {_LARGEST}"
        return {"status": "too_large", "status_detail": why, "size_bytes": size}
    try:
        try:
            info = image.probe(head)
        except image.DecodeError:
            if more is None or len(head) >= size or size > _MOST_BYTES:
                raise
            info = image.probe(head + more(size - len(head)))
    except image.DecodeError as error:
        return {"status": error.kind, "status_detail": error.detail, "size_bytes": size}
    if reference["image_ext"] is None:
        reference = {**reference, "image_ext": _EXTENSIONS.get(info.format, info.format)}
    sides = {"width_px": info.width, "height_px": info.height}
    originals = {"original_width_px": info.width, "original_height_px": info.height}
    return {**reference, **sides, **originals, "status": "ok", "size_bytes": size}
