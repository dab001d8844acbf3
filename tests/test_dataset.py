"""A dataset as its users see it: views, masking, why, kept rows, the funnel; and that torn files never give wrong rows.

The numbers are worked out by hand. Rows hold number 0 … 29 in three shards of ten; 3 and 20 were not fetched.

    make_sevens   (number · 7) mod 13, NULL for multiples of 7, fails multiples of 11: 0, 11, 22
    filter small  number < 25: drops 25 26 27 28 29
    add_constant  sevens_value + 1
    filter big    plus_value > 6: NULL drops 7 14 21 as big:null; ≤ 6 dropped, > 6 kept

    number          1  2  4  5  6  8  9 10 12 13 15 16 17 18 19 23 24
    · 7 mod 13      7  1  2  9  3  4 11  5  6  0  1  8  2  9  3  5 12
    plus_value      8  2  3 10  4  5 12  6  7  1  2  9  3 10  4  6 13
    kept            x        x        x     x        x     x        x
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import synthetic
import yaml

import mmdata
from mmdata.dataset import Dataset
from mmdata.errors import RecipeError, SourceError, StoreError

STEPS = [
    "make_sevens",
    {"filter": {"small": "number < 25"}},
    {"add_constant": {"column": "sevens_value"}},
    {"filter": {"big": "plus_value > 6"}},
]
KEPT = [1, 5, 9, 12, 16, 18, 24]
UNFETCHED = [3, 20]
FAILED = [0, 11, 22]
SMALL = [25, 26, 27, 28, 29]
NULLS = [7, 14, 21]


def _make(folder: Path, **changes: Any) -> dict[str, Any]:
    synthetic.register_all()
    recipe = synthetic.make_dataset(folder, list(range(30)), status=lambda n: "timeout" if n in UNFETCHED else "ok")
    return {**recipe, "steps": STEPS, **changes}


@pytest.fixture(scope="module")
def ds(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The dataset of the docstring, run inline."""
    return mmdata.run(_make(tmp_path_factory.mktemp("dataset")), runner="inline")


def rows(ds: Dataset, query: str) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = ds.sql(query).fetchall()
    return found


# The views


def test_every_row_has_its_verdict(ds: Dataset) -> None:
    found = {n: tuple(rest) for n, *rest in rows(ds, "SELECT number, verdict, step, step_name, reason FROM samples")}
    for number in range(30):
        if number in UNFETCHED:
            expected: tuple[Any, ...] = ("failed", 0, "ingest", "timeout")
        elif number in FAILED:
            expected = ("failed", 1, "make_sevens", "eleven")
        elif number in SMALL:
            expected = ("dropped", 2, "small", "small")
        elif number in KEPT:
            expected = ("kept", None, None, None)
        else:
            expected = ("dropped", 4, "big", "big:null" if number in NULLS else "big")
        assert found[number] == expected, number
    assert len(found) == 30


def test_steps_a_row_never_reached_are_masked(ds: Dataset) -> None:
    query = "SELECT number, sevens_value, residue, sevens_reason, plus_value, plus_reason FROM samples ORDER BY row_id"
    found = {number: tuple(rest) for number, *rest in rows(ds, query)}
    assert found[3] == (None, None, "gated", None, "gated")  # not fetched
    assert found[11] == (None, None, "eleven", None, "gated")  # failed in make_sevens: all columns of it
    assert found[25] == (25 * 7 % 13, 0, None, None, "gated")  # dropped between the two
    assert found[7] == (None, 2, None, None, None)  # NULL that is a fact: no reason
    assert found[2] == (1.0, 2, None, 2.0, None)  # dropped last: all values show
    assert found[24] == (12.0, 4, None, 13.0, None)
    assert list(found) == list(range(30))


def test_samples_have_base_columns_verdict_then_steps(ds: Dataset) -> None:
    columns = ds.sql("SELECT * FROM samples").columns
    assert columns[:3] == ["row_id", "key", "uid"]
    assert columns.index("image_ext") < columns.index("verdict") < columns.index("sevens_value")
    assert columns[-6:] == ["reason", "sevens_value", "residue", "sevens_reason", "plus_value", "plus_reason"]
    assert len(columns) == len(set(columns))


