"""Dataset folders in object stores: a name is published only if it is free, a mutable file only as its writer saw it.

In: a URL without credentials (they come from the environment, the cloud library's own files, or fsspec's configuration)
and the bytes to publish. Out: True when this call's object stands, False when another's does. Fails: RecipeError for a
URL that may not be used, MissingExtra for a package, StoreError once a store has not answered for half a minute.

An answer may be lost after the store has done what it was asked. The same call then meets its own object, so every
object carries the token of the attempt that made it, and that decides. Wires (`mmdata.objects`) make one request each
and say what came back; what it means, and when to ask again, is decided here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from mmdata.errors import MissingExtra, RecipeError, StoreError

__all__ = [
    "ABSENT",
    "ATTEMPTS",
    "TOKEN",
    "Busy",
    "Found",
    "Listed",
    "ObjectStore",
    "Parts",
    "Taken",
    "Unfinished",
    "UploadGone",
    "Wire",
    "bucket_path",
    "open_objects",
    "require_plain",
]  # fmt: skip

ABSENT = None  # as a condition: the name must be free
TOKEN = "mmdataattempt"  # the metadata key of the attempt's token; Azure allows letters and digits only
ATTEMPTS = 10
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 8.0
_PARTS_AT_ONCE = 4

# Spelt as users spell them → the wire's name, its package, and the extra that brings it.
_WIRES = {
    **dict.fromkeys(("s3", "s3a"), ("s3", "s3fs", "s3")),
    **dict.fromkeys(("gs", "gcs"), ("gs", "gcsfs", "gcs")),
    **dict.fromkeys(("az", "abfs", "abfss"), ("abfs", "adlfs", "azure")),
}
_ENVIRONMENT = ("AWS_", "FSSPEC_", "GOOGLE_", "STORAGE_", "AZURE_", "HTTP_PROXY", "HTTPS_PROXY")

T = TypeVar("T")


class Taken(Exception):
    """The condition of a put did not hold; perhaps because an earlier try of the same put has made it so."""


class UploadGone(Exception):
    """An upload in parts is not there any more: it was completed, or given up."""


class Busy(Exception):
    """No answer, or one that says "later". What was asked may have been done."""


@dataclass(frozen=True)
class Found:
    """An object, or the part of it that was asked for: whole size, version tag, `modified` in s since the epoch.

    `token` of the attempt that made it: only `head` promises it.
    """

    size: int
    tag: str
    token: str | None
    modified: float
    data: bytes = b""


@dataclass(frozen=True)
class Listed:
    """An entry of a listing; size None = a folder. `modified` is in seconds since the epoch, by the store's clock."""

    path: str
    size: int | None
    modified: float
    tag: str = ""


@dataclass(frozen=True)
class Unfinished:
    """An upload in parts that was begun and neither finished nor given up; its parts cost money, nobody sees them."""

    path: str
    upload: str
    started: float
    size: int


class Parts(Protocol):
    """Uploads in parts, where a store needs them for large files. Raises as `Wire` does, and UploadGone."""

    part_bytes: int
    """Larger files go up in parts of this size, or a multiple."""

    def begin(self, path: str, token: str) -> str:
        """Begin an upload in parts."""

    def put_part(self, path: str, upload: str, number: int, data: bytes) -> str:
        """The part's tag; numbers count from 1."""

    def finish(self, path: str, upload: str, parts: list[str]) -> None:
        """Publish the parts as one object if there is none: this is the commit."""

    def abort(self, path: str, upload: str) -> None:
        """Give the parts up."""

    def unfinished(self, prefix: str) -> Iterator[Unfinished]:
        """Uploads below `prefix` that were begun and not ended."""


class Wire(Protocol):
    """One request a method; paths are `bucket/key`. Raises Taken, Busy, FileNotFoundError or OSError."""

    parts: Parts | None
    """None: `put` streams files of any size."""
    no_tag: str
    """A version tag that no object has."""

    def put(self, path: str, source: bytes | Path, token: str, tag: str | None) -> None:
        """Put the object if it has this version tag, or, with ABSENT, if there is none."""

    def get(self, path: str, first: int = 0, stop: int | None = None) -> Found:
        """Bytes [first, stop), or the last -first ones; fewer where the object ends."""

    def head(self, path: str) -> Found:
        """The object without its bytes."""

    def entries(self, prefix: str, deep: bool) -> Iterator[Listed]:
        """What begins with `prefix`, which ends in `/`; folders are told only when not `deep`."""

    def delete(self, path: str) -> None:
        """Delete it; no error when it is absent."""


