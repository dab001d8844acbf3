"""The main job on real input: every tuxpaint stamp, 10 % broken URLs, a real nginx, and what other tools then read."""

from __future__ import annotations

import gc
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import stamps
import webdataset
import yaml
from PIL import Image

import mmdata
from mmdata.answers import export_dataset
from mmdata.dataset import Dataset

# webdataset 1.0 and datasets 5 leave the tars they read to the garbage collector, which is theirs to mend
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "default::pytest.PytestUnraisableExceptionWarning")

# One server has the whole list, and a tenth of it is broken in a row.
OPEN = {"allow_private": True, "per_host": 64, "per_host_rate": None, "host_failures": 1000}


@pytest.fixture(autouse=True)
def _collect() -> Iterator[None]:
    yield
    gc.collect()


@dataclass
class Job:
    """A finished run over the stamps, and the list it came from."""

    ds: Dataset
    rows: list[dict[str, str | None]]
    out: Path
    log: Path


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    folder = tmp_path_factory.mktemp("stamps")
    with stamps.nginx(stamps.STAMPS, folder / "nginx") as url:
        rows = stamps.stamp_list(url)
        pq.write_table(pa.Table.from_pylist(rows), folder / "stamps.parquet")
        recipe = {
            "name": "stamps",
            "dataset": str(folder / "dataset"),
            "source": {
                "kind": "urls",
                "path": str(folder / "stamps.parquet"),
                "caption": "caption",
                "columns": ["note"],
            },
            "fetch": {**OPEN, "shard_rows": 250, "image_size": 224, "encode_format": "png"},
            "steps": [
                "probe_image",
                "probe_text",
                {"filter": {"basic": "least(original_width_px, original_height_px) >= 50 AND aspect_ratio <= 3"}},
                "hash_image",
                {"near_duplicates": {"of": "phash", "max_distance": 4}},
                {"filter": {"unique": "near_duplicates_rank = 1"}},
            ],
            "export": {"path": str(folder / "out"), "shard_rows": 200, "columns": ["note", "aspect_ratio"]},
        }
        ds = mmdata.run(recipe, runner="inline")
        yield Job(ds, rows, folder / "out", folder / "nginx" / "access.log")


def _kept(job: Job) -> list[dict[str, object]]:
    columns = "key, url, caption, note, width_px, height_px, sha256"
    names = [c.strip() for c in columns.split(",")]
    rows = job.ds.sql(f"SELECT {columns} FROM samples WHERE verdict = 'kept' ORDER BY row_id").fetchall()
    return [dict(zip(names, row, strict=True)) for row in rows]


def _stored(job: Job) -> dict[str, bytes]:
    """Key → the bytes in the tar that ingest wrote, read with Python's file alone."""
    query = "SELECT key, image_path, image_offset, image_size FROM samples WHERE verdict = 'kept'"
    found = {}
    for key, path, offset, size in job.ds.sql(query).fetchall():
        with open(Path(job.ds.store.root) / path, "rb") as tar:
            tar.seek(offset)
            found[key] = tar.read(size)
    return found


def test_every_row_of_the_list_has_a_verdict_and_a_reason(job: Job) -> None:
    assert len(job.rows) >= 780 * 1.09
    [(rows, kept, dropped, failed)] = job.ds.sql(
        "SELECT count(*), count(*) FILTER (verdict = 'kept'), count(*) FILTER (verdict = 'dropped'), "
        "count(*) FILTER (verdict = 'failed') FROM samples"
    ).fetchall()
    assert rows == len(job.rows) == kept + dropped + failed
    assert kept > 600
    assert job.ds.sql("SELECT count(*) FROM samples WHERE verdict <> 'kept' AND reason IS NULL").fetchall() == [(0,)]
    urls = [r[0] for r in job.ds.sql("SELECT url FROM samples ORDER BY row_id").fetchall()]
    assert urls == [r["url"] for r in job.rows]


def test_the_broken_urls_and_only_they_fail_with_the_right_reason(job: Job) -> None:
    expected = {
        "/missing/": "http_4xx",
        "/broken/500": "http_5xx",
        "/broken/html": "not_media",
        "/broken/empty": "not_media",
        "not a url": "bad_url",
    }
    found = job.ds.sql("SELECT url, caption, status FROM samples ORDER BY row_id").fetchall()
    for url, caption, status in found:
        reasons = [reason for word, reason in expected.items() if word in url]
        assert bool(reasons) == caption.startswith("broken ")
        assert status == (reasons[0] if reasons else "ok"), url
    assert {status for *_, status in found} == {"ok", *expected.values()}


def test_the_server_saw_each_url_once(job: Job) -> None:
    asked = [line.split('"')[1].split()[1] for line in job.log.read_text().splitlines()]
    listed = ["/" + str(r["url"]).split("/", 3)[3] for r in job.rows if str(r["url"]).startswith("http")]
    # The fixture asks until nginx is up; robots.txt is asked for once.
    assert sorted(asked) == sorted([*listed, "/broken/empty", "/robots.txt"])


