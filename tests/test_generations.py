"""Generations of base rows: what may change and what not, races, deaths, and what everything downstream makes of it."""
# long because: the rules, the races, the deaths and what follows downstream are one contract

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import killing
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import retrying
import synthetic
from hypothesis import given, settings
from hypothesis import strategies as st

import mmdata
from mmdata.clean import clean
from mmdata.columns import base_schema, row_id
from mmdata.errors import StoreError
from mmdata.generations import FETCHED, PURGE, Generation, newest_rows, publish_generation
from mmdata.store import Store, write_parquet

ROWS = 6
SCHEMA = base_schema(pa.schema([("number", pa.int64())]))


def base_row(index: int, shard: int = 0) -> dict[str, Any]:
    """Rows 0, 3 are ok; the others failed."""
    row = dict.fromkeys(SCHEMA.names)
    row |= {
        "row_id": row_id(shard, index),
        "key": f"{index:06d}",
        "uid": f"{index:032x}",
        "url": f"http://a.test/{index}",
    }
    row |= {"caption": None if index == 4 else f"row {index}", "number": index, "attempts": 1}
    if index % 3 == 0:
        return row | ok(index * 8)
    return row | {"status": ["timeout", "http_5xx"][index % 2], "status_detail": "no luck", "http_status": 503}


def ok(offset: int, path: str = "media/00000-a.tar", size: int = 8) -> dict[str, Any]:
    place = {"image_path": path, "image_offset": offset, "image_size": size, "image_ext": "png"}
    return {"status": "ok", "width_px": 4, "height_px": 4, "sha256": f"{offset:064x}", "attempts": 2, **place}


def new_store(folder: Path) -> Store:
    """One shard of ROWS rows, and three tars of 48 bytes: b holds the same bytes as a, c others."""
    store = Store(str(folder / uuid.uuid4().hex))
    with store.scratch() as scratch:
        write_parquet(pa.Table.from_pylist([base_row(i) for i in range(ROWS)], schema=SCHEMA), scratch / "r.parquet")
        store.commit("rows/00000.g0.parquet", scratch / "r.parquet")
    for name, fill in (("a", 0), ("b", 0), ("c", 1)):
        store.create(f"media/00000-{name}.tar", bytes((i + fill) % 256 for i in range(48)))
    return store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path)


