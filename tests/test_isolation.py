"""What one bad row costs, row by row of the table, in this process and with real pictures."""

# long because: it is the table of what one bad row costs, row by row, in one place

from __future__ import annotations

import io
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import faulty
import pyarrow.parquet as pq
import pytest
import synthetic
import yaml
from PIL import Image

import mmdata
from mmdata.cli import main
from mmdata.dataset import Dataset
from mmdata.errors import BudgetError, ContractError, RetryableError
from mmdata.isolate import DeviceOutOfMemory, FailsEverywhere
from mmdata.worker_journal import Journal

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(autouse=True)
def _scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty.register_all()
    monkeypatch.setenv("MMDATA_SCRATCH", str(tmp_path / "scratch"))


def _step(folder: Path, fault: str, at: list[int] | None, max_failed: float = 1, **options: Any) -> dict[str, Any]:
    keys = {k: options.pop(k) for k in ("on_error",) if k in options}
    given = {"log": str(folder / "log"), "fault": fault, "at": at, "max_failed": max_failed, **options, **keys}
    return {"make_faulty": given}


def _run(document: dict[str, Any], *steps: Any, **options: Any) -> Dataset:
    return mmdata.run({**document, "steps": list(steps)}, runner="inline", **options)


def _values(ds: Dataset, *columns: str) -> dict[int, tuple[Any, ...]]:
    rows = ds.sql(f"SELECT number, {', '.join(columns)} FROM samples ORDER BY row_id").fetchall()
    return {row[0]: row[1:] for row in rows}


def _exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([*arguments])
    return int(stopped.value.code or 0)


def _written(folder: Path, document: dict[str, Any], *steps: Any) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**document, "steps": list(steps)}))
    return str(path)


# A data exception, NaN, a wrong type, a row that the stage marks


def test_one_poison_row_in_a_thousand_costs_itself_and_few_calls(tmp_path: Path) -> None:
    numbers = list(range(1000))
    document = synthetic.make_dataset(tmp_path, numbers, 1000)
    ds = _run(document, _step(tmp_path, "raise", [617]))
    found = _values(ds, "faulty_value", "faulty_reason", "verdict")
    assert found.pop(617) == (None, "ZeroDivisionError", "failed")
    assert found == {n: (2.0 * n, None, "kept") for n in numbers if n != 617}
    # Four batches of at most 256 rows, and two calls for each of the eight times that 256 is halved to 1.
    assert len(faulty.calls(tmp_path / "log")) <= 4 + 2 * 8
    funnel = ds.funnel()
    assert (funnel.rows_in, funnel.kept, funnel.dropped, funnel.failed) == (1000, 999, 0, 1)


def test_isolation_uses_the_pictures_that_are_decoded_already(tmp_path: Path) -> None:
    document = synthetic.make_dataset(tmp_path, list(range(64)), 64)
    ds = _run(document, _step(tmp_path, "raise", [13], image=True))
    assert ds.report is not None
    assert ds.report.media_reads == 64
    assert len(faulty.calls(tmp_path / "log")) == 1 + 2 * 6


@pytest.mark.parametrize("fault", ["nan", "inf", "-inf", "1e300", "nan_in_list"])
def test_what_is_not_finite_is_null_with_a_reason_for_that_row_only(tmp_path: Path, fault: str) -> None:
    document = synthetic.make_dataset(tmp_path, list(range(20)))
    ds = _run(document, _step(tmp_path, fault, [3, 14]))
    found = _values(ds, "faulty_value", "faulty_count", "faulty_list", "faulty_reason")
    for number in (3, 14):
        assert found.pop(number) == (None, None, None, "not_finite")
    assert found == {n: (2.0 * n, n, [float(n), 0.5], None) for n in range(20) if n not in (3, 14)}
    assert all(math.isfinite(v) for v, *_ in found.values())


def test_a_value_of_the_wrong_type_costs_its_row(tmp_path: Path) -> None:
    document = synthetic.make_dataset(tmp_path, list(range(20)))
    found = _values(_run(document, _step(tmp_path, "type", [5])), "faulty_value", "faulty_count", "faulty_reason")
    value, count, reason = found.pop(5)
    assert (value, count) == (None, None)
    assert reason in ("ArrowInvalid", "ArrowTypeError")
    assert found == {n: (2.0 * n, n, None) for n in range(20) if n != 5}


