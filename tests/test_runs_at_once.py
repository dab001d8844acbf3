"""Two runs on one folder, a run or a shard that wakes up too late, and disks that go away under a run."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from killing import (
    KINDS,
    RECIPE,
    SHARD_ROWS,
    Place,
    end_session,
    exported,
    picture_list,
    picture_server,
    samples,
    wait_until,
)
from s3 import S3Server, running_s3
from server import BadServer

import mmdata
from mmdata.clean import clean
from mmdata.ingest import ingest_shard
from mmdata.recipe import load
from mmdata.store import Store

INLINE = ("--runner", "inline")
Truths = Callable[[str], Place]
on_every_store = pytest.mark.parametrize("kind", KINDS, indirect=True)


@pytest.fixture(scope="module")
def server() -> Iterator[BadServer]:
    with picture_server() as running:
        yield running


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with running_s3() as running:
        yield running


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> str:
    """Of store; a test that says nothing is about local folders."""
    return str(getattr(request, "param", "local"))


@pytest.fixture
def place(kind: str, request: pytest.FixtureRequest, server: BadServer, tmp_path: Path) -> Place:
    s3 = request.getfixturevalue("s3") if kind == "s3" else None
    return Place(tmp_path / "here", picture_list(server), s3)


@pytest.fixture(scope="module")
def truths(request: pytest.FixtureRequest, server: BadServer, tmp_path_factory: pytest.TempPathFactory) -> Truths:
    """An uninterrupted run by kind of store, each made when it is first asked for."""
    made: dict[str, Place] = {}

    def truth(kind: str) -> Place:
        if kind not in made:
            s3 = request.getfixturevalue("s3") if kind == "s3" else None
            made[kind] = Place(tmp_path_factory.mktemp("uninterrupted") / "place", picture_list(server), s3)
            assert made[kind].command(*INLINE) == (0, "")
        return made[kind]

    return truth


@pytest.fixture
def truth(kind: str, truths: Truths) -> Place:
    return truths(kind)


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


@on_every_store
def test_the_second_run_says_who_holds_the_folder(place: Place, truth: Place) -> None:
    first = Held(place, "rows:done#2")
    code, errors = place.command(*INLINE)
    assert code == 1
    assert is_one_sentence(errors)
    assert f"(pid {first.process.pid} on " in errors
    assert "is held by run" in errors
    assert first.go_on() == (0, "")
    assert exported(place.shards) == exported(truth.shards)


@on_every_store
def test_a_killed_holder_is_taken_over_at_once(place: Place, truth: Place) -> None:
    first = Held(place, "rows:done#2")
    try:
        heartbeat = datetime.fromisoformat(json.loads(place.read("lease.json"))["heartbeat"])
        os.kill(first.process.pid, signal.SIGKILL)
        assert place.command(*INLINE) == (0, "")
        taken = datetime.fromisoformat(json.loads(place.read("lease.json"))["since"])
    finally:
        end_session(first.process)
    assert taken - heartbeat < timedelta(seconds=60), "it waited for the lease to become stale"
    assert exported(place.shards) == exported(truth.shards)


def _age_lease(place: Place) -> None:
    """As if its holder, which sleeps, had slept for two minutes."""
    old = (datetime.now(UTC) - timedelta(minutes=2)).isoformat(timespec="milliseconds")
    place.put("lease.json", json.dumps({**json.loads(place.read("lease.json")), "heartbeat": old}).encode())


LATE = [("local", "media:done#2"), ("local", "near_duplicates:done#2"), ("local", "verdicts:done#2")]
LATE += [("s3", "media:done#2"), ("s3", "verdicts:done#2")]


@pytest.mark.parametrize(("kind", "event"), LATE, indirect=["kind"])
def test_a_run_that_wakes_up_too_late_changes_nothing(event: str, place: Place, truth: Place) -> None:
    first = Held(place, event)
    try:
        # SIGSTOP also stops its heartbeat, as a suspended laptop would.
        os.kill(first.process.pid, signal.SIGSTOP)
        _age_lease(place)
        place.edit()
        assert place.command(*INLINE) == (0, "")
        answer, files = samples(place), exported(place.shards)
        assert answer != samples(truth)
        Path(f"{first.log}.go").touch()
        os.kill(first.process.pid, signal.SIGCONT)
        _, errors = first.process.communicate(timeout=120)
    finally:
        end_session(first.process)
    assert first.process.returncode == 1, errors
    assert is_one_sentence(errors), errors
    assert "another run" in errors
    assert (samples(place), exported(place.shards)) == (answer, files)


@on_every_store
def test_a_shard_fetched_twice_is_the_first_ones(
    place: Place, truth: Place, server: BadServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMDATA_SCRATCH", str(place.folder / "scratch"))
    monkeypatch.chdir(place.folder)
    recipe = load(RECIPE)
    _, part = next(zip(range(1), recipe.source.tables(SHARD_ROWS), strict=False))
    # The late one gets other pictures than the first did, and sleeps between its tar and its rows.
    urls = [server.url("/ok")] * SHARD_ROWS
    late_part = part.set_column(part.column_names.index("url"), "url", [urls])
    counts, woken = [], threading.Event()

    class Sleepy(Store):
        def commit(self, name: str, local_file: Path) -> bool:
            assert not name.startswith("rows/") or woken.wait(200)
            return super().commit(name, local_file)

    def late() -> None:
        wait_until(lambda: "dataset.json" in place.names())
        counts.append(ingest_shard(Sleepy(place.store().url), 0, late_part, "urls", recipe.fetch, "late"))

    thread = threading.Thread(target=late)
    with place.entered():
        thread.start()
        mmdata.run(RECIPE, runner="inline")
        wait_until(lambda: "media/00000-late.tar" in place.names())
        stood = place.contents()
        woken.set()
        thread.join(60)
    # It reports what stands, not what it fetched.
    with place.entered():
        statuses = mmdata.open(place.store().url).sql("SELECT status FROM rows WHERE row_id < 1 << 24").fetchall()
    assert counts[0].by_status == {s: [row[0] for row in statuses].count(s) for (s,) in set(statuses)}
    assert counts[0].by_status["ok"] < SHARD_ROWS
    left = {"media/00000-late.tar"}
    assert place.contents() == stood, "not a byte has changed"
    assert left <= stood.keys()
    assert samples(place) == samples(truth)
    with place.entered():
        assert clean(place.store()) == [], "its worker may be about to name it"
        assert [name for name, _ in clean(place.store(), grace_s=0)] == sorted(left)
        shutil.rmtree(place.shards)
        mmdata.run(RECIPE, runner="inline")
    assert exported(place.shards) == exported(truth.shards)


VANISH = [("local", e) for e in ("media:done#2", "hash_image:done#1", "near_duplicates:done#2", "verdicts:done#1")]
VANISH += [("s3", "hash_image:done#1")]


@pytest.mark.parametrize(("kind", "event"), VANISH, indirect=["kind"])
def test_a_folder_that_vanishes_stops_the_run(event: str, place: Place, truth: Place) -> None:
    run = Held(place, event)
    place.vanish()
    code, errors = run.go_on()
    assert code == 1
    assert is_one_sentence(errors), errors
    assert place.url in errors
    # What is left of it is no dataset that a reader could take for one, nor one that a run could go on from.
    assert "current.json" not in place.names()
    assert not place.shards.exists()
    code, errors = place.command(*INLINE)
    if code != 0:  # the run had made the folder anew before it noticed
        assert code == 2
        assert is_one_sentence(errors), errors
        assert "is not empty and no dataset" in errors
        place.vanish()
        assert place.command(*INLINE) == (0, "")
    assert samples(place) == samples(truth)
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
    assert samples(place) == samples(truth)
