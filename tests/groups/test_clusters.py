"""Which row of a cluster stays (`keep`), and what a run says of the clusters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import held_rows
import pyarrow as pa
import pytest
import synthetic
from pydantic import ValidationError

import mmdata
from mmdata.errors import RecipeError
from mmdata.groups.exact_duplicates import ExactDuplicates, ExactDuplicatesOptions
from mmdata.groups.minhash_duplicates import MinhashDuplicates, MinhashDuplicatesOptions
from mmdata.groups.near_duplicates import NearDuplicates, NearDuplicatesOptions
from mmdata.groups.semantic_duplicates import SemanticDuplicates, SemanticDuplicatesOptions

# px, and levels of grey; flat pictures of any grey but black have one hash
PICTURES = [(40, 90), (80, 10), (60, 200), (80, 30)]


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("keep")
    (folder / "pictures").mkdir()
    for number, (side, grey) in enumerate(PICTURES):
        (folder / "pictures" / f"{number}.png").write_bytes(synthetic.png(grey, side))
    source = {"kind": "images", "path": str(folder / "pictures")}
    return {"name": "keep", "dataset": str(folder / "dataset"), "source": source}


@pytest.mark.parametrize(
    ("keep", "path"),
    [("first", "0.png"), ("largest", "1.png"), ({"best": "brightness"}, "2.png"), ({"best": "brightnes"}, None)],
)
def test_which_row_stays(document: dict[str, Any], keep: Any, path: str | None):
    near = {"near_duplicates": {"keep": keep}}
    steps = ["hash_image", "probe_image", near, {"filter": {"one": "near_duplicates_rank = 1"}}]
    if path is None:
        with pytest.raises(RecipeError, match=r"brightnes.*brightness"):
            mmdata.run({**document, "steps": steps}, runner="inline")
        return
    ds = mmdata.run({**document, "steps": steps}, runner="inline")
    assert ds.samples().select("path, near_duplicates_count").fetchall() == [(path, 4)]


@pytest.mark.parametrize("options", [NearDuplicatesOptions, ExactDuplicatesOptions])
def test_keep_is_a_term_of_prefer(options: type[NearDuplicatesOptions]):
    assert options.model_validate({"keep": {"best": 'a "b"'}}) == options.model_validate({"prefer": ['"a ""b""" desc']})
    assert options.model_validate({"keep": "first"}) == options()
    for wrong in ("larges", {"best": 1}, {"bst": "x"}, {"best": "a", "b": "c"}, 5, ["first"]):
        with pytest.raises(ValidationError, match=r"keep: expected largest, first or \{best: <column>\}, got"):
            options.model_validate({"keep": wrong})
    with pytest.raises(ValidationError, match="give one of them"):
        options.model_validate({"keep": "largest", "prefer": ["key"]})


def test_a_run_shows_how_many_clusters_there_are(document: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    steps = ["hash_image", {"near_duplicates": {"as": "looks", "max_distance": 5}}]
    ds = mmdata.run({**document, "steps": steps}, runner="inline", quiet=False)
    key = ds.sql("SELECT key FROM samples ORDER BY row_id LIMIT 1").fetchall()[0][0]
    assert f"looks: 1 clusters, the largest of 4 rows (first: {key})\n" in capsys.readouterr().err


def test_remarks(tmp_path: Path):
    rows = pa.table({"row_id": range(6), "key": list("abcdef"), "sha256": ["x", "y", "x", "z", "x", None]})
    exact = ExactDuplicates(ExactDuplicatesOptions())
    exact.compute(rows)
    assert exact.remark == "4 clusters, the largest of 3 rows (first: a)"
    near = NearDuplicates(NearDuplicatesOptions())
    spread = [i * 0x9E3779B97F4A7C15 % 2**64 for i in range(10_000)]
    low = [value >> 24 for value in spread]  # the upper 24 bits of all are 0
    for hashes, uneven in ((spread, False), (spread[5000:] + low, True)):
        names = [str(i) for i in range(len(hashes))]
        table = pa.table({"row_id": range(len(hashes)), "key": names, "phash": pa.array(hashes, pa.uint64())})
        held_rows.compute(near, table, tmp_path, part_rows=5000)
        assert ("times more than 4,096 of them" in near.remark) == uneven
    nothing = {"row_id": pa.array([], pa.int64()), "key": pa.array([], pa.string()), "phash": pa.array([], pa.uint64())}
    held_rows.compute(near, pa.table(nothing), tmp_path)
    assert near.remark.startswith("no rows")


def test_remarks_of_groups_that_stream(tmp_path: Path):
    """Rows a and c are alike."""
    vectors = pa.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], pa.list_(pa.float16(), 2))
    signatures = pa.array([[1] * 16, list(range(2, 18)), [1] * 16], pa.list_(pa.uint32(), 16))
    rows = pa.table({"row_id": range(3), "key": list("abc"), "clip_image_embedding": vectors, "minhash": signatures})
    groups = [
        SemanticDuplicates(SemanticDuplicatesOptions(keep="first")),
        MinhashDuplicates(MinhashDuplicatesOptions()),
    ]
    for group in groups:
        held_rows.compute(group, rows, tmp_path)
        assert group.remark == "2 clusters, the largest of 2 rows (first: a)"
