"""`run --sample`: what it expects of the whole list, over a real server, and that it leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from server import BadServer, picture

import mmdata
from mmdata import cli, sample
from mmdata.recipe import parse
from mmdata.sample import SampleReport, render_sample, run_sample

ROWS = 40


@pytest.fixture(scope="module")
def server() -> Iterator[BadServer]:
    """Hands out 30 pictures, /0.jpg … /29.jpg, 16 × 16 px, and 10 that are broken."""
    good = {f"/{n}.jpg": ("image/jpeg", picture(16, 16)) for n in range(30)}
    bad = {f"/{n}.jpg": ("image/jpeg", b"no picture") for n in range(30, ROWS)}
    with BadServer(good | bad) as running:
        yield running


@pytest.fixture
def recipe(tmp_path: Path, server: BadServer, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """40 rows; `number` counts them, so a filter on it keeps a share that is known."""
    monkeypatch.chdir(tmp_path)
    rows = {
        "link": [server.url(f"/{n}.jpg") for n in range(ROWS)],
        "text": [None if n % 4 == 0 else f"picture {n}" for n in range(ROWS)],
        "number": list(range(ROWS)),
        "id": [f"uid-{n}" for n in range(ROWS)],
    }
    pq.write_table(pa.table(rows), "list.parquet")
    source = {
        "kind": "urls",
        "path": "list.parquet",
        "url": "link",
        "caption": "text",
        "columns": ["number"],
        "uid": "id",
    }
    return {
        "name": "tried",
        "dataset": "data",
        "source": source,
        "fetch": {"allow_private": True, "image_size": 16, "shard_rows": 16},
        "steps": ["probe_text", {"filter": {"first": "number < 20"}}, {"filter": {"told": "text_word_count = 2"}}],
        "export": {"path": "out"},
    }


def _try(recipe: dict[str, Any], rows: int, *overrides: str) -> SampleReport:
    Path("tried.yaml").write_text(yaml.safe_dump(recipe))
    return run_sample("tried.yaml", rows, overrides=overrides, quiet=True)


def test_the_whole_list_gives_the_truth(recipe: dict[str, Any]) -> None:
    report = _try(recipe, 1000)
    assert (report.list_rows, report.sample_rows, report.scale) == (40, 40, 1.0)
    # 10 of 40 fail, `first` drops 10, and of the 20 left 0 4 8 12 16 have no caption: 15 are kept.
    funnel = report.funnel
    assert (funnel.rows_in, funnel.kept, funnel.dropped, funnel.failed) == (40, 15, 15, 10)
    assert report.warnings == ()
    text = render_sample(report)
    assert "40 of 40 rows tried" in text
    assert "expected: 37.5% kept (15 rows), 25.0% failed" in text
    assert "  ingest: 75.0% of 40 go on" in text
    assert "  first: 66.7% of 30 go on" in text
    assert "  told: 75.0% of 20 go on" in text
    stored = mmdata.run(recipe, runner="inline").sql("SELECT sum(image_size) FROM rows").fetchall()
    assert [(report.stored_bytes,)] == stored


def test_a_part_of_the_list_is_scaled(recipe: dict[str, Any]) -> None:
    report = _try(recipe, 10)
    assert (report.list_rows, report.sample_rows, report.scale) == (40, 10, 4.0)
    assert report.funnel.rows_in == 10
    kept = report.funnel.kept
    assert f"expected: {kept / 10:.1%} kept ({4 * kept} rows)" in render_sample(report)


def test_rows_are_chosen_by_the_seed_from_the_whole_list(recipe: dict[str, Any]) -> None:
    def chosen(seed: int, rows: int = 8) -> list[int]:
        total, table = sample._choose(parse({**recipe, "seed": seed}), rows)
        assert total == ROWS
        return list(table.column("number").to_pylist())

    assert chosen(1) == chosen(1) == sorted(chosen(1))
    assert chosen(1) != chosen(2)
    assert set(chosen(1, 4)) < set(chosen(1, 8))
    # Every row has the same chance: over 200 seeds each of 40 rows comes 8 / 40 · 200 = 40 times, give or take
    # √(200 · 0.2 · 0.8) = 5.7; five times that is never reached by a fair choice.
    counts = [0] * ROWS
    for seed in range(200):
        for number in chosen(seed):
            counts[number] += 1
    assert sum(counts) == 1600
    assert all(abs(c - 40) < 28 for c in counts)


def test_filters_that_do_nothing_or_everything_are_warned_of(recipe: dict[str, Any]) -> None:
    idle = {"filter": {"idle": "number >= 0"}}
    all_gone = {"filter": {"gone": "number > 1000", "never_asked": "number > 5"}}
    report = _try({**recipe, "steps": [idle, all_gone]}, 1000)
    assert report.warnings == ("filter idle drops nothing", "filter gone drops everything that reaches it")
    assert render_sample(report).endswith(
        "warning: filter idle drops nothing\nwarning: filter gone drops everything that reaches it"
    )


def test_a_sample_leaves_nothing_behind(recipe: dict[str, Any], tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    Path("tried.yaml").write_text(yaml.safe_dump(recipe))
    before = sorted(p.name for p in tmp_path.iterdir())
    monkeypatch.setenv("MMDATA_SCRATCH", str(scratch))
    with pytest.raises(SystemExit) as done:
        cli.main(["run", "tried.yaml", "--sample", "12", "--set", "filters.first=true", "--quiet"])
    out, err = capsys.readouterr()
    assert (done.value.code, err) == (0, "")
    assert out.startswith("12 of 40 rows tried\nexpected: ")
    assert "warning: filter first drops nothing" in out
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert [p for p in scratch.rglob("*") if p.is_file()] == []


def test_a_sample_beside_a_dataset_leaves_it_alone(recipe: dict[str, Any], tmp_path: Path) -> None:
    mmdata.run(recipe, runner="inline")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    # Even one whose fetch options another dataset must not have.
    report = _try({**recipe, "fetch": {**recipe["fetch"], "image_size": 8}}, 5)
    assert report.sample_rows == 5
    after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != "tried.yaml"}
    assert after == before
