"""What a run has done so far, step by step, and whether too many rows of a step failed.

In: what came back of a pass over a shard. Out: the counts of the run's report and record, the progress line.
BudgetError when more rows of a step failed than its `max_failed` allows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from mmdata.errors import BudgetError
from mmdata.plan import PlannedStep
from mmdata.progress import Step
from mmdata.work import PassResult, StepWork

__all__ = ["BUDGET_FROM_ROWS", "Tally", "from_sums", "sums_of"]

BUDGET_FROM_ROWS = 200


class Tally:
    """Counts of one run. `work` maps step name → what was done for it; `media_reads` are reads by its workers."""

    def __init__(self) -> None:
        self.work: dict[str, StepWork] = {}
        self.media_reads = 0
        self._counted: dict[int, dict[int, tuple[int, int]]] = {}  # shard to come again → position → rows in, failed

    def take(self, result: PassResult, steps: Mapping[int, PlannedStep], line: Step | None) -> bool:
        """Count a shard's pass; True when rows of it failed for a transient reason.

        Transient failures have their turn again before anybody counts them: `line` is None for a shard that comes back
        after some, and counts instead of what it was counted with before.
        """
        self.media_reads += result.reads
        before = self._counted.pop(result.shard, {})
        is_open = any(done.transient for done in result.work.values())
        for position, done in result.work.items():
            step = steps[position]
            total = self.work.setdefault(step.name, StepWork())
            total.computed += done.computed
            total.seconds += done.seconds
            total.opened += done.opened
            total.examples.update(done.examples)
            now, (rows_in, failed) = (done.rows_in, done.failed - done.transient), before.get(position, (0, 0))
            total.rows_in += now[0] - rows_in
            total.failed += now[1] - failed
            if is_open:
                self._counted.setdefault(result.shard, {})[position] = now
            self.require(step, total)
        if line is not None:  # a row that `on_error: keep` keeps may fail at many steps, and is among the kept
            lost = sum(w.failed for p, w in result.work.items() if steps[p].on_error == "drop")
            line.advance(done=result.rows, kept=result.alive, failed=lost)
        return is_open

    def require(self, step: PlannedStep, total: StepWork) -> None:
        """BudgetError when too many of the rows that a step took in failed."""
        if step.kind == "filter" or total.rows_in < BUDGET_FROM_ROWS or total.failed <= step.max_failed * total.rows_in:
            return
        example = next(iter(total.examples.items()), None)
        why = f", for example {example[0]} ({example[1]})" if example else ""
        raise BudgetError(
            f"step {step.name}: {total.failed} of {total.rows_in} rows failed{why}, more than its max_failed of "
            f"{step.max_failed:.0%}; look at them with mmdata sql, then mend the step or raise its max_failed"
        )

    def take_group(self, step: PlannedStep, rows: int, failed: int, computed: int, seconds: float) -> None:
        """Count what a group did over the whole dataset; `rows` went in, `failed` of them have no value now."""
        total = self.work.setdefault(step.name, StepWork())
        total.rows_in, total.failed = rows, failed
        total.computed, total.seconds = computed, seconds
        self.require(step, total)


def sums_of(result: PassResult) -> list[int]:
    """What the coverage log keeps of a finished pass: rows, alive, then rows in and failed of each step in order."""
    found = [result.rows, result.alive]
    for _, done in sorted(result.work.items()):
        found += [done.rows_in, done.failed]
    return found


def from_sums(sums: Sequence[int], positions: Iterable[int]) -> PassResult:
    """Back, of one shard or of many together; as of no shard in particular."""
    pairs = zip(sums[2::2], sums[3::2], strict=True)
    work = {p: StepWork(rows_in=r, failed=f) for p, (r, f) in zip(sorted(positions), pairs, strict=True)}
    return PassResult(-1, sums[0], sums[1], work)
