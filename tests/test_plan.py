"""What a plan proves and names: identities that change exactly when values may, warnings, and what is left to do."""

from __future__ import annotations

import io
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import synthetic
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import Field
from rich.console import Console

import mmdata
from mmdata import outlook, registry
from mmdata.errors import RecipeError
from mmdata.plan import Plan, Resolved, chain, identity, plan_recipe
from mmdata.preflight import prove
from mmdata.recipe import parse
from mmdata.stage import Contract, Options, Stage, parse_schema, stage

EXTRA = pa.schema([("number", pa.int64()), ("license", pa.string())])
HASH = {"near_duplicates": {"of": "phash"}}


@pytest.fixture(autouse=True, scope="module")
def _operators() -> None:
    synthetic.register_all()


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


def plan(*steps: Any, **changes: Any) -> Plan:
    source = {"kind": "urls", "path": "list.parquet", "caption": "caption"}
    return plan_recipe(parse({"name": "t", "dataset": "d", "source": source, "steps": steps, **changes}), EXTRA)


def sets(made: Plan, digest: str = "rows") -> dict[int, str]:
    """Position → set name of every stage and group, as a run would give them; groups see the rows `digest` names."""
    found: dict[int, str] = {}
    for step in made.steps:
        if step.kind != "filter":
            resolved = Resolved(precision=step.contract.precision if step.contract else None)
            found[step.position] = identity(step, resolved, found, digest if step.kind == "group" else None)[0]
    return found


def ids(*steps: Any, digest: str = "rows", **changes: Any) -> dict[str, str]:
    """Step name → set name."""
    made = plan(*steps, **changes)
    found = sets(made, digest)
    return {s.name: found[s.position] for s in made.steps if s.position in found}


def chain_of(*steps: Any) -> str:
    made = plan(*steps)
    return chain(made.steps, sets(made))


# Identities


def test_the_same_options_make_the_same_set() -> None:
    assert ids("make_sevens") == ids({"make_sevens": {}}) == ids({"make_sevens": {"times": 7}})
    name = ids("make_sevens")["make_sevens"]
    assert name.startswith("make_sevens-")
    assert len(name) == len("make_sevens-") + 16


def test_another_option_makes_another_set() -> None:
    assert ids("make_sevens") != ids({"make_sevens": {"times": 5}})


def test_what_does_not_enter_an_identity() -> None:
    bare = ids("make_sevens")["make_sevens"]
    assert ids({"make_sevens": {"as": "fives"}})["fives"] == bare
    assert ids({"make_sevens": {"on_error": "keep", "max_failed": 1}})["make_sevens"] == bare
    assert ids("measure_mean", {"filter": {"f": "number > 1"}}, "make_sevens")["make_sevens"] == bare
    assert ids("make_sevens", seed=5, name="other", dataset="elsewhere")["make_sevens"] == bare


def test_an_upstream_option_changes_what_reads_it_and_nothing_else() -> None:
    steps = [
        "probe_image",
        {"add_constant": {"column": "sevens_value"}},
        {"add_constant": {"as": "far", "column": "plus_value"}},
    ]
    before, after = ids("make_sevens", *steps), ids({"make_sevens": {"times": 5}}, *steps)
    assert before["add_constant"] != after["add_constant"]
    assert before["far"] != after["far"]
    assert before["probe_image"] == after["probe_image"]


def test_a_column_is_known_by_its_set_not_by_its_alias() -> None:
    plain = ids("make_sevens", {"add_constant": {"column": "sevens_value"}})
    renamed = ids({"make_sevens": {"as": "x"}}, {"add_constant": {"column": "x_value"}})
    assert plain["add_constant"] == renamed["add_constant"]
    other = ids({"make_sevens": {"times": 5, "as": "x"}}, "make_sevens", {"add_constant": {"column": "x_value"}})
    assert other["add_constant"] != plain["add_constant"]


def test_a_group_depends_on_its_rows_and_a_stage_after_it_too() -> None:
    steps = ["hash_image", HASH, {"add_constant": {"column": "near_duplicates_count"}}]
    one, two = ids(*steps, digest="one"), ids(*steps, digest="two")
    assert one["hash_image"] == two["hash_image"]
    assert one["near_duplicates"] != two["near_duplicates"]
    assert one["add_constant"] != two["add_constant"]


