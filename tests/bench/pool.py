"""A dataset as large as a bench asks for: base rows and six column sets, written as runs would have written them.

Nothing is fetched and no stage is run: the files of `score_at_random` are made here, under the identity that the recipe
gives them, so that a run over the dataset finds everything computed. The same numbers give the same files.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from mmdata import registry
from mmdata.column_files import canonical_json, write_column_file, write_parquet
from mmdata.columns import base_schema
from mmdata.ledger import new_dataset, update_dataset
from mmdata.plan import identity
from mmdata.planned import Resolved
from mmdata.preflight import prove
from mmdata.recipe import parse
from mmdata.stage import Contract, Options, Stage, parse_schema
from mmdata.store import ColumnFooter, shard_name

SETS = 6


class RandomOptions(Options):
    number: int = Field(0, description="which of the scores")


class ScoreAtRandom(Stage[RandomOptions]):
    """A score in [0, 1], of which a bench writes the values itself. Reads caption. Writes random_score; never NULL."""

    name, label = "score_at_random", "random"
    reads: ClassVar[tuple[str, ...]] = ("caption",)

    @classmethod
    def contract(cls, options: RandomOptions) -> Contract:
        return Contract(writes=parse_schema("random_score: float32, random_count: int64"), reads=("caption",))

    def compute(self, batch: Any) -> dict[str, Any]:
        raise AssertionError("every row of the dataset is computed")


def register() -> None:
    if "score_at_random" not in registry.names():
        registry.register(ScoreAtRandom)


def recipe_over(folder: Path, shard_rows: int, name: str = "bench", bounds: tuple[float, ...] = (0.1,) * SETS) -> Any:
    """Six scores, a filter after each; `bounds` are the thresholds."""
    steps: list[Any] = []
    for number, bound in enumerate(bounds):
        steps += [{"score_at_random": {"number": number, "as": f"s{number}"}}]
        steps += [{"filter": {f"f{number}": f"s{number}_score >= {bound}"}}]
    source = {"kind": "urls", "path": str(folder / "list.parquet"), "caption": "caption"}
    fetch = {"shard_rows": shard_rows}
    return {"name": name, "dataset": str(folder / "dataset"), "source": source, "fetch": fetch, "steps": steps}


def make_pool(folder: Path, rows: int, shard_rows: int) -> Any:
    """Make `<folder>/dataset` unless it is there; returns a recipe over it."""
    register()
    document = recipe_over(folder, shard_rows)
    if (folder / "whole").exists():
        return document
    folder.mkdir(parents=True, exist_ok=True)
    # The list itself is never read again: the dataset says that all its shards are there.
    pq.write_table(pa.table({"url": ["http://images.invalid/0.png"], "caption": ["none"]}), folder / "list.parquet")
    proved = prove(parse(document))
    new_dataset(proved.store, proved.document)
    shards = -(-rows // shard_rows)
    steps = [s for s in proved.plan.steps if s.kind == "stage"]
    sets: dict[int, str] = {}
    footers = {}
    for step in steps:
        name, described, _ = identity(step, Resolved(precision=step.contract.precision), sets)  # type: ignore[union-attr]
        sets[step.position] = name
        footers[name] = ColumnFooter.of(canonical_json(described))
    root = Path(proved.store.root)
    for part in ["rows", *(f"columns/{name}" for name in sets.values())]:
        (root / part).mkdir(parents=True)
    digits = len(str(shard_rows - 1))
    for shard in range(shards):
        count = min(shard_rows, rows - shard * shard_rows)
        random = np.random.default_rng(shard)
        ids = np.arange(count, dtype=np.int64) + (shard << 24)
        write_parquet(_rows(shard, ids, random, digits), root / f"rows/{shard_name(shard)}.g0.parquet")
        for name, footer in footers.items():
            columns = {
                "row_id": ids,
                "random_score": random.random(count, np.float32),
                "random_count": random.integers(0, 50, count),
                "reason": pa.nulls(count, pa.string()),
            }
            path = root / f"columns/{name}/{shard_name(shard)}.c0.parquet"
            write_column_file(path, pa.table(columns), footer)
        if shard % 100 == 99:
            print(f"{shard + 1} of {shards} shards", file=sys.stderr)
    proved.document.sources[0]["shards"] = shards
    update_dataset(proved.store, proved.document)
    (folder / "whole").touch()
    return document


def _rows(shard: int, ids: Any, random: np.random.Generator, digits: int) -> pa.Table:
    count = len(ids)
    first = shard * 10**digits
    status = np.where(random.random(count) < 0.05, "timeout", "ok")
    uids = [h.hex() for h in (bytes(v) for v in np.frombuffer(random.bytes(16 * count), "V16"))]
    columns: dict[str, Any] = {
        "row_id": ids,
        "key": [f"{first + i:0{5 + digits}d}" for i in range(count)],
        "uid": uids,
        "url": [f"http://images.invalid/{first + i}.png" for i in range(count)],
        "caption": [f"picture number {n} of a thing" for n in random.integers(0, 1 << 20, count)],
        "status": status,
        "width_px": random.integers(64, 512, count),
        "height_px": random.integers(64, 512, count),
        "attempts": np.ones(count, np.int32),
    }
    schema = base_schema()
    arrays = [pa.array(columns[f.name], f.type) if f.name in columns else pa.nulls(count, f.type) for f in schema]
    return pa.table(arrays, schema=schema)
