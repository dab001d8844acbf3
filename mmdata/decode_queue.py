"""Decode threads beside an event loop, handed several bodies at a time.

In: one argument after the other. Out: what the function makes of each, or what it raised. While threads are busy what
waits is handed over together, so that threads and loop wake one another once for several pictures.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Generic, TypeVar

__all__ = ["DecodeQueue"]

_TOGETHER = 8

A = TypeVar("A")
R = TypeVar("R")


class DecodeQueue(Generic[A, R]):
    """`await queue.put(argument)` is `function(argument)`, in one of `threads` threads; first come, first served."""

    def __init__(self, function: Callable[[A], R], threads: int) -> None:
        self._function = function
        self._threads = threads
        self._busy = 0
        self._waiting: deque[tuple[A, asyncio.Future[R]]] = deque()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def put(self, argument: A) -> asyncio.Future[R]:
        """The result to come."""
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((argument, future))
        self._hand_over()
        return future

    def close(self) -> None:
        """Wait for what is being done; what waits is never done."""
        self._pool.shutdown(cancel_futures=True)

    def _hand_over(self) -> None:
        while self._busy < self._threads and self._waiting:
            share = -(-len(self._waiting) // (self._threads - self._busy))
            batch = [self._waiting.popleft() for _ in range(min(share, _TOGETHER))]
            self._busy += 1
            done = asyncio.get_running_loop().run_in_executor(self._pool, self._all, [a for a, _ in batch])
            done.add_done_callback(partial(self._settle, batch))

    def _all(self, arguments: list[A]) -> list[tuple[R | None, BaseException | None]]:
        results: list[tuple[R | None, BaseException | None]] = []
        for argument in arguments:
            try:
                results.append((self._function(argument), None))
            except BaseException as error:  # noqa: BLE001  raised again where it is awaited
                results.append((None, error))
        return results

    def _settle(self, batch: list[tuple[A, asyncio.Future[R]]], results: asyncio.Future[Any]) -> None:
        self._busy -= 1
        if results.cancelled():
            return
        for (_, future), (result, error) in zip(batch, results.result(), strict=True):
            if future.cancelled():
                continue
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)
        self._hand_over()
