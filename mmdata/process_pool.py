"""The pool of plain worker processes on this machine: no Ray, ready in a second.

In: items, as any pool. Out: what became of them. A worker has one item at a time, so that its death is that item's; a
new one takes its place. A worker whose item had a model keeps it open for the next item of that pass; `recycle` ends
those workers, because a device in doubt is only mended by a new process. A thread of the driver's reads what workers
say and answers their questions about hosts, while the driver is busy with other things.

Raises RetryableError when workers do not come up at all; what an item raises is in its Finished.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmdata import nursery
from mmdata.errors import RecipeError, RetryableError
from mmdata.pool import Finished, Item, ItemKey, Tick, local_device
from mmdata.process_worker import ANSWER, CONTEXT, DONE, ERROR, GATE, HELLO, ITEM, LET_GO, ROWS, STOP, TAIL
from mmdata.shipment import Shipment, packed, unpacked
from mmdata.slots import Slots

if TYPE_CHECKING:
    from mmdata.host_desk import BookDesk

__all__ = ["ProcessPool"]

_STOP_S = 10.0  # for what is at hand to be left in order, before it is killed
_STARTS_IN_VAIN = 3
_GONE, _BROKEN = b"", b"!"  # news of the reader's own: the socket of a worker has ended; the reader itself has failed


@dataclass(eq=False)
class _Worker:
    """A worker as the driver sees it. `pid` is 0 until it has said hello; `gpu` is the accelerator its model is on.

    `makes_ready` is the item that it makes ready beside the one it has, or has made ready.
    """

    connection: Connection
    pid: int = 0
    item: Item | None = None
    makes_ready: ItemKey | None = None
    in_tail: bool = False
    keeps_model: bool = False
    is_spent: bool = False  # not to be used again
    gpu: str | None = None
    contexts: set[str] = field(default_factory=set)
    sending: threading.Lock = field(default_factory=threading.Lock)

    def say(self, kind: bytes, data: bytes = b"") -> None:
        """Send a message; to a worker that has ended nothing, for its end is heard of soon."""
        with self.sending, contextlib.suppress(OSError):
            self.connection.send_bytes(kind + data)


class ProcessPool:
    """`workers` processes (default: one for each CPU of this process); `desk` keeps the allowances of hosts."""

    def __init__(
        self,
        workers: int | None = None,
        device: str = "auto",
        tick: Tick | None = None,
        desk: BookDesk | None = None,
    ) -> None:
        cpus = len(os.sched_getaffinity(0))
        self.device = local_device() if device == "auto" else device
        self._gpus = _visible_gpus() if self.device == "cuda" else []
        self._slots = Slots(workers or cpus, len(self._gpus), self.device == "cuda")
        self._threads = max(1, cpus // self._slots.count)
        self._tick = tick
        self._desk = desk
        self._contexts: dict[str, bytes] = {}
        self._workers: list[_Worker] = []
        self._starts_in_vain = 0
        self._news: queue.SimpleQueue[tuple[_Worker, bytes, bytes]] = queue.SimpleQueue()
        self._nursery = nursery.take()
        self._reader = _Reader(self._news, desk)

    def share(self, name: str, context: Any) -> None:
        """Pack the context; a worker gets it with its first item of that name."""
        self._contexts[name] = packed((name, Shipment.of(context, _dumps), self._threads))

    def has_room(self, item: Item) -> bool:
        """Whether a slot is free for it."""
        busy = [w for w in self._workers if w.item is not None]
        models = [w for w in self._workers if w.keeps_model]
        idle_models = sum(w.item is None for w in models)
        flying = [w.item for w in busy if w.item is not None]
        return self._slots.has_room(item, flying, sum(w.in_tail for w in busy), len(models), idle_models)

    def most(self, item: Item) -> int:
        """As the slots say."""
        return self._slots.most(item)

    def submit(self, item: Item, node: str | None = None) -> None:
        """Start it in an idle worker, best the one that made it ready, else in a new one."""
        worker = self._idle(item) or self._start()
        for other in self._workers:
            if other is not worker and other.makes_ready == item.key:
                other.makes_ready = None
                other.say(LET_GO)
        worker.item, worker.in_tail = item, False
        worker.makes_ready = None if item.then is None else item.then.key
        if item.on_actor and not worker.keeps_model:
            worker.keeps_model = True
            worker.gpu = self._least_used_gpu()
        worker.is_spent = item.kind == "resolve"  # it may have left its model's traces on the device
        if item.context not in worker.contexts:
            worker.contexts.add(item.context)
            worker.say(CONTEXT, self._contexts[item.context])
        worker.say(ITEM, packed((item.context, item, worker.gpu, self._desk is not None)))

    def _idle(self, item: Item) -> _Worker | None:
        idle = [w for w in self._workers if w.item is None and not w.is_spent and w.keeps_model == item.on_actor]
        return min(idle, key=lambda w: (w.makes_ready != item.key, w.makes_ready is not None), default=None)

    def _start(self) -> _Worker:
        if not self._nursery.is_alive:
            self._nursery.close()
            self._nursery = nursery.take()
        mine, theirs = socket.socketpair()
        worker = _Worker(Connection(mine.detach()))
        self._nursery.fork(theirs)
        self._workers.append(worker)
        self._reader.add(worker)
        return worker

    def _least_used_gpu(self) -> str | None:
        if not self._gpus:
            return None
        used = Counter(w.gpu for w in self._workers)
        return min(self._gpus, key=lambda gpu: used[gpu])

    def wait(self) -> Finished | None:
        """The next item that ends; None when a shard has come to its tail, so that there may be room."""
        while True:
            worker, kind, data = self._news.get()
            if kind == HELLO:
                worker.pid, self._starts_in_vain = unpacked(data), 0
            elif kind == ROWS and self._tick is not None:
                self._tick(unpacked(data))
            elif kind == TAIL and worker.item is not None:
                worker.in_tail = True
                return None
            elif kind in (DONE, ERROR):
                return self._ended(worker, kind, data)
            elif kind == _GONE and (finished := self._died(worker)) is not None:
                return finished
            elif kind == _BROKEN:
                raise unpacked(data)

    def _ended(self, worker: _Worker, kind: bytes, data: bytes) -> Finished:
        item, worker.item, worker.in_tail = worker.item, None, False
        assert item is not None
        self._forget(item)
        # Shards in their tail needed more workers than there are slots; the last ones idle are not needed any more.
        idle = [w for w in self._workers if w.item is None]
        if worker.is_spent or len(idle) > self._slots.count:
            self._end([worker])
        value = unpacked(data)
        return Finished(item, error=value) if kind == ERROR else Finished(item, value)

    def _died(self, worker: _Worker) -> Finished | None:
        with worker.sending:
            worker.connection.close()
        if worker not in self._workers:
            return None  # it was told to end
        self._workers.remove(worker)
        if worker.pid:
            how = f"worker process {worker.pid}: {self._nursery.fate(worker.pid)}"
        else:
            how = "a worker process that did not come up"
            self._starts_in_vain += 1
            if self._starts_in_vain >= _STARTS_IN_VAIN:
                raise RetryableError(
                    f"worker processes do not come up ({_STARTS_IN_VAIN} tries); what they said stands above; "
                    "use --runner inline meanwhile"
                )
        if worker.item is None:
            return None
        self._forget(worker.item)
        return Finished(worker.item, died=how)

    def _forget(self, item: Item) -> None:
        """Whatever the item had of hosts' allowances is free."""
        if self._desk is not None and item.kind == "ingest":
            self._desk.forget(item.attempt)

    def recycle(self) -> None:
        """End the idle workers that keep a model; the next pass starts its own."""
        self._end([w for w in self._workers if w.keeps_model and w.item is None])

    def _end(self, workers: list[_Worker]) -> None:
        """Tell idle workers to end; nobody waits for them."""
        for worker in workers:
            self._workers.remove(worker)
            worker.say(STOP)

    def close(self) -> None:
        """Have what is in flight left in order, and end all workers; on a second Ctrl-C they are killed at once."""
        try:
            busy = [w for w in self._workers if w.item is not None]
            for worker in self._workers:
                worker.say(STOP)
            until = time.monotonic() + _STOP_S
            while busy and (left := until - time.monotonic()) > 0:
                try:
                    worker, kind, _ = self._news.get(timeout=left)
                except queue.Empty:
                    break
                if kind == _GONE and worker in busy:
                    busy.remove(worker)
        finally:
            self._workers.clear()
            self._reader.close()
            self._nursery.close()


