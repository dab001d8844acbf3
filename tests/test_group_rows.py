"""Groups that stream: what they are shown of a dataset, in which order, and how much of it at a time."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
import synthetic
from pydantic import Field

import mmdata
from mmdata import registry
from mmdata.errors import ContractError
from mmdata.stage import (
    ColumnName,
    Columns,
    Contract,
    DatasetPath,
    Failed,
    Group,
    GroupRows,
    NoOptions,
    Options,
    OrderBy,
    Stage,
    parse_schema,
)

NUMBERS = [(i * 37) % 101 for i in range(60)]  # 4 shards of 16 rows, the last one shorter
VECTOR = pa.list_(pa.float16(), 4)


class MakeVector(Stage[NoOptions]):
    """Four 16-bit floats of the row's number; NULL for multiples of 7, failed for multiples of 11."""

    name, label, reads = "make_vector", "made", "number"
    writes = pa.schema([pa.field("made_vector", VECTOR)])

    def compute(self, batch: Any) -> Columns:
        cells = [
            Failed("eleven") if n % 11 == 0 else None if n % 7 == 0 else np.arange(n, n + 4, dtype=np.float16)
            for n in batch["number"]
        ]
        return {"made_vector": cells}


class LookOptions(Options):
    of: ColumnName = Field("made_vector", description="column of vectors")
    prefer: list[OrderBy] = Field([], description="order")
    against: list[DatasetPath] = Field([], description="other datasets")


class Look(Group[LookOptions]):
    """Writes down what it was shown."""

    name, label, streams = "look_at_rows", "look", True
    seen: ClassVar[dict[str, Any]] = {}
    ask: ClassVar[tuple[str, ...] | None] = None

    @classmethod
    def contract(cls, options: LookOptions) -> Contract:
        return Contract(writes=parse_schema("look_sum: float64, look_place: int64"), reads=(options.of, "number"))

    def compute_streamed(self, rows: GroupRows, scratch: Path) -> Columns:
        of = self.options.of
        assert not list(scratch.iterdir())
        (scratch / "left_behind").write_text("x")
        shown: list[weakref.ref[pa.Table]] = []
        most = 0
        numbers, sums = [], []
        for time in range(2):
            sums = []
            for part in rows.parts(self.ask or [of]):
                shown.append(weakref.ref(part))
                most = max(most, sum(len(t) for t in [ref() for ref in shown] if t is not None))
                numbers.append((time, part.column("row_id").to_pylist()))
                sums += [None if v is None else float(np.sum(v, dtype=np.float64)) for v in part.column(of).to_pylist()]
                del part
        order = rows.visit_order()
        again = rows.visit_order_in(scratch)
        assert np.array_equal(order, np.arange(len(rows)) if again is None else again)
        type(self).seen = {
            "parts": numbers,
            "type": rows.read([of]).schema.field(of).type,
            "row_ids": rows.row_ids(),
            "length": len(rows),
            "most": most,
            "visited": rows.read(["number"]).column("number").to_numpy()[order].tolist(),
            "scratch": scratch,
            "in_row_order": again is None,
            "older": None if rows.older is None else [p.column("place").to_pylist() for p in rows.older.parts()],
        }
        place = np.empty(len(rows), np.int64)
        place[order] = np.arange(len(rows))
        return {"look_sum": pa.array(sums, pa.float64()), "look_place": place}


@pytest.fixture(autouse=True, scope="module")
def _operators() -> None:
    for operator in (MakeVector, Look):
        registry.register(operator)


@pytest.fixture
def _asks_for_too_much() -> Iterator[None]:
    Look.ask = ("made_vector", "caption")
    yield
    Look.ask = None


def status(number: int) -> str:
    return "http_4xx" if number % 17 == 3 else "ok"


def steps(**options: Any) -> list[Any]:
    return [
        {"make_vector": {"on_error": "keep", "max_failed": 1}},
        {"filter": {"low": "number % 10 < 8"}},
        {"look_at_rows": options},
    ]


