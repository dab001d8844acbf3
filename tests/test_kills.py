"""Killed anywhere and started again, a run ends where an uninterrupted one does; readers never see anything torn.

Kills are at events, not at times (`fixtures/killer`): the id of a test says which event, and which one of its kind. All
of it holds of a local folder and of an S3 server behind a proxy that answers 503, late, by halves, or not at all.
"""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from killing import KINDS, RECIPE, SHARD_ROWS, Place, exported, picture_list, picture_server, samples, verdict_counts
from s3 import S3Server, running_s3
from server import BadServer

import mmdata
from mmdata.clean import clean
from mmdata.errors import SourceError

# In a run from nothing. Kinds: inside a temporary write, between tar and rows, between rows and columns, between two
# column sets, in a group, at publish, in an export.
FRESH = [
    "fetch:append#20",
    "media:half#2",
    "media:done#2",
    "rows:linked#3",
    "rows:done#1",
    "stage:after#3",
    "probe_image:done#1",
    "hash_image:half#2",
    "group:computed#1",
    "near_duplicates:done#2",
    "verdicts:done#3",
    "current.json:half#1",
    "export:append#30",
    "export:manifest#1",
]
# In a run of an edited recipe, over an answer and an export that stand.
EDITED = [
    "hash_image:linked#1",
    "near_duplicates:unlinked#3",
    "verdicts:half#2",
    "current.json:put#1",
    "export:append#9",
    "export:aside#1",
]
# On S3 these of them always, and the others when there is time.
OFTEN = {
    "media:half#2",
    "group:computed#1",
    "current.json:half#1",
    "current.json:put#1",
}
SEED = 20


def _cases(events: list[str]) -> list[Any]:
    """(kind of store, event) for each, the less frequent ones marked."""
    found = [pytest.param("local", event, id=event) for event in events]
    for event in events:
        found.append(pytest.param("s3", event, id=f"s3-{event}", marks=() if event in OFTEN else pytest.mark.long))
    return found


@dataclass(frozen=True)
class Truth:
    """What uninterrupted runs give: of the recipe, and of the edited recipe in a folder of its own."""

    s3: S3Server | None
    place: Place
    files: dict[str, bytes]
    rows: list[dict[str, Any]]
    edited_files: dict[str, bytes]
    edited_rows: list[dict[str, Any]]
    events: Counter[str]
    edited_events: Counter[str]


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
            made[kind] = _truth(server, tmp_path_factory.mktemp("uninterrupted"), s3)
        return made[kind]

    return truth


def _truth(server: BadServer, folder: Path, s3: S3Server | None) -> Truth:
    plain, edited = (Place(folder / name, picture_list(server), s3) for name in ("plain", "edited"))
    edited.edit()
    for place in (plain, edited):
        assert place.command("--runner", "inline") == (0, "")
    over = plain.copy(folder / "over")
    over.edit()
    assert over.command("--runner", "inline") == (0, "")
    edited_files, edited_rows = exported(edited.shards), samples(edited)
    # Ten of the sixty URLs give no picture, and both recipes keep something: no comparison below is of nothing.
    rows = samples(plain)
    assert verdict_counts(rows)["failed"] == verdict_counts(edited_rows)["failed"] == 10
    assert verdict_counts(rows) != verdict_counts(edited_rows)
    assert min(verdict_counts(rows)["kept"], verdict_counts(edited_rows)["kept"]) > 10
    # An edit over what stands ends where the edited recipe does from nothing.
    assert (exported(over.shards), samples(over)) == (edited_files, edited_rows)
    return Truth(s3, plain, exported(plain.shards), rows, edited_files, edited_rows, plain.events(), over.events())


@contextmanager
def _inside(folder: Path) -> Iterator[Path]:
    """A new folder for a place; meanwhile this process runs recipes in it too."""
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMDATA_SCRATCH", str(folder / "scratch"))
        patch.chdir(folder)
        yield folder


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with _inside(tmp_path / "here") as made:
        yield made


