"""How many bytes the decoding of a picture takes, and a room that holds only so many at once.

In: a format, its px. Out: bytes; `Room.held` waits, in order of asking, until they fit beside what others hold.
The costs are those of the decoders used, measured as peak memory by px in a process of its own (Pillow 13, OpenCV 5,
libwebp 1.6, libavif 1.4, OpenJPEG 2.5, libheif 1.23, libjxl 0.11), rounded up.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["BYTES_PER_PX", "DECODING", "Room", "pixels_allowed"]

# Bytes held per px of the picture while it is decoded. Depth and alpha are at their most expensive.
BYTES_PER_PX = {
    "png": 4.3,
    "bmp": 4.3,
    "gif": 4.3,
    "webp": 8.2,
    "webp animated": 17.0,
    "tiff": 12.0,
    "avif": 15.0,
    "heic": 10.0,
    "jpegxl": 15.0,
    "jpeg2000": 20.0,
}
_CHEAPEST = 4.5  # what max_pixels may cost: 2^26 px are 300 MB


def pixels_allowed(format: str, max_pixels: int) -> int:
    """`max_pixels`, or fewer for a format whose decoder holds more than 4.5 bytes for each of them."""
    return int(max_pixels * min(1.0, _CHEAPEST / BYTES_PER_PX.get(format, _CHEAPEST)))


class Room:
    """Lets work in as long as the bytes of all that is inside stay below `size`; larger work goes in alone."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._used = 0
        self._turn: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def held(self, size: int) -> Iterator[None]:
        """Wait for one's turn and for room; whoever came first goes first, so that large work is not passed by."""
        size = min(size, self._size)
        me = object()
        with self._changed:
            self._turn.append(me)
            try:
                self._changed.wait_for(lambda: self._turn[0] is me and self._used + size <= self._size)
                self._used += size
            finally:
                self._turn.remove(me)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._used -= size
                self._changed.notify_all()


DECODING = Room(320 << 20)  # one for the process: all decode threads together
