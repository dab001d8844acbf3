"""SemDeDup against the definition in float64, and against faiss itself for the clusters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import held_rows
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from pydantic import ValidationError

from mmdata.errors import RecipeError
from mmdata.groups import semantic_duplicates
from mmdata.groups.semantic_duplicates import SemanticDuplicates, SemanticDuplicatesOptions, clusters_for

Floats = npt.NDArray[np.floating[Any]]


def table(vectors: Floats | list[Any], kind: pa.DataType | None = None, **columns: Any) -> pa.Table:
    """Rows in row order, with a hole in the row_ids as between shards."""
    n, width = len(vectors), len(next(v for v in vectors if v is not None))
    cells = pa.array([None if v is None else list(v) for v in vectors], pa.list_(kind or pa.float32(), width))
    ids = np.arange(n) + np.where(np.arange(n) >= n // 2, 1 << 24, 0)
    return pa.table({"row_id": ids, "key": [f"k{i}" for i in range(n)], "clip_image_embedding": cells, **columns})


def compute(rows: pa.Table, scratch: Path, part_rows: int = 100, **options: Any) -> dict[str, list[Any]]:
    group = SemanticDuplicates(SemanticDuplicatesOptions.model_validate(options))
    (scratch / "embeddings.bin").unlink(missing_ok=True)
    found = held_rows.compute(group, rows, scratch, part_rows)
    return {
        name.removeprefix("semantic_duplicates_"): v.to_pylist() if hasattr(v, "to_pylist") else np.asarray(v).tolist()
        for name, v in found.items()
    }


def degrees(*angles: float) -> Floats:
    turned = np.deg2rad(angles)
    return np.stack([np.cos(turned), np.sin(turned)], axis=1)


def crowded(rows: int, width: int, seed: int = 0) -> Floats:
    """Blobs, in which a tenth of the rows stand close to an earlier one and some are equal to it."""
    rng = np.random.default_rng(seed)
    blobs = rng.standard_normal((12, width))
    found = blobs[rng.integers(0, len(blobs), rows)] + 0.6 * rng.standard_normal((rows, width))
    copies = rng.choice(np.arange(rows // 2, rows), rows // 10, replace=False)
    noise = 0.2 * rng.random((len(copies), 1)) * rng.standard_normal((len(copies), width))
    found[copies] = found[rng.integers(0, rows // 2, len(copies))] + noise * rng.integers(0, 2, (len(copies), 1))
    return found.astype(np.float32)


def definition(vectors: Floats, cluster: list[int], order: list[int], epsilon: float) -> list[tuple[Any, ...]]:
    """Per row: is it a duplicate, largest cosine to an earlier row of its cluster, and who stays. One row at a time."""
    unit = vectors.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    answer: dict[int, tuple[Any, ...]] = {}
    for place, row in enumerate(order):
        earlier = [r for r in order[:place] if cluster[r] == cluster[row]]
        if not earlier:
            answer[row] = (False, None, row)
            continue
        cosines = unit[earlier] @ unit[row]
        best = int(np.argmax(cosines))
        is_duplicate = bool(cosines[best] > 1 - epsilon)
        answer[row] = (is_duplicate, float(cosines[best]), answer[earlier[best]][2] if is_duplicate else row)
    return [answer[row] for row in range(len(vectors))]


@pytest.mark.parametrize(("epsilon", "dropped"), [(0.05, [10]), (0.5, [10, 60])])
def test_the_papers_rule_by_hand(epsilon: float, dropped: list[int], tmp_path: Path):
    """Cosines: 10° = 0.985, 50° = 0.643, 60° = 0.5, which is not above 1 - 0.5; 60° goes because of 10°."""
    angles = [0, 10, 60]
    found = compute(table(degrees(*angles)), tmp_path, keep="first", epsilon=epsilon)
    assert [a for a, d in zip(angles, found["is_duplicate"], strict=True) if d] == dropped
    assert found["similarity"] == pytest.approx([None, 0.98481, 0.64279], abs=1e-5)
    assert found["nearest"] == [None, "k0", "k1"]
    kept = [r == 1 for r in found["rank"]]
    assert kept == [not d for d in found["is_duplicate"]]
    if epsilon == 0.5:
        assert found["of"] == ["k0"] * 3  # k2 follows k1, which follows k0
        assert (found["rank"], found["count"], found["id"]) == ([1, 2, 3], [3, 3, 3], [0, 0, 0])


def test_the_threshold_is_strict(tmp_path: Path):
    rows = table([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [1.0, 0.0]])
    assert compute(rows, tmp_path, keep="first", epsilon=1)["is_duplicate"] == [False, False, False, True]
    assert compute(rows, tmp_path, keep="first", epsilon=0)["is_duplicate"] == [False] * 4


@pytest.mark.parametrize("clusters", [1, 7])
@pytest.mark.parametrize("keep", ["hard", "easy", "first", "random"])
def test_equals_the_definition(keep: str, clusters: int, tmp_path: Path):
    vectors = crowded(600, 24)
    found = compute(table(vectors), tmp_path, keep=keep, clusters=clusters, iterations=10, epsilon=0.1)
    cluster, distance = found["cluster"], found["distance"]
    rows = list(range(len(vectors)))
    if keep == "random":
        first = [r for r in rows if found["similarity"][r] is None]
        assert len(first) == clusters
        assert first != [cluster.index(c) for c in range(clusters)]
        assert compute(table(vectors), tmp_path, keep=keep, clusters=clusters, iterations=10, epsilon=0.1) == found
        other = compute(table(vectors), tmp_path, keep=keep, clusters=clusters, iterations=10, epsilon=0.1, seed=5)
        assert other["rank"] != found["rank"]
        return
    sign = {"hard": -1, "easy": 1, "first": 0}[keep]
    order = sorted(rows, key=lambda r: (cluster[r], sign * distance[r], r))
    expected = definition(vectors, cluster, order, 0.1)
    assert found["is_duplicate"] == [e[0] for e in expected]
    assert 40 < sum(found["is_duplicate"]) < 500
    assert [s is None for s in found["similarity"]] == [e[1] is None for e in expected]
    np.testing.assert_allclose([s or 0 for s in found["similarity"]], [e[1] or 0 for e in expected], atol=1e-6)
    assert found["of"] == [f"k{e[2]}" for e in expected]
    sizes = {k: found["of"].count(k) for k in found["of"]}
    assert found["count"] == [sizes[k] for k in found["of"]]
    for key in sizes:
        mine = [r for r in order if found["of"][r] == key]
        assert [found["rank"][r] for r in mine] == list(range(1, len(mine) + 1))


def test_clusters_are_those_of_faiss(tmp_path: Path):
    vectors = crowded(900, 16, seed=3)
    found = compute(table(vectors), tmp_path, clusters=9, iterations=25, seed=1234)
    unit = vectors.copy()
    faiss.normalize_L2(unit)
    kmeans = faiss.Kmeans(16, 9, niter=25, seed=1234, spherical=True)
    kmeans.train(unit)
    cosine, cluster = kmeans.index.search(unit, 1)
    assert found["cluster"] == cluster[:, 0].tolist()
    np.testing.assert_allclose(found["distance"], 1 - cosine[:, 0], atol=1e-5)


def test_the_order_of_the_recipe_decides_where_it_says_one(tmp_path: Path):
    """Rows come in visit order, as `prefer` gives it: here the last row first."""
    rows = table(degrees(0, 1, 2, 40, 41))
    turned = rows.take([4, 3, 2, 1, 0])
    found = compute(turned, tmp_path, prefer=["number desc"], epsilon=0.01)
    assert found["of"] == ["k4", "k4", "k2", "k2", "k2"]
    assert SemanticDuplicatesOptions.model_validate({"keep": {"best": "clip_score"}}).prefer == ['"clip_score" desc']
    assert SemanticDuplicatesOptions.model_validate({"keep": "largest"}).prefer
    for bad in ({"keep": "hard", "prefer": ["x"]}, {"keep": "largest", "prefer": ["x"]}):
        with pytest.raises(ValidationError, match="give one of them"):
            SemanticDuplicatesOptions.model_validate(bad)
    words = "hard, easy, random, first, largest or {best: <column>}, got 'sharpest'"
    with pytest.raises(ValidationError, match=f"keep: expected {words}"):
        SemanticDuplicatesOptions.model_validate({"keep": "sharpest"})


def test_equal_rows_keep_the_first_by_row_id(tmp_path: Path):
    rng = np.random.default_rng(0)
    vectors = np.repeat(rng.standard_normal((40, 8)).astype(np.float32), 5, axis=0)[rng.permutation(200)]
    for keep in ("hard", "easy", "first"):
        found = compute(table(vectors), tmp_path, keep=keep, clusters=3, epsilon=1e-4)
        for vector in np.unique(vectors, axis=0):
            [*same] = np.flatnonzero((vectors == vector).all(axis=1)).tolist()
            assert [found["rank"][r] for r in same] == list(range(1, 1 + len(same)))
            assert {found["similarity"][r] for r in same[1:]} == {1.0}


def test_no_thread_tile_part_or_bound_changes_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = table(crowded(2500, 20, seed=1))
    options: dict[str, Any] = {"clusters": 3, "iterations": 15, "epsilon": 0.1}
    before = pa.cpu_count()
    try:
        pa.set_cpu_count(1)
        whole = compute(rows, tmp_path, **options)
        for threads in (2, 3):
            pa.set_cpu_count(threads)
            assert compute(rows, tmp_path, **options) == whole
    finally:
        pa.set_cpu_count(before)
    assert compute(rows, tmp_path, part_rows=777, **options) == whole
    monkeypatch.setattr(semantic_duplicates, "_HELD_BYTES", 0)
    monkeypatch.setattr(semantic_duplicates, "_TILE", 64)
    assert max(whole["cluster"].count(c) for c in range(3)) > 3 * 64
    assert compute(rows, tmp_path, **options) == whole


def test_no_more_rows_are_held_than_the_bound_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    held: list[int] = []
    unit_rows_of = semantic_duplicates.unit_rows_of

    def counted(vectors: Floats) -> Any:
        held.append(len(vectors))
        return unit_rows_of(vectors)

    monkeypatch.setattr(semantic_duplicates, "unit_rows_of", counted)
    monkeypatch.setattr(semantic_duplicates, "_TILE", 32)
    monkeypatch.setattr(semantic_duplicates, "_HELD_BYTES", 4 * 20 * 150)  # 150 rows of 20 numbers
    found = compute(table(crowded(1000, 20)), tmp_path, clusters=12, iterations=10)
    sizes = [found["cluster"].count(c) for c in range(12)]
    assert max(sizes) > 150, "no cluster is larger than what may be held"
    assert min(sizes) < 75, "no two clusters are held together"
    assert max(held) <= 150


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()])
def test_length_and_type_of_embeddings_do_not_matter(kind: pa.DataType, tmp_path: Path):
    vectors = (crowded(300, 12, seed=4)).astype(np.float16)
    plain = compute(table(vectors, pa.float16()), tmp_path, clusters=2, epsilon=0.1)
    lengths = 2.0 ** np.random.default_rng(1).integers(-3, 4, (300, 1))  # exact in 16 bits
    assert compute(table(vectors * lengths.astype(np.float16), kind), tmp_path, clusters=2, epsilon=0.1) == plain


def test_rows_without_a_direction_are_nobodys_duplicates(tmp_path: Path):
    nan, inf = float("nan"), float("inf")
    vectors = [[1.0, 0.0], None, [0.0, 0.0], [1.0, 0.0], [nan, 1.0], None, [inf, 1.0], [0.0, 0.0]]
    found = compute(table(vectors), tmp_path, keep="first")
    assert found["is_duplicate"] == [False, False, False, True, False, False, False, False]
    assert found["rank"] == [1, 1, 1, 2, 1, 1, 1, 1]
    assert found["count"] == [2, 1, 1, 2, 1, 1, 1, 1]
    assert found["of"] == ["k0", "k1", "k2", "k0", "k4", "k5", "k6", "k7"]
    for column in ("cluster", "distance", "nearest", "similarity"):
        assert [found[column][r] for r in (1, 2, 4, 5, 6, 7)] == [None] * 6
    none = pa.nulls(2, pa.list_(pa.float16(), 4))
    nothing = compute(table([[1.0], [1.0]]).set_column(2, "clip_image_embedding", none), tmp_path)
    assert (nothing["rank"], nothing["cluster"]) == ([1, 1], [None, None])


def test_no_row_reaches_it(tmp_path: Path):
    """As where filters drop all: its parts are there, and have no rows."""
    rows = table([[1.0, 0.0], [0.0, 1.0]]).slice(0, 0)
    for options in ({}, {"keep": "random", "clusters": 3}):
        assert set(map(tuple, compute(rows, tmp_path, **options).values())) == {()}


def test_clusters_grow_with_the_rows_up_to_the_papers(tmp_path: Path):
    assert [clusters_for(n) for n in (0, 1, 8800)] == [1, 1, 1]
    assert clusters_for(440_000_000) == 50_000
    assert clusters_for(55_000_000) == 12_500  # an eighth of the rows, a fourth of the clusters
    assert {clusters_for(n + 1) - clusters_for(n) for n in range(9000, 20_000, 7)} == {0, 1}
    assert set(compute(table(crowded(300, 8)), tmp_path)["cluster"]) == {0}
    assert set(compute(table(crowded(30, 8)[:3]), tmp_path, clusters=10)["cluster"]) == {0, 1, 2}


def test_a_column_that_holds_no_embeddings_is_refused():
    schema = pa.schema([("caption", pa.string()), ("numbers", pa.list_(pa.float32()))])
    for of in ("caption", "numbers"):
        with pytest.raises(RecipeError, match="fixed-size list of floats"):
            SemanticDuplicates.check_types(SemanticDuplicatesOptions(of=of), schema)
