"""Groups `over: all`: their decision does not change with a filter's bound; the algebra against a brute-force reading.

The reference walks the rows of the synthetic dataset one by one in plain Python, from the numbers alone.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import synthetic
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mmdata
from mmdata import registry
from mmdata.dataset import Dataset
from mmdata.errors import RecipeError
from mmdata.stage import Contract, Failed, NoOptions, Stage, parse_schema

NUMBERS = [(i * 37) % 101 for i in range(60)]
Row = dict[str, Any]


@pytest.fixture(autouse=True, scope="module")
def _operators() -> None:
    synthetic.register_all()


@pytest.fixture(autouse=True)
def _nothing_computed() -> None:
    synthetic.COMPUTED.clear()


def _status(number: int) -> str:
    return "http_4xx" if number % 17 == 3 else "ok"


def run(folder: Path, document: dict[str, Any], steps: list[Any]) -> Dataset:
    return mmdata.run({**document, "steps": steps}, runner="inline")


@pytest.fixture
def made(tmp_path: Path) -> dict[str, Any]:
    return synthetic.make_dataset(tmp_path, NUMBERS, 16, status=_status)


RANK_ALL = {"rank_rows": {"by": "sevens_value", "over": "all"}}


def test_the_group_is_computed_once_for_every_threshold(tmp_path: Path, made: dict[str, Any]) -> None:
    sets, counts = set(), []
    for bound in (90, 50, 10, 75):
        steps = [{"filter": {"low": f"number <= {bound}"}}, "make_sevens", RANK_ALL]
        ds = run(tmp_path, made, steps)
        assert ds.report is not None
        counts.append((ds.report.work["make_sevens"].computed, ds.report.work["rank_rows"].computed))
        assert ds.current is not None
        sets.add(ds.current.steps[2].set_name)
    whole = sum(_status(n) == "ok" for n in NUMBERS)
    eleven = sum(_status(n) == "ok" and n % 11 == 0 for n in NUMBERS)
    assert counts == [(whole, whole - eleven), (0, 0), (0, 0), (0, 0)]
    assert len(sets) == 1


def test_it_is_another_set_than_over_the_kept_rows_even_of_the_same_rows(tmp_path: Path, made: dict[str, Any]) -> None:
    kept = run(tmp_path, made, ["make_sevens", {"rank_rows": {"by": "sevens_value"}}])
    whole = run(tmp_path, made, ["make_sevens", RANK_ALL])
    assert kept.current is not None
    assert whole.current is not None
    assert kept.current.steps[1].set_name != whole.current.steps[1].set_name
    assert kept.sql("SELECT * FROM samples").fetchall() == whole.sql("SELECT * FROM samples").fetchall()


def test_a_stage_without_reader_stays_gated(tmp_path: Path, made: dict[str, Any]) -> None:
    steps = [{"filter": {"low": "number <= 20"}}, "make_sevens", {"make_sevens": {"times": 5, "as": "fives"}}, RANK_ALL]
    run(tmp_path, made, steps)
    computed = Counter(options for (_, options, _) in synthetic.COMPUTED)
    ok = [n for n in NUMBERS if _status(n) == "ok"]
    assert computed["times=7"] == len(ok)
    assert computed["times=5"] == sum(n <= 20 and n % 11 != 0 for n in ok)
    assert max(synthetic.COMPUTED.values()) == 1


def test_plan_says_how_many_rows_are_left_past_the_filter(tmp_path: Path, made: dict[str, Any]) -> None:
    from mmdata.outlook import look
    from mmdata.preflight import prove
    from mmdata.recipe import parse

    steps = [{"filter": {"low": "number <= 20"}}, "make_sevens", RANK_ALL]
    seen = look(prove(parse({**made, "steps": steps})))
    assert seen.steps[1].rows_left == sum(_status(n) == "ok" for n in NUMBERS)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([{"make_sevens": {"over": "all"}}], r"step 1 \(make_sevens\): only a group can be `over: all`"),
        (["make_sevens", {"rank_rows": {"over": "some"}}], r"over: input should be 'kept' or 'all', got 'some'"),
        (
            [
                "rank_rows",
                {"add_constant": {"column": "rank_rank"}},
                {"rank_rows": {"by": "plus_value", "over": "all", "as": "b"}},
            ],
            r"step 3 \(b\): over: all needs values for all rows, but step rank_rows, .*give rank_rows over: all",
        ),
    ],
)
def test_what_plan_refuses(tmp_path: Path, made: dict[str, Any], steps: list[Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        run(tmp_path, made, steps)


def test_plan_warns_that_a_filter_may_take_the_first_of_a_cluster() -> None:
    from mmdata.plan import plan_recipe
    from mmdata.recipe import parse

    steps = ["probe_image", {"filter": {"wide": "width_px > 9"}}, {"exact_duplicates": {"over": "all"}}]
    source = {"kind": "urls", "path": "list.parquet", "caption": "caption"}
    made = plan_recipe(parse({"name": "t", "dataset": "d", "source": source, "steps": steps}), None)
    assert [w for w in made.warnings if "exact_duplicates is over all rows: where wide drops" in w]


# The algebra, brute force. A stage is (columns, function of a row → values or None when it fails).


def _sevens(times: int) -> Callable[[Row], Row | None]:
    def compute(row: Row) -> Row | None:
        number = row["number"]
        if number % 11 == 0:
            return None
        return {"value": None if number % 7 == 0 else float(number * times % 13)}

    return compute


_DOCUMENTS: dict[str, Any] = {
    "sevens": {"make_sevens": {"as": "sevens"}},
    "fives": {"make_sevens": {"times": 5, "as": "fives", "on_error": "keep"}},
    "plus": {"add_constant": {"column": "sevens_value", "as": "plus"}},
    "again": {"make_sevens": {"as": "again"}},
    "g_sevens": {"rank_rows": {"by": "sevens_value", "as": "g_sevens", "prefer": ["number % 10 desc"]}},
    "g_fives": {"rank_rows": {"by": "fives_value", "as": "g_fives"}},
    "g_plus": {"rank_rows": {"by": "plus_value", "as": "g_plus"}},
    "late": {"add_constant": {"column": "g_sevens_rank", "add": 2.0, "as": "late"}},
    "g_late": {"rank_rows": {"by": "late_value", "as": "g_late"}},
    "g_again": {"rank_rows": {"by": "again_value", "as": "g_again"}},
}
# What a step reads: (step, column).
_READS = {
    "plus": ("sevens", "value"),
    "g_sevens": ("sevens", "value"),
    "g_fives": ("fives", "value"),
    "g_plus": ("plus", "value"),
    "late": ("g_sevens", "rank"),
    "g_late": ("late", "value"),
    "g_again": ("again", "value"),
}
_STAGES: dict[str, Callable[[Row], Row | None]] = {
    "sevens": _sevens(7),
    "again": _sevens(7),
    "fives": _sevens(5),
    "plus": lambda row: {"value": None if row["sevens.value"] is None else row["sevens.value"] + 1},
    "late": lambda row: {"value": row["g_sevens.rank"] + 2.0},
}
_FILTERS: dict[str, tuple[str, Callable[[Row, int], bool | None]]] = {
    "low": ("number <= {n} * 10", lambda row, n: row["number"] <= n * 10),
    "digit": ("number % 10 <= {n}", lambda row, n: row["number"] % 10 <= n),
    "rank": ("g_sevens_rank <= {n}", lambda row, n: row["g_sevens.rank"] <= n),
}


def _closure(name: str) -> set[str]:
    found = set()
    while name in _READS:
        name = _READS[name][0]
        found.add(name)
    return found


def brute_force(steps: list[tuple[str, int, bool]]) -> tuple[dict[int, str | None], dict[str, dict[int, int]]]:
    """Position in the list → step where the row left (None = kept), and per group position → rank over its own set."""
    rows = [{"number": n} for n in NUMBERS]
    left: dict[int, str | None] = {i: None if _status(n) == "ok" else "ingest" for i, n in enumerate(NUMBERS)}
    p0 = [i for i, where in left.items() if where is None]
    failed: dict[str, set[int]] = {}
    ranks: dict[str, dict[int, int]] = {}
    for name, bound, over_all in steps:
        alive = [i for i in p0 if left[i] is None]
        if name in _FILTERS:
            for i in alive:
                left[i] = None if _FILTERS[name][1](rows[i], bound) else name
            continue
        if name.startswith("g_"):
            drops = {s for s in _closure(name) if s != "fives"}
            seen = [i for i in p0 if not any(i in failed.get(s, ()) for s in drops)] if over_all else alive
            maker, column = _READS[name]
            if name == "g_sevens":
                seen = sorted(seen, key=lambda i: (-(rows[i]["number"] % 10), i))
            counted: Counter[int] = Counter()
            ranks[name] = {}
            for i in seen:
                value = rows[i].get(f"{maker}.{column}")
                kind = -1 if value is None else int(value) % 3
                counted[kind] += 1
                ranks[name][i] = rows[i][f"{name}.rank"] = counted[kind]
            continue
        failed[name] = set()
        # Of every row, as if no filter were there: a function of the row.
        for i in p0:
            if name == "late" and "g_sevens.rank" not in rows[i]:
                continue  # beyond the set of the group it reads
            if name == "plus" and "sevens.value" not in rows[i]:
                continue
            found = _STAGES[name](rows[i])
            if found is None:
                failed[name].add(i)
                if name != "fives" and left[i] is None:
                    left[i] = name
            else:
                rows[i].update({f"{name}.{c}": v for c, v in found.items()})
    return left, ranks


@st.composite
def _recipes(draw: st.DrawFn) -> list[list[tuple[str, int, bool]]]:
    """Edits of one recipe: filters come, go and change their bounds; each group is over all rows or over the kept."""
    recipes = []
    chosen = draw(st.sets(st.sampled_from(list(_DOCUMENTS)), min_size=3))
    over = {name: draw(st.booleans()) for name in _DOCUMENTS}
    for name in ("g_sevens", "late", "g_late"):  # what such a group builds on must be over all rows too
        over[name] = over["g_sevens"]
    for _ in range(draw(st.integers(1, 3))):
        steps = [(n, 0, over[n] and n.startswith("g_")) for n in _DOCUMENTS if n in chosen]
        steps = [s for s in steps if _closure(s[0]) <= {n for n, _, _ in steps}]
        for name in _FILTERS:
            if draw(st.booleans()):
                steps.insert(draw(st.integers(0, len(steps))), (name, draw(st.integers(0, 9)), False))
        names = [n for n, _, _ in steps]
        if "rank" in names and ("g_sevens" not in names or names.index("rank") < names.index("g_sevens")):
            steps.remove(steps[names.index("rank")])
        recipes.append(steps)
    return recipes


def _document(step: tuple[str, int, bool]) -> dict[str, Any]:
    name, bound, over_all = step
    if name in _FILTERS:
        return {"filter": {name: _FILTERS[name][0].format(n=bound)}}
    [(operator, options)] = _DOCUMENTS[name].items()
    return {operator: {**options, "max_failed": 1, **({"over": "all"} if over_all else {})}}


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(recipes=_recipes())
def test_verdicts_and_groups_are_those_of_brute_force(recipes: list[list[tuple[str, int, bool]]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        document = synthetic.make_dataset(folder, NUMBERS, 16, status=_status)
        for steps in recipes:
            synthetic.COMPUTED.clear()
            ds = run(folder, document, [_document(s) for s in steps])
            left, ranks = brute_force(steps)
            found = ds.sql("SELECT step_name FROM samples ORDER BY row_id").fetchall()
            assert [w for (w,) in found] == list(left.values())
            assert set(synthetic.COMPUTED.values()) <= {1}
            assert ds.current is not None
            for step in ds.current.steps:
                if step.kind == "group":
                    own = [
                        r
                        for f in ds.current.sets[step.set_name]
                        for r in pq.read_table(folder / "dataset" / f).to_pylist()
                    ]
                    assert {i: r["rank_rank"] for i, r in enumerate(own) if r["reason"] is None} == ranks[step.name]
                    assert {r["reason"] for i, r in enumerate(own) if i not in ranks[step.name]} <= {"uncovered"}
                    _require_masked(ds, step.name, step.position, left, [s for s, _, _ in steps], ranks[step.name])


def _require_masked(
    ds: Dataset, name: str, position: int, left: dict[int, str | None], names: list[str], ranks: dict[int, int]
) -> None:
    """`samples` shows the group's column of the rows that reached it, whatever rows the group saw."""
    shown = [r for (r,) in ds.sql(f"SELECT {name}_rank FROM samples ORDER BY row_id").fetchall()]
    places = {None: len(names) + 1, "ingest": 0, **{n: i for i, n in enumerate(names, 1)}}
    assert shown == [ranks[i] if places[where] >= position else None for i, where in left.items()]