def test_one_failed_cell_fails_the_row_in_every_column_of_the_step(tmp_path: Path) -> None:
    document = synthetic.make_dataset(tmp_path, list(range(10)))
    ds = _run(document, _step(tmp_path, "failed", [4]))
    found = _values(ds, "faulty_value", "faulty_count", "faulty_reason", "verdict", "step_name", "reason")
    assert found[4] == (None, None, "odd_number", "failed", "make_faulty", "odd_number")
    assert found[5] == (10.0, 5, None, "kept", None, None)
    assert len(faulty.calls(tmp_path / "log")) == 1


def test_a_row_that_failed_under_on_error_keep_stays_with_nulls_and_its_reason(tmp_path: Path) -> None:
    document = synthetic.make_dataset(tmp_path, list(range(10)))
    ds = _run(document, _step(tmp_path, "raise", [4], on_error="keep"), "make_after")
    found = _values(ds, "faulty_value", "faulty_reason", "after_value", "after_reason", "verdict")
    assert found[4] == (None, "ZeroDivisionError", None, None, "kept")
    assert found[5] == (10.0, None, 11.0, None, "kept")


def test_pictures_that_do_not_decode_or_are_not_there_never_reach_the_stage(tmp_path: Path) -> None:
    cut = io.BytesIO()
    Image.effect_noise((64, 64), 80).convert("RGB").save(cut, "PNG")
    special = {3: b"<html>no picture</html>", 5: cut.getvalue()[:2000], 7: None}
    document = synthetic.make_dataset(
        tmp_path, list(range(10)), 10, lambda n: special[n] if n in special else synthetic.png(n)
    )
    ds = _run(document, _step(tmp_path, "none", None, image=True))
    found = _values(ds, "faulty_value", "reason")
    assert [found.pop(n) for n in special] == [(None, "not_media"), (None, "decode"), (None, "missing_media")]
    assert found == {n: (2.0 * n, None) for n in range(10) if n not in special}
    assert set(faulty.asked(tmp_path / "log")) == set(range(10)) - set(special)


def test_a_stage_that_raises_for_whole_batches_gets_its_rows_one_by_one(tmp_path: Path) -> None:
    document = synthetic.make_dataset(tmp_path, list(range(20)))
    ds = _run(document, _step(tmp_path, "whole_batch", None))
    assert _values(ds, "faulty_value", "faulty_reason") == {n: (2.0 * n, None) for n in range(20)}


# A stage that is broken


def test_a_stage_that_raises_for_every_row_stops_the_run_and_keeps_what_other_steps_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = synthetic.make_dataset(tmp_path, list(range(100)), 100)
    before = {"make_before": {"log": str(tmp_path / "before")}}
    recipe = _written(tmp_path, document, before, _step(tmp_path, "raise", None))
    assert _exit_code("run", recipe, "--runner", "inline", "--quiet") == 1
    message = capsys.readouterr().err
    assert "make_faulty" in message
    assert "ZeroDivisionError: number" in message
    assert "Traceback" not in message
    assert len([c for c in faulty.calls(tmp_path / "log") if len(c) == 1]) == 32
    [file] = (tmp_path / "dataset" / "columns").glob("make_before-*/00000.c0.parquet")
    table = pq.read_table(file).to_pydict()
    assert (table["before_value"], set(table["reason"])) == ([n + 1 for n in range(100)], {None})

    faulty_less = [before, _step(tmp_path, "none", None)]
    assert _values(_run(document, *faulty_less), "verdict") == {n: ("kept",) for n in range(100)}
    assert set(faulty.asked(tmp_path / "before").values()) == {1}


def test_thirty_one_bad_rows_in_front_of_good_ones_do_not_stop_the_run(tmp_path: Path) -> None:
    document = synthetic.make_dataset(tmp_path, list(range(100)), 100)
    ds = _run(document, _step(tmp_path, "raise", list(range(31))))
    found = _values(ds, "reason", "faulty_value")
    assert found == {n: ("ZeroDivisionError", None) if n < 31 else (None, 2.0 * n) for n in range(100)}