def rows_of(store: Store, name: str | None = None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = store.read_table(name or newest_rows(store, 0).name).to_pylist()
    return rows


def test_a_failed_row_becomes_ok_and_nothing_else_changes(store: Store) -> None:
    before = rows_of(store)
    done = publish_generation(store, 0, {2: ok(16)})
    assert done == Generation("rows/00000.g1.parquet", 1, (2,), ())
    assert store.row_files() == {0: "rows/00000.g1.parquet"}
    after = rows_of(store)
    assert after[:2] + after[3:] == before[:2] + before[3:]
    # what the failed attempt had found out (its HTTP status, its detail) is gone; what the source gave is there
    kept = {n: None if n in FETCHED else before[2][n] for n in SCHEMA.names}
    assert after[2] == {**kept, **ok(16)}
    assert rows_of(store, "rows/00000.g0.parquet") == before
    assert store.read_table("rows/00000.g1.parquet").schema == store.read_table("rows/00000.g0.parquet").schema


def test_a_table_of_changes_sets_its_columns_null_included(store: Store) -> None:
    columns = ["row_id", "status", "status_detail", "attempts"]
    table = pa.table([[row_id(0, 4), row_id(0, 1)], ["dns", "timeout"], [None, "again"], [5, 6]], columns)
    done = publish_generation(store, 0, table)
    assert done.changed == (1, 4)
    found = [[row[c] for c in columns[1:]] for row in rows_of(store)]
    assert found[1] == ["timeout", "again", 6]
    assert found[4] == ["dns", None, 5]
    assert rows_of(store)[4]["http_status"] is None


def test_a_purged_row_keeps_its_place_and_key_alone(store: Store) -> None:
    publish_generation(store, 0, {0: PURGE, 1: PURGE})
    after = rows_of(store)
    for index in (0, 1):
        told = {n: v for n, v in after[index].items() if v is not None}
        assert told == {"row_id": row_id(0, index), "key": f"{index:06d}", "status": "purged"}
    assert after[2:] == [base_row(i) for i in range(2, ROWS)]


def test_the_same_again_writes_nothing(store: Store) -> None:
    first = publish_generation(store, 0, {2: ok(16), 0: PURGE})
    again = publish_generation(store, 0, {2: ok(16), 0: PURGE}, base="rows/00000.g0.parquet")
    assert (again.name, again.changed) == (first.name, ())
    assert store.list("rows") == ["00000.g0.parquet", "00000.g1.parquet"]


REFUSED: dict[str, tuple[Any, str]] = {
    "another row": ({6: PURGE}, "has 6 rows, there is no row 6"),
    "before the first": ({-1: PURGE}, "there is no row -1"),
    "key": ({1: {"key": "x"}}, "keeps its key"),
    "row_id": ({1: {"row_id": 7}}, "keeps its row_id"),
    "key of a purged row": ({1: {**PURGE, "key": "x"}}, "it keeps row_id and key"),
    "caption of a purged row": ({1: {**PURGE, "caption": "x"}}, "its caption must become NULL"),
    "url": ({1: {"url": "http://b.test/"}}, "keeps its url"),
    "extra": ({1: {"number": 9}}, "keeps its number"),
    "no such column": ({1: {"clip_score": 0.5}}, "has no column 'clip_score'"),
    "no such status": ({1: {"status": "fine"}}, "cannot have the status 'fine'"),
    "no status": ({1: {"status": None}}, "cannot have the status None"),
    "type": ({1: {"attempts": "many"}}, "cannot have attempts 'many': expected int32"),
    "overflow": ({1: {"attempts": 2**40}}, "expected int32"),
    "ok to failed": ({0: {"status": "timeout"}}, "is stored already: only the place of its bytes may change"),
    "ok rewritten": ({0: {"sha256": "f" * 64}}, "not its sha256"),
    "ok moved to other bytes": ({0: {"image_path": "media/00000-c.tar"}}, "other bytes lie at media/00000-c.tar"),
    "ok moved off the end": ({0: {"image_offset": 44}}, "ends before byte 52"),
    "ok moved outside": ({0: {"image_path": "http://c.test/a.tar"}}, "other bytes lie at http://c.test/a.tar"),
    "no media": ({1: {"status": "ok"}}, "cannot be ok without a media reference"),
    "half a reference": ({1: {**ok(8), "image_offset": None}}, "cannot be ok with the image reference"),
    "a negative offset": ({1: ok(-8)}, "cannot be ok with the image reference"),
    "a tar that is not there": ({1: ok(8, "media/00000-z.tar")}, "media/00000-z.tar is not there; commit the media"),
    "failed with media": ({1: {**ok(8), "status": "decode"}}, r"has failed \(decode\), so it cannot have a media"),
    "a table of another shard": (pa.table({"row_id": [row_id(1, 1)], "status": ["dns"]}), "not of shard 00000"),
    "a row twice": (pa.table({"row_id": [1, 1], "status": ["dns", "dns"]}), "row 1 of shard 0 is named twice"),
    "a table without row_id": (pa.table({"status": ["dns"]}), "has no column row_id"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_allowed_changes_nothing(name: str, store: Store) -> None:
    changes, message = REFUSED[name]
    with pytest.raises(StoreError, match=message):
        publish_generation(store, 0, changes)
    if not isinstance(changes, pa.Table):  # nor together with changes that are allowed
        with pytest.raises(StoreError):
            publish_generation(store, 0, {2: ok(16), 5: PURGE, **changes})
    assert store.list("rows") == ["00000.g0.parquet"]


def test_a_shard_without_rows(store: Store) -> None:
    with pytest.raises(StoreError, match="has no rows of shard 00001; run the recipe first"):
        publish_generation(store, 1, {0: PURGE})


def test_a_purged_row_stays_purged(store: Store) -> None:
    publish_generation(store, 0, {1: PURGE})
    with pytest.raises(StoreError, match=r"row 1 .* is purged and stays so"):
        publish_generation(store, 0, {1: ok(8)})


def test_an_ok_row_may_move_to_where_the_same_bytes_lie(store: Store) -> None:
    """So that a purge can copy a tar without the purged bytes, and `clean` can remove the old one."""
    publish_generation(store, 0, {0: {"image_path": "media/00000-b.tar"}})
    assert rows_of(store)[0] == {**base_row(0), "image_path": "media/00000-b.tar"}
    outside = {("s3://bucket/x.tar", 40): bytes(range(8))}
    moved = {"image_path": "s3://bucket/x.tar", "image_offset": 40}
    publish_generation(store, 0, {0: moved}, read_media=lambda path, offset, size: outside[path, offset][:size])
    assert rows_of(store)[0] == {**base_row(0), **moved}


# Any sequence of generations against a model: a list of dicts

places = st.tuples(st.sampled_from(["a", "b", "c", "nowhere"]), st.sampled_from([0, 8, 24, 41]))
one_change = st.one_of(
    st.just(dict(PURGE)),
    places.map(lambda p: ok(p[1], f"media/00000-{p[0]}.tar")),
    st.sampled_from(["timeout", "dns", "decode", "nonsense"]).map(lambda s: {"status": s, "attempts": 3}),
    places.map(lambda p: {"image_path": f"media/00000-{p[0]}.tar", "image_offset": p[1]}),
    st.sampled_from([{"key": "0"}, {"caption": "new"}, {"attempts": 9}]),
)
one_generation = st.dictionaries(st.integers(0, ROWS), one_change, min_size=1, max_size=3)


def model(rows: list[dict[str, Any]], changes: dict[int, dict[str, Any]]) -> list[dict[str, Any]] | None:
    """The rows afterwards by the rules as the docstring has them; None = refused."""
    tars = {f"media/00000-{n}.tar": bytes((i + f) % 256 for i in range(48)) for n, f in (("a", 0), ("b", 0), ("c", 1))}
    after = [dict(r) for r in rows]
    for index, change in changes.items():
        if index >= len(rows):
            return None
        row = rows[index]
        if change.get("status") == "purged":
            after[index] = dict.fromkeys(row) | {"row_id": row["row_id"], "key": row["key"], "status": "purged"}
            continue
        if row["status"] == "purged" or any(row[n] != v for n, v in change.items() if n in ("key", "caption")):
            return None
        new = {**row, **change}
        if row["status"] == "ok":
            differing = {n for n in row if row[n] != new[n]}
            path = new["image_path"]
            if differing - {"image_path", "image_offset"} or path not in tars:
                return None
            cuts = [tars[r["image_path"]][r["image_offset"] : r["image_offset"] + 8] for r in (row, new)]
            if cuts[0] != cuts[1]:
                return None
        else:
            if "status" in change:
                new = {n: (None if n in FETCHED else v) for n, v in row.items()} | change
            if new["status"] == "ok" and new["image_path"] not in tars:
                return None
            if new["status"] == "nonsense" or (new["status"] != "ok" and new["image_path"] is not None):
                return None
        after[index] = new
    return after


@settings(max_examples=40, deadline=None)
@given(st.lists(one_generation, min_size=1, max_size=4))
def test_any_sequence_is_what_a_list_of_dicts_says(tmp_path_factory: Any, sequence: list[dict[int, Any]]) -> None:
    store = new_store(tmp_path_factory.mktemp("g"))
    expected, number = [base_row(i) for i in range(ROWS)], 0
    for changes in sequence:
        after = model(expected, changes)
        if after is None:
            with pytest.raises(StoreError):
                publish_generation(store, 0, changes)
        else:
            number += after != expected
            done = publish_generation(store, 0, changes)
            assert done.number == number
            assert done.changed == tuple(i for i in range(ROWS) if after[i] != expected[i])
            expected = after
        assert rows_of(store) == expected
    assert len(store.list("rows")) == number + 1
    shutil.rmtree(store.root)


# Races


class Overtaken(Store):
    """A store where `first` happens between the reading and the publishing of the first generation."""

    first: Any = None

    def commit(self, name: str, local_file: Path) -> bool:
        if self.first is not None and name.startswith("rows/"):
            first, self.first = self.first, None
            first()
        return super().commit(name, local_file)


def test_the_loser_applies_its_changes_to_what_the_winner_wrote(store: Store) -> None:
    ours = Overtaken(store.url)
    ours.first = lambda: publish_generation(store, 0, {1: ok(8), 2: ok(16), 4: PURGE, 5: ok(40)})
    done = publish_generation(ours, 0, {0: PURGE, 2: {**ok(24), "attempts": 7}, 4: ok(32), 5: PURGE})
    assert done == Generation("rows/00000.g2.parquet", 2, (0, 5), (2, 4))
    after = rows_of(store)
    assert [r["status"] for r in after] == ["purged", "ok", "ok", "ok", "purged", "purged"]
    assert after[2]["image_offset"] == 16  # the first retry of a row stands
    assert store.list("rows") == [f"00000.g{n}.parquet" for n in range(3)]


def test_nothing_is_left_to_write_for_a_loser_whose_rows_are_all_taken(store: Store) -> None:
    ours = Overtaken(store.url)
    ours.first = lambda: publish_generation(store, 0, {2: ok(16)})
    done = publish_generation(ours, 0, {2: ok(24)})
    assert done == Generation("rows/00000.g1.parquet", 1, (), (2,))


def test_changes_made_from_an_older_generation_are_overtaken_too(store: Store) -> None:
    """A retry takes hours: rows that were failed when it began may be ok when it ends."""
    publish_generation(store, 0, {2: ok(16)})
    done = publish_generation(store, 0, {1: ok(8), 2: ok(24)}, base="rows/00000.g0.parquet")
    assert (done.changed, done.overtaken) == ((1,), (2,))


def test_many_writers_at_once_lose_nothing(store: Store) -> None:
    """Two threads a row: both want it, one has it; every row changes exactly once."""
    barrier = threading.Barrier(8)

    def write(place: int) -> Generation:
        barrier.wait(30)
        index = (1, 2, 4, 5)[place // 2]
        return publish_generation(
            Store(store.url), 0, {index: ok(8 * (place % 2), f"media/00000-{'ac'[place % 2]}.tar")}
        )

    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(write, range(8), timeout=60))
    assert sorted(i for d in done for i in d.changed) == [1, 2, 4, 5]
    assert [r["status"] for r in rows_of(store)] == ["ok"] * ROWS
    assert len(store.list("rows")) == 5


# What everything downstream makes of it

STEPS: list[Any] = [
    "make_sevens",
    "measure_mean",
    {"filter": {"small": "coalesce(sevens_value, 0) < 11"}},
    "rank_rows",
    {"filter": {"ranked": "rank_rank <= 6"}},
    {"add_constant": {"column": "sevens_value"}},
]
NUMBERS = list(range(1, 31))
HOW = ("image_path", "image_offset", "attempts")  # columns that say how a row came, not what it is


def status(number: int) -> str:
    return "timeout" if number in (6, 15, 28) else "ok"


@pytest.fixture
def operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MMDATA_SCRATCH", str(tmp_path / "scratch"))
    synthetic.register_all()
    synthetic.COMPUTED.clear()
    yield
    synthetic.COMPUTED.clear()


def run(recipe: dict[str, Any], **changes: Any) -> Any:
    return mmdata.run({**recipe, "steps": STEPS, **changes}, runner="inline")


def samples(ds: Any) -> list[dict[str, Any]]:
    """Every row of `samples`, without what says only how it was fetched, and with the bytes of its picture."""
    rows: list[dict[str, Any]] = ds.sql("SELECT * FROM samples ORDER BY row_id").to_arrow_table().to_pylist()
    for row in rows:
        path = row["image_path"]
        row["picture"] = None if path is None else ds.read_media(path, row["image_offset"], row["image_size"])
        for name in HOW:
            del row[name]
    return rows


@pytest.mark.usefixtures("operators")
def test_a_retried_row_is_computed_alone_and_the_answer_is_a_fresh_runs(tmp_path: Path) -> None:
    recipe = synthetic.make_dataset(tmp_path / "a", NUMBERS, status=status)
    ds = run(recipe)
    assert dict(ds.sql("SELECT status, count(*) FROM rows GROUP BY ALL").fetchall()) == {"ok": 27, "timeout": 3}
    synthetic.COMPUTED.clear()
    done = retrying.retry(ds.store, 1, {4: 15}, "retry")  # number 15 is row 4 of shard 1
    assert done.name == "rows/00001.g1.parquet"
    again = run(recipe)
    per_row = [key for key in synthetic.COMPUTED if key[0] in ("make_sevens", "measure_mean")]
    assert sorted((name, row) for name, _, row in per_row) == [
        (n, row_id(1, 4)) for n in ("make_sevens", "measure_mean")
    ]
    fresh_recipe = synthetic.make_dataset(tmp_path / "b", NUMBERS, status=lambda n: "timeout" if n in (6, 28) else "ok")
    assert samples(again) == samples(run(fresh_recipe))
    synthetic.COMPUTED.clear()
    run(recipe)
    assert not synthetic.COMPUTED  # and then there is nothing left to do


@pytest.mark.usefixtures("operators")
def test_a_purged_row_leaves_every_answer(tmp_path: Path) -> None:
    """Its values are masked at once, its group is decided anew, its picture is in no export."""
    recipe = synthetic.make_dataset(tmp_path / "a", NUMBERS, status=status)
    ds = run(recipe, export={"path": str(tmp_path / "before"), "columns": ["rank_rank"]})
    [key] = ds.sql("SELECT key FROM rows WHERE number = 3").fetchall()[0]
    assert (tmp_path / "before" / "00000.tar").read_bytes().count(f"{key}.png".encode()) == 1
    synthetic.COMPUTED.clear()
    publish_generation(ds.store, 0, {2: PURGE})
    after = run(recipe, export={"path": str(tmp_path / "after"), "columns": ["rank_rank"]})
    assert not [k for k in synthetic.COMPUTED if k[0] == "make_sevens"]
    [row] = [r for r in samples(after) if r["key"] == key]
    told = {n: v for n, v in row.items() if v is not None}
    gated = {n: v for n, v in told.items() if n.endswith("_reason")}
    assert set(gated.values()) == {"gated"}
    assert {n: v for n, v in told.items() if n not in gated} == {
        "row_id": row_id(0, 2), "key": key, "status": "purged", "verdict": "failed", "step": 0, "step_name": "ingest",
        "reason": "purged",
    }  # fmt: skip
    assert f"{key}.".encode() not in (tmp_path / "after" / "00000.tar").read_bytes()
    fresh = run(synthetic.make_dataset(tmp_path / "b", NUMBERS, status=lambda n: "purged" if n == 3 else status(n)))
    others = [r for r in samples(after) if r["key"] != key]
    assert others == [r for r in samples(fresh) if r["key"] != key]


@pytest.mark.usefixtures("operators")
def test_a_selection_that_was_not_run_again_sees_its_own_generation(tmp_path: Path) -> None:
    recipe = synthetic.make_dataset(tmp_path / "a", NUMBERS, status=status)
    run(recipe, name="old")
    before = samples(mmdata.open(recipe["dataset"], selection="old"))
    retrying.retry(Store(recipe["dataset"]), 1, {4: 15}, "retry")
    assert samples(mmdata.open(recipe["dataset"])) == before  # until a run ends, readers see what they saw
    run(recipe, name="new")
    assert samples(mmdata.open(recipe["dataset"], selection="old")) == before
    new = samples(mmdata.open(recipe["dataset"], selection="new"))
    assert [r["status"] for r in new if r["number"] == 15] == ["ok"]


@pytest.mark.usefixtures("operators")
def test_what_is_attached_by_sha256_follows_the_bytes_that_a_retry_brought(tmp_path: Path) -> None:
    """Until then the row has no key to look up; the rows that had theirs are not looked up again."""
    recipe = synthetic.make_dataset(tmp_path / "a", NUMBERS, status=status)
    digest = "ab" * 32
    pq.write_table(pa.table({"sha256": [digest], "score": [0.75]}), tmp_path / "scores.parquet")
    attach = {"attach": {"path": str(tmp_path / "scores.parquet"), "on": "sha256", "columns": ["score"]}}
    steps = [{"attach": {**attach["attach"], "on_error": "keep"}}]
    ds = run(recipe, steps=steps)
    assert ds.sql("SELECT DISTINCT score FROM samples").fetchall() == [(None,)]
    retrying.retry(ds.store, 1, {4: 15}, "retry", sha256=digest)
    again = run(recipe, steps=steps)
    assert again.sql("SELECT number FROM samples WHERE score = 0.75").fetchall() == [(15,)]


@pytest.mark.usefixtures("operators")
def test_clean_keeps_what_a_selection_or_the_newest_generation_needs(tmp_path: Path) -> None:
    """A generation between them goes, and so does the tar that only it names."""
    recipe = synthetic.make_dataset(tmp_path / "a", NUMBERS, status=status)
    ds = run(recipe, name="old")
    retrying.retry(ds.store, 1, {4: 15}, "lost")
    retrying.retry(ds.store, 0, {5: 6}, "kept")
    publish_generation(ds.store, 1, {4: PURGE})  # so that nothing but 00001.g1 names the tar `lost`
    run(recipe, name="new")
    clean(ds.store, grace_s=0)
    assert ds.store.list("rows") == [
        f"{n}.parquet" for n in ("00000.g0", "00000.g1", "00001.g0", "00001.g2", "00002.g0")
    ]
    assert ds.store.list("media") == [f"{n}.tar" for n in ("00000-kept", "00000-made", "00001-made", "00002-made")]
    before = {name: samples(mmdata.open(recipe["dataset"], selection=name)) for name in ("old", "new")}
    assert {r["status"] for r in before["old"]} == {"ok", "timeout"}
    assert {r["status"] for r in before["new"]} == {"ok", "timeout", "purged"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A recipe whose run is over, and the samples of a fresh run in which number 15 was fetched at once."""
    synthetic.register_all()
    folder = tmp_path_factory.mktemp("finished")
    recipe = synthetic.make_dataset(folder / "a", NUMBERS, status=status)
    run(recipe)
    fresh = synthetic.make_dataset(folder / "b", NUMBERS, status=lambda n: "timeout" if n in (6, 28) else "ok")
    return recipe, samples(run(fresh))


@pytest.mark.parametrize("stop", ["media:half", "media:done", "rows:half", "rows:linked"])
@pytest.mark.usefixtures("operators")
def test_a_retry_that_is_killed_changes_all_or_nothing(
    stop: str, finished: tuple[dict[str, Any], list[dict[str, Any]]], tmp_path: Path
) -> None:
    """Before the rows file has its name nobody sees anything, afterwards all; either way the retry may be repeated."""
    recipe = {**finished[0], "dataset": str(tmp_path / "dataset")}
    shutil.copytree(finished[0]["dataset"], recipe["dataset"])
    before = samples(mmdata.open(recipe["dataset"]))
    place = killing.Place(tmp_path / "place", pa.table({"url": ["http://a.test/"]}))
    command = [
        sys.executable,
        str(Path(retrying.__file__)),
        recipe["dataset"],
        "1",
        "4",
        "15",
    ]  # 15 is row 4 of shard 1
    scratch = {"MMDATA_SCRATCH": str(tmp_path / "scratch"), "TMPDIR": str(tmp_path)}
    dying = {**place.environment(f"{stop}#1=kill"), **scratch}
    died = subprocess.run([*command, "killed"], env=dying, capture_output=True, text=True)
    assert died.returncode == -9, died.stderr
    assert place.was_stopped() == f"{stop}#1"
    store = Store(recipe["dataset"])
    assert newest_rows(store, 1).number == int(stop == "rows:linked")
    assert samples(mmdata.open(recipe["dataset"])) == before
    again = subprocess.run([*command, "again"], env={**os.environ, **scratch}, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert samples(run(recipe)) == finished[1]
    clean(store, grace_s=0)
    assert [n for n in store.list("media") if n.startswith("00001")] == ["00001-again.tar", "00001-made.tar"]
