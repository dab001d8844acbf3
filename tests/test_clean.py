"""`clean` removes what nothing names, and only when nobody else works on the dataset."""

from __future__ import annotations

import json
import os
import time
import uuid
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pytest

from mmdata.clean import by_kind, clean, unreferenced
from mmdata.computing import note_computing
from mmdata.errors import RecipeError, StoreError
from mmdata.lease import Holder, Lease, ProcessId, _utc
from mmdata.selections import load_selections
from mmdata.store import ColumnFooter, Store, publish_columns, write_parquet

SELECTED = {
    "rows": ["rows/00000.g0.parquet", "rows/00001.g0.parquet"],
    "verdicts": ["verdicts/chain-run2/00000.parquet", "verdicts/chain-run2/00001.parquet"],
    "kept-1": ["columns/kept-1/00000.c0.parquet", "columns/kept-1/00001.c0.parquet"],
}
LOOSE = [
    "columns/score-1/00000.c0.parquet",
    "columns/score-1/00000.c9.parquet",
    "columns/unused-1/00000.c0.parquet",
    "media/00000-zombie.tar",
    "media/00002-crashed.tar",
    "state/selection-chain-run1.parquet",
    "verdicts/chain-run1/00000.parquet",
]


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Two shards of rows, each naming a tar; loose files of every kind beside them."""
    monkeypatch.setenv("MMDATA_SCRATCH", str(tmp_path / "scratch"))
    made = Store(str(tmp_path / "pets") if request.param == "local" else f"memory://{uuid.uuid4().hex}/pets")
    for name, tar in (("00000.g0", "media/00000-a.tar"), ("00001.g0", "media/00001-b.tar"), ("00001.g1", None)):
        rows = {"row_id": [1, 2, 3], "image_path": pa.array([tar, None, "https://example.org/x.tar"]), "url": ["u"] * 3}
        write_parquet(pa.table(rows), tmp_path / "rows.parquet")
        made.commit(f"rows/{name}.parquet", tmp_path / "rows.parquet")
    for tar in ("00000-a", "00000-zombie", "00001-b", "00002-crashed"):
        made.create(f"media/{tar}.tar", tar.encode())
    for set_name, numbers in (("score-1", (0, 9, 10)), ("kept-1", (0, 1)), ("unused-1", (0,))):
        for number in numbers:
            write_parquet(pa.table({"row_id": [number]}), tmp_path / "c.parquet")
            made.commit(f"columns/{set_name}/00000.c{number}.parquet", tmp_path / "c.parquet")
    for run in ("run1", "run2"):
        write_parquet(pa.table({"row_id": [1]}), tmp_path / "v.parquet")
        made.commit(f"verdicts/chain-{run}/00000.parquet", tmp_path / "v.parquet")
    made.create("runs/1.json", b"{}")
    note_computing(made, "unfinished", "run3", ["score-1"])
    for run in ("run1", "run2"):
        write_parquet(pa.table({"shard": [0, 1], **SELECTED}), tmp_path / "s.parquet")
        made.commit(f"state/selection-chain-{run}.parquet", tmp_path / "s.parquet")
    steps = [{"position": 1, "name": "keep", "kind": "stage", "set_name": "kept-1"}]
    selected = {"chain": "chain", "run": "run2", "recipe": "", "finished": "", "unsettled": 0, "log_keys": []}
    selected |= {"steps": steps, "counts": [], "files": "state/selection-chain-run2.parquet"}
    document = {"format": 1, "latest": "pets", "selections": {"pets": selected}}
    assert made.replace("current.json", json.dumps(document).encode(), None)
    return made


def put(store: Store, name: str, data: bytes) -> None:
    """Past the store, as a crash or a stranger would."""
    if store.is_local:
        Path(store.root, name).write_bytes(data)
    else:
        store.fs.pipe_file(f"{store.root}/{name}", data)


def everything(store: Store) -> set[str]:
    return {f"{f}/{n}" for top in ("", "columns/", "verdicts/") for f in subfolders(store, top) for n in store.list(f)}


def subfolders(store: Store, top: str) -> list[str]:
    return [f"{top}{name}" for name in store.folders(top.rstrip("/"))]


def test_only_what_nothing_names_goes(store: Store) -> None:
    before = everything(store)
    listed = clean(store, dry_run=True, grace_s=0)
    assert [name for name, _ in listed] == LOOSE
    assert dict(listed)["media/00000-zombie.tar"] == len(b"00000-zombie")
    assert everything(store) == before
    assert clean(store, grace_s=0) == listed
    assert everything(store) == before - set(LOOSE)
    assert clean(store, grace_s=0) == []


def test_young_files_stay(store: Store) -> None:
    """A worker that outlived its driver is about to name its tar; so `clean` waits until that cannot be any more."""
    assert clean(store) == []
    assert clean(store, dry_run=True) == []
    old = LOOSE[2]
    if store.is_local:
        written = time.time() - 3700
        os.utime(Path(store.root, old), (written, written))
    else:
        store.fs.store[f"{store.root}/{old}"].created -= timedelta(seconds=3700)
        store.fs.store[f"{store.root}/{old}"].modified -= timedelta(seconds=3700)
    assert [name for name, _ in clean(store, dry_run=True)] == [old]
    assert [name for name, _ in clean(store, grace_s=3800)] == []
    assert [name for name, _ in clean(store)] == [old]
    assert [name for name, _ in clean(store, grace_s=0)] == [name for name in LOOSE if name != old]


def test_temporary_files_go_and_a_lock_stays(store: Store) -> None:
    half = [".tmp-12-ab", "columns/score-1/.tmp-12-ab", "media/.tmp-12-ab"]
    for name in half:
        put(store, name, b"half")
    put(store, ".lock", b"")
    assert [name for name, _ in clean(store, grace_s=0) if ".tmp-" in name] == half
    assert (".lock", 0) in store.entries("")
    assert all(not name.startswith(".tmp-") for name, _ in store.entries("media"))


def test_before_the_first_answer_whole_sets_stay(store: Store) -> None:
    names = [name for name, _ in unreferenced(store, {})]
    assert {"verdicts/chain-run1/00000.parquet", "verdicts/chain-run2/00000.parquet"} <= set(names)
    assert [name for name in names if name.startswith("columns/")] == [
        "columns/kept-1/00000.c0.parquet",
        "columns/score-1/00000.c0.parquet",
        "columns/score-1/00000.c9.parquet",
    ]
    # Nothing answers by the older generation of rows now, and so nothing by its tar.
    assert [name for name in names if name.startswith(("rows/", "runs/"))] == ["rows/00001.g0.parquet"]
    assert "media/00001-b.tar" in names
    assert "media/00000-a.tar" not in names


def test_a_selection_is_forgotten(store: Store) -> None:
    before = everything(store)
    names = {name for name, _ in clean(store, grace_s=0, forgotten="pets", dry_run=True)}
    assert everything(store) == before
    assert "pets" in load_selections(store)[0]
    assert names > {"verdicts/chain-run2/00000.parquet", "state/selection-chain-run2.parquet", "rows/00001.g0.parquet"}
    assert {name for name, _ in clean(store, grace_s=0, forgotten="pets")} == names
    assert everything(store) == before - names
    assert load_selections(store) == ({}, None)
    with pytest.raises(RecipeError, match="has no selection 'pets'"):
        clean(store, forgotten="pets")


def test_an_unfinished_recipe_is_forgotten(store: Store) -> None:
    names = [name for name, _ in clean(store, grace_s=0, forgotten="unfinished")]
    assert "columns/score-1/00000.c10.parquet" in names
    assert [name for name in names if name.startswith("state/computing-")] == ["state/computing-run3-0.json"]
    assert "columns/kept-1/00000.c0.parquet" not in names


def test_what_is_freed_is_summed_by_kind() -> None:
    removed = [("media/a.tar", 5), ("media/.tmp-1-a", 3), ("verdicts/x/00000.parquet", 2), ("media/b.tar", 6)]
    assert by_kind([*removed, ("/scratch/1", 9)]) == {
        "media": (2, 11),
        "scratch": (1, 9),
        "temporary": (1, 3),
        "verdicts": (1, 2),
    }


def test_nothing_goes_while_another_process_holds_it(store: Store) -> None:
    stamp = _utc(time.time())
    elsewhere = replace(ProcessId.current(), host="elsewhere")
    assert store.replace("lease.json", Holder("run-7", elsewhere, stamp, stamp).to_bytes(), None)
    before = everything(store)
    for dry_run in (True, False):
        with pytest.raises(StoreError, match="held by run run-7"):
            clean(store, dry_run=dry_run, grace_s=0)
    assert everything(store) == before


def test_a_run_may_clean_its_own_dataset(store: Store) -> None:
    with Lease.acquire(store, "run-1") as lease:
        assert [name for name, _ in clean(store, grace_s=0)] == LOOSE
        lease.beat()
        assert not lease.lost.is_set()


def test_a_torn_rows_file_stops_it(store: Store) -> None:
    before = everything(store)
    put(store, "rows/00003.g0.parquet", b"PAR1 torn")
    with pytest.raises(StoreError, match=r"rows/00003\.g0\.parquet of .* is not a whole Parquet file"):
        clean(store, grace_s=0)
    assert everything(store) - {"rows/00003.g0.parquet"} == before


def test_scratch_of_dead_processes_goes(store: Store, tmp_path: Path) -> None:
    me = ProcessId.current()
    dead = tmp_path / "scratch" / f"{replace(me, start=me.start - 1).token()}.abc"
    mine, foreign = tmp_path / "scratch" / f"{me.token()}.abc", tmp_path / "scratch" / "notes"
    for folder in (dead, mine, foreign):
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(b"12345")
    assert (str(dead), 5) in clean(store, dry_run=True, grace_s=0)
    assert (str(dead), 5) in clean(store, grace_s=0)
    assert (dead.exists(), mine.exists(), foreign.exists()) == (False, True, True)


def test_no_dataset_is_made_by_cleaning(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no dataset at"):
        clean(Store(str(tmp_path / "pets")))
    assert not (tmp_path / "pets").exists()


def test_what_is_left_still_reads(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "pets"))
    footer = ColumnFooter.of("{}")
    for reasons in ([None, "uncovered"], [None, None]):
        rows = {"row_id": [0, 1], "x": [1.0, 2.0], "reason": pa.array(reasons, pa.string())}
        newest = publish_columns(store, "x-1", 0, pa.table(rows), footer)
    assert [name for name, _ in clean(store, grace_s=0)] == ["columns/x-1/00000.c0.parquet"]
    assert store.coverage("x-1") == {0: newest}
    assert store.read_table(newest.name)["x"].to_pylist() == [1.0, 2.0]