def test_a_shard_of_bad_rows_is_no_broken_stage_where_another_shard_had_values(tmp_path: Path) -> None:
    document = synthetic.make_dataset(tmp_path, list(range(80)), 40)
    step = _step(tmp_path, "raise", list(range(40, 80)))
    _run(document, {"filter": {"few": "number < 40"}}, step)
    ds = _run(document, {"filter": {"few": "number < 200"}}, step)  # a new run, whose stage has not succeeded yet
    assert _values(ds, "reason") == {n: ("ZeroDivisionError",) if n >= 40 else (None,) for n in range(80)}


def test_a_stage_that_breaks_half_way_is_told_from_bad_rows(tmp_path: Path) -> None:
    document = synthetic.make_dataset(tmp_path, list(range(100)), 100)
    step = _step(tmp_path, "breaks", [50], shape=10)
    with pytest.raises(ContractError, match=r"make_faulty now fails on a row it had computed.*spoilt"):
        _run(document, step)
    # Nothing that the broken stage said is believed: the run after it asks for these rows again.
    [file] = (tmp_path / "dataset" / "columns").glob("make_faulty-*/00000.c0.parquet")
    assert pq.read_table(file).column("faulty_value").to_pylist()[:50] == [2.0 * n for n in range(50)]


@pytest.mark.parametrize(
    ("fault", "message"),
    [("names", "faulty_velue"), ("length", "11 values of faulty_value"), ("bad_kind", "kind '!odd', which is taken")],
)
def test_columns_other_than_promised_stop_the_run_at_once(tmp_path: Path, fault: str, message: str) -> None:
    document = synthetic.make_dataset(tmp_path, list(range(10)))
    with pytest.raises(ContractError, match=message):
        _run(document, _step(tmp_path, fault, [2]))
    assert len(faulty.calls(tmp_path / "log")) == 1


def test_a_stage_that_does_not_open_is_its_authors_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = synthetic.make_dataset(tmp_path, list(range(10)))
    recipe = _written(tmp_path, document, _step(tmp_path, "none", None, open_fault="raise"))
    assert _exit_code("run", recipe, "--runner", "inline", "--quiet") == 1
    message = capsys.readouterr().err
    assert "step make_faulty could not be opened (FileNotFoundError: weights.bin)" in message
    assert "Traceback" not in message


def test_a_group_that_raises_stops_the_run_and_keeps_the_steps_before_it(tmp_path: Path) -> None:
    document = synthetic.make_dataset(tmp_path, list(range(20)))
    with pytest.raises(ContractError, match=r"group group_faulty failed over its 20 rows \(IndexError: 20 rows\)"):
        _run(document, _step(tmp_path, "none", None), "group_faulty")
    assert _run(document, _step(tmp_path, "none", None)).funnel().kept == 20
    assert set(faulty.asked(tmp_path / "log").values()) == {1}


@pytest.mark.parametrize("kind", [FailsEverywhere, DeviceOutOfMemory])
def test_errors_keep_their_step_on_the_way_from_a_worker(kind: Any) -> None:
    error = pickle.loads(pickle.dumps(kind("step clip: all of it went wrong", "clip")))
    assert (type(error), str(error), error.step) == (kind, "step clip: all of it went wrong", "clip")


# Filters that raise


def test_rows_on_which_a_filter_raises_or_is_null_are_dropped_and_counted(tmp_path: Path) -> None:
    # captions: NULL for multiples of 9, else 'picture of <n>', so that the text after 'of ' is the number
    numbers = [0, 9, 18, 1, 2, 3, 200, 300, 127, 128]
    document = synthetic.make_dataset(tmp_path, numbers)
    sql = "CAST(substr(caption, 12) AS TINYINT) >= 2"  # TINYINT ends at 127
    ds = _run(document, {"filter": {"small": sql}})
    assert _values(ds, "verdict", "reason") == {
        **{n: ("dropped", "small:null") for n in (0, 9, 18)},
        1: ("dropped", "small"),
        **{n: ("kept", None) for n in (2, 3, 127)},
        **{n: ("dropped", "small:error") for n in (200, 300, 128)},
    }
    assert ds.funnel().steps[1].reasons == {"small:null": 3, "small": 1, "small:error": 3}


