"""The pool on Ray core: fetching and plain passes are tasks, passes with a model run on actors that keep it open.

Only descriptors travel. Ray retries nothing for us (`max_retries=0`): the driver counts deaths itself, and sends the
item of a dead worker back to the node whose scratch holds its journal. What workers tell of an item, and what hosts
allow, is in one actor beside the driver, so that it is the same for all nodes. The only module that imports ray.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mmdata import next_shard
from mmdata.errors import MissingExtra, RetryableError, StoreError
from mmdata.pool import Finished, Item, ItemKey, perform
from mmdata.settings import FetchOptions
from mmdata.shipment import Shipment
from mmdata.slots import Slots
from mmdata.worker_limits import limit_worker

if TYPE_CHECKING:
    from mmdata.host_desk import BookDesk, Message, Reply
    from mmdata.host_gate import Gate

__all__ = ["RayPool", "by_value"]

_TOLD_EVERY_S = 1.0
_ANSWER_S = 30.0
_LET_GO_S = 10.0  # for an idle worker to let go of what it made ready, before it is killed


class RayPool:
    """Workers of a Ray cluster: the one at `address`, or one started on this machine with `workers` CPUs.

    At most one item is in flight per CPU. Of a pass with a model and fetching still going on, each gets about half.
    """

    def __init__(
        self,
        workers: int | None = None,
        address: str | None = None,
        device: str = "auto",
        tick: Callable[[int], None] | None = None,
        desk: BookDesk | None = None,
    ) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            import ray
        except ImportError:
            raise MissingExtra("ray is not installed: pip install ray, or use --runner inline") from None
        self._ray: Any = ray
        self._owns_cluster = not self._ray.is_initialized()
        if self._owns_cluster:
            self._start(workers, address)
        resources = self._ray.cluster_resources()
        cluster_cpus = int(resources.get("CPU", 1))
        gpus = float(resources.get("GPU", 0))
        self.device = ("cuda" if gpus else "cpu") if device == "auto" else device
        self._slots = Slots(max(1, min(workers or cluster_cpus, cluster_cpus)), gpus, self.device == "cuda")
        self._nodes = [n["NodeID"] for n in self._ray.nodes() if n["Alive"] and n["Resources"].get("CPU")]
        self._turn = itertools.cycle(self._nodes)
        self._contexts: dict[str, Any] = {}
        self._flights: dict[Any, tuple[Item, str | None, Any]] = {}  # reference → item, node, actor
        self._idle: list[tuple[Any, str]] = []
        self._making_ready: dict[Any, ItemKey] = {}  # actor → the item that it makes ready, or has made ready
        self._actors = 0
        self._perform = self._ray.remote(_perform)
        self._actor_class = self._ray.remote(_Actor)
        self._tick = tick
        self._desk = desk
        self._tidings: Any = None
        self._tails: set[str] = set()  # attempts of shards in flight that only wait

    def _start(self, workers: int | None, address: str | None) -> None:
        where = {"address": address} if address else {"num_cpus": workers, "include_dashboard": False}
        # A warning that a cluster started here asks for a token, as it should; nobody need do anything about it.
        logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
        try:
            self._ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=False, **where)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise StoreError(f"Ray did not start ({error}); check --address, or use --runner inline") from error

    def share(self, name: str, context: Any) -> None:
        """Put the context into the object store once, with the files of operators it refers to."""
        self._contexts[name] = self._ray.put(Shipment.of(context, by_value()))

    def has_room(self, item: Item) -> bool:
        """Whether a slot is free for it."""
        flying = [other for other, _, _ in self._flights.values()]
        tails = sum(other.attempt in self._tails for other in flying)
        return self._slots.has_room(item, flying, tails, self._actors, len(self._idle))

    def most(self, item: Item) -> int:
        """As the slots say."""
        return self._slots.most(item)

    def submit(self, item: Item, node: str | None = None) -> None:
        """Start it, on that node if it is still there, best on the actor that made it ready."""
        context = self._contexts[item.context]
        if item.on_actor:
            actor, at = self._take_actor(node, item)
            if item.then is not None:
                self._making_ready[actor] = item.then.key
            self._flights[actor.perform.remote(context, item)] = (item, at, actor)
            return
        at = node or next(self._turn)
        # A device is asked for only to settle what a model needs; nothing else of a task uses one.
        gpus = min(1.0, self._slots.gpus) if item.kind == "resolve" else 0
        strategy = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(at, soft=True)
        # Fetching is counted by `has_room` alone: a shard in its tail holds no CPU, and Ray cannot be told so later.
        cpus = 0 if self._slots.count == 1 or item.kind == "ingest" else 1
        options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": 0}
        if not gpus:
            options["scheduling_strategy"] = strategy
        tidings = self._told() if item.kind == "ingest" else None
        on_node = -(-self._slots.count // len(self._nodes))
        is_gated = self._desk is not None
        reference = self._perform.options(**options).remote(context, item, tidings, is_gated, on_node)
        self._flights[reference] = (item, at, None)

    def _told(self) -> Any:
        """The actor that workers tell and ask, beside the driver; from then on it keeps the book of hosts."""
        if self._tidings is None:
            here = self._ray.get_runtime_context().get_node_id()
            strategy = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(here, soft=True)
            options = {"num_cpus": 0, "scheduling_strategy": strategy}
            self._tidings = self._ray.remote(_Tidings).options(**options).remote(self._desk)
            if self._desk is not None:
                self._desk.lend(_RemoteDesk(self._tidings))
        return self._tidings

    def _take_actor(self, node: str | None, item: Item) -> tuple[Any, str]:
        makers = [actor for actor, ready in self._making_ready.items() if ready == item.key]
        idle = [(actor, at) for actor, at in self._idle if node is None or at == node]
        taken = min(idle, key=lambda a: (a[0] not in makers, a[0] in self._making_ready), default=None)
        for maker in makers:
            del self._making_ready[maker]
            if taken is None or maker is not taken[0]:
                maker.let_go.remote()  # once it is idle
        if taken is None:
            return self._new_actor(node, item.gpu if self.device == "cuda" else 0)
        self._idle.remove(taken)
        self._making_ready.pop(taken[0], None)
        return taken

    def _new_actor(self, node: str | None, gpu: float) -> tuple[Any, str]:
        cpus = 0 if self._slots.count == 1 else 1
        options: dict[str, Any] = {"num_cpus": cpus, "max_restarts": 0, "max_task_retries": 0}
        if gpu:
            options["num_gpus"] = gpu
        if node is not None:
            options["scheduling_strategy"] = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
                node, soft=True
            )
        actor = self._actor_class.options(**options).remote()
        try:
            at = self._ray.get(actor.node.remote())
        except self._ray.exceptions.RayError as error:
            raise RetryableError(f"Ray could not start a worker ({error}); the same command goes on") from error
        self._actors += 1
        return actor, at

    def wait(self) -> Finished | None:
        """The next item that ends; None when a shard has come to its tail, so that there may be room."""
        reference = self._next()
        if reference is None:
            return None
        item, node, actor = self._flights.pop(reference)
        self._tails.discard(item.attempt)
        if self._desk is not None and item.kind == "ingest":
            with contextlib.suppress(OSError):
                self._desk.forget(item.attempt)
        try:
            finished = Finished(item, self._ray.get(reference), node=node)
        except self._ray.exceptions.RayTaskError as error:
            finished = Finished(item, error=error.cause or RetryableError(str(error)), node=node)
        except (
            self._ray.exceptions.WorkerCrashedError,
            self._ray.exceptions.RayActorError,
            self._ray.exceptions.OutOfMemoryError,
            self._ray.exceptions.NodeDiedError,
            self._ray.exceptions.ObjectLostError,
        ) as error:
            if actor is not None:
                self._actors -= 1
                self._making_ready.pop(actor, None)
            return Finished(item, died=type(error).__name__, node=node)
        except self._ray.exceptions.RayError as error:
            finished = Finished(item, error=RetryableError(f"Ray: {error}; the same command goes on"), node=node)
        if actor is not None:
            self._idle.append((actor, node or ""))
        return finished

    def _next(self) -> Any:
        """The next reference that is ready, None when a shard has come to its tail; rows are told as they come."""
        while True:
            ready, _ = self._ray.wait(list(self._flights), num_returns=1, timeout=_TOLD_EVERY_S)
            tails = self._hear() if any(item.kind == "ingest" for item, _, _ in self._flights.values()) else set()
            self._tails |= tails
            if ready:
                return ready[0]
            if tails:
                return None

    def _hear(self) -> set[str]:
        """Count the rows that came since the last call; the shards that came to their tails."""
        try:
            rows, tails = self._ray.get(self._told().take.remote(), timeout=_TOLD_EVERY_S)
        except self._ray.exceptions.RayError:
            return set()  # a lost count is no reason to stop
        if self._tick is not None and rows:
            self._tick(rows)
        flying = {item.attempt for item, _, _ in self._flights.values()}
        return set(tails) & flying

    def recycle(self) -> None:
        """Stop the idle actors; the next pass starts its own."""
        leaving = [actor.let_go.remote() for actor, _ in self._idle if self._making_ready.pop(actor, None)]
        if leaving:
            self._ray.wait(leaving, num_returns=len(leaving), timeout=_LET_GO_S)
        for actor, _ in self._idle:
            self._ray.kill(actor)
            self._actors -= 1
        self._idle.clear()

    def close(self) -> None:
        """Cancel what is in flight; stop the cluster if this pool started it."""
        for reference, (_, _, actor) in self._flights.items():
            if actor is None:
                self._ray.cancel(reference, force=True)
            else:
                self._ray.kill(actor)
        self._flights.clear()
        self.recycle()
        if self._desk is not None:
            self._desk.take_back()
        if self._tidings is not None:
            self._ray.kill(self._tidings)
        if self._owns_cluster:
            self._ray.shutdown()


def by_value() -> Callable[[Any], bytes]:
    """Ray's pickling, which sends by value what a script or a notebook defines."""
    from ray import cloudpickle

    dumps: Callable[[Any], bytes] = cloudpickle.dumps
    return dumps