def test_the_order_of_a_group_counts_by_its_meaning() -> None:
    def ordered(term: str) -> str:
        return ids({"rank_rows": {"prefer": [term]}})["rank_rows"]

    assert ordered("number desc") == ordered(" NUMBER  DESC nulls last ")
    assert ordered("number") != ordered("number desc")
    assert ordered("number") != ordered("row_id")


def test_the_order_of_a_group_knows_a_column_by_its_set_not_by_its_alias() -> None:
    def ordered(alias: str, term: str, times: int = 7) -> str:
        stage = {"make_sevens": {"as": alias, "times": times}}
        return ids(stage, {"rank_rows": {"prefer": [term]}})["rank_rows"]

    plain = ordered("b", "b_value * number desc")
    assert ordered("zz", "zz_value * number desc") == plain
    assert ordered("zz", "zz_residue * number desc") != plain
    assert ordered("zz", "zz_value * number desc", times=5) != plain
    assert ordered("zz", "number * zz_value desc") != plain


def test_the_seed_enters_only_where_an_operator_has_one() -> None:
    class DrawOptions(Options):
        seed: int = Field(0, description="of the draw")

    class Draw(Stage[DrawOptions]):
        """A number."""

        name = "draw_number"

        @classmethod
        def contract(cls, options: DrawOptions) -> Contract:
            return Contract(writes=parse_schema("drawn: int64"), reads=("number",))

    registry.register(Draw)
    assert ids("draw_number", seed=1) == ids({"draw_number": {"seed": 1}}, seed=2)
    assert ids("draw_number", seed=1) != ids("draw_number", seed=2)


def test_a_decorated_stage_is_known_by_its_file(tmp_path: Path) -> None:
    def made(text: str) -> str:
        path = tmp_path / "own.py"
        path.write_text(f"import mmdata\n\n\n@mmdata.stage(reads='number', writes='half: float64')\n{text}")
        runpy.run_path(str(path))
        return ids("halve")["halve"]

    one = made("def halve(batch):\n    return {'half': [n / 2 for n in batch['number']]}\n")
    assert one == made("def halve(batch):\n    return {'half': [n / 2 for n in batch['number']]}\n")
    assert one != made("def halve(batch):\n    return {'half': [n / 3 for n in batch['number']]}\n")


# What the fixture puts back does not change between examples.
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.permutations(["make_sevens", "measure_mean", "probe_image", "probe_text"]), st.sets(st.integers(0, 4)))
def test_position_and_filters_never_change_a_stage(order: list[str], filters: set[int]) -> None:
    steps: list[Any] = list(order)
    for number in sorted(filters, reverse=True):
        steps.insert(number, {"filter": {f"f{number}": f"number > {number}"}})
    assert ids(*steps) == ids(*sorted(order))


# The chain


def test_the_chain_sees_meaning_not_spelling() -> None:
    base = chain_of("make_sevens", {"filter": {"f": "sevens_value > 2"}})
    assert base == chain_of("make_sevens", {"filter": {"f": "  sevens_value\n   >2  -- two\n"}})
    assert base == chain_of({"make_sevens": {"max_failed": 1}}, {"filter": {"f": "(SEVENS_VALUE > 2)"}})
    assert base != chain_of("make_sevens", {"filter": {"f": "sevens_value > 3"}})
    assert base != chain_of("make_sevens", {"filter": {"g": "sevens_value > 2"}})
    assert base != chain_of({"make_sevens": {"on_error": "keep"}}, {"filter": {"f": "sevens_value > 2"}})
    assert base != chain_of({"make_sevens": {"times": 5}}, {"filter": {"f": "sevens_value > 2"}})


def test_the_chain_sees_the_order_of_steps() -> None:
    a, b = {"filter": {"a": "number > 1"}}, {"filter": {"b": "number < 9"}}
    assert chain_of(a, b) != chain_of(b, a)
    assert chain_of(a) != chain_of()


# Names of columns


@pytest.mark.parametrize(
    ("step", "columns"),
    [
        ("make_sevens", ["sevens_value", "residue"]),
        ({"make_sevens": {"as": "x"}}, ["x_value", "x_residue"]),
        ("hash_image", ["phash"]),
        ({"hash_image": {"as": "x"}}, ["x_phash"]),
    ],
)
def test_columns_under_as(step: Any, columns: list[str]) -> None:
    made = plan(step)
    assert [visible for _, visible in made.steps[0].outputs] == columns
    assert set(columns) < set(made.columns.names)
    label = "x" if isinstance(step, dict) else {"make_sevens": "sevens", "hash_image": "image_hash"}[step]
    assert made.steps[0].reason_column == f"{label}_reason"


