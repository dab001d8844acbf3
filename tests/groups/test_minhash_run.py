"""Captions hashed and clustered by a recipe over a dataset of several shards, and the page about it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from glosses import glosses, planted
from PIL import Image

import mmdata
from mmdata.errors import RecipeError
from mmdata.plan import plan_recipe
from mmdata.recipe import parse

ROOT = Path(__file__).resolve().parents[2]
STEPS = [
    {"hash_text": {"unit": "words", "size": 1}},
    {"minhash_duplicates": {"threshold": 0.6, "prefer": ["length(caption) desc"]}},
    {"filter": {"said_once": "minhash_duplicates_rank = 1"}},
]


def recipe(folder: Path, *steps: object) -> dict:
    source = {"kind": "images", "path": str(folder / "images")}
    return {"name": "said", "dataset": str(folder / "said"), "source": source, "steps": list(steps)}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("said")
    captions, _ = planted(glosses(30, first=5000), copies=30, seed=2)
    (folder / "images").mkdir()
    for number, caption in enumerate(captions):
        stem = folder / "images" / f"{number:03d}"
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(stem.with_suffix(".png"))
        stem.with_suffix(".txt").write_text(caption)
    Image.fromarray(np.full((8, 8, 3), 99, np.uint8)).save(folder / "images" / "060.png")  # without a caption
    mmdata.run(recipe(folder, *STEPS), runner="inline")
    return folder


def test_the_longest_of_each_cluster_is_kept(work: Path):
    folder = work
    ds = mmdata.open(str(folder / "said"))
    query = """
    SELECT s.caption, s.minhash_duplicates_rank, s.minhash_duplicates_similarity, f.caption
    FROM samples s JOIN samples f ON f.key = s.minhash_duplicates_of
    """
    rows = ds.sql(query).fetchall()
    assert len(rows) == 61
    copies = [r for r in rows if r[1] > 1]
    assert len(copies) >= 10
    for caption, _, similarity, first in copies:
        a, b = (set(re.findall(r"\w+", t.lower())) for t in (caption, first))
        assert similarity == pytest.approx(len(a & b) / len(a | b), abs=0.2)
        assert len(first) >= len(caption)
    [(rank, similarity)] = ds.sql(
        "SELECT minhash_duplicates_rank, minhash_duplicates_similarity FROM samples WHERE caption IS NULL"
    ).fetchall()
    assert (rank, similarity) == (1, 1.0)
    kept = ds.sql("SELECT count(*) FROM samples WHERE verdict = 'kept'").fetchall()
    assert kept == [(61 - len(copies),)]


def test_signatures_stay_out_of_samples(work: Path):
    ds = mmdata.open(str(work / "said"))
    assert "minhash" not in [c[0] for c in ds.sql("DESCRIBE samples").fetchall()]
    [name] = [p.name for p in (work / "said" / "columns").glob("hash_text-*")]
    [(length, kind)] = ds.sql(
        f'SELECT DISTINCT len(minhash), typeof(minhash) FROM columns."{name}" WHERE minhash IS NOT NULL'
    ).fetchall()
    assert (length, kind) == (128, "UINTEGER[]")


def test_a_plan_refuses_what_cannot_be(work: Path):
    with pytest.raises(RecipeError, match="30 bands of 5 rows are more than the 128 places"):
        plan_recipe(parse(recipe(work, "hash_text", {"minhash_duplicates": {"bands": 30, "rows": 5}})))
    with pytest.raises(RecipeError, match="not signatures"):
        plan_recipe(parse(recipe(work, "hash_image", {"minhash_duplicates": {"of": "phash"}})))


def test_the_steps_of_the_page_are_proved(work: Path):
    page = (ROOT / "docs/caption-duplicates.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```yaml\n(.*?)^```", page, re.S | re.M)
    assert len(blocks) >= 3
    for block in blocks:
        assert plan_recipe(parse(recipe(work, *yaml.safe_load(block)))).steps
