"""A new list against an old pool: real datasets, from plan to why."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
from PIL import Image

import mmdata
from mmdata.dataset import Dataset
from mmdata.errors import RecipeError


def _picture(number: int) -> bytes:
    """Noise told apart by the number; 1000 and more is the picture of the rest in half the size."""
    pixels = np.random.default_rng(number % 1000).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).resize((96, 96), Image.Resampling.BICUBIC)
    if number >= 1000:
        picture = picture.resize((48, 48), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def make(folder: Path, numbers: list[int]) -> dict[str, Any]:
    return synthetic.make_dataset(folder, numbers, 10, _picture)


def run(document: dict[str, Any], *steps: Any) -> Dataset:
    return mmdata.run({**document, "steps": list(steps)}, runner="inline")


def rows(ds: Dataset, label: str) -> list[tuple[Any, ...]]:
    names = ", ".join(f"{label}_{c}" for c in ("rank", "count", "of", "against"))
    return ds.sql(f"SELECT {names} FROM samples ORDER BY row_id").fetchall()


OLD = list(range(30))


@pytest.fixture
def pool(tmp_path: Path) -> tuple[dict[str, Any], str]:
    document = make(tmp_path / "pool", OLD)
    run(document, {"filter": {"even": "number % 2 = 0"}}, "hash_image")
    return document, str(tmp_path / "pool" / "dataset")


def _key(position: int) -> str:
    return f"{position // 10:05d}{position % 10}"


def test_near_duplicates_of_the_kept_rows_of_a_pool(tmp_path: Path, pool: tuple[dict[str, Any], str]) -> None:
    # 1004 and 1005 are 4 and 5 made smaller; the pool kept 4 only. 100 and 1100 are one another's.
    document = make(tmp_path / "new", [1004, 1005, 100, 1100, 4])
    steps = ["hash_image", {"near_duplicates": {"against": [pool[1]], "max_distance": 6}}]
    ds = run(document, *steps, {"filter": {"fresh": "near_duplicates_rank = 1"}})
    assert rows(ds, "near_duplicates") == [
        (2, 3, _key(4), pool[1]),
        (1, 1, "000001", None),
        (1, 2, "000002", None),
        (2, 2, "000002", None),
        (3, 3, _key(4), pool[1]),
    ]
    assert [r for (r,) in ds.samples().select("number").fetchall()] == [1005, 100]
    again = run(document, *steps)
    assert again.report is not None
    assert again.report.work["near_duplicates"].computed == 0


def test_the_group_is_computed_anew_when_the_pool_changes_and_only_then(
    tmp_path: Path, pool: tuple[dict[str, Any], str]
) -> None:
    document = make(tmp_path / "new", [1004, 1005])
    steps = ["hash_image", {"near_duplicates": {"against": [pool[1]], "max_distance": 6}}]
    run(document, *steps)
    run(pool[0], {"filter": {"even": "number % 2 = 0"}}, "hash_image", "probe_image")  # the same rows
    same = run(document, *steps)
    assert same.report is not None
    assert same.report.work["near_duplicates"].computed == 0
    run(pool[0], {"filter": {"low": "number < 20"}}, "hash_image")
    ds = run(document, *steps)
    assert ds.report is not None
    assert ds.report.work["near_duplicates"].computed == 2
    assert [of for _, _, of, _ in rows(ds, "near_duplicates")] == [_key(4), _key(5)]


def test_a_selection_of_the_pool_can_be_named(tmp_path: Path, pool: tuple[dict[str, Any], str]) -> None:
    run({**pool[0], "name": "odd"}, {"filter": {"odd": "number % 2 = 1"}}, "hash_image")
    document = make(tmp_path / "new", [1004, 1005])

    def against(name: str) -> list[Any]:
        ds = run(document, "hash_image", {"near_duplicates": {"against": [name], "max_distance": 6}})
        return [w for *_, w in rows(ds, "near_duplicates")]

    assert against(f"{pool[1]}#synthetic") == [f"{pool[1]}#synthetic", None]
    assert against(f"{pool[1]}#odd") == [None, f"{pool[1]}#odd"]
    assert against(pool[1]) == [None, pool[1]]  # the latest
    with pytest.raises(RecipeError, match="has no selection 'even'"):
        against(f"{pool[1]}#even")


def test_exact_duplicates_of_base_columns_and_of_two_pools(tmp_path: Path, pool: tuple[dict[str, Any], str]) -> None:
    other = make(tmp_path / "other", [7, 8])
    ds = run(other)
    document = make(tmp_path / "new", [8, 7, 50, 4, 50])
    steps = {"exact_duplicates": {"of": ["number"], "against": [str(tmp_path / "other" / "dataset"), pool[1]]}}
    ds = run(document, steps)
    name = str(tmp_path / "other" / "dataset")
    assert rows(ds, "exact_duplicates") == [
        (2, 2, "000001", name),
        (2, 2, "000000", name),
        (1, 2, "000002", None),
        (2, 2, _key(4), pool[1]),
        (2, 2, "000002", None),
    ]


def test_pixels_of_a_pool(tmp_path: Path) -> None:
    old = make(tmp_path / "pool", [1, 2])
    run(old, {"hash_image": {"exact": True}})
    document = make(tmp_path / "new", [2, 3])
    options = {"of": ["pixel_sha256"], "against": [str(tmp_path / "pool" / "dataset")]}
    ds = run(document, {"hash_image": {"exact": True}}, {"exact_duplicates": options})
    assert [r for r, *_ in rows(ds, "exact_duplicates")] == [2, 1]


def test_over_all_rows_against_a_pool(tmp_path: Path, pool: tuple[dict[str, Any], str]) -> None:
    document = make(tmp_path / "new", [1004, 1005, 4])
    near = {"near_duplicates": {"against": [pool[1]], "max_distance": 6, "over": "all"}}
    names = set()
    for bound in (2000, 1004, 10):
        ds = run(document, {"filter": {"low": f"number <= {bound}"}}, "hash_image", near)
        assert ds.current is not None
        names.add(ds.current.steps[2].set_name)
    assert len(names) == 1


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (
            ["hash_image", {"near_duplicates": {"against": ["{none}"]}}],
            r"step 2 \(near_duplicates\): there is no dataset",
        ),
        (["hash_image", {"near_duplicates": {"against": ["{self}"]}}], r"against names this dataset itself"),
        (["hash_image", {"near_duplicates": {"against": ["{bare}"]}}], r"no run has finished on"),
        (
            [{"hash_image": {"as": "x"}}, {"near_duplicates": {"of": "x_phash", "against": ["{pool}"]}}],
            r"has no column 'x_phash'",
        ),
        (
            [{"hash_image": {"exact": True}}, {"near_duplicates": {"against": ["{pool}"]}}],
            r"'phash' was computed by hash_image-.*options is \{\"exact\":false,.* there and \{\"exact\":true,.* here",
        ),
        (
            ["make_phash", {"near_duplicates": {"against": ["{pool}"]}}],
            r"column 'phash' was computed by hash_image-.*, here by make_phash-.*name is \"hash_image\" there",
        ),
    ],
)
def test_what_plan_refuses(
    tmp_path: Path, pool: tuple[dict[str, Any], str], monkeypatch: pytest.MonkeyPatch, steps: list[Any], message: str
) -> None:
    from mmdata import registry
    from mmdata.preflight import prove
    from mmdata.recipe import parse
    from mmdata.stage import stage

    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    stage(reads="number", writes="phash: uint64", name="make_phash")(lambda batch: {"phash": batch["number"]})
    document = make(tmp_path / "new", [1])
    make(tmp_path / "bare", [1])
    places = {n: str(tmp_path / n / "dataset") for n in ("none", "bare", "pool")}
    places["self"] = document["dataset"]
    written = []
    for step in steps:
        [(name, options)] = step.items() if isinstance(step, dict) else [(step, {})]
        filled = [a.format(**places) for a in options.get("against", [])]
        written.append({name: {**options, **({"against": filled} if filled else {})}})
    with pytest.raises(RecipeError, match=message):
        prove(parse({**document, "steps": written}))


def test_a_large_pool_is_read_a_part_at_a_time(
    tmp_path: Path, pool: tuple[dict[str, Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of a few rows give what one part gives, and no part is larger than a shard more than asked for."""
    from mmdata import older_rows

    document = make(tmp_path / "new", [1004, 1005, 1028, 77])
    steps = ["hash_image", {"near_duplicates": {"against": [pool[1]], "max_distance": 6}}]
    whole = rows(run(document, *steps), "near_duplicates")
    sizes: list[int] = []
    parts = older_rows.OlderDatasets.parts

    def counted(self: Any) -> Any:
        for part in parts(self):
            sizes.append(len(part))
            yield part

    monkeypatch.setattr(older_rows, "_PART_ROWS", 3)
    monkeypatch.setattr(older_rows.OlderDatasets, "parts", counted)
    other = make(tmp_path / "again", [1004, 1005, 1028, 77])
    assert rows(run(other, *steps), "near_duplicates") == whole
    assert sizes == [5, 5, 5]
    assert [p for *_, p in whole] == [pool[1], None, pool[1], None]
