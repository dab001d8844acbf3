"""Every shared column of a dataset, defined once: name, Arrow type, unit and meaning.

Base rows (`rows/*.parquet`) hold one row per input row, failed ones included. Operators add their own columns in files
of their own; those are declared by each operator's contract, not here.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

__all__ = [
    "BASE_COLUMNS",
    "FORMAT_VERSION",
    "MEDIA_ROLES",
    "RESERVED_NAMES",
    "ROWS_PER_SHARD_BITS",
    "STATUSES",
    "VERDICT_COLUMNS",
    "VERDICT_SCHEMA",
    "Column",
    "base_schema",
    "fetched_roles",
    "fetched_schema",
    "is_aside",
    "media_reference",
    "role_of",
    "row_id",
    "uid_of",
    "vector_rows",
]

FORMAT_VERSION = 1
ROWS_PER_SHARD_BITS = 24  # row_id = shard * 2**24 + index
MEDIA_ROLES = ("image", "video", "audio", "original")  # original: a picture as fetched, beside the resized one

STATUSES: dict[str, str] = {
    "ok": "the media is stored",
    "bad_url": "the URL is empty, malformed, or not http or https",
    "refused_address": "the host is a private, loopback or link-local address and allow_private is false",
    "dns": "the host name does not resolve",
    "connect": "the connection was refused, reset or broken",
    "tls": "the TLS handshake or certificate failed",
    "timeout": "the deadline of the URL passed",
    "http_4xx": "the server answered 4xx (429 apart)",
    "http_429": "the server answered 429 until retries ran out",
    "http_5xx": "the server answered 5xx until retries ran out",
    "too_large": "the body exceeds fetch.max_bytes",
    "too_many_redirects": "more redirects than fetch.max_redirects",
    "not_media": "the bytes are no image format that mmdata decodes",
    "decode": "the bytes claim to be an image but do not decode in full",
    "too_many_pixels": "the header announces more pixels than fetch.max_pixels",
    "filtered": "below min_image_size, above max_image_area or max_aspect_ratio",
    "hash_mismatch": "the bytes do not have the hash that the list gives",
    "opted_out": "the host asked not to be used",
    "blocked": "on a block list",
    "deferred": "left for a later pass",
    "missing_media": "metadata without media",
    "purged": "removed on request",
}


@dataclass(frozen=True)
class Column:
    """One shared column: `unit` is empty for names, counts and flags; `meaning` says what NULL stands for."""

    name: str
    type: pa.DataType
    unit: str
    meaning: str


BASE_COLUMNS: tuple[Column, ...] = (
    Column("row_id", pa.int64(), "", "shard * 2^24 + index in the shard; the only join key; never NULL"),
    Column("key", pa.string(), "", "img2dataset's sample key, no dots; unique in a dataset this tool made; never NULL"),
    Column(
        "uid", pa.string(), "", "32 hex digits naming the source (kind, location, caption); not unique; NULL = purged"
    ),
    Column("url", pa.string(), "", "as given in the source; NULL = the source had none"),
    Column("caption", pa.string(), "", "as given in the source; NULL = the source has none for this row"),
    Column("status", pa.string(), "", "what became of the row at ingest: see STATUSES; never NULL"),
    Column("status_detail", pa.string(), "", "a few words on a status other than ok; NULL = nothing to add"),
    Column("http_status", pa.int32(), "", "last HTTP status; NULL = no answer came"),
    Column("final_url", pa.string(), "", "the URL after redirects; NULL = as given, or no answer"),
    Column("content_type", pa.string(), "", "as the server said, not trusted; NULL = not said"),
    Column("size_bytes", pa.int64(), "bytes", "body as fetched; NULL = no body"),
    Column("sha256", pa.string(), "", "64 lower-case hex digits of the bytes as fetched; NULL = no body"),
    Column("exif", pa.string(), "", "JSON object of the EXIF tags by name; NULL = none"),
    Column("original_width_px", pa.int64(), "px", "as fetched, upright; NULL = not decoded"),
    Column("original_height_px", pa.int64(), "px", "as fetched, upright; NULL = not decoded"),
    Column("width_px", pa.int64(), "px", "as stored; NULL = not stored"),
    Column("height_px", pa.int64(), "px", "as stored; NULL = not stored"),
    Column("attempts", pa.int32(), "", "HTTP attempts made; 0 = none"),
    Column("fetch_ms", pa.float32(), "ms", "wall time of all attempts; NULL = not fetched"),
)


def media_reference(role: str) -> tuple[Column, ...]:
    """The four columns that say where the bytes of one media role lie; all NULL when the row has no such media."""
    return (
        Column(f"{role}_path", pa.string(), "", f"file that holds the {role}: relative to the dataset, or a URL"),
        Column(f"{role}_offset", pa.int64(), "bytes", f"first byte of the {role} in that file"),
        Column(f"{role}_size", pa.int64(), "bytes", f"length of the {role} in that file"),
        Column(f"{role}_ext", pa.string(), "", f"extension of the {role}, no dot"),
    )


RESERVED_NAMES = frozenset(
    [c.name for c in BASE_COLUMNS]
    + [c.name for role in MEDIA_ROLES for c in media_reference(role)]
    + ["path", "verdict", "step", "step_name", "reason", "__key__", "__url__", "json", "txt"]
)


def base_schema(extra: pa.Schema | None = None, roles: tuple[str, ...] = ("image",)) -> pa.Schema:
    """Arrow schema of base rows: shared columns, then `extra` (source columns asked for), then media references."""
    fields = [pa.field(c.name, c.type) for c in BASE_COLUMNS]
    fields += list(extra or [])
    fields += [pa.field(c.name, c.type) for role in roles for c in media_reference(role)]
    return pa.schema(fields)


def fetched_roles(media: str, store: str = "resized") -> tuple[str, ...]:
    """The media roles of base rows fetched with this `fetch.media` and `fetch.store`; image is always among them."""
    roles = ("image", "video", "audio") if media == "any" else tuple(dict.fromkeys(("image", media)))
    return (*roles, "original") if store == "both" else roles


def fetched_schema(
    extra: pa.Schema | None, media: str = "image", store: str = "resized", compute_hash: str | None = None
) -> pa.Schema:
    """Arrow schema of base rows fetched with these options of `fetch`; a further hash stands after `extra`."""
    also = [] if compute_hash is None else [pa.field(compute_hash, pa.string())]
    return base_schema(pa.schema([*(extra or ()), *also]), fetched_roles(media, store))


def role_of(media: str, ext: str | None) -> str:
    """The role of one stored file: that of `fetch.media`, or with `any` what its extension (no dot) says it is."""
    if media != "any":
        return media
    return "video" if ext in _VIDEO else "audio" if ext in _AUDIO else "image"


_VIDEO = frozenset("mp4 m4v mov webm mkv avi mpg mpeg ts wmv flv ogv 3gp".split())
_AUDIO = frozenset("mp3 wav flac ogg oga opus m4a aac aiff aif weba wma amr mid".split())


def is_aside(column: pa.Field) -> bool:
    """Whether a step's column stays out of `samples` and of exports that do not ask for it by name.

    Those are embeddings, columns of type fixed-size list of floats, and signatures, of uint32; nothing else marks them,
    so a stage, a group and attached columns need only declare that type. They are read from `columns."<set>"`, or by
    their visible names where columns are named (export's `columns`, `Dataset.kept`).
    """
    kind = column.type
    if not pa.types.is_fixed_size_list(kind):
        return False
    return bool(pa.types.is_floating(kind.value_type) or pa.types.is_uint32(kind.value_type))


def vector_rows(values: pa.Array | pa.ChunkedArray) -> list[Any]:
    """One numpy array per row of a fixed-size list column, None where it is NULL; no copy, no Python numbers."""
    array = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    width = array.type.list_size
    numbers = array.values.to_numpy(zero_copy_only=False)[array.offset * width :].reshape(-1, width)
    return [numbers[i] if there else None for i, there in enumerate(array.is_valid().to_pylist())]


def row_id(shard: int, index: int) -> int:
    """The join key of row `index` (from 0) of `shard` (from 0)."""
    return (shard << ROWS_PER_SHARD_BITS) + index


def uid_of(kind: str, location: str | None, caption: str | None) -> str:
    """First 32 hex digits of sha256 of UTF-8 kind, location and caption with a zero byte between; None = empty."""
    text = f"{kind}\0{location or ''}\0{caption or ''}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


VERDICT_COLUMNS: tuple[Column, ...] = (
    Column("row_id", pa.int64(), "", "as in the base rows, in the same order; never NULL"),
    Column("verdict", pa.string(), "", "kept, dropped or failed; never NULL"),
    Column("step", pa.int16(), "", "position in the recipe of the step where the row left, 0 = ingest; NULL = kept"),
    Column("step_name", pa.string(), "", "name of that step; NULL = kept"),
    Column("reason", pa.string(), "", "<filter>, <filter>:null, <filter>:error, or an error kind; NULL = kept"),
)

VERDICT_SCHEMA = pa.schema([pa.field(c.name, c.type) for c in VERDICT_COLUMNS])
