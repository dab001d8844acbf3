"""`mmdata retry`: failed rows are fetched again into new generations, and only they are computed."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faulty
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from server import JPEG, BadServer
from typer.testing import CliRunner

import mmdata
from mmdata import retry_work
from mmdata.cli import app
from mmdata.errors import RecipeError, SourceError, StoreError
from mmdata.store import Store

# A host that was away when the list was fetched, and is back: `/flaky/503/1` answers 503 once, then a picture.
FIXTURES = Path(__file__).parent / "fixtures"
ROWS = 12
SHARD = 4


@pytest.fixture
def server() -> Iterator[BadServer]:
    with BadServer() as running:
        yield running


def list_of(server: BadServer, path: Path) -> list[str]:
    """Rows 1, 5, 9 fail once with 503, row 6 always with 404; all others are ok."""
    urls = [server.url(f"/ok/{i}") for i in range(ROWS)]
    for i in (1, 5, 9):
        urls[i] = server.url(f"/flaky/503/1?{i}")
    urls[6] = server.url("/status/404")
    pq.write_table(pa.table({"url": urls, "caption": [f"row {i}" for i in range(ROWS)]}), path)
    return urls


def recipe_of(tmp_path: Path, **fetch: Any) -> dict[str, Any]:
    return {
        "name": "pets",
        "dataset": str(tmp_path / "pets"),
        "source": {"kind": "urls", "path": str(tmp_path / "list.parquet"), "caption": "caption"},
        "fetch": {"allow_private": True, "robots": "ignore", "shard_rows": SHARD, "timeout_s": 5, **LIFTED, **fetch},
        "steps": ["probe_image", {"filter": {"wide": "original_width_px >= 100"}}],
        "export": {"path": str(tmp_path / "out"), "columns": ["caption"]},
    }


LIFTED = {"per_host": 100, "per_host_rate": None}


def samples(ds: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = ds.sql("SELECT * FROM samples ORDER BY row_id").to_arrow_table().to_pylist()
    return rows


def test_failed_rows_are_fetched_and_computed_alone(server: BadServer, tmp_path: Path) -> None:
    list_of(server, tmp_path / "list.parquet")
    ds = mmdata.run(recipe_of(tmp_path), runner="inline")
    before = samples(ds)
    assert [r["status"] for r in before] == [
        "http_5xx" if i in (1, 5, 9) else "http_4xx" if i == 6 else "ok" for i in range(ROWS)
    ]
    asked = sum(server.hits.values())
    again = ds.retry(["http_5xx", "timeout"], runner="inline")
    assert sum(server.hits.values()) == asked + 3
    after = samples(again)
    assert [r["status"] for r in after] == ["http_4xx" if i == 6 else "ok" for i in range(ROWS)]
    for i, (was, now) in enumerate(zip(before, after, strict=True)):
        assert (now["row_id"], now["key"], now["uid"], now["url"]) == (
            was["row_id"],
            was["key"],
            was["uid"],
            was["url"],
        )
        if i not in (1, 5, 9):
            assert now == was
        else:
            assert (now["verdict"], now["attempts"], now["original_width_px"]) == ("kept", 2, 400)
            assert again.read_media(now["image_path"], now["image_offset"], now["image_size"])[:2] == b"\xff\xd8"
    # One tar for the rows of all three shards; one new generation of each; nothing else was computed.
    assert {now["image_path"] for i, now in enumerate(after) if i in (1, 5, 9)} == {
        f"media/{name}" for name in again.store.list("media") if name.startswith("retry-")
    }
    assert len([n for n in again.store.list("media") if n.startswith("retry-")]) == 1
    assert sorted(again.store.row_files().values()) == [f"rows/{s:05d}.g1.parquet" for s in range(3)]
    assert again.report is not None
    assert again.report.work["probe_image"].computed == 3
    # The export at its place has followed.
    exported = pq.read_table(sorted((tmp_path / "out").glob("*.parquet")), columns=["key"])["key"].to_pylist()
    assert exported == [r["key"] for i, r in enumerate(after) if i != 6]


def run_cli(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--error", "timeout,opted_out"],
            "status opted_out are never fetched again: their hosts asked not to be used",
        ),
        (["--error", "ok"], "status ok are never fetched again"),
        (["--error", "purged"], "status purged are never fetched again"),
        (["--error", "timeouts"], "no status is called 'timeouts'; did you mean 'timeout'"),
        (["--set", "fetch.image_size=99"], "--set fetch.image_size=99: a retry does not change what is stored"),
        (["--set", "name=x"], "--set name=x: a retry does not change what is stored"),
        (["--set", "fetch.timeout_s=-1"], "fetch.timeout_s"),
        (["--runner", "fast"], "--runner fast: expected"),
    ],
)
def test_what_is_refused_changes_nothing(server: BadServer, tmp_path: Path, arguments: list[str], message: str) -> None:
    list_of(server, tmp_path / "list.parquet")
    mmdata.run(recipe_of(tmp_path), runner="inline")
    files = sorted(str(p) for p in tmp_path.rglob("*"))
    done = run_cli("retry", str(tmp_path / "pets"), *arguments)
    assert isinstance(done.exception, RecipeError)
    assert message in str(done.exception)
    assert sorted(str(p) for p in tmp_path.rglob("*")) == files


def test_no_dataset_and_no_recipe(tmp_path: Path) -> None:
    done = run_cli("retry", str(tmp_path / "none"))
    assert isinstance(done.exception, SourceError)
    assert "there is no dataset at" in str(done.exception)


def test_stopped_between_two_shards_the_next_retry_does_the_rest(
    server: BadServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list_of(server, tmp_path / "list.parquet")
    mmdata.run(recipe_of(tmp_path), runner="inline")
    real, calls = retry_work.publish_generation, []

    def stopped(store: Store, shard: int, *arguments: Any, **more: Any) -> Any:
        calls.append(shard)
        if len(calls) == 2:
            raise StoreError("the disk is full")
        return real(store, shard, *arguments, **more)

    monkeypatch.setattr(retry_work, "publish_generation", stopped)
    with pytest.raises(StoreError, match="the disk is full"):
        mmdata.open(tmp_path / "pets").retry(runner="inline")
    monkeypatch.undo()
    store = Store(str(tmp_path / "pets"))
    assert sorted(store.row_files().values()) == [f"rows/{s:05d}.g{int(s == calls[0])}.parquet" for s in range(3)]
    asked = sum(server.hits.values())
    again = mmdata.open(tmp_path / "pets").retry(runner="inline")
    assert sum(server.hits.values()) == asked + 2  # those of the other two shards
    assert [r["status"] for r in samples(again)] == ["http_4xx" if i == 6 else "ok" for i in range(ROWS)]
    assert again.report is not None
    assert again.report.work["probe_image"].computed == 3
    # Then nothing is left to do, and nothing is written.
    names = sorted(store.row_files().values())
    last = mmdata.open(tmp_path / "pets").retry(runner="inline")
    assert last.report is not None
    assert last.report.work["probe_image"].computed == 0
    assert sorted(store.row_files().values()) == names


def test_what_cannot_be_asked_keeps_what_it_had(tmp_path: Path) -> None:
    """A host that is left alone now: its rows would be `deferred`, but how they failed is known better."""
    with BadServer() as gone:
        url = gone.url("/ok")
    pq.write_table(pa.table({"url": [f"{url}?{i}" for i in range(3)]}), tmp_path / "list.parquet")
    recipe = recipe_of(tmp_path, host_failures=1, host_cooldown_s=3000, per_host=1, defer_after_s=0)
    del recipe["source"]["caption"], recipe["export"]
    ds = mmdata.run({**recipe, "steps": []}, runner="inline")
    before = samples(ds)
    assert sorted(r["status"] for r in before) == ["connect", "deferred", "deferred"]
    after = samples(ds.retry(runner="inline"))
    assert after == before


def test_from_another_folder_by_plain_processes(
    server: BadServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths of the recipe are relative: the dataset and its list are found, an export is not made in a wrong place."""
    list_of(server, tmp_path / "list.parquet")
    recipe = recipe_of(tmp_path)
    recipe |= {"dataset": "pets", "export": {"path": "out"}}
    recipe["source"]["path"] = "list.parquet"
    monkeypatch.chdir(tmp_path)
    mmdata.run(recipe, runner="inline")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    done = run_cli("retry", "../pets", "--error", "http_5xx", "--runner", "processes", "--workers", "1", "--quiet")
    assert done.exception is None, done.output
    assert "fetched 3 rows again: 3 ok" in done.output
    assert "there is no export at out, seen from here" in done.output
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert [r["status"] for r in samples(mmdata.open("../pets"))].count("ok") == ROWS - 1


