"""datacomp_image_clip over the metadata and embeddings of many rows: its memory is not theirs.

The shipped recipe's filters and groups, over a table without media with scores and CLIP embeddings attached. Peaks are
of the anonymous memory of a process that does nothing else.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import mmdata
from mmdata.catalogue import shipped_recipe
from mmdata.recipe_yaml import from_yaml

WIDTH = 512
_RUN = """
import json, re, sys, threading
import mmdata

peak, done = 0, threading.Event()

def watch():
    # Anonymous memory: pages of files that are mapped (scratch of attach and of groups) are the system's to take back.
    global peak
    while not done.wait(0.02):
        with open("/proc/self/status") as status:
            peak = max(peak, int(re.search(r"RssAnon:\\s+(\\d+)", status.read())[1]))

with open(sys.argv[1]) as file:
    recipe = json.load(file)
thread = threading.Thread(target=watch)
thread.start()
mmdata.run(recipe, runner="inline")
done.set()
thread.join()
print(peak // 1024)
"""
CAPTIONS = ["an old house by the river", "a red dog", "ein altes Haus am Fluss", "dog", ""]


def make_pool(folder: Path, rows: int, shard_rows: int) -> None:
    """`metadata/` and `embeddings/`, Parquet files of a shard's size; embeddings lie about one of 50 directions."""
    (folder / "metadata").mkdir(parents=True)
    (folder / "embeddings").mkdir()
    directions = np.random.default_rng(0).normal(size=(50, WIDTH)).astype(np.float32)
    for number, first in enumerate(range(0, rows, shard_rows)):
        count, rng = min(shard_rows, rows - first), np.random.default_rng(number + 1)
        uids = [f"{i:032x}" for i in range(first, first + count)]
        scores = rng.normal(0.2, 0.06, count).astype(np.float32)
        captions = [CAPTIONS[i] for i in rng.integers(0, len(CAPTIONS), count)]
        columns = {"uid": uids, "text": captions, "clip_l14_similarity_score": scores}
        pq.write_table(pa.table(columns), folder / "metadata" / f"{number:04d}.parquet")
        vectors = directions[rng.integers(0, 50, count)] + rng.normal(size=(count, WIDTH)).astype(np.float32)
        lists = pa.FixedSizeListArray.from_arrays(pa.array(vectors.astype(np.float16).reshape(-1)), WIDTH)
        pq.write_table(pa.table({"uid": uids, "l14_img": lists}), folder / "embeddings" / f"{number:04d}.parquet")
    wanted = np.random.default_rng(0).normal(size=(5_000, WIDTH)).astype(np.float32)
    np.save(folder / "targets.npy", directions[np.arange(5_000) % 10] + wanted)


def recipe(folder: Path, shard_rows: int) -> dict[str, Any]:
    """The shipped steps over the pool; its own scores and embeddings take the place of score_clip's."""
    text = shipped_recipe("datacomp_image_clip")
    replaced = {
        "top_fraction: {of: clip_score": "top_fraction: {of: clip_l14_similarity_score",
        "of: clip_image_embedding": "of: vectors_embedding",
        "targets: imagenet-train.npy": f"targets: {folder}/targets.npy, train_mb: 16",
    }
    for old, new in replaced.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    document: Any = from_yaml(text)
    steps = [s for s in document["steps"] if not (isinstance(s, dict) and "score_clip" in s)]
    vectors = {"path": str(folder / "embeddings"), "on": "uid", "columns": {"vectors_embedding": "l14_img"}}
    source = {"kind": "parquet", "media": "none", "path": str(folder / "metadata"), "uid": "uid"}
    return {
        "name": "image_clip",
        "dataset": str(folder / "dataset"),
        "source": source | {"columns": ["clip_l14_similarity_score"]},
        "fetch": {"shard_rows": shard_rows},
        "steps": [{"attach": vectors}, *steps],
        "export": {"format": "datacomp", "path": str(folder / "out")},
    }


def peak_mb(folder: Path, rows: int, shard_rows: int) -> int:
    """Of a process that runs the recipe."""
    make_pool(folder, rows, shard_rows)
    (folder / "recipe.json").write_text(json.dumps(recipe(folder, shard_rows)))
    command = [sys.executable, "-c", _RUN, str(folder / "recipe.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def require_whole(folder: Path, rows: int) -> None:
    """Every row has a verdict, and the subset is what the columns say."""
    ds = mmdata.open(folder / "dataset")
    [(total, kept)] = ds.sql("SELECT count(*), count(*) FILTER (verdict = 'kept') FROM samples").fetchall()
    assert total == rows
    assert rows / 500 < kept < rows / 5
    assert len(np.load(folder / "out" / "subset.npy")) == kept
    wrong = "top_fraction_kept AND cluster_images_is_target AND language = 'en' AND text_char_count > 5"
    [(should,)] = ds.sql(f"SELECT count(*) FROM samples WHERE {wrong}").fetchall()
    assert should == kept


def test_ten_times_the_shards(tmp_path: Path):
    """The same rows; a process that kept anything of a shard (views, column files, embeddings) would show it."""
    few = peak_mb(tmp_path / "few", 30_000, 6_000)
    many = peak_mb(tmp_path / "many", 30_000, 600)
    require_whole(tmp_path / "many", 30_000)
    print(f"peak {few} MB in 5 shards, {many} MB in 50")
    assert many - few < 15


@pytest.mark.long
def test_a_million_rows(tmp_path: Path):
    """Ten times the rows, ten times the shards: what grows are keys and numbers, not the 922 MB of embeddings more."""
    few = peak_mb(tmp_path / "few", 100_000, 10_000)
    many = peak_mb(tmp_path / "many", 1_000_000, 10_000)
    require_whole(tmp_path / "many", 1_000_000)
    print(f"peak {few} MB at 100,000 rows, {many} MB at 1,000,000")
    assert many - few < 400