def test_webdataset_reads_the_export(job: Job) -> None:
    shards = [str(p) for p in sorted(job.out.glob("*.tar"))]
    assert len(shards) == -(-len(_kept(job)) // 200)
    dataset = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False)
    stored = _stored(job)
    for sample, row in zip(dataset, _kept(job), strict=True):
        assert sample["__key__"] == row["key"]
        assert sample["txt"].decode() == row["caption"]
        assert json.loads(sample["json"])["url"] == row["url"]
        assert sorted(k for k in sample if not k.startswith("__")) == ["json", "png", "txt"]
        assert sample["png"] == stored[str(row["key"])]


def test_hugging_face_datasets_reads_the_export_with_a_column_that_is_null_at_first(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    import datasets

    files = [str(p) for p in sorted(job.out.glob("*.tar"))]
    read = datasets.load_dataset(
        "webdataset", data_files={"train": files}, split="train", cache_dir=str(tmp_path / "cache")
    )
    rows = _kept(job)
    without = sum(r["note"] is None for r in rows)
    assert 0 < without <= 5
    assert all(r["note"] is None for r in rows[:without])
    assert len(read) == len(rows)
    stored = _stored(job)
    for sample, row in zip(read, rows, strict=True):
        assert sample["txt"] == row["caption"]
        assert sample["__key__"] == row["key"]
        assert np.array_equal(np.asarray(sample["png"]), np.asarray(Image.open(io.BytesIO(stored[str(row["key"])]))))


def test_duckdb_and_pandas_read_captions_and_notes_without_mmdata(job: Job) -> None:
    rows = _kept(job)
    pattern = str(job.out / "*.parquet")
    by_duckdb = duckdb.sql(f"SELECT key, caption, note FROM read_parquet('{pattern}') ORDER BY key").fetchall()
    assert by_duckdb == [(r["key"], r["caption"], r["note"]) for r in rows]
    frame = pd.concat([pd.read_parquet(p) for p in sorted(job.out.glob("*.parquet"))])
    assert frame["caption"].tolist() == [r["caption"] for r in rows]
    assert frame["note"].isna().tolist() == [r["note"] is None for r in rows]


def test_duckdb_and_pandas_read_pictures_from_the_parquet_export(job: Job, tmp_path: Path) -> None:
    export_dataset(job.ds, {"format": "parquet", "path": str(tmp_path / "out"), "shard_rows": 200})
    stored = _stored(job)
    pattern = str(tmp_path / "out" / "*.parquet")
    assert dict(duckdb.sql(f"SELECT key, image.bytes FROM read_parquet('{pattern}')").fetchall()) == stored
    frame = pd.concat([pd.read_parquet(p) for p in sorted((tmp_path / "out").glob("*.parquet"))])
    assert {k: i["bytes"] for k, i in zip(frame["key"], frame["image"], strict=True)} == stored


def test_pixels_are_the_stamps_on_white_scaled_to_224(job: Job) -> None:
    """Export → Pillow, against the Debian file → Pillow: composited on white, short side 224, mean over all pixels."""
    files = {f"{p.relative_to(stamps.STAMPS)}": p for p, _ in stamps.stamp_pairs()}
    dataset = webdataset.WebDataset([str(p) for p in sorted(job.out.glob("*.tar"))], shardshuffle=False)
    differences = []
    for sample in list(dataset)[::10]:
        url = json.loads(sample["json"])["url"]
        original = Image.open(files[url.split("/", 3)[3]]).convert("RGBA")
        white = Image.alpha_composite(Image.new("RGBA", original.size, "white"), original).convert("RGB")
        got = np.asarray(Image.open(io.BytesIO(sample["png"])))
        assert min(got.shape[:2]) == 224
        # shrinking averages areas, enlarging is Lanczos (8 taps in OpenCV, 6 in Pillow)
        kernel = Image.Resampling.LANCZOS if min(original.size) < 224 else Image.Resampling.BOX
        want = np.asarray(white.resize((got.shape[1], got.shape[0]), kernel))
        differences.append(np.abs(got.astype(float) - want).mean())
    assert len(differences) > 50
    assert np.median(differences) < 2.0
    assert max(differences) < 8.0


def test_the_same_recipe_again_does_nothing(job: Job) -> None:
    assert job.ds.current is not None
    tree = {p: p.stat().st_mtime_ns for p in Path(job.ds.store.root).rglob("*.parquet")}
    again = mmdata.run(yaml.safe_load(job.ds.current.recipe), runner="inline")
    assert again.report is not None
    assert not again.report.changed
    assert again.report.media_reads == 0
    assert sum(w.computed for w in again.report.work.values()) == 0
    assert {p: p.stat().st_mtime_ns for p in Path(job.ds.store.root).rglob("*.parquet")} == tree