def test_a_layout_follows(server: BadServer, tmp_path: Path) -> None:
    list_of(server, tmp_path / "list.parquet")
    ds = mmdata.run({**recipe_of(tmp_path, layout="webdataset"), "steps": []}, runner="inline")
    root = Path(ds.store.root)
    assert json.loads((root / "00000_stats.json").read_text())["successes"] == 3
    ds.retry(["http_5xx"], runner="inline")
    for shard, ok in ((0, 4), (1, 3), (2, 4)):
        assert json.loads((root / f"{shard:05d}_stats.json").read_text())["successes"] == ok
        table = pq.read_table(root / f"{shard:05d}.parquet")
        keys = [k for k, s in zip(*(table[c].to_pylist() for c in ("key", "status")), strict=True) if s == "success"]
        with tarfile.open(root / f"{shard:05d}.tar") as tar:
            pictures = {m.name.partition(".")[0]: tar.extractfile(m).read() for m in tar if m.name.endswith(".jpg")}  # type: ignore[union-attr]
        assert sorted(pictures) == keys
        assert {p[:2] for p in pictures.values()} == {b"\xff\xd8"}


def test_what_the_list_says_of_a_row_still_holds(server: BadServer, tmp_path: Path) -> None:
    """The hashes of the list are not among the columns: the list is read again."""
    urls = list_of(server, tmp_path / "list.parquet")
    right = hashlib.sha256(JPEG).hexdigest()
    table = pa.table({"url": urls, "caption": urls, "sha256": ["0" * 64 if i == 5 else right for i in range(ROWS)]})
    pq.write_table(table, tmp_path / "list.parquet")
    ds = mmdata.run(recipe_of(tmp_path, verify_hash=["sha256", "sha256"]), runner="inline")
    assert [r["status"] for r in samples(ds)].count("ok") == 8
    after = samples(ds.retry(["http_5xx"], runner="inline"))
    assert [after[i]["status"] for i in (1, 5, 9)] == ["ok", "hash_mismatch", "ok"]


