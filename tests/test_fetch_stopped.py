"""A fetch that is killed, told to stop, without disk or without its folder: said in a sentence, nothing torn, resumed.

Inline and on worker processes; stops are at events (`fixtures/killer`), in whichever process meets them.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from killing import RECIPE, Place, end_session, picture_list, picture_server, recipe_document, samples, wait_until
from server import BadServer

PROCESSES, INLINE = ("--runner", "processes", "--workers", "2"), ("--runner", "inline")
RUNNERS = [pytest.param(PROCESSES, id="processes"), pytest.param(INLINE, id="inline")]
# What these stop in one process is stopped all over the suite; here it is on worker processes every time.
SELDOM_INLINE = [pytest.param(PROCESSES, id="processes"), pytest.param(INLINE, id="inline", marks=pytest.mark.long)]


@pytest.fixture(scope="module")
def server() -> Iterator[BadServer]:
    with picture_server() as running:
        yield running


def _place(folder: Path, server: BadServer) -> Place:
    """Only fetching: neither steps nor an export."""
    made = Place(folder, picture_list(server))
    document = {k: v for k, v in recipe_document().items() if k not in ("steps", "export")}
    (folder / RECIPE).write_text(yaml.safe_dump(document))
    return made


@pytest.fixture(scope="module")
def undisturbed(server: BadServer, tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = _place(tmp_path_factory.mktemp("undisturbed") / "place", server)
    assert place.command(*INLINE) == (0, "")
    assert sum(row["status"] == "ok" for row in samples(place)) == 50
    return place


@pytest.fixture
def place(server: BadServer, tmp_path: Path) -> Place:
    return _place(tmp_path / "here", server)


@contextmanager
def _held(place: Place, runner: tuple[str, ...], event: str) -> Iterator[subprocess.Popen[str]]:
    """A run of which one process waits at the event; nothing of it outlives this."""
    process = place.start(*runner, stop=f"{event}=hold")
    try:
        wait_until(lambda: place.log.exists() and place.was_stopped() == event)
        yield process
    finally:
        end_session(process)


def _is_whole(place: Place) -> None:
    """Whatever has a final name can be read to its end: tars, rows, and every picture that a row refers to."""
    files = sorted(p for p in place.dataset.rglob("*") if p.is_file() and ".tmp-" not in p.name)
    members = {}
    for path in files:
        if path.suffix == ".tar":
            with tarfile.open(path) as tar:
                for member in tar.getmembers():
                    body = tar.extractfile(member)
                    assert body is not None
                    assert len(body.read()) == member.size
                    members[f"media/{path.name}", member.offset_data] = member.size
            assert path.read_bytes()[-1024:] == bytes(1024), f"{path.name} has no end"
        elif path.suffix == ".parquet":
            table = pq.read_table(path)
            if path.parent.name == "rows":
                for row in table.select(["image_path", "image_offset", "image_size"]).to_pylist():
                    if row["image_path"] is not None:
                        assert members[row["image_path"], row["image_offset"]] == row["image_size"]


def _goes_on(place: Place, runner: tuple[str, ...], undisturbed: Place, leaves: str = "") -> None:
    """The same command ends well, with the rows and pictures of a run that nobody disturbed.

    Nothing stays in scratch but what is under a folder `leaves`.
    """
    assert place.command(*runner) == (0, "")
    _is_whole(place)
    assert samples(place) == samples(undisturbed)
    left = [p for p in (place.folder / "scratch").rglob("*") if p.is_file()]
    assert [p for p in left if leaves not in p.parts] == []


def _is_one_sentence(errors: str) -> bool:
    return errors.startswith("mmdata: ") and errors.count("\n") == 1 and "Traceback" not in errors


@pytest.mark.parametrize("runner", SELDOM_INLINE)
def test_killed(runner: tuple[str, ...], place: Place, undisturbed: Place) -> None:
    with _held(place, runner, "fetch:append#20") as process:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)  # ends when every process of the run has
        _is_whole(place)
    _goes_on(place, runner, undisturbed)


@pytest.mark.parametrize("runner", RUNNERS)
def test_told_to_stop(runner: tuple[str, ...], place: Place, undisturbed: Place) -> None:
    with _held(place, runner, "fetch:append#20") as process:
        os.kill(process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1
        assert errors == "\nmmdata: stopped; finished work is kept, and the same command goes on from here\n"
        _is_whole(place)
        left = [p for p in (place.folder / "scratch").rglob("*") if p.is_file() and "journal" not in p.parts]
        assert left == [], "its workers were given no time to tidy up"
    _goes_on(place, runner, undisturbed)


def _remove(folder: Path) -> None:
    """`rm -rf`, also while another process still writes into it."""
    for _ in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
    raise AssertionError(f"{folder} does not go away")


@pytest.mark.parametrize("runner", SELDOM_INLINE)
def test_the_folder_vanishes(runner: tuple[str, ...], place: Place, undisturbed: Place) -> None:
    with _held(place, runner, "media:done#2") as process:
        _remove(place.dataset)
        Path(f"{place.log}.go").touch()
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1
        assert _is_one_sentence(errors), errors
        assert str(place.dataset.relative_to(place.folder)) in errors
    if (
        place.dataset.exists()
    ):  # made anew by a commit before the run noticed: no dataset, and no reader takes it for one
        assert "current.json" not in place.names()
        shutil.rmtree(place.dataset)
    _goes_on(place, runner, undisturbed, leaves="journal")  # of the dataset that is gone: the next one has a new id


@contextmanager
def _little_disk(folder: Path, size: int) -> Iterator[Any]:
    """`folder` takes so many bytes; yields how to limit a process and how to make room.

    A disk of its own where this user may mount one, else files of a process may not grow beyond a part of it.
    """
    folder.mkdir(parents=True)
    mounted = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=False).returncode == 0
    )
    biggest = size // 8

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (biggest, biggest))

    def make_room() -> None:
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)

    try:
        yield ({} if mounted else {"preexec_fn": limit}), make_room
    finally:
        if mounted:
            subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("what", ["dataset", "scratch"])
@pytest.mark.parametrize("runner", SELDOM_INLINE)
def test_the_disk_is_full(what: str, runner: tuple[str, ...], place: Place, undisturbed: Place) -> None:
    size = sum(p.stat().st_size for p in (undisturbed.dataset / "media").iterdir())
    disk, part = (place.dataset, size // 2) if what == "dataset" else (place.folder / "scratch", size // 10)
    with _little_disk(disk, part) as (limits, make_room):
        code, errors = place.command(*runner, **limits)
        assert code == 1
        assert _is_one_sentence(errors), errors
        assert "disk is full" in errors if what == "dataset" and not limits else "scratch" in errors
        assert "the same command" in errors
        if place.dataset.exists():
            _is_whole(place)
        make_room()
        _goes_on(place, runner, undisturbed)