# Transient errors


@pytest.mark.parametrize(("fault", "times"), [("timeout", 1), ("connect", 2), ("busy", 2)])
def test_transient_errors_are_tried_again_twice_at_the_end(tmp_path: Path, fault: str, times: int) -> None:
    document = synthetic.make_dataset(tmp_path, list(range(30)))
    # A batch that raises is halved at once, and a time-out of a batch is one of the row's: ask one row at a time.
    ds = _run(document, _step(tmp_path, fault, [3, 17], times=times, shape=1), "make_after")
    found = _values(ds, "faulty_value", "after_value", "verdict")
    assert found == {n: (2.0 * n, 2.0 * n + 1, "kept") for n in range(30)}
    counts = faulty.asked(tmp_path / "log")
    assert counts == {n: 1 + times if n in (3, 17) else 1 for n in range(30)}


@pytest.mark.parametrize(("fault", "kind"), [("timeout", "timeout"), ("connect", "connect"), ("busy", "busy")])
def test_transient_errors_that_stay_fail_the_row_and_the_same_command_tries_again(
    tmp_path: Path, fault: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    document = synthetic.make_dataset(tmp_path, list(range(30)))
    recipe = _written(tmp_path, document, _step(tmp_path, fault, [3, 17], times=3, shape=1))
    assert _exit_code("run", recipe, "--runner", "inline", "--quiet") == 1
    assert "2 rows failed for a passing reason; the same command tries them again" in capsys.readouterr().out
    ds = mmdata.open(document["dataset"])
    assert _values(ds, "verdict", "reason")[17] == ("failed", f"!{kind}")
    assert ds.funnel().steps[1].reasons == {f"!{kind}": 2}
    [key] = ds.sql("SELECT key FROM samples WHERE number = 17").fetchall()[0]
    story = ds.why(key)
    assert (story.verdict, story.steps[0].state, story.steps[0].reason) == ("failed", "failed", f"!{kind}")

    assert _exit_code("run", recipe, "--runner", "inline", "--quiet") == 0
    ds = mmdata.open(document["dataset"])
    assert _values(ds, "faulty_value", "verdict") == {n: (2.0 * n, "kept") for n in range(30)}
    assert faulty.asked(tmp_path / "log") == {n: 4 if n in (3, 17) else 1 for n in range(30)}


def test_transient_errors_of_every_row_stop_nothing_and_are_tried_again(tmp_path: Path) -> None:
    numbers = list(range(300))
    document = synthetic.make_dataset(tmp_path, numbers, 300)
    recipe = [_step(tmp_path, "timeout", None, max_failed=0.05)]
    ds = _run(document, *recipe)
    assert ds.funnel().steps[1].reasons == {"!timeout": 300}
    # Of a service that is down, a few dozen rows are asked for alone in each of the three rounds, and then batches.
    assert len(faulty.calls(tmp_path / "log")) < 3 * 100


# Budget


def test_too_many_failures_stop_the_run_and_a_larger_budget_goes_on(tmp_path: Path) -> None:
    numbers = list(range(400))
    document = synthetic.make_dataset(tmp_path, numbers, 100)
    bad = [n for n in numbers if n % 10 == 0]
    step = _step(tmp_path, "failed", bad, max_failed=0.05)
    with pytest.raises(BudgetError, match=r"step make_faulty: 20 of 200 rows failed.*max_failed of 5%"):
        _run(document, step)
    ds = _run(document, step, overrides=["steps.make_faulty.max_failed=0.1"])
    assert ds.funnel().steps[1].reasons == {"odd_number": 40}
    assert set(faulty.asked(tmp_path / "log").values()) == {1}


def test_one_hundred_and_ninety_nine_rows_have_no_budget(tmp_path: Path) -> None:
    document = synthetic.make_dataset(tmp_path, list(range(199)), 50)
    ds = _run(document, _step(tmp_path, "failed", list(range(1, 199)), max_failed=0.05))
    assert ds.funnel().kept == 1


# The device


def test_out_of_memory_once_opens_the_stage_anew_at_the_same_shape(tmp_path: Path) -> None:
    document = synthetic.make_dataset(tmp_path, list(range(20)))
    ds = _run(document, _step(tmp_path, "oom", [3], times=1, shape=4))
    assert _values(ds, "faulty_value", "faulty_reason") == {n: (2.0 * n, None) for n in range(20)}
    opened = (tmp_path / "log.opened").read_text().splitlines()
    assert [line.split()[1] for line in opened] == ["4", "4"]


def test_out_of_memory_twice_stops_the_run_with_the_option_that_helps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = synthetic.make_dataset(tmp_path, list(range(20)))
    recipe = _written(tmp_path, document, _step(tmp_path, "oom", [13], shape=4))
    assert _exit_code("run", recipe, "--runner", "inline", "--quiet") == 1
    message = capsys.readouterr().err
    assert "step make_faulty: the accelerator is out of memory" in message
    assert "--set steps.make_faulty." in message
    assert "anew" in message
    # The other shard, and the rows before the one that did not fit, are kept.
    assert len(list((tmp_path / "dataset" / "columns").glob("make_faulty-*/00000.c0.parquet"))) == 1
    ds = _run(document, _step(tmp_path, "none", [13], shape=4))
    assert ds.funnel().kept == 20


def test_a_row_that_upsets_the_device_is_found_like_one_that_kills_its_worker(tmp_path: Path) -> None:
    document = synthetic.make_dataset(tmp_path, list(range(20)))
    ds = _run(document, _step(tmp_path, "cuda", [7], shape=4))
    found = _values(ds, "faulty_value", "faulty_reason")
    assert found.pop(7) == (None, "worker_died")
    assert found == {n: (2.0 * n, None) for n in range(20) if n != 7}


def test_a_device_that_fails_once_charges_nobody(tmp_path: Path) -> None:
    document = synthetic.make_dataset(tmp_path, list(range(20)))
    ds = _run(document, _step(tmp_path, "cuda", [7], times=1, shape=4))
    assert _values(ds, "faulty_value", "verdict") == {n: (2.0 * n, "kept") for n in range(20)}


def test_a_device_that_always_fails_stops_the_run_and_charges_nobody(tmp_path: Path) -> None:
    document = synthetic.make_dataset(tmp_path, list(range(60)), 60)
    with pytest.raises(RetryableError, match=r"make_faulty: 20 workers died one after the other"):
        _run(document, _step(tmp_path, "cuda", None, shape=30))
    [file] = (tmp_path / "dataset" / "columns").glob("make_faulty-*/00000.c*.parquet")
    assert set(pq.read_table(file).column("reason").to_pylist()) == {"uncovered"}
    assert not [p for p in (tmp_path / "scratch" / "journal").rglob("*") if p.is_file()]


def test_a_model_that_does_not_fit_is_given_half_the_batch_until_it_does(tmp_path: Path) -> None:
    document = synthetic.make_dataset(tmp_path, list(range(20)))
    ds = _run(document, _step(tmp_path, "none", None, open_fault="oom", shape=32), device="cuda")
    assert ds.funnel().kept == 20
    opened = [line.split()[1] for line in (tmp_path / "log.opened").read_text().splitlines()]
    assert opened == ["32", "16", "8", "8"]  # settled at 8, then opened for the rows
    assert all(len(call) <= 8 for call in faulty.calls(tmp_path / "log"))


# The journal itself


def test_what_another_runs_workers_did_at_their_end_charges_nobody(tmp_path: Path) -> None:
    path = tmp_path / "journal.json"
    for run in ("a", "b", "c"):  # stopped three times at the same row, by whoever stopped the run
        journal = Journal(path, run)
        assert (journal.suspects, journal.deaths) == ([], {})
        journal.begin([5], "clip")
    journal = Journal(path, "c")  # but this is the same run: its worker died
    assert (journal.suspects, journal.deaths) == ([5], {5: 1})
    journal.begin([5], "clip")
    assert Journal(path, "c").given_up(5)


def test_a_journal_that_was_cut_short_charges_nobody(tmp_path: Path) -> None:
    path = tmp_path / "journal.json"
    Journal(path).begin([1, 2, 3], "clip")
    path.write_bytes(path.read_bytes()[:-20])
    assert (Journal(path).suspects, Journal(path).deaths) == ([], {})


# The process itself dies, or is asked to stop


def _command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(FIXTURES / "faulty.py"), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def _codes(*arguments: str, **environment: str) -> list[int]:
    """Exit codes of one process after the other, up to the first that was not killed."""
    lines = _command("--again", *arguments, **environment).stdout.splitlines()
    return [int(line) for line in lines if line.lstrip("-").isdecimal()]


def test_a_row_that_kills_the_process_is_given_up_when_it_did_so_twice_alone(tmp_path: Path) -> None:
    document = synthetic.make_dataset(tmp_path, list(range(20)))
    before = {"make_before": {"log": str(tmp_path / "before")}}
    recipe = _written(tmp_path, document, before, _step(tmp_path, "kill", [7, 13]))
    codes = _codes("run", recipe, "--runner", "inline")
    # For each of the two shards: once in its batch, twice alone.
    assert codes == [-signal.SIGKILL] * 6 + [0]
    ds = mmdata.open(document["dataset"])
    found = _values(ds, "faulty_value", "faulty_reason", "before_value")
    for number in (7, 13):
        assert found.pop(number) == (None, "worker_died", number + 1)
    assert found == {n: (2.0 * n, None, n + 1) for n in range(20) if n not in (7, 13)}
    assert ds.funnel().failed == 2
    assert not list((tmp_path / "scratch" / "journal").rglob("*.json"))


def test_a_picture_that_kills_its_decoder_costs_its_row(tmp_path: Path) -> None:
    document = synthetic.make_dataset(
        tmp_path, list(range(10)), 10, lambda n: synthetic.png(n) + (faulty.KILLER if n == 6 else b"")
    )
    recipe = _written(tmp_path, document, _step(tmp_path, "none", None, image=True))
    deadly = {"PYTHONPATH": str(FIXTURES / "deadly"), "MMDATA_TEST_DEADLY": "1"}
    codes = _codes("run", recipe, "--runner", "inline", **deadly)
    assert codes == [-signal.SIGABRT] * 3 + [0]
    found = _values(mmdata.open(document["dataset"]), "faulty_value", "reason")
    assert found.pop(6) == (None, "worker_died")
    assert found == {n: (2.0 * n, None) for n in range(10) if n != 6}


def test_ctrl_c_stops_with_a_sentence_and_the_same_command_goes_on(tmp_path: Path) -> None:
    document = synthetic.make_dataset(tmp_path / "a", list(range(40)))
    export = {"format": "parquet", "path": str(tmp_path / "out")}
    step = _step(tmp_path, "none", None, slow_s=0.4)
    recipe = _written(tmp_path, {**document, "export": export}, step)
    command = [sys.executable, str(FIXTURES / "faulty.py"), "run", recipe, "--runner", "inline"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    _wait_for(lambda: len(faulty.calls(tmp_path / "log")) >= 2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "the same command goes on from here" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()

    done = _command("run", recipe, "--runner", "inline", "--quiet")
    assert (done.returncode, done.stderr) == (0, "")
    asked = faulty.asked(tmp_path / "log")
    assert set(asked) == set(range(40))
    assert max(asked.values()) <= 2  # the batch that was interrupted
    assert sum(asked.values()) <= 50

    other = synthetic.make_dataset(tmp_path / "b", list(range(40)))
    (tmp_path / "b" / "list.parquet").write_bytes((tmp_path / "a" / "list.parquet").read_bytes())
    _run({**other, "export": {**export, "path": str(tmp_path / "other")}}, step)
    ours, theirs = ({p.name: p.read_bytes() for p in (tmp_path / d).glob("*.parquet")} for d in ("out", "other"))
    assert ours == theirs
    assert ours


def _wait_for(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
