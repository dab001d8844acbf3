"""One unit of work: one pass over one shard, from base rows to committed columns. No Ray here.

In: a `PassContext` (the same for every shard) and a shard's newest files. Out: a `PassResult` with counts and the files
that now stand. What a bad row costs stands in `isolate`; what a dead worker costs is this: the rows it was working on
are found in the journal, everything else of the shard is computed and committed first, then they go one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from mmdata import next_shard
from mmdata.column_files import ColumnFile
from mmdata.filters import FilterEngine
from mmdata.shard_job import Lane, PassContext, ShardFiles, ShardJob, StepWork, journal_folder, lanes_of
from mmdata.survivors import COMPUTED, TRANSIENT, ShardView, Walk, walk
from mmdata.verdict_work import Settled, settle, settle_shard

__all__ = ["PassContext", "PassResult", "ShardFiles", "StepWork", "finished_pass", "journal_folder", "run_pass"]


@dataclass
class PassResult:
    """`work` maps position → what was done; `files` set name → the newest column file.

    `reads` are media reads, `decodes` pictures decoded in full.
    `settled` are the verdicts, after the last pass where nothing is to be tried again.
    """

    shard: int
    rows: int
    alive: int
    work: dict[int, StepWork]
    files: dict[str, ColumnFile] = field(default_factory=dict)
    reads: int = 0
    decodes: int = 0
    settled: Settled | None = None


def run_pass(
    context: PassContext,
    shard: int,
    rows_file: str,
    files: Mapping[str, ColumnFile],
    engine: FilterEngine,
    proven: frozenset[str] = frozenset(),
    earlier: str = "",
    then: ShardFiles | None = None,
) -> PassResult:
    """Compute what this pass still lacks for one shard, commit it, and say where the rows stand.

    `proven` names the sets of which some row is known to have succeeded elsewhere; `earlier` as in `settle`; `then` is
    the shard of the same pass that this process will most likely be given next.

    Rows that an earlier run or pass covered are not touched; where nothing is missing no media is read and no stage
    is opened. Every set of the pass has a column file for the shard afterwards, if only with `uncovered` rows.
    """
    its = ShardFiles(shard, rows_file, files)
    job = next_shard.taken(context, its) or ShardJob(context, its, engine)
    job.engine, job.proven = engine, proven
    try:
        if job.is_missing:
            job.compute(None if then is None else partial(next_shard.prepare, context, then))
        job.commit()
        states = [walk(job.view, mine, engine, before, final=True) for before, mine in job.lanes]
        made = _result(job.view, job.lanes, states, job.work)
        result = replace(made, files=job.files, reads=job.reads, decodes=job.decodes)
        if not context.verdicts or any(w.transient for w in result.work.values()):
            return result
        # Another attempt at the shard may have committed first, so that what stands is not what is in memory.
        stands, folder = {**files, **job.files}, context.verdicts
        settled = settle_shard(context.store, context.steps, shard, rows_file, stands, folder, earlier, engine)
        return replace(result, settled=settled)
    except BaseException:
        next_shard.let_go()
        raise
    finally:
        job.let_go()


def finished_pass(
    context: PassContext,
    shard: int,
    rows_file: str,
    files: Mapping[str, ColumnFile],
    engine: FilterEngine,
    earlier: str = "",
) -> PassResult | None:
    """The result of a pass that has nothing left to compute for this shard; None when it has."""
    if any(name not in files for name in context.sets.values()):
        return None
    view = ShardView(context.store, shard, rows_file, context.sets, files)
    view.expect(context.steps)
    lanes = lanes_of(context, view, engine)
    states = []
    for before, mine in lanes:
        states.append(walk(view, mine, engine, before, final=False))
        if states[-1].missing:
            return None
    result = _result(view, lanes, states, {b.step.position: StepWork() for b in lanes[0][1]})
    if context.verdicts:
        result.settled = settle(context.steps, view, states[0], context.verdicts, earlier)
    return result


def _result(view: ShardView, lanes: Sequence[Lane], states: Sequence[Walk], work: dict[int, StepWork]) -> PassResult:
    """Counted are the rows that reached a step on any track."""
    reached = {position: np.zeros(len(view), bool) for position in work}
    for (_, mine), state in zip(lanes, states, strict=True):
        for bound in mine:
            reached[bound.step.position] |= state.alive | (state.left >= bound.step.position)
    for bound in lanes[0][1]:
        was_in, done = reached[bound.step.position], work[bound.step.position]
        done.rows_in = int(was_in.sum())
        if bound.set_name:
            codes = view.columns(bound.set_name).codes[was_in]
            done.failed = int((codes != COMPUTED).sum())
            done.transient = int((codes == TRANSIENT).sum())
    return PassResult(view.shard, len(view), int(states[0].alive.sum()), work)
