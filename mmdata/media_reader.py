"""The bytes of media references, wherever they lie: in the dataset, in adopted files, in cells of tables, far away.

In: `image_path`, `image_offset`, `image_size` of base rows. A path is a name relative to the dataset; an absolute path
or a URL that fsspec knows; or `<one of these>.parquet#column` (`.arrow#column`), then offset is a row of that file.
Out: exactly `size` bytes. Fails with StoreError where the dataset's own media is damaged, and with MissingMedia, which
costs that row alone, where adopted media is gone or has another size (`transient`: it could not be reached just now).
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa

from mmdata.errors import MissingMedia, MmdataError
from mmdata.media_cells import HELD_BYTES, Cells, split_cell
from mmdata.media_ranges import RemoteFile
from mmdata.scratch import scratch_folder
from mmdata.sources.places import is_local
from mmdata.store import Store

__all__ = ["MediaReader", "Reference"]

Reference = tuple[str, int, int]  # path, offset, size

_HANDLES = 64  # local files kept open
_REMOTE_FILES = 8  # remote files with a plan
_THREADS = 4  # requests in flight


class MediaReader:
    """Reads media for one dataset; safe for several threads. `close` lets go of files and scratch; so does `with`.

    `requests` counts reads of remote ranges and files.
    """

    def __init__(self, store: Store, held_bytes: int = HELD_BYTES) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._handles: OrderedDict[str, _Descriptor] = OrderedDict()
        self._remote: OrderedDict[str, RemoteFile] = OrderedDict()
        self._cells = Cells(self._bring, held_bytes)
        self._stack = contextlib.ExitStack()
        self._naming = threading.Lock()
        self._folder: Path | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._files = 0
        self.requests = 0

    def __enter__(self) -> MediaReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def expect(self, references: Iterable[Reference]) -> None:
        """Plan the reads of many references that will be read next; it costs nothing where media is local.

        A plan that cannot be made (a server that does not answer) is none: the reads will tell.
        """
        by_file: dict[str, list[tuple[int, int]]] = {}
        for path, offset, size in references:
            if split_cell(path) is None and self._is_far(path):
                by_file.setdefault(path, []).append((offset, size))
        for path, wanted in by_file.items():
            with contextlib.suppress(Exception):  # foreign filesystems raise anything
                self._remote_file(path).expect(wanted, self._threads())

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Exactly `size` bytes of a reference; see the module for what it raises."""
        if _is_relative(path):
            if not self._is_far(path):
                return self._store.read_range(path, offset, size)
            return self._own(path, offset, size)
        try:
            cell = split_cell(path)
            if cell is not None:
                data = self._cells.read(*cell, offset)
            elif is_local(path):
                data = self._local(path, offset, size)
            else:
                data = self._remote_file(path).read(offset, size)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise MissingMedia(f"{path} is gone, which this dataset adopted; bring it back, or leave the row") from None
        except (KeyError, IndexError, pa.ArrowInvalid) as error:
            raise MissingMedia(f"{path} is not the file any more that was adopted ({error!r})") from None
        except MmdataError:
            raise
        except Exception as error:  # foreign filesystems raise anything: the row waits for the next run
            raise MissingMedia(f"cannot read {path} just now: {error!r}"[:300], transient=True) from error
        if data is None or len(data) != size:
            there = "nothing" if data is None else f"{len(data)} bytes"
            raise MissingMedia(f"{path} has {there} at {offset} where {size} bytes were adopted: the file was changed")
        return data

    def _own(self, name: str, offset: int, size: int) -> bytes:
        """The dataset's own media on an object store; a planned range that fails is read again by itself."""
        with self._lock:
            planned = self._remote.get(name)
        if planned is not None:
            with contextlib.suppress(Exception):  # the store's own read says what is wrong
                data = planned.read(offset, size)
                if len(data) == size:
                    return data
        return self._store.read_range(name, offset, size)

    def _is_far(self, path: str) -> bool:
        return self._store.is_shared and not self._store.is_local if _is_relative(path) else not is_local(path)

    def _local(self, path: str, offset: int, size: int) -> bytes:
        with self._lock:
            file = self._handles.get(path)
            if file is None:
                file = self._handles[path] = _Descriptor(path)
                if len(self._handles) > _HANDLES:
                    self._handles.popitem(last=False)  # closed when its last reader lets go of it
            self._handles.move_to_end(path)
        if offset == 0 and os.fstat(file.number).st_size > size:
            size += 1  # a file of its own must have just this size: one byte more tells, however large it is now
        parts = []
        while size > 0 and (part := os.pread(file.number, size, offset)):
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return b"".join(parts)

    def _remote_file(self, path: str) -> RemoteFile:
        old = None
        with self._lock:
            if path not in self._remote:
                self._remote[path] = self._new_remote(path)
                if len(self._remote) > _REMOTE_FILES:
                    _, old = self._remote.popitem(last=False)
            self._remote.move_to_end(path)
            found = self._remote[path]
        if old is not None:
            old.close()  # not under the lock: it waits for a file that is being streamed
        return found

    def _new_remote(self, path: str) -> RemoteFile:
        if _is_relative(path):
            read = partial(self._store.read_range, path)
            return RemoteFile(self._counted(read), _no_stream, lambda: None, self._scratch_file)
        fs, root = fsspec.core.url_to_fs(path)

        def fetch(offset: int, size: int) -> bytes:
            return bytes(fs.cat_file(root, start=offset, end=offset + size))

        def stream(local: Path) -> None:
            self.requests += 1
            fs.get_file(root, str(local))

        def size() -> int | None:
            return fs.info(root).get("size")  # type: ignore[no-any-return]

        return RemoteFile(self._counted(fetch), stream, size, self._scratch_file)

    def _counted(self, fetch: Any) -> Any:
        def counting(offset: int, size: int) -> bytes:
            self.requests += 1
            data: bytes = fetch(offset, size)
            return data

        return counting

    def _bring(self, url: str) -> Path:
        """A remote file, whole, in scratch."""
        fs, root = fsspec.core.url_to_fs(url)
        path = self._scratch_file()
        self.requests += 1
        fs.get_file(root, str(path))
        return path

    def _scratch_file(self) -> Path:
        with self._naming:  # two files that come at once must not get one name
            if self._folder is None:
                self._folder = self._stack.enter_context(scratch_folder())
            self._files += 1
            return self._folder / str(self._files)

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="media")
        return self._pool

    def close(self) -> None:
        """Let go of files, plans and scratch."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        with self._lock:
            self._handles.clear()
            self._remote.clear()
        self._cells.close()
        self._stack.close()
        self._folder = None


class _Descriptor:
    """An open file, closed when the last who holds it lets go of it: a thread may read while another drops it."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


def _is_relative(path: str) -> bool:
    return not path.startswith("/") and "://" not in path


def _no_stream(local: Path) -> None:
    raise NotImplementedError("the dataset's own media is read in ranges")
