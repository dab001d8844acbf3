"""The Arrow reader: the kept rows as DuckDB has them, the stored bytes beside, never more than a batch in memory."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
import synthetic

import mmdata
from mmdata.dataset import Dataset
from mmdata.errors import RecipeError
from mmdata.readers import arrow


@pytest.fixture(scope="module")
def ds(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    synthetic.register_all()
    recipe = synthetic.make_dataset(
        tmp_path_factory.mktemp("arrow"),
        list(range(30)),
        shard_rows=8,
        picture=lambda n: synthetic.png(n) if n else None,
    )
    steps = [{"make_sevens": {"on_error": "keep"}}, {"filter": {"f": "number % 5 <> 1"}}]
    return mmdata.run({**recipe, "steps": steps}, runner="inline")


def test_a_table_is_what_sql_says(ds: Dataset) -> None:
    columns = ["number", "sevens_value", "key", "caption"]
    table = ds.to_arrow(columns)
    assert isinstance(table, pa.Table)
    expected = ds.samples().project(", ".join(columns)).fetchall()
    assert [tuple(row.values()) for row in table.to_pylist()] == expected
    assert table.schema.field("sevens_value").type == pa.float32()
    whole = ds.to_arrow()
    assert whole.num_rows == 24
    assert {"row_id", "url", "residue", "sevens_reason"} <= set(whole.column_names)


def test_media_comes_along(ds: Dataset) -> None:
    table = ds.to_arrow(["number"], media=True)
    for row in table.to_pylist():
        if row["number"] == 0:
            assert row["image"] is None
        else:
            assert row["image"]["bytes"] == synthetic.png(row["number"])
            assert row["image"]["path"].endswith(".png")


def test_a_stream_reads_a_shard_at_a_time(ds: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    kept = ds.kept

    def counted(shard: int, columns: object = None) -> pa.Table:
        asked.append(shard)
        return kept(shard, columns)  # type: ignore[arg-type]

    monkeypatch.setattr(ds, "kept", counted)
    reader = ds.to_arrow(["number"], media=True, stream=True)
    assert isinstance(reader, pa.RecordBatchReader)
    before = len(asked)
    first = reader.read_next_batch()
    assert len(asked) - before == 1
    assert first.num_rows == 6  # 0, 2, 3, 4, 5 and 7
    assert first.schema == reader.schema
    assert first.num_rows + reader.read_all().num_rows == 24


def test_a_batch_has_so_many_bytes_of_media_at_most(ds: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(synthetic.png(3))
    monkeypatch.setattr(arrow, "_BATCH_BYTES", int(2.5 * size))
    batches = list(ds.to_arrow(["number"], media=True, stream=True))
    sizes = [sum(len(i["bytes"]) for i in b.column("image").to_pylist() if i) for b in batches]
    assert max(sizes) <= 2.5 * size
    assert sum(b.num_rows for b in batches) == 24
    assert len(batches) > 10
    monkeypatch.setattr(arrow, "_BATCH_BYTES", 1)  # a picture is larger than a batch may be
    assert [b.num_rows for b in ds.to_arrow(["number"], media=True, stream=True)] == [1] * 24


def test_nothing_kept_and_columns_that_are_not_there(tmp_path: Path, ds: Dataset) -> None:
    recipe = synthetic.make_dataset(tmp_path, [1, 2, 3])
    none = mmdata.run({**recipe, "steps": [{"filter": {"f": "number > 9"}}]}, runner="inline")
    assert none.to_arrow(["number"], media=True).num_rows == 0
    assert none.to_arrow(["number"]).schema.field("number").type == pa.int64()
    with pytest.raises(RecipeError, match="has no column 'captoin'; did you mean 'caption'"):
        ds.to_arrow(["captoin"])
