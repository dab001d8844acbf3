"""A dataset grows by appending to its list of sources: new shards after the old, and only they are computed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import media_of, picture, rows_of
from synthetic import COMPUTED, make_dataset, register_all

import mmdata
from mmdata.errors import RecipeError, SourceError
from mmdata.outlook import look
from mmdata.preflight import prove
from mmdata.recipe import parse

register_all()


def table_of(path: Path, first: int, last: int, **columns: Any) -> dict[str, Any]:
    """A Parquet of pictures numbered first to last - 1, as a source that carries `number` and these columns."""
    made = {"image": [picture(i) for i in range(first, last)], "number": list(range(first, last))}
    made |= {name: values for name, values in columns.items()}
    pq.write_table(pa.table(made), path)
    return {"kind": "parquet", "path": str(path), "columns": ["number", *columns]}


def folder_of(path: Path, numbers: range) -> dict[str, Any]:
    path.mkdir(parents=True)
    for i in numbers:
        (path / f"{i}.jpg").write_bytes(picture(i))
    return {"kind": "images", "path": str(path)}


def recipe_of(folder: Path, sources: Any, **more: Any) -> dict[str, Any]:
    steps = ["make_sevens", {"filter": {"some": "sevens_value IS NULL OR sevens_value > 2"}}]
    steps += [{"rank_rows": {"by": "residue"}}]
    made = {
        "name": "grown",
        "dataset": str(folder / "ds"),
        "source": sources,
        "fetch": {"shard_rows": 4},
        "steps": steps,
    }
    return {**made, **more}


def run(recipe: dict[str, Any]) -> mmdata.dataset.Dataset:
    return mmdata.run(recipe, runner="inline")


SHOWN = (
    "SELECT number, caption, sevens_value, residue, rank_rank, verdict, step_name, reason FROM samples ORDER BY row_id"
)


def test_appending_computes_the_new_shards_only_and_equals_a_fresh_run(tmp_path: Path) -> None:
    first, second = table_of(tmp_path / "a.parquet", 1, 11), table_of(tmp_path / "b.parquet", 11, 17)
    before = run(recipe_of(tmp_path, first))
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "ds" / "rows").iterdir()}
    old_rows = rows_of(before)
    COMPUTED.clear()
    proved = prove(parse(recipe_of(tmp_path, [first, second])))
    assert proved.added == 1
    assert look(proved).shards_expected is None
    grown = run(recipe_of(tmp_path, [first, second]))
    done = [
        row >> 24 for (operator, _, row), times in COMPUTED.items() for _ in range(times) if operator == "make_sevens"
    ]
    assert sorted(set(done)) == [3, 4]
    assert len(done) == 6
    rows = rows_of(grown)
    assert [{**r, "rank_rank": None} for r in rows[:10]] == [{**r, "rank_rank": None} for r in old_rows]
    assert [r["number"] for r in rows] == list(range(1, 17))
    assert len({r["key"] for r in rows}) == 16
    assert {p: p.stat().st_mtime_ns for p in files} == files
    fresh = run({**recipe_of(tmp_path, [first, second]), "dataset": str(tmp_path / "fresh")})
    assert grown.sql(SHOWN).fetchall() == fresh.sql(SHOWN).fetchall()
    assert media_of(grown) == media_of(fresh) == [picture(i) for i in range(1, 17)]
    entries = json.loads((tmp_path / "ds" / "dataset.json").read_bytes())["sources"]
    assert [(e["kind"], e["first_shard"], e["shards"]) for e in entries] == [("parquet", 0, 3), ("parquet", 3, 2)]
    COMPUTED.clear()
    again = run(recipe_of(tmp_path, [first, second]))
    assert not COMPUTED
    assert again.report is not None
    assert not again.report.changed


def test_an_adopted_source_is_appended_to_a_fetched_list(tmp_path: Path) -> None:
    recipe = make_dataset(tmp_path, list(range(1, 9)), shard_rows=4)
    more = table_of(tmp_path / "b.parquet", 20, 23, licence=["cc", None, "by"])
    folder = folder_of(tmp_path / "in", range(2))
    steps = ["measure_mean", {"filter": {"free": "coalesce(licence, 'none') <> 'by'"}}]
    grown = run({**recipe, "source": [recipe["source"], more, folder], "steps": steps})
    rows = rows_of(grown)
    assert [r["number"] for r in rows] == [*range(1, 9), 20, 21, 22, None, None]
    assert [r["licence"] for r in rows] == [None] * 8 + ["cc", None, "by", None, None]
    assert [r["path"] for r in rows] == [None] * 8 + ["b.parquet#0", "b.parquet#1", "b.parquet#2", "0.jpg", "1.jpg"]
    assert [r["verdict"] for r in rows] == ["kept"] * 10 + ["dropped"] + ["kept"] * 2
    assert [r["row_id"] >> 24 for r in rows] == [0] * 4 + [1] * 4 + [2] * 3 + [3] * 2
    kept = pa.concat_tables([grown.kept(shard) for shard in grown.shards()])
    assert kept.column("licence").to_pylist() == [None] * 8 + ["cc", None] + [None] * 2
    assert media_of(grown)[8:] == [picture(20), picture(21), picture(22), picture(0), picture(1)]


def test_exports_of_grown_datasets_hold_every_column(tmp_path: Path) -> None:
    recipe = make_dataset(tmp_path, list(range(1, 5)), shard_rows=4)
    more = table_of(tmp_path / "b.parquet", 20, 22, licence=["cc", "by"])
    run(recipe)
    export = {"format": "parquet", "path": str(tmp_path / "out"), "columns": ["licence", "number"]}
    run({**recipe, "source": [recipe["source"], more], "export": export})
    found = pa.concat_tables([pq.read_table(p) for p in sorted((tmp_path / "out").rglob("*.parquet"))])
    assert found.column("licence").to_pylist() == [None] * 4 + ["cc", "by"]
    assert found.column("number").to_pylist() == [1, 2, 3, 4, 20, 21]


def test_an_interrupted_append_goes_on(tmp_path: Path) -> None:
    first, second = table_of(tmp_path / "a.parquet", 1, 6), table_of(tmp_path / "b.parquet", 6, 15)
    run(recipe_of(tmp_path, first))
    expected = run({**recipe_of(tmp_path, [first, second]), "dataset": str(tmp_path / "fresh")}).sql(SHOWN).fetchall()
    run(recipe_of(tmp_path, [first, second]))
    # As if the run had been killed with one new shard in, before dataset.json and current.json were written.
    document = json.loads((tmp_path / "ds" / "dataset.json").read_bytes())
    document["sources"][1] |= {"first_shard": None, "shards": None}
    (tmp_path / "ds" / "dataset.json").write_text(json.dumps(document))
    for shard in (3, 4):
        for file in (tmp_path / "ds").rglob(f"{shard:05d}.*.parquet"):
            if "verdicts" not in file.parts:
                file.unlink()
    assert run(recipe_of(tmp_path, [first, second])).sql(SHOWN).fetchall() == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b: [b], "other files|where its media lies"),
        (lambda a, b: [b, a], "other files|where its media lies"),
        (lambda a, b: [{**a, "caption": None}, b], r"source\.0\.caption: 'text;caption', not None"),
        (lambda a, b: [{**a, "kind": "webdataset", "columns": []}, b], r"kind: 'parquet', not 'webdataset'|is no tar"),
    ],
)
def test_what_there_is_may_not_change(tmp_path: Path, change: Any, message: str) -> None:
    first, second = table_of(tmp_path / "a.parquet", 1, 6), table_of(tmp_path / "b.parquet", 6, 9)
    run(recipe_of(tmp_path, first, steps=[]))
    with pytest.raises((RecipeError, SourceError), match=message):
        run(recipe_of(tmp_path, change(first, second), steps=[]))


def test_a_source_is_never_taken_away(tmp_path: Path) -> None:
    first, second = table_of(tmp_path / "a.parquet", 1, 6), table_of(tmp_path / "b.parquet", 6, 9)
    run(recipe_of(tmp_path, [first, second], steps=[]))
    with pytest.raises(RecipeError, match=r"2 sources, the recipe names 1: .*put .*b\.parquet back"):
        run(recipe_of(tmp_path, first, steps=[]))


def test_a_folder_that_changes_later_is_warned_of_and_its_new_pictures_are_no_rows(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in", range(2))
    run(recipe_of(tmp_path, folder, steps=[]))
    (tmp_path / "in" / "new.jpg").write_bytes(picture(7))
    recipe = recipe_of(tmp_path, folder, steps=["probe_image"])
    [warning] = prove(parse(recipe)).plan.warnings
    assert "belongs in a source of its own" in warning
    assert [r["path"] for r in rows_of(run(recipe))] == ["0.jpg", "1.jpg"]
    (tmp_path / "in" / "0.jpg").unlink()
    rows = rows_of(run({**recipe, "steps": ["hash_image"]}))
    assert [(r["path"], r["reason"]) for r in rows] == [("0.jpg", "missing_media"), ("1.jpg", None)]
    shutil.rmtree(tmp_path / "in")
    [warning] = prove(parse(recipe)).plan.warnings
    assert "cannot be read any more" in warning
    assert run({**recipe, "steps": ["probe_image", {"filter": {"wide": "width_px > 40"}}]}).funnel().kept == 1


def test_a_folder_that_changes_while_it_is_adopted_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in", range(2))
    run(recipe_of(tmp_path, folder, steps=[]))
    document = json.loads((tmp_path / "ds" / "dataset.json").read_bytes())
    document["sources"][0]["shards"] = None
    (tmp_path / "ds" / "dataset.json").write_text(json.dumps(document))
    (tmp_path / "in" / "new.jpg").write_bytes(picture(7))
    with pytest.raises(RecipeError, match="not all in yet"):
        run(recipe_of(tmp_path, folder, steps=[]))


def test_one_name_has_one_type(tmp_path: Path) -> None:
    first = table_of(tmp_path / "a.parquet", 1, 3, stars=[1, 2])
    second = table_of(tmp_path / "b.parquet", 3, 5, stars=["*", "**"])
    with pytest.raises(SourceError, match=r"'stars' is string in .*b\.parquet, but 'stars' is int64 in .*a\.parquet"):
        run(recipe_of(tmp_path, [first, second]))
    assert not (tmp_path / "ds").exists()


def test_set_addresses_a_source_of_the_list_by_its_number(tmp_path: Path) -> None:
    first, second = table_of(tmp_path / "a.parquet", 1, 6), table_of(tmp_path / "b.parquet", 6, 9)
    recipe = parse(recipe_of(tmp_path, [first, second]), overrides=["source.1.path=elsewhere.parquet"])
    assert [s.path for s in recipe.sources] == [first["path"], "elsewhere.parquet"]
    with pytest.raises(RecipeError, match="a number from 0 to 1"):
        parse(recipe_of(tmp_path, [first, second]), overrides=["source.2.path=x"])


def test_on_ray_too(tmp_path: Path) -> None:
    first, second = table_of(tmp_path / "a.parquet", 1, 6), table_of(tmp_path / "b.parquet", 6, 9)
    recipe = recipe_of(tmp_path, [first, second], steps=["probe_image"])
    inline = run({**recipe, "dataset": str(tmp_path / "inline")})
    ray = mmdata.run(recipe, runner="ray", workers=2)
    shown = (
        "SELECT row_id, key, uid, number, image_path, image_offset, aspect_ratio, verdict FROM samples ORDER BY row_id"
    )
    assert ray.sql(shown).fetchall() == inline.sql(shown).fetchall()
