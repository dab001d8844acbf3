"""Runs on plain worker processes: the same bytes as inline, deaths that cost a row at most, no orphans."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import faulty
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import synthetic
import yaml
from killing import LOOPBACK, Place, end_session, exported, picture_list, picture_server, samples, wait_until
from server import JPEG, BadServer

import mmdata
from mmdata import nursery
from mmdata.dataset import Dataset
from mmdata.errors import ContractError, RecipeError, RetryableError
from mmdata.pool import Item
from mmdata.shipment import unpacked
from mmdata.slots import Slots

FIXTURES = Path(__file__).parent / "fixtures"
PROCESSES = ("--runner", "processes", "--workers", "2")


@pytest.fixture(autouse=True)
def _surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers whose decoder dies of a certain picture, and scratch that is looked into afterwards."""
    faulty.register_all()
    monkeypatch.setenv("PYTHONPATH", str(FIXTURES / "deadly"))
    monkeypatch.setenv("MMDATA_TEST_DEADLY", "1")
    monkeypatch.setenv("MMDATA_SCRATCH", str(tmp_path / "scratch"))


@pytest.fixture(scope="module")
def server() -> Iterator[BadServer]:
    with picture_server() as running:
        yield running


def _step(folder: Path, fault: str, at: list[int] | None, **options: Any) -> dict[str, Any]:
    return {"make_faulty": {"log": str(folder / "log"), "fault": fault, "at": at, "max_failed": 1, **options}}


def _run(document: dict[str, Any], *steps: Any, workers: int = 2) -> Dataset:
    return mmdata.run({**document, "steps": list(steps)}, runner="processes", workers=workers)


def _values(ds: Dataset, *columns: str) -> dict[int, tuple[Any, ...]]:
    rows = ds.sql(f"SELECT number, {', '.join(columns)} FROM samples ORDER BY row_id").fetchall()
    return {row[0]: row[1:] for row in rows}


def test_the_same_bytes_as_inline_and_nothing_left_behind(server: BadServer, tmp_path: Path) -> None:
    inline, here = Place(tmp_path / "inline", picture_list(server)), Place(tmp_path / "here", picture_list(server))
    assert inline.command("--runner", "inline") == (0, "")
    assert here.command(*PROCESSES, stop="media:done#2=kill") == (0, "")  # one of the workers
    assert here.was_stopped() == "media:done#2"
    assert exported(here.shards) == exported(inline.shards)
    assert samples(here) == samples(inline)
    assert [p for p in (here.folder / "scratch").rglob("*") if p.is_file()] == []


def test_rows_that_kill_their_workers_are_given_up_and_their_neighbours_are_not(tmp_path: Path) -> None:
    numbers, killers = list(range(60)), [12, 14, 41]
    document = synthetic.make_dataset(tmp_path, numbers, 20)
    ds = _run(document, {"make_before": {"log": str(tmp_path / "before")}}, _step(tmp_path, "kill", killers, shape=8))
    found = _values(ds, "faulty_value", "faulty_reason", "before_value")
    for number in killers:
        assert found.pop(number) == (None, "worker_died", number + 1)
    assert found == {n: (2.0 * n, None, n + 1) for n in numbers if n not in killers}


def test_a_fetched_picture_that_kills_its_decoder_costs_its_row(tmp_path: Path) -> None:
    deadly = {f"/k/{n}": ("image/jpeg", JPEG + faulty.KILLER) for n in (2, 15)}
    with BadServer(deadly) as bad:
        urls = [bad.url(f"/k/{n}" if n in (2, 15) else f"/ok/{n}") for n in range(20)]
        pq.write_table(pa.table({"url": urls}), tmp_path / "list.parquet")
        source = {"kind": "urls", "path": str(tmp_path / "list.parquet")}
        fetch = {**LOOPBACK, "shard_rows": 10, "image_size": 32}
        ds = _run({"name": "deadly", "dataset": str(tmp_path / "dataset"), "source": source, "fetch": fetch})
    found = ds.sql("SELECT status, status_detail FROM rows ORDER BY row_id").fetchall()
    assert found == [("decode", "worker_died") if n in (2, 15) else ("ok", None) for n in range(20)]


