"""Keeps a pool full: items in, what became of them out, deaths and lost devices dealt with in between.

Where threads decode beside a model, an item names another one as what its worker will most likely get next
(`Item.then`). That one is kept for the worker until it is idle, or until nothing else is left for another that is.

The pool is started when the first item needs it, so that a run with nothing to do starts none. Raises RecipeError when
no worker has what an item needs, StoreError when the lease is lost, and what a repeat does not mend.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from mmdata.decode_ahead import decode_threads
from mmdata.errors import RecipeError, RetryableError
from mmdata.lease import Lease
from mmdata.pool import Finished, InlinePool, Item, ItemKey, Pool, Runner, Tick
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
        self._ahead: set[str] = set()  # contexts whose workers decode beside a model

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
        kept = _Kept()
        while True:
            while upcoming is not None and (not ready or not flying["ingest"]) and self._start(upcoming):
                flying["ingest"] += 1
                upcoming = next(fetched, None)
            while ready and (started := self._start_one(ready, kept, flying)) is not None:
                flying[started.kind] += 1
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
                kept.release(finished.item)
                if isinstance(finished.error, RetryableError):
                    self.pool.recycle()  # the worker lives, and its device is in doubt
                # After a death nothing is done ahead beside it, so that what killed the worker kills no other for it.
                self.pool.submit(replace(repeat, then=None), finished.node)
                continue
            kept.ended(finished.item)
            flying[finished.item.kind] -= 1
            yield finished

    def _start_one(self, ready: deque[Item], kept: _Kept, flying: Counter[str]) -> Item | None:
        index = kept.choose(ready)
        item = ready[index]
        others = self.pool.most(item) - flying[item.kind] - 1  # for which there is room at once
        if not self._start(item, lambda: kept.follow(item, ready, others)):
            return None
        kept.take(item)
        del ready[index]
        return item

    def _start(self, item: Item, follow: Callable[[], Item | None] = lambda: None) -> bool:
        if not self.pool.has_room(item):
            return False
        if item.context not in self._shared:
            context = self.contexts[item.context]
            if item.kind == "pass":
                context = self._on_device(context)
                # Workers that keep no model may be given anything next, so that there it would mostly be in vain.
                stays = item.on_actor or self._settings[0] == "inline"
                if stays and decode_threads(context.steps[context.begin :], context.threads):
                    self._ahead.add(item.context)
            self.pool.share(item.context, context)
            self._shared.add(item.context)
        self.pool.submit(replace(item, then=follow()) if item.context in self._ahead else item)
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


class _Kept:
    """Which items are kept for the workers that make them ready."""

    def __init__(self) -> None:
        self._for: dict[ItemKey, ItemKey] = {}  # item in flight → what is kept for its worker
        self._due: list[ItemKey] = []  # items whose workers are idle

    def choose(self, ready: deque[Item]) -> int:
        """The index of the item to start next: one whose worker waits for it, else the first that is for anyone.

        Where all are kept, it is the one whose worker was given its item last, and is the busiest.
        """
        if self._due:
            return next(i for i, item in enumerate(ready) if item.key in self._due)
        kept = list(self._for.values())
        free = next((i for i, item in enumerate(ready) if item.key not in kept), None)
        return free if free is not None else next(i for i, item in enumerate(ready) if item.key == kept[-1])

    def follow(self, item: Item, ready: deque[Item], others: int) -> Item | None:
        """Keep something for the worker that gets the item, but nothing that one of `others` can take at once."""
        kept = {item.key, *self._for.values(), *self._due}
        free = (other for other in ready if other.context == item.context and other.key not in kept)
        following = next(islice(free, max(0, others), None), None)
        if following is not None:
            self._for[item.key] = following.key
        return following

    def take(self, item: Item) -> None:
        """The item is given to a worker, whichever."""
        self._for = {key: kept for key, kept in self._for.items() if kept != item.key}
        self._due = [key for key in self._due if key != item.key]

    def release(self, item: Item) -> None:
        """The item did not come to its end: nothing is kept for its worker."""
        self._for.pop(item.key, None)

    def ended(self, item: Item) -> None:
        """The worker that has computed it is idle."""
        following = self._for.pop(item.key, None)
        if following is not None:
            self._due.append(following)


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
