"""Corners of the core where values, verdicts or memory could go wrong without a word: each was doubted once."""

# long because: cases that once went wrong, each with the shape of dataset that showed it

from __future__ import annotations

import datetime
import io
import json
import shutil
import tarfile
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import faulty
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import synthetic

import mmdata
from mmdata import pool, registry, shard_job
from mmdata.answers import write_answer
from mmdata.clean import clean
from mmdata.column_files import ColumnFooter, write_column_file
from mmdata.columns import base_schema
from mmdata.errors import RecipeError, StoreError
from mmdata.preflight import prove
from mmdata.recipe import parse
from mmdata.stage import Contract, Failed, Group, Options, Stage, parse_schema


class Difference(Stage[Any]):
    """left_sevens_value - right_sevens_value: two columns it reads by names of its own."""

    name, label = "subtract_sides", "sides"
    reads, writes = ("left_value", "right_value"), "sides_value: float32"

    def compute(self, batch: Any) -> Mapping[str, Sequence[Any]]:
        pairs = zip(batch["left_value"], batch["right_value"], strict=True)
        return {"sides_value": [None if a is None or b is None else a - b for a, b in pairs]}


class StoredBytes(Stage[Any]):
    """Length of the stored bytes, which it never decodes; notes which rows share memory."""

    name, label, reads, writes = "count_bytes", "stored", ("image",), "stored_bytes: int64"
    together: dict[int, list[int]] = {}  # noqa: RUF012  what the test looks at

    def compute(self, batch: Any) -> Mapping[str, Sequence[Any]]:
        self.together.setdefault(id(batch.cache), []).extend(batch.row_ids.tolist())
        self.caches.append(batch.cache)
        return {"stored_bytes": [len(d) for d in batch.data()]}

    caches: list[Any] = []  # noqa: RUF012  keeps them alive, so that an id is not given twice


class MoodyOptions(Options):
    log: str
    times: int


class MoodyGroup(Group[MoodyOptions]):
    """Fails odd numbers for good, and 4 for a transient reason the first `times` times."""

    name, label = "group_moody", "moody"

    @classmethod
    def contract(cls, options: MoodyOptions) -> Contract:
        return Contract(writes=parse_schema("moody_rank: int64"), reads=("number",))

    def compute(self, rows: pa.Table) -> Mapping[str, Sequence[Any]]:
        faulty.note(Path(self.options.log), str(len(rows)))
        is_busy = len(Path(self.options.log).read_text().splitlines()) <= self.options.times
        numbers = rows.column("number").to_pylist()
        busy, odd = Failed("busy", transient=True), Failed("odd")
        return {"moody_rank": [odd if n % 2 else busy if n == 4 and is_busy else n for n in numbers]}


@pytest.fixture(autouse=True, scope="module")
def _operators() -> None:
    faulty.register_all()
    for operator in (Difference, StoredBytes, MoodyGroup):
        registry.register(operator)


def run(folder: Path, document: dict[str, Any], steps: list[Any], **export: Any) -> mmdata.dataset.Dataset:
    more = {"export": {"path": str(folder / f"out-{export['format']}"), **export}} if export else {}
    return mmdata.run({**document, "steps": steps, **more}, runner="inline")


def seen(ds: mmdata.dataset.Dataset, columns: str = "*") -> list[Any]:
    return ds.sql(f"SELECT {columns} FROM samples ORDER BY row_id").fetchall()


def content(ds: mmdata.dataset.Dataset) -> tuple[list[Any], Any]:
    return seen(ds), ds.current and ds.current.counts


# Filters and reasons


def test_filter_reads_reasons_in_the_pass_that_makes_them(tmp_path: Path) -> None:
    document = synthetic.make_dataset(tmp_path, range(30))
    steps: list[Any] = [
        {"make_sevens": {"on_error": "keep", "max_failed": 1}},
        {"filter": {"gone_wrong": "sevens_reason = 'eleven' OR number < 3"}},
    ]
    for _ in range(2):  # as it is computed, and from what is committed
        ds = run(tmp_path, document, steps)
        kept = ds.sql("SELECT number FROM samples WHERE verdict = 'kept' ORDER BY 1").fetchall()
        assert kept == [(0,), (1,), (2,), (11,), (22,)]