class _Reader:
    """The thread that reads what workers say: questions about hosts are answered here, the rest becomes news."""

    def __init__(self, news: queue.SimpleQueue[tuple[_Worker, bytes, bytes]], desk: BookDesk | None) -> None:
        self._news, self._desk = news, desk
        self._workers: dict[int, _Worker] = {}
        self._added: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        self._woken, self._wake = os.pipe2(os.O_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._woken, select.POLLIN)
        self._thread = threading.Thread(target=self._read, name="mmdata-workers", daemon=True)
        self._thread.start()

    def add(self, worker: _Worker) -> None:
        """Listen to this one too."""
        self._added.put(worker)
        os.write(self._wake, b"a")

    def close(self) -> None:
        """End the thread, and every worker that is still there with its socket."""
        self._added.put(None)
        os.write(self._wake, b"a")
        self._thread.join()
        os.close(self._woken)
        os.close(self._wake)

    def _read(self) -> None:
        while True:
            for descriptor, _ in self._poll.poll():
                if descriptor != self._woken:
                    self._hear(descriptor)
                    continue
                for _ in os.read(self._woken, 4096):
                    worker = self._added.get()
                    if worker is None:
                        for left in self._workers.values():
                            left.connection.close()
                        return
                    self._workers[worker.connection.fileno()] = worker
                    self._poll.register(worker.connection.fileno(), select.POLLIN)

    def _hear(self, descriptor: int) -> None:
        worker = self._workers[descriptor]
        try:
            data = worker.connection.recv_bytes()
        except (EOFError, OSError):
            self._poll.unregister(descriptor)
            del self._workers[descriptor]
            self._news.put((worker, _GONE, b""))
            return
        if data[:1] != GATE:
            self._news.put((worker, data[:1], data[1:]))
        elif self._desk is not None:
            client, number, messages = unpacked(data[1:])
            try:
                replies = self._desk.answer(client, messages)
            except Exception as error:  # noqa: BLE001  raised by `wait`: in this thread nobody would hear of it
                self._news.put((worker, _BROKEN, packed(error)))
                return
            worker.say(ANSWER, packed((client, number, replies)))


def _visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES names, else the number of every NVIDIA device of this machine."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip()]
    found = [path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*")]
    return sorted(found, key=int)


def _dumps(context: Any) -> bytes:
    """By reference where that will do; what a script or a notebook defines goes by value, which loads Ray for it."""
    with contextlib.suppress(Exception):
        data = packed(context)
        if b"__main__" not in data:
            return data
    try:
        from mmdata.ray_pool import by_value

        dumps: Callable[[Any], bytes] = by_value()
    except ImportError as error:
        raise RecipeError(
            f"a script or a notebook defines it, and ray, which could send it, is missing ({error})"
        ) from None
    return dumps(context)
