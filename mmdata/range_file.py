"""Objects of a store as seekable files: one request opens one, each read is one exact range.

`RangeFile` is what pyarrow reads Parquet from; `ObjectFiles` is the fsspec filesystem that DuckDB is given. Both read
through `ObjectStore`, so that its retries hold for queries, too. Nothing is written. Fails: FileNotFoundError for an
absent object, StoreError as `ObjectStore` does.
"""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import fsspec

from mmdata.object_store import ObjectStore
from mmdata.objects.memory import MemoryObjects

__all__ = ["ObjectFiles", "RangeFile"]

# What opening brings along: the footer, and all of a small file.
_TAIL_BYTES = 64 << 10
_TAILS_HELD = 2_048  # at most 128 MiB
_REQUESTS_AT_ONCE = 32


class RangeFile(io.RawIOBase):
    """Reads one object; its last bytes are held since it was opened.

    Each thread has a position of its own: DuckDB reads one handle from several threads, a seek and a read each.
    """

    def __init__(self, objects: ObjectStore | MemoryObjects, path: str, tail: tuple[bytes, int] | None = None) -> None:
        super().__init__()
        self._objects = objects
        self._path = path
        self._tail, self.size = tail or objects.tail(path, _TAIL_BYTES)
        self._positions: dict[int, int] = {}

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """This thread's position, in bytes."""
        return self._positions.get(threading.get_ident(), 0)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move this thread's position; returns it."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self.size}[whence]
        self._positions[threading.get_ident()] = max(0, start + offset)
        return self.tell()

    def read(self, size: int | None = -1) -> bytes:
        """As many bytes as asked for, fewer at the end."""
        start = self.tell()
        stop = self.size if size is None or size < 0 else min(self.size, start + size)
        if start >= stop:
            return b""
        held = self.size - len(self._tail)
        if start >= held:
            data = self._tail[start - held : stop - held]
        else:
            data = self._objects.read_range(self._path, start, stop - start)
            if len(data) != stop - start:
                raise OSError(f"{self._path} changed while it was read")
        self._positions[threading.get_ident()] = stop
        return data

    def readinto(self, buffer: Any) -> int:
        """As `read`, into `buffer`."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class ObjectFiles(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """What `duckdb.register_filesystem` takes: read-only.

    The last bytes of the files opened last are held, because DuckDB opens a file for its footer and again for its
    columns; files of a dataset that DuckDB reads never change.
    """

    cachable = False

    def __init__(self, objects: ObjectStore) -> None:
        super().__init__()
        self.protocol = objects.protocol
        self._objects = objects
        self._holding = threading.Lock()
        self._tails: OrderedDict[str, tuple[bytes, int]] = OrderedDict()

    def open(self, path: str, mode: str = "rb", **_: Any) -> RangeFile:
        """A `RangeFile`."""
        if "r" not in mode:
            raise PermissionError(f"{path} may be read only: Store alone writes")
        plain = self._plain(path)
        return RangeFile(self._objects, plain, self._tail(plain))

    def expect(self, paths: Iterable[str]) -> None:
        """Fetch the last bytes of files that will be opened, many at once instead of one after the other."""
        plain = [p for p in map(self._plain, paths) if p not in self._tails][:_TAILS_HELD]
        with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
            for path, tail in zip(plain, pool.map(self._tail_if_there, plain), strict=True):
                if tail is not None:
                    self._hold(path, tail)

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Name, size and type; FileNotFoundError."""
        plain = self._plain(path)
        return {"name": plain, "size": self._tail(plain)[1], "type": "file"}

    def exists(self, path: str, **_: Any) -> bool:
        """Whether there is such an object."""
        return self._tail_if_there(self._plain(path)) is not None

    def isfile(self, path: str) -> bool:
        """As `exists`: folders are none."""
        return self.exists(path)

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """What lies directly in a folder; with `detail` name, size, type, ETag (or generation) and LastModified."""
        found = self._objects.entries(self._plain(path))
        if not detail:
            return [entry.path for entry in found]
        return [
            {
                "name": entry.path,
                "size": entry.size,
                "type": "directory" if entry.size is None else "file",
                "ETag": entry.tag,
                "LastModified": entry.modified,
            }
            for entry in found
        ]

    def glob(self, path: str, **_: Any) -> list[str]:
        """The path itself: only whole names are asked for, with glob characters in brackets."""
        return [self._plain(path)]

    def modified(self, path: str) -> datetime:
        """Always the same: what has a name never changes."""
        return datetime.fromtimestamp(0, UTC)

    def _tail(self, plain: str) -> tuple[bytes, int]:
        found = self._tails.get(plain)
        if found is None:
            found = self._objects.tail(plain, _TAIL_BYTES)
            self._hold(plain, found)
        return found

    def _tail_if_there(self, plain: str) -> tuple[bytes, int] | None:
        try:
            return self._tail(plain)
        except FileNotFoundError:
            return None

    def _hold(self, plain: str, tail: tuple[bytes, int]) -> None:
        with self._holding:
            self._tails[plain] = tail
            while len(self._tails) > _TAILS_HELD:
                self._tails.popitem(last=False)

    def _plain(self, path: str) -> str:
        plain = path.partition("://")[2] if "://" in path else path
        for character in "*?[":
            plain = plain.replace(f"[{character}]", character)
        return plain
