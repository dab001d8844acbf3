"""The stages a worker process has open: each is opened once, for all shards, and closed when its pass is over.

In: a step as it is bound to its column set. Out: its open stage, with what is known of how it fares. What `open` raises
comes out as whose it is: see `raise_not_opened`.
"""

from __future__ import annotations

from typing import Any

from mmdata.isolate import StepTracker, raise_not_opened
from mmdata.stage import Stage
from mmdata.survivors import BoundStep
from mmdata.worker_journal import Journal

__all__ = ["close_stages", "opened"]

_open_stages: dict[str, tuple[Stage[Any], StepTracker]] = {}


def opened(bound: BoundStep, journal: Journal) -> tuple[Stage[Any], StepTracker]:
    """The stage of a column set, opened once per worker process."""
    if bound.set_name not in _open_stages:
        operator = bound.step.operator
        assert operator is not None
        assert issubclass(operator, Stage)
        stage = operator(bound.step.options)
        stage.batch_shape = bound.resolved.batch_shape
        stage.precision = bound.resolved.precision
        journal.opening(bound.step.name)
        try:
            stage.open(bound.resolved.device)
        except Exception as error:  # noqa: BLE001  raised again, as whose it is
            raise_not_opened(bound.step.name, error)
        tracker = StepTracker(bound.step.name, opened=1)
        _open_stages[bound.set_name] = (stage, tracker)
    return _open_stages[bound.set_name]


def close_stages() -> None:
    """Let go of every stage this process has open."""
    while _open_stages:
        _, (stage, _tracker) = _open_stages.popitem()
        stage.close()
