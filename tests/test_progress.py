"""Progress lines, with a clock that the test moves and a stream that the test reads."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import synthetic

import mmdata
from mmdata.progress import FetchLine, Progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_at_most_every_ten_seconds_and_at_the_end() -> None:
    out, clock = io.StringIO(), Clock()
    with Progress(stream=out, clock=clock) as progress, progress.step("score_clip", 1000) as step:
        step.advance(done=50, kept=40, failed=5)
        clock.now += 9.9
        step.advance(done=50, kept=40, failed=5)
        assert out.getvalue() == ""
        clock.now += 0.1
        # 10 s gone, 200 rows: 20 rows/s, so the other 800 take 40 s; 160 of 200 are 80 %, 10 of 200 are 5 %
        step.advance(done=100, kept=80, failed=0)
        first = "score_clip: 200/1,000 rows, 20 rows/s, kept 80.0 %, failed 5.0 %, 40 s left\n"
        assert out.getvalue() == first
        clock.now += 5
        step.advance(done=800, kept=0, failed=0)
        assert out.getvalue() == first
    # 1,000 rows in 15 s: 66.7 rows/s
    assert out.getvalue() == first + "score_clip: 1,000/1,000 rows, 67 rows/s, kept 16.0 %, failed 1.0 %, in 15 s\n"


def test_each_step_has_its_own_ten_seconds() -> None:
    out, clock = io.StringIO(), Clock()
    with Progress(stream=out, clock=clock) as progress:
        first = progress.step("fetch").__enter__()
        clock.now += 6
        second = progress.step("probe").__enter__()
        clock.now += 4
        first.advance(done=1)
        second.advance(done=1)
        assert out.getvalue() == "fetch: 1 rows, 0.1 rows/s\n"
        clock.now += 6
        first.advance(done=1)
        second.advance(done=1)
        assert out.getvalue().splitlines()[1:] == ["probe: 2 rows, 0.2 rows/s"]


def test_nothing_is_said_of_what_is_not_known() -> None:
    out, clock = io.StringIO(), Clock()
    with Progress(stream=out, clock=clock) as progress, progress.step("export"):
        pass
    assert out.getvalue() == "export: 0 rows, in 0 s\n"


def test_a_step_that_raises_says_stopped() -> None:
    out, clock = io.StringIO(), Clock()
    with pytest.raises(KeyboardInterrupt), Progress(stream=out, clock=clock) as progress:  # noqa: PT012
        with progress.step("fetch", 10_000) as step:
            step.advance(done=3)
            clock.now += 7322
            raise KeyboardInterrupt
    assert out.getvalue() == "fetch: 3/10,000 rows, 0.0 rows/s, in 2 h 02 min, stopped\n"


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_quiet_shows_nothing(stream: type[io.StringIO]) -> None:
    out, clock = stream(), Clock()
    with Progress(quiet=True, stream=out, clock=clock) as progress, progress.step("fetch", 10) as step:
        clock.now += 100
        step.advance(done=10, kept=10)
    assert out.getvalue() == ""


def test_live_lines_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    out, clock = Terminal(), Clock()
    with Progress(stream=out, clock=clock) as progress:
        with progress.step("score [clip]", 400) as step:
            clock.now += 10
            step.advance(done=100, kept=90, failed=1)
            assert progress._live is not None
            progress._live.refresh()
        with progress.step("export") as other:
            clock.now += 10
            other.advance(done=5)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    # 100 rows in 10 s, 300 to go at 10 rows/s
    assert re.search(r"score \[clip\] \S+ +100/400 rows, 10 rows/s, kept 90.0 %, failed 1.0 %, 30 s left", shown)
    last = shown.strip().splitlines()[-2:]
    assert "100/400 rows, 10 rows/s, kept 90.0 %, failed 1.0 %, in 10 s" in last[0]
    assert "5 rows, 0.5 rows/s, in 10 s" in last[1]


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    out = Terminal()
    with Progress(stream=out, clock=Clock()) as progress, progress.step("fetch") as step:
        step.advance(done=7)
    assert out.getvalue() == "fetch: 7 rows, in 0 s\n"


def test_counts_from_many_threads_add_up() -> None:
    out = io.StringIO()
    with Progress(stream=out, clock=Clock()) as progress, progress.step("hash", 80_000) as step:

        def work() -> None:
            for _ in range(10_000):
                step.advance(done=1, kept=1, failed=0)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (step.done, step.kept, step.failed) == (80_000, 80_000, 0)
    assert out.getvalue() == "hash: 80,000/80,000 rows, kept 100.0 %, failed 0.0 %, in 0 s\n"


def test_importing_progress_does_not_import_rich() -> None:
    code = "import sys, mmdata.progress; print('rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_fetching_tells_bytes_and_shares_of_finished_shards() -> None:
    out, clock = io.StringIO(), Clock()
    with Progress(stream=out, clock=clock) as progress:
        line = FetchLine(progress)
        line.begin(1000)
        clock.now += 10
        # 300 rows told, 200 of them in a finished shard: 150 ok, 50 failed, 30 MB in 10 s; 700 rows left at 30 a second
        line.tell(200)
        line.finish(200, 150, 30_000_000)
        line.tell(100)
        assert out.getvalue() == "fetch: 200/1,000 rows, 20 rows/s, 40 s left\n"
        clock.now += 10
        line.finish(100, 50, 30_000_000)
        line.tell(100)
        line.end()
    lines = out.getvalue().splitlines()[1:]
    assert lines[-1] == "fetch: 400/1,000 rows, 20 rows/s, 3.0 MB/s, ok 66.7 %, failed 33.3 %, in 20 s"


def test_a_row_that_is_kept_although_it_fails_is_not_counted_as_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 30 rows 0, 11 and 22 fail at each of three steps: kept, they are not 9 of 30; dropped, they are 3, once."""
    synthetic.register_all()
    recipe = synthetic.make_dataset(tmp_path, list(range(30)))
    three = [{"make_sevens": {"times": t, "as": f"by{t}"}} for t in (2, 3, 5)]
    for on_error, words in (("keep", "kept 100.0 %, failed 0.0 %"), ("drop", "kept 90.0 %, failed 10.0 %")):
        steps = [{"make_sevens": {**step["make_sevens"], "on_error": on_error}} for step in three]
        mmdata.run({**recipe, "steps": steps}, runner="inline", quiet=False)
        assert words in capsys.readouterr().err
