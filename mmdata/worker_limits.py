"""What keeps one worker process among several small: few threads in libraries, and memory that goes back to the system.

A worker is one of as many as there are CPUs. A library that starts a thread for each CPU would slow all of them down;
and glibc's allocator, left alone, keeps for each thread what foreign pictures once took.
"""

from __future__ import annotations

import ctypes
import os

__all__ = ["limit_worker"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of mallopt(3)


def limit_worker() -> None:
    """Set the limits in this process, before it has loaded OpenCV."""
    import pyarrow as pa

    os.environ.setdefault("OPENCV_FOR_THREADS_NUM", "1")
    pa.set_cpu_count(1)
    pa.set_io_thread_count(2)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not where the C library is not glibc
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 2)
        # Set by hand it no longer grows to 32 MB: what is larger is given back as soon as it is free. Memory given back
        # and taken again costs a page fault per 4 kB: with 4 and 32 MB a tenth of decoding, with these nothing.
        mallopt(_M_MMAP_THRESHOLD, 16 << 20)
        mallopt(_M_TRIM_THRESHOLD, 64 << 20)
