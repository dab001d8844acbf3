"""Which pictures a worker was decoding when it died, so that the one that killed it costs a row and not its shard.

An append-only file in node scratch, a line for each picture that goes into a decoder and one for each that comes out:
`s <run>` begins an attempt, `e` ends it in order, `+7` and `-7` are row 7 of the shard going in and coming out.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmdata.errors import RetryableError

__all__ = ["IngestJournal", "forget_ingests"]

DEATHS_ALONE = 2  # a picture that killed its worker so often while alone is given up
DEATHS_IN_A_ROW = 20  # so many deaths with no picture decoded in between are not the pictures' doing
DEATHS_UNEXPLAINED = 3  # nor are so many in a row with no picture in a decoder


class IngestJournal:
    """The journal of one shard's ingest; `with journal:` around an attempt, `with journal.decoding(row):` in threads.

    `run` is as in `isolate.Journal`: what another run's workers were doing at their end charges nobody. After entering,
    `suspects` are the rows to be decoded first and one at a time, `given_up` those not to be decoded at all.
    Entering raises RetryableError when one worker after the other has died of something else.
    """

    def __init__(self, path: Path, run: str = "") -> None:
        self._path = path
        self._run = run
        self._file = -1
        self.suspects: list[int] = []
        self.given_up: frozenset[int] = frozenset()

    def __enter__(self) -> IngestJournal:
        self._look_back()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._note(f"s {self._run}")
        return self

    def __exit__(self, *_: object) -> None:
        self._note("e")
        os.close(self._file)
        self._file = -1

    @contextmanager
    def decoding(self, row: int) -> Iterator[None]:
        """Around the decoding of one row's picture, in the thread that does it."""
        self._note(f"+{row}")
        try:
            yield
        finally:
            self._note(f"-{row}")

    def forget(self) -> None:
        """The shard is committed: nothing is to be remembered."""
        self._path.unlink(missing_ok=True)

    def _note(self, line: str) -> None:
        # One write to a file opened for appending: lines of several threads never mix.
        if self._file >= 0:
            os.write(self._file, f"{line}\n".encode())

    def _look_back(self) -> None:
        """Read what earlier attempts were doing when they ended."""
        try:
            text = self._path.read_text(errors="replace")
        except FileNotFoundError:
            return
        deaths: Counter[int] = Counter()
        suspects: set[int] = set()
        in_a_row = unexplained = 0
        for attempt in text.split("s ")[1:]:
            run, *lines = attempt.split("\n")
            inside = _inside(lines)
            in_a_row = 0 if any(line.startswith("-") for line in lines) else in_a_row
            if "e" in lines or run not in ("", self._run):
                continue
            # Of the user's own process it is the user who may have killed it.
            unexplained = 0 if inside or not run else unexplained + 1
            in_a_row += bool(inside)
            suspects |= inside
            deaths.update(inside if len(inside) == 1 else ())
        if in_a_row >= DEATHS_IN_A_ROW or unexplained >= DEATHS_UNEXPLAINED:
            self.forget()
            raise RetryableError(
                f"{max(in_a_row, unexplained)} workers died one after the other while they fetched one shard, and not "
                "of one picture; look at the machine's memory and its image libraries, then the same command goes on"
            )
        self.given_up = frozenset(row for row, count in deaths.items() if count >= DEATHS_ALONE)
        # Rows that have killed a worker alone come last, so that the others' innocence is on record by then.
        self.suspects = sorted(suspects - self.given_up, key=lambda row: (deaths[row], row))


def forget_ingests(folder: Path) -> None:
    """Every shard is in; a worker that was stopped between its shard's commit and `forget` has left its journal."""
    for journal in folder.glob("ingest-*"):
        journal.unlink(missing_ok=True)


def _inside(lines: list[str]) -> set[int]:
    """The rows that went in and did not come out; a line cut short by the end of its process tells nothing."""
    found: set[int] = set()
    for line in lines:
        sign, digits = line[:1], line[1:]
        if digits.isdecimal():
            (found.add if sign == "+" else found.discard)(int(digits))
    return found
