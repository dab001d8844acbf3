"""Many recipes over one dataset: each keeps its own answer, nothing is computed twice, `clean` takes what none needs.

Rows hold number 0 … 29 in three shards of ten. `make_sevens` fails 0, 11 and 22; `low` keeps numbers below its bound.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import synthetic

import mmdata
from mmdata.clean import clean
from mmdata.column_files import write_parquet
from mmdata.columns import base_schema
from mmdata.dataset import Dataset
from mmdata.errors import BudgetError, RecipeError, StoreError
from mmdata.ledger import dataset_document, update_dataset

NUMBERS = list(range(30))


@pytest.fixture(autouse=True)
def _operators() -> None:
    synthetic.register_all()
    synthetic.COMPUTED.clear()


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Any]:
    return synthetic.make_dataset(tmp_path, NUMBERS)


def run(base: dict[str, Any], name: str, bound: int, *more: Any) -> Dataset:
    steps = ["make_sevens", {"filter": {"low": f"number < {bound}"}}, *more]
    return mmdata.run({**base, "name": name, "steps": steps}, runner="inline")


def kept(ds: Dataset) -> list[int]:
    return [n for (n,) in ds.sql("SELECT number FROM samples WHERE verdict = 'kept' ORDER BY 1").fetchall()]


def below(bound: int) -> list[int]:
    return [n for n in range(bound) if n not in (0, 11, 22)]


def files(folder: str) -> dict[str, int]:
    found = [p for p in Path(folder).rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): p.stat().st_size for p in found if p.name not in ("lease.json", ".lock")}


def test_each_recipe_keeps_its_answer(base: dict[str, Any]) -> None:
    run(base, "strict", 5)
    run(base, "loose", 20)
    path = base["dataset"]
    assert kept(mmdata.open(path)) == below(20)
    assert kept(mmdata.open(path, "strict")) == below(5)
    assert kept(mmdata.open(path, selection="loose")) == below(20)
    assert mmdata.open(path).latest() == "loose"
    # The same recipe again is the latest again; what it says is what it said.
    again = run(base, "strict", 5)
    assert again.report is not None
    assert again.report.changed
    assert mmdata.open(path).latest() == "strict"
    # Edited under its name, it replaces its own selection and no other.
    run(base, "strict", 7)
    assert kept(mmdata.open(path, "strict")) == below(7)
    assert kept(mmdata.open(path, "loose")) == below(20)
    assert sorted(mmdata.open(path).selections()) == ["loose", "strict"]


def test_a_second_recipe_computes_nothing_and_adds_verdicts_only(base: dict[str, Any]) -> None:
    run(base, "first", 20)
    before = files(base["dataset"])
    for number in range(3):
        synthetic.COMPUTED.clear()
        synthetic.OPENED.clear()
        ds = run(base, f"other{number}", 10 + number)
        assert not synthetic.COMPUTED
        assert not synthetic.OPENED
        assert ds.report is not None
        assert ds.report.media_reads == 0
    now = files(base["dataset"])
    new = {name.split("/")[0] for name in now.keys() - before.keys()}
    assert new == {"verdicts", "state", "runs"}
    assert len([n for n in now.keys() - before.keys() if n.startswith("verdicts/")]) == 9
    assert {n for n in before if now.get(n) != before[n]} == {"current.json"}


def test_an_unknown_selection_is_an_error(base: dict[str, Any]) -> None:
    run(base, "strict", 5)
    with pytest.raises(RecipeError, match=r"has no selection 'strikt'; did you mean 'strict'\?"):
        mmdata.open(base["dataset"], "strikt")


def test_clean_takes_what_no_selection_needs(base: dict[str, Any]) -> None:
    run(base, "strict", 5)
    run(base, "loose", 20, {"add_constant": {"column": "sevens_value"}})
    store = mmdata.open(base["dataset"]).store
    assert clean(store, grace_s=0) == []
    [plus] = [name for name in store.column_sets() if name.startswith("add_constant")]
    freed = {name for name, _ in clean(store, grace_s=0, forgotten="loose")}
    assert {name.split("/")[0] for name in freed} == {"columns", "verdicts", "state"}
    assert {name.split("/")[1] for name in freed if name.startswith("columns/")} == {plus}
    assert kept(mmdata.open(base["dataset"])) == below(5)
    assert mmdata.open(base["dataset"]).latest() == "strict"
    # What is left is enough to go on from: only the set that was given up is computed anew.
    synthetic.COMPUTED.clear()
    assert kept(run(base, "loose", 20, {"add_constant": {"column": "sevens_value"}})) == below(20)
    assert {operator for operator, _, _ in synthetic.COMPUTED} == {"add_constant"}


def test_clean_keeps_the_column_files_a_selection_names(base: dict[str, Any]) -> None:
    """A loosened filter below adds to a column set; the selection that was there first still reads its own files."""
    gated = [{"filter": {"early": "number < 12"}}, "make_sevens"]
    mmdata.run({**base, "name": "narrow", "steps": gated}, runner="inline")
    wide = [{"filter": {"early": "number < 18"}}, "make_sevens"]
    mmdata.run({**base, "name": "wide", "steps": wide}, runner="inline")
    store = mmdata.open(base["dataset"]).store
    [name] = store.column_sets()
    assert store.list(f"columns/{name}") == [
        *("00000.c0.parquet", "00001.c0.parquet", "00001.c1.parquet", "00002.c0.parquet"),
    ]
    clean(store, grace_s=0)
    assert "00001.c0.parquet" in store.list(f"columns/{name}")
    assert kept(mmdata.open(base["dataset"], "narrow")) == [n for n in range(12) if n not in (0, 11)]
    clean(store, grace_s=0, forgotten="narrow")
    assert "00001.c0.parquet" not in store.list(f"columns/{name}")
    assert kept(mmdata.open(base["dataset"])) == [n for n in range(18) if n not in (0, 11)]


def test_clean_leaves_what_a_stopped_run_computed(base: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run(base, "done", 5)

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mmdata.run_ledger.publish", stop)
        with pytest.raises(KeyboardInterrupt):
            run(base, "stopped", 20, {"add_constant": {"column": "sevens_value"}})
    store = mmdata.open(base["dataset"]).store
    freed = {name for name, _ in clean(store, grace_s=0)}
    assert {name.split("/")[0] for name in freed} <= {"verdicts"}
    synthetic.COMPUTED.clear()
    assert kept(run(base, "stopped", 20, {"add_constant": {"column": "sevens_value"}})) == below(20)
    assert not synthetic.COMPUTED
    assert [n for n in store.list("state") if n.startswith("computing-")] == []


def _grow(base: dict[str, Any], folder: Path) -> None:
    """A fourth shard of ten rows, numbers 30 … 39, none of them fetched."""
    store = mmdata.open(base["dataset"]).store
    extra = pa.schema([("number", pa.int64())])
    rows = [
        {"row_id": (3 << 24) + i, "key": f"00003{i}", "uid": "u", "url": "u", "number": 30 + i, "status": "timeout"}
        for i in range(10)
    ]
    write_parquet(pa.Table.from_pylist(rows, schema=base_schema(extra)), folder / "rows.parquet")
    store.commit("rows/00003.g0.parquet", folder / "rows.parquet")
    document = dataset_document(store)
    assert document is not None
    document.sources[0]["shards"] = 4
    update_dataset(store, document)


def test_a_selection_over_older_shards_stays_whole(base: dict[str, Any], tmp_path: Path) -> None:
    run(base, "before", 20)
    old = sorted(p.name for p in Path(base["dataset"], "verdicts").rglob("*.parquet"))
    _grow(base, tmp_path)
    grown = run(base, "after", 20)
    assert grown.funnel().rows_in == 40
    before = mmdata.open(base["dataset"], "before")
    assert before.funnel().rows_in == 30
    assert before.sql("SELECT count(*) FROM samples").fetchall() == [(30,)]
    # The chain is the same, and so are the verdicts of the older shards: only the new shard's were written.
    assert sorted(p.name for p in Path(base["dataset"], "verdicts").rglob("*.parquet")) == [*old, "00003.parquet"]
    assert grown.why("000035").reason == "timeout"


def test_a_missing_list_of_files_is_written_anew(base: dict[str, Any]) -> None:
    run(base, "strict", 5)
    [listed] = Path(base["dataset"], "state").glob("selection-*.parquet")
    listed.unlink()
    with pytest.raises(StoreError, match="is missing"):
        kept(mmdata.open(base["dataset"]))
    assert kept(run(base, "strict", 5)) == below(5)


def test_a_file_put_in_place_of_another_is_an_error(base: dict[str, Any]) -> None:
    run(base, "strict", 30)
    folder = Path(base["dataset"])
    path = sorted(folder.glob("columns/*/00001.c0.parquet"))[0]
    table = pq.read_table(path)
    # As many rows with the same ids, but other values: its footer shows nothing, its size does.
    pq.write_table(table.set_column(1, "sevens_value", pa.array([1.5] * 10, pa.float32())), path)
    with pytest.raises(StoreError, match="is not the file that the run wrote"):
        kept(mmdata.open(folder))
    # Another stamp alone is looked into, and is no error: a copied dataset has only such.
    copied = next(iter(folder.glob("rows/00000.g0.parquet")))
    pq.write_table(table, path)
    run(base, "strict", 30)
    os.utime(copied, (1, 1))
    assert kept(mmdata.open(folder)) == below(30)


def test_rows_with_one_key_are_all_told(tmp_path: Path) -> None:
    base = synthetic.make_dataset(tmp_path, NUMBERS)
    for path in sorted(Path(base["dataset"], "rows").iterdir()):
        table = pq.read_table(path)
        keys = pa.array([f"k{n % 7}" for n in table["number"].to_pylist()])
        write_parquet(table.set_column(table.schema.get_field_index("key"), "key", keys), path)
    ds = run(base, "strict", 5)
    story = ds.why("k3")
    told = [story, *story.others]
    assert [s.row["number"] for s in told] == [3, 10, 17, 24]
    assert [s.verdict for s in told] == ["kept", "dropped", "dropped", "dropped"]


def test_show_lists_the_selections(base: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    from mmdata import cli

    run(base, "strict", 5)
    run(base, "loose", 20)
    with pytest.raises(SystemExit) as done:
        cli.main(["show", base["dataset"], "--selection", "strict"])
    assert done.value.code in (0, None)
    lines = capsys.readouterr().out.splitlines()
    # 4 of 30 and 18 of 30 are kept.
    [loose, strict] = lines[lines.index("selections:") + 1 :]
    assert loose.startswith("  loose   18 of 30 kept (60.0 %), ")
    assert loose.endswith(" UTC, latest")
    assert strict.startswith("  strict  4 of 30 kept (13.3 %), ")
    assert strict.endswith(" UTC, shown")


# Budgets


class Fussy(synthetic.RankRows):
    """Ranks rows as its base does, and fails every other one. Reads number. Writes rank_rank; NULL where it failed."""

    name, label = "rank_fussily", "fussy"

    def compute(self, rows: pa.Table) -> Any:
        ranks = super().compute(rows)["rank_rank"]
        return {"rank_rank": [synthetic.Failed("odd") if i % 2 else r for i, r in enumerate(ranks)]}


@pytest.mark.parametrize("allowed", [0.4, 0.6])
def test_a_group_has_a_budget_too(tmp_path: Path, allowed: float) -> None:
    from mmdata import registry

    registry.register(Fussy)
    base = synthetic.make_dataset(tmp_path, list(range(300)), 100)
    steps: list[Any] = [{"rank_fussily": {"by": "number", "max_failed": allowed}}]
    if allowed > 0.5:
        assert mmdata.run({**base, "steps": steps}, runner="inline").funnel().failed == 150
        return
    for _ in range(2):  # also when the group's columns are there
        with pytest.raises(BudgetError, match="step rank_fussily: 150 of 300 rows failed"):
            mmdata.run({**base, "steps": steps}, runner="inline")
    assert json.loads((tmp_path / "dataset" / "dataset.json").read_text())["format"] == 1
    assert not (tmp_path / "dataset" / "current.json").exists()
