"""fsspec's `memory://`, with the methods of `ObjectStore`: one process, nothing outlives it. For tests and trials.

In and out: as `mmdata.object_store.ObjectStore`. Fails: FileNotFoundError for an absent file.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import fsspec

from mmdata.object_store import Listed, Unfinished

__all__ = ["MemoryObjects"]

_one_writer = threading.RLock()  # the files are the process's, whoever made the store


class MemoryObjects:
    """Paths begin with `/`; threads may share it."""

    protocol = "memory"

    def __init__(self) -> None:
        self._fs: Any = fsspec.filesystem("memory")

    def put_if_absent(self, path: str, source: Path) -> bool:
        """Publish a local file; False, and no change, when the name is taken."""
        with _one_writer:
            if self._fs.exists(path):
                return False
            self._fs.pipe_file(path, source.read_bytes())
            return True

    def replace(self, path: str, data: bytes, expected: bytes | None) -> bool:
        """Put `data` if the file still holds `expected` (None: if there is none)."""
        with _one_writer:
            if (self.read(path) if self._fs.isfile(path) else None) != expected:
                return False
            self._fs.pipe_file(path, data)
            return True

    def read(self, path: str) -> bytes:
        """The whole file; FileNotFoundError."""
        return bytes(self._fs.cat_file(path))

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`, fewer where the file ends; FileNotFoundError."""
        return bytes(self._fs.cat_file(path, offset, offset + size))

    def tail(self, path: str, size: int) -> tuple[bytes, int]:
        """(the last `size` bytes or all, size of the file); FileNotFoundError."""
        data = self.read(path)
        return data[-size:], len(data)

    def size(self, path: str) -> int | None:
        """In bytes; None when there is no such file."""
        return int(self._fs.size(path)) if self._fs.isfile(path) else None

    def modified(self, path: str) -> float:
        """When it was written, in seconds since the epoch; FileNotFoundError."""
        return float(self._fs.modified(path).timestamp())

    def entries(self, folder: str) -> list[Listed]:
        """What lies directly in `folder`; FileNotFoundError."""
        listed = self._fs.ls(folder, detail=True)
        return [
            Listed(e["name"], e["size"] if e["type"] == "file" else None, 0.0, str(e.get("created"))) for e in listed
        ]

    def delete(self, path: str) -> None:
        """Delete it; FileNotFoundError."""
        self._fs.rm_file(path)

    def unfinished(self, folder: str) -> list[Unfinished]:
        """None: nothing is uploaded."""
        return []

    def abort(self, found: Unfinished) -> None:
        """Never asked."""
