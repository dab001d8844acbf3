"""Two worker processes and the one book of their run."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
import time
from collections import Counter
from multiprocessing.connection import Connection
from typing import Any

from mmdata.host_desk import BookDesk, Message, Reply
from mmdata.host_gate import LinkedGate
from mmdata.media.host_rules import HostRules, Limit


def _worker(pipe: Connection, name: str, rules: HostRules, results: Any) -> None:
    """60 starts over three hosts, each of 5 ms; tells when each began and ended."""

    def exchange(messages: list[Message]) -> list[Reply]:
        pipe.send(messages)
        replies: list[Reply] = pipe.recv()
        return replies

    async def work() -> list[tuple[str, float, float]]:
        gate, done = LinkedGate(exchange, rules), []

        async def start(host: str) -> None:
            began = time.monotonic()
            await asyncio.sleep(0.005)
            done.append((host, began, time.monotonic()))
            gate.leave(host, "ok", None)

        running = set()
        gate.on_grant = lambda host: running.add(asyncio.create_task(start(host)))
        gate.on_closed = lambda host, for_s: None
        async with gate:
            for _ in range(20):
                for host in ("one", "two", "fast"):
                    gate.want(host)
            while len(done) < 60:
                await asyncio.sleep(0.01)
        return done

    results.put((name, asyncio.run(work())))


def test_two_processes_share_the_allowances_of_a_run() -> None:
    """20 starts each at 100/s and at one connection: what a bystander sees, by the clock that all processes share."""
    rules = HostRules(Limit(2, 100.0), {"fast": Limit(1, None)})
    desk, context = BookDesk(rules), multiprocessing.get_context("spawn")
    results, workers, answering = context.Queue(), [], []
    for name in ("a", "b"):
        ours, theirs = context.Pipe()
        worker = context.Process(target=_worker, args=(theirs, name, rules, results))
        worker.start()
        theirs.close()

        def answer(name: str = name, ours: Connection = ours) -> None:
            try:
                while True:
                    ours.send(desk.answer(name, ours.recv()))
            except (EOFError, OSError):
                ours.close()

        answering.append(threading.Thread(target=answer))
        answering[-1].start()
        workers.append(worker)
    try:
        starts = [(*start, name) for name, done in (results.get(timeout=60) for _ in workers) for start in done]
    finally:
        for worker in workers:
            worker.join(10)
            worker.kill()
        for thread in answering:
            thread.join(10)
    assert len(starts) == 120
    for host, most in (("one", 2), ("two", 2), ("fast", 1)):
        here = [s for s in starts if s[0] == host]
        assert Counter(name for *_, name in here) == {"a": 20, "b": 20}
        for _, began, _, _ in here:
            assert sum(b <= began < e for _, b, e, _ in here) <= most
        if host != "fast":  # 39 gaps of 10 ms, but for what a message takes
            times = sorted(b for _, b, _, _ in here)
            assert times[-1] - times[0] >= 0.39 - 0.05