def _answer(place: Place) -> list[dict[str, Any]] | None:
    """What readers see now; None before there is an answer."""
    with place.entered():
        try:
            ds = mmdata.open(place.store().url)
        except SourceError:
            assert not place.files() - {n for n in place.files() if ".tmp-" in n}
            return None
        return None if ds.current is None else samples(place)


def _covered(place: Place) -> dict[str, int]:
    """Column set → rows with a value or a permanent reason, counted with pyarrow from the newest file of each shard."""
    newest: dict[tuple[str, str], tuple[int, str]] = {}
    for path in place.files("columns"):
        if match := re.fullmatch(r"columns/([^/]+)/(\d+)\.c(\d+)\.parquet", path):
            newest[match[1], match[2]] = max(newest.get((match[1], match[2]), (-1, "")), (int(match[3]), path))
    found: Counter[str] = Counter()
    for (name, _), (_, path) in newest.items():
        reasons = pq.read_table(io.BytesIO(place.read(path)), columns=["reason"]).column(0).to_pylist()
        found[name] += sum(r is None or (r != "uncovered" and not r.startswith("!")) for r in reasons)
    return dict(found)


def _kill(place: Place, event: str) -> None:
    code, said = place.command("--runner", "inline", stop=f"{event}=kill")
    assert place.was_stopped() == event
    assert code == -signal.SIGKILL, said


def _resume(place: Place, server: BadServer) -> None:
    """The same run again: it ends, and does nothing twice that stood when the first one died."""
    shards = [int(name.split("/")[1].split(".")[0]) for name in place.files("rows") if ".tmp-" not in name]
    stored = {f"/p/{shard * SHARD_ROWS + n}" for shard in shards for n in range(SHARD_ROWS)}
    before, hits = _covered(place), dict(server.hits)
    with place.entered():
        mmdata.run(RECIPE, runner="inline")
    assert [url for url in stored if server.hits[url] != hits.get(url, 0)] == []
    record = json.loads(place.read(max(place.files("runs"))))
    after = _covered(place)
    for step in record["steps"]:
        if step["name"] != "near_duplicates" and step["set"]:
            assert step["computed"] == after[step["set"]] - before.get(step["set"], 0), step["name"]


def _loose(place: Place) -> set[str]:
    """Files of the dataset that nothing names: temporary ones, tars, old column files, old verdicts."""
    tars = set()
    for name in place.files("rows"):
        if name.endswith(".parquet"):
            tars.update(pq.read_table(io.BytesIO(place.read(name)), columns=["image_path"]).column(0).to_pylist())
    document = json.loads(place.read("current.json"))
    [selection] = document["selections"].values()
    listed = pq.read_table(io.BytesIO(place.read(selection["files"])))
    named = {n for c in listed.columns if pa.types.is_string(c.type) for n in c.to_pylist()} | {selection["files"]}
    found = {n for n in place.files() if ".tmp-" in n}
    found |= {n for n in place.files("state") if "/selection-" in n and n not in named}
    return found | place.files("media") - tars | (place.files("verdicts") | place.files("columns")) - named


def _settles(place: Place, server: BadServer, files: dict[str, bytes], rows: list[dict[str, Any]]) -> None:
    """The dataset stands as an uninterrupted run leaves it, does nothing more, and loses its leftovers to `clean`."""
    assert exported(place.shards) == files
    assert samples(place) == rows
    beside = {p.name for p in place.folder.iterdir()}
    assert beside <= {"data", place.shards.name, "events", "events.go", "list.parquet", RECIPE, "scratch"}

    stood, hits = place.files(), dict(server.hits)
    with place.entered():
        again = mmdata.run(RECIPE, runner="inline").report
    assert again is not None
    assert not again.changed
    assert (again.media_reads, sum(again.by_status.values())) == (0, 0)
    assert [(w.computed, w.opened) for w in again.work.values()] == [(0, 0)] * len(again.work)
    assert place.files() - stood == {f"runs/{again.run}.json"}
    assert dict(server.hits) == hits

    loose = _loose(place)
    with place.entered():
        freed = {name for name, _ in clean(mmdata.open(place.store().url).store, grace_s=0) if name[0] != "/"}
    uploads = {name for name in freed if name.endswith("(unfinished upload)")}
    assert freed - uploads == loose
    assert _loose(place) == set()
    if place.s3 is not None:
        assert place.s3.client().list_multipart_uploads(Bucket=place.bucket).get("Uploads", []) == []
        assert sum(place.proxy.done.values()) > 10, "nothing was disturbed"
    left = [p for p in (place.folder / "scratch").rglob("*") if p.is_file()]
    assert left == []
    shutil.rmtree(place.shards)
    with place.entered():
        mmdata.run(RECIPE, runner="inline")
    assert exported(place.shards) == files
    assert samples(place) == rows


