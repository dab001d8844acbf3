"""What a sample is called and looks like in img2dataset's layout: its record, its messages, its members of a tar.

In: a base row as a dict of column → value. Out: the record that img2dataset 1.47 (downloader.py, writer.py) writes into
its Parquet and its `.json`, in its order and types; the text of its `.txt`. Pure: nothing is read or written here.
Where we differ: sizes are those of the upright picture, EXIF tags have Pillow's names, `sha256` is always there, and
behind its columns the Parquet has ours (`mmdata_status`, `http_status` …). RecipeError for a column of the list that
would collide with one of these.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

import pyarrow as pa

from mmdata.columns import BASE_COLUMNS, uid_of
from mmdata.errors import RecipeError
from mmdata.layout import json_value
from mmdata.settings import FetchOptions

__all__ = [
    "FINER",
    "RESERVED",
    "beside",
    "layout_schema",
    "member_name",
    "members_beside",
    "message_of",
    "record",
    "require_names",
    "their_status",
]

# img2dataset's names (main.py, arguments_validator), which no column of the list may have
RESERVED = frozenset(
    "key caption url width height original_width original_height status error_message exif md5 sha256 sha512".split()
)
# Our columns behind theirs, in the Parquet only: name there → base column
FINER = {
    "mmdata_status": "status",
    **{
        name: name
        for name in "status_detail http_status final_url content_type size_bytes attempts fetch_ms uid row_id".split()
    },
}
_SIZES = {
    "width": "width_px",
    "height": "height_px",
    "original_width": "original_width_px",
    "original_height": "original_height_px",
}
_TYPES = {c.name: c.type for c in BASE_COLUMNS}
# The words of img2dataset or urllib for what both know, and plain ones for the rest; `source: img2dataset` reads both.
_MESSAGES = {
    "bad_url": "unknown url type",
    "refused_address": "address refused: private, loopback or link-local",
    "dns": "Name or service not known",
    "connect": "connection refused, reset or broken",
    "tls": "SSL handshake or certificate failed",
    "timeout": "timed out",
    "http_4xx": "HTTP Error 400: Bad Request",
    "http_429": "HTTP Error 429: Too Many Requests",
    "http_5xx": "HTTP Error 500: Internal Server Error",
    "too_large": "body too large",
    "too_many_redirects": "too many redirects",
    "not_media": "Image decoding error",
    "decode": "Image decoding error",
    "too_many_pixels": "too many pixels",
    "hash_mismatch": "hash mismatch",
    "blocked": "on a block list",
    "deferred": "deferred",
    "missing_media": "missing media",
    "purged": "purged",
}
_FILTERED = {"short side": "image too small", "area": "image area too large", "aspect": "aspect ratio too large"}
_TO_RESIZE = {"not_media", "decode", "too_many_pixels"}


def member_name(key: str, ext: str, fetch: FetchOptions) -> str:
    """Name of a picture in its tar or folder: in img2dataset's layout every one ends in `encode_format`.

    Samples of a WebDataset must have the same members; readers look at the bytes.
    """
    as_theirs = fetch.layout != "none" and fetch.media == "image"
    return f"{key}.{fetch.encode_format if as_theirs else ext}"


def members_beside(
    fetch: FetchOptions, extra: Sequence[str], has_captions: bool
) -> Callable[[Any, Any], list[tuple[str, bytes]]] | None:
    """What makes, of a row to fetch and what was found (see `fetch_rows`), the (extension, bytes) beside its picture.

    None where the tar holds nothing but media: the layout is not webdataset. `extra` are further columns of the list;
    `has_captions`: it names a column of captions.
    """
    if fetch.layout != "webdataset":
        return None

    def made(row: Any, found: Any) -> list[tuple[str, bytes]]:
        prepared = {name: getattr(found.prepared, name) for name in ("exif", "sha256", *_SIZES.values())}
        base = {**row.given, **prepared, "url": row.url, "key": row.key, "status": "ok"}
        if fetch.compute_hash is not None:
            base[fetch.compute_hash] = found.prepared.extra_hash
        return beside(base, fetch, extra, has_captions)

    return made


def beside(
    row: Mapping[str, Any], fetch: FetchOptions, extra: Sequence[str], has_captions: bool
) -> list[tuple[str, bytes]]:
    """(extension, bytes) of what img2dataset writes beside a picture: its caption and its record."""
    text = json.dumps(json_value(record(row, fetch, extra, has_captions)), indent=4).encode()
    caption = row.get("caption")
    captions = [("txt", ("" if caption is None else str(caption)).encode("utf-8", "replace"))] if has_captions else []
    return [*captions, ("json", text)]


def record(row: Mapping[str, Any], fetch: FetchOptions, extra: Sequence[str], has_captions: bool) -> dict[str, Any]:
    """Img2dataset's columns of a base row, in its order."""
    is_ok = row["status"] == "ok"
    made: dict[str, Any] = {name: row.get(name) for name in extra}
    if row.get("uid") not in (None, uid_of("url", row.get("url"), row.get("caption"))):
        made["uid"] = row["uid"]  # the list's own, as DataComp's: there it is a column like the others
    if has_captions:
        made["caption"] = row.get("caption")
    made |= {"url": row.get("url"), "key": row["key"], "status": their_status(row), "error_message": message_of(row)}
    made |= {name: row.get(ours) if is_ok else None for name, ours in _SIZES.items()}
    if fetch.extract_exif:
        made["exif"] = (row.get("exif") or "{}") if is_ok else None
    for name in _hashes(fetch):
        made[name] = row.get(name) if is_ok else None
    return made


