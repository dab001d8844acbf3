"""On Ray: the same bytes with one worker and with two; workers and drivers are killed at events, as in `test_kills`.

On a local folder, and on an S3 server behind a proxy that disturbs one request in ten.

A run survives the death of a worker by itself. A killed driver leaves a cluster behind, whose processes the tests end.
"""

from __future__ import annotations

import io
import os
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from killing import (
    KINDS,
    Place,
    end_session,
    exported,
    picture_list,
    picture_server,
    samples,
    verdict_counts,
    wait_until,
)
from s3 import S3Server, running_s3
from server import BadServer

import mmdata

ONE, TWO = ("--runner", "ray", "--workers", "1"), ("--runner", "ray", "--workers", "2")
TRIES = 5
SEED = 4


@dataclass(frozen=True)
class Truth:
    """What an uninterrupted inline run gives."""

    s3: S3Server | None
    place: Place
    files: dict[str, bytes]
    rows: list[dict[str, Any]]

    def elsewhere(self, folder: Path) -> Place:
        """The same job in another folder, where nothing has run."""
        return Place(folder, self.place.rows, self.s3)

    def is_reached(self, place: Place) -> None:
        """The place holds the same answer and the same export, byte for byte."""
        assert exported(place.shards) == self.files
        assert samples(place) == self.rows


Truths = Callable[[str], Truth]


@pytest.fixture(scope="module")
def server() -> Iterator[BadServer]:
    with picture_server() as running:
        yield running


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with running_s3() as running:
        yield running


@pytest.fixture(scope="module")
def truths(request: pytest.FixtureRequest, server: BadServer, tmp_path_factory: pytest.TempPathFactory) -> Truths:
    """By kind of store, each made when it is first asked for."""
    made: dict[str, Truth] = {}

    def truth(kind: str) -> Truth:
        if kind not in made:
            s3 = request.getfixturevalue("s3") if kind == "s3" else None
            place = Place(tmp_path_factory.mktemp("uninterrupted") / "inline", picture_list(server), s3)
            assert place.command("--runner", "inline") == (0, "")
            rows = samples(place)
            assert verdict_counts(rows)["failed"] == 10
            assert verdict_counts(rows)["kept"] > 10
            made[kind] = Truth(s3, place, exported(place.shards), rows)
        return made[kind]

    return truth


def _events(place: Place) -> dict[str, int]:
    """Events that do not depend on the runner: its batches are its own affair, and heartbeats the clock's."""
    return {name: n for name, n in place.events().items() if not name.startswith(("stage:", "lease.json:"))}


def _cases(*cases: Any, often_on_s3: Any) -> list[Any]:
    """(kind of store, case) for each; on S3 at most one of them always, and the others when there is time."""
    found = [pytest.param("local", case) for case in cases]
    return found + [pytest.param("s3", c, marks=() if c == often_on_s3 else pytest.mark.long) for c in cases]


@pytest.mark.parametrize(("kind", "runner"), _cases(ONE, TWO, often_on_s3=None))
def test_the_same_bytes_as_inline(kind: str, runner: tuple[str, ...], truths: Truths, tmp_path: Path) -> None:
    truth = truths(kind)
    place = truth.elsewhere(tmp_path / "here")
    assert place.command(*runner) == (0, "")
    assert _events(place) == _events(truth.place)
    truth.is_reached(place)


@pytest.mark.parametrize(("kind", "event"), _cases("media:done#2", "stage:after#3", often_on_s3="media:done#2"))
def test_a_killed_worker_stops_nobody(kind: str, event: str, truths: Truths, tmp_path: Path) -> None:
    truth = truths(kind)
    place = truth.elsewhere(tmp_path / "here")
    assert place.command(*TWO, stop=f"{event}=kill") == (0, "")
    assert place.was_stopped() == event
    truth.is_reached(place)


DRIVERS = _cases("near_duplicates:done#2", "export:append#30", often_on_s3="near_duplicates:done#2")


@pytest.mark.parametrize(("kind", "event"), DRIVERS)
def test_a_killed_driver_goes_on_with_the_same_command(kind: str, event: str, truths: Truths, tmp_path: Path) -> None:
    truth = truths(kind)
    place = truth.elsewhere(tmp_path / "here")
    code, _ = place.command(*TWO, stop=f"{event}=kill")
    assert (code, place.was_stopped()) == (-signal.SIGKILL, event)
    with place.entered():
        current = mmdata.open(place.store().url).current
    assert (current is not None) == event.startswith("export")
    assert current is None or samples(place) == truth.rows
    assert not place.shards.exists()
    assert place.command(*ONE) == (0, "")
    truth.is_reached(place)


# Between its tar and its rows, and just before its columns: (where it waits, what it meets when it goes on).
ZOMBIES = {"media:done#2": "rows:half", "hash_image:unlinked#2": "hash_image:done"}


@pytest.mark.parametrize(("kind", "event"), _cases(*ZOMBIES, often_on_s3="media:done#2"))
def test_a_worker_that_outlives_its_driver_changes_nothing(
    kind: str, event: str, truths: Truths, tmp_path: Path
) -> None:
    truth = truths(kind)
    place = truth.elsewhere(tmp_path / "here")
    # One worker waits, while the driver is killed and another run does all the work.
    driver = place.start(*TWO, stop=f"{event}=hold")
    try:
        wait_until(lambda: place.log.exists() and place.was_stopped() == event)
        held = int(place.log.read_text().rpartition("! ")[2].split()[2])
        os.kill(driver.pid, signal.SIGKILL)
        stem = place.log
        place.log = place.folder / "events-of-the-second"
        assert place.command("--runner", "inline") == (0, "")
        truth.is_reached(place)
        stood = _published(place)
        Path(f"{stem}.go").touch()
        # Ray may have ended it by now; else it finds its shard done, and stops with its cluster.
        wait_until(lambda: not Path(f"/proc/{held}/stat").exists() or ZOMBIES[event] in stem.read_text())
    finally:
        end_session(driver)
    assert _published(place) == stood
    truth.is_reached(place)


def _published(place: Place) -> dict[str, bytes]:
    """Name → bytes of what is in the dataset; leftovers of the worker itself, and the lease, left out."""
    found = place.contents()
    names = place.files() - {n for n in found if ".tmp-" in n or n.startswith("media/")}
    tars = {n for n in found if n.startswith("media/") and n in _tars(place)}
    return {name: found[name] for name in names | tars}


def _tars(place: Place) -> set[str]:
    """Tars that the rows name."""
    named = set()
    for name in place.files("rows"):
        if ".tmp-" not in name:
            table = pq.read_table(io.BytesIO(place.read(name)), columns=["image_path"])
            named.update(table.column(0).to_pylist())
    return named


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.long
@pytest.mark.parametrize("part", range(20))
def test_killed_anywhere(kind: str, part: int, truths: Truths, tmp_path: Path) -> None:
    truth = truths(kind)
    every = sorted(f"{name}#{n}" for name, met in _events(truth.place).items() for n in range(1, met + 1))
    place = truth.elsewhere(tmp_path / "here")
    event = random.Random(SEED + part).choice(every)
    print(f"on Ray: {event}")
    runner = (ONE, TWO)[part % 2]
    code, _ = place.command(*runner, stop=f"{event}=kill")
    for _ in range(TRIES):
        if code == 0:
            break
        code, _ = place.command(*runner)
    truth.is_reached(place)
