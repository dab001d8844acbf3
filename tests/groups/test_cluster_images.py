"""k-means clusters against faiss and numpy, and DataComp's image-based rule by hand."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import faiss
import held_rows
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import synthetic
from held_rows import HeldRows

import mmdata
from mmdata.errors import RecipeError
from mmdata.groups import cluster_images
from mmdata.groups.cluster_images import ClusterImages, ClusterImagesOptions

Floats = npt.NDArray[np.floating[Any]]


def table(vectors: Floats | list[Any], kind: pa.DataType | None = None) -> pa.Table:
    width = len(next(v for v in vectors if v is not None))
    cells = pa.array([None if v is None else list(v) for v in vectors], pa.list_(kind or pa.float32(), width))
    return pa.table({"row_id": np.arange(len(vectors)), "clip_image_embedding": cells})


def compute(rows: pa.Table, scratch: Path, part_rows: int = 100, **options: Any) -> dict[str, list[Any]]:
    group = ClusterImages(ClusterImagesOptions.model_validate(options))
    found = held_rows.compute(group, rows, scratch, part_rows)
    return {name.removeprefix("cluster_images_"): v.to_pylist() for name, v in found.items()}


def saved(path: Path, array: Any) -> str:
    np.save(path, array)
    return str(path)


def unit(vectors: Floats) -> npt.NDArray[np.float32]:
    found = vectors.astype(np.float64)
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def blobs(rows: int, width: int, seed: int = 0) -> Floats:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((15, width))[rng.integers(0, 15, rows)] + 0.7 * rng.standard_normal((rows, width))


@pytest.mark.parametrize("spherical", [False, True])
def test_clusters_are_those_of_faiss(spherical: bool, tmp_path: Path):
    vectors = unit(blobs(1500, 16))
    found = compute(table(vectors), tmp_path, clusters=15, spherical=spherical, seed=4)
    kmeans = faiss.Kmeans(16, 15, niter=20, seed=4, spherical=spherical)
    kmeans.train(vectors)
    products = vectors @ kmeans.centroids.T  # also where plain means are trained by distance: DataComp's way
    assert found["id"] == products.argmax(axis=1).tolist()
    assert found["count"] == np.bincount(found["id"])[found["id"]].tolist()
    cosines = (vectors * unit(kmeans.centroids)[found["id"]]).sum(axis=1)
    np.testing.assert_allclose(found["similarity"], cosines, atol=1e-5)
    nearest_by_distance = kmeans.assign(vectors)[1].tolist()
    assert (found["id"] == nearest_by_distance) == spherical, "the data do not tell the two rules apart"


def test_given_means_are_used_as_they_are(tmp_path: Path):
    """(0.8, 0.6) is closer in angle to the first mean; the second is longer: 0.8 < 0.6 · 2."""
    means = saved(tmp_path / "means.npy", np.array([[1.0, 0.0], [0.0, 2.0], [-9.0, 0.0]]))
    found = compute(table([[0.8, 0.6], [8.0, 6.0], [1.0, 0.1], None, [0.0, 0.0], [-1.0, 1.0]]), tmp_path, means=means)
    assert found["id"] == [1, 1, 0, None, None, 2]
    assert found["count"] == [2, 2, 1, None, None, 1]
    assert found["similarity"] == pytest.approx([0.6, 0.6, 0.99504, None, None, 0.70711], abs=1e-5)
    assert "is_target" not in found


def test_the_image_based_rule_by_hand(tmp_path: Path):
    """Wanted pictures lie nearest to the means 0 and 3: rows of those clusters are kept, whatever their cosine."""
    means = saved(tmp_path / "means.npy", np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [-1, 0, 0]], np.float32))
    targets = saved(tmp_path / "targets.npy", np.array([[5, 1, 0], [-1, 0, 0.5], [0, 0, 0]], np.float16))
    rows = table([[1, 0.9, 0], [0.9, 1, 0], [0, 0, 1], [-1, 0.2, 0.3], None], pa.float16())
    found = compute(rows, tmp_path, means=means, targets=targets)
    assert found["id"] == [0, 1, 2, 3, None]
    assert found["is_target"] == [True, False, False, True, None]


def test_wanted_pictures_may_be_the_kept_rows_of_a_dataset(tmp_path: Path):
    class Older:
        def parts(self) -> Any:
            for vectors in ([[0.1, 1.0], None], [[0.0, 3.0]]):
                part = table(vectors).drop_columns(["row_id"])
                yield part.append_column("place", pa.array(range(len(part))))

        def look_up(self, places: npt.NDArray[np.int64]) -> pa.Table:
            raise AssertionError("nothing of them is written")

    means = saved(tmp_path / "means.npy", np.eye(2))
    group = ClusterImages(ClusterImagesOptions(means=means, against=["old"]))
    answer = group.compute_streamed(HeldRows(table([[1, 0], [0, 1], [0.6, 0.8]]), 2, Older()), tmp_path)
    assert [v.as_py() for v in answer["cluster_images_is_target"]] == [False, True, True]


def test_no_thread_or_part_changes_the_answer(tmp_path: Path):
    rows = table(blobs(3000, 12, seed=2))
    before = pa.cpu_count()
    try:
        pa.set_cpu_count(1)
        whole = compute(rows, tmp_path, clusters=30, rows_per_cluster=20)
        for threads in (2, 3):
            pa.set_cpu_count(threads)
            assert compute(rows, tmp_path, part_rows=999, clusters=30, rows_per_cluster=20) == whole
    finally:
        pa.set_cpu_count(before)


def test_the_sample_is_chosen_by_the_seed_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trained: list[Any] = []
    train = cluster_images.Embedded.train.__globals__["train_means"]

    def seen(rows: Floats, *options: Any) -> Floats:
        trained.append(rows)
        return train(rows, *options)

    monkeypatch.setitem(cluster_images.Embedded.train.__globals__, "train_means", seen)
    vectors = unit(blobs(2000, 8))
    rows = table(vectors)
    for options in ({"rows_per_cluster": 10}, {"rows_per_cluster": 10, "seed": 9}, {}, {"train_mb": 1}):
        compute(rows, tmp_path, clusters=5, **options)
    few, others, whole, _ = trained
    assert [len(t) for t in trained] == [50, 50, 5 * 256, 5 * 256]
    assert not np.array_equal(few, others)
    places = [int(np.flatnonzero((vectors == row).all(axis=1))[0]) for row in few]
    assert places == sorted(places)
    assert max(np.diff(places)) < 400, "the sample is not spread over the rows"
    assert {tuple(r) for r in few} < {tuple(r) for r in whole}  # the smallest hashes come first
    trained.clear()
    compute(table(unit(blobs(2000, 1000))), tmp_path, clusters=50, iterations=1, train_mb=1)
    assert [t.shape for t in trained] == [(250, 1000)]  # 4 bytes a number


def test_the_number_of_clusters_follows_datacomp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """100,000 for the small pool's 12.8 million rows, and no more for larger ones."""
    assert cluster_images._MOST_CLUSTERS * cluster_images._ROWS_PER_CLUSTER == 12_800_000
    rows = table(blobs(257, 4))
    assert set(compute(rows, tmp_path)["id"]) == {0, 1, 2}
    monkeypatch.setattr(cluster_images, "_MOST_CLUSTERS", 2)
    assert set(compute(rows, tmp_path)["id"]) == {0, 1}


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda p: p.write_bytes(b"no array"), "cannot be read"),
        (lambda p: np.save(p, np.array([{"a": 1}], object), allow_pickle=True), "cannot be read"),
        (lambda p: np.save(p, np.zeros(4, np.float32)), r"shape \(4,\)"),
        (lambda p: np.save(p, np.zeros((3, 4), np.int64)), "int64"),
        (lambda p: np.save(p, np.zeros((0, 4), np.float32)), r"shape \(0, 4\)"),
        (lambda p: np.save(p, np.ones((3, 5), np.float32)), "have 4 numbers"),
    ],
)
def test_refuses_what_holds_no_embeddings_of_that_width(make: Any, told: str, tmp_path: Path):
    make(tmp_path / "file.npy")
    schema = table([[1, 0, 0, 0]]).schema
    for option in ("means", "targets"):
        options = ClusterImagesOptions.model_validate({option: str(tmp_path / "file.npy")})
        with pytest.raises(RecipeError, match=told):
            ClusterImages.check_types(options, schema)


