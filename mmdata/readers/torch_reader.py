"""`Dataset.to_torch`: the kept samples as a PyTorch `IterableDataset`, split by node and by DataLoader worker.

In: a dataset and how to visit it. Out: a dataset for `torch.utils.data.DataLoader` that gives each kept sample exactly
once an epoch over all nodes and workers together, in an order that is a function of seed, epoch and the number of
consumers. It pickles, and opens its files in the process that reads. RecipeError: a column or an argument is wrong.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mmdata.errors import MissingExtra, RecipeError
from mmdata.readers.arrow import medium_of
from mmdata.readers.forked import leave_garbage_to_parents
from mmdata.readers.order import EpochOrder, Uneven, stretch
from mmdata.readers.samples import Decode, OnError, Samples, kept_counts, require_columns

if TYPE_CHECKING:
    from mmdata.dataset import Dataset

__all__ = ["TorchSamples", "torch_samples"]


def torch_samples(
    dataset: Dataset,
    columns: Sequence[str] = (),
    *,
    shuffle: bool = True,
    seed: int = 0,
    epoch: int = 0,
    decode: Decode | None = "pil",
    buffer: int = 8,
    threads: int = 4,
    rank: int | None = None,
    world: int | None = None,
    uneven: Uneven = "keep",
    on_error: OnError = "raise",
    transform: Callable[[dict[str, Any]], Any] | None = None,
) -> Any:
    """See `mmdata.dataset.Dataset.to_torch`, which is this."""
    for name, value, allowed in (
        ("decode", decode, (None, "pil", "tensor", "bytes")),
        ("uneven", uneven, ("keep", "drop", "repeat")),
        ("on_error", on_error, ("raise", "skip")),
    ):
        if value not in allowed:
            raise RecipeError(f"to_torch: {name}={value!r}: expected one of {', '.join(map(repr, allowed))}")
    whole = {"seed": seed, "epoch": epoch, "buffer": buffer, "threads": threads, "rank": rank, "world": world}
    for name, number in whole.items():
        if not isinstance(number, int | None if name in ("rank", "world") else int) or isinstance(number, bool):
            raise RecipeError(f"to_torch: {name}={number!r}: expected a whole number")
    if buffer < 1 or threads < 1 or epoch < 0 or seed < 0:
        raise RecipeError("to_torch: buffer and threads must be at least 1, seed and epoch at least 0")
    if (rank is None) != (world is None) or (rank is not None and world is not None and not 0 <= rank < world):
        raise RecipeError(f"to_torch: rank={rank} and world={world}: give both, with 0 <= rank < world, or neither")
    medium = medium_of(dataset)
    if medium != "image" and decode in ("pil", "tensor"):
        raise RecipeError(f"to_torch: decode={decode!r} is for images, and this is {medium}; ask for decode='bytes'")
    require_columns(dataset, columns)
    columns = tuple(dict.fromkeys(columns))
    make = _as_tensor if decode == "tensor" else _as_pil
    counts = kept_counts(dataset)
    leave_garbage_to_parents()
    # One that never asks DuckDB: closing a connection in a forked worker, whose threads are not there, is a crash.
    quiet = dataset.again()
    samples = Samples(quiet, counts, columns, decode, buffer, threads, on_error, make, transform, medium, os.getpid())
    node = None if rank is None or world is None else (rank, world)
    return _class()(samples, shuffle, seed, epoch, node, uneven)


def _torch() -> Any:
    try:
        import torch.utils.data
    except ImportError:
        raise MissingExtra("to_torch needs torch, not installed here: pip install torch") from None
    return torch


def _as_tensor(picture: npt.NDArray[np.uint8]) -> Any:
    return _torch().from_numpy(np.require(picture, requirements=["C", "W", "O"]))


def _as_pil(picture: npt.NDArray[np.uint8]) -> Any:
    from PIL import Image

    return Image.fromarray(picture)


class TorchSamples:
    """The part of the dataset that knows nothing of torch's classes; the rest is made when torch is there.

    `set_epoch` gives the next epoch its own order, also in workers that live on. `state_dict` of a dataset that is
    being read says how many samples have been given; `load_state_dict` makes the next reading begin after them.
    """

    def __init__(
        self,
        samples: Samples,
        shuffle: bool,
        seed: int,
        epoch: int,
        node: tuple[int, int] | None,
        uneven: Uneven,
    ) -> None:
        self.samples = samples
        self.shuffle, self.seed, self.uneven = shuffle, seed, uneven
        self._node_given = node
        # In shared memory: workers that are kept between epochs hear of the next one.
        self._epoch = _torch().tensor(epoch, dtype=_torch().int64).share_memory_()
        self._skip = 0
        self._given = 0

    def __reduce__(self) -> tuple[Any, ...]:
        """For workers that are started afresh: what torch.distributed says here, they could not ask."""
        state = {**self.__dict__, "_node_given": self.node}
        return _rebuilt, (state,)

    @property
    def epoch(self) -> int:
        """The epoch that the next reading visits."""
        return int(self._epoch.item())

    def set_epoch(self, epoch: int) -> None:
        """Visit this epoch from its beginning."""
        if epoch < 0:
            raise RecipeError(f"set_epoch({epoch}): expected 0 or more")
        self._epoch.fill_(epoch)
        self._skip = 0

    @property
    def node(self) -> tuple[int, int]:
        """(rank, world): as given, else torch.distributed's, else RANK and WORLD_SIZE, else (0, 1)."""
        if self._node_given is not None:
            return self._node_given
        distributed = _torch().distributed
        if distributed.is_available() and distributed.is_initialized():
            return distributed.get_rank(), distributed.get_world_size()
        rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
            raise RecipeError(f"RANK={rank} and WORLD_SIZE={world} in the environment: expected 0 <= rank < world size")
        return int(rank), int(world)

    def __len__(self) -> int:
        """Samples of this node in an epoch, over all its workers."""
        start, stop = stretch(sum(self.samples.counts.values()), *self.node, self.uneven)
        return stop - start

    def _stretch(self, rows: int) -> tuple[int, int]:
        """This consumer's part of the epoch: the node's, and of that the worker's."""
        start, stop = stretch(rows, *self.node, self.uneven)
        worker = _torch().utils.data.get_worker_info()
        if worker is None:
            return start, stop
        first, last = stretch(stop - start, worker.id, worker.num_workers)
        return start + first, start + last

    def __iter__(self) -> Iterator[Any]:
        order = EpochOrder(self.samples.counts, self.shuffle, self.seed, self.epoch)
        start, stop = self._stretch(order.rows)
        skip, self._skip = self._skip, 0
        self._given = skip
        for place, sample in self.samples.read(order, start, stop, skip):
            self._given = place + 1
            yield sample
        self._given = 0

    def _consumer(self) -> list[int]:
        worker = _torch().utils.data.get_worker_info()
        return [*self.node, *((worker.id, worker.num_workers) if worker is not None else (0, 1))]

    def _line(self) -> dict[str, Any]:
        """What the order of an epoch depends on."""
        how = {"seed": self.seed, "shuffle": self.shuffle, "buffer": self.samples.buffer, "uneven": self.uneven}
        return {**how, "rows": sum(self.samples.counts.values())}

    def state_dict(self) -> dict[str, Any]:
        """Where this consumer's reading is: plain numbers."""
        return {"epoch": self.epoch, "given": self._given, "consumer": self._consumer(), "line": self._line()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begin the next reading after what had been given; RecipeError when the line would be another one."""
        if state["consumer"] != self._consumer():
            raise RecipeError(
                f"this state is of consumer {state['consumer']} (rank, world, worker, workers), not of "
                f"{self._consumer()}; resume with the same numbers of nodes and workers"
            )
        if state["line"] != self._line():
            raise RecipeError(
                f"this state is of {state['line']}, not of {self._line()}: the samples or their order are others; "
                "begin the epoch anew"
            )
        self._epoch.fill_(state["epoch"])
        self._skip = self._given = int(state["given"])


@cache
def _class() -> type[Any]:
    """`TorchSamples` as torch's DataLoader wants it."""
    iterable = _torch().utils.data.IterableDataset
    return type("KeptSamples", (TorchSamples, iterable), {"__module__": __name__, "__doc__": TorchSamples.__doc__})


def _rebuilt(state: dict[str, Any]) -> Any:
    kind = _class()
    made = object.__new__(kind)
    made.__dict__.update(state)
    return made
