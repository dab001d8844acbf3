"""Whatever sequence of edits led to a recipe, the dataset shows what a fresh run of it shows; nothing is done twice."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import synthetic
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mmdata
from mmdata.errors import RecipeError

NUMBERS = [(i * 37) % 101 for i in range(60)]


@pytest.fixture(autouse=True, scope="module")
def _operators() -> None:
    synthetic.register_all()


def _status(number: int) -> str:
    return "http_4xx" if number % 17 == 3 else "ok"


def _picture(number: int) -> bytes | None:
    return b"not a picture" if number % 19 == 5 else None if number % 23 == 7 else synthetic.png(number)


# Steps in the shapes the algebra must get right: gated stages, stages on stages, groups in between, kept errors.
_STAGES: list[Any] = [
    {"make_sevens": {}},
    {"make_sevens": {"times": 5, "as": "fives", "on_error": "keep"}},
    {"add_constant": {"column": "sevens_value"}},
    {"add_constant": {"column": "sevens_value", "add": 2.5, "as": "more"}},
    {"measure_mean": {"max_failed": 1}},
    {"measure_mean": {"as": "again", "on_error": "keep"}},
    {"rank_rows": {"prefer": ["number % 10 desc"]}},
    {"rank_rows": {"by": "sevens_value", "as": "by_seven"}},
]
_FILTERS = [
    "number >= {n}",
    "number % 10 <= {d}",
    "sevens_value <= {d}",
    "plus_value > {d} OR caption IS NULL",
    "more_value / (number % 4) < {d}",
    "mean_value < {n} + 40",
    "again_mean_value IS NOT NULL",
    "rank_rank <= {d}",
    "by_seven_rank <= {d} AND fives_value IS NOT NULL",
    "CAST(right(caption, 1) AS INTEGER) <= {d}",
]


@st.composite
def _edits(draw: st.DrawFn) -> list[list[Any]]:
    """A few recipes over the same steps: filters change their bounds, come, go and move; stages come and go."""
    stages = [s for s in _STAGES if draw(st.booleans())]
    recipes = []
    for _ in range(draw(st.integers(2, 4))):
        steps: list[Any] = [s for s in stages if draw(st.integers(0, 5))]
        for number, text in enumerate(_FILTERS):
            if draw(st.integers(0, 2)) == 0:
                sql = text.format(n=draw(st.integers(0, 100)), d=draw(st.integers(0, 9)))
                steps.insert(draw(st.integers(0, len(steps))), {"filter": {f"f{number}": sql}})
        recipes.append(steps)
    return recipes


def _run(folder: Path, document: dict[str, Any], steps: list[Any]) -> mmdata.dataset.Dataset | None:
    export = {"format": "parquet", "path": str(folder / "out")}
    try:
        return mmdata.run({**document, "steps": steps, "export": export}, runner="inline")
    except RecipeError:
        return None  # such as a filter that stands before the step that makes its column


def _content(ds: mmdata.dataset.Dataset, folder: Path) -> tuple[pa.Table, dict[str, bytes]]:
    samples = ds.sql("SELECT * FROM samples ORDER BY row_id").to_arrow_table()
    files = {p.name: p.read_bytes() for p in sorted((folder / "out").glob("*.parquet"))}
    return samples, files


def _covered(folder: Path) -> dict[tuple[str, str], int]:
    """(set, shard) → covered rows, counted from the newest files with pyarrow alone."""
    found = {}
    for path in sorted((folder / "dataset" / "columns").glob("*/*.parquet")):
        reasons = pq.read_table(path, columns=["reason"]).column(0).to_pylist()
        covered = sum(r is None or (r != "uncovered" and not r.startswith("!")) for r in reasons)
        key = (path.parent.name, path.name.split(".")[0])
        found[key] = max(covered, found.get(key, 0))
    return found


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(recipes=_edits())
def test_any_sequence_of_edits_shows_what_a_fresh_run_shows(recipes: list[list[Any]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        edited = Path(name) / "edited"
        document = synthetic.make_dataset(edited, NUMBERS, 16, _picture, _status)
        covered: dict[tuple[str, str], int] = {}
        for number, steps in enumerate(recipes):
            synthetic.COMPUTED.clear()
            synthetic.OPENED.clear()
            ds = _run(edited, document, steps)
            if ds is None:
                continue
            report = ds.report
            assert report is not None
            now = _covered(edited)
            grown = Counter({s: 0 for s, _ in now})
            for (set_name, _), rows in now.items():
                grown[set_name] += rows
            for (set_name, _), rows in covered.items():
                grown[set_name] -= rows
            covered = now
            # No row was computed that was covered before: what was computed is what coverage grew by.
            computed = sum(w.computed for w in report.work.values())
            assert sum(grown.values()) == computed
            assert all(rows >= 0 for rows in grown.values())
            if computed == 0:
                assert report.media_reads == 0
                assert not synthetic.OPENED
            means = [step for step in report.work if step in ("measure_mean", "again")]
            if not any(report.work[m].computed for m in means):
                assert report.media_reads == 0

            fresh = Path(name) / f"fresh{number}"
            fresh_document = synthetic.make_dataset(fresh, NUMBERS, 16, _picture, _status)
            (fresh / "list.parquet").write_bytes((edited / "list.parquet").read_bytes())
            other = _run(fresh, fresh_document, steps)
            assert other is not None
            ours, theirs = _content(ds, edited), _content(other, fresh)
            assert ours[0].equals(theirs[0])
            assert ours[1] == theirs[1]
            kept = ds.sql("SELECT count(*) FROM samples WHERE verdict = 'kept'").fetchall()
            funnel = ds.funnel()
            assert kept == [(funnel.kept,)]
            assert funnel.rows_in == len(NUMBERS)
