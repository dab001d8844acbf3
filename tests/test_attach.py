"""The steps `attach` and `keep_list`, run: against joins made by pandas' and DuckDB's own means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from synthetic import make_dataset, register_all

import mmdata
from mmdata.errors import BudgetError, RecipeError, SourceError

NUMBERS = list(range(1, 36))


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    """35 rows in four shards; numbers that 17 divides failed at ingest."""
    register_all()
    return make_dataset(tmp_path, NUMBERS, status=lambda n: "ok" if n % 17 else "http_4xx")


def uids(recipe: dict[str, Any]) -> list[str]:
    found = duckdb.sql(f"SELECT uid FROM read_parquet('{recipe['dataset']}/rows/*.parquet') ORDER BY row_id")
    return [uid for (uid,) in found.fetchall()]


def run(recipe: dict[str, Any], *steps: Any, **options: Any) -> mmdata.Dataset:
    return mmdata.run({**recipe, "steps": list(steps)}, runner="inline", **options)


def test_scores_are_joined_as_duckdb_joins_them(recipe: dict[str, Any], tmp_path: Path) -> None:
    names = uids(recipe)
    rng = np.random.default_rng(3)
    chosen = rng.permutation(35)[:20]
    scores = pa.table(
        {"uid": [names[i].upper() for i in chosen], "clip": rng.random(20), "nsfw": rng.integers(0, 9, 20)}
    )
    pq.write_table(scores, tmp_path / "scores.parquet", row_group_size=6)
    attach = {"path": str(tmp_path / "scores.parquet"), "columns": {"score": "clip", "unsafe": "nsfw"}}
    ds = run(recipe, {"attach": {**attach, "on_error": "keep"}}, {"filter": {"good": "score > 0.5"}})
    rows = pq.read_table(f"{recipe['dataset']}/rows")
    expected = duckdb.sql(
        "SELECT r.row_id, s.clip, s.nsfw FROM rows r LEFT JOIN scores s ON r.uid = lower(s.uid) "
        "WHERE r.status = 'ok' ORDER BY 1"
    ).fetchall()
    assert len(rows) == 35
    found = ds.sql("SELECT row_id, score, unsafe FROM samples WHERE status = 'ok' ORDER BY 1").fetchall()
    assert found == expected
    assert {
        r for (r,) in ds.sql("SELECT attach_reason FROM samples WHERE score IS NULL AND status = 'ok'").fetchall()
    } == {"unmatched"}
    kept = {r for (r,) in ds.sql("SELECT row_id FROM samples WHERE verdict = 'kept'").fetchall()}
    assert kept == {r for r, score, _ in expected if score is not None and score > 0.5}
