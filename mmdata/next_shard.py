"""The shard that a worker will most likely get next is made ready while the last chunk of the one at hand is computed.

In: what the driver thinks comes next, a hint that need not come true. Out: that shard's job, with its view open, its
filters walked, and the first pictures of its first chunk made or being made, by the same threads and after those of
the shard at hand. It is kept until the worker gets an item: if it is this very one, in the same state, the job goes on
where it is; if it is any other, or none comes, it is let go of: its threads stop, its journal ends, its media closes.

What is in memory stays two chunks: the last one of the shard at hand, and the first one of the next. What goes wrong
while it is made ready harms nobody: the shard is then made ready in its turn, and it is there that it fails. A picture
that takes the worker with it stands in the journal `…-next.json` of its own shard. Nothing is decoded ahead for a shard
whose journals tell of a death, nor by an item that is repeated after one: so such a picture costs the shard at hand one
death at most, and none of its rows, which were not alone.
"""

from __future__ import annotations

import os
import threading

from mmdata.decode_ahead import DecodeAhead
from mmdata.filters import FilterEngine
from mmdata.shard_job import PassContext, ShardFiles, ShardJob

__all__ = ["let_go", "prepare", "taken"]


class _NextShard:
    """A shard being made ready on a thread of its own, with a filter engine of its own."""

    def __init__(self, context: PassContext, shard: ShardFiles, ahead: DecodeAhead) -> None:
        self.context, self.shard = context, shard
        self._ahead: DecodeAhead | None = ahead
        self._job: ShardJob | None = None
        ahead.is_last = False
        self._thread = threading.Thread(target=self._make, name="mmdata-next-shard", daemon=True)
        self._thread.start()

    def _make(self) -> None:
        ahead, self._ahead = self._ahead, None
        assert ahead is not None
        try:
            self._job = ShardJob(self.context, self.shard, FilterEngine())
            self._job.look_ahead(ahead)
        except Exception:  # noqa: BLE001  raised anew, as the shard's own, when its turn has come
            if self._job is not None:
                self._job.let_go()
            self._job = None

    def job(self) -> ShardJob | None:
        """The job, once it is ready; None where it could not be made ready."""
        self._thread.join()
        job, self._job = self._job, None
        return job

    def let_go(self) -> None:
        """Let go of everything it holds; to be called again where it was interrupted."""
        self._thread.join()
        if self._job is not None:
            self._job.let_go()


_kept: dict[int, _NextShard] = {}  # pid → at most one: a forked process has none


def prepare(context: PassContext, shard: ShardFiles, ahead: DecodeAhead) -> None:
    """Begin to make this shard ready, beside the one whose last pictures `ahead` makes."""
    let_go()
    _kept[os.getpid()] = _NextShard(context, shard, ahead)


def taken(context: PassContext, shard: ShardFiles) -> ShardJob | None:
    """The shard's job, if it was made ready as it is now; whatever else was, is let go of."""
    kept = _kept.get(os.getpid())
    if kept is None:
        return None
    job = kept.job() if kept.shard == shard and _is_same(kept.context, context) else None
    let_go()
    return job


def _is_same(one: PassContext, other: PassContext) -> bool:
    """Whether two contexts are of one pass of one run; a worker may get a copy of it with every item."""
    if one is other:
        return True
    of_one, of_other = ((c.run, c.dataset_id, c.begin, c.verdicts, c.sets) for c in (one, other))
    return one.run != "" and of_one == of_other


def let_go() -> None:
    """Let go of the shard that this process has made ready, if there is one: its turn does not come here."""
    kept = _kept.get(os.getpid())
    if kept is not None:
        kept.let_go()
        del _kept[os.getpid()]