@pytest.mark.parametrize("fault", ["cuda", pytest.param("oom", marks=pytest.mark.long)])
def test_a_device_that_fails_once_costs_a_worker_and_no_row(tmp_path: Path, fault: str) -> None:
    document = synthetic.make_dataset(tmp_path, list(range(20)), 20)
    ds = _run(document, _step(tmp_path, fault, [7], times=1, shape=4))
    assert _values(ds, "faulty_value", "verdict") == {n: (2.0 * n, "kept") for n in range(20)}
    assert len(faulty.pids(tmp_path / "log")) == 2
    assert [line.split()[1] for line in (tmp_path / "log.opened").read_text().splitlines()] == ["4", "4"]


def test_a_model_is_opened_once_per_worker(tmp_path: Path) -> None:
    document = synthetic.make_dataset(tmp_path, list(range(60)), 10)
    ds = _run(document, _step(tmp_path, "none", None, shape=4), workers=1)
    assert ds.funnel().kept == 60
    assert len((tmp_path / "log.opened").read_text().splitlines()) == 1
    assert len(faulty.pids(tmp_path / "log")) == 1


def test_a_stage_that_kills_its_worker_while_it_opens_stops_the_run(tmp_path: Path) -> None:
    document = synthetic.make_dataset(tmp_path, list(range(20)), 20)
    with pytest.raises(RetryableError, match="step make_faulty: 3 workers died while they opened the stage"):
        _run(document, _step(tmp_path, "none", None, open_fault="kill", shape=4))


WORKER = """import os
import sys
import threading

import mmdata

HEAVY = {"torch", "ray", "datasets", "transformers"}


@mmdata.stage(reads="number", writes="facts: string")
def tell(batch):
    facts = [sorted(HEAVY & set(sys.modules)), os.environ["OMP_NUM_THREADS"], os.getppid() == os.getsid(0)]
    return {"facts": [str(facts)] * len(batch)}
"""


def test_a_script_without_a_main_guard_and_with_a_stage_of_its_own(tmp_path: Path) -> None:
    base = synthetic.make_dataset(tmp_path / "data", list(range(40)), shard_rows=20)
    (tmp_path / "tell.py").write_text(WORKER)
    script = tmp_path / "mine.py"
    script.write_text(
        "import os\nimport mmdata\n\n"
        '@mmdata.stage(reads="number", writes="double: int64, pid: int64")\n'
        "def double(batch):\n"
        '    return {"double": [2 * n for n in batch["number"]], "pid": [os.getpid()] * len(batch)}\n\n'
        f"recipe = { ({**base, 'operators': ['tell.py'], 'steps': ['tell']})!r}\n"
        "told = mmdata.run(recipe, runner='processes', workers=1)\n"
        "print(told.sql('SELECT DISTINCT facts FROM samples').fetchall())\n"
        "made = mmdata.run({**recipe, 'steps': ['double']}, runner='processes', workers=1)\n"
        "print(made.sql('SELECT sum(double), count(DISTINCT pid) FROM samples').fetchall(), os.getpid() in "
        "[p for p, in made.sql('SELECT pid FROM samples').fetchall()])\n"
    )
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    # By reference nothing heavy is loaded; the second stage is the script's own, which is sent by value.
    assert done.stdout.splitlines() == ["[(\"[[], '1', False]\",)]", "[(1560, 1)] False"]


def test_an_error_on_a_worker_is_the_drivers(tmp_path: Path) -> None:
    document = synthetic.make_dataset(tmp_path, list(range(20)), 20)
    with pytest.raises(ContractError, match="faulty_velue"):
        _run(document, _step(tmp_path, "names", None))


def test_workers_that_do_not_come_up_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = synthetic.make_dataset(tmp_path, list(range(20)), 20)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "selectors.py").write_text("raise SystemExit(3)")  # the standard library's, which every process needs
    monkeypatch.syspath_prepend(str(broken))
    with pytest.raises(RetryableError, match="worker processes do not come up"):
        _run(document, _step(tmp_path, "none", None))