def test_refuses_means_that_are_not_finite(tmp_path: Path):
    means = saved(tmp_path / "means.npy", np.array([[1, 0], [np.nan, 1]]))
    with pytest.raises(RecipeError, match="not finite"):
        compute(table([[1, 0]]), tmp_path, means=means)


def test_a_pickle_is_never_opened(tmp_path: Path):
    class Bad:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    np.save(tmp_path / "file.npy", np.array([Bad()], object), allow_pickle=True)
    with pytest.raises(RecipeError):
        ClusterImages.check_types(ClusterImagesOptions(means=str(tmp_path / "file.npy")), table([[1.0]]).schema)
    assert not (tmp_path / "ran").exists()


def test_over_a_dataset_its_identity_is_the_files_content(tmp_path: Path):
    document = synthetic.make_dataset(tmp_path, list(range(25)), 10)
    angles = np.deg2rad(np.arange(25) * 10)
    np.save(tmp_path / "vectors.npy", np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float16))
    (tmp_path / "ids.txt").write_text("\n".join(f"http://images.invalid/{i}.png" for i in range(25)))
    attach = {"attach": {"path": str(tmp_path / "vectors.npy"), "ids": str(tmp_path / "ids.txt"), "on": "url"}}
    attach["attach"]["columns"] = {"picture": "vectors"}
    means = saved(tmp_path / "means.npy", np.array([[1, 0], [0, 1], [-1, 0], [0, -1]], np.float32))
    targets = saved(tmp_path / "wanted.npy", np.array([[0.1, 1.0]], np.float32))
    group = {"cluster_images": {"of": "picture", "means": means, "targets": targets}}
    steps = [attach, group, {"filter": {"wanted": "cluster_images_is_target"}}]
    ds = mmdata.run({**document, "steps": steps}, runner="inline")
    assert [n for (n,) in ds.samples().select("number").fetchall()] == [n for n in range(25) if 45 <= 10 * n <= 135]
    os.replace(targets, tmp_path / "moved.npy")
    group["cluster_images"]["targets"] = str(tmp_path / "moved.npy")
    again = mmdata.run({**document, "steps": steps}, runner="inline").report
    assert again is not None
    assert again.work["cluster_images"].computed == 0