class _Tidings:
    """An actor: what workers tell between two looks of the driver, and the book of hosts while it is lent."""

    def __init__(self, desk: BookDesk | None) -> None:
        self._desk = desk
        self._rows = 0
        self._tails: list[str] = []

    def add(self, rows: int) -> None:
        """So many more rows are fetched."""
        self._rows += rows

    def tail(self, attempt: str) -> None:
        """This shard only waits."""
        self._tails.append(attempt)

    def take(self) -> tuple[int, list[str]]:
        """Rows and tails since the last call."""
        told = self._rows, self._tails
        self._rows, self._tails = 0, []
        return told

    def ask(self, method: str, *arguments: Any) -> Any:
        """A method of the desk."""
        return getattr(self._desk, method)(*arguments)


class _RemoteDesk:
    """A desk in the actor `tidings`, from anywhere in the cluster; ConnectionError when it is gone or silent."""

    def __init__(self, tidings: Any) -> None:
        self._tidings = tidings

    def answer(self, client: str, messages: Sequence[Message]) -> list[Reply]:
        """As BookDesk's."""
        replies: list[Reply] = self._ask("answer", client, messages)
        return replies

    def forget(self, client: str) -> None:
        """As BookDesk's."""
        self._ask("forget", client)

    def changed(self) -> dict[str, Any] | None:
        """As BookDesk's."""
        saved: dict[str, Any] | None = self._ask("changed")
        return saved

    def _ask(self, *question: Any) -> Any:
        import ray

        try:
            return ray.get(self._tidings.ask.remote(*question), timeout=_ANSWER_S)
        except ray.exceptions.RayError as error:
            raise ConnectionError(f"Ray: {error}") from error