def test_the_other_views(ds: Dataset) -> None:
    assert rows(ds, "SELECT count(*), count(DISTINCT key) FROM rows") == [(30, 30)]
    assert rows(ds, "SELECT verdict, count(*) FROM verdicts GROUP BY 1 ORDER BY 1") == [
        ("dropped", 18),
        ("failed", 5),
        ("kept", 7),
    ]
    assert rows(ds, "SELECT status, runner, len(steps) > 0 FROM runs") == [("done", "inline", True)]
    [name] = [n for n in ds.current.sets if n.startswith("add_constant-")]  # type: ignore[union-attr]
    # Unmasked, and with the column's own name: what was never computed says so.
    query = f'SELECT reason, count(*), count(plus_value) FROM "columns"."{name}" GROUP BY 1 ORDER BY 1 NULLS FIRST'
    assert rows(ds, query) == [(None, 20, 17), ("uncovered", 10, 0)]


def test_samples_gives_the_kept_ones(ds: Dataset) -> None:
    assert [n for (n,) in ds.samples().project("number").fetchall()] == KEPT


def test_aliases_name_the_columns_of_samples(tmp_path: Path) -> None:
    steps = ["make_sevens", {"make_sevens": {"as": "x", "times": 5, "on_error": "keep"}}]
    made = mmdata.run(_make(tmp_path, steps=steps), runner="inline")
    assert made.sql("SELECT * FROM samples").columns[-6:] == [
        *("sevens_value", "residue", "sevens_reason", "x_value", "x_residue", "x_reason"),
    ]
    kept = "SELECT x_value, x_reason, count(*) FROM samples WHERE number = 2 OR number = 22 GROUP BY ALL ORDER BY 1"
    assert rows(made, kept) == [(10.0, None, 1), (None, "gated", 1)]
    # With on_error: keep a failed row goes on, and says why it has no value.
    kept_on = mmdata.run(_make(tmp_path / "b", steps=[{"make_sevens": {"on_error": "keep"}}]), runner="inline")
    assert rows(kept_on, "SELECT verdict, sevens_value, sevens_reason FROM samples WHERE number = 22") == [
        ("kept", None, "eleven")
    ]


# Why, kept, funnel


def key_of(ds: Dataset, number: int) -> str:
    [(key,)] = rows(ds, f"SELECT key FROM rows WHERE number = {number}")
    return str(key)


def test_why_kept(ds: Dataset) -> None:
    story = ds.why(key_of(ds, 24))
    assert (story.verdict, story.step_name, story.reason) == ("kept", None, None)
    assert story.row["number"] == 24
    assert [(s.name, s.state, dict(s.values)) for s in story.steps] == [
        ("make_sevens", "passed", {"sevens_value": 12.0, "residue": 4}),
        ("small", "passed", {}),
        ("add_constant", "passed", {"plus_value": 13.0}),
        ("big", "passed", {}),
    ]
    assert story.steps[3].sql == "(plus_value > 6)"


@pytest.mark.parametrize(
    ("number", "verdict", "states", "reason"),
    [
        (3, "failed", ["gated", "gated", "gated", "gated"], "timeout"),
        (11, "failed", ["failed", "gated", "gated", "gated"], "eleven"),
        (25, "dropped", ["passed", "dropped", "gated", "gated"], "small"),
        (7, "dropped", ["passed", "passed", "passed", "dropped"], "big:null"),
        (2, "dropped", ["passed", "passed", "passed", "dropped"], "big"),
    ],
)
def test_why_not(ds: Dataset, number: int, verdict: str, states: list[str], reason: str) -> None:
    story = ds.why(key_of(ds, number))
    assert (story.verdict, story.reason, [s.state for s in story.steps]) == (verdict, reason, states)
    assert all(not s.values for s in story.steps if s.state == "gated")
    stopped = [s.reason for s in story.steps if s.state in ("failed", "dropped")]
    assert stopped == ([] if number == 3 else [reason])


def test_why_of_an_unknown_key(ds: Dataset) -> None:
    with pytest.raises(SourceError, match=r"no row of .* has the key '99'; find keys with mmdata sql"):
        ds.why("99")


def test_kept_rows_of_a_shard(ds: Dataset) -> None:
    assert ds.shards() == [0, 1, 2]
    tables = [ds.kept(shard) for shard in ds.shards()]
    assert [t.column("number").to_pylist() for t in tables] == [[1, 5, 9], [12, 16, 18], [24]]
    assert tables[2].column("plus_value").to_pylist() == [13.0]
    assert tables[2].column("sevens_reason").to_pylist() == [None]
    few = ds.kept(0, ["plus_value"])
    assert few.column_names[-1] == "plus_value"
    assert "sevens_value" not in few.column_names
    assert few.column("plus_value").to_pylist() == [8.0, 10.0, 12.0]
    [row] = ds.kept(2).to_pylist()
    assert ds.read_media(row["image_path"], row["image_offset"], row["image_size"]) == synthetic.png(24)