def require_plain(url: str) -> tuple[str, str]:
    """(protocol, rest) of a URL; RecipeError, which does not repeat it, where it holds credentials or a query."""
    protocol, separator, rest = url.partition("://")
    if not separator:
        raise RecipeError("a store's URL begins with a protocol such as s3://")
    host = rest.split("/", 1)[0]
    # abfs://container@account names a place; key:secret@ never does.
    account = protocol in ("az", "abfs", "abfss") and ":" not in host
    if ("@" in host and not account) or "?" in rest or "#" in rest or "::" in protocol:
        raise RecipeError(
            f"a {protocol.rpartition('::')[2]}:// URL of a dataset holds a bucket and a path only: no user, key, query "
            "or chained protocol; credentials come from the environment or the cloud's own files (docs/stores.md)"
        )
    return protocol, rest


def bucket_path(url: str) -> tuple[str, str, str]:
    """(the wire's protocol, Azure's account or "", `bucket/path`); RecipeError where runs could not be kept apart."""
    protocol, rest = require_plain(url)
    if protocol not in _WIRES:
        raise RecipeError(
            f"{protocol}:// has no conditional write, which keeps two runs on one dataset apart; give a local folder, "
            "s3://, gs:// or abfs:// (memory:// for one process)"
        )
    bucket, _, path = rest.rstrip("/").partition("/")
    container, _, host = bucket.partition("@")
    path = f"{container}/{path}".rstrip("/")
    if not container or "//" in path or any(part in (".", "..") for part in path.split("/")):
        raise RecipeError(f"{url}: give {protocol}://<bucket>/<path>, without empty parts or '..'")
    return _WIRES[protocol][0], host, path


_opened: dict[tuple[str, str, int], ObjectStore] = {}


def open_objects(protocol: str, account: str = "") -> ObjectStore:
    """The store behind `protocol` as this process's environment now describes it; made once per process.

    MissingExtra where its package is not installed. `account` is Azure's, where the URL names it.
    """
    _, package, extra = _WIRES[protocol]
    if importlib.util.find_spec(package) is None:
        raise MissingExtra(f"{protocol}:// needs the package {package}: pip install 'mmdata[{extra}]'")
    settings = tuple(sorted((k, v) for k, v in os.environ.items() if k.upper().startswith(_ENVIRONMENT)))
    key = (protocol, account, hash((os.getpid(), settings)))
    if key not in _opened:
        _opened[key] = ObjectStore(_wire(protocol, account), protocol)
    return _opened[key]


def _wire(protocol: str, account: str) -> Wire:
    if protocol == "s3":
        from mmdata.objects.s3 import S3Wire

        return S3Wire()
    if protocol == "gs":
        from mmdata.objects.gcs import GcsWire

        return GcsWire()
    from mmdata.objects.azure import AzureWire

    return AzureWire(account)


