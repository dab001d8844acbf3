"""Google Cloud Storage, through gcsfs's session and credentials: the JSON API, conditions on the generation.

In: `bucket/key` paths. Out: what one request brought back, in the words of `mmdata.object_store`. Fails: Taken for 412,
Busy for 408, 429, 5xx and lost connections, FileNotFoundError, and OSError with a sentence for what the operator mends.
A file of any size is one streamed upload, which exists when it is whole. Source: the JSON API reference (Objects:
insert with `ifGenerationMatch`, where 0 means that there must be no such object).
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import fsspec
from fsspec.asyn import sync

from mmdata.object_store import TOKEN, Busy, Found, Listed, Parts, Taken

__all__ = ["GcsWire"]

_PIECE_BYTES = 1 << 20


class GcsWire:
    """A client of its own per process; gcsfs's retries are not used, because `ObjectStore` counts them."""

    no_tag = "1"

    def __init__(self) -> None:
        self.parts: Parts | None = None
        self._fs: Any = None
        self._pid = 0

    def put(self, path: str, source: bytes | Path, token: str, tag: str | None) -> None:
        """Objects: insert, metadata and bytes in one request, with ifGenerationMatch."""
        bucket, _, key = path.partition("/")
        boundary = secrets.token_hex(16)
        described = json.dumps({"name": key, "metadata": {TOKEN: token}})
        before = (
            f"--{boundary}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n{described}\r\n"
            f"--{boundary}\r\nContent-Type: application/octet-stream\r\n\r\n"
        ).encode()
        after = f"\r\n--{boundary}--".encode()
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        self._ask(
            "POST",
            f"/upload/storage/v1/b/{quote(bucket, safe='')}/o",
            {"uploadType": "multipart", "ifGenerationMatch": tag or "0"},
            {
                "Content-Type": f"multipart/related; boundary={boundary}",
                "Content-Length": str(len(before) + size + len(after)),
            },
            lambda: _body(before, source, after),
            bucket=bucket,
        )

    def get(self, path: str, first: int = 0, stop: int | None = None) -> Found:
        """Objects: get with alt=media and a Range; an object that ends before it gives no bytes."""
        headers = {}
        if first < 0:
            headers = {"Range": f"bytes={first}"}
        elif first or stop is not None:
            headers = {"Range": f"bytes={first}-{'' if stop is None else stop - 1}"}
        try:
            said, data = self._ask("GET", _object(path), {"alt": "media"}, headers)
        except _OutOfRange:
            return self.head(path)
        size = said.get("Content-Range", "").rpartition("/")[2]
        written = said.get("Last-Modified")
        return Found(
            int(size) if size.isdigit() else len(data),
            said.get("x-goog-generation") or self.head(path).tag,
            None,
            parsedate_to_datetime(written).timestamp() if written else 0.0,
            data,
        )

    def head(self, path: str) -> Found:
        """Objects: get, without the bytes."""
        found = json.loads(self._ask("GET", _object(path))[1])
        token = found.get("metadata", {}).get(TOKEN)
        return Found(int(found["size"]), str(found["generation"]), token, _seconds(found["updated"]))

    def entries(self, prefix: str, deep: bool) -> Iterator[Listed]:
        """Objects: list, page by page."""
        bucket, _, key = prefix.partition("/")
        asked = {"prefix": key} if deep else {"prefix": key, "delimiter": "/"}
        while True:
            where = f"/storage/v1/b/{quote(bucket, safe='')}/o"
            page = json.loads(self._ask("GET", where, asked, bucket=bucket)[1])
            for entry in page.get("items", []):
                written = _seconds(entry["updated"])
                yield Listed(f"{bucket}/{entry['name']}", int(entry["size"]), written, str(entry["generation"]))
            for name in page.get("prefixes", []):
                yield Listed(f"{bucket}/{name}".rstrip("/"), None, 0.0)
            if not page.get("nextPageToken"):
                return
            asked["pageToken"] = page["nextPageToken"]

    def delete(self, path: str) -> None:
        """Objects: delete; no error when it is absent."""
        try:
            self._ask("DELETE", _object(path))
        except FileNotFoundError:
            return

    def _ask(
        self,
        method: str,
        path: str,
        parameters: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: Any = None,
        *,
        bucket: str = "",
    ) -> tuple[Mapping[str, str], bytes]:
        """(headers, bytes) of the answer; `bucket` says that a 404 means the bucket."""
        try:
            fs = self._filesystem()
            status, said, data = sync(fs.loop, _send, fs, method, path, parameters or {}, headers or {}, body)
        except Exception as error:  # noqa: BLE001  aiohttp and google-auth raise anything; `_explained` sorts it
            raise _explained(error) from None
        if status >= 300:
            raise _answered(status, bucket)
        return said, data

    def _filesystem(self) -> Any:
        if self._fs is None or self._pid != os.getpid():
            import gcsfs

            settings = dict(fsspec.config.conf.get("gs", fsspec.config.conf.get("gcs", {})))
            self._fs = gcsfs.GCSFileSystem(**{**settings, "use_listings_cache": False, "skip_instance_cache": True})
            self._pid = os.getpid()
        return self._fs


class _OutOfRange(Exception):
    """416: the object ends before the range."""


async def _send(
    fs: Any, method: str, path: str, parameters: Mapping[str, str], headers: Mapping[str, str], body: Any
) -> tuple[int, Mapping[str, str], bytes]:
    from aiohttp import ClientTimeout

    await fs._set_session()
    async with fs.session.request(
        method,
        f"{fs._location}{path}",
        params=fs._get_params(dict(parameters)),
        headers=fs._get_headers(dict(headers)),
        data=None if body is None else body(),
        timeout=ClientTimeout(total=None, sock_connect=10, sock_read=60),
    ) as answer:
        return answer.status, answer.headers, await answer.read()


async def _body(before: bytes, source: bytes | Path, after: bytes) -> AsyncIterator[bytes]:
    yield before
    if isinstance(source, bytes):
        yield source
    else:
        with source.open("rb") as file:
            while piece := file.read(_PIECE_BYTES):
                yield piece
    yield after


def _object(path: str) -> str:
    bucket, _, key = path.partition("/")
    return f"/storage/v1/b/{quote(bucket, safe='')}/o/{quote(key, safe='')}"


def _seconds(written: str) -> float:
    return datetime.fromisoformat(written).timestamp()


def _answered(status: int, bucket: str) -> Exception:
    if status == 404:
        if bucket:
            return OSError(errno.ENXIO, f"there is no bucket {bucket}, or it may not be seen; make it")
        return FileNotFoundError(errno.ENOENT, "no such object")
    if status == 412:
        return Taken()
    if status == 416:
        return _OutOfRange()
    if status in (408, 429) or status >= 500:
        return Busy(str(status))
    if status == 401:
        return OSError(errno.EINVAL, "Google does not take these credentials (401); see docs/stores.md")
    if status == 403:
        return OSError(errno.EACCES, "the store refuses this (403)")
    return OSError(errno.EIO, f"the store refuses this ({status})")


def _explained(error: Exception) -> Exception:
    """What `error` means; texts that may hold tokens are not repeated."""
    package = type(error).__module__.split(".")[0]
    if package == "google":
        return OSError(
            errno.EINVAL,
            f"no usable Google credentials ({type(error).__name__}): gcloud auth application-default login, or "
            "GOOGLE_APPLICATION_CREDENTIALS; docs/stores.md",
        )
    if package == "aiohttp" or isinstance(error, OSError | asyncio.TimeoutError):
        return Busy(f"{type(error).__name__}, no answer from the server")
    return error
