"""What readers see: the verdict of every row, and `current.json`, which names the one file of everything.

A run that changes any verdict writes a new folder `verdicts/<chain>-<run>` and moves `current.json` to it at its end:
until then readers see the previous answer, whole.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmdata.column_files import ColumnFile, shard_name, write_parquet
from mmdata.columns import FORMAT_VERSION
from mmdata.errors import StoreError
from mmdata.store import Store
from mmdata.survivors import BoundStep

__all__ = ["Current", "CurrentStep", "DatasetDocument", "Ledger", "dataset_document", "new_dataset", "update_dataset"]


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
class Current:
    """`current.json`: the chain of the last finished run, and the one file of every shard for everything.

    `rows`, `verdicts` and each of `sets` are file names in the order of `shards`. `counts` is (verdict, position,
    reason, rows) for every combination there is.
    """

    chain: str
    run: str
    recipe: str
    shards: tuple[int, ...]
    rows: tuple[str, ...]
    verdicts: tuple[str, ...]
    sets: Mapping[str, tuple[str, ...]]
    steps: tuple[CurrentStep, ...]
    counts: tuple[tuple[str, int | None, str | None, int], ...]

    @property
    def transient(self) -> int:
        """Rows that failed for a transient reason."""
        return sum(n for _, _, reason, n in self.counts if reason is not None and reason.startswith("!"))

    def to_bytes(self) -> bytes:
        """JSON."""
        document = {
            "format": FORMAT_VERSION,
            "chain": self.chain,
            "run": self.run,
            "recipe": self.recipe,
            "shards": self.shards,
            "rows": self.rows,
            "verdicts": self.verdicts,
            "sets": dict(self.sets),
            "steps": [vars(s) for s in self.steps],
            "counts": self.counts,
        }
        return json.dumps(document, indent=1).encode()

    @classmethod
    def load(cls, store: Store) -> Current | None:
        """None when no run has finished; StoreError when the file is torn or of another format."""
        data = store.read_if_there("current.json")
        if data is None:
            return None
        try:
            found = json.loads(data)
            if found["format"] != FORMAT_VERSION:
                raise StoreError(f"{store.url} has format {found['format']}, this mmdata reads format {FORMAT_VERSION}")
            steps = [CurrentStep(**{**s, **_pairs(s)}) for s in found["steps"]]
            return cls(
                found["chain"],
                found["run"],
                found["recipe"],
                tuple(found["shards"]),
                tuple(found["rows"]),
                tuple(found["verdicts"]),
                {name: tuple(files) for name, files in found["sets"].items()},
                tuple(steps),
                tuple((v, p, r, n) for v, p, r, n in found["counts"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"current.json of {store.url} is damaged ({error!r}); run the recipe again") from None


class Ledger:
    """Collects the verdicts of a run in the folder `scratch`, and publishes them when readers see others."""

    def __init__(self, store: Store, chain: str, run: str, scratch: Path) -> None:
        self._store, self._chain, self._run, self._scratch = store, chain, run, scratch
        self._written: dict[int, Path] = {}
        self._counts: Counter[tuple[str, int | None, str | None]] = Counter()

    def add(self, shard: int, table: pa.Table) -> None:
        """The verdicts of one shard, rows in base order."""
        self._written[shard] = self._scratch / f"{shard_name(shard)}.parquet"
        write_parquet(table, self._written[shard])
        grouped = table.group_by(["verdict", "step", "reason"]).aggregate([([], "count_all")]).to_pylist()
        for row in grouped:
            self._counts[row["verdict"], row["step"], row["reason"]] += row["count_all"]

    def publish(
        self,
        recipe: str,
        rows: Mapping[int, str],
        steps: Sequence[BoundStep],
        files: Mapping[str, Mapping[int, ColumnFile]],
        hold: Callable[[], None],
    ) -> tuple[Current, bool]:
        """Write what is new and move `current.json`; returns what readers see now, and whether anything changed.

        `hold` raises when another run has taken the dataset over. What that run publishes is never overwritten: it is
        either there when `hold` is called, or `current.json` is no longer what was read before.
        """
        before = self._store.read_if_there("current.json")
        hold()
        previous = Current.load(self._store)
        shards = tuple(sorted(self._written))
        same = previous is not None and previous.chain == self._chain and previous.shards == shards
        if same and previous is not None and self._same_verdicts(previous):
            names, run = previous.verdicts, previous.run
        else:
            names, run = self._commit(shards), self._run
        counts = sorted(((*k, n) for k, n in self._counts.items()), key=repr)
        current = Current(
            self._chain,
            run,
            recipe,
            shards,
            tuple(rows[s] for s in shards),
            names,
            {b.set_name: tuple(files[b.set_name][s].name for s in shards) for b in steps if b.set_name},
            tuple(_current_step(b) for b in steps),
            tuple(counts),
        )
        data = current.to_bytes()
        if data == before:
            return current, False
        hold()
        if not self._store.replace("current.json", data, before):
            raise StoreError(f"another run finished on {self._store.url} meanwhile; run the same command again")
        return current, True

    def _same_verdicts(self, previous: Current) -> bool:
        for shard, name in zip(previous.shards, previous.verdicts, strict=True):
            ours = pq.read_table(self._written[shard], use_threads=False)
            if not self._store.exists(name) or not self._store.read_table(name).equals(ours):
                return False
        return True

    def _commit(self, shards: Iterable[int]) -> tuple[str, ...]:
        names = []
        for shard in shards:
            names.append(f"verdicts/{self._chain}-{self._run}/{shard_name(shard)}.parquet")
            self._store.commit(names[-1], self._written[shard])
        return tuple(names)


def _current_step(bound: BoundStep) -> CurrentStep:
    step = bound.step
    kind = "filter" if step.kind == "keep_list" else step.kind
    return CurrentStep(
        step.position, step.name, kind, bound.set_name, step.outputs, step.reason_column, step.words, step.aside
    )


def _pairs(step: Mapping[str, Any]) -> dict[str, tuple[tuple[str, str], ...]]:
    """The (own, visible) pairs of a step, as JSON gave them."""
    return {name: tuple((own, visible) for own, visible in step.get(name, ())) for name in ("outputs", "aside")}


@dataclass
class DatasetDocument:
    """`dataset.json`: what the dataset was made of; `data` is the file as read, for the conditional put."""

    id: str
    sources: list[dict[str, Any]]
    fetch: dict[str, Any]
    columns: list[list[str]] = field(default_factory=list)  # extra source columns as [name, Arrow type]
    data: bytes | None = None

    def to_bytes(self) -> bytes:
        """JSON."""
        document = {
            "format": FORMAT_VERSION,
            "id": self.id,
            "sources": self.sources,
            "fetch": self.fetch,
            "columns": self.columns,
        }
        return json.dumps(document, indent=1, sort_keys=True).encode()


def dataset_document(store: Store) -> DatasetDocument | None:
    """What `dataset.json` says; None when the folder is no dataset yet."""
    data = store.read_if_there("dataset.json")
    if data is None:
        return None
    try:
        found = json.loads(data)
        if found["format"] != FORMAT_VERSION:
            raise StoreError(f"{store.url} has format {found['format']}, this mmdata reads format {FORMAT_VERSION}")
        return DatasetDocument(found["id"], found["sources"], found["fetch"], found["columns"], data)
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"dataset.json of {store.url} is damaged ({error!r}); restore it from a backup") from None


def new_dataset(store: Store, document: DatasetDocument) -> None:
    """Write the first `dataset.json`; StoreError when another run made the folder a dataset meanwhile."""
    data = document.to_bytes()
    if not store.replace("dataset.json", data, None):
        raise StoreError(f"another run made {store.url} a dataset meanwhile; run the same command again")
    document.data = data


def update_dataset(store: Store, document: DatasetDocument) -> None:
    """Put the changed document in place of the one it was read from."""
    data = document.to_bytes()
    if data != document.data:
        if not store.replace("dataset.json", data, document.data):
            raise StoreError(f"dataset.json of {store.url} was changed by another run; run the same command again")
        document.data = data
