"""The ledger of a run: which shards have verdicts that hold, and at the end the selection that readers see.

In: the coverage log, and the verdicts of shards as they are written. Out: `mmdata.selections.Current`, published. Until
then readers see the previous answer, whole. StoreError when another run has taken the dataset over.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mmdata.coverage_log import CoverageLog
from mmdata.errors import StoreError
from mmdata.numbered_files import NumberedFiles
from mmdata.selections import Current, CurrentStep, Listed, files_table, load_selections, publish, utc_now
from mmdata.store import Store
from mmdata.survivors import BoundStep
from mmdata.verdict_work import Settled, add_counts

__all__ = ["Ledger"]

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
        known = np.intersect1d(judged, shards[is_known], assume_unique=True)
        return np.setdiff1d(shards, known, assume_unique=True)

    def earlier(self, shard: int) -> str:
        """The verdict file that a selection of the same chain has for a shard, which may still hold; or empty."""
        if self._earlier is None:
            same = [c for c in load_selections(self._store)[0].values() if c.chain == self._chain]
            self._earlier = {}
            for current in sorted(same, key=lambda c: c.name == self._name):
                with contextlib.suppress(StoreError):  # a list that is gone or torn helps nobody
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
        hold()
        if (same := self._unchanged(recipe, shards, judged)) is not None:
            return same, False
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

    def _unchanged(self, recipe: str, shards: Integers, judged: pa.Table) -> Current | None:
        """The latest selection, where it is this recipe's and goes by the very files that are there now."""
        selections, latest = load_selections(self._store)
        found = selections.get(self._name)
        if found is None or latest != self._name or (found.chain, found.recipe) != (self._chain, recipe):
            return None
        if found.log_keys != self._log.keys():
            return None
        with contextlib.suppress(StoreError):  # its list is gone or torn: then it is written anew
            table = self._store.read_table(found.files, ["shard", "inputs", "verdicts"])
            same = np.array_equal(table["shard"].to_numpy(), shards) and table["verdicts"].equals(judged["name"])
            inputs = self._log.inputs(self._chain, shards)
            return found if same and np.array_equal(table["inputs"].to_numpy(), inputs) else None
        return None

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
