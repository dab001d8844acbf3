"""A DataComp-shaped pool, adopted, filtered by DataComp's rules, and a subset file that its resharder takes.

The selection is computed a second time by pandas on the pool's own files; the reader of subset files and the pass over
the tars follow resharder.py (mlfoundations/datacomp): `load_subset`, and `process_example` in `copy_worker`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datacomp_pool
import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import webdataset

import mmdata
from mmdata.dataset import Dataset

# webdataset 1.0 leaves the tars it reads to the garbage collector, which is theirs to mend
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "default::pytest.PytestUnraisableExceptionWarning")

THRESHOLD = 0.243  # L/14, keeps about 30 % of DataComp's pool
U16 = np.dtype("u8,u8")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> datacomp_pool.Pool:
    return datacomp_pool.make_pool(tmp_path_factory.mktemp("pool") / "data")


def source(pool: datacomp_pool.Pool) -> dict[str, Any]:
    """The script's data_dir: shards and metadata are found below it."""
    return {"kind": "datacomp", "path": str(pool.folder)}


def metadata_of(pool: datacomp_pool.Pool) -> str:
    return str(pool.folder / "metadata" / "small")


@pytest.fixture(scope="module")
def ds(pool: datacomp_pool.Pool, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("curated")
    metadata = metadata_of(pool)
    scores = {"l14": "clip_l14_similarity_score", "b32": "clip_b32_similarity_score"}
    recipe = {
        "name": "pool",
        "dataset": str(folder / "dataset"),
        "source": source(pool),
        "steps": [
            {"attach": {"path": metadata, "on": "uid", "columns": scores, "as": "scores"}},
            {"attach": {"path": metadata, "on": "uid", "columns": {"embedding": "l14_img"}, "as": "vectors"}},
            "probe_text",
            {"filter": {"long_text": "text_word_count > 2 AND text_char_count > 5"}},
            {"filter": {"large": "least(original_width_px, original_height_px) >= 200"}},
            {
                "filter": {
                    "square": "greatest(original_width_px, original_height_px)"
                    " <= 3.0 * least(original_width_px, original_height_px)"
                }
            },
            {"filter": {"aligned": f"scores_l14 >= {THRESHOLD}"}},
        ],
        "export": {"format": "datacomp", "path": str(folder / "subset")},
    }
    return mmdata.run(recipe, runner="inline")


@pytest.fixture(scope="module")
def expected(pool: datacomp_pool.Pool) -> set[str]:
    """DataComp's basic rules without the language, and the CLIP threshold, by pandas on the pool's files."""
    rows = pool.metadata
    sides = rows[["original_width", "original_height"]]
    short, long = sides.min(axis=1), sides.max(axis=1)
    chosen = (
        (rows["clip_l14_similarity_score"] >= THRESHOLD)
        & (rows["text"].map(lambda t: len(t.split()) > 2 and len(t) > 5))
        & (short >= 200)
        & (long / short <= 3.0)
    )
    there = pool.downloaded()
    found = set(rows[chosen]["uid"]) & set(there[there["status"] == "success"]["uid"])
    assert 5 < len(found) < 40  # neither trivial
    return found


def load_subset(path: Path) -> npt.NDArray[Any]:
    """As the resharder loads it: the NumPy magic, mapped, of dtype u8,u8."""
    assert path.read_bytes()[:6] == b"\x93NUMPY"
    subset = np.load(path, mmap_mode="r", allow_pickle=False)
    assert subset.dtype == U16
    return subset


def uids_of(subset: npt.NDArray[Any]) -> list[str]:
    return [f"{int(high):016x}{int(low):016x}" for high, low in subset]


def subset_file(ds: Dataset) -> Path:
    [path] = (Path(ds.url if hasattr(ds, "url") else ds.store.url).parent / "subset").glob("*.npy")
    return path


def test_every_row_of_the_pool_is_there_once(pool: datacomp_pool.Pool, ds: Dataset) -> None:
    """Keys and uids are the pool's; a failed download keeps its reason, a lost shard's rows are missing_media."""
    there = pool.downloaded()
    rows = ds.sql("SELECT uid, key, status, caption, url FROM rows").df()
    assert sorted(rows["uid"]) == sorted(pool.metadata["uid"])
    by_uid = rows.set_index("uid")
    for uid, key, status, text in there[["uid", "key", "status", "caption"]].itertuples(index=False):
        assert tuple(by_uid.loc[uid, ["key", "caption"]]) == (key, text)
        assert by_uid.loc[uid, "status"] == {"success": "ok", "failed_to_download": "http_4xx"}[status]
        assert len(key) == 8 + 2
    lost = set(pool.metadata["uid"]) - set(there["uid"])
    assert len(lost) == 7
    assert set(by_uid.loc[sorted(lost), "status"]) == {"missing_media"}


def test_the_subset_file_is_what_the_resharder_loads(ds: Dataset, expected: set[str]) -> None:
    subset = load_subset(subset_file(ds))
    assert subset.flags.c_contiguous
    assert subset.ndim == 1
    assert np.array_equal(np.sort(subset), subset)
    assert uids_of(subset) == sorted(expected)
    halves = np.array([(int(u[:16], 16), int(u[16:], 16)) for u in sorted(expected)], U16)  # apply_filter.py's form
    assert np.array_equal(subset, halves)
    assert any(high >= 2**63 for high, _ in subset.tolist())  # or the sort would not have been tried


def test_a_pass_over_the_tars_keeps_exactly_those_samples(
    pool: datacomp_pool.Pool, ds: Dataset, expected: set[str]
) -> None:
    """The resharder's own look-up: how often the uid of the .json stands in the file."""
    subset = load_subset(subset_file(ds))
    kept = []
    tars = [str(path) for path in sorted(pool.shards.glob("*.tar"))]
    assert len(tars) == 3
    for sample in webdataset.WebDataset(tars, shardshuffle=False):
        uid = json.loads(sample["json"])["uid"]
        key = np.array([divmod(int(uid, 16), 2**64)], U16)[0]
        count = np.searchsorted(subset, key, "right") - np.searchsorted(subset, key, "left")
        kept += [uid] * int(count)
    assert sorted(kept) == sorted(expected)


def test_what_was_attached_is_the_metadata(pool: datacomp_pool.Pool, ds: Dataset) -> None:
    """Scores and the row-aligned vectors of the .npz, for every row that reaches the steps."""
    vectors = np.concatenate(
        [np.load(p, allow_pickle=False)["l14_img"] for p in sorted((pool.folder / "metadata" / "small").glob("*.npz"))]
    )
    by_uid = {uid: n for n, uid in enumerate(pool.metadata["uid"])}
    found = ds.sql("SELECT uid, scores_l14, scores_b32 FROM samples WHERE status = 'ok'").fetchall()
    assert len(found) > 50
    for uid, l14, b32 in found:
        row = pool.metadata.iloc[by_uid[uid]]
        assert (l14, b32) == (row["clip_l14_similarity_score"], row["clip_b32_similarity_score"])
    kept = [ds.kept(shard, ["vectors_embedding"]) for shard in ds.shards()]
    pairs = [(r["uid"], r["vectors_embedding"]) for table in kept for r in table.to_pylist()]
    assert len(pairs) > 5
    for uid, vector in pairs:
        assert np.array_equal(np.array(vector, np.float16), vectors[by_uid[uid]])


def test_the_subset_file_selects_the_same_again(
    pool: datacomp_pool.Pool, ds: Dataset, expected: set[str], tmp_path: Path
) -> None:
    """As a keep_list of another dataset over the same pool; what fails DataComp's way is dropped by the list's name."""
    recipe = {
        "name": "again",
        "dataset": str(tmp_path / "dataset"),
        "source": {"kind": "datacomp", "path": str(pool.shards), "metadata": metadata_of(pool)},
        "steps": [{"keep_list": {"path": str(subset_file(ds)), "on": "uid"}}],
    }
    again = mmdata.run(recipe, runner="inline")
    verdicts: pd.DataFrame = again.sql("SELECT uid, verdict, reason FROM samples").df()
    assert set(verdicts[verdicts["verdict"] == "kept"]["uid"]) == expected
    assert set(verdicts[verdicts["verdict"] == "dropped"]["reason"]) == {"keep_list"}
    counts = verdicts["verdict"].value_counts()
    assert counts.sum() == datacomp_pool.ROWS