def test_a_clusters_address_is_refused_where_it_would_mean_nothing(tmp_path: Path) -> None:
    document = synthetic.make_dataset(tmp_path, list(range(20)), 20)
    with pytest.raises(RecipeError, match="--address joins a Ray cluster, which --runner processes has no use for"):
        mmdata.run(document, runner="processes", address="192.0.2.1:6379")


# Stopped from outside


@pytest.mark.parametrize("how", ["SIGINT", pytest.param("SIGTERM", marks=pytest.mark.long), "SIGKILL"])
def test_a_stopped_driver_leaves_no_process_and_the_same_command_goes_on(tmp_path: Path, how: str) -> None:
    document = synthetic.make_dataset(tmp_path, list(range(6)), 3)
    step = _step(tmp_path, "none", None, shape=1, slow_s=0.4)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**document, "steps": [step]}))
    command = [sys.executable, str(FIXTURES / "faulty.py"), "run", str(tmp_path / "recipe.yaml"), "--quiet", *PROCESSES]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        wait_until(lambda: len(faulty.pids(tmp_path / "log")) == 2)
        signals = signal.Signals[how]
        # As a terminal does it, the foreground group gets Ctrl-C; a kill is for one process.
        (os.killpg if how == "SIGINT" else os.kill)(process.pid, signals)
        _, errors = process.communicate(timeout=60)  # its end is that of every process that has the pipe
        workers = faulty.pids(tmp_path / "log")
        wait_until(lambda: not [pid for pid in workers if Path(f"/proc/{pid}").exists()], 20)
    finally:
        end_session(process)
    if how == "SIGKILL":
        assert process.returncode == -signal.SIGKILL
    else:
        assert (process.returncode, errors.count("\n"), "Traceback" in errors) == (1, 2, False), errors
        assert "the same command goes on from here" in errors
        assert json.loads((tmp_path / "dataset" / "lease.json").read_bytes())["released"]
        # What was computed stays computed: of each shard the rows before the one at hand.
        [folder] = (tmp_path / "dataset" / "columns").glob("make_faulty-*")
        assert len(list(folder.iterdir())) == 2
        assert [p for p in (tmp_path / "scratch").rglob("*") if p.is_file() and "journal" not in p.parts] == []
    ds = _run(document, step)
    assert _values(ds, "faulty_value", "verdict") == {n: (2.0 * n, "kept") for n in range(6)}
    most = 2 if how == "SIGKILL" else 1
    assert max(faulty.asked(tmp_path / "log").values()) <= 1 + most


def test_a_nursery_ends_with_its_driver_even_before_it_is_asked_for_anything(tmp_path: Path) -> None:
    code = "import os; from mmdata import nursery; print(nursery.take()._process.pid, flush=True); os._exit(0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    wait_until(lambda: not Path(f"/proc/{int(done.stdout)}").exists(), 20)


def test_how_a_worker_ended_is_told() -> None:
    made = nursery.Nursery()
    mine, theirs = socket.socketpair()
    connection = Connection(mine.detach())
    try:
        made.fork(theirs)
        assert _python_threads(made._process.pid) == 1  # forking is safe only without others
        pid = unpacked(connection.recv_bytes()[1:])  # it says hello
        os.kill(pid, signal.SIGKILL)
        assert made.fate(pid, 20) == "killed by SIGKILL"
        assert made.fate(1, 0.1) == "its end was not seen"
    finally:
        connection.close()
        made.close()


def _python_threads(pid: int) -> int:
    """Threads of a process, without that of DuckDB's allocator, which looks after itself when the process forks."""
    names = [Path(f"/proc/{pid}/task/{task}/comm").read_text().strip() for task in os.listdir(f"/proc/{pid}/task")]
    return sum(name != "jemalloc_bg_thd" for name in names)


# Tails


class _Waits(BaseHTTPRequestHandler):
    """`/wait` answers once the second shard has been asked for; all else at once."""

    second = threading.Event()

    def do_GET(self) -> None:
        met = True
        if self.path == "/wait":
            met = self.second.wait(30)
        elif self.path.startswith("/second"):
            self.second.set()
        self.send_response(200 if met else 404)
        self.send_header("Content-Length", str(len(JPEG)))
        self.end_headers()
        self.wfile.write(JPEG)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("runner", ["processes", pytest.param("ray", marks=pytest.mark.long)])