class ObjectStore:
    """Conditional publishing and reading over one wire; safe in threads and after a fork."""

    def __init__(self, wire: Wire, protocol: str) -> None:
        self.protocol = protocol
        self._wire = wire
        self._proved: set[str] = set()

    def put_if_absent(self, path: str, source: Path) -> bool:
        """Publish a local file; False, and no change, when an object of another attempt has the name."""
        token = secrets.token_hex(16)
        parts = self._wire.parts
        if parts is not None and source.stat().st_size <= parts.part_bytes:
            parts = None
        if parts is not None and self.size(path) is not None:
            return False  # before it is sent for nothing

        def attempt() -> bool:
            try:
                if parts is None:
                    self._wire.put(path, source, token, ABSENT)
                else:
                    self._upload(parts, path, source, token)
            except (Taken, UploadGone):
                if self._is_ours(path, token):
                    return True
                if self.size(path) is None:
                    raise Busy("the name was taken, and is free again") from None
                return False
            return True

        return self._tried(f"put {path}", attempt)

    def _upload(self, wire: Parts, path: str, source: Path, token: str) -> None:
        """In parts, a few at once; what is in memory is bounded by them."""
        size = source.stat().st_size
        part_bytes = wire.part_bytes * (1 + size // (9_000 * wire.part_bytes))  # a store takes 10,000 parts
        upload = self._tried(f"begin {path}", lambda: wire.begin(path, token))

        def part(number: int) -> str:
            with source.open("rb") as file:
                file.seek((number - 1) * part_bytes)
                data = file.read(part_bytes)
            return self._tried(f"put part {number} of {path}", lambda: wire.put_part(path, upload, number, data))

        try:
            with ThreadPoolExecutor(_PARTS_AT_ONCE) as pool:
                tags = list(pool.map(part, range(1, -(-size // part_bytes) + 1)))
            self._tried(f"finish {path}", lambda: wire.finish(path, upload, tags))
        except BaseException:
            with contextlib.suppress(Busy, OSError, UploadGone):
                wire.abort(path, upload)
            raise

    def replace(self, path: str, data: bytes, expected: bytes | None) -> bool:
        """Put `data` if the object still holds `expected` (None: if there is none); False, and no change, if not.

        When this call's answer was lost and another has replaced the object since, the answer is False, too: what
        stands is the other's.
        """
        token = secrets.token_hex(16)

        def attempt() -> bool:
            found = self._found(path)
            if found is not None and found.data == data and self._is_ours(path, token):
                return True  # an earlier try whose answer was lost
            if (None if found is None else found.data) != expected:
                return False
            try:
                self._wire.put(path, data, token, ABSENT if found is None else found.tag)
            except Taken:
                return self._is_ours(path, token)
            return True

        replaced = self._tried(f"put {path}", attempt)
        if replaced:
            self._prove(path, data)
        return replaced

    def _prove(self, path: str, data: bytes) -> None:
        """Once per bucket: StoreError where the server takes a put whose condition does not hold.

        The same bytes are put again, so that nothing changes even where it does.
        """
        bucket = path.split("/", 1)[0]
        if bucket in self._proved:
            return
        for tag in (ABSENT, self._wire.no_tag):
            token = secrets.token_hex(16)

            def is_refused(tag: str | None = tag, token: str = token) -> bool:
                try:
                    self._wire.put(path, data, token, tag)
                except Taken:
                    return True
                return False

            if not self._tried(f"put {path}", is_refused):
                raise StoreError(
                    f"the {self.protocol}:// server of {bucket} ignores the condition of a write (If-None-Match, "
                    "If-Match), which keeps two runs apart; use a server, or a newer version of it, that honours it"
                )
        self._proved.add(bucket)

    def _is_ours(self, path: str, token: str) -> bool:
        try:
            return self._wire.head(path).token == token
        except FileNotFoundError:
            return False

    def _found(self, path: str) -> Found | None:
        try:
            return self._wire.get(path)
        except FileNotFoundError:
            return None

    def read(self, path: str) -> bytes:
        """The whole object; FileNotFoundError."""
        return self._tried(f"get {path}", lambda: self._wire.get(path)).data

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`, fewer where the object ends; FileNotFoundError."""
        if size == 0:
            self._tried(f"head {path}", lambda: self._wire.head(path))
            return b""
        return self._tried(f"get {path}", lambda: self._wire.get(path, offset, offset + size)).data

    def tail(self, path: str, size: int) -> tuple[bytes, int]:
        """(the last `size` bytes or all, size of the object), in one request; FileNotFoundError."""
        found = self._tried(f"get {path}", lambda: self._wire.get(path, -size))
        return found.data, found.size

    def size(self, path: str) -> int | None:
        """In bytes; None when there is no such object."""
        try:
            return self._tried(f"head {path}", lambda: self._wire.head(path)).size
        except FileNotFoundError:
            return None

    def modified(self, path: str) -> float:
        """When it was put, in seconds since the epoch, by the store's clock; FileNotFoundError."""
        return self._tried(f"head {path}", lambda: self._wire.head(path)).modified

    def entries(self, folder: str, *, deep: bool = False) -> list[Listed]:
        """Entries directly in `folder`, or with `deep` every object below it."""
        prefix = folder.rstrip("/") + "/"
        found = self._tried(f"list {prefix}", lambda: [*self._wire.entries(prefix, deep)])
        return [entry for entry in found if entry.path != prefix and not (deep and entry.path.endswith("/"))]

    def delete(self, path: str) -> None:
        """Delete an object; no error when it is absent."""
        self._tried(f"delete {path}", lambda: self._wire.delete(path))

    def unfinished(self, folder: str) -> list[Unfinished]:
        """Uploads below `folder` whose process died, or still sends."""
        parts, prefix = self._wire.parts, folder.rstrip("/") + "/"
        if parts is None:
            return []
        return self._tried(f"list the uploads of {prefix}", lambda: [*parts.unfinished(prefix)])

    def abort(self, found: Unfinished) -> None:
        """Give an unfinished upload up; no error when it has ended by now."""
        if (parts := self._wire.parts) is not None:
            with contextlib.suppress(UploadGone, FileNotFoundError):
                self._tried(f"abort {found.path}", lambda: parts.abort(found.path, found.upload))

    def _tried(self, what: str, call: Callable[[], T]) -> T:
        """`call`, again while it is Busy, later and later and never in step with others; then StoreError."""
        begun = time.monotonic()
        for attempt in range(ATTEMPTS):
            try:
                return call()
            except Busy as busy:
                last = str(busy)
            if attempt + 1 < ATTEMPTS:
                time.sleep(min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**attempt) * random.uniform(0.5, 1.0))
        raise StoreError(
            f"cannot {what}: {self.protocol}:// did not do it in {ATTEMPTS} tries over "
            f"{time.monotonic() - begun:.0f} s (last: {last}); look at the network and the store's limits, then the "
            "same command goes on: no finished work is lost"
        )
