"""`export.repeat`: a kept row as often as a column says, each with a key of its own."""

from __future__ import annotations

import tarfile
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import kept_rows
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from mmdata.errors import RecipeError
from mmdata.export import ExportOptions, export
from mmdata.exporters.formats import prove_export


def times(number: int) -> int:
    return number % 4


def run(folder: Path, format: str = "parquet", value: Any = times, **options: Any) -> Path:
    held = kept_rows.dataset(folder / "dataset", Width=value)
    given = {"format": format, "path": str(folder / f"{format}-{len(options)}"), "shard_rows": 7, "repeat": "Width"}
    return export(held, ExportOptions(**{**given, **options}), None).path


def table(path: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(p) for p in sorted(path.glob("*.parquet"))])


def kept() -> list[int]:
    return [n for n in range(kept_rows.ROWS * kept_rows.SHARDS) if n % 3]


EXPECTED = [f"{n:07d}" + (f"-r{i}" if i else "") for n in kept() for i in range(times(n))]


def test_each_row_comes_as_often_as_its_number_says(tmp_path: Path) -> None:
    found = table(run(tmp_path))
    assert found.column("key").to_pylist() == EXPECTED
    assert Counter(found.column("url").to_pylist()) == {
        f"http://pictures.test/{n}.jpg?a=1,2": times(n) for n in kept() if times(n)
    }


def test_tars_hold_every_repeat_with_its_picture(tmp_path: Path) -> None:
    held = kept_rows.dataset(tmp_path / "again", Width=times)
    members = {}
    for path in sorted(run(tmp_path, "webdataset").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                assert member.name not in members
                members[member.name] = tar.extractfile(member).read()  # type: ignore[union-attr]
    assert sorted(name[:-4] for name in members if name.endswith(".jpg")) == sorted(EXPECTED)
    for key in EXPECTED:
        assert members[f"{key}.jpg"] == held.pictures[key.partition("-")[0]]


def test_shuffled_repeats_lie_apart(tmp_path: Path) -> None:
    held = {}
    for shuffle in ("buffer", "full"):
        keys = table(run(tmp_path / shuffle, shuffle=shuffle, seed=3)).column("key").to_pylist()
        assert sorted(keys) == sorted(EXPECTED)
        rows = [k.partition("-")[0] for k in keys]
        neighbours = sum(a == b for a, b in pairwise(rows))
        assert neighbours < len(rows) / 4  # unshuffled, most of them are
        held[shuffle] = keys
    assert held["full"] != EXPECTED


def test_the_column_need_not_be_exported(tmp_path: Path) -> None:
    found = table(run(tmp_path, columns=("license",)))
    assert found.column("key").to_pylist() == EXPECTED
    assert "Width" not in found.column_names


def test_the_card_tells(tmp_path: Path) -> None:
    card = (run(tmp_path) / "README.md").read_text()
    assert f"{len(EXPECTED)} samples of {len(kept())} kept rows, each as often as its `Width` says" in card


@pytest.mark.parametrize(
    ("value", "says"),
    [(lambda n: None if n == 4 else 1, "row 0000004 has NULL"), (lambda n: -1, "has -1"), (lambda n: 101, "has 101")],
)
def test_numbers_that_are_none(tmp_path: Path, value: Any, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        run(tmp_path, value=value)
    assert not (tmp_path / "parquet-0").exists()


def test_columns_that_hold_none(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no column of whole numbers 'clip_score'"):
        run(tmp_path, repeat="clip_score")
    schema = pa.schema([("sample_repeats", pa.int32()), ("key", pa.string())])
    for repeat, says in (("sample_repeat", "did you mean 'sample_repeats'"), ("key", "expected whole numbers")):
        with pytest.raises(RecipeError, match=says):
            prove_export(ExportOptions(path="out", repeat=repeat), schema, "dataset")


def test_what_it_does_not_go_with() -> None:
    for options in ({"format": "datacomp"}, {"mix": ({"dataset": "other", "weight": 0.5},)}):
        with pytest.raises(ValidationError, match="leave repeat out"):
            ExportOptions(path="out", repeat="n", **options)
