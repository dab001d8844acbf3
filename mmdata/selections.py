"""`current.json`: what readers see. One selection for every recipe that was run over the dataset, by the recipe's name.

    {"format": 1, "latest": "pets", "selections": {"pets": {chain, run, finished, recipe, steps, counts, …, "files"}}}

A selection names its files, one of every kind for every shard, in a Parquet file of `state/` that is written once:
`shard`, `row_count`, `key_min`, `key_max`, then for the rows, the verdicts and each column set a file's name, its size
(`…:bytes`) and its stamp (`…:stamp`). So another recipe, a longer list or a new generation of rows never changes what a
selection answers. What a run proved of these files holds while their sizes and stamps do. StoreError when a file is
torn.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import pyarrow as pa

from mmdata.column_files import write_parquet
from mmdata.columns import FORMAT_VERSION
from mmdata.errors import RecipeError, StoreError, nearest
from mmdata.store import Store

__all__ = [
    "Current",
    "CurrentStep",
    "Listed",
    "files_table",
    "forget",
    "load_selections",
    "publish",
    "selection_names",
    "utc_now",
]

_FILE = "current.json"


@dataclass(frozen=True)
class CurrentStep:
    """A step as readers need it: where its values are and what they are called."""

    position: int
    name: str
    kind: str
    set_name: str = ""
    outputs: tuple[tuple[str, str], ...] = ()  # (own, visible)
    reason_column: str = ""
    sql: str = ""
    aside: tuple[tuple[str, str], ...] = ()  # embeddings as (own, visible): not in `samples`, read where they are named


@dataclass(frozen=True)
class Listed:
    """The files of one kind (`rows`, `verdicts` or a set) in the order of the shards; sizes in bytes."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    stamps: tuple[int, ...]


@dataclass(frozen=True)
class Current:
    """One selection: the chain of the last finished run of a recipe, and the one file of every shard for everything.

    `counts` is (verdict, position, reason, rows) for every combination there is. `finished` is UTC. `unsettled` rows
    went on without a value for a transient reason. The file lists are read when first asked for.
    """

    name: str
    chain: str
    run: str
    recipe: str
    steps: tuple[CurrentStep, ...]
    counts: tuple[tuple[str, int | None, str | None, int], ...]
    files: str  # the Parquet file that lists the files of every shard
    finished: str = ""
    unsettled: int = 0
    log_keys: tuple[str, ...] = ()  # what the coverage log is asked for when the recipe runs again
    store: Store | None = field(default=None, repr=False, compare=False)

    @property
    def transient(self) -> int:
        """Rows that failed for a transient reason."""
        return sum(n for _, _, reason, n in self.counts if reason is not None and reason.startswith("!"))

    @property
    def rows_in(self) -> int:
        """Rows of all verdicts together."""
        return sum(n for *_, n in self.counts)

    @property
    def kept(self) -> int:
        """Rows with the verdict kept."""
        return sum(n for verdict, *_, n in self.counts if verdict == "kept")

    @cached_property
    def table(self) -> pa.Table:
        """The list of files, a row a shard; StoreError when it is gone or torn."""
        assert self.store is not None
        return self.store.read_table(self.files)

    @cached_property
    def shards(self) -> tuple[int, ...]:
        """Shard numbers, ascending; the other lists are in this order."""
        return tuple(self.table["shard"].to_pylist())

    @cached_property
    def row_counts(self) -> tuple[int, ...]:
        """Rows of every shard."""
        return tuple(self.table["row_count"].to_pylist())

    def listed(self, what: str) -> Listed:
        """The files of `rows`, `verdicts` or a set."""
        columns = (self.table[name].to_pylist() for name in (what, f"{what}:bytes", f"{what}:stamp"))
        return Listed(*map(tuple, columns))

    @cached_property
    def rows(self) -> tuple[str, ...]:
        """The base rows of every shard."""
        return tuple(self.table["rows"].to_pylist())

    @cached_property
    def verdicts(self) -> tuple[str, ...]:
        """The verdicts of every shard."""
        return tuple(self.table["verdicts"].to_pylist())

    @property
    def set_names(self) -> tuple[str, ...]:
        """The column sets of its steps, each once, in the order of the steps."""
        return tuple(dict.fromkeys(s.set_name for s in self.steps if s.set_name))

    @cached_property
    def sets(self) -> dict[str, tuple[str, ...]]:
        """Set name → its files."""
        return {name: tuple(self.table[name].to_pylist()) for name in self.set_names}

    def to_dict(self) -> dict[str, Any]:
        """As `current.json` holds it, under its name."""
        return {
            "chain": self.chain,
            "run": self.run,
            "finished": self.finished,
            "files": self.files,
            "recipe": self.recipe,
            "unsettled": self.unsettled,
            "log_keys": self.log_keys,
            "steps": [vars(s) for s in self.steps],
            "counts": self.counts,
        }

    @classmethod
    def load(cls, store: Store, selection: str | None = None) -> Current | None:
        """The selection of this name, or the latest; None when no run has finished.

        RecipeError when there is no selection of that name; StoreError when the file is torn or of another format.
        """
        found, latest = load_selections(store)
        if selection is None:
            return found[latest] if latest is not None else None
        if selection not in found:
            raise RecipeError(f"{store.url} has no selection {selection!r}{nearest(selection, found)}")
        return found[selection]


