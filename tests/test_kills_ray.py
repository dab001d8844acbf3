"""On Ray: the same bytes with one worker and with two; workers and drivers are killed at events, as in `test_kills`.

A run survives the death of a worker by itself. A killed driver leaves a cluster behind, whose processes the tests end.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from killing import Place, end_session, exported, picture_list, picture_server, samples, verdict_counts, wait_until
from server import BadServer

import mmdata

ONE, TWO = ("--runner", "ray", "--workers", "1"), ("--runner", "ray", "--workers", "2")
TRIES = 5
SEED = 4


@dataclass(frozen=True)
class Truth:
    """What an uninterrupted inline run gives."""

    place: Place
    files: dict[str, bytes]
    rows: list[dict[str, Any]]

    def is_reached(self, place: Place) -> None:
        """The place holds the same answer and the same export, byte for byte."""
        assert exported(place.shards) == self.files
        assert samples(place.dataset) == self.rows


@pytest.fixture(scope="module")
def server() -> Iterator[BadServer]:
    with picture_server() as running:
        yield running


@pytest.fixture(scope="module")
def truth(server: BadServer, tmp_path_factory: pytest.TempPathFactory) -> Truth:
    place = Place(tmp_path_factory.mktemp("uninterrupted") / "inline", picture_list(server))
    assert place.command("--runner", "inline") == (0, "")
    rows = samples(place.dataset)
    assert verdict_counts(rows)["failed"] == 10
    assert verdict_counts(rows)["kept"] > 10
    return Truth(place, exported(place.shards), rows)


def _events(place: Place) -> dict[str, int]:
    """Events that do not depend on the runner: its batches are its own affair, and heartbeats the clock's."""
    return {name: n for name, n in place.events().items() if not name.startswith(("stage:", "lease.json:"))}


@pytest.mark.parametrize("runner", [ONE, TWO], ids=["one", "two"])
def test_the_same_bytes_as_inline(runner: tuple[str, ...], truth: Truth, tmp_path: Path) -> None:
    place = Place(tmp_path / "here", truth.place.rows)
    assert place.command(*runner) == (0, "")
    assert _events(place) == _events(truth.place)
    truth.is_reached(place)


@pytest.mark.parametrize("event", ["media:done#2", "stage:after#3"])
def test_a_killed_worker_stops_nobody(event: str, truth: Truth, tmp_path: Path) -> None:
    place = Place(tmp_path / "here", truth.place.rows)
    assert place.command(*TWO, stop=f"{event}=kill") == (0, "")
    assert place.was_stopped() == event
    truth.is_reached(place)


@pytest.mark.parametrize("event", ["near_duplicates:done#2", "export:append#30"])
def test_a_killed_driver_goes_on_with_the_same_command(event: str, truth: Truth, tmp_path: Path) -> None:
    place = Place(tmp_path / "here", truth.place.rows)
    code, _ = place.command(*TWO, stop=f"{event}=kill")
    assert (code, place.was_stopped()) == (-signal.SIGKILL, event)
    current = mmdata.open(place.dataset).current
    assert (current is not None) == event.startswith("export")
    assert current is None or samples(place.dataset) == truth.rows
    assert not place.shards.exists()
    assert place.command(*ONE) == (0, "")
    truth.is_reached(place)


def test_a_worker_that_outlives_its_driver_changes_nothing(truth: Truth, tmp_path: Path) -> None:
    place = Place(tmp_path / "here", truth.place.rows)
    # One worker waits between its tar and its rows, while the driver is killed and another run does all the work.
    driver = place.start(*TWO, stop="media:done#2=hold")
    try:
        wait_until(lambda: place.log.exists() and place.was_stopped() == "media:done#2")
        held = int(place.log.read_text().rpartition("! ")[2].split()[2])
        os.kill(driver.pid, signal.SIGKILL)
        stem = place.log
        place.log = place.folder / "events-of-the-second"
        assert place.command("--runner", "inline") == (0, "")
        truth.is_reached(place)
        stood = place.files() - place.files("media")
        Path(f"{stem}.go").touch()
        # Ray may have ended it by now; else it finds the shard's rows there, and stops with its cluster.
        wait_until(lambda: not Path(f"/proc/{held}/stat").exists() or "rows:half" in stem.read_text())
    finally:
        end_session(driver)
    assert {n for n in place.files() - place.files("media") if ".tmp-" not in n} == stood
    truth.is_reached(place)


@pytest.mark.long
@pytest.mark.parametrize("part", range(20))
def test_killed_anywhere(part: int, truth: Truth, tmp_path: Path) -> None:
    every = sorted(f"{name}#{n}" for name, met in _events(truth.place).items() for n in range(1, met + 1))
    place = Place(tmp_path / "here", truth.place.rows)
    event = random.Random(SEED + part).choice(every)
    print(f"on Ray: {event}")
    runner = (ONE, TWO)[part % 2]
    code, _ = place.command(*runner, stop=f"{event}=kill")
    for _ in range(TRIES):
        if code == 0:
            break
        code, _ = place.command(*runner)
    truth.is_reached(place)
