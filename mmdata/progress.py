"""Progress of a run: one line per step with done/total, rows per second, kept, failed and time left.

On a terminal the lines are live (rich); elsewhere, in a log file or a pipe, a plain line per step at most every ten
seconds and one at its end. Everything goes to stderr, so that stdout stays what a command answers.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as LiveLines
    from rich.progress import TaskID

__all__ = ["FetchLine", "Progress", "Step"]

PLAIN_INTERVAL_S = 10.0


class Progress:
    """The lines of one run, a context manager; safe to use from several threads.

    `quiet`: nothing is shown. `stream`: where to, stderr unless given; live lines only where it is a terminal.
    `clock` gives seconds.
    """

    def __init__(
        self, quiet: bool = False, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.quiet = quiet
        self.clock = clock
        self.lock = threading.RLock()
        self._stream = stream or sys.stderr
        self._on_terminal = not quiet and self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._live: LiveLines | None = None

    def step(self, name: str, total: int | None = None) -> Step:
        """A line for one step; `total` rows are to come, None = not known (no share and no time left are shown)."""
        return Step(self, name, total)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.lock:
            if self._live is not None:
                self._live.stop()
                self._live = None

    def _live_lines(self) -> LiveLines | None:
        """The live display, started when the first step begins; None where lines are plain or nothing is shown."""
        if self._live is None and self._on_terminal:
            from rich.console import Console
            from rich.progress import BarColumn, SpinnerColumn, TextColumn
            from rich.progress import Progress as LiveLines

            self._live = LiveLines(
                SpinnerColumn(finished_text="✓"),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[figures]}", markup=False),
                console=Console(file=self._stream),
                refresh_per_second=4,
            )
            self._live.start()
        return self._live

    def _print(self, line: str) -> None:
        if not self.quiet:
            self._stream.write(line + "\n")
            self._stream.flush()


class Step:
    """The line of one step, a context manager: it counts rows, and says how the step ended when it is left."""

    def __init__(self, progress: Progress, name: str, total: int | None) -> None:
        self.name = name
        self.total = total
        self.done = 0
        self.kept: int | None = None
        self.failed: int | None = None
        self.kept_word = "kept"
        self.judged: int | None = None  # rows of which it is known whether they are kept; None = all that are done
        self.mb_per_s: float | None = None
        self._progress = progress
        self._begun = self._printed = progress.clock()
        self._live: LiveLines | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Step:
        with self._progress.lock:
            self._begun = self._printed = self._progress.clock()
            self._live = self._progress._live_lines()
            if self._live is not None:
                self._task = self._live.add_task(self.name, total=self.total, figures=self.figures())
        return self

    def advance(self, done: int = 0, kept: int | None = None, failed: int | None = None) -> None:
        """Count rows that are done, and how many of them were kept and failed; None = this step does not say."""
        with self._progress.lock:
            self.done += done
            if kept is not None:
                self.kept = (self.kept or 0) + kept
            if failed is not None:
                self.failed = (self.failed or 0) + failed
            if self._live is not None and self._task is not None:
                self._live.update(self._task, completed=self.done, figures=self.figures())
            elif self._live is None and self._progress.clock() - self._printed >= PLAIN_INTERVAL_S:
                self._printed = self._progress.clock()
                self._progress._print(f"{self.name}: {self.figures()}")

    def say(self, text: str) -> None:
        """Show a line of text under the step's name, for good."""
        with self._progress.lock:
            if self._live is not None:
                self._live.console.print(f"{self.name}: {text}", markup=False, highlight=False)
            else:
                self._progress._print(f"{self.name}: {text}")

    def figures(self, ended: bool = False) -> str:
        """`1,200/5,000 rows, 310 rows/s, kept 83.1 %, failed 0.4 %, 12 s left`, as far as it is known."""
        seconds = self._progress.clock() - self._begun
        rate = self.done / seconds if seconds > 0 else 0.0
        parts = [f"{self.done:,}/{self.total:,} rows" if self.total is not None else f"{self.done:,} rows"]
        if rate:
            parts.append(f"{rate:,.0f} rows/s" if rate >= 10 else f"{rate:.1f} rows/s")
        if self.mb_per_s is not None:
            parts.append(f"{self.mb_per_s:,.1f} MB/s")
        judged = self.done if self.judged is None else self.judged
        for word, count in ((self.kept_word, self.kept), ("failed", self.failed)):
            if count is not None and judged:
                parts.append(f"{word} {100 * count / judged:.1f} %")
        if ended:
            parts.append(f"in {_duration(seconds)}")
        elif rate and self.total is not None and self.total > self.done:
            parts.append(f"{_duration((self.total - self.done) / rate)} left")
        return ", ".join(parts)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._progress.lock:
            figures = self.figures(ended=True) + ("" if kind is None else ", stopped")
            if self._live is None:
                self._progress._print(f"{self.name}: {figures}")
            elif self._task is not None:
                # A total that was never known would leave the bar moving for ever.
                total = self.total if kind is not None and self.total is not None else max(self.done, 1)
                done = total if kind is None else self.done
                self._live.update(self._task, completed=done, total=total, figures=figures)
                self._live.stop_task(self._task)


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class FetchLine:
    """The line of fetching, made by its first shard; rows are told as they come, and again shard by shard.

    What share of them is ok, and how many bytes came, is known of finished shards only.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._step: Step | None = None
        self._told = self._finished = self._shown = self._bytes = 0
        self._begun = 0.0

    def begin(self, total: int | None = None) -> None:
        """There is a shard to fetch; `total` rows are to come with it, None = not known."""
        if self._step is None:
            self._begun = self._progress.clock()
            self._step = self._progress.step("fetch", total).__enter__()
            self._step.kept_word = "ok"

    def tell(self, rows: int) -> None:
        """So many more rows are fetched, of a shard that goes on."""
        self._told += rows
        self._show()

    def finish(self, rows: int, kept: int, fetched_bytes: int = 0) -> None:
        """A shard is done; `kept` of its `rows` have media, for which so many bytes came."""
        self._finished += rows
        self._bytes += fetched_bytes
        if self._step is not None:
            seconds = self._progress.clock() - self._begun
            self._step.judged = self._finished
            self._step.mb_per_s = self._bytes / 1e6 / seconds if seconds > 0 else None
            self._step.advance(kept=kept, failed=rows - kept)
        self._show()

    def _show(self) -> None:
        rows = max(self._told, self._finished)
        if self._step is not None and rows > self._shown:
            self._step.advance(done=rows - self._shown)
            self._shown = rows

    def end(self) -> None:
        """Nothing more is fetched."""
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None