def _hashes(fetch: FetchOptions) -> list[str]:
    return [fetch.compute_hash, "sha256"] if fetch.compute_hash is not None else ["sha256"]


def layout_schema(extra: pa.Schema, fetch: FetchOptions, has_captions: bool) -> pa.Schema:
    """Of the Parquet beside the shard: img2dataset's columns and types, then `FINER`."""
    text = pa.string()
    fields = [*extra, *([pa.field("caption", text)] if has_captions else [])]
    fields += [pa.field(name, text) for name in ("url", "key", "status", "error_message")]
    fields += [pa.field(name, pa.int32()) for name in _SIZES]
    fields += [pa.field(name, text) for name in (["exif"] if fetch.extract_exif else []) + _hashes(fetch)]
    if fetch.layout == "parquet":
        fields.append(pa.field(fetch.encode_format, pa.binary()))
    return pa.schema([*fields, *(pa.field(name, _TYPES[ours]) for name, ours in FINER.items())])


def their_status(row: Mapping[str, Any]) -> str:
    """`success`, `failed_to_download`, or `failed_to_resize` for what a body was refused for."""
    status = row["status"]
    if status == "ok":
        return "success"
    was_refused = status in _TO_RESIZE or (status == "filtered" and message_of(row) in _FILTERED.values())
    return "failed_to_resize" if was_refused else "failed_to_download"


def message_of(row: Mapping[str, Any]) -> str | None:
    """What `error_message` and `status_dict` say of a failed row: few different texts, for they are counted."""
    status, detail = str(row["status"]), str(row.get("status_detail") or "")
    if status == "ok":
        return None
    if status == "filtered":
        return next((words for begin, words in _FILTERED.items() if detail.startswith(begin)), detail or status)
    if status == "opted_out":
        where = next((name for name in ("robots.txt", "TDM-Reservation") if name in detail), "X-Robots-Tag directive")
        return f"Use of image disallowed by {where}"
    code = row.get("http_status")
    if code is not None and status in ("http_4xx", "http_429", "http_5xx"):
        known = {s.value: s.phrase for s in HTTPStatus}
        return f"HTTP Error {code}: {known.get(code, '')}".rstrip(": ")
    return _MESSAGES.get(status, status)


def require_names(extra: Iterable[str], fetch: FetchOptions, option: str = "source.columns") -> None:
    """RecipeError for columns of the list whose names the layout takes itself."""
    if fetch.layout == "none":
        return
    taken = RESERVED | FINER.keys() | ({fetch.encode_format} if fetch.layout == "parquet" else set())
    found = sorted(name for name in extra if name.lower() in taken)
    if found:
        raise RecipeError(
            f"{option}: the column {found[0]!r} has a name that img2dataset's layout takes itself: rename it in the "
            "list, or leave it out"
        )