def test_a_shard_that_only_waits_holds_nobody_up(tmp_path: Path, runner: Any) -> None:
    _Waits.second.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), _Waits) as waits:
        threading.Thread(target=waits.serve_forever, daemon=True).start()
        top = f"http://127.0.0.1:{waits.server_port}"
        urls = [f"{top}/wait", *(f"{top}/first/{n}" for n in range(3)), *(f"{top}/second/{n}" for n in range(4))]
        pq.write_table(pa.table({"url": urls}), tmp_path / "list.parquet")
        document = {
            "name": "tails",
            "dataset": str(tmp_path / "dataset"),
            "source": {"kind": "urls", "path": str(tmp_path / "list.parquet")},
            "fetch": {**LOOPBACK, "shard_rows": 4, "image_size": 32, "timeout_s": 60},
        }
        ds = mmdata.run(document, runner=runner, workers=1)
        waits.shutdown()
    assert ds.sql("SELECT DISTINCT status FROM rows").fetchall() == [("ok",)]


class _Counts(_Waits):
    """Counts the connections that are open at once."""

    lock = threading.Lock()
    now = most = 0

    def do_GET(self) -> None:
        kind = type(self)
        with kind.lock:
            kind.now += 1
            kind.most = max(kind.most, kind.now)
        time.sleep(0.1)
        with kind.lock:
            kind.now -= 1
        super().do_GET()


@pytest.mark.parametrize("runner", ["processes", pytest.param("ray", marks=pytest.mark.long)])
def test_a_hosts_allowance_is_the_runs_and_not_a_workers(tmp_path: Path, runner: Any) -> None:
    _Counts.most = 0
    with ThreadingHTTPServer(("127.0.0.1", 0), _Counts) as counts:
        threading.Thread(target=counts.serve_forever, daemon=True).start()
        urls = [f"http://127.0.0.1:{counts.server_port}/{n}" for n in range(40)]
        pq.write_table(pa.table({"url": urls}), tmp_path / "list.parquet")
        document = {
            "name": "polite",
            "dataset": str(tmp_path / "dataset"),
            "source": {"kind": "urls", "path": str(tmp_path / "list.parquet")},
            "fetch": {**LOOPBACK, "per_host": 3, "shard_rows": 20, "image_size": 32},
        }
        ds = mmdata.run(document, runner=runner, workers=2)
        counts.shutdown()
    assert ds.funnel().kept == 40
    assert _Counts.most == 3  # of either worker alone it would be 3 too, and of both 6


INGEST, PASS, MODEL = Item("ingest", "i"), Item("pass", "p"), Item("pass", "m", on_actor=True, gpu=1.0)


def _has_room(item: Item, *flying: Item, tails: int = 0, models: int = 0, idle: int = 0, **slots: Any) -> bool:
    return Slots(**{"count": 2, **slots}).has_room(item, flying, tails, models, idle)


def test_one_item_a_slot_and_two_tails_beside_it() -> None:
    assert _has_room(INGEST, INGEST)
    assert not _has_room(INGEST, INGEST, INGEST)
    assert _has_room(INGEST, INGEST, INGEST, tails=1)
    assert _has_room(PASS, INGEST, INGEST, tails=1)
    # Four tails are as many as two slots allow: a fifth counts like any other item.
    assert _has_room(INGEST, *[INGEST] * 5, tails=4)
    assert not _has_room(INGEST, *[INGEST] * 6, tails=4)
    assert not _has_room(INGEST, *[INGEST] * 6, tails=6)


def test_models_and_fetching_get_about_half_each() -> None:
    assert _has_room(MODEL, INGEST)
    assert not _has_room(INGEST, INGEST, models=1, idle=1)
    assert _has_room(MODEL, INGEST, models=1, idle=1)
    assert not _has_room(MODEL, INGEST, models=1)  # a second model would take the last slot from fetching
    assert _has_room(MODEL, MODEL, models=1, gpus=2, on_gpu=True)
    assert not _has_room(MODEL, MODEL, models=1, gpus=1, on_gpu=True)
