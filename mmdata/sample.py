"""`run --sample N`: try a recipe on N rows of the whole list before paying for all of them.

Rows are chosen by a hash of their position and the recipe's seed, run inline in a temporary dataset that is removed
again, and extrapolated to the list.
"""

from __future__ import annotations

import hashlib
import heapq
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from mmdata.columns import MEDIA_ROLES
from mmdata.dataset import Dataset, run
from mmdata.errors import RecipeError, SourceError
from mmdata.funnel import Funnel
from mmdata.preflight import prove
from mmdata.recipe import Recipe
from mmdata.scratch import scratch_folder
from mmdata.shipped import find_recipe
from mmdata.sources.urls import UrlSource

__all__ = ["SampleReport", "render_sample", "run_sample"]


@dataclass(frozen=True)
class SampleReport:
    """What a sample says of the list. `seconds` are of one process, `stored_bytes` of media, both for the sample."""

    list_rows: int
    sample_rows: int
    funnel: Funnel
    seconds: float
    stored_bytes: int
    warnings: tuple[str, ...]

    @property
    def scale(self) -> float:
        """Rows of the list per row of the sample."""
        return self.list_rows / self.sample_rows


def run_sample(
    path: str,
    rows: int,
    *,
    overrides: Sequence[str] = (),
    device: Literal["auto", "cpu", "cuda"] = "auto",
    quiet: bool = False,
) -> SampleReport:
    """Run `rows` hash-chosen rows of the list through the steps; the recipe's own folders are left alone."""
    recipe = find_recipe(path, overrides)
    if not isinstance(recipe.source, UrlSource):
        raise RecipeError("run --sample tries one list of URLs; adopted and several sources are run as they are")
    with scratch_folder() as folder:
        fresh = recipe.model_copy(update={"dataset": str(folder / "dataset"), "export": None})
        prove(fresh)
        list_rows, chosen = _choose(recipe, rows)
        pq.write_table(chosen, folder / "sample.parquet")
        source: dict[str, Any] = {"kind": "urls", "path": str(folder / "sample.parquet"), "url": "url"}
        source |= {own: own for own in ("caption", "uid") if getattr(recipe.source, own) is not None}
        source |= {"columns": list(recipe.source.columns)}
        document = {**fresh.model_dump(mode="json", exclude={"steps", "source"}), "source": source}
        fetch = recipe.fetch
        given: dict[str, Any] = {"verify_hash": fetch.verify_hash and ["fetch:hash", fetch.verify_hash[1]]}
        given["bbox"] = "fetch:boxes" if fetch.bbox else None  # as the chosen rows have them
        document["fetch"] |= given
        began = time.monotonic()
        ds = run({**document, "steps": recipe.steps}, runner="inline", device=device, quiet=quiet)
        return SampleReport(
            list_rows, len(chosen), ds.funnel(), time.monotonic() - began, _stored(ds), tuple(_warnings(ds.funnel()))
        )


def _choose(recipe: Recipe, rows: int) -> tuple[int, pa.Table]:
    """The rows whose hash is smallest, in list order; holds no more than that many."""
    assert isinstance(recipe.source, UrlSource)
    best: list[tuple[int, int, pa.Table]] = []  # (-hash, position, one row)
    position = 0
    for table in recipe.sources[0].tables(10_000):  # type: ignore[union-attr]
        for index in range(len(table)):
            key = int.from_bytes(hashlib.blake2b(f"{recipe.seed}:{position}".encode(), digest_size=8).digest())
            if len(best) < rows:
                heapq.heappush(best, (-key, position, table.slice(index, 1)))
            elif key < -best[0][0]:
                heapq.heapreplace(best, (-key, position, table.slice(index, 1)))
            position += 1
    if not best:
        raise SourceError(f"source {recipe.source.path} holds no rows")
    return position, pa.concat_tables([row for _, _, row in sorted(best, key=lambda b: b[1])])


def _stored(ds: Dataset) -> int:
    there = ds.sql("SELECT * FROM rows").columns
    sizes = " + ".join(f"coalesce({r}_size, 0)" for r in MEDIA_ROLES if f"{r}_size" in there)
    [row] = ds.sql(f"SELECT coalesce(sum({sizes}), 0) FROM rows").fetchall()
    return int(row[0])


def _warnings(funnel: Funnel) -> list[str]:
    found = []
    for step in funnel.steps:
        if step.kind == "filter" and step.rows_in:
            if step.rows_out == 0:
                found.append(f"filter {step.name} drops everything that reaches it")
            elif step.dropped == 0:
                found.append(f"filter {step.name} drops nothing")
    return found


def render_sample(report: SampleReport) -> str:
    """The expectation for the whole list, as a few lines."""
    funnel = report.funnel
    kept = funnel.kept / max(1, funnel.rows_in)
    failed = funnel.failed / max(1, funnel.rows_in)
    hours = report.seconds * report.scale / 3600
    lines = [
        f"{report.sample_rows:,} of {report.list_rows:,} rows tried",
        f"expected: {kept:.1%} kept ({kept * report.list_rows:,.0f} rows), {failed:.1%} failed",
        f"expected: {hours:,.2f} hours in one process, {report.stored_bytes * report.scale / 1e9:,.2f} GB of media",
    ]
    for step in funnel.steps:
        if step.rows_in:
            lines.append(f"  {step.name}: {step.rows_out / step.rows_in:.1%} of {step.rows_in:,} go on")
    return "\n".join([*lines, *(f"warning: {w}" for w in report.warnings)])
