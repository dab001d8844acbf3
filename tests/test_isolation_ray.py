"""What a dead or failing worker costs, on a real Ray cluster of two workers that are really killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faulty
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import staring
import synthetic
import yaml
from server import JPEG, BadServer

import mmdata
from mmdata.dataset import Dataset
from mmdata.errors import RetryableError

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="module", autouse=True)
def _cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Two workers that know the faulty stages and whose decoder dies of a certain picture."""
    import ray

    faulty.register_all()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{FIXTURES}{os.pathsep}{FIXTURES / 'deadly'}")
        patch.setenv("MMDATA_TEST_DEADLY", "1")
        patch.setenv("MMDATA_SCRATCH", str(tmp_path_factory.mktemp("scratch")))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        try:
            yield
        finally:
            ray.shutdown()


def _step(folder: Path, fault: str, at: list[int] | None, **options: Any) -> dict[str, Any]:
    return {"make_faulty": {"log": str(folder / "log"), "fault": fault, "at": at, "max_failed": 1, **options}}


def _run(document: dict[str, Any], *steps: Any) -> Dataset:
    return mmdata.run({**document, "steps": list(steps)}, runner="ray")


def _values(ds: Dataset, *columns: str) -> dict[int, tuple[Any, ...]]:
    rows = ds.sql(f"SELECT number, {', '.join(columns)} FROM samples ORDER BY row_id").fetchall()
    return {row[0]: row[1:] for row in rows}


def test_rows_that_kill_their_workers_are_given_up_and_their_neighbours_are_not(tmp_path: Path) -> None:
    # Two killers in the first shard, one in the second, both worked on at once; two more shards wait.
    numbers, killers = list(range(160)), [12, 14, 41]
    document = synthetic.make_dataset(tmp_path, numbers, 40)
    ds = _run(document, {"make_before": {"log": str(tmp_path / "before")}}, _step(tmp_path, "kill", killers, shape=8))
    found = _values(ds, "faulty_value", "faulty_reason", "before_value")
    for number in killers:
        assert found.pop(number) == (None, "worker_died", number + 1)
    assert found == {n: (2.0 * n, None, n + 1) for n in numbers if n not in killers}
    funnel = ds.funnel()
    assert (funnel.rows_in, funnel.kept, funnel.dropped, funnel.failed) == (160, 157, 0, 3)
    asked = faulty.asked(tmp_path / "log")
    assert {n: c for n, c in asked.items() if n >= 80} == dict.fromkeys(range(80, 160), 1)
    # The killers' batch is 8 … 15: the replay finishes and commits all others before it takes these one by one.
    [first] = (tmp_path / "dataset" / "columns").glob("make_faulty-*/00000.c0.parquet")
    reasons = pq.read_table(first, columns=["reason"]).column(0).to_pylist()
    assert reasons == ["uncovered" if 8 <= n < 16 else None for n in range(40)]
    assert all(asked[n] == 2 for n in range(8))  # in the worker that died, and again
    assert all(asked[n] == 1 for n in range(16, 40))
    assert asked[12] == asked[14] == 3  # in the batch, and twice alone


def test_a_row_that_kills_its_worker_in_a_pass_without_a_model(tmp_path: Path) -> None:
    document = synthetic.make_dataset(tmp_path, list(range(20)), 20)
    found = _values(_run(document, _step(tmp_path, "abort", [7])), "faulty_value", "faulty_reason")
    assert found.pop(7) == (None, "worker_died")
    assert found == {n: (2.0 * n, None) for n in range(20) if n != 7}


def test_a_picture_that_kills_its_decoder_costs_its_row(tmp_path: Path) -> None:
    document = synthetic.make_dataset(
        tmp_path, list(range(20)), 10, lambda n: synthetic.png(n) + (faulty.KILLER if n == 6 else b"")
    )
    found = _values(_run(document, _step(tmp_path, "none", None, image=True)), "faulty_value", "reason")
    assert found.pop(6) == (None, "worker_died")
    assert found == {n: (2.0 * n, None) for n in range(20) if n != 6}


def test_a_fetched_picture_that_kills_its_decoder_costs_its_row(tmp_path: Path) -> None:
    deadly = {"/k/2": ("image/jpeg", JPEG + faulty.KILLER), "/k/15": ("image/jpeg", JPEG + faulty.KILLER)}
    with BadServer(deadly) as server:
        urls = [server.url(f"/k/{n}" if n in (2, 15) else f"/ok/{n}") for n in range(20)]
        pq.write_table(pa.table({"url": urls}), tmp_path / "list.parquet")
        source = {"kind": "urls", "path": str(tmp_path / "list.parquet")}
        fetch = {"allow_private": True, "shard_rows": 10, "image_size": 32}
        ds = _run({"name": "deadly", "dataset": str(tmp_path / "dataset"), "source": source, "fetch": fetch})
    found = ds.sql("SELECT status, status_detail FROM rows ORDER BY row_id").fetchall()
    assert found == [("decode", "worker_died") if n in (2, 15) else ("ok", None) for n in range(20)]


