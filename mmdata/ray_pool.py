"""The pool on Ray core: fetching and plain passes are tasks, passes with a model run on actors that keep it open.

Only descriptors travel. Ray retries nothing for us (`max_retries=0`): the driver counts deaths itself, and sends the
item of a dead worker back to the node whose scratch holds its journal. The only module that imports ray.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import time
from collections.abc import Callable
from typing import Any

from mmdata.errors import MissingExtra, RetryableError, StoreError
from mmdata.pool import Finished, Item, Unwatched, perform
from mmdata.shipment import Shipment

__all__ = ["RayPool", "by_value"]

_TOLD_EVERY_S = 1.0


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
        self.slots = max(1, min(workers or cluster_cpus, cluster_cpus))
        self.gpus = float(resources.get("GPU", 0))
        self.device = ("cuda" if self.gpus else "cpu") if device == "auto" else device
        self._nodes = [n["NodeID"] for n in self._ray.nodes() if n["Alive"] and n["Resources"].get("CPU")]
        self._turn = itertools.cycle(self._nodes)
        self._contexts: dict[str, Any] = {}
        self._flights: dict[Any, tuple[Item, str | None, Any]] = {}  # reference → item, node, actor
        self._idle: list[tuple[Any, str]] = []
        self._actors = 0
        self._perform = self._ray.remote(_perform)
        self._actor_class = self._ray.remote(_Actor)
        self._tick = tick
        self._ticker: Any = None

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

    def _fetching(self) -> int:
        return sum(item.kind == "ingest" for item, _, _ in self._flights.values())

    def has_room(self, item: Item) -> bool:
        """Whether a CPU is free for it; fetching never takes the last half from a model, nor a model from fetching."""
        if len(self._flights) >= self.slots:
            return False
        if item.kind == "ingest" and self._actors:
            return self._fetching() < max(1, self.slots - self._actors)
        if item.on_actor and not self._idle:
            if self.device == "cuda" and item.gpu and (self._actors + 1) * item.gpu > self.gpus:
                return False
            return self._actors == 0 or self._actors + self._fetching() < self.slots
        return True

    def submit(self, item: Item, node: str | None = None) -> None:
        """Start it, on that node if it is still there."""
        context = self._contexts[item.context]
        if item.on_actor:
            actor, at = self._take_actor(node, item.gpu if self.device == "cuda" else 0)
            self._flights[actor.perform.remote(context, item)] = (item, at, actor)
            return
        at = node or next(self._turn)
        # A device is asked for only to settle what a model needs; nothing else of a task uses one.
        gpus = min(1.0, self.gpus) if item.kind == "resolve" else 0
        strategy = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(at, soft=True)
        options: dict[str, Any] = {"num_cpus": 0 if self.slots == 1 else 1, "num_gpus": gpus, "max_retries": 0}
        if not gpus:
            options["scheduling_strategy"] = strategy
        watched = item.kind == "ingest" and self._tick is not None
        if watched and self._ticker is None:
            self._ticker = self._ray.remote(_Ticker).options(num_cpus=0).remote()
        reference = self._perform.options(**options).remote(context, item, self._ticker if watched else None)
        self._flights[reference] = (item, at, None)

    def _take_actor(self, node: str | None, gpu: float) -> tuple[Any, str]:
        for index, (_, at) in enumerate(self._idle):
            if node is None or at == node:
                return self._idle.pop(index)
        options: dict[str, Any] = {"num_cpus": 0 if self.slots == 1 else 1, "max_restarts": 0, "max_task_retries": 0}
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

    def wait(self) -> Finished:
        """The next item that ends."""
        reference = self._next()
        item, node, actor = self._flights.pop(reference)
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
            return Finished(item, died=type(error).__name__, node=node)
        except self._ray.exceptions.RayError as error:
            finished = Finished(item, error=RetryableError(f"Ray: {error}; the same command goes on"), node=node)
        if actor is not None:
            self._idle.append((actor, node or ""))
        return finished

    def _next(self) -> Any:
        """The next reference that is ready; rows fetched meanwhile are told as they come."""
        while True:
            ready, _ = self._ray.wait(list(self._flights), num_returns=1, timeout=_TOLD_EVERY_S)
            if self._ticker is not None and self._tick is not None and self._fetching():
                with contextlib.suppress(self._ray.exceptions.RayError):  # a lost count is no reason to stop
                    self._tick(self._ray.get(self._ticker.take.remote(), timeout=_TOLD_EVERY_S))
            if ready:
                return ready[0]

    def recycle(self) -> None:
        """Stop the idle actors; the next pass starts its own."""
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
        if self._owns_cluster:
            self._ray.shutdown()


def by_value() -> Callable[[Any], bytes]:
    """Ray's pickling, which sends by value what a script or a notebook defines."""
    from ray import cloudpickle

    dumps: Callable[[Any], bytes] = cloudpickle.dumps
    return dumps


class _Ticker:
    """Counts fetched rows between two looks of the driver."""

    def __init__(self) -> None:
        self._rows = 0

    def add(self, rows: int) -> None:
        """So many more."""
        self._rows += rows

    def take(self) -> int:
        """What came since the last call."""
        rows, self._rows = self._rows, 0
        return rows


def _perform(shipment: Shipment, item: Item, ticker: Any) -> Any:
    """Do one item as a task; fetched rows are told at most once a second."""
    context = shipment.open()
    if ticker is None:
        return perform(context, item)
    held, told = 0, time.monotonic()

    def tick(rows: int) -> None:
        nonlocal held, told
        held += rows
        if time.monotonic() - told >= _TOLD_EVERY_S:
            ticker.add.remote(held)
            held, told = 0, time.monotonic()

    return perform(context, item, Unwatched(tick))


class _Actor:
    """A worker process that keeps its stages open between items."""

    def node(self) -> str:
        """The node it runs on."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def perform(self, shipment: Shipment, item: Item) -> Any:
        """Do one item."""
        return perform(shipment.open(), item)
