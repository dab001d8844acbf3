"""Where work runs: the two methods a pool must have, what an item of work is, and the pool that is this process."""

from __future__ import annotations

import os
import platform
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import pyarrow as pa

from mmdata.adopt import adopt_shard
from mmdata.block_lists import BlockFiles
from mmdata.column_files import ColumnFile
from mmdata.filters import FilterEngine
from mmdata.ingest import ingest_shard
from mmdata.ingest_journal import IngestJournal
from mmdata.isolate import DeviceLost, DeviceOutOfMemory, raise_not_opened
from mmdata.plan import PlannedStep, Resolved
from mmdata.settings import FetchOptions
from mmdata.sources.adopted import AdoptingSource, Part
from mmdata.stage import Stage
from mmdata.store import Store
from mmdata.verdict_work import settle_shard
from mmdata.work import PassContext, close_stages, journal_folder, run_pass

__all__ = [
    "Finished",
    "IngestContext",
    "InlinePool",
    "Item",
    "Pool",
    "Tick",
    "local_device",
    "perform",
    "resolve_stage",
]

Kind = Literal["ingest", "pass", "resolve", "verdict"]
Tick = Callable[[int], None]


@dataclass(frozen=True)
class IngestContext:
    """What every shard of one source shares."""

    store: Store
    dataset_id: str
    source_kind: str
    fetch: FetchOptions
    run: str = ""  # as in PassContext
    source: AdoptingSource | None = None  # None = a list of URLs, whose rows come with the item
    own: pa.Schema | None = None  # the source's extra columns
    extra: pa.Schema | None = None  # the dataset's
    block: BlockFiles | None = None  # what must not get in


@dataclass(frozen=True)
class Item:
    """One unit of work; `context` names what `Pool.share` was given. Descriptors only, never media."""

    kind: Kind
    context: str
    shard: int = 0
    rows: pa.Table | None = None  # ingest: the shard's part of the list
    part: Part | None = None  # ingest of an adopting source: the files that are this shard
    attempt: str = ""
    rows_file: str = ""
    files: Mapping[str, ColumnFile] = field(default_factory=dict)
    on_actor: bool = False  # the pass keeps a model open
    gpu: float = 0.0  # share of an accelerator its worker holds, where there is one
    proven: frozenset[str] = frozenset()  # sets of which some row has succeeded in another item
    earlier: str = ""  # the shard's verdict file of an earlier run of the same chain

    @property
    def name(self) -> str:
        """For messages and for counting deaths."""
        return f"{self.kind} of shard {self.shard}"


@dataclass
class Finished:
    """An item that came to its end: a result, an error it raised, or `died` with the worker it was alone on."""

    item: Item
    result: Any = None
    error: BaseException | None = None
    died: str | None = None
    node: str | None = None


class Pool(Protocol):
    """Workers that take items. A driver submits while `has_room`, then waits."""

    device: str  # `cpu` or `cuda`: what model stages may use

    def share(self, name: str, context: Any) -> None:
        """Make a context known to all workers under this name."""

    def has_room(self, item: Item) -> bool:
        """Whether the item could start now."""

    def submit(self, item: Item, node: str | None = None) -> None:
        """Start the item, on this node if it is still there."""

    def wait(self) -> Finished:
        """The next item that ends; call only with something in flight."""

    def recycle(self) -> None:
        """Forget open models: the pass is over, or a device is in doubt."""

    def close(self) -> None:
        """Stop everything in flight and let go of the workers."""


def _untold(rows: int) -> None:
    """For when nobody watches."""


_engine: FilterEngine | None = None


def perform(context: Any, item: Item, tick: Tick = _untold) -> Any:
    """Do one item in this process; `tick` is told how many more rows are fetched."""
    global _engine
    if item.kind == "ingest":
        assert isinstance(context, IngestContext)
        blocks = context.block.load() if context.block is not None else None
        if item.part is not None:
            assert context.source is not None
            own, extra, rows = context.own or pa.schema([]), context.extra or pa.schema([]), context.fetch.shard_rows
            return adopt_shard(context.store, item.shard, context.source, item.part, own, extra, rows, tick, blocks)
        assert item.rows is not None
        journal = IngestJournal(journal_folder(context.dataset_id) / f"ingest-{item.shard:05d}", context.run)
        kind, fetch = context.source_kind, context.fetch
        return ingest_shard(context.store, item.shard, item.rows, kind, fetch, item.attempt, tick, journal, blocks)
    if item.kind == "resolve":
        return resolve_stage(*context)
    assert isinstance(context, PassContext)
    if _engine is None:
        _engine = FilterEngine()
    if item.kind == "verdict":
        store, steps, folder = context.store, context.steps, context.verdicts
        return settle_shard(store, steps, item.shard, item.rows_file, item.files, folder, item.earlier, _engine)
    try:
        return run_pass(context, item.shard, item.rows_file, item.files, _engine, item.proven, item.earlier)
    except (DeviceLost, DeviceOutOfMemory):
        close_stages()  # whichever process takes the item next opens them anew
        raise


def resolve_stage(step: PlannedStep, device: str) -> Resolved:
    """Settle weights, batch shape and precision of a stage on this machine.

    On an accelerator the stage is opened, which runs one full batch; where that is out of memory the shape is halved.
    """
    operator, contract = step.operator, step.contract
    assert operator is not None
    assert issubclass(operator, Stage)
    assert contract is not None
    weights = operator.resolve_weights(step.options)
    shape = contract.batch_shape
    while device != "cpu" and shape is not None:
        stage = operator(step.options)
        stage.batch_shape, stage.precision = shape, contract.precision
        try:
            stage.open(device)
            break
        except Exception as error:  # noqa: BLE001  raised again, as whose it is
            if "OutOfMemoryError" not in {c.__name__ for c in type(error).__mro__} or shape == 1:
                raise_not_opened(step.name, error)
            shape //= 2
        finally:
            stage.close()
    return Resolved(shape, contract.precision, device if shape is not None else "cpu", weights)


def local_device() -> str:
    """`cuda` where this machine shows an NVIDIA device to this process; asks no model package."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    return "cuda" if platform.system() == "Linux" and os.path.exists("/dev/nvidia0") and not hidden else "cpu"


class InlinePool:
    """This process: one item at a time, done when it is waited for."""

    def __init__(self, device: str = "auto", tick: Tick = _untold) -> None:
        self.device = local_device() if device == "auto" else device
        self._tick = tick
        self._contexts: dict[str, Any] = {}
        self._queue: deque[Item] = deque()

    def share(self, name: str, context: Any) -> None:
        """Keep the context."""
        self._contexts[name] = context

    def has_room(self, item: Item) -> bool:
        """One item at a time."""
        return not self._queue

    def submit(self, item: Item, node: str | None = None) -> None:
        """Queue it for `wait`."""
        self._queue.append(item)

    def wait(self) -> Finished:
        """Do the item now; its exception is its error, but Ctrl-C goes through."""
        item = self._queue.popleft()
        try:
            return Finished(item, perform(self._contexts[item.context], item, self._tick))
        except Exception as error:  # noqa: BLE001  handed to the driver, which raises what is not its to mend
            return Finished(item, error=error)

    def recycle(self) -> None:
        """Close the stages this process has open."""
        close_stages()

    def close(self) -> None:
        """Drop what is queued."""
        self._queue.clear()
        close_stages()