def test_the_same_operator_twice_under_two_names() -> None:
    made = plan("make_sevens", {"make_sevens": {"as": "x"}}, {"filter": {"same": "x_value = sevens_value"}})
    assert [i.made_by for i in made.steps[2].inputs] == [1, 2]
    assert [i.own for i in made.steps[2].inputs] == ["sevens_value", "sevens_value"]


def test_a_column_made_twice_is_refused() -> None:
    with pytest.raises(RecipeError, match="column 'x_value' is already made by step x; give the step another `as:`"):
        plan(
            {"make_sevens": {"as": "x"}},
            {"add_constant": {"as": "x_value", "column": "number"}},
            *[_writes("second", "x_value: int64")],
        )


def _writes(name: str, columns: str) -> str:
    stage(reads="number", writes=columns, name=name)(lambda batch: {})
    return name


@pytest.mark.parametrize("column", ["row_id", "verdict", "reason", "step_name", "number", "image_path", "status"])
def test_a_step_may_not_write_a_base_column(column: str) -> None:
    with pytest.raises(RecipeError, match=f"column '{column}' is already made by the base rows"):
        plan(_writes("bold", f"{column}: string"))


# Passes and warnings


def test_a_group_ends_a_pass_and_a_filter_does_not() -> None:
    rule = {"filter": {"f": "number > 1"}}
    made = plan(
        "hash_image", rule, "make_sevens", HASH, {"filter": {"first": "near_duplicates_rank = 1"}}, "measure_mean"
    )
    shape = [([s.name for s in p.steps], p.group.name if p.group else None) for p in made.passes]
    assert shape == [
        (["hash_image", "f", "make_sevens"], "near_duplicates"),
        (["first", "measure_mean"], None),
    ]
    assert [len(p.steps) for p in plan().passes] == [0]


def test_a_filter_after_a_group_that_does_not_read_it_is_warned_of() -> None:
    first = {"filter": {"first": "near_duplicates_rank = 1"}}
    late = {"filter": {"wide": "width_px > 10"}}
    [warning] = plan("hash_image", HASH, first, late).warnings
    assert "filter wide follows near_duplicates" in warning
    assert "the whole cluster is gone" in warning
    assert plan("hash_image", late, HASH, first).warnings == ()


# What is left to do


def left(recipe: dict[str, Any], *steps: Any) -> dict[str, tuple[int | None, bool]]:
    """Step name → (rows left, is only a bound), of every stage and group."""
    seen = outlook.look(prove(parse({**recipe, "steps": steps})))
    return {s.step.name: (s.rows_left, s.is_bound) for s in seen.steps if s.step.kind != "filter"}


PLUS = {"add_constant": {"column": "sevens_value"}}


def test_the_outlook_counts_exactly_what_a_run_then_computes(tmp_path: Path) -> None:
    recipe = synthetic.make_dataset(tmp_path, list(range(30)), status=lambda n: "dns" if n == 25 else "ok")
    steps = ["make_sevens", {"filter": {"low": "number >= 20"}}, PLUS, "rank_rows"]

    # Nothing computed: 29 rows are ok. What follows is bounded by the rows there are, or not known.
    assert left(recipe, *steps) == {"make_sevens": (29, False), "add_constant": (29, True), "rank_rows": (None, True)}
    ds = mmdata.run({**recipe, "steps": steps}, runner="inline")
    assert ds.report is not None
    # make_sevens fails 0, 11 and 22; 20..29 without 22 and 25 go on: 8.
    computed = {n: w.computed for n, w in ds.report.work.items() if w.computed}
    assert computed == {"make_sevens": 29, "add_constant": 8, "rank_rows": 8}
    assert left(recipe, *steps) == {"make_sevens": (0, False), "add_constant": (0, False), "rank_rows": (0, False)}

    # Loosened to 10: 10 and 12..19 come in addition (11 failed): 9 rows, known exactly. The group sees another set.
    steps[1] = {"filter": {"low": "number >= 10"}}
    assert left(recipe, *steps) == {"make_sevens": (0, False), "add_constant": (9, False), "rank_rows": (None, True)}
    report = mmdata.run({**recipe, "steps": steps}, runner="inline").report
    assert report is not None
    assert {n: w.computed for n, w in report.work.items() if w.computed} == {"add_constant": 9, "rank_rows": 17}

    # Tightened: nothing but the group, over the rows that are left: 28, 29.
    steps[1] = {"filter": {"low": "number >= 28"}}
    assert left(recipe, *steps) == {"make_sevens": (0, False), "add_constant": (0, False), "rank_rows": (2, False)}
    # And back: all of it is there still.
    steps[1] = {"filter": {"low": "number >= 10"}}
    assert left(recipe, *steps) == {"make_sevens": (0, False), "add_constant": (0, False), "rank_rows": (0, False)}