def _perform(shipment: Shipment, item: Item, tidings: Any, is_gated: bool, slots: int) -> Any:
    """Do one item as a task; this node has so many `slots`."""
    limit_worker()
    context = shipment.open()
    if tidings is None:
        return perform(context, item)
    threads = max(1, len(os.sched_getaffinity(0)) // slots)
    make_gate = _gates(tidings, context.fetch) if is_gated else None
    return perform(context, item, _Told(tidings, item.attempt), make_gate, threads)


def _gates(tidings: Any, fetch: FetchOptions) -> Callable[[str], Gate]:
    from mmdata.host_desk import rules_of
    from mmdata.host_gate import LinkedGate

    desk, rules = _RemoteDesk(tidings), rules_of(fetch)

    def gate(client: str) -> Gate:
        def exchange(messages: list[Message]) -> list[Reply]:
            try:
                return desk.answer(client, messages)
            except ConnectionError as error:
                raise RetryableError(
                    f"what hosts allow is not known any more ({error}); the same command goes on"
                ) from error

        return LinkedGate(exchange, rules)

    return gate


class _Told:
    """A `Watch` that tells the actor; rows at most once a second."""

    def __init__(self, tidings: Any, attempt: str) -> None:
        self._tidings, self._attempt = tidings, attempt
        self._held, self._at = 0, time.monotonic()
        self._in_tail = False

    def rows(self, count: int) -> None:
        self._held += count
        if time.monotonic() - self._at >= _TOLD_EVERY_S:
            self._tidings.add.remote(self._held)
            self._held, self._at = 0, time.monotonic()

    def tail(self) -> None:
        if not self._in_tail:
            self._in_tail = True
            self._tidings.tail.remote(self._attempt)


class _Actor:
    """A worker process that keeps its stages open between items."""

    def node(self) -> str:
        """The node it runs on."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def perform(self, shipment: Shipment, item: Item) -> Any:
        """Do one item."""
        return perform(shipment.open(), item)

    def let_go(self) -> None:
        """Another actor has the shard that was made ready here."""
        next_shard.let_go()
