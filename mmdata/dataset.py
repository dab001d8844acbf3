"""A dataset as its users see it: SQL over every sample, why a sample is gone, and running a recipe.

`mmdata.open(path)` and `mmdata.run(recipe)` both give a `Dataset`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from mmdata import ledger, query
from mmdata.columns import ROWS_PER_SHARD_BITS
from mmdata.errors import SourceError, StoreError
from mmdata.funnel import Funnel, FunnelStep
from mmdata.store import Store

if TYPE_CHECKING:
    import duckdb

    from mmdata.driver import Report
    from mmdata.recipe import Recipe

__all__ = ["Dataset", "StepStory", "Story", "open", "run"]


@dataclass(frozen=True)
class StepStory:
    """What one step did to one row: `state` is passed, dropped, failed or gated (the row had gone before)."""

    position: int
    name: str
    kind: str
    state: str
    reason: str | None
    values: Mapping[str, Any]
    sql: str = ""


@dataclass(frozen=True)
class Story:
    """Everything known of one row: its base columns, its verdict, and step by step how it came about."""

    row: Mapping[str, Any]
    verdict: str
    step_name: str | None
    reason: str | None
    steps: tuple[StepStory, ...]


class Dataset:
    """A dataset folder, read. `store` is the folder; `current` what the last finished run left, None before one.

    A dataset sees the state at the time it was opened; open it again to see a later run.
    """

    def __init__(self, path: str) -> None:
        self.store = Store(path)
        if not self.store.exists("dataset.json"):
            raise SourceError(f"there is no dataset at {self.store.url}; make one with mmdata run RECIPE")
        self.current = ledger.Current.load(self.store)
        self.report: Report | None = None
        self._connection: duckdb.DuckDBPyConnection | None = None

    def __repr__(self) -> str:
        return f"mmdata.open({self.store.url!r})"

    def _seen(self) -> ledger.Current:
        if self.current is None:
            raise StoreError(f"no run has finished on {self.store.url} yet; run its recipe to the end first")
        return self.current

    @property
    def connection(self) -> duckdb.DuckDBPyConnection:
        """A DuckDB connection with the views `samples`, `rows`, `verdicts`, `runs` and `columns."<set>"`."""
        if self._connection is None:
            self._connection = query.connect(self.store, self._seen())
        return self._connection

    def sql(self, text: str) -> duckdb.DuckDBPyRelation:
        """The answer to a question in DuckDB's SQL; `.df()`, `.arrow()` or `.fetchall()` it."""
        return self.connection.sql(text)

    def samples(self) -> duckdb.DuckDBPyRelation:
        """The kept rows of the view `samples`."""
        return self.sql("SELECT * FROM samples WHERE verdict = 'kept'")

    def shards(self) -> list[int]:
        """Shard numbers, ascending."""
        return list(self._seen().shards)

    def kept(self, shard: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Kept rows of one shard in row order: base columns, media references, then step columns.

        `columns` names the step columns wanted (None = all but embeddings, reasons too); base columns are always there.
        """
        current = self._seen()
        index = current.shards.index(shard)
        base = self.store.read_table(current.rows[index])
        verdicts = self.store.read_table(current.verdicts[index], ["row_id", "verdict"])
        query.require_rows(self.store, "verdicts", shard, base["row_id"], verdicts["row_id"])
        alive = pa.array(np.flatnonzero(verdicts["verdict"].to_numpy(zero_copy_only=False) == "kept"))
        table = base.take(alive).replace_schema_metadata(None)
        for step in current.steps:
            if not step.set_name:
                continue
            pairs = [*step.outputs, *(() if columns is None else step.aside), ("reason", step.reason_column)]
            wanted = [(own, visible) for own, visible in pairs if columns is None or visible in columns]
            if wanted:
                owns = list(dict.fromkeys(["row_id", *(own for own, _ in wanted)]))
                values = self.store.read_table(current.sets[step.set_name][index], owns)
                query.require_rows(self.store, step.set_name, shard, base["row_id"], values["row_id"])
                values = values.take(alive)
                for own, visible in wanted:
                    table = table.append_column(visible, values.column(own))
        return table

    def read_media(self, path: str, offset: int, size: int) -> bytes:
        """The bytes of a media reference (`image_path`, `image_offset`, `image_size`)."""
        return self.store.read_range(path, offset, size)

    def funnel(self) -> Funnel:
        """What became of every row, step by step; rows in = kept + dropped + failed, proved."""
        current = self._seen()
        seconds = _seconds(query.run_records(self.store))
        rows_in = sum(n for *_, n in current.counts)
        steps, left = [], rows_in
        for position, name, kind, set_name in [
            (0, "ingest", "ingest", "ingest"),
            *((s.position, s.name, s.kind, s.set_name) for s in current.steps),
        ]:
            gone = [(verdict, reason, n) for verdict, p, reason, n in current.counts if p == position]
            dropped = sum(n for verdict, _, n in gone if verdict == "dropped")
            failed = sum(n for verdict, _, n in gone if verdict == "failed")
            reasons = {str(reason): n for _, reason, n in gone}
            out = left - dropped - failed
            steps.append(FunnelStep(position, name, kind, left, dropped, failed, out, reasons, seconds.get(set_name)))  # type: ignore[arg-type]
            left = out
        totals = {v: sum(n for verdict, *_, n in current.counts if verdict == v) for v in ("kept", "dropped", "failed")}
        funnel = Funnel(rows_in, totals["kept"], totals["dropped"], totals["failed"], tuple(steps))
        funnel.check()
        return funnel

    def why(self, key: str) -> Story:
        """The story of the row with this key; SourceError when there is none."""
        found = self.connection.execute("SELECT row_id FROM rows WHERE key = ? ORDER BY 1", [str(key)]).fetchall()
        if not found:
            raise SourceError(f"no row of {self.store.url} has the key {key!r}; find keys with mmdata sql")
        row_id = found[0][0]
        shard, index = row_id >> ROWS_PER_SHARD_BITS, row_id & ((1 << ROWS_PER_SHARD_BITS) - 1)
        current = self._seen()
        place = current.shards.index(shard)

        def at(name: str) -> dict[str, Any]:
            row: dict[str, Any] = self.store.read_table(name).slice(index, 1).to_pylist()[0]
            return row

        verdict = at(current.verdicts[place])
        steps = []
        for step in current.steps:
            values = at(current.sets[step.set_name][place]) if step.set_name else {}
            gated = verdict["step"] is not None and step.position > verdict["step"]
            here = verdict["step"] == step.position
            reason = verdict["reason"] if here else None if gated else values.get("reason")
            state = "gated" if gated else verdict["verdict"] if here else "passed"
            shown = {} if gated else {visible: values.get(own) for own, visible in step.outputs}
            steps.append(StepStory(step.position, step.name, step.kind, state, reason, shown, step.sql))
        row = at(current.rows[place])
        return Story(row, verdict["verdict"], verdict["step_name"], verdict["reason"], tuple(steps))


def _seconds(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Set name → seconds of work over all runs; `ingest` for fetching."""
    total: dict[str, float] = {}
    for record in records:
        if record["ingest_seconds"]:
            total["ingest"] = total.get("ingest", 0.0) + record["ingest_seconds"]
        for step in record["steps"]:
            if step["set"] and step["seconds"]:
                total[step["set"]] = total.get(step["set"], 0.0) + step["seconds"]
    return total


def open(path: str | Path) -> Dataset:
    """The dataset in a folder; SourceError when there is none."""
    return Dataset(str(path))


def run(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    overrides: Sequence[str] = (),
    runner: Literal["ray", "inline"] = "ray",
    workers: int | None = None,
    address: str | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    allow_mixed: bool = False,
    quiet: bool = True,
) -> Dataset:
    """Run a recipe (a YAML file, a mapping or a `Recipe`) to its end, export included, and open the dataset.

    `overrides` are `--set` assignments. `runner="inline"` stays in this process and gives the same bytes; `address`
    joins a Ray cluster. The dataset's `report` says what was computed now. Raises MmdataError; the same call resumes.
    """
    from mmdata import recipe as recipes
    from mmdata.driver import RunOptions, execute
    from mmdata.export import export
    from mmdata.preflight import prove
    from mmdata.progress import Progress

    if isinstance(recipe, str | Path):
        read = recipes.load(recipe, overrides)
    else:
        read = recipes.parse(recipe, overrides=overrides)
    proved = prove(read)
    with Progress(quiet=quiet) as progress:

        def write_export(current: ledger.Current) -> None:
            if read.export is not None:
                finished = Dataset(read.dataset)
                with progress.step("export", finished.funnel().kept) as line:
                    export(finished, read.export, current.recipe, lambda rows: line.advance(done=rows))

        options = RunOptions(runner, workers, address, device, allow_mixed)
        report = execute(proved, options, progress, write_export)
    made = Dataset(read.dataset)
    made.report = report
    return made