def test_names_that_differ_in_case_only_are_refused(tmp_path: Path) -> None:
    listing = tmp_path / "list.parquet"
    pq.write_table(pa.table({"url": ["http://a.invalid/1"], "number": [1], "Sevens_Value": [2]}), listing)
    document = synthetic.synthetic_recipe(tmp_path, [1])
    source = {"kind": "urls", "path": str(listing), "columns": ["number", "Sevens_Value"]}
    with pytest.raises(RecipeError, match="already made by the base rows"):
        prove(parse({**document, "source": source, "steps": [{"make_sevens": {}}]}))
    prove(parse({**document, "source": source, "steps": [{"make_sevens": {"as": "mine"}}]}))


# Identity


def test_columns_that_change_places_are_computed_anew(tmp_path: Path) -> None:
    """A stage that reads `left_value` and `right_value` gets other values when the steps before swap their names."""
    document = synthetic.make_dataset(tmp_path, [1, 2, 3, 4])

    def steps(left: int, right: int) -> list[Any]:
        sides = [{"make_sevens": {"times": n, "as": side}} for n, side in ((left, "left"), (right, "right"))]
        return [*sides, {"subtract_sides": {}}]

    # number · 7 mod 13 minus number · 5 mod 13, by hand
    assert seen(run(tmp_path, document, steps(7, 5)), "sides_value") == [(7 - 5,), (1 - 10,), (8 - 2,), (2 - 7,)]
    assert seen(run(tmp_path, document, steps(5, 7)), "sides_value") == [(5 - 7,), (10 - 1,), (2 - 8,), (7 - 2,)]


def test_column_named_by_an_option_may_change_its_name(tmp_path: Path) -> None:
    document = synthetic.make_dataset(tmp_path, [1, 2, 3, 4])
    for alias in ("one", "two"):
        steps: list[Any] = [{"make_sevens": {"as": alias}}, {"add_constant": {"column": f"{alias}_value"}}]
        report = run(tmp_path, document, steps).report
        assert report is not None
        computed = report.work["add_constant"].computed
        assert computed == (4 if alias == "one" else 0)


# Transient failures


def test_one_set_before_and_after_a_group_is_computed_once(tmp_path: Path) -> None:
    """What the group saw stays what the readers see: a transient failure is not tried again behind its back."""

    def start(folder: Path) -> tuple[dict[str, Any], list[Any]]:
        document = synthetic.make_dataset(folder, range(30))
        busy = {"log": str(folder / "log"), "fault": "busy", "at": [4], "times": 3, "on_error": "keep"}
        return document, [
            {"make_faulty": busy},
            {"filter": {"low": "faulty_value IS NULL OR number > 20"}},
            {"rank_rows": {}},
            {"make_faulty": {**busy, "as": "later"}},
        ]

    document, steps = start(tmp_path / "a")
    first = run(tmp_path / "a", document, steps)
    # 4 failed three times in the first pass, so the group ranked it: with 22, 25 and 28 in the class of 1 modulo 3.
    ranks = "SELECT number, rank_rank, later_reason FROM samples WHERE verdict = 'kept' AND number % 3 = 1 ORDER BY 1"
    assert first.sql(ranks).fetchall() == [(4, 1, "!busy"), (22, 2, None), (25, 3, None), (28, 4, None)]
    assert first.report is not None
    assert first.report.unsettled == 1
    second = run(tmp_path / "a", document, steps)
    assert second.sql(ranks).fetchall() == [(22, 1, None), (25, 2, None), (28, 3, None)]
    assert second.report is not None
    assert second.report.unsettled == 0


