"""Where work runs: the two methods a pool must have, what an item of work is, and the pool that is this process."""

from __future__ import annotations

import os
import platform
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol

import pyarrow as pa

from mmdata import next_shard
from mmdata.adopt import adopt_shard
from mmdata.block_lists import BlockFiles
from mmdata.column_files import ColumnFile
from mmdata.fetched_before import EarlierFiles
from mmdata.fetcher import Watch
from mmdata.filters import FilterEngine
from mmdata.img2dataset_backend import fetch_by_img2dataset
from mmdata.ingest import IngestCounts, ingest_shard
from mmdata.ingest_journal import IngestJournal
from mmdata.isolate import DeviceLost, DeviceOutOfMemory, raise_not_opened
from mmdata.open_stages import close_stages
from mmdata.plan import PlannedStep, Resolved
from mmdata.retry_work import RetryContext, retry_rows
from mmdata.sample_layout import members_beside
from mmdata.settings import FetchOptions
from mmdata.shard_layout import lay_out
from mmdata.sources.adopted import AdoptingSource, Part
from mmdata.stage import Stage
from mmdata.store import Store
from mmdata.verdict_work import settle_shard
from mmdata.work import PassContext, ShardFiles, journal_folder, run_pass

if TYPE_CHECKING:
    from mmdata.host_desk import BookDesk
    from mmdata.host_gate import Gate

__all__ = [
    "Finished",
    "IngestContext",
    "InlinePool",
    "Item",
    "ItemKey",
    "MakeGate",
    "Pool",
    "Runner",
    "Tick",
    "Unwatched",
    "local_device",
    "perform",
    "resolve_stage",
]

Kind = Literal["ingest", "pass", "resolve", "verdict"]
Runner = Literal["ray", "processes", "inline"]
Tick = Callable[[int], None]
ItemKey = tuple[str, int]
MakeGate = Callable[[str], "Gate"]  # the client's name, which is the item's attempt → its way to the hosts' allowances


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
    earlier: EarlierFiles | None = None  # what is in other datasets already
    has_captions: bool = False  # the source names a column of captions


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
    then: Item | None = None  # what this worker will most likely get next: nothing but time depends on it

    @property
    def key(self) -> ItemKey:
        """Tells it from the other items of a run."""
        return self.context, self.shard

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

    def most(self, item: Item) -> int:
        """How many such items could be done at once, if there were nothing else to do."""

    def submit(self, item: Item, node: str | None = None) -> None:
        """Start the item, on this node if it is still there; of idle workers, with the one that made it ready."""

    def wait(self) -> Finished | None:
        """The next item that ends; None: none has, but there is room now. Call only with something in flight."""

    def recycle(self) -> None:
        """Forget open models: the pass is over, or a device is in doubt."""

    def close(self) -> None:
        """Stop everything in flight and let go of the workers."""


def _untold(rows: int) -> None:
    """For when nobody counts."""


class Unwatched:
    """A `Watch` for one item at a time: rows go to `tick`, and tails are nobody's business."""

    def __init__(self, tick: Tick = _untold) -> None:
        self.rows = tick

    def tail(self) -> None:
        """Nobody starts anything beside it."""


_engine: FilterEngine | None = None


def perform(
    context: Any,
    item: Item,
    watch: Watch | None = None,
    make_gate: MakeGate | None = None,
    threads: int | None = None,
) -> Any:
    """Do one item in this process.

    `make_gate` leads to the allowances of the run's hosts, None = the item has them all; `threads` decode what is
    fetched where the recipe does not say how many, None = as many as there are CPUs.
    """
    global _engine
    if item.kind != "pass":
        next_shard.let_go()  # another worker has what this one made ready, or will have it
    if item.kind == "ingest" and isinstance(context, RetryContext):
        return _retry(context, item, watch or Unwatched(), make_gate, threads)
    if item.kind == "ingest":
        return _ingest(context, item, watch or Unwatched(), make_gate, threads)
    if item.kind == "resolve":
        return resolve_stage(*context)
    assert isinstance(context, PassContext)
    if _engine is None:
        _engine = FilterEngine()
    if item.kind == "verdict":
        store, steps, folder = context.store, context.steps, context.verdicts
        return settle_shard(store, steps, item.shard, item.rows_file, item.files, folder, item.earlier, _engine)
    then = None if item.then is None else ShardFiles(item.then.shard, item.then.rows_file, item.then.files)
    try:
        return run_pass(context, item.shard, item.rows_file, item.files, _engine, item.proven, item.earlier, then)
    except (DeviceLost, DeviceOutOfMemory):
        close_stages()  # whichever process takes the item next opens them anew
        raise