def test_adopted_rows_are_left_alone(server: BadServer, tmp_path: Path) -> None:
    """A picture that does not decode lies where it was adopted; only the list's rows are fetched."""
    list_of(server, tmp_path / "list.parquet")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(JPEG)
    (tmp_path / "photos" / "b.jpg").write_bytes(b"\xff\xd8\xff broken")
    recipe = recipe_of(tmp_path)
    recipe["source"] = [{"kind": "images", "path": str(tmp_path / "photos")}, recipe["source"]]
    ds = mmdata.run({**recipe, "steps": []}, runner="inline")
    failed = [r["status"] for r in samples(ds) if r["status"] != "ok"]
    adopted = failed[0]
    assert adopted not in ("http_5xx", "http_4xx")
    after = samples(ds.retry([adopted, "http_5xx"], runner="inline"))
    assert [r["status"] for r in after if r["status"] != "ok"] == [adopted, "http_4xx"]


def test_a_picture_that_kills_its_worker_costs_its_row(tmp_path: Path) -> None:
    """The worker dies while it decodes, twice with that picture alone; the other row that came is stored."""
    pictures = {"/first": ("image/jpeg", JPEG)}
    with BadServer(pictures) as server:
        pq.write_table(
            pa.table({"url": [server.url(p) for p in ("/ok", "/late", "/killer")]}), tmp_path / "list.parquet"
        )
        recipe = recipe_of(tmp_path)
        del recipe["source"]["caption"], recipe["export"]
        mmdata.run({**recipe, "steps": []}, runner="inline")
        pictures |= {"/late": ("image/jpeg", JPEG), "/killer": ("image/jpeg", JPEG + faulty.KILLER)}
        environment = {**os.environ, "PYTHONPATH": str(FIXTURES / "deadly"), "MMDATA_TEST_DEADLY": "1"}
        command = [sys.executable, "-c", "from mmdata.cli import main; main()", "retry", str(tmp_path / "pets")]
        command += ["--error", "http_4xx", "--runner", "processes", "--workers", "1"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    found = mmdata.open(tmp_path / "pets").sql("SELECT status, status_detail FROM rows ORDER BY row_id").fetchall()
    assert found == [("ok", None), ("ok", None), ("decode", "worker_died")]
