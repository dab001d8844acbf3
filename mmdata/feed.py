"""Keeps a pool full: items in, what became of them out, deaths and lost devices dealt with in between.

The pool is started when the first item needs it, so that a run with nothing to do starts none. Raises RecipeError when
no worker has what an item needs, StoreError when the lease is lost, and what a repeat does not mend.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mmdata.errors import RecipeError, RetryableError
from mmdata.lease import Lease
from mmdata.pool import Finished, InlinePool, Item, Pool, Runner, Tick
from mmdata.progress import FetchLine
from mmdata.repeats import Repeats
from mmdata.resolve import needs_machine, require_device
from mmdata.work import PassContext

if TYPE_CHECKING:
    from mmdata.host_desk import BookDesk

__all__ = ["Feed"]


class Feed:
    """The pool of one run. `contexts` is what items name; a context is shared with the workers when first needed.

    `lease` is looked at after every item. `allow_mixed` lets two device classes compute a set. `desk` keeps what hosts
    allow, from the first item on; None = every worker keeps that for itself.
    """

    lease: Lease
    desk: BookDesk | None = None

    def __init__(
        self,
        runner: Runner,
        workers: int | None,
        address: str | None,
        device: str,
        repeats: Repeats,
        line: FetchLine,
    ) -> None:
        self.contexts: dict[str, Any] = {}
        self.allow_mixed = False
        self._settings = (runner, workers, address, device)
        self._repeats, self._line = repeats, line
        self._pool: Pool | None = None
        self._shared: set[str] = set()

    @property
    def pool(self) -> Pool:
        """The workers, started now if they were not."""
        if self._pool is None:
            self._pool = _make_pool(*self._settings, self._line.tell, self.desk)
        return self._pool

    @property
    def is_open(self) -> bool:
        """Whether the pool was started."""
        return self._pool is not None

    def recycle(self) -> None:
        """Forget open models: a pass is over."""
        if self._pool is not None:
            self._pool.recycle()

    def close(self) -> None:
        """Stop everything in flight and let go of the workers."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def drive(self, fetched: Iterator[Item], ready: deque[Item]) -> Iterator[Finished]:
        """Keep the pool full and yield what ended well; the caller may add to `ready` meanwhile.

        One shard is always being fetched while there is one to fetch, then passes come first.
        """
        upcoming = next(fetched, None)
        flying: Counter[str] = Counter()
        while True:
            while upcoming is not None and (not ready or not flying["ingest"]) and self._start(upcoming):
                flying["ingest"] += 1
                upcoming = next(fetched, None)
            while ready and self._start(ready[0]):
                flying[ready.popleft().kind] += 1
            if not flying.total():
                if ready or upcoming:
                    raise RecipeError("no worker has what this pass needs; look at --device, --workers and the cluster")
                return
            finished = self.pool.wait()
            self.lease.require()
            if finished is None:
                continue  # a shard only waits for slow hosts now: another may start beside it
            repeat = self._repeats.again(finished)
            if repeat is not None:
                if isinstance(finished.error, RetryableError):
                    self.pool.recycle()  # the worker lives, and its device is in doubt
                self.pool.submit(repeat, finished.node)
                continue
            flying[finished.item.kind] -= 1
            yield finished

    def _start(self, item: Item) -> bool:
        if not self.pool.has_room(item):
            return False
        if item.context not in self._shared:
            context = self.contexts[item.context]
            self.pool.share(item.context, self._on_device(context) if item.kind == "pass" else context)
            self._shared.add(item.context)
        self.pool.submit(item)
        return True

    def _on_device(self, context: PassContext) -> PassContext:
        """The pass with every model on the device class there is; refused where that mixes classes in one set."""
        steps = []
        for bound in context.steps:
            if bound.step.kind == "stage" and bound.step.position > context.begin and needs_machine(bound.step):
                require_device(bound.step, bound.resolved, self.pool.device, self.allow_mixed)
                bound = replace(bound, resolved=replace(bound.resolved, device=self.pool.device))
            steps.append(bound)
        return replace(context, steps=tuple(steps))


def _make_pool(
    runner: Runner, workers: int | None, address: str | None, device: str, tick: Tick, desk: BookDesk | None
) -> Pool:
    if runner == "inline":
        return InlinePool(device, tick, desk)
    if runner == "processes":
        from mmdata.process_pool import ProcessPool

        return ProcessPool(workers, device, tick, desk)
    from mmdata.ray_pool import RayPool

    return RayPool(workers, address, device, tick, desk)
