"""Byte ranges of remote files: what is near to one another is fetched together, what many rows want as one stream.

In: references that will be read (path, first byte, length), then reads of them in any order from several threads. Out:
their bytes. The plan of one call of `expect`, per file:

- Half of the file's bytes or more are wanted, and it has no more than 4 GiB: it is read once, from its beginning to its
  end, by one request, into scratch.
- Else ranges: neighbours with at most 256 KiB between them become one request, of at most 16 MiB. So a file of which
  most rows survive is read in order with few requests, and one of which few survive costs those few.

A server that does not know ranges is asked once for the whole file. The next two ranges are fetched while one is used;
a range is let go when its references have been read. What a filesystem raises goes through as it is.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

__all__ = ["STREAM_SHARE", "Range", "RemoteFile", "coalesced"]

STREAM_SHARE = 0.5
STREAM_MOST = 4 << 30
GAP_BYTES = 256 << 10
RANGE_BYTES = 16 << 20
_AHEAD = 2

Fetch = Callable[[int, int], bytes]  # (first byte, length) → bytes; fewer or more where ranges are not known


@dataclass
class Range:
    """One request: `size` bytes from `start`, for the references (offset, size) in it, each with how often."""

    start: int
    size: int
    wanted: Counter[tuple[int, int]] = field(default_factory=Counter)


def coalesced(references: Iterable[tuple[int, int]], gap: int = GAP_BYTES, most: int = RANGE_BYTES) -> list[Range]:
    """References (offset, size) as ranges in order; one larger than `most` is a range of its own."""
    made: list[Range] = []
    for offset, size in sorted(references):
        last = made[-1] if made else None
        end = offset + size
        if last is not None and offset - (last.start + last.size) <= gap and end - last.start <= max(most, last.size):
            last.size = max(last.size, end - last.start)
        else:
            last = Range(offset, size)
            made.append(last)
        last.wanted[offset, size] += 1
    return made


class RemoteFile:
    """One remote file being read. `fetch` gets a range, `stream` puts the whole file at a local path."""

    def __init__(
        self, fetch: Fetch, stream: Callable[[Path], None], size: Callable[[], int | None], scratch: Callable[[], Path]
    ) -> None:
        self._fetch, self._stream, self._ask_size, self._scratch = fetch, stream, size, scratch
        self._lock = threading.Lock()
        self._ranges: list[Range] = []
        self._starts: list[int] = []
        self._flying: dict[int, Future[bytes]] = {}
        self._local: Path | None = None

    def expect(self, references: Iterable[tuple[int, int]], pool: ThreadPoolExecutor) -> None:
        """Plan these reads, in place of what was planned before."""
        wanted = list(references)
        with self._lock:
            self._pool = pool
            self._ranges = coalesced(wanted)
            self._starts = [r.start for r in self._ranges]
            self._flying.clear()
        if self._local is None and len(self._ranges) > 1:
            size = self._ask_size()
            distinct = sum(length for _, length in set(wanted))
            if size is not None and size <= STREAM_MOST and distinct >= STREAM_SHARE * size:
                self._to_scratch()

    def read(self, offset: int, size: int) -> bytes:
        """The bytes, or fewer where the file is shorter."""
        if self._local is None:
            data = self._planned(offset, size)
            if data is not None:
                return data
        file = self._opened()
        if file is None:
            data = self._fetch(offset, size)
            if len(data) <= size:
                return data
            self._to_scratch()  # the whole file came where a range was asked for
            file = self._opened()
            if file is None:
                return data[offset : offset + size]
        with file:
            file.seek(offset)
            return file.read(size)

    def _opened(self) -> BinaryIO | None:
        """The file in scratch, open, so that `close` in another thread does not take it from a reader."""
        with self._lock:
            return None if self._local is None else self._local.open("rb")

    def _to_scratch(self) -> None:
        with self._lock:
            if self._local is None:
                path = self._scratch()
                self._stream(path)
                self._local = path

    def _planned(self, offset: int, size: int) -> bytes | None:
        """Out of the planned range it lies in; None where there is none, or ranges are not known there."""
        with self._lock:
            index = bisect_right(self._starts, offset) - 1
            if index < 0:
                return None
            found = self._ranges[index]
            if (offset, size) not in found.wanted:
                return None
            for ahead in range(index, min(index + 1 + _AHEAD, len(self._ranges))):
                each = self._ranges[ahead]
                if ahead not in self._flying and each.wanted:
                    self._flying[ahead] = self._pool.submit(self._fetch, each.start, each.size)
            future = self._flying[index]
        data = future.result()
        if len(data) > found.size:
            self._to_scratch()
            return None
        with self._lock:
            found.wanted[offset, size] -= 1
            if not found.wanted[offset, size]:
                del found.wanted[offset, size]
            if not found.wanted:
                self._flying.pop(index, None)
        return data[offset - found.start : offset - found.start + size]

    def close(self) -> None:
        """Let go of what is held."""
        with self._lock:
            self._flying.clear()
            if self._local is not None:
                self._local.unlink(missing_ok=True)
                self._local = None
