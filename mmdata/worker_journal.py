"""What a worker was doing when it died, so that the next one can find the row that killed it.

One file in node scratch for each column set and shard being computed. In: what is begun and ended. Out: the rows that
are under suspicion, and how often each has killed a worker while it was alone. RetryableError when workers die one
after the other, whatever they were given.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from mmdata.errors import RetryableError
from mmdata.lease import ProcessId

__all__ = ["Journal"]

DEATHS_ALONE = 2  # a row that killed its worker so often while alone is given up
DEATHS_IN_A_ROW = 20  # so many deaths with no row done in between are not the rows' doing
DEATHS_OPENING = 3  # so many deaths while a stage was opened are not the rows' doing either


class Journal:
    """What a worker is computing for one (column set, shard), in node scratch: it outlives the worker.

    `suspects` are rows that were in a batch when a worker died; `deaths` counts workers lost while a row was alone.
    `run` is the run that starts and stops the workers, empty where the worker is the user's own process: what another
    run's workers were doing at their end charges nobody, for that run may have stopped them itself. Where it notes
    what is done beside other work, `is_alone` is false: one row in it is a suspect, but was not alone.
    `of_others` is for what another worker may be writing just now: as long as it lives, nobody is charged.
    """

    def __init__(self, path: Path, run: str = "", is_alone: bool = True, of_others: bool = False) -> None:
        self._path = path
        self._is_alone = is_alone
        self._of_others = of_others
        self._run = run
        self._running: list[int] = []
        self._is_running_alone = is_alone
        self._lost_in_a_row = 0
        self._openings = 0
        self.suspects: list[int] = []
        self.deaths: dict[int, int] = {}
        self._load()

    def _load(self) -> None:
        try:
            document = json.loads(self._path.read_text())
            running = [int(r) for r in document["running"]]
            suspects = [int(r) for r in document["suspects"]]
            deaths = {int(r): int(n) for r, n in document["deaths"].items()}
            lost, openings = int(document["lost_in_a_row"]), int(document["openings"])
            is_ours = document["run"] in ("", self._run)
            was_alone, worker = bool(document["alone"]), ProcessId.from_token(str(document["worker"]))
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError, AttributeError):
            # A journal cut short by a full scratch disk tells nothing; it charges nobody.
            return
        self.suspects, self.deaths = suspects, deaths
        if self._of_others and worker is not None and not worker.is_dead():
            return
        if is_ours:
            self._openings = openings
            self._lost_in_a_row = lost + 1 if running else lost
            self.suspects = sorted({*suspects, *running})
            if len(running) == 1 and was_alone:
                self.deaths[running[0]] = self.deaths.get(running[0], 0) + 1
        self._save()

    def opening(self, step: str) -> None:
        """To be called before the stage is opened; RetryableError when that has killed several workers."""
        if self._openings >= DEATHS_OPENING:
            self.end()
            raise RetryableError(
                f"step {step}: {DEATHS_OPENING} workers died while they opened the stage, most likely for want of "
                "memory; give it more, or a smaller model, and the same command goes on"
            )
        self._openings += 1
        self._save()

    def begin(self, row_ids: Sequence[int], step: str, is_alone: bool = True) -> None:
        """To be called before a batch: from here on, a death is these rows', or may be where they are not alone.

        RetryableError when one worker after the other has died with nothing done in between: then it is not the rows.
        """
        self._openings = 0
        if self._lost_in_a_row >= DEATHS_IN_A_ROW:
            self._lost_in_a_row, self.suspects, self.deaths = 0, [], {}
            self._save()
            raise RetryableError(
                f"step {step}: {DEATHS_IN_A_ROW} workers died one after the other, whatever rows they were given; "
                "look at the machine's memory, its device and the stage's libraries, then the same command goes on"
            )
        self._running, self._is_running_alone = [int(r) for r in row_ids], self._is_alone and is_alone
        self._save()

    def end(self) -> None:
        """The batch is through, or was stopped by an exception: nobody is charged."""
        self._running, self._lost_in_a_row, self._openings = [], 0, 0
        self._save()

    def given_up(self, row: int) -> bool:
        """Whether the row has killed its worker alone as often as it may."""
        return self.deaths.get(row, 0) >= DEATHS_ALONE

    def clear(self, rows: Sequence[int]) -> None:
        """The shard is through: what became of these rows is committed."""
        done = set(rows)
        self._lost_in_a_row = 0
        self.suspects = [r for r in self.suspects if r not in done]
        self.deaths = {r: n for r, n in self.deaths.items() if r not in done}
        self._save()

    def _save(self) -> None:
        if not (self._running or self.suspects or self.deaths or self._lost_in_a_row or self._openings):
            self._path.unlink(missing_ok=True)
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "run": self._run,
            "worker": ProcessId.current().token(),
            "alone": self._is_running_alone,
            "running": self._running,
            "suspects": self.suspects,
            "deaths": {str(r): n for r, n in self.deaths.items()},
            "lost_in_a_row": self._lost_in_a_row,
            "openings": self._openings,
        }
        temporary = self._path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(document))
        temporary.replace(self._path)