def test_group_tries_its_transient_failures_again(tmp_path: Path) -> None:
    document = synthetic.make_dataset(tmp_path, range(20), 7)
    steps: list[Any] = [{"group_moody": {"log": str(tmp_path / "log"), "times": 1}}, {"rank_rows": {}}]
    first = run(tmp_path, document, steps)
    assert first.current is not None
    assert first.current.transient == 1
    second = run(tmp_path, document, steps)
    assert second.current is not None
    assert second.current.transient == 0
    assert second.current.counts == (("failed", 1, "odd", 10), ("kept", None, None, 10))
    run(tmp_path, document, steps)
    assert (tmp_path / "log").read_text().split() == ["20", "20"]  # nothing left, so it is not asked a third time


def test_group_reads_what_a_group_before_it_made(tmp_path: Path) -> None:
    document = synthetic.make_dataset(tmp_path, range(9), 4)
    groups: list[Any] = [{"rank_rows": {}}, {"rank_rows": {"by": "rank_rank", "as": "again"}}]
    ranks = "SELECT rank_rank, again_rank FROM samples ORDER BY number"
    # Ranks within number modulo 3, then within that rank: 0, 1, 2 are first of their class, 3, 4, 5 second.
    expected = [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (3, 3)]
    assert run(tmp_path, document, groups).sql(ranks).fetchall() == expected
    # Without 0, rows 3 and 6 move up to first and second of their class.
    expected = [(None, None), (1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3), (3, 1), (3, 2)]
    fewer = run(tmp_path, document, [{"filter": {"f": "number > 0"}}, *groups])
    assert fewer.sql(ranks).fetchall() == expected