class Shaky(Stage[NoOptions]):
    """The number; out of reach for multiples of 10 while `is_down`."""

    name, label, is_down = "ask_number", "asked", True

    @classmethod
    def contract(cls, options: NoOptions) -> Contract:
        return Contract(writes=parse_schema("asked_value: float32"), reads=("number",))

    def compute(self, batch: Any) -> dict[str, list[Any]]:
        down = [self.is_down and n % 10 == 0 for n in batch["number"]]
        return {
            "asked_value": [Failed("connect", True) if d else n for d, n in zip(down, batch["number"], strict=True)]
        }


def test_a_row_that_is_out_of_reach_past_a_filter_is_told_and_tried_again(
    tmp_path: Path, made: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    registry.register(Shaky)
    steps: list[Any] = [
        {"filter": {"not_ten": "number % 10 <> 0"}},
        {"ask_number": {"max_failed": 1}},
        {"rank_rows": {"by": "asked_value", "over": "all"}},
    ]
    monkeypatch.setattr(Shaky, "is_down", True)
    ds = run(tmp_path, made, steps)
    ok = [n for n in NUMBERS if _status(n) == "ok"]
    tens = sum(n % 10 == 0 for n in ok)
    assert ds.report is not None
    assert ds.report.unsettled == tens
    assert ds.report.work["rank_rows"].computed == len(ok) - tens
    monkeypatch.setattr(Shaky, "is_down", False)
    again = run(tmp_path, made, steps)
    assert again.report is not None
    assert again.report.unsettled == 0
    assert again.report.work["ask_number"].computed == tens
    assert again.report.work["rank_rows"].computed == len(ok)
    left = again.sql("SELECT count(*) FROM samples WHERE verdict = 'kept'").fetchall()
    assert left == [(len(ok) - tens,)]
