"""A table without pictures as a source: the metadata of a pool, filtered before anything is downloaded."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import mmdata
from mmdata.errors import RecipeError, SourceError
from mmdata.recipe import parse

ROWS = pa.table(
    {
        "id": ["a" * 32, "b" * 32, "c" * 32],
        "link": ["http://example.org/1", None, "http://example.org/3"],
        "text": ["a red dog", "a dog", None],
        "w": pa.array([640, 199, None], pa.int32()),
        "h": pa.array([480, 500, 300], pa.int32()),
        "score": [0.3, 0.2, 0.4],
    }
)


def recipe(folder: Path, **source: object) -> dict[str, object]:
    pq.write_table(ROWS, folder / "pool.parquet")
    given = {"kind": "parquet", "media": "none", "path": str(folder / "pool.parquet"), "columns": ["score"], **source}
    return {"name": "pool", "dataset": str(folder / "dataset"), "source": given}


def test_rows_as_they_stand(tmp_path: Path):
    ds = mmdata.run(recipe(tmp_path, uid="id", url="link", width="w", height="h"), runner="inline")
    query = "SELECT uid, url, caption, original_width_px, original_height_px, score, status, image_path FROM samples"
    assert ds.sql(f"{query} ORDER BY row_id").fetchall() == [
        ("a" * 32, "http://example.org/1", "a red dog", 640, 480, 0.3, "ok", None),
        ("b" * 32, None, "a dog", 199, 500, 0.2, "ok", None),
        ("c" * 32, "http://example.org/3", None, None, 300, 0.4, "ok", None),
    ]


def test_a_step_that_wants_a_picture_fails_its_rows_and_no_other_step(tmp_path: Path):
    steps = [{"filter": {"good": "score > 0.25"}}, {"hash_image": {"max_failed": 1.0, "on_error": "keep"}}]
    ds = mmdata.run({**recipe(tmp_path), "steps": steps}, runner="inline")
    assert ds.sql("SELECT verdict, reason, phash, image_hash_reason FROM samples ORDER BY row_id").fetchall() == [
        ("kept", None, None, "missing_media"),
        ("dropped", "good", None, "gated"),
        ("kept", None, None, "missing_media"),
    ]


def test_exports_hold_what_there_is(tmp_path: Path):
    export = {"format": "webdataset", "path": str(tmp_path / "out"), "columns": ["score"]}
    mmdata.run({**recipe(tmp_path), "export": export}, runner="inline")
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        assert tar.getnames() == [
            "000000000.txt",
            "000000000.json",
            "000000001.txt",
            "000000001.json",
            "000000002.txt",
            "000000002.json",
        ]
    assert pq.read_table(tmp_path / "out" / "00000.parquet")["score"].to_pylist() == [0.3, 0.2, 0.4]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"media": "image", "width": "w"}, "for media: none"),
        ({"image": "picture"}, "says there are none"),
        ({"media": "non"}, "source.media"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, str], words: str):
    source = {"kind": "parquet", "media": "none", "path": "x.parquet", **options}
    with pytest.raises(RecipeError, match=words):
        parse({"name": "pool", "dataset": "x", "source": source})


def test_a_column_that_is_not_there(tmp_path: Path):
    with pytest.raises(SourceError, match=r"no column 'wid' \(source.width\)"):
        mmdata.run(recipe(tmp_path, width="wid"), runner="inline")


@pytest.mark.parametrize("kind", [pa.float64(), pa.float32()])
def test_sides_as_pandas_writes_them(tmp_path: Path, kind: pa.DataType):
    """With one missing, a column of whole numbers becomes one of floats, and the missing one NaN."""
    given = recipe(tmp_path, width="w", height="h")
    sides = {"w": pa.array([640.0, float("nan"), None], kind), "h": pa.array([480.0, 500.0, float("nan")], kind)}
    pq.write_table(pa.table({"text": ROWS["text"], "score": ROWS["score"], **sides}), tmp_path / "pool.parquet")
    ds = mmdata.run(given, runner="inline")
    found = ds.sql("SELECT original_width_px, original_height_px FROM samples ORDER BY row_id").fetchall()
    assert found == [(640, 480), (None, 500), (None, None)]


@pytest.mark.parametrize("kind", [pa.float64(), pa.float32()])
def test_a_score_that_is_nan_is_missing(tmp_path: Path, kind: pa.DataType):
    """In SQL NaN is above all numbers: it would pass the threshold, and be the best of its cluster."""
    scores = pa.array([float("nan"), 0.5, None, float("inf"), 0.1], kind)
    pool = pa.table({"text": ["a red dog"] * 5, "score": scores, "wanted": [False, True, False, True, False]})
    steps = [
        {"exact_duplicates": {"of": ["caption"], "keep": {"best": "score"}}},
        {"filter": {"good": "score >= 0.3"}},
    ]
    given = {**recipe(tmp_path, columns=["score", "wanted"]), "steps": steps}
    pq.write_table(pool, tmp_path / "pool.parquet")
    ds = mmdata.run(given, runner="inline")
    found = ds.sql("SELECT exact_duplicates_rank, reason, score, wanted FROM samples ORDER BY row_id").fetchall()
    small = scores[4].as_py()  # 0.1, as wide as the column
    assert found == [
        (4, "good:null", None, False),
        (2, None, 0.5, True),
        (5, "good:null", None, False),
        (1, None, float("inf"), True),
        (3, "good", small, False),
    ]


@pytest.mark.parametrize("values", [[640.5, 1.0, 1.0], ["640", "wide", None]])
def test_sides_that_are_no_whole_numbers(tmp_path: Path, values: list[object]):
    given = recipe(tmp_path, width="w")
    pq.write_table(ROWS.drop(["w"]).append_column("w", pa.array(values)), tmp_path / "pool.parquet")
    with pytest.raises(SourceError, match=r"column 'w' \(source.width\) does not hold whole numbers"):
        mmdata.run(given, runner="inline")