def test_the_funnel(ds: Dataset) -> None:
    funnel = ds.funnel()
    assert (funnel.rows_in, funnel.kept, funnel.dropped, funnel.failed) == (30, 7, 18, 5)
    assert [(s.name, s.rows_in, s.dropped, s.failed, s.rows_out) for s in funnel.steps] == [
        ("ingest", 30, 0, 2, 28),
        ("make_sevens", 28, 0, 3, 25),
        ("small", 25, 5, 0, 20),
        ("add_constant", 20, 0, 0, 20),
        ("big", 20, 13, 0, 7),
    ]
    assert funnel.steps[4].reasons == {"big": 10, "big:null": 3}
    assert funnel.steps[0].reasons == {"timeout": 2}


def test_a_filter_that_raises_for_a_row_drops_that_row(tmp_path: Path) -> None:
    steps = [{"filter": {"cast": "CAST(caption AS INTEGER) > 0"}}]
    made = mmdata.run(_make(tmp_path, steps=steps), runner="inline")
    # 28 rows came; the caption is NULL for multiples of 9: 0, 9, 18, 27.
    assert made.funnel().steps[1].reasons == {"cast:error": 24, "cast:null": 4}


# From Python


def test_a_list_without_rows_kept_is_an_answer_too(tmp_path: Path) -> None:
    made = mmdata.run(_make(tmp_path, steps=[{"filter": {"none": "number < 0"}}]), runner="inline")
    assert made.samples().fetchall() == []
    assert [len(made.kept(s)) for s in made.shards()] == [0, 0, 0]
    assert made.funnel().kept == 0


def test_in_memory(tmp_path: Path) -> None:
    recipe = synthetic.synthetic_recipe(tmp_path, list(range(5)))
    recipe["source"]["path"] = str(tmp_path / "list.parquet")
    recipe |= {"dataset": "memory://test-dataset/pets", "steps": [{"filter": {"f": "number > 1"}}]}
    recipe["fetch"] = {"shard_rows": 2, "timeout_s": 1}
    # Every URL is refused without a look-up: port 0 of a private address.
    table = pq.read_table(tmp_path / "list.parquet")
    urls = pa.array([f"http://127.0.0.1:9/{n}.png" for n in range(5)])
    pq.write_table(table.set_column(0, "url", urls), tmp_path / "list.parquet")
    made = mmdata.run(recipe, runner="inline")
    assert rows(made, "SELECT status, count(*) FROM samples GROUP BY 1") == [("refused_address", 5)]
    assert mmdata.open("memory://test-dataset/pets").funnel().failed == 5
    assert made.why(key_of(made, 4)).reason == "refused_address"
    assert [p.name for p in tmp_path.iterdir()] == ["list.parquet"]
    with pytest.raises(RecipeError, match="--runner inline"):
        mmdata.run(recipe, runner="ray")