def _ingest(
    context: IngestContext, item: Item, watch: Watch, make_gate: MakeGate | None, threads: int | None
) -> IngestCounts:
    blocks = context.block.load() if context.block is not None else None
    if item.part is not None:
        assert context.source is not None
        own, extra, rows = context.own or pa.schema([]), context.extra or pa.schema([]), context.fetch.shard_rows
        return adopt_shard(context.store, item.shard, context.source, item.part, own, extra, rows, watch.rows, blocks)
    assert item.rows is not None
    fetch, started = context.fetch, time.time()
    extra = context.extra or pa.schema([])
    if fetch.backend == "img2dataset":
        counts = fetch_by_img2dataset(
            context.store, item.shard, item.rows, fetch, item.attempt, extra, context.has_captions
        )
        watch.rows(counts.rows)
    else:
        journal = IngestJournal(journal_folder(context.dataset_id) / f"ingest-{item.shard:05d}", context.run)
        counts = ingest_shard(
            context.store,
            item.shard,
            item.rows,
            context.source_kind,
            fetch,
            item.attempt,
            make_gate=None if make_gate is None else partial(make_gate, item.attempt),
            threads=threads,
            watch=watch,
            journal=journal,
            blocks=blocks,
            earlier=context.earlier.load() if context.earlier is not None else None,
            beside=members_beside(fetch, extra.names, context.has_captions),
        )
    if fetch.layout != "none":
        lay_out(context.store, item.shard, fetch, context.has_captions, started)
    return counts


def _retry(
    context: RetryContext, item: Item, watch: Watch, make_gate: MakeGate | None, threads: int | None
) -> IngestCounts:
    assert item.rows is not None
    journal = IngestJournal(journal_folder(context.dataset_id) / f"retry-{item.shard:05d}", context.run)
    gates = None if make_gate is None else partial(make_gate, item.attempt)
    return retry_rows(context, item.rows, item.attempt, gates, threads=threads, watch=watch, journal=journal)


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


def _local_gates(desk: BookDesk) -> MakeGate:
    from mmdata.host_gate import LocalGate

    return lambda client: LocalGate(desk, client)


class InlinePool:
    """This process: one item at a time, done when it is waited for."""

    def __init__(self, device: str = "auto", tick: Tick = _untold, desk: BookDesk | None = None) -> None:
        self.device = local_device() if device == "auto" else device
        self._watch = Unwatched(tick)
        self._make_gate = None if desk is None else _local_gates(desk)
        self._contexts: dict[str, Any] = {}
        self._queue: deque[Item] = deque()

    def share(self, name: str, context: Any) -> None:
        """Keep the context."""
        self._contexts[name] = context

    def has_room(self, item: Item) -> bool:
        """One item at a time."""
        return not self._queue

    def most(self, item: Item) -> int:
        """One."""
        return 1

    def submit(self, item: Item, node: str | None = None) -> None:
        """Queue it for `wait`."""
        self._queue.append(item)

    def wait(self) -> Finished:
        """Do the item now; its exception is its error, but Ctrl-C goes through."""
        item = self._queue.popleft()
        try:
            return Finished(item, perform(self._contexts[item.context], item, self._watch, self._make_gate))
        except Exception as error:  # noqa: BLE001  handed to the driver, which raises what is not its to mend
            return Finished(item, error=error)

    def recycle(self) -> None:
        """Close the stages this process has open."""
        next_shard.let_go()
        close_stages()

    def close(self) -> None:
        """Drop what is queued."""
        self._queue.clear()
        self.recycle()
