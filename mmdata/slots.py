"""How many items may be in flight at once: one rule for every pool of workers.

In: the items in flight, which of them are in their tail, and how many workers keep a model. Out: whether one more may
start. A slot is one CPU's worth of work. A shard in its tail only waits for slow hosts, so that it takes no slot, up to
two of them for each slot there is: more would only add memory.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from mmdata.pool import Item

__all__ = ["TAILS_PER_SLOT", "Slots"]

TAILS_PER_SLOT = 2


@dataclass(frozen=True)
class Slots:
    """`count` CPUs and `gpus` accelerators, used by models where `on_gpu`."""

    count: int
    gpus: float = 0.0
    on_gpu: bool = False

    def most(self, item: Item) -> int:
        """How many such items may be in flight where there is nothing else."""
        on_gpu = item.on_actor and self.on_gpu and item.gpu
        return min(self.count, max(1, int(self.gpus / item.gpu))) if on_gpu else self.count

    def has_room(self, item: Item, flying: Collection[Item], tails: int, models: int, idle_models: int) -> bool:
        """Whether the item may start beside those `flying`, `tails` of which are shards in their tail.

        `models` workers keep a model, `idle_models` of them are idle. Fetching never takes the last half from models,
        nor models from fetching.
        """
        waiting = min(tails, TAILS_PER_SLOT * self.count)
        if len(flying) - waiting >= self.count:
            return False
        fetching = sum(other.kind == "ingest" for other in flying) - waiting
        if item.kind == "ingest" and models:
            return fetching < max(1, self.count - models)
        if item.on_actor and not idle_models:
            if self.on_gpu and item.gpu and (models + 1) * item.gpu > self.gpus:
                return False
            return models == 0 or models + fetching < self.count
        return True
