"""The ledger of a run: which shards have verdicts that hold, and at the end the selection that readers see.

Also `dataset.json`, which says what a dataset was made of. What readers see of it is in `mmdata.selections`: until a
run moves `current.json` at its end, they see the previous answer, whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mmdata.columns import FORMAT_VERSION
from mmdata.coverage_log import CoverageLog
from mmdata.errors import StoreError
from mmdata.numbered_files import NumberedFiles
from mmdata.selections import Current, CurrentStep, Listed, files_table, load_selections, publish, utc_now
from mmdata.store import Store
from mmdata.survivors import BoundStep
from mmdata.verdict_work import Settled, add_counts

__all__ = ["Current", "CurrentStep", "DatasetDocument", "Ledger", "dataset_document", "new_dataset", "update_dataset"]

Integers = npt.NDArray[np.int64]


class Ledger:
    """The verdicts of one run, on their way to the selection `name`. `chain` is the hash of all its steps."""

    def __init__(self, store: Store, log: CoverageLog, name: str, chain: str, run: str) -> None:
        self._store, self._log, self._name, self._chain, self._run = store, log, name, chain, run
        self._earlier: dict[int, str] | None = None

    @property
    def folder(self) -> str:
        """Where the verdicts that this run writes lie."""
        return f"verdicts/{self._chain}-{self._run}"

    def todo(self, shards: Integers) -> Integers:
        """The shards, of these, whose rows have no verdicts by the files that are there now."""
        judged = self._log.judged(self._chain, shards)["shard"].to_numpy()
        is_known = np.asarray(pc.is_valid(self._log.row_facts(shards)["rows"]).to_numpy(), bool)
        return np.setdiff1d(shards, np.intersect1d(judged, shards[is_known]))

    def earlier(self, shard: int) -> str:
        """The verdict file that a selection of the same chain has for a shard, which may still hold; or empty."""
        if self._earlier is None:
            same = [c for c in load_selections(self._store)[0].values() if c.chain == self._chain]
            self._earlier = {}
            for current in sorted(same, key=lambda c: c.name == self._name):
                if self._store.exists(current.files):
                    self._earlier.update(zip(current.shards, current.verdicts, strict=True))
        return self._earlier.get(shard, "")

    def take(self, settled: Settled) -> None:
        """The verdicts of a shard are written."""
        self._log.add_verdicts(self._chain, settled)

    def publish(
        self, recipe: str, shards: Integers, steps: Sequence[BoundStep], hold: Callable[[], None]
    ) -> tuple[Current, bool]:
        """Move `current.json` where it says something else; returns the selection, and whether that is new.

        `hold` raises when another run has taken the dataset over. StoreError when a shard's verdicts are gone.
        """
        judged = self._log.judged(self._chain, shards)
        if not np.array_equal(judged["shard"].to_numpy(), shards):
            raise StoreError(f"verdicts of {self._store.url} went away while they were written; run again")
        current = Current(
            self._name,
            self._chain,
            self._run,
            recipe,
            tuple(_current_step(b) for b in steps),
            add_counts([tuple(map(tuple, json.loads(text))) for text in judged["counts"].to_pylist()]),
            f"state/selection-{self._chain}-{self._run}.parquet",
            utc_now(),
            sum(judged["covered"].to_pylist()),
            self._log.keys(),
            self._store,
        )
        published = publish(self._store, current, self._table(shards, judged, steps), hold)
        selections = load_selections(self._store)[0].values()
        self._log.merge({key for c in selections for key in c.log_keys})
        return published

    def _table(self, shards: Integers, judged: pa.Table, steps: Sequence[BoundStep]) -> pa.Table:
        files = {"rows": _listed(self._log.rows, shards)}
        verdicts = (tuple(judged[name].to_pylist()) for name in ("name", "size", "stamp"))
        files["verdicts"] = Listed(*verdicts)
        for bound in steps:
            if bound.set_name:
                files[bound.set_name] = _listed(self._log.sets[bound.set_name].files, shards)
        facts = self._log.row_facts(shards)
        keys = facts["key_min"].to_pylist(), facts["key_max"].to_pylist()
        inputs = self._log.inputs(self._chain, shards)
        return files_table(shards.tolist(), facts["rows"].to_pylist(), inputs, keys, files)


def _listed(files: NumberedFiles, shards: Integers) -> Listed:
    found = files.at(files.places(shards)[0])
    return Listed(tuple(found.names()), tuple(found.sizes.tolist()), tuple(found.stamps.tolist()))


def _current_step(bound: BoundStep) -> CurrentStep:
    step = bound.step
    kind = "filter" if step.kind == "keep_list" else step.kind
    return CurrentStep(
        step.position, step.name, kind, bound.set_name, step.outputs, step.reason_column, step.words, step.aside
    )


@dataclass
class DatasetDocument:
    """`dataset.json`: what the dataset was made of; `data` is the file as read, for the conditional put."""

    id: str
    sources: list[dict[str, Any]]
    fetch: dict[str, Any]
    columns: list[list[str]] = field(default_factory=list)  # extra source columns as [name, Arrow type]
    blocks: list[dict[str, Any]] = field(default_factory=list)  # {lists: kind → fingerprint, first_shard: checked so}
    data: bytes | None = None

    def to_bytes(self) -> bytes:
        """JSON."""
        document = {
            "format": FORMAT_VERSION,
            "id": self.id,
            "sources": self.sources,
            "fetch": self.fetch,
            "columns": self.columns,
            "blocks": self.blocks,
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
        blocks = found.get("blocks", [])
        return DatasetDocument(found["id"], found["sources"], found["fetch"], found["columns"], blocks, data)
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