def test_an_actor_gets_the_shard_whose_first_pictures_it_has_decoded(tmp_path: Path) -> None:
    staring.register_all()
    document = synthetic.make_dataset(
        tmp_path, range(60), 10, lambda n: staring.picture(n, faulty.KILLER if n == 30 else b"")
    )
    # Shards 0 and 1 are begun at once; each ends when the first picture of the next but one is being decoded.
    waits = {9: "decoded 20", 19: "decoded 30"}
    ds = _run(document, {"stare": {"log": str(tmp_path / "log"), "max_failed": 1, "waits": waits}})
    found = _values(ds, "stare_mean", "stare_reason")
    assert found == {n: (None, "worker_died") if n == 30 else (float(n), None) for n in range(60)}
    said = staring.said(tmp_path / "log")
    assert said.index("decoded 20") < said.index("computed 9")
    assert said.index("decoded 30") < said.index("computed 19")
    assert not [line for line in said if line.startswith("no ")]
    assert said.count("decoded 30") == 3  # beside the shard before, and twice alone
    first = staring.process_of(tmp_path / "log", "decoded 20")
    assert first == staring.process_of(tmp_path / "log", "computed 20")


def test_a_worker_killed_from_outside_costs_nothing(tmp_path: Path) -> None:
    document = synthetic.make_dataset(tmp_path, list(range(40)), 20)
    killed: list[int] = []

    def kill_one() -> None:
        while not faulty.pids(tmp_path / "log"):
            time.sleep(0.01)
        killed.append(min(faulty.pids(tmp_path / "log")))
        os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=kill_one)
    thread.start()
    ds = _run(document, _step(tmp_path, "none", None, slow_s=0.2, shape=5))
    thread.join()
    assert killed
    assert _values(ds, "faulty_value", "verdict") == {n: (2.0 * n, "kept") for n in range(40)}


@pytest.mark.parametrize("fault", ["oom", "cuda"])
def test_a_device_that_fails_once_costs_a_worker_and_no_row(tmp_path: Path, fault: str) -> None:
    document = synthetic.make_dataset(tmp_path, list(range(20)), 20)
    ds = _run(document, _step(tmp_path, fault, [7], times=1, shape=4))
    assert _values(ds, "faulty_value", "verdict") == {n: (2.0 * n, "kept") for n in range(20)}
    assert len(faulty.pids(tmp_path / "log")) == 2
    opened = [line.split()[1] for line in (tmp_path / "log.opened").read_text().splitlines()]
    assert opened == ["4", "4"]


def test_a_device_that_is_out_of_memory_again_stops_the_run(tmp_path: Path) -> None:
    document = synthetic.make_dataset(tmp_path, list(range(20)), 20)
    with pytest.raises(RetryableError, match=r"step make_faulty: .*out of memory.*--set steps\.make_faulty\."):
        _run(document, _step(tmp_path, "oom", [7], shape=4))
    assert len(faulty.pids(tmp_path / "log")) == 2


def test_a_stage_that_kills_its_worker_while_it_opens_stops_the_run_and_charges_nobody(tmp_path: Path) -> None:
    document = synthetic.make_dataset(tmp_path, list(range(20)), 20)
    with pytest.raises(RetryableError, match="step make_faulty: 3 workers died while they opened the stage"):
        _run(document, _step(tmp_path, "none", None, open_fault="kill", shape=4))
    [file] = (tmp_path / "dataset" / "columns").glob("make_faulty-*/00000.c*.parquet")
    assert set(pq.read_table(file).column("reason").to_pylist()) == {"uncovered"}


def test_transient_errors_are_tried_again_on_workers_too(tmp_path: Path) -> None:
    document = synthetic.make_dataset(tmp_path, list(range(40)), 20)
    ds = _run(document, _step(tmp_path, "busy", [3, 25], times=2))
    assert _values(ds, "faulty_value", "verdict") == {n: (2.0 * n, "kept") for n in range(40)}
    assert faulty.asked(tmp_path / "log") == {n: 3 if n in (3, 25) else 1 for n in range(40)}


def test_ctrl_c_stops_cleanly_and_charges_the_row_at_hand_with_nothing(tmp_path: Path) -> None:
    document = synthetic.make_dataset(tmp_path, list(range(3)), 3)
    step = _step(tmp_path, "none", None, shape=1, slow_s=1.5)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**document, "steps": [step]}))
    command = [sys.executable, str(FIXTURES / "faulty.py"), "run", str(recipe), "--runner", "ray", "--workers", "1"]
    # As a terminal does it: every process of the group gets the signal.
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    end = time.monotonic() + 100
    while not faulty.calls(tmp_path / "log"):
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "the same command goes on from here" in errors
    assert "Traceback" not in errors
    assert json.loads((tmp_path / "dataset" / "lease.json").read_bytes())["released"]
    assert faulty.calls(tmp_path / "log") == [[0]]
    ds = _run(document, step)
    assert _values(ds, "faulty_value", "verdict") == {n: (2.0 * n, "kept") for n in range(3)}
    assert faulty.calls(tmp_path / "log") == [[0], [0], [1], [2]]