def load_selections(store: Store) -> tuple[dict[str, Current], str | None]:
    """(name → selection in the order of names, the name of the latest); StoreError when the file is torn."""
    return _parse(store, store.read_if_there(_FILE))


def selection_names(store: Store) -> list[str]:
    """Names of the selections, sorted."""
    return list(load_selections(store)[0])


def _parse(store: Store, data: bytes | None) -> tuple[dict[str, Current], str | None]:
    if data is None:
        return {}, None
    try:
        found = json.loads(data)
        if found["format"] != FORMAT_VERSION:
            raise StoreError(f"{store.url} has format {found['format']}, this mmdata reads format {FORMAT_VERSION}")
        selections = {name: _selection(store, name, found["selections"][name]) for name in sorted(found["selections"])}
        latest = found["latest"]
        if latest is not None and latest not in selections:
            raise KeyError(latest)
        return selections, latest
    except (ValueError, KeyError, TypeError) as error:
        cure = "move it away and run its recipes again: nothing is computed twice"
        raise StoreError(f"current.json of {store.url} is damaged ({error!r}); {cure}") from None


def _selection(store: Store, name: str, found: Mapping[str, Any]) -> Current:
    return Current(
        name,
        found["chain"],
        found["run"],
        found["recipe"],
        tuple(CurrentStep(**{**s, **_pairs(s)}) for s in found["steps"]),
        tuple((v, p, r, n) for v, p, r, n in found["counts"]),
        found["files"],
        found["finished"],
        found["unsettled"],
        tuple(found["log_keys"]),
        store,
    )


def _pairs(step: Mapping[str, Any]) -> dict[str, tuple[tuple[str, str], ...]]:
    """The (own, visible) pairs of a step, as JSON gave them."""
    return {name: tuple((own, visible) for own, visible in step.get(name, ())) for name in ("outputs", "aside")}


def publish(store: Store, current: Current, table: pa.Table, hold: Callable[[], None]) -> tuple[Current, bool]:
    """Make `current` the latest selection, its files those of `table`; returns what stands, and whether that is new.

    Nothing is written when the selection of this name says the same and is the latest already. `hold` raises when
    another run has taken the dataset over. What that run publishes is never overwritten: it is either there when `hold`
    is called, or `current.json` is no longer what was read before.
    """
    before = store.read_if_there(_FILE)
    hold()
    selections, latest = _parse(store, before)
    earlier = selections.get(current.name)
    if earlier is not None and _says_the_same(earlier, current, table):
        if latest == current.name:
            return earlier, False
        current = earlier
    else:
        with store.scratch() as folder:
            write_parquet(table, folder / "files.parquet")
            store.commit(current.files, folder / "files.parquet")
    selections[current.name] = current
    _replace(store, before, selections, current.name, hold)
    return current, True


def _says_the_same(earlier: Current, current: Current, table: pa.Table) -> bool:
    ours, theirs = current.to_dict(), earlier.to_dict()
    # A run that finds everything done says nothing new; its id and its time are in its record.
    same = all(ours[name] == theirs[name] for name in ours if name not in ("run", "finished", "files"))
    if not same:
        return False
    with contextlib.suppress(StoreError):  # its list is gone or torn: then it is written anew
        return bool(table.equals(earlier.table))
    return False


def _replace(
    store: Store, before: bytes | None, selections: Mapping[str, Current], latest: str | None, hold: Callable[[], None]
) -> None:
    document = {
        "format": FORMAT_VERSION,
        "latest": latest,
        "selections": {name: selections[name].to_dict() for name in sorted(selections)},
    }
    hold()
    if not store.replace(_FILE, json.dumps(document, indent=1).encode(), before):
        raise StoreError(f"another run finished on {store.url} meanwhile; run the same command again")


def forget(store: Store, name: str, hold: Callable[[], None], dry_run: bool = False) -> dict[str, Current]:
    """Drop a selection, and return the others; its files stay until `mmdata clean` finds that nothing names them.

    The latest of the others becomes the latest. RecipeError when there is no selection of that name. With `dry_run`
    nothing is written.
    """
    before = store.read_if_there(_FILE)
    selections, latest = _parse(store, before)
    if name not in selections:
        raise RecipeError(f"{store.url} has no selection {name!r}{nearest(name, selections)}")
    del selections[name]
    if latest == name:
        latest = max(selections, key=lambda n: selections[n].finished, default=None)
    if not dry_run:
        _replace(store, before, selections, latest, hold)
    return selections


def utc_now() -> str:
    """The time now, as selections give it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def files_table(
    shards: Sequence[int],
    row_counts: Sequence[int],
    inputs: Any,
    keys: tuple[Sequence[str | None], Sequence[str | None]],
    files: Mapping[str, Listed],
) -> pa.Table:
    """The list of files as `state/` holds it: a row a shard; see the module's text for the columns."""
    columns: dict[str, Any] = {
        "shard": pa.array(shards, pa.int64()),
        "row_count": pa.array(row_counts, pa.int64()),
        "inputs": pa.array(inputs, pa.uint64()),
        "key_min": pa.array(keys[0], pa.string()),
        "key_max": pa.array(keys[1], pa.string()),
    }
    for what, listed in files.items():
        columns[what] = pa.array(listed.names, pa.string())
        columns[f"{what}:bytes"] = pa.array(listed.sizes, pa.int64())
        columns[f"{what}:stamp"] = pa.array(listed.stamps, pa.int64())
    return pa.table(columns)