def test_pass_that_no_worker_can_take_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one that wants an accelerator on a cluster without one: never a run that ends with its rows undone."""
    document = synthetic.make_dataset(tmp_path, range(9), 4)
    monkeypatch.setattr(pool.InlinePool, "has_room", lambda self, item: False)
    with pytest.raises(RecipeError, match="no worker has what this pass needs"):
        run(tmp_path, document, [{"make_sevens": {}}])


# Chunks


@pytest.mark.parametrize("decoded_bytes", [1, 5 * (8 * 8 * 3 + 100), 256 << 20])
def test_results_do_not_depend_on_where_chunks_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded_bytes: int
) -> None:
    steps: list[Any] = [
        {"make_sevens": {"on_error": "keep"}},
        {"filter": {"odd": "number % 2 = 1 OR sevens_value IS NULL"}},
        {"measure_mean": {}},
        {"filter": {"dark": "mean_value < 40"}},
        {"add_constant": {"column": "mean_value"}},
    ]
    monkeypatch.setattr(shard_job, "DECODED_BYTES", decoded_bytes)
    ds = run(tmp_path, synthetic.make_dataset(tmp_path, range(50), 20), steps)
    # 0, 14, 28 and 42 are multiples of 7 and have no value, 22 and 44 fail: they are even and stay all the same.
    expected = [n for n in range(40) if n % 2 or n in (0, 14, 22, 28)]
    kept = ds.sql("SELECT number, mean_value, plus_value FROM samples WHERE verdict = 'kept' ORDER BY 1").fetchall()
    assert kept == [(n, float(n), float(n + 1)) for n in expected]
    assert ds.report is not None
    assert ds.report.media_reads == 25 + 4 + 2  # the odd ones and those without a value, each once


def test_stored_bytes_are_bounded_where_nothing_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = synthetic.make_dataset(tmp_path, range(40), 40)
    [table] = [pq.read_table(p) for p in (tmp_path / "dataset" / "rows").glob("*.parquet")]
    sizes = dict(zip(table["row_id"].to_pylist(), table["image_size"].to_pylist(), strict=True))
    limit = 5 * max(sizes.values())
    monkeypatch.setattr(shard_job, "DECODED_BYTES", limit)
    StoredBytes.together.clear()
    ds = run(tmp_path, document, [{"count_bytes": {}}])
    assert dict(seen(ds, "row_id, stored_bytes")) == sizes
    held = [sum(sizes[r] for r in rows) for rows in StoredBytes.together.values()]
    assert len(held) >= 8
    assert max(held) <= limit


# Shapes of dataset and recipe

_SHAPES: list[list[Any]] = [
    [],
    [{"filter": {"none": "number > 1000"}}],
    [{"filter": {"some": "number > 3"}}],
    [{"rank_rows": {}}],
    [{"rank_rows": {}}, {"rank_rows": {"as": "again"}}],
    [{"filter": {"none": "false"}}, {"make_sevens": {}}, {"rank_rows": {}}, {"measure_mean": {}}],
]
_STATUS: dict[str, Callable[[int], str]] = {
    "all ok": lambda n: "ok",
    "all failed": lambda n: "http_4xx",
    "a shard failed": lambda n: "dns" if n < 10 else "ok",
}


@pytest.mark.parametrize("steps", _SHAPES)
@pytest.mark.parametrize("status", sorted(_STATUS))
@pytest.mark.parametrize("shard_rows", [1, 10])
def test_odd_shapes_end_whole_and_run_again_to_nothing(
    tmp_path: Path, steps: list[Any], status: str, shard_rows: int
) -> None:
    rows = 12 if shard_rows == 10 else 4
    document = synthetic.make_dataset(tmp_path, range(rows), shard_rows, status=_STATUS[status])
    ok = sum(_STATUS[status](n) == "ok" for n in range(rows))
    kept = ok
    for step in steps:
        if "filter" in step:
            kept = sum(_STATUS[status](n) == "ok" for n in range(4, rows)) if "some" in step["filter"] else 0
    for fmt in ("webdataset", "parquet"):
        ds = run(tmp_path, document, steps, format=fmt)
        funnel = ds.funnel()
        assert (funnel.rows_in, funnel.kept, funnel.kept + funnel.dropped) == (rows, kept, ok)
        assert len(ds.samples().fetchall()) == kept
        out = tmp_path / f"out-{fmt}"
        exported = sum(pq.ParquetFile(p).metadata.num_rows for p in out.glob("*.parquet"))
        assert exported == kept
        assert (out / "README.md").exists()
        before = content(ds)
        clean(ds.store, grace_s=0)
        again = run(tmp_path, document, steps, format=fmt)
        assert again.report is not None
        assert not again.report.changed
        assert not any(w.computed for w in again.report.work.values())
        assert content(again) == before


def test_recipe_there_and_back_shows_the_same(tmp_path: Path) -> None:
    document = synthetic.make_dataset(tmp_path, range(40), 16)
    sevens: Any = {"make_sevens": {"on_error": "keep"}}
    one = [sevens, {"filter": {"f": "number < 30"}}, {"rank_rows": {"by": "sevens_value"}}]
    two = [sevens, {"filter": {"f": "number < 20"}}, {"rank_rows": {"by": "sevens_value"}}]
    first = content(run(tmp_path, document, one))
    between = content(run(tmp_path, document, two))
    assert first != between
    for _ in range(2):
        synthetic.COMPUTED.clear()
        ds = run(tmp_path, document, one)
        assert content(ds) == first
        assert content(run(tmp_path, document, two)) == between
        assert not synthetic.COMPUTED
        clean(ds.store, grace_s=0)
        assert content(mmdata.open(ds.store.url)) == between
    assert len(list((tmp_path / "dataset" / "verdicts").iterdir())) == 1


# Reading


@pytest.mark.parametrize("folder", ["plain", "a[1]b*c?"])
def test_file_of_another_shard_is_an_error(tmp_path: Path, folder: str) -> None:
    document = synthetic.make_dataset(tmp_path / folder, range(20))
    ds = run(tmp_path / folder, document, [{"make_sevens": {"on_error": "keep"}}])
    assert len(seen(ds)) == 20
    assert ds.current is not None
    [(first, second)] = ds.current.sets.values()
    root = Path(ds.store.root)
    shutil.copy(root / first, root / second)
    with pytest.raises(StoreError, match="holds other rows"):
        seen(mmdata.open(ds.store.url))


def test_file_of_another_shard_is_an_error_in_memory(tmp_path: Path) -> None:
    document = synthetic.make_dataset(tmp_path, range(20))
    local = run(tmp_path, document, [{"make_sevens": {"on_error": "keep"}}])
    store = mmdata.store.Store("memory://review-core")
    store.fs.put(f"{tmp_path}/dataset/", f"{store.root}/", recursive=True)
    try:
        assert seen(mmdata.open(store.url)) == seen(local)
        assert local.current is not None
        [(first, second)] = local.current.sets.values()
        store.fs.pipe_file(f"{store.root}/{second}", store.read(first))
        with pytest.raises(StoreError, match="holds other rows"):
            seen(mmdata.open(store.url))
    finally:
        store.fs.rm(store.root, recursive=True)


def test_run_refuses_a_column_file_of_other_rows(tmp_path: Path) -> None:
    document = synthetic.make_dataset(tmp_path, range(20))
    steps: list[Any] = [{"make_sevens": {"on_error": "keep"}}]
    ds = run(tmp_path, document, steps)
    assert ds.current is not None
    [(first, _)] = ds.current.sets.values()
    table, metadata = ds.store.read_table(first), ds.store.footer(first)
    identity = ColumnFooter(metadata["mmdata.identity"], metadata["mmdata.hash"])
    for rows in (table.slice(0, 7), table.take(list(range(9, -1, -1)))):  # short, or in another order
        write_column_file(Path(ds.store.root) / first, rows, identity)
        with pytest.raises(StoreError, match="does not have the rows of its shard"):
            run(tmp_path, document, steps)


# Types of the source's own columns

_DAYS = [datetime.datetime(2020, 1, 1) + datetime.timedelta(days=i) for i in range(25)]
_TYPED = {
    "taken": pa.array(_DAYS, pa.timestamp("us")),
    "taken_s": pa.array(_DAYS, pa.timestamp("s")),
    "taken_ns": pa.array(_DAYS, pa.timestamp("ns")),
    "taken_tz": pa.array(_DAYS, pa.timestamp("us", "Europe/Berlin")),
    "day": pa.array([d.date() for d in _DAYS], pa.date32()),
    "price": pa.array([Decimal("12.34") + i for i in range(25)], pa.decimal128(12, 2)),
    "wide": pa.array([Decimal("12.34") + i for i in range(25)], pa.decimal256(50, 2)),
    "tags": pa.array([[str(i), "x"] for i in range(25)], pa.list_(pa.string())),
    "big": pa.array([2**64 - 1 - i for i in range(25)], pa.uint64()),
    "blob": pa.array([b"\xff\x00"] * 25, pa.binary()),
    "box": pa.array([{"x": i, "y": [0.5]} for i in range(25)]),
    "seconds": pa.array([datetime.timedelta(seconds=i) for i in range(25)], pa.duration("s")),
    "half": pa.array(np.arange(25).astype(np.float16)),
    "kind": pa.array([str(i % 3) for i in range(25)]).dictionary_encode(),
    "pair": pa.array([[1.0, float("nan")]] * 25, pa.list_(pa.float32(), 2)),
}


def _typed(folder: Path) -> dict[str, Any]:
    """A dataset whose list brings the columns of `_TYPED` along, as the source reads them."""
    document = synthetic.make_dataset(folder, range(25))
    listing = pq.read_table(folder / "list.parquet")
    for name, values in _TYPED.items():
        listing = listing.append_column(name, values)
    shutil.rmtree(folder / "dataset" / "columns", ignore_errors=True)
    pq.write_table(listing, folder / "list.parquet")
    document = {**document, "source": {**document["source"], "columns": ["number", *_TYPED]}}
    source = parse(document).source
    rows = sorted((folder / "dataset" / "rows").iterdir())
    for path, part in zip(rows, source.tables(10), strict=True):
        old, schema = pq.read_table(path), base_schema(source.schema())
        found = [part[f.name] if f.name in part.column_names else old[f.name] for f in schema]
        pq.write_table(pa.table(found, schema=schema), path)
    (folder / "dataset" / "dataset.json").unlink()
    for name in ("rows", "media"):
        (folder / "dataset" / name).rename(folder / name)
    proved = prove(parse(document))
    proved.document.sources[0]["shards"] = len(rows)
    mmdata.ledger.new_dataset(proved.store, proved.document)
    for name in ("rows", "media"):
        (folder / name).rename(folder / "dataset" / name)
    return document


def test_columns_of_every_type_pass_filters_and_exports(tmp_path: Path) -> None:
    document = _typed(tmp_path)
    checks = [
        "taken >= TIMESTAMP '2020-01-03'",
        "taken_s < TIMESTAMP '2020-01-25'",
        "taken_ns > TIMESTAMP '2019-01-01'",
        "taken_tz > TIMESTAMP '2019-01-01'",
        "day > DATE '2019-01-01'",
        "price > 10",
        "len(tags) = 2",
        "big > 18446744073709551500",
        "octet_length(blob) = 2",
        "box['x'] >= 0",
        "seconds IS NOT NULL",
        "half >= 0",
        "kind <> 'x'",
        "pair[1] > 0",
    ]
    steps = [{"filter": {f"f{i}": check}} for i, check in enumerate(checks)]
    ds = run(tmp_path, document, steps, format="parquet")
    table = pq.read_table(tmp_path / "out-parquet" / "00000.parquet")
    assert table["number"].to_pylist() == list(range(2, 24))
    for name in ("taken", "taken_tz", "day", "price", "wide", "tags", "big", "blob", "box", "seconds"):
        assert table[name].to_pylist() == _TYPED[name].to_pylist()[2:24], name
    for kind in ("table", "json", "csv", "parquet"):
        out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        write_answer(ds, "SELECT * FROM samples", kind, out)
        out.flush()
        assert out.buffer.tell() > 0  # type: ignore[attr-defined]
    assert ds.why("000002").row["big"] == 2**64 - 1 - 2


def test_json_with_nulls_holds_what_json_has_no_type_for(tmp_path: Path) -> None:
    run(tmp_path, _typed(tmp_path), [], format="webdataset", json_nulls=True)
    with tarfile.open(tmp_path / "out-webdataset" / "00000.tar") as tar:
        member = tar.extractfile("000003.json")
        assert member is not None
        found = json.loads(member.read(), parse_constant=pytest.fail)
    assert found["taken"] == "2020-01-04 00:00:00"
    assert found["big"] == 2**64 - 1 - 3
    assert found["price"] == 15.34
    assert found["blob"] == "ff00"
    assert found["pair"] == [1.0, None]
    assert found["error_message"] is None
    pq.read_table(tmp_path / "out-webdataset" / "00000.parquet")


def test_type_that_sql_does_not_know_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"filter 'f' .*Decimal") as caught:
        run(tmp_path, _typed(tmp_path), [{"filter": {"f": "wide > 1"}}])
    assert "\n" not in str(caught.value)


def test_phash_keeps_its_highest_bit_through_sql(tmp_path: Path) -> None:
    ds = run(tmp_path, _typed(tmp_path), [{"filter": {"high": "big >> 63 = 1 AND big <> 18446744073709551615"}}])
    assert ds.sql("SELECT count(*) FROM samples WHERE verdict = 'kept'").fetchall() == [(24,)]
    path = Path(ds.store.root) / "rows" / "00000.g0.parquet"
    assert duckdb.sql(f"SELECT max(big) FROM '{path}'").fetchall() == [(2**64 - 1,)]