def survivors() -> list[int]:
    return [n for n in NUMBERS if n % 17 != 3 and n % 10 < 8]


def test_shows_every_survivor_shard_by_shard_in_row_order(tmp_path: Path):
    document = synthetic.make_dataset(tmp_path, NUMBERS, 16, status=status)
    ds = mmdata.run({**document, "steps": steps()}, runner="inline")
    seen = Look.seen
    expected = [
        (s << 24) + i for s in range(4) for i, n in enumerate(NUMBERS[16 * s : 16 * s + 16]) if n in survivors()
    ]
    assert seen["row_ids"].tolist() == expected
    assert seen["length"] == len(expected) == len(survivors())
    parts = [ids for again, ids in seen["parts"] if again == 0]
    assert parts == [ids for again, ids in seen["parts"] if again == 1]
    assert [{i >> 24 for i in ids} for ids in parts] == [{0}, {1}, {2}, {3}]
    assert [i for ids in parts for i in ids] == expected
    assert seen["type"] == VECTOR
    assert seen["most"] <= 16, "rows of more than one shard were held at once"
    assert seen["older"] is None
    assert seen["in_row_order"]
    assert not seen["scratch"].exists()
    found = ds.sql("SELECT number, look_sum, look_place FROM samples WHERE look_place IS NOT NULL ORDER BY row_id")
    assert found.fetchall() == [
        (n, None if n % 11 == 0 or n % 7 == 0 else float(4 * n + 6), i) for i, n in enumerate(survivors())
    ]
    report = mmdata.run({**document, "steps": steps()}, runner="inline").report
    assert report is not None
    assert report.work["look_at_rows"].computed == 0


def test_visits_in_the_order_of_prefer_and_answers_in_row_order(tmp_path: Path):
    document = synthetic.make_dataset(tmp_path, NUMBERS, 16, status=status)
    ds = mmdata.run({**document, "steps": steps(prefer=["number % 5 desc", "number"])}, runner="inline")
    order = sorted(survivors(), key=lambda n: (-(n % 5), n))
    assert Look.seen["visited"] == order
    assert not Look.seen["in_row_order"]
    found = ds.sql("SELECT number, look_place FROM samples WHERE look_place IS NOT NULL ORDER BY row_id").fetchall()
    assert found == [(n, order.index(n)) for n in survivors()]
    tied = mmdata.run({**document, "steps": steps(prefer=["number % 5"])}, runner="inline")
    assert tied.report is not None
    assert Look.seen["visited"] == sorted(survivors(), key=lambda n: n % 5)  # sorted is stable: ties in row order


def test_shows_the_kept_rows_of_other_datasets(tmp_path: Path):
    old = synthetic.make_dataset(tmp_path / "old", NUMBERS[:20], 16)
    computed: list[int] = []
    kept = mmdata.run({**old, "steps": steps()[:2]}, runner="inline").samples().count("*").fetchall()[0][0]
    document = synthetic.make_dataset(tmp_path / "new", NUMBERS, 16)
    mmdata.run({**document, "steps": steps(against=[old["dataset"]])}, runner="inline")
    assert [p for part in Look.seen["older"] for p in part] == list(range(kept))
    assert kept > 10
    changed = synthetic.make_dataset(tmp_path / "changed", [n + 1 for n in NUMBERS[:20]], 16)
    mmdata.run({**changed, "steps": steps()[:2]}, runner="inline")
    for _ in range(2):
        report = mmdata.run({**document, "steps": steps(against=[changed["dataset"]])}, runner="inline").report
        assert report is not None
        computed.append(report.work["look_at_rows"].computed)
    assert computed == [sum(n % 10 < 8 for n in NUMBERS), 0], "the vectors there do not enter the identity"


@pytest.mark.usefixtures("_asks_for_too_much")
def test_refuses_a_column_that_the_contract_does_not_read(tmp_path: Path):
    document = synthetic.make_dataset(tmp_path, NUMBERS[:5])
    with pytest.raises(ContractError, match=r"asks for \['caption'\]"):
        mmdata.run({**document, "steps": steps()}, runner="inline")
