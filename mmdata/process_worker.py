"""A worker process: items in over a socket, what became of them out, one at a time.

In, each a message of its own: a context, an item with the name of its context, an answer about hosts' allowances, the
word that another has the shard made ready here, the word to stop, the end of the socket. Out: rows fetched, that a
shard is in its tail, questions about allowances, and for each item its result or its error. Stages stay open between
items. Told to stop, the item at hand is left as by Ctrl-C: what is computed is committed, scratch is removed. At the
end of the socket (the driver is gone) the process ends at once. A second thread reads, so that neither waits for the
work.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from mmdata import next_shard
from mmdata.errors import RetryableError
from mmdata.pool import Item, MakeGate, perform
from mmdata.settings import FetchOptions
from mmdata.shipment import packed, unpacked

__all__ = [
    "ANSWER",
    "CONTEXT",
    "DONE",
    "ERROR",
    "GATE",
    "HELLO",
    "ITEM",
    "LET_GO",
    "ROWS",
    "STOP",
    "TAIL",
    "load_opencv",
    "load_pandas",
    "main",
]

# First byte of a message. To the worker:
CONTEXT, ITEM, ANSWER, LET_GO, STOP = b"c", b"i", b"a", b"l", b"s"
# From it:
HELLO, ROWS, TAIL, GATE, DONE, ERROR = b"h", b"r", b"t", b"g", b"d", b"e"

_TOLD_EVERY_S = 0.5
_ANSWER_S = 30.0  # a driver that says nothing for so long is gone, or its machine is


def load_opencv() -> None:
    """Load what resizes pictures: for the process that workers are forked from, while nobody waits for it."""
    import cv2  # noqa: F401


def load_pandas() -> None:
    """Have pyarrow look for pandas, as it does when it makes its first array; where it is, that takes a while."""
    import pyarrow as pa

    pa.array([0])


def main(descriptor: int) -> None:
    """Work until the socket ends or the word to stop comes."""
    connection = Connection(descriptor)
    worker = _Worker(connection)
    threading.Thread(target=worker.read, name="mmdata-driver", daemon=True).start()
    try:
        worker.work()
    except KeyboardInterrupt:
        if not worker.stopping:
            raise
    except OSError:
        return  # of the socket, for an item's own errors are caught: the driver is gone
    finally:
        next_shard.let_go()


class _Worker:
    def __init__(self, connection: Connection) -> None:
        self.stopping = False
        self._connection = connection
        self._sending = threading.Lock()
        self._work: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._contexts: dict[str, tuple[Any, Any]] = {}  # shipment until it is opened, then the context itself
        self._threads = 1
        signal.signal(signal.SIGINT, self._interrupted)

    def say(self, kind: bytes, value: Any = None) -> None:
        """Tell the driver."""
        data = kind + packed(value)
        with self._sending:
            self._connection.send_bytes(data)

    def read(self) -> None:
        """The thread that reads; it never returns while the process lives."""
        try:
            while True:
                data = self._connection.recv_bytes()
                if data[:1] == ANSWER:
                    self._answers.put(data)
                elif data[:1] == STOP:
                    self.stopping = True
                    logging.disable()  # what libraries say of work that is broken off is of no use to anybody
                    self._work.put(data)
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                else:
                    self._work.put(data)
        except (EOFError, OSError):
            os._exit(1)  # the driver is gone: whatever this process does is nobody's business any more

    def _interrupted(self, *_: object) -> None:
        # Only at the driver's word, and once: a terminal's Ctrl-C is the driver's to deal with.
        if self.stopping:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            raise KeyboardInterrupt

    def work(self) -> None:
        """Do what comes, in order."""
        self.say(HELLO, os.getpid())
        while (data := self._work.get())[:1] != STOP:
            if data[:1] == CONTEXT:
                name, shipment, self._threads = unpacked(data[1:])
                self._contexts[name] = shipment, None
            elif data[:1] == LET_GO:
                next_shard.let_go()
            else:
                self._do(*unpacked(data[1:]))

    def _do(self, name: str, item: Item, gpu: str | None, is_gated: bool) -> None:
        if gpu is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # before its stage brings torch in
        try:
            context = self._context(name)
            make_gate = self._gates(context.fetch) if is_gated and item.kind == "ingest" else None
            data = DONE + packed(perform(context, item, _Told(self.say), make_gate, self._threads))
        except Exception as error:  # noqa: BLE001  handed to the driver, which raises what is not its to mend
            data = ERROR + _packed_error(error)
        with self._sending:
            self._connection.send_bytes(data)

    def _context(self, name: str) -> Any:
        shipment, context = self._contexts[name]
        if context is None:
            context = shipment.open()
            self._contexts[name] = None, context
        return context

    def _gates(self, fetch: FetchOptions) -> MakeGate:
        from mmdata.host_desk import rules_of
        from mmdata.host_gate import LinkedGate

        rules = rules_of(fetch)
        return lambda client: LinkedGate(_Exchange(self.say, self._answers, client), rules)


class _Exchange:
    """Questions about hosts' allowances → the driver's answers; for one thread."""

    def __init__(self, say: Callable[[bytes, Any], None], answers: queue.SimpleQueue[bytes], client: str) -> None:
        self._say, self._answers, self._client = say, answers, client
        self._number = 0

    def __call__(self, messages: list[Any]) -> list[Any]:
        self._number += 1
        self._say(GATE, (self._client, self._number, messages))
        until = time.monotonic() + _ANSWER_S
        while True:
            try:
                data = self._answers.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                raise RetryableError(
                    f"the run's own process has not answered for {_ANSWER_S:.0f} s; the same command goes on"
                ) from None
            client, number, replies = unpacked(data[1:])
            if (client, number) == (self._client, self._number):  # else an answer to somebody who has left
                answered: list[Any] = replies
                return answered


class _Told:
    """A `Watch` that sends: rows at most twice a second, so that a fast shard does not keep the driver busy."""

    def __init__(self, say: Callable[[bytes, Any], None]) -> None:
        self._say = say
        self._held, self._told = 0, time.monotonic()
        self._in_tail = False

    def rows(self, rows: int) -> None:
        self._held += rows
        if time.monotonic() - self._told >= _TOLD_EVERY_S:
            self._say(ROWS, self._held)
            self._held, self._told = 0, time.monotonic()

    def tail(self) -> None:
        if not self._in_tail:
            self._in_tail = True
            self._say(TAIL, None)


def _packed_error(error: Exception) -> bytes:
    try:
        data = packed(error)
        unpacked(data)
    except Exception:  # noqa: BLE001  whatever a foreign error does when it is sent, the driver must hear of it
        return packed(RuntimeError(f"{type(error).__name__}: {error}"))
    return data
