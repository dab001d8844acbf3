"""What a run learns of hosts in trouble reaches the next run."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from server import BadServer

import mmdata
from mmdata import host_state
from mmdata.clean import unreferenced
from mmdata.dataset import Dataset
from mmdata.errors import StoreError
from mmdata.host_state import HostKeeper
from mmdata.settings import FetchOptions
from mmdata.store import Store

FETCH = FetchOptions(host_failures=2)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(str(tmp_path / "ds"))
    store.replace("dataset.json", b"{}", None)
    return store


def files(store: Store) -> list[str]:
    return [name for name in store.list("state") if name.startswith("hosts-")]


def fail(keeper: HostKeeper, host: str, outcome: str = "dns", pause_s: float | None = None) -> None:
    times = 2 if outcome == "dns" else 1
    keeper.desk.answer("a", [("hello",), *[("leave", host, outcome, pause_s)] * times])


def saved(store: Store) -> set[str]:
    [name] = files(store)
    return set(json.loads(store.read(f"state/{name}"))["hosts"])


def test_a_file_is_written_when_something_changed_and_replaces_the_one_before(store: Store) -> None:
    with HostKeeper(store, "r1", FETCH) as keeper:
        keeper.save()
        assert files(store) == []
        fail(keeper, "down.example")
        keeper.save()
        keeper.save()
        assert files(store) == ["hosts-r1-0.json"]
        fail(keeper, "paused.example", "http_429", 90.0)
        fail(keeper, "down.example", "ok")
        fail(keeper, "shortly.example", "http_4xx", 1.0)
    assert files(store) == ["hosts-r1-1.json"]
    assert saved(store) == {"paused.example"}
    with HostKeeper(store, "r2", FETCH) as keeper:
        [(kind, host, for_s)] = keeper.desk.answer("b", [("hello",), ("want", "paused.example", 1)])
        assert (kind, host) == ("closed", "paused.example")
        assert 60 < for_s <= 90
        fail(keeper, "other.example")
        keeper.save()
        assert files(store) == ["hosts-r2-0.json"]
        fail(keeper, "other.example", "ok")
        fail(keeper, "paused.example", "ok")
    assert saved(store) == {"paused.example"}  # an answer that was under way ends no pause


def test_it_is_written_by_itself_while_a_run_goes_on(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    written = threading.Event()
    create = Store.create

    def seen(self: Store, name: str, data: bytes) -> bool:
        made = create(self, name, data)
        written.set()
        return made

    with HostKeeper(store, "r1", FETCH, every_s=0.01) as keeper:
        monkeypatch.setattr(Store, "create", seen)
        fail(keeper, "down.example")
        assert written.wait(10)
        assert saved(store) == {"down.example"}


def test_a_full_disk_costs_the_file_and_is_tried_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Store, name: str, data: bytes) -> bool:
        raise StoreError("the disk is full")

    with HostKeeper(store, "r1", FETCH) as keeper:
        fail(keeper, "down.example")
        with monkeypatch.context() as patched:
            patched.setattr(Store, "create", full)
            with pytest.raises(StoreError):
                keeper.save()
        assert files(store) == []
    assert saved(store) == {"down.example"}


def test_a_folder_that_vanished_is_not_made_anew(store: Store, tmp_path: Path) -> None:
    with HostKeeper(store, "r1", FETCH) as keeper:
        fail(keeper, "down.example")
        shutil.rmtree(tmp_path / "ds")
    assert not (tmp_path / "ds").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"saved": 1}', '{"saved": 1, "format": 1, "hosts": {"x": 3}}'])
def test_a_damaged_file_is_named(store: Store, text: str) -> None:
    store.create("state/hosts-r0-0.json", text.encode())
    with pytest.raises(StoreError, match=r"state/hosts-r0-0\.json .* is damaged .* remove it"):
        HostKeeper(store, "r1", FETCH)


def test_clean_removes_all_but_the_newest(store: Store) -> None:
    for run, when in (("r0", 3.0), ("r1", 2.0), ("r2", 1.0)):
        text = json.dumps({"format": 1, "saved": when, "hosts": {}})
        store.create(f"state/hosts-{run}-0.json", text.encode())
    assert [name for name, _ in unreferenced(store, {})] == ["state/hosts-r1-0.json", "state/hosts-r2-0.json"]
    assert host_state.older_host_files(store, ["state/hosts-r1-0.json"]) == {"state/hosts-r1-0.json"}


def _list(path: Path, urls: list[str]) -> dict[str, Any]:
    pq.write_table(pa.table({"url": urls}), path)
    return {"kind": "urls", "path": str(path)}


def _statuses(dataset: Dataset) -> list[str]:
    return [row[0] for row in dataset.sql("SELECT status FROM rows ORDER BY row_id").fetchall()]


@pytest.mark.parametrize("runner", ["inline", pytest.param("processes", marks=pytest.mark.long)])
def test_the_next_run_leaves_a_host_alone_that_this_one_found_down(tmp_path: Path, runner: Any) -> None:
    """Three failures in a row of one host; a second list, a run later, has more of that host and of a healthy one."""
    with BadServer() as server:
        port = server.url("/").rsplit(":", 1)[1].rstrip("/")

        def run(sources: Any) -> Dataset:
            fetch = {
                "resolve": {"*.test": "127.0.0.1"},
                "allow_private": True,
                "host_failures": 3,
                "timeout_s": 0.5,
                "robots": "ignore",
                "per_host": 1,
                "per_host_rate": None,
            }
            recipe = {"name": "n", "dataset": str(tmp_path / "ds"), "source": sources, "fetch": fetch, "steps": []}
            return mmdata.run(recipe, runner=runner, **({} if runner == "inline" else {"workers": 1}))

        def asked() -> int:
            return sum(count for path, count in server.hits.items() if path.startswith("/status/500"))

        first = _list(tmp_path / "a.parquet", [f"http://down.test:{port}/status/500?{n}" for n in range(6)])
        assert _statuses(run(first)) == ["http_5xx"] * 3 + ["deferred"] * 3
        assert asked() == 3
        [state] = files(Store(str(tmp_path / "ds")))
        urls = [f"http://{host}.test:{port}/{path}?{n}" for n in (7, 8) for host, path in BOTH]
        second = _list(tmp_path / "b.parquet", urls)
        assert _statuses(run([first, second]))[6:] == ["deferred", "ok"] * 2
        assert asked() == 3
        assert files(Store(str(tmp_path / "ds"))) == [state]  # nothing new was learnt


BOTH = (("down", "status/500"), ("up", "ok"))
