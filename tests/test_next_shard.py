"""The next shard is made ready beside the model: on every runner, in bounds, at nobody's cost where it is in vain."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import faulty
import pytest
import staring
import synthetic

import mmdata
from mmdata import feed, shard_job
from mmdata.batch import DecodedCache
from mmdata.chunks import Chunks
from mmdata.dataset import Dataset
from mmdata.errors import StoreError
from mmdata.media_reader import MediaReader
from mmdata.pool import Finished, Item
from mmdata.repeats import Repeats
from mmdata.worker_journal import Journal

FIXTURES = Path(staring.__file__).parent


@pytest.fixture(autouse=True)
def _surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two CPUs, workers whose decoder dies of a certain picture, and scratch that is looked into afterwards."""
    staring.register_all()
    monkeypatch.setenv("PYTHONPATH", f"{FIXTURES}{os.pathsep}{FIXTURES / 'deadly'}")
    monkeypatch.setenv("MMDATA_TEST_DEADLY", "1")
    monkeypatch.setenv("MMDATA_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})


def _step(folder: Path, **options: Any) -> dict[str, Any]:
    return {"stare": {"log": str(folder / "log"), "max_failed": 1, **options}}


def _run(document: dict[str, Any], *steps: Any, runner: Any = "inline", workers: int | None = None) -> Dataset:
    return mmdata.run({**document, "steps": list(steps)}, runner=runner, workers=workers)


def _values(ds: Dataset) -> dict[int, tuple[Any, ...]]:
    rows = ds.sql("SELECT number, stare_mean, stare_reason FROM samples ORDER BY row_id").fetchall()
    return {row[0]: row[1:] for row in rows}


def _of(*numbers: int) -> list[str]:
    """What the log says where each of these is decoded once and computed once."""
    return [f"{did} {n}" for did in ("decoded", "computed") for n in range(*numbers)]


def _left_behind(folder: Path) -> list[Path]:
    return [p for p in (folder / "scratch").rglob("*") if p.is_file()]


def _threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(("decode", "mmdata-next", "media"))]


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Shard and whether the worker died, of every item that comes back."""
    found: list[tuple[int, bool]] = []
    again = Repeats.again

    def noting(self: Repeats, finished: Finished) -> Item | None:
        found.append((finished.item.shard, finished.died is not None))
        return again(self, finished)

    monkeypatch.setattr(Repeats, "again", noting)
    return found


# What comes next is begun before what is at hand is done


@pytest.mark.parametrize("runner", ["inline", "processes"])
def test_a_shards_first_pictures_are_decoded_while_the_model_is_at_the_one_before(tmp_path: Path, runner: str) -> None:
    document = synthetic.make_dataset(tmp_path, range(40), 10, staring.picture)
    # The last row of every shard waits for a picture of the next one.
    step = _step(tmp_path, waits={9: "decoded 10", 19: "decoded 20", 29: "decoded 30"})
    ds = _run(document, step, runner=runner, workers=None if runner == "inline" else 1)
    assert _values(ds) == {n: (float(n), None) for n in range(40)}
    said = staring.said(tmp_path / "log")
    for last, first in ((9, 10), (19, 20), (29, 30)):
        assert said.index(f"decoded {first}") < said.index(f"computed {last}")
    assert sorted(said) == sorted(_of(0, 40))
    assert _left_behind(tmp_path) == []
    assert _threads() == []


def test_a_worker_gets_the_shard_that_it_has_made_ready(tmp_path: Path) -> None:
    document = synthetic.make_dataset(tmp_path, range(80), 10, staring.picture)
    # Two workers: shards 0 and 1 are begun at once, and each names the one after the next.
    waits = {9: "decoded 20", 19: "decoded 30", 29: "computed 30", 39: "computed 20"}
    ds = _run(document, _step(tmp_path, waits=waits), runner="processes", workers=2)
    assert _values(ds) == {n: (float(n), None) for n in range(80)}
    said = staring.said(tmp_path / "log")
    # Those that are left at the end may be taken by whoever is idle first, and not by who has made them ready.
    assert sorted(line for line in said if line not in _of(40, 80)) == sorted(_of(0, 40))
    assert sorted({*said}) == sorted(_of(0, 80))
    for decoded, computed in (("decoded 20", "computed 20"), ("decoded 30", "computed 30")):
        assert staring.process_of(tmp_path / "log", decoded) == staring.process_of(tmp_path / "log", computed)
    assert _left_behind(tmp_path) == []


def test_filters_before_the_model_are_walked_ahead_too(tmp_path: Path) -> None:
    document = synthetic.make_dataset(tmp_path, range(40), 10, staring.picture)
    step = _step(tmp_path, waits={9: "decoded 11", 19: "decoded 21"})
    ds = _run(document, {"filter": {"odd": "number % 2 = 1"}}, step)
    assert {n: v for n, v in _values(ds).items() if n % 2} == {n: (float(n), None) for n in range(1, 40, 2)}
    said = staring.said(tmp_path / "log")
    assert sorted(said) == sorted(_of(1, 40, 2))


def test_what_no_filter_waits_for_is_made_ready_past_other_steps_and_nothing_else(tmp_path: Path) -> None:
    for name, sql in (("known", "number % 2 = 1"), ("unknown", "number % 2 = 1 AND residue IS NOT NULL")):
        folder = tmp_path / name
        document = synthetic.make_dataset(folder, range(1, 11), 5, staring.picture)
        waits = {5: "decoded 7"} if name == "known" else {}
        _run(document, "make_sevens", {"filter": {"odd": sql}}, _step(folder, waits=waits))
        said = staring.said(folder / "log")
        assert sorted(said) == sorted(_of(1, 10, 2))
        assert (said.index("decoded 7") < said.index("computed 5")) == (name == "known")


# Deaths


def test_a_picture_that_kills_its_decoder_ahead_of_its_turn_costs_itself_alone(
    tmp_path: Path, ended: list[tuple[int, bool]]
) -> None:
    document = synthetic.make_dataset(
        tmp_path, range(27), 9, lambda n: staring.picture(n, faulty.KILLER if n == 9 else b"")
    )
    # A shard ends in a batch of one row, which is at work when the decoder dies of the next shard's first picture.
    ds = _run(document, _step(tmp_path, waits={8: "decoded 9"}, holds={9: 8}), runner="processes", workers=1)
    assert _values(ds) == {n: (None, "worker_died") if n == 9 else (float(n), None) for n in range(27)}
    # One death at the shard before, then two while it was alone.
    assert ended == [(0, True), (0, False), (1, True), (1, True), (1, False), (2, False)]
    assert _left_behind(tmp_path) == []


def test_such_a_death_is_noted_in_the_pictures_own_shard_and_charges_nobody_else(
    tmp_path: Path, ended: list[tuple[int, bool]]
) -> None:
    document = synthetic.make_dataset(
        tmp_path, range(27), 9, lambda n: staring.picture(n, faulty.KILLER if n == 9 else b"")
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({**document, "steps": [_step(tmp_path, waits={8: "decoded 9"}, holds={9: 8})]}))
    command = [sys.executable, str(FIXTURES / "staring.py"), "run", str(recipe), "--runner", "inline"]
    assert subprocess.run(command, capture_output=True, timeout=100).returncode == -signal.SIGABRT
    noted = {p.name.split("-", 2)[2]: p for p in (tmp_path / "scratch" / "journal").rglob("*.json")}
    beside = Journal(noted["00000.json"])
    assert (beside.suspects, beside.deaths) == ([8], {})  # it was at work, but not alone
    ahead = Journal(noted["00001-next.json"], is_alone=False, of_others=True)
    assert 1 << 24 in ahead.suspects
    assert (ahead.deaths, {row >> 24 for row in ahead.suspects}) == ({}, {1})
    # Another run goes on: the picture is tried alone, twice, and nothing is made ready for its shard beside another.
    ds = _run(document, _step(tmp_path, waits={8: "decoded 9"}, holds={9: 8}), runner="processes", workers=1)
    assert ended == [(0, False), (1, True), (1, True), (1, False), (2, False)]
    assert _values(ds) == {n: (None, "worker_died") if n == 9 else (float(n), None) for n in range(27)}
    assert not list((tmp_path / "scratch" / "journal").rglob("*.json"))


def test_what_a_living_worker_notes_of_a_shard_it_has_in_view_charges_nobody(tmp_path: Path) -> None:
    path = tmp_path / "next.json"
    Journal(path, "run", is_alone=False).begin([1, 2], "step")
    assert Journal(path, "run", is_alone=False, of_others=True).suspects == []
    assert json.loads(path.read_text())["running"] == [1, 2]  # it is the other's, and left as it is
    child = os.fork()
    if not child:
        gc.freeze()  # what other tests left to collect is not this process' to end
        Journal(path, "run", is_alone=False).begin([3], "step")
        os._exit(0)
    os.waitpid(child, 0)
    dead = Journal(path, "run", is_alone=False, of_others=True)
    assert (dead.suspects, dead.deaths) == ([1, 2, 3], {})


def test_a_row_beside_which_others_were_decoded_was_not_alone(tmp_path: Path) -> None:
    for is_alone, deaths in ((True, {7: 1}), (False, {})):
        path = tmp_path / f"{is_alone}.json"
        Journal(path).begin([7], "step", is_alone)
        again = Journal(path)
        assert (again.suspects, again.deaths) == ([7], deaths)


# Hints that do not come true


@pytest.mark.parametrize(
    ("wrong", "waits"), [("another", {9: "decoded 40"}), ("older", {9: "decoded 10"}), ("same", {})]
)
def test_a_hint_that_does_not_come_true_costs_its_decoding_and_is_let_go_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str, waits: dict[int, str]
) -> None:
    right = feed._Kept.follow

    def follow(self: feed._Kept, item: Item, ready: deque[Item], others: int) -> Item | None:
        following = right(self, item, ready, others)
        if wrong == "older":
            return following and replace(following, files={"stare-0": None})
        return ready[-1] if wrong == "another" else item

    readers: list[MediaReader] = []  # that are open
    beside: list[tuple[int, int, int]] = []
    make, close, data = MediaReader.__init__, MediaReader.close, DecodedCache._data

    def made(self: MediaReader, *args: Any) -> None:
        readers.append(self)
        make(self, *args)

    def closed(self: MediaReader) -> None:
        readers[:] = [r for r in readers if r is not self]
        close(self)

    def measured(self: DecodedCache, row: int) -> bytes:
        notes = list((tmp_path / "scratch" / "journal").rglob("*-next.json"))
        beside.append((len([n for n in _threads() if n.startswith("decode")]), len(notes), len(readers)))
        return data(self, row)

    monkeypatch.setattr(feed._Kept, "follow", follow)
    monkeypatch.setattr(MediaReader, "__init__", made)
    monkeypatch.setattr(MediaReader, "close", closed)
    monkeypatch.setattr(DecodedCache, "_data", measured)
    document = synthetic.make_dataset(tmp_path, range(50), 10, staring.picture)
    ds = _run(document, _step(tmp_path, waits=waits))
    assert _values(ds) == {n: (float(n), None) for n in range(50)}
    assert ds.report is not None
    assert ds.report.media_reads == 50  # what was read in vain is no shard's
    said = staring.said(tmp_path / "log")
    assert [line for line in said if line.startswith("computed")] == [f"computed {n}" for n in range(50)]
    assert not waits or said.count(waits[9]) > 1
    # Two threads, the note of one shard, and the media of two: nothing piles up from shard to shard.
    threads, notes, open_readers = (max(found) for found in zip(*beside, strict=True))
    assert (threads, notes) == (2, int(bool(waits)))
    assert open_readers <= 2
    assert open_readers == 2 or not waits
    assert (readers, _left_behind(tmp_path), _threads()) == ([], [], [])


def test_ctrl_c_lets_go_of_what_is_made_ready_and_charges_nobody(tmp_path: Path) -> None:
    document = synthetic.make_dataset(tmp_path, range(30), 10, staring.picture)
    with pytest.raises(KeyboardInterrupt):
        _run(document, _step(tmp_path, waits={9: "decoded 10"}, interrupt=[9]))
    assert "decoded 10" in staring.said(tmp_path / "log")
    assert (_left_behind(tmp_path), _threads()) == ([], [])
    assert _values(_run(document, _step(tmp_path))) == {n: (float(n), None) for n in range(30)}


def test_an_idle_worker_takes_what_is_kept_for_a_busy_one(tmp_path: Path) -> None:
    document = synthetic.make_dataset(tmp_path, range(30), 10, staring.picture)
    # Shard 2 is made ready by the worker of shard 0, which then waits until another has computed it.
    waits = {8: "decoded 20", 9: "computed 29", 19: "decoded 20"}
    ds = _run(document, _step(tmp_path, waits=waits), runner="processes", workers=2)
    assert _values(ds) == {n: (float(n), None) for n in range(30)}
    log = tmp_path / "log"
    assert staring.process_of(log, "computed 20") == staring.process_of(log, "computed 10")
    assert staring.process_of(log, "decoded 20") > staring.process_of(log, "computed 20")
    assert not [line for line in staring.said(log) if line.startswith("no ")]
    assert _left_behind(tmp_path) == []


def _item(shard: int) -> Item:
    return Item("pass", "pass 1", shard)


def test_which_item_is_kept_for_which_worker() -> None:
    kept, ready = feed._Kept(), deque(_item(n) for n in range(6))

    def start(others: int) -> tuple[int, int | None]:
        index = kept.choose(ready)
        item = ready[index]
        following = kept.follow(item, ready, others)
        kept.take(item)
        del ready[index]
        return item.shard, following and following.shard

    assert [start(1), start(0)] == [(0, 2), (1, 3)]  # two workers
    kept.ended(_item(1))
    assert start(0) == (3, 4)  # the worker of 1 gets what was kept for it
    kept.release(_item(0))  # the worker of 0 died: 2 is anyone's again
    assert start(0) == (2, 5)
    # Nothing else is left: the one that is kept for the busiest worker is taken, and that worker waits for nothing.
    assert start(0) == (5, None)
    kept.ended(_item(2))
    kept.ended(_item(3))
    assert start(0) == (4, None)


# Bounds


def test_two_chunks_are_in_memory_at_a_time_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 2 * 12 * (8 * 8 * 3 + 120)  # two chunks of some twelve rows: three batches
    monkeypatch.setattr(shard_job, "DECODED_BYTES", limit)
    made: list[weakref.ref[DecodedCache]] = []
    cache, data = Chunks.cache, DecodedCache._data

    def noting(self: Chunks, chunk: Any) -> DecodedCache | None:
        found = cache(self, chunk)
        if found is not None:
            made.append(weakref.ref(found))
        return found

    held: list[tuple[int, int]] = []

    def measured(self: DecodedCache, row: int) -> bytes:
        found = data(self, row)
        alive = [c for c in (ref() for ref in made) if c is not None]
        sizes = [_bytes_in(c) for c in alive]
        held.append((sum(size > 0 for size in sizes), sum(sizes)))
        return found

    monkeypatch.setattr(Chunks, "cache", noting)
    monkeypatch.setattr(DecodedCache, "_data", measured)
    document = synthetic.make_dataset(tmp_path, range(120), 30, staring.picture)
    gc.disable()  # what is let go of must be gone at once
    try:
        ds = _run(document, _step(tmp_path, waits={29: "decoded 30", 59: "decoded 60", 89: "decoded 90"}))
    finally:
        gc.enable()
    assert _values(ds) == {n: (float(n), None) for n in range(120)}
    assert not [line for line in staring.said(tmp_path / "log") if line.startswith("no ")]
    assert len(made) >= 4 * 3
    assert {chunks for chunks, _ in held} == {1, 2}
    assert max(size for _, size in held) <= limit


def _bytes_in(cache: DecodedCache) -> int:
    pictures = [*cache._pictures.copy().values(), *cache._variants.copy().values()]
    return sum(map(len, cache._bytes.copy().values())) + sum(getattr(p, "nbytes", 0) for p in pictures)


# Errors


@pytest.mark.parametrize("runner", ["inline", "processes"])
def test_a_shard_that_cannot_be_made_ready_fails_in_its_own_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runner: str
) -> None:
    def stopped(folder: Path, follow: Callable[..., Any] | None) -> tuple[str, list[str]]:
        document = synthetic.make_dataset(folder, range(30), 10, staring.picture)
        gone = folder / "dataset" / "rows" / "00001.g0.parquet"
        with monkeypatch.context() as patch:
            if follow is not None:
                patch.setattr(feed._Kept, "follow", follow)
            with pytest.raises(StoreError) as error:
                _run(document, _step(folder, remove={0: str(gone)}), runner=runner, workers=1)
        return str(error.value).replace(str(folder), ""), staring.said(folder / "log")

    message, said = stopped(tmp_path / "ahead", None)
    assert "00001.g0.parquet" in message
    assert [line for line in said if line.startswith("computed")] == [f"computed {n}" for n in range(10)]
    assert list((tmp_path / "ahead" / "dataset" / "columns").glob("*/00000.c0.parquet"))
    assert message == stopped(tmp_path / "without", lambda *_: None)[0]
    assert _left_behind(tmp_path) == []
    assert _threads() == []