def _is_after_publish(event: str) -> bool:
    """Whether current.json has been moved by then."""
    return event.startswith(("current.json:put", "runs", "export"))


def _killed_fresh(folder: Path, event: str, truth: Truth, server: BadServer) -> None:
    place = Place(folder, truth.place.rows, truth.s3)
    _kill(place, event)
    assert _answer(place) == (truth.rows if _is_after_publish(event) else None)
    assert not place.shards.exists() or exported(place.shards) == truth.files
    _resume(place, server)
    _settles(place, server, truth.files, truth.rows)


def _killed_edited(folder: Path, event: str, truth: Truth, server: BadServer) -> None:
    place = truth.place.copy(folder)
    place.edit()
    _kill(place, event)
    assert _answer(place) == (truth.edited_rows if _is_after_publish(event) else truth.rows)
    # The earlier export stands until the new one is whole; there is only an instant without either.
    whole = [truth.edited_files] if "renamed" in event else [truth.files]
    assert event == "export:aside#1" or exported(place.shards) in whole
    _resume(place, server)
    _settles(place, server, truth.edited_files, truth.edited_rows)


@pytest.mark.parametrize(("kind", "event"), _cases(FRESH))
def test_killed_in_a_run_from_nothing(kind: str, event: str, truths: Truths, server: BadServer, folder: Path) -> None:
    _killed_fresh(folder, event, truths(kind), server)


@pytest.mark.parametrize(("kind", "event"), _cases(EDITED))
def test_killed_in_a_run_of_an_edited_recipe(
    kind: str, event: str, truths: Truths, server: BadServer, folder: Path
) -> None:
    _killed_edited(folder, event, truths(kind), server)


@pytest.mark.parametrize("kind", KINDS)
def test_killed_again_and_again(kind: str, truths: Truths, server: BadServer, folder: Path) -> None:
    truth = truths(kind)
    place = Place(folder, truth.place.rows, truth.s3)
    # The second kill meets a row that is tried alone, because the first one died over its batch: one such death is
    # no proof against the row.
    for event in ("stage:before#1", "stage:before#1", "near_duplicates:done#1", "verdicts:done#1", "export:append#5"):
        _kill(place, event)
    assert place.command("--runner", "inline") == (0, "")
    _settles(place, server, truth.files, truth.rows)


def _draw(events: Counter[str], count: int, seed: int) -> list[str]:
    # Of the lease only the first: on a busy machine there may be heartbeats between it and the last.
    met = {name: 1 if name.startswith("lease") else n for name, n in events.items()}
    every = sorted(f"{name}#{n}" for name, most in met.items() for n in range(1, most + 1))
    return random.Random(seed).choices(every, k=count)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.long
@pytest.mark.parametrize("part", range(20))
def test_killed_anywhere(kind: str, part: int, truths: Truths, server: BadServer, tmp_path: Path) -> None:
    truth = truths(kind)
    for number, event in enumerate(_draw(truth.events, 6, SEED + part)):
        print(f"from nothing: {event}")
        with _inside(tmp_path / f"fresh{number}") as folder:
            _killed_fresh(folder, event, truth, server)
    for number, event in enumerate(_draw(truth.edited_events, 4, SEED + part)):
        print(f"edited: {event}")
        with _inside(tmp_path / f"edited{number}") as folder:
            _killed_edited(folder, event, truth, server)
