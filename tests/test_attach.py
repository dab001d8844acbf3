"""The steps `attach` and `keep_list`, run: against joins by DuckDB, and on shards that came later."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from synthetic import make_dataset, register_all, synthetic_recipe

import mmdata
from mmdata.attach_work import AttachJob
from mmdata.columns import base_schema
from mmdata.errors import BudgetError, MmdataError, RecipeError, SourceError
from mmdata.outlook import look, summaries
from mmdata.plan import plan_recipe
from mmdata.preflight import prove
from mmdata.recipe import parse
from mmdata.store import Store, write_parquet

NUMBERS = list(range(1, 36))
OK = [n for n in NUMBERS if n % 17]


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    """35 rows in four shards; numbers that 17 divides failed at ingest."""
    register_all()
    return make_dataset(tmp_path, NUMBERS, status=lambda n: "ok" if n % 17 else "http_4xx")


def base_rows(recipe: dict[str, Any]) -> pa.Table:
    return duckdb.sql(
        f"SELECT * FROM read_parquet('{recipe['dataset']}/rows/*.parquet') ORDER BY row_id"
    ).to_arrow_table()


def run(recipe: dict[str, Any], *steps: Any, **options: Any) -> mmdata.Dataset:
    return mmdata.run({**recipe, "steps": list(steps)}, **{"runner": "inline", **options})


def computed(ds: mmdata.Dataset, step: str) -> int:
    assert ds.report is not None
    return ds.report.work[step].computed


def set_of(ds: mmdata.Dataset, step: str) -> str:
    assert ds.current is not None
    return next(s.set_name for s in ds.current.steps if s.name == step)


@pytest.fixture
def scores(recipe: dict[str, Any], tmp_path: Path) -> str:
    """20 of the rows' uids in another order and in capitals, some with two values, one without."""
    names = base_rows(recipe)["uid"].to_pylist()
    rng = np.random.default_rng(3)
    uids = [names[i].upper() for i in rng.permutation(35)[:20]]
    values = pa.array([None if i == 4 else v for i, v in enumerate(rng.random(20))], pa.float32())
    table = pa.table({"uid": [*uids, None, "f" * 32], "clip": pa.chunked_array([values, [0.5, 0.6]]), "n": range(22)})
    pq.write_table(table, tmp_path / "scores.parquet", row_group_size=6)
    return str(tmp_path / "scores.parquet")


def test_scores_are_joined_as_duckdb_joins_them(recipe: dict[str, Any], scores: str) -> None:
    attach = {"path": scores, "columns": {"score": "clip", "place": "n"}, "on_error": "keep"}
    ds = run(recipe, {"attach": attach}, {"filter": {"good": "score > 0.5"}})
    rows = base_rows(recipe)
    assert len(rows) == 35
    expected = duckdb.sql(
        f"SELECT row_id, clip, n, CASE WHEN n IS NULL THEN 'unmatched' END FROM rows LEFT JOIN '{scores}' AS s "
        "ON rows.uid = lower(s.uid) ORDER BY 1"
    ).fetchall()
    unmasked = f'SELECT row_id, score, place, reason FROM columns."{set_of(ds, "attach")}" ORDER BY 1'
    assert ds.sql(unmasked).fetchall() == expected  # every row, those that failed at ingest too
    kept = {r for (r,) in ds.sql("SELECT row_id FROM samples WHERE verdict = 'kept'").fetchall()}
    alive = set(duckdb.sql("SELECT row_id FROM rows WHERE status = 'ok'").fetchnumpy()["row_id"].tolist())
    assert kept == {r for r, score, *_ in expected if score is not None and score > 0.5} & alive
    assert 0 < len(kept) < 20


def test_many_rows_may_have_one_key(recipe: dict[str, Any], tmp_path: Path) -> None:
    """All rows' captions are unique, but a file of one row serves them by a url that two lists would share."""
    url = base_rows(recipe)["url"][3].as_py()
    (tmp_path / "sites.csv").write_text(f"URL,site\n{url},first\nhttp://elsewhere.invalid/,other\n")
    step = {"path": str(tmp_path / "sites.csv"), "on": "url", "key_column": "URL", "columns": ["site"]}
    ds = run(recipe, {"attach": {**step, "as": "page"}})
    assert ds.sql("SELECT url, page_site FROM samples WHERE verdict = 'kept'").fetchall() == [(url, "first")]
    assert Counter(ds.sql("SELECT step_name, reason FROM samples WHERE step > 0").fetchall()) == {
        ("page", "unmatched"): len(OK) - 1
    }


