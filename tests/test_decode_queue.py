"""Decode threads that are handed several bodies at a time: every result, every error, in order, and no more threads."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from mmdata.decode_queue import DecodeQueue


def test_every_argument_gets_its_own_result_or_error() -> None:
    def half(number: int) -> int:
        if number % 2:
            raise ValueError(f"{number} is odd")
        return number // 2

    async def work() -> list[object]:
        queue = DecodeQueue(half, 2)
        found = await asyncio.gather(*(queue.put(n) for n in range(50)), return_exceptions=True)
        queue.close()
        return [str(f) if isinstance(f, ValueError) else f for f in found]

    assert asyncio.run(work()) == [f"{n} is odd" if n % 2 else n // 2 for n in range(50)]


@pytest.mark.parametrize("threads", [1, 3])
def test_no_more_threads_than_allowed_and_no_thread_starves(threads: int) -> None:
    at_once: list[int] = []
    names: set[str] = set()
    inside = 0
    lock = threading.Lock()

    def slow(number: int) -> int:
        nonlocal inside
        with lock:
            inside += 1
            at_once.append(inside)
            names.add(threading.current_thread().name)
        time.sleep(0.005)
        with lock:
            inside -= 1
        return number

    async def work() -> list[int]:
        queue = DecodeQueue(slow, threads)
        found = await asyncio.gather(*(queue.put(n) for n in range(40)))
        queue.close()
        return list(found)

    assert asyncio.run(work()) == list(range(40))
    assert max(at_once) == threads
    assert len(names) == threads


def test_a_result_that_nobody_waits_for_any_more_is_dropped() -> None:
    async def work() -> int:
        queue = DecodeQueue(lambda n: time.sleep(0.01) or n, 1)
        unwanted = [queue.put(n) for n in range(5)]
        wanted = queue.put(9)
        for each in unwanted:
            each.cancel()
        found = await wanted
        queue.close()
        return found

    assert asyncio.run(work()) == 9
