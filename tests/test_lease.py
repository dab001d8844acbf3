"""The lease: one live holder, and a dead, stale or released one is no obstacle."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import mmdata
from mmdata import lease as lease_module
from mmdata.errors import StoreError
from mmdata.lease import Holder, Lease, ProcessId, lease_holder
from mmdata.store import Store


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(str(tmp_path / "pets") if request.param == "local" else f"memory://{uuid.uuid4().hex}/pets")


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline, "it never became true"
        time.sleep(0.01)


def write_lease(store: Store, process: ProcessId, age_s: float = 0.0) -> None:
    stamp = lease_module._utc(time.time() - age_s)
    assert store.replace(
        "lease.json", Holder("run-0", process, stamp, stamp).to_bytes(), store.read_if_there("lease.json")
    )


def test_held_then_released(store: Store) -> None:
    assert lease_holder(store) is None
    with Lease.acquire(store, "run-1") as lease:
        holder = lease_holder(store)
        assert holder is not None
        assert (holder.run, holder.process.pid, holder.process.host) == ("run-1", os.getpid(), socket.gethostname())
        with pytest.raises(StoreError, match=rf"held by run run-1 \(pid {os.getpid()} on .*, since 2.*\); wait for it"):
            Lease.acquire(store, "run-2")
        assert not lease.lost.is_set()
    assert lease_holder(store) is None
    assert json.loads(store.read("lease.json"))["released"] is True
    with Lease.acquire(store, "run-3"):
        assert json.loads(store.read("lease.json"))["run"] == "run-3"


def test_released_when_the_run_fails(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), Lease.acquire(store, "run-1"):
        1 / 0  # noqa: B018  any error of the run
    assert lease_holder(store) is None


def test_another_process_holds_it_until_it_is_killed(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "pets"))
    code = (
        "import sys, time\nfrom mmdata.lease import Lease\nfrom mmdata.store import Store\n"
        "lease = Lease.acquire(Store(sys.argv[1]), 'run-1')\nprint('held', flush=True)\ntime.sleep(600)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(mmdata.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", code, store.url], env=environment, stdout=subprocess.PIPE, text=True
    ) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            with pytest.raises(StoreError, match=rf"held by run run-1 \(pid {other.pid} on"):
                Lease.acquire(store, "run-2")
        finally:
            os.kill(other.pid, signal.SIGKILL)
        # Not waited for yet: once it is a zombie the lease is free.
        wait_until(lambda: lease_holder(store) is None)
        Lease.acquire(store, "run-2").release()
    Lease.acquire(store, "run-3").release()


def test_a_pid_given_anew_does_not_hold(store: Store) -> None:
    me = ProcessId.current()
    write_lease(store, me)
    assert lease_holder(store) is not None
    write_lease(store, replace(me, start=me.start - 1))
    assert lease_holder(store) is None
    Lease.acquire(store, "run-1").release()


def test_the_start_time_is_the_kernels() -> None:
    def uptime_s() -> float:
        return float(Path("/proc/uptime").read_text().split()[0])

    before_s = uptime_s()
    with subprocess.Popen(["sleep", "60"]) as child:
        try:
            started_s = lease_module._start_time(child.pid) / os.sysconf("SC_CLK_TCK")
            assert before_s - 0.1 <= started_s <= uptime_s() + 0.1
        finally:
            child.kill()
        wait_until(lambda: lease_module._start_time(child.pid) == -1)  # a zombie
    assert lease_module._start_time(child.pid) is None


@pytest.mark.parametrize(
    ("change", "held"),
    [
        ({"host": "elsewhere", "pid": 2**22 + 1}, True),  # nothing is known of a pid on another host
        ({"pid": 2**22 + 1}, False),  # no such pid here (above the kernel's limit)
        ({"boot": "00000000-0000-0000-0000-000000000000/1"}, False),  # this host was booted since
        ({"host": "elsewhere", "boot": "00000000-0000-0000-0000-000000000000/1"}, True),
    ],
)
def test_dead_only_when_certain(store: Store, change: dict[str, object], held: bool) -> None:
    write_lease(store, replace(ProcessId.current(), **change))
    assert (lease_holder(store) is not None) == held


def test_a_pid_of_another_namespace_says_nothing(store: Store) -> None:
    me = ProcessId.current()
    write_lease(store, replace(me, boot=me.boot.split("/")[0] + "/1", pid=2**22 + 1))
    assert lease_holder(store) is not None


def test_a_stale_heartbeat_is_taken_over_and_the_old_holder_notices(store: Store) -> None:
    with Lease.acquire(store, "run-1") as old:
        with pytest.raises(StoreError, match="run-1"):
            Lease.acquire(store, "run-2", clock=lambda: time.time() + 50)
        with Lease.acquire(store, "run-2", clock=lambda: time.time() + 70) as new:
            old.beat()
            assert old.lost.is_set()
            new.beat()
            assert not new.lost.is_set()
            old.release()
            assert json.loads(store.read("lease.json"))["run"] == "run-2"
            assert json.loads(store.read("lease.json"))["released"] is False


def test_a_clock_that_was_far_ahead_does_not_hold_for_ever(store: Store) -> None:
    write_lease(store, replace(ProcessId.current(), host="elsewhere"), age_s=-3600)
    assert lease_holder(store) is None


def test_the_heartbeat_goes_on_by_itself(store: Store) -> None:
    with Lease.acquire(store, "run-1", heartbeat_s=0.01):
        first = json.loads(store.read("lease.json"))
        wait_until(lambda: json.loads(store.read("lease.json"))["heartbeat"] > first["heartbeat"])
        assert json.loads(store.read("lease.json"))["since"] == first["since"]


def test_the_heartbeat_notices_a_lost_lease(store: Store) -> None:
    with Lease.acquire(store, "run-1", heartbeat_s=0.01) as lease:
        wait_until(lambda: store.replace("lease.json", b"{}", store.read("lease.json")))
        assert lease.lost.wait(30)
    assert store.read("lease.json") == b"{}", "a lease that was lost is not released"


def test_a_store_that_cannot_be_written_loses_the_lease_once_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(Store):
        full = False

        def replace(self, name: str, data: bytes, expected: bytes | None) -> bool:
            if self.full:
                raise StoreError("the disk is full")
            return super().replace(name, data, expected)

    store = Full(str(tmp_path / "pets"))
    monkeypatch.setattr(lease_module, "STALE_S", 0.2)
    with Lease.acquire(store, "run-1", heartbeat_s=0.01) as lease:
        store.full = True
        assert lease.lost.wait(30)


def test_many_at_once_get_one_lease(store: Store) -> None:
    barrier, got, refused = threading.Barrier(8), [], []

    def run(number: int) -> None:
        barrier.wait()
        try:
            got.append(Lease.acquire(store, f"run-{number}"))
        except StoreError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=run, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 7)
    got[0].release()


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b"\xff", b'{"run": 1}'])
def test_a_lease_that_does_not_read(store: Store, text: bytes) -> None:
    assert store.replace("lease.json", text, None)
    with pytest.raises(StoreError, match=r"lease\.json of .* does not read as a lease"):
        Lease.acquire(store, "run-1")


def test_hostile_pids_are_refused(store: Store) -> None:
    for pid in ("../../etc", -1, 0, 1.5, None):
        document = json.loads(Holder("r", ProcessId.current(), "2026-01-01", "2026-01-01T00:00:00+00:00").to_bytes())
        document["process"]["pid"] = pid
        with pytest.raises(StoreError, match="does not read as a lease"):
            Holder.from_bytes(json.dumps(document).encode(), "lease.json")


def test_a_folder_that_was_removed_stays_removed(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "pets"))
    with Lease.acquire(store, "run-1") as lease:
        shutil.rmtree(store.root)
        lease.beat()
        assert lease.lost.is_set()
    assert not Path(store.root).exists()


def test_a_process_is_known_by_its_token() -> None:
    me = ProcessId.current()
    assert ProcessId.from_token(me.token()) == me
    assert "/" not in me.token()
    assert ProcessId.from_token("somebody's folder") is None
    assert not me.is_dead()