def test_nothing_is_looked_up_again_when_filters_change(recipe: dict[str, Any], scores: str) -> None:
    attach = {"attach": {"path": scores, "columns": ["clip"], "on_error": "keep"}}
    first = run(recipe, {"filter": {"few": "number <= 9"}}, attach)
    assert computed(first, "attach") == 35
    second = run(recipe, {"filter": {"few": "number <= 30"}}, attach, "make_sevens")
    assert computed(second, "attach") == 0
    assert set_of(first, "attach") == set_of(second, "attach")
    third = run(recipe, {"attach": {**attach["attach"], "as": "same"}})
    assert computed(third, "same") == 0
    fresh = run({**recipe}, {"attach": {"path": scores, "columns": {"clip": "n"}, "on_error": "keep"}})
    assert computed(fresh, "attach") == 35


def test_only_shards_that_are_not_there_are_looked_up(recipe: dict[str, Any], scores: str) -> None:
    attach = {"attach": {"path": scores, "columns": ["clip"], "on_error": "keep"}}
    plan = plan_recipe(parse({**recipe, "steps": [attach]}), pa.schema([("number", pa.int64())]))
    store = Store(recipe["dataset"])
    rows = store.row_files()
    early = AttachJob(store, plan.steps[0], {s: rows[s] for s in (0, 1)}, {})
    assert early.left({}) == [0, 1]
    done = early.compute([0, 1], lambda rows: None)
    later = AttachJob(store, plan.steps[0], rows, {})
    assert later.bound.set_name == early.bound.set_name
    assert later.left(done) == [2, 3]
    ds = run(recipe, attach)
    assert computed(ds, "attach") == 15
    assert ds.sql(f'SELECT count(*) FROM columns."{set_of(ds, "attach")}"').fetchall() == [(35,)]


def test_a_row_that_comes_in_later_is_looked_up_by_the_hash_it_then_has(recipe: dict[str, Any], tmp_path: Path) -> None:
    digest = "ab" * 32
    (tmp_path / "known.csv").write_text(f"sha256,score\n{digest.upper()},0.5\n")
    step = {"path": str(tmp_path / "known.csv"), "on": "sha256", "columns": ["score"], "on_error": "keep"}
    first = run(recipe, {"attach": step})
    reasons = f'SELECT reason, count(*) FROM columns."{set_of(first, "attach")}" GROUP BY 1 ORDER BY 1'
    assert first.sql(reasons).fetchall() == [("no_key", 33), ("uncovered", 2)]
    store, name = Store(recipe["dataset"]), "rows/00001.g0.parquet"
    rows = store.read_table(name).to_pylist()
    [row] = [r for r in rows if r["number"] == 17]
    row |= {"status": "ok", "sha256": digest}
    with store.scratch() as folder:
        schema = base_schema(pa.schema([("number", pa.int64())]))
        write_parquet(pa.Table.from_pylist(rows, schema), folder / "rows.parquet")
        assert store.commit("rows/00001.g1.parquet", folder / "rows.parquet")
    second = run(recipe, {"attach": step})
    assert second.sql("SELECT number FROM samples WHERE score = 0.5").fetchall() == [(17,)]
    assert dict(second.sql(reasons).fetchall()) == {None: 1, "no_key": 33, "uncovered": 1}


