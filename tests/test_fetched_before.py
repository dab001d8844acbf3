"""`fetch.skip_existing`: what other datasets hold is not fetched, or not stored, again."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from server import BadServer, picture

import mmdata
from mmdata.column_files import write_parquet
from mmdata.errors import RecipeError
from mmdata.fetched_before import EarlierFiles, _loaded, earlier_files
from mmdata.joins import keys
from mmdata.scratch import scratch_root
from mmdata.store import Store

OTHER = picture(300, 300)


@pytest.fixture(scope="module")
def server() -> Iterator[BadServer]:
    with BadServer({"/other.jpg": ("image/jpeg", OTHER), "/again.jpg": ("image/jpeg", OTHER)}) as running:
        yield running


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMDATA_SCRATCH", str(tmp_path / "scratch"))


def run(tmp_path: Path, name: str, urls: list[str], runner: Any = "inline", **fetch: Any) -> Any:
    pq.write_table(pa.table({"url": urls}), tmp_path / f"{name}.parquet")
    usual = {"allow_private": True, "robots": "ignore", "per_host": 9, "per_host_rate": None, "shard_rows": 3}
    source = {"kind": "urls", "path": str(tmp_path / f"{name}.parquet")}
    recipe = {"name": name, "dataset": str(tmp_path / name), "source": source, "fetch": usual | fetch}
    return mmdata.run(recipe, runner=runner, workers=None if runner == "inline" else 1)


def rows(ds: Any) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = ds.sql("SELECT status, status_detail, attempts FROM rows ORDER BY row_id").fetchall()
    return found


@pytest.mark.parametrize("runner", ["inline", "processes"])
def test_urls_and_bytes_of_other_datasets_are_left_out(server: BadServer, tmp_path: Path, runner: Any) -> None:
    old = [server.url(p) for p in ("/ok/1", "/status/404", "/other.jpg", "/ok/2")]
    run(tmp_path, "first", old[:3])
    run(tmp_path, "second", old[3:])
    asked = dict(server.hits)
    new = [server.url(p) for p in ("/ok/1", "/status/404", "/again.jpg", "/ok/2", "/ok/3")]
    folders = [str(tmp_path / "first"), str(tmp_path / "second")]
    ds = run(tmp_path, f"third-{runner}", new, runner, skip_existing=folders)
    first, second = folders
    assert rows(ds) == [
        ("filtered", f"this URL is in {first}", 0),
        ("http_4xx", "HTTP 404", 1),  # a row that failed there is no row that is there
        ("filtered", f"these bytes are in {first}", 1),
        ("filtered", f"this URL is in {second}", 0),
        ("filtered", f"these bytes are in {first}", 1),  # every /ok is the same picture
    ]
    assert {p: server.hits[p] - asked.get(p, 0) for p in ("/ok/1", "/ok/2", "/again.jpg")} == {
        "/ok/1": 0,
        "/ok/2": 0,
        "/again.jpg": 1,
    }
    sha256 = ds.sql("SELECT sha256 FROM rows WHERE url LIKE '%again.jpg'").fetchall()
    assert sha256 == [(hashlib.sha256(OTHER).hexdigest(),)]


def test_a_dataset_may_go_on_with_others_to_skip(server: BadServer, tmp_path: Path) -> None:
    """It decides of new rows only, so that it is no other dataset for it."""
    run(tmp_path, "first", [server.url("/ok/1")])
    run(tmp_path, "ds", [server.url("/ok/2")])
    again = run(tmp_path, "ds", [server.url("/ok/2")], skip_existing=[str(tmp_path / "first")])
    assert rows(again) == [("ok", None, 1)]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["none"], "fetch.skip_existing: there is no dataset at .*none; name dataset folders"),
        (["ds"], "fetch.skip_existing names .*ds', this dataset itself"),
    ],
)
def test_what_is_refused(tmp_path: Path, folders: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        run(tmp_path, "ds", ["http://a.test/"], skip_existing=[str(tmp_path / f) for f in folders])
    assert not (tmp_path / "ds").exists()


def made(folder: Path, first: int, count: int) -> Store:
    """A dataset's rows, every tenth of them failed."""
    store = Store(str(folder))
    numbers = range(first, first + count)
    table = {"status": ["timeout" if n % 10 == 0 else "ok" for n in numbers]}
    table |= {
        "url": [f"http://a.test/{n}" for n in numbers],
        "sha256": [hashlib.sha256(b"%d" % n).hexdigest() for n in numbers],
    }
    with store.scratch() as scratch:
        write_parquet(pa.table(table), scratch / "rows.parquet")
        store.commit("rows/00000.g0.parquet", scratch / "rows.parquet")
    (folder / "dataset.json").write_text("{}")
    return store


def earlier(tmp_path: Path, **folders: tuple[int, int]) -> EarlierFiles:
    for name, (first, count) in folders.items():
        made(tmp_path / name, first, count)
    found = earlier_files([str(tmp_path / name) for name in folders], Store(str(tmp_path / "here")))
    assert found is not None
    return found


@pytest.mark.parametrize("held", [1 << 21, 64])
def test_an_index_that_does_not_fit_in_memory_answers_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    monkeypatch.setattr(keys, "_HELD", held)
    found = earlier(tmp_path, a=(0, 500), b=(400, 500), c=(0, 0)).load()
    asked = [f"http://a.test/{n}" for n in range(1000)]
    words = [None if n >= 900 or n % 10 == 0 else "a" if n < 500 else "b" for n in range(1000)]
    assert [w and w.rpartition("/")[2] for w in found.urls([*asked, None, ""])] == [*words, None, None]
    bodies = [found.body(hashlib.sha256(b"%d" % n).hexdigest()) for n in range(0, 1000, 7)]
    assert [w and w.rpartition("/")[2] for w in bodies] == words[::7]
    assert found.body(None) is None


def test_one_index_for_all_processes_of_a_node_and_none_is_left(tmp_path: Path) -> None:
    found = earlier(tmp_path, a=(0, 50))
    code = (
        "import sys; from mmdata.fetched_before import EarlierFiles as E; from pathlib import Path;"
        "from mmdata import fetched_before as f;"
        "f._build = None if sys.argv[4] == 'there' else f._build;"
        "e = E((sys.argv[1],), (sys.argv[2],), (tuple(sys.argv[3].split()),));"
        "print(e.load().urls(['http://a.test/7'])[0])"
    )
    arguments = [found.names[0], found.urls[0], " ".join(found.files[0])]

    def ask(how: str) -> str:
        command = [sys.executable, "-c", code, *arguments, how]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ).stdout.strip()

    assert ask("new") == f"this URL is in {tmp_path / 'a'}"
    assert list(scratch_root().glob("earlier-*")) == []  # nobody uses it any more
    mine = found.load()
    assert ask("there") == f"this URL is in {tmp_path / 'a'}"  # it could not have been built again
    assert len(list(scratch_root().glob("earlier-*"))) == 1
    other = earlier(tmp_path, b=(0, 5))
    other.load()
    assert len(list(scratch_root().glob("earlier-*"))) == 2  # `mine` is in use
    del mine
    _loaded.clear()
    assert list(scratch_root().glob("earlier-*")) == []
