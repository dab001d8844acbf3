"""Two runs on one folder, a run or a shard that wakes up too late, and disks that go away under a run."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from killing import RECIPE, SHARD_ROWS, Place, end_session, exported, picture_list, picture_server, samples, wait_until
from server import BadServer

import mmdata
from mmdata.clean import clean
from mmdata.ingest import ingest_shard
from mmdata.recipe import load
from mmdata.store import Store

INLINE = ("--runner", "inline")


@pytest.fixture(scope="module")
def server() -> Iterator[BadServer]:
    with picture_server() as running:
        yield running


@pytest.fixture
def place(server: BadServer, tmp_path: Path) -> Place:
    return Place(tmp_path / "here", picture_list(server))


@pytest.fixture(scope="module")
def truth(server: BadServer, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """An uninterrupted run."""
    place = Place(tmp_path_factory.mktemp("uninterrupted") / "place", picture_list(server))
    assert place.command(*INLINE) == (0, "")
    return place


class Held:
    """A run that waits at an event, with its log and its going-on put aside for a second run in the same place."""

    def __init__(self, place: Place, event: str, **options: object) -> None:
        self.process = place.start(*INLINE, stop=f"{event}=hold", **options)
        self.log = place.log
        wait_until(lambda: self.log.exists() and place.was_stopped() == event)
        place.log = place.folder / "events-of-the-second"

    def go_on(self) -> tuple[int, str]:
        """(exit code, what it said on stderr)."""
        Path(f"{self.log}.go").touch()
        try:
            _, errors = self.process.communicate(timeout=120)
        finally:
            end_session(self.process)
        return self.process.returncode, errors


def is_one_sentence(errors: str) -> bool:
    return errors.startswith("mmdata: ") and errors.count("\n") == 1 and "Traceback" not in errors


def test_the_second_run_says_who_holds_the_folder(place: Place, truth: Place) -> None:
    first = Held(place, "rows:done#2")
    code, errors = place.command(*INLINE)
    assert code == 1
    assert is_one_sentence(errors)
    assert f"(pid {first.process.pid} on " in errors
    assert "is held by run" in errors
    assert first.go_on() == (0, "")
    assert exported(place.shards) == exported(truth.shards)


def test_a_killed_holder_is_taken_over_at_once(place: Place, truth: Place) -> None:
    first = Held(place, "rows:done#2")
    try:
        heartbeat = datetime.fromisoformat(json.loads((place.dataset / "lease.json").read_bytes())["heartbeat"])
        os.kill(first.process.pid, signal.SIGKILL)
        assert place.command(*INLINE) == (0, "")
        taken = datetime.fromisoformat(json.loads((place.dataset / "lease.json").read_bytes())["since"])
    finally:
        end_session(first.process)
    assert taken - heartbeat < timedelta(seconds=60), "it waited for the lease to become stale"
    assert exported(place.shards) == exported(truth.shards)


def _age_lease(place: Place) -> None:
    """As if its holder, which sleeps, had slept for two minutes."""
    store = Store(str(place.dataset))
    found = store.read("lease.json")
    old = (datetime.now(UTC) - timedelta(minutes=2)).isoformat(timespec="milliseconds")
    assert store.replace("lease.json", json.dumps({**json.loads(found), "heartbeat": old}).encode(), found)


@pytest.mark.parametrize("event", ["media:done#2", "near_duplicates:done#2", "verdicts:done#2"])
def test_a_run_that_wakes_up_too_late_changes_nothing(event: str, place: Place, truth: Place) -> None:
    first = Held(place, event)
    try:
        # SIGSTOP also stops its heartbeat, as a suspended laptop would.
        os.kill(first.process.pid, signal.SIGSTOP)
        _age_lease(place)
        place.edit()
        assert place.command(*INLINE) == (0, "")
        answer, files = samples(place.dataset), exported(place.shards)
        assert answer != samples(truth.dataset)
        Path(f"{first.log}.go").touch()
        os.kill(first.process.pid, signal.SIGCONT)
        _, errors = first.process.communicate(timeout=120)
    finally:
        end_session(first.process)
    assert first.process.returncode == 1, errors
    assert is_one_sentence(errors), errors
    assert "another run" in errors
    assert (samples(place.dataset), exported(place.shards)) == (answer, files)


def test_a_shard_fetched_twice_is_the_first_ones(
    place: Place, truth: Place, server: BadServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMDATA_SCRATCH", str(place.folder / "scratch"))
    monkeypatch.chdir(place.folder)
    recipe = load(RECIPE)
    _, part = next(zip(range(1), recipe.source.tables(SHARD_ROWS), strict=False))
    # The late one asks for a picture that takes its time, and gets other ones for the rest than the first did.
    urls = [server.url("/slow/4") if n == 0 else server.url("/ok") for n in range(SHARD_ROWS)]
    late_part = part.set_column(part.column_names.index("url"), "url", [urls])
    store, counts = Store(str(place.dataset)), []

    def late() -> None:
        counts.append(ingest_shard(store, 0, late_part, "urls", recipe.fetch, "late"))

    thread = threading.Thread(target=late)
    thread.start()
    mmdata.run(RECIPE, runner="inline")
    assert thread.is_alive()
    stood = {name: (place.dataset / name).read_bytes() for name in place.files()}
    thread.join(60)
    # It reports what stands, not what it fetched.
    statuses = mmdata.open(place.dataset).sql("SELECT status FROM rows WHERE row_id < 1 << 24").fetchall()
    assert counts[0].by_status == {s: [row[0] for row in statuses].count(s) for (s,) in set(statuses)}
    assert counts[0].by_status["ok"] < SHARD_ROWS
    left = {"media/00000-late.tar"}
    assert {name: (place.dataset / name).read_bytes() for name in place.files() - left} == stood
    assert left <= place.files()
    assert samples(place.dataset) == samples(truth.dataset)
    assert [name for name, _ in clean(store)] == sorted(left)
    shutil.rmtree(place.shards)
    mmdata.run(RECIPE, runner="inline")
    assert exported(place.shards) == exported(truth.shards)


@pytest.mark.parametrize("event", ["media:done#2", "hash_image:done#1", "near_duplicates:done#2", "verdicts:done#1"])
def test_a_folder_that_vanishes_stops_the_run(event: str, place: Place, truth: Place) -> None:
    run = Held(place, event)
    shutil.rmtree(place.dataset)
    code, errors = run.go_on()
    assert code == 1
    assert is_one_sentence(errors), errors
    assert str(place.dataset) in errors
    # What is left of it is no dataset that a reader could take for one, nor one that a run could go on from.
    assert not (place.dataset / "current.json").exists()
    assert not place.shards.exists()
    code, errors = place.command(*INLINE)
    if code != 0:  # the run had made the folder anew before it noticed
        assert code == 2
        assert is_one_sentence(errors), errors
        assert "is not empty and no dataset" in errors
        shutil.rmtree(place.dataset)
        assert place.command(*INLINE) == (0, "")
    assert samples(place.dataset) == samples(truth.dataset)
    assert exported(place.shards) == exported(truth.shards)


def _mortal() -> list[str]:
    """For root: a command in front of which permissions hold, as they do for everybody else."""
    if os.geteuid() != 0:
        return []
    drop = "-dac_override,-dac_read_search,-fowner"
    return ["setpriv", "--bounding-set", drop, "--inh-caps", drop]


@pytest.mark.parametrize("event", ["rows:done#1", "probe_image:done#1", "verdicts:done#1"])
def test_a_folder_that_becomes_read_only_stops_the_run(event: str, place: Place, truth: Place) -> None:
    run = Held(place, event, before=_mortal())
    folders = [place.dataset, *(p for p in place.dataset.rglob("*") if p.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        code, errors = run.go_on()
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert code == 1
    assert is_one_sentence(errors), errors
    assert "Permission denied; give this user write access to" in errors
    assert place.command(*INLINE) == (0, "")
    assert exported(place.shards) == exported(truth.shards)


def test_a_disk_that_takes_no_more_stops_the_run(place: Place, truth: Place) -> None:
    biggest = max(p.stat().st_size for p in (truth.dataset / "media").iterdir())
    most = biggest - 1

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    code, errors = place.command(*INLINE, preexec_fn=limit)
    assert code == 1
    assert is_one_sentence(errors), errors
    assert "scratch file" in errors
    assert place.command(*INLINE) == (0, "")
    assert exported(place.shards) == exported(truth.shards)
    assert samples(place.dataset) == samples(truth.dataset)