def test_a_keep_list_is_a_filter(recipe: dict[str, Any], tmp_path: Path) -> None:
    names = dict(zip(NUMBERS, base_rows(recipe)["uid"].to_pylist(), strict=True))
    chosen = [2, 3, 17, 30]
    pairs = np.array([(int(names[n][:16], 16), int(names[n][16:], 16)) for n in chosen], dtype="u8,u8")
    np.save(tmp_path / "subset.npy", np.sort(pairs))
    ds = run(
        recipe, {"filter": {"big": "number > 2"}}, {"keep_list": {"path": str(tmp_path / "subset.npy"), "as": "subset"}}
    )
    assert {n for (n,) in ds.sql("SELECT number FROM samples WHERE verdict = 'kept'").fetchall()} == {3, 30}
    found = ds.sql("SELECT verdict, step_name, reason, count(*) FROM verdicts GROUP BY ALL ORDER BY ALL").fetchall()
    assert found == [
        ("dropped", "big", "big", 2),
        ("dropped", "subset", "subset", len(OK) - 4),
        ("failed", "ingest", "http_4xx", 2),
        ("kept", None, None, 2),
    ]
    funnel = ds.funnel().steps[-1]
    assert (funnel.name, funnel.kind, funnel.dropped, funnel.failed) == ("subset", "filter", len(OK) - 4, 0)
    [(key,)] = ds.sql("SELECT key FROM rows WHERE number = 5").fetchall()
    story = ds.why(key)
    assert (story.verdict, story.step_name, story.reason) == ("dropped", "subset", "subset")
    assert story.steps[-1].sql.startswith("uid is in ")
    assert story.steps[-1].values == {"subset_is_listed": False}


def test_rows_without_a_key_and_another_list_by_set(recipe: dict[str, Any], tmp_path: Path) -> None:
    urls = base_rows(recipe)["url"].to_pylist()
    for name, some in (("a", urls[:5]), ("b", urls[:9])):
        (tmp_path / f"{name}.txt").write_text("".join(f"{u}\n" for u in some))
    steps = [{"keep_list": {"path": str(tmp_path / "a.txt"), "on": "url"}}]
    before = run(recipe, *steps)
    assert before.funnel().kept == 5
    assert run(recipe, *steps, overrides=[f"steps.keep_list.path={tmp_path}/b.txt"]).funnel().kept == 9
    back = run(recipe, *steps)
    assert computed(back, "keep_list") == 0
    (tmp_path / "hashes.txt").write_text("ab" * 32)
    gone = run(recipe, {"keep_list": {"path": str(tmp_path / "hashes.txt"), "on": "sha256"}})
    assert gone.funnel().steps[-1].reasons == {"keep_list:null": len(OK)}


def test_embeddings_stay_apart_and_a_text_file_too(recipe: dict[str, Any], tmp_path: Path) -> None:
    keys = base_rows(recipe)["key"].to_pylist()
    vectors = np.arange(70, dtype=np.float16).reshape(35, 2)
    np.save(tmp_path / "img_emb_0.npy", vectors[::-1])
    (tmp_path / "keys.txt").write_text("\n".join(keys[::-1]))
    step = {
        "path": str(tmp_path / "img_emb_0.npy"),
        "ids": str(tmp_path / "keys.txt"),
        "on": "key",
        "columns": ["clip"],
    }
    ds = run(recipe, {"attach": step})
    assert "clip" not in ds.samples().columns
    assert "attach_reason" in ds.samples().columns
    found = ds.sql(f'SELECT clip FROM columns."{set_of(ds, "attach")}" ORDER BY row_id').fetchall()
    assert [list(v) for (v,) in found] == vectors.tolist()
    assert ds.kept(0, ["clip"])["clip"].type == pa.list_(pa.float16(), 2)


def test_more_without_a_value_than_asked_for_stops_the_run(tmp_path: Path) -> None:
    register_all()
    recipe = make_dataset(tmp_path, range(1, 251), shard_rows=100, picture=lambda n: None)
    urls = base_rows(recipe)["url"].to_pylist()
    (tmp_path / "few.csv").write_text("url,x\n" + "".join(f"{u},1\n" for u in urls[:200]))
    step = {"path": str(tmp_path / "few.csv"), "on": "url", "columns": ["x"]}
    assert run(recipe, {"attach": step}).funnel().kept == 200
    assert run(recipe, {"attach": {**step, "max_failed": 0.2}}).funnel().kept == 200
    for _ in range(2):  # also when everything is computed already
        with pytest.raises(BudgetError, match="50 of 250 rows have no value"):
            run(recipe, {"attach": {**step, "max_failed": 0.19}})


