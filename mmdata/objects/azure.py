"""Azure Blob Storage, through adlfs's client: blobs put with If-None-Match: * or If-Match.

In: `container/blob` paths, and the account where the URL names it. Out: what one request brought back, in the words of
`mmdata.object_store`. Fails: Taken for 412 and BlobAlreadyExists, Busy for 408, 429, 5xx and lost connections,
FileNotFoundError, and OSError with a sentence for what the operator mends. A large file goes up as blocks, which nobody
sees before the list of them is put; that put has the condition. Blocks that are never listed go after a week.
Source: the Blob service REST API (conditional headers, Put Blob, Put Block List).
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
from fsspec.asyn import sync

from mmdata.object_store import ABSENT, TOKEN, Busy, Found, Listed, Parts, Taken

__all__ = ["AzureWire"]

_ONCE = {"retry_total": 0, "connection_timeout": 10, "read_timeout": 60}  # `ObjectStore` counts the tries


class AzureWire:
    """A client of its own per process."""

    no_tag = '"0x0"'

    def __init__(self, account: str = "") -> None:
        self._account = account
        self.parts: Parts | None = None
        self._fs: Any = None
        self._pid = 0

    def put(self, path: str, source: bytes | Path, token: str, tag: str | None) -> None:
        """Put Blob, or blocks and Put Block List, with the condition."""
        self._ask(path, _put, source, token, tag)

    def get(self, path: str, first: int = 0, stop: int | None = None) -> Found:
        """Get Blob with a range; a blob that ends before it gives no bytes."""
        if first < 0:  # there are no suffix ranges
            whole = self.head(path)
            if whole.size == 0:
                return whole
            first, stop = max(0, whole.size + first), whole.size
        try:
            found: Found = self._ask(path, _get, first, stop)
        except _OutOfRange:
            return self.head(path)
        return found

    def head(self, path: str) -> Found:
        """Get Blob Properties."""
        found: Found = self._ask(path, _head)
        return found

    def entries(self, prefix: str, deep: bool) -> Iterator[Listed]:
        """List Blobs, page by page."""
        yield from self._ask(prefix, _list, deep)

    def delete(self, path: str) -> None:
        """Delete Blob; no error when it is absent."""
        try:
            self._ask(path, _delete)
        except FileNotFoundError:
            return

    def _ask(self, path: str, what: Any, *arguments: Any) -> Any:
        container, _, key = path.partition("/")
        try:
            fs = self._filesystem()
            return sync(fs.loop, what, fs.service_client, container, key, *arguments)
        except Exception as error:  # noqa: BLE001  azure-core and aiohttp raise anything; `_explained` sorts it
            raise _explained(error, container) from None

    def _filesystem(self) -> Any:
        if self._fs is None or self._pid != os.getpid():
            import adlfs

            settings = dict(fsspec.config.conf.get("abfs", fsspec.config.conf.get("az", {})))
            if self._account:
                settings |= {"account_name": self._account.split(".")[0], "account_host": _blob_host(self._account)}
            self._fs = adlfs.AzureBlobFileSystem(
                **{**settings, "use_listings_cache": False, "skip_instance_cache": True}
            )
            self._pid = os.getpid()
        return self._fs


class _OutOfRange(Exception):
    """416: the blob ends before the range."""


def _blob_host(account: str) -> str:
    """The host that speaks the Blob API, for `account` or `account.dfs.core.windows.net`."""
    return account.replace(".dfs.", ".blob.") if "." in account else f"{account}.blob.core.windows.net"


async def _put(client: Any, container: str, key: str, source: bytes | Path, token: str, tag: str | None) -> None:
    from azure.core import MatchConditions

    condition: dict[str, Any] = {"overwrite": False}
    if tag is not ABSENT:
        condition = {"overwrite": True, "etag": tag, "match_condition": MatchConditions.IfNotModified}
    async with client.get_blob_client(container, key) as blob:
        if isinstance(source, bytes):
            await blob.upload_blob(source, length=len(source), metadata={TOKEN: token}, **condition, **_ONCE)
            return
        with source.open("rb") as file:
            size = source.stat().st_size
            await blob.upload_blob(file, length=size, metadata={TOKEN: token}, max_concurrency=4, **condition, **_ONCE)


async def _get(client: Any, container: str, key: str, first: int, stop: int | None) -> Found:
    wanted = {} if first == 0 and stop is None else {"offset": first, "length": None if stop is None else stop - first}
    async with client.get_blob_client(container, key) as blob:
        stream = await blob.download_blob(**wanted, **_ONCE)
        data = await stream.readall()
        found = _found(stream.properties, data)
        # Its `size` is that of the range; the whole one's stands at the end of "bytes 0-9/100".
        whole = str(stream.properties.content_range or "").rpartition("/")[2]
        return replace(found, size=int(whole)) if whole.isdigit() else found


async def _head(client: Any, container: str, key: str) -> Found:
    async with client.get_blob_client(container, key) as blob:
        return _found(await blob.get_blob_properties(**_ONCE), b"")


def _found(properties: Any, data: bytes) -> Found:
    tokens = {name.lower(): value for name, value in (properties.metadata or {}).items()}
    return Found(properties.size, properties.etag, tokens.get(TOKEN), properties.last_modified.timestamp(), data)


async def _list(client: Any, container: str, prefix: str, deep: bool) -> list[Listed]:
    found = []
    async with client.get_container_client(container) as place:
        if deep:
            entries = place.list_blobs(name_starts_with=prefix, **_ONCE)
        else:
            entries = place.walk_blobs(name_starts_with=prefix, delimiter="/", **_ONCE)
        async for entry in entries:
            if entry.get("last_modified") is None:
                found.append(Listed(f"{container}/{entry.name}".rstrip("/"), None, 0.0))
            else:
                written = entry.last_modified.timestamp()
                found.append(Listed(f"{container}/{entry.name}", entry.size, written, entry.etag))
    return found


async def _delete(client: Any, container: str, key: str) -> None:
    async with client.get_blob_client(container, key) as blob:
        await blob.delete_blob(**_ONCE)


def _explained(error: Exception, container: str) -> Exception:
    """What `error` means; texts that may hold keys or signatures are not repeated."""
    from azure.core import exceptions as azure

    if isinstance(error, azure.HttpResponseError):
        return _answered(int(error.status_code or 0), str(getattr(error, "error_code", None) or ""), container)
    if isinstance(error, azure.ClientAuthenticationError):
        return _no_credentials(error)
    lost = isinstance(error, azure.AzureError | OSError | asyncio.TimeoutError)
    if lost or type(error).__module__.split(".")[0] == "aiohttp":
        return Busy(f"{type(error).__name__}, no answer from the server")
    if isinstance(error, ValueError):  # adlfs, without an account
        return _no_credentials(error)
    return error


def _no_credentials(error: Exception) -> Exception:
    return OSError(
        errno.EINVAL,
        f"no usable Azure account ({type(error).__name__}): AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY, "
        "AZURE_STORAGE_SAS_TOKEN or AZURE_STORAGE_CONNECTION_STRING; docs/stores.md",
    )


def _answered(status: int, code: str, container: str) -> Exception:
    if code == "ContainerNotFound":
        return OSError(errno.ENXIO, f"there is no container {container}; make it")
    if status == 404:
        return FileNotFoundError(errno.ENOENT, "no such blob")
    if status == 412 or code in ("BlobAlreadyExists", "UnauthorizedBlobOverwrite"):
        return Taken()
    if status == 416:
        return _OutOfRange()
    if status in (408, 409, 429) or status >= 500:
        return Busy(f"{status} {code}".strip())
    if status in (401, 403):
        return OSError(errno.EACCES, f"the store refuses this ({status} {code})")
    return OSError(errno.EIO, f"the store refuses this ({status} {code})")