def test_a_stage_of_one_function_in_a_script(tmp_path: Path) -> None:
    recipe = synthetic.make_dataset(tmp_path, list(range(10)))
    (tmp_path / "recipe.json").write_text(json.dumps({**recipe, "steps": []}))
    script = tmp_path / "mine.py"
    script.write_text(
        "import json, mmdata\n"
        "@mmdata.stage(reads='image', writes='mean_level: float32')\n"
        "def measure_level(batch):\n"
        "    return {'mean_level': [p.mean() for p in batch.pixels()]}\n"
        "recipe = json.load(open('recipe.json')) | {'steps': ['measure_level', {'filter': {'f': 'mean_level >= 7'}}]}\n"
        "print(mmdata.run(recipe, runner='inline').sql('SELECT key, mean_level FROM samples').fetchall())\n"
    )
    command = [sys.executable, "-W", "ignore::ResourceWarning", str(script)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    made = mmdata.open(tmp_path / "dataset")
    # synthetic.png(n) is a grey picture of level n.
    assert rows(made, "SELECT number, mean_level FROM samples WHERE verdict = 'kept' ORDER BY 1") == [
        (7, 7.0),
        (8, 8.0),
        (9, 9.0),
    ]


def test_a_yaml_path_with_overrides_is_a_recipe_too(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(_make(tmp_path)))
    made = mmdata.run(path, overrides=["filters.small=number < 5"], runner="inline")
    assert [n for (n,) in made.samples().project("number").fetchall()] == [1]


def test_a_dataset_sees_the_run_it_was_opened_after(tmp_path: Path) -> None:
    recipe = _make(tmp_path)
    first = mmdata.run(recipe, runner="inline")
    assert first.sql("SELECT count(*) FROM samples WHERE verdict = 'kept'").fetchall() == [(7,)]
    mmdata.run(recipe, overrides=["filters.small=number < 5"], runner="inline")
    assert first.sql("SELECT count(*) FROM samples WHERE verdict = 'kept'").fetchall() == [(7,)]
    assert mmdata.open(recipe["dataset"]).funnel().kept == 1


# What is damaged is said, not shown


def test_no_dataset_and_no_finished_run(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"there is no dataset at .*nothing; make one with mmdata run RECIPE"):
        mmdata.open(tmp_path / "nothing")
    recipe = _make(tmp_path)
    young = mmdata.open(recipe["dataset"])
    assert young.current is None
    for ask in (
        lambda: young.sql("SELECT 1"),
        young.funnel,
        young.shards,
        lambda: young.why("0"),
        lambda: young.kept(0),
    ):
        with pytest.raises(StoreError, match=r"no run has finished on .* yet; run its recipe to the end first"):
            ask()


@pytest.fixture
def damaged(tmp_path: Path, ds: Dataset) -> Path:
    """A copy of the dataset, to be damaged."""
    shutil.copytree(ds.store.root, tmp_path / "copy")
    return tmp_path / "copy"


def _set_files(folder: Path, operator: str) -> list[Path]:
    return sorted(folder.glob(f"columns/{operator}-*/*.parquet"))


def test_a_file_that_is_gone(damaged: Path) -> None:
    _set_files(damaged, "make_sevens")[1].unlink()
    with pytest.raises(StoreError, match=r"make_sevens-.* is missing or torn"):
        mmdata.open(damaged).sql("SELECT * FROM samples")


def test_a_file_that_is_cut_short(damaged: Path) -> None:
    path = _set_files(damaged, "make_sevens")[1]
    os.truncate(path, path.stat().st_size - 10)
    with pytest.raises(StoreError, match=r"make_sevens-.* is missing or torn"):
        mmdata.open(damaged).sql("SELECT * FROM samples")


def test_a_file_with_a_row_less(damaged: Path) -> None:
    path = _set_files(damaged, "add_constant")[0]
    pq.write_table(pq.read_table(path).slice(0, 9), path)
    with pytest.raises(StoreError, match=r"shard 00000 of add_constant-\w+ has 9 rows where the base rows have 10"):
        mmdata.open(damaged).sql("SELECT number FROM samples")


@pytest.mark.parametrize("what", ["make_sevens", "verdicts", "rows"])
def test_files_of_two_shards_that_were_swapped(damaged: Path, what: str) -> None:
    files = sorted([*damaged.glob(f"columns/{what}-*/*.parquet"), *damaged.glob(f"{what}/**/*.parquet")])
    first, second = files[0].read_bytes(), files[1].read_bytes()
    files[0].write_bytes(second)
    files[1].write_bytes(first)
    with pytest.raises(StoreError, match=r"shard 00000 .*row_id"):
        mmdata.open(damaged).sql("SELECT number FROM samples").fetchall()
    with pytest.raises(StoreError, match="row_id"):
        mmdata.open(damaged).kept(0)


def test_a_file_whose_rows_are_in_another_order(damaged: Path) -> None:
    path = _set_files(damaged, "make_sevens")[2]
    table = pq.read_table(path)
    pq.write_table(table.take(list(reversed(range(10)))), path)
    # Footers cannot tell; what hands rows on, such as an export, looks at every row.
    assert len(mmdata.open(damaged).kept(1)) == 3
    with pytest.raises(StoreError, match=r"shard 00002 .*row_id"):
        mmdata.open(damaged).kept(2)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 99}', "null"])
def test_a_current_json_that_says_nothing(damaged: Path, text: str) -> None:
    (damaged / "current.json").write_text(text)
    with pytest.raises(StoreError, match=r"current\.json .* is damaged|has format 99"):
        mmdata.open(damaged)


def test_a_run_record_that_is_torn(damaged: Path) -> None:
    [record] = sorted((damaged / "runs").iterdir())
    record.write_text(record.read_text()[:50])
    with pytest.raises(StoreError, match=r"runs/.*\.json .* is damaged .*; remove it"):
        mmdata.open(damaged).sql("SELECT * FROM runs")


def test_a_dataset_that_was_moved_is_the_same(damaged: Path, ds: Dataset) -> None:
    query = "SELECT * FROM samples ORDER BY row_id"
    assert rows(mmdata.open(damaged), query) == rows(ds, query)