WRONG: list[tuple[Any, type[MmdataError], str]] = [
    (
        {"attach": {"path": "no.parquet", "columns": ["a"]}},
        SourceError,
        r"step 1 \(attach\): there is no list at no.par",
    ),
    ({"attach": {"path": "s.csv", "columns": ["a"], "of": "x"}}, RecipeError, "no option is called 'of'"),
    ({"attach": {"path": "s.csv", "columns": {"caption": "a"}}}, RecipeError, "'caption' is already made by the base"),
    ({"attach": {"path": "s.csv", "columns": ["a"]}}, SourceError, r"step 1 \(attach\): s.csv: 1 values of uid stand"),
    ({"attach": {"path": "none.csv", "columns": ["a"]}}, SourceError, r"step 1 \(attach\): none.csv has no row with a"),
    ({"attach": {"path": "nokey.csv", "columns": ["a"]}}, SourceError, "nokey.csv has no row with a uid, so nothing"),
    ({"attach": {"path": "s.csv", "columns": ["a"], "ids": "i"}}, RecipeError, r"^step 1 \(attach\): `ids` names the"),
    ({"keep_list": {"path": "s.csv", "on_error": "keep"}}, RecipeError, "is a filter, which fails no row"),
    ({"keep_list": {"path": "s.csv", "column": "b"}}, SourceError, "has no column 'b'"),
    ({"filter": {"f": "a > 1"}}, RecipeError, "column 'a', which step attach makes only later|a"),
]


@pytest.mark.parametrize(("step", "error", "message"), WRONG)
def test_wrong_files_are_told_before_anything_is_written(
    step: Any, error: type[MmdataError], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.csv").write_text("uid,a\nx,1\nx,2\n")
    Path("none.csv").write_text("uid,a\n")
    Path("nokey.csv").write_text("uid,a\n,1\n")
    steps = [step] if "filter" not in step else [step, {"attach": {"path": "s.csv", "columns": ["a"]}}]
    with pytest.raises(error, match=message):
        mmdata.run({**synthetic_recipe(tmp_path, [1, 2]), "steps": steps}, runner="inline")
    assert not (tmp_path / "dataset").exists()


def test_plan_says_what_the_files_are_and_what_is_left(recipe: dict[str, Any], scores: str) -> None:
    document = {**recipe, "steps": [{"attach": {"path": scores, "columns": ["clip"]}}]}
    proved = prove(parse(document))
    assert summaries(proved.plan.steps) == [f"attach: {scores}: 22 rows"]
    assert look(proved).steps[0].rows_left == len(OK)
    mmdata.run(document, runner="inline")
    assert look(prove(parse(document))).steps[0].rows_left == 0


def test_a_list_after_duplicates_is_warned_of_like_any_filter(recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_text("00001\n")
    steps = ["hash_image", "near_duplicates", {"keep_list": {"path": str(tmp_path / "l.txt"), "on": "key"}}]
    plan = plan_recipe(parse({**recipe, "steps": steps}), pa.schema([("number", pa.int64())]))
    assert [w for w in plan.warnings if w.startswith("filter keep_list follows near_duplicates without reading")]


def test_a_group_over_all_rows_sees_past_the_list(recipe: dict[str, Any], tmp_path: Path) -> None:
    """It lacks what `attach` failed, and not what the list drops."""
    keys = base_rows(recipe)["key"].to_pylist()
    (tmp_path / "s.csv").write_text("key,score\n" + "".join(f"{k},{i}\n" for i, k in enumerate(keys[:30])))
    (tmp_path / "l.txt").write_text("\n".join(keys[10:20]))
    attach = {"attach": {"path": str(tmp_path / "s.csv"), "on": "key", "columns": ["score"]}}
    keep = {"keep_list": {"path": str(tmp_path / "l.txt"), "on": "key"}}
    ds = run(recipe, attach, keep, {"rank_rows": {"by": "score", "over": "all"}})
    seen = ds.sql(f'SELECT count(rank_rank) FROM columns."{set_of(ds, "rank_rows")}"').fetchall()
    assert seen == [(30 - 1,)]  # number 17 failed at ingest
    assert ds.funnel().kept == 9
