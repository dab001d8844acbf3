"""Clusters of captions against exact Jaccard, by hand and over planted edits of WordNet's glosses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from glosses import glosses, planted
from held_rows import compute
from pydantic import ValidationError

from mmdata.errors import RecipeError
from mmdata.groups import minhash_duplicates
from mmdata.groups.minhash_duplicates import MinhashDuplicates, MinhashDuplicatesOptions
from mmdata.models import shingles
from mmdata.models.minhash import signatures
from mmdata.models.shingles import Shingled, Shingling, jaccard, shingle

HOW = Shingling("characters", 5)


def rows_of(captions: list[str | None], permutations: int = 128, seed: int = 1) -> pa.Table:
    n = len(captions)
    found, has_any = signatures(shingle(pa.array(captions, pa.string()), HOW), permutations, seed)
    kind = pa.list_(pa.uint32(), permutations)
    return pa.table(
        {
            "row_id": pa.array(np.arange(n) * 3),
            "key": pa.array([f"k{i:06d}" for i in range(n)], pa.string()),
            "minhash": pa.FixedSizeListArray.from_arrays(pa.array(found.ravel()), type=kind, mask=pa.array(~has_any)),
            "caption": pa.array(captions, pa.string()),
        }
    )


def clusters(table: pa.Table, scratch: Path, /, part_rows: int = 100, **options: Any) -> dict[str, list[Any]]:
    scratch.mkdir(exist_ok=True)
    group = MinhashDuplicates(MinhashDuplicatesOptions.model_validate(options))
    columns = compute(group, table, scratch, part_rows)
    found = {name.removeprefix("minhash_duplicates_"): values for name, values in columns.items()}
    return {k: v.to_pylist() if hasattr(v, "to_pylist") else v.tolist() for k, v in found.items()}


def exact(a: str, b: str) -> float:
    left, right = ({t[i : i + 5] for i in range(len(t) - 4)} for t in (a, b))
    return len(left & right) / len(left | right)


def test_clusters_by_hand(tmp_path: Path):
    # 5-character shingles: 12 and 13 of the first two, 12 shared; the third is the first in other letters and marks
    captions = ["a red bicycle on", "a red bicycle one", "A  red, bicycle: on", "a blue car", None, "", "?!", None]
    assert exact(captions[0], captions[1]) == pytest.approx(12 / 13)
    found = clusters(rows_of(captions), tmp_path, threshold=0.8, exact_of="caption", bands=32, rows=4)
    assert found["of"] == ["k000000"] * 3 + [f"k{i:06d}" for i in range(3, 8)]
    assert found["rank"] == [1, 2, 3, 1, 1, 1, 1, 1]
    assert found["count"] == [3, 3, 3, 1, 1, 1, 1, 1]
    assert found["similarity"] == pytest.approx([1, 12 / 13, 1, 1, 1, 1, 1, 1])
    assert found["id"] == [0, 0, 0, 9, 12, 15, 18, 21]
    estimated = clusters(rows_of(captions), tmp_path / "e", threshold=0.8, bands=32, rows=4)
    assert estimated["of"] == found["of"]
    assert estimated["similarity"][1] == pytest.approx(12 / 13, abs=3 * 0.0236)  # √(J(1−J)/128)


def test_exact_shingles_overrule_the_estimate(tmp_path: Path):
    captions = ["a red bicycle on", "a red bicycle one"]
    assert clusters(rows_of(captions), tmp_path, threshold=0.93, exact_of="caption")["rank"] == [1, 1]
    assert clusters(rows_of(captions), tmp_path / "b", threshold=0.92, exact_of="caption", bands=32, rows=4)[
        "rank"
    ] == [1, 2]


def test_a_chain_is_one_component_and_two_stars(tmp_path: Path):
    words = "the quick brown fox jumps over the lazy dog while seven wizards box"
    chain = [words, words + " near the old mill", words + " near the old mill by the sea"]
    ends = exact(chain[0], chain[2])
    steps = min(exact(chain[0], chain[1]), exact(chain[1], chain[2]))
    assert ends < 0.73 < steps
    options = {"threshold": 0.73, "exact_of": "caption", "bands": 64, "rows": 2}
    star = clusters(rows_of(chain), tmp_path, **options)
    assert star["rank"] == [1, 2, 1]
    linked = clusters(rows_of(chain), tmp_path / "c", link="component", **options)
    assert linked["rank"] == [1, 2, 3]
    assert linked["similarity"][2] == pytest.approx(ends)


def test_precision_and_recall_against_exact_jaccard(tmp_path: Path):
    captions, _ = planted(glosses(1500), copies=1500, seed=5)
    found = clusters(rows_of(captions), tmp_path, threshold=0.7)
    texts = [" ".join("".join(c if c.isalnum() else " " for c in t.lower()).split()) for t in captions]
    pairs = [(i, int(of[1:])) for i, of in enumerate(found["of"]) if int(of[1:]) != i]
    true = np.array([exact(texts[i], texts[j]) for i, j in pairs])
    assert len(pairs) > 500
    assert (true >= 0.7).mean() > 0.93
    assert true.min() > 0.7 - 5 * 0.0405
    estimates = np.array([found["similarity"][i] for i, _ in pairs])
    assert abs((estimates - true).mean()) < 0.01
    # Of the captions whose original is that alike, those that follow an earlier row.
    alike = [i for i in range(1500, 3000) if exact(texts[i], texts[i - 1500]) >= 0.7]
    assert len(alike) > 450
    assert np.mean([found["rank"][i] > 1 for i in alike]) > 0.95


def test_exact_pairs_are_never_below_the_threshold(tmp_path: Path):
    captions, _ = planted(glosses(400), copies=400, seed=6)
    found = clusters(rows_of(captions), tmp_path, threshold=0.7, exact_of="caption")
    assert sum(r > 1 for r in found["rank"]) > 100
    texts = [" ".join("".join(c if c.isalnum() else " " for c in t.lower()).split()) for t in captions]
    for i, of in enumerate(found["of"]):
        if int(of[1:]) != i:
            assert found["similarity"][i] == pytest.approx(exact(texts[i], texts[int(of[1:])]))
    assert min(found["similarity"]) >= 0.7


def test_exact_sets_are_held_some_at_a_time_and_only_those_that_are_compared(tmp_path: Path, monkeypatch: Any):
    captions, _ = planted(glosses(300), copies=100, seed=6)
    rows, options = rows_of(captions), {"threshold": 0.7, "exact_of": "caption"}
    whole = clusters(rows, tmp_path / "a", **options)
    held: list[tuple[int, int]] = []

    def counted(a: Shingled, b: Shingled) -> Any:
        held.append((len(a.offsets) - 1, len(a.hashes) + len(b.hashes)))
        return jaccard(a, b)

    monkeypatch.setattr(minhash_duplicates, "jaccard", counted)
    monkeypatch.setattr(minhash_duplicates, "_SHINGLES", 500)
    monkeypatch.setattr(shingles, "_HELD", 500)
    assert clusters(rows, tmp_path / "b", **options) == whole
    assert all(pairs == 1 or shingles <= 500 for pairs, shingles in held)
    assert max(pairs for pairs, _ in held) > 1
    everything = len(shingle(pa.array(captions), HOW).sets().hashes)
    assert 0 < (tmp_path / "b" / "sets").stat().st_size < 8 * everything * 0.8


def test_shards_do_not_matter_and_the_order_of_visits_decides_who_is_first(tmp_path: Path):
    captions, _ = planted(glosses(200), copies=200, seed=7)
    rows = rows_of(captions)
    whole = clusters(rows, tmp_path / "a", part_rows=10_000, threshold=0.6)
    assert clusters(rows, tmp_path / "b", part_rows=7, threshold=0.6) == whole
    backwards = rows.take(pa.array(np.arange(400)[::-1]))
    found = clusters(backwards, tmp_path / "c", part_rows=50, threshold=0.6)
    assert sum(r > 1 for r in found["rank"]) > 80
    for i, (of, rank) in enumerate(zip(found["of"], found["rank"], strict=True)):
        assert (399 - int(of[1:]) == i) == (rank == 1)
        assert 399 - int(of[1:]) <= i


def test_one_caption_a_hundred_thousand_times_beside_its_edits(tmp_path: Path):
    texts = ["the same advertisement for the same pair of shoes"] * 100_000 + ["the same advertisement for shoes"]
    one = rows_of(texts[-2:])
    rows = one.take(pa.array([0] * 100_000 + [1]))
    rows = rows.set_column(0, "row_id", pa.array(np.arange(100_001)))
    found = clusters(rows, tmp_path, part_rows=50_000, threshold=0.5)
    assert set(found["count"]) <= {100_001, 100_000, 1}
    assert found["rank"][:100_000] == list(range(1, 100_001))


def test_nothing_and_nothing_but_null(tmp_path: Path):
    assert clusters(rows_of([]), tmp_path)["rank"] == []
    assert clusters(rows_of([None, "", None]), tmp_path / "b")["rank"] == [1, 1, 1]
    assert clusters(rows_of([None, "", None]), tmp_path / "c", exact_of="caption")["count"] == [1, 1, 1]


def test_what_cannot_be_compared_is_refused():
    schema = rows_of(["a"]).schema
    with pytest.raises(RecipeError, match="not signatures; name hash_text's minhash"):
        MinhashDuplicates.check_types(MinhashDuplicatesOptions(of="caption"), schema)
    with pytest.raises(RecipeError, match="name a text column"):
        MinhashDuplicates.check_types(MinhashDuplicatesOptions(exact_of="row_id"), schema)
    with pytest.raises(RecipeError, match="20 bands of 7 rows are more than the 128 places"):
        MinhashDuplicates.check_types(MinhashDuplicatesOptions(bands=20, rows=7), schema)
    with pytest.raises(ValidationError, match="together"):
        MinhashDuplicatesOptions(bands=20)