def test_what_follows_a_group_that_is_to_be_made_anew_is_not_thought_undone(tmp_path: Path) -> None:
    recipe = synthetic.make_dataset(tmp_path, list(range(30)))
    behind: list[Any] = [{"make_sevens": {"times": 5, "as": "fives"}}, {"add_constant": {"column": "rank_rank"}}]
    steps = [{"filter": {"low": "number >= 20"}}, "make_sevens", "rank_rows", *behind]
    mmdata.run({**recipe, "steps": steps}, runner="inline")
    assert set(left(recipe, *steps).values()) == {(0, False)}

    # Loosened to 10: ten rows come in addition, of which make_sevens will fail one. `fives` is known to need no more
    # than these ten; only what reads the group's own column is not known.
    steps[0] = {"filter": {"low": "number >= 10"}}
    assert left(recipe, *steps) == {
        "make_sevens": (10, False),
        "rank_rows": (None, True),
        "fives": (10, True),
        "add_constant": (None, True),
    }
    report = mmdata.run({**recipe, "steps": steps}, runner="inline").report
    assert report is not None
    assert report.work["fives"].computed == 9  # 10 and 12 to 19


def _shown(recipe: dict[str, Any], *steps: Any) -> str:
    proved = prove(parse({**recipe, "steps": steps}))
    console = Console(file=io.StringIO(), width=200, highlight=False)
    outlook.render(proved, outlook.look(proved), console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def _last_cells(text: str) -> list[str]:
    return [line.rpartition("│")[2].strip() for line in text.splitlines() if "│" in line]


def test_the_plan_in_words(tmp_path: Path) -> None:
    listing = synthetic.synthetic_recipe(tmp_path / "fresh", list(range(30)))
    steps = ["make_sevens", {"filter": {"low": "number >= 20"}}, PLUS, "rank_rows"]
    fresh = _shown(listing, *steps)
    assert "list: not read to its end yet; ingested: 0 rows in 0 shards" in fresh
    assert _last_cells(fresh) == ["all rows that reach it", "", "all rows that reach it", "all rows that reach it"]
    assert not (tmp_path / "fresh" / "dataset").exists()

    recipe = synthetic.make_dataset(tmp_path / "made", list(range(30)))
    made = _shown(recipe, *steps)
    assert "list: 3 shards; ingested: 30 rows in 3 shards" in made
    assert _last_cells(made) == ["30 rows", "", "up to 30 rows", "all rows that reach it"]
    mmdata.run({**recipe, "steps": steps}, runner="inline")
    assert _last_cells(_shown(recipe, *steps)) == ["0 rows", "", "0 rows", "0 rows"]


def test_plan_imports_no_model_and_writes_nothing(tmp_path: Path) -> None:
    recipe = synthetic.synthetic_recipe(tmp_path / "pets", [1, 2, 3])
    recipe["steps"] = ["probe_image", "score_clip", {"filter": {"f": "clip_score > 0.2"}}, "hash_image", HASH]
    (tmp_path / "pets.yaml").write_text(yaml.safe_dump(recipe))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    program = (
        "import sys\nfrom mmdata.cli import main\n"
        "try: main(['plan', 'pets.yaml'])\nexcept SystemExit as done: assert not done.code, done.code\n"
        "heavy = {'torch', 'ray', 'open_clip', 'transformers', 'av'} & set(sys.modules)\n"
        "print('imported:', sorted(heavy))\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("imported: []\n")
    assert "score_clip" in done.stdout
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
