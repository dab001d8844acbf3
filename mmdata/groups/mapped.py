"""Long arrays that lie in a scratch folder instead of in memory, and looking at them a stretch at a time.

In: a folder, a type and a length. Out: numpy arrays whose pages are a file's: the system writes them out and drops them
when memory is short, and they count as page cache, not as memory of the process. Short ones lie in memory. A file has
no name: it is gone with its array, and with the process. Fails: StoreError when the disk is full.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from mmdata.errors import StoreError

__all__ = ["IN_MEMORY", "Growing", "Mapped", "Positions", "count_up", "gathered", "stretches"]

Positions = npt.NDArray[np.int64]

_STRETCH = 1 << 18  # values looked at together
_SHORT_BYTES = 1 << 23  # arrays up to here lie in memory


class Mapped:
    """Makes arrays in `folder`; None = in memory, all of them."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._idle: list[npt.NDArray[Any]] = []
        self._lock = threading.Lock()

    def array(self, kind: npt.DTypeLike, rows: int) -> npt.NDArray[Any]:
        """`rows` zeros."""
        size = rows * np.dtype(kind).itemsize
        if self.holds(size):
            return np.zeros(rows, kind)
        with self.writing(), tempfile.TemporaryFile(dir=self._folder) as file:
            # Not a hole in a file: on a full disk this raises, and a write to a hole ends the process.
            os.posix_fallocate(file.fileno(), 0, size)
            return _mapped(file, kind)

    @contextmanager
    def lent(self, kind: npt.DTypeLike, rows: int) -> Iterator[npt.NDArray[Any]]:
        """An array of any content, one that was lent before where there is one: fresh pages of a file cost time."""
        with self._lock:
            fits = [at for at, old in enumerate(self._idle) if old.dtype == kind and len(old) >= rows]
            array = self._idle.pop(fits[-1]) if fits else None
        if array is None:
            array = self.array(kind, rows)
        try:
            yield array[:rows]
        finally:
            if not self.holds(array.nbytes):
                with self._lock:
                    self._idle.append(array)

    def growing(self, kind: npt.DTypeLike) -> Growing:
        """An empty array to append to; a `with` closes its file."""
        return Growing(self, np.dtype(kind))

    def holds(self, size: int) -> bool:
        """Whether so many bytes lie in memory."""
        return self._folder is None or size <= _SHORT_BYTES

    def open(self) -> IO[bytes]:
        """A new file without a name."""
        with self.writing():
            return tempfile.TemporaryFile(dir=self._folder)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """OSError becomes StoreError."""
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"cannot write scratch in {self._folder}: {error.strerror}; make room there, or set MMDATA_SCRATCH to "
                "a folder that has it"
            ) from error


IN_MEMORY = Mapped(None)


class Growing:
    """An array to append to; see `Mapped.growing`."""

    def __init__(self, mapped: Mapped, kind: np.dtype[Any]) -> None:
        self._mapped, self._kind = mapped, kind
        self._held: list[npt.NDArray[Any]] = []
        self._held_bytes = 0
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Growing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.clear()
        if self._file is not None:
            self._file.close()

    def append(self, values: npt.NDArray[Any]) -> None:
        """Add these; StoreError when the disk is full."""
        self._held.append(np.ascontiguousarray(values, self._kind))
        self._held_bytes += self._held[-1].nbytes
        if not self._mapped.holds(self._held_bytes):
            self._write()

    def array(self) -> npt.NDArray[Any]:
        """All of them, in one array; nothing is added afterwards."""
        if self._file is None:
            found = np.concatenate([np.zeros(0, self._kind), *self._held])
            self._held.clear()
            return found
        self._write()
        with self._mapped.writing():
            self._file.flush()
            return _mapped(self._file, self._kind)

    def _write(self) -> None:
        if self._file is None:
            self._file = self._mapped.open()
        with self._mapped.writing():
            for values in self._held:
                self._file.write(values.data)
        self._held.clear()
        self._held_bytes = 0


def _mapped(file: IO[bytes], kind: npt.DTypeLike) -> npt.NDArray[Any]:
    return np.asarray(np.memmap(file, kind, "r+"))


def stretches(rows: int, size: int = 0) -> Iterator[slice]:
    """All of 0 … rows, `size` at a time, by default some hundred thousand."""
    size = size or _STRETCH
    return (slice(first, min(first + size, rows)) for first in range(0, rows, size))


def count_up(array: Positions) -> Positions:
    """The same array, filled with 0, 1, … in order."""
    for some in stretches(len(array)):
        array[some] = np.arange(some.start, some.stop)
    return array


def gathered(mapped: Mapped, values: npt.NDArray[Any], at: Positions) -> npt.NDArray[Any]:
    """`values[at]` as an array of `mapped`."""
    found = mapped.array(values.dtype, len(at))
    for some in stretches(len(at)):
        found[some] = values[at[some]]
    return found
