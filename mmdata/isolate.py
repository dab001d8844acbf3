"""One batch of one stage, with the damage confined to the rows that cause it.

In: an open stage and a batch. Out: per row either the stage's own values or a `Failed`. What passes through as an
exception stops the worker: a broken promise (ContractError), a device that is gone (RetryableError), Ctrl-C.
What a dead worker was doing stands in the `worker_journal`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa

from mmdata.batch import BadBoxes, Batch
from mmdata.column_files import UNCOVERED
from mmdata.columns import is_aside, vector_rows
from mmdata.errors import ContractError, MissingMedia, MmdataError, RetryableError
from mmdata.media.image import DecodeError
from mmdata.operator_files import at
from mmdata.stage import Contract, Failed, Stage

__all__ = [
    "DeviceLost",
    "DeviceOutOfMemory",
    "FailsEverywhere",
    "RowResult",
    "StepTracker",
    "checked_columns",
    "compute_rows",
    "raise_not_opened",
]

SINGLE_FAILURES = 32  # so many rows failing alone in a row put the stage itself under suspicion

# Own column name → value, or why there is none.
RowResult = dict[str, Any] | Failed


class _OfStep(Exception):
    """An error that knows its step, also after a journey between processes."""

    def __init__(self, message: str, step: str) -> None:
        super().__init__(message, step)
        self.step = step

    def __str__(self) -> str:
        return str(self.args[0])


class DeviceOutOfMemory(_OfStep, RetryableError):
    """The accelerator ran out of memory after `open` had proved the shape: the worker is restarted once."""


class DeviceLost(RetryableError):
    """The accelerator reports an error that outlives the call: the worker is restarted."""


class FailsEverywhere(_OfStep, ContractError):
    """No row of the step has succeeded on this worker; the driver knows whether one has on another."""


@dataclass
class StepTracker:
    """What one worker knows of one stage: whether it ever worked, and a row it worked on."""

    name: str
    has_succeeded: bool = False
    singles_failed: int = 0
    unanswered: int = 0  # rows that failed alone for a transient reason, with no success since
    good: Batch | None = None
    opened: int = 0
    examples: dict[str, str] = field(default_factory=dict)  # kind → the first message seen


def compute_rows(stage: Stage[Any], contract: Contract, batch: Batch, tracker: StepTracker) -> list[RowResult]:
    """One result per row of `batch`, in order; rows whose media is missing or does not decode never reach the stage."""
    results: list[RowResult | None] = [None] * len(batch)
    if contract.pixels or "image" in contract.reads:
        for index, failure in _undecodable(contract, batch):
            results[index] = failure
    good = [i for i, r in enumerate(results) if r is None]
    if good:
        chosen = batch if len(good) == len(batch) else batch.take(good)
        for index, result in zip(good, _guarded(stage, contract, chosen, tracker), strict=True):
            results[index] = result
    return [r if r is not None else Failed("lost") for r in results]


def _undecodable(contract: Contract, batch: Batch) -> list[tuple[int, Failed]]:
    cache = batch.cache
    if cache is None:
        raise ContractError("a stage that reads media was given a batch without media")
    found = []
    for pixels in contract.pixels:
        batch.fill(pixels)
    for index, row in enumerate(batch.rows):
        if not cache.has_media(row):
            found.append((index, Failed("missing_media")))
            continue
        wanted = contract.pixels
        tries = (cache.error(row, p) for p in wanted) if wanted else iter([cache.unreadable(row)])
        error = next(filter(None, tries), None)
        if error is not None:
            found.append((index, _media_failure(error)))
    return found


def _media_failure(error: Exception) -> Failed:
    if isinstance(error, MissingMedia):
        return Failed("media", transient=True) if error.transient else Failed("missing_media")
    if isinstance(error, MmdataError):
        raise error
    if isinstance(error, DecodeError):
        return Failed(error.kind)
    if isinstance(error, OSError):
        return Failed("media_read", transient=True)
    if isinstance(error, BadBoxes):
        return Failed("bad_boxes")
    return Failed("decode")


def _guarded(stage: Stage[Any], contract: Contract, batch: Batch, tracker: StepTracker) -> list[RowResult]:
    """Compute; on an exception of the data, halve until the row is alone. The decoded pictures are shared."""
    try:
        results = _checked(stage, contract, batch)
    except RetryableError as error:
        failure, detail = Failed("retryable", transient=True), str(error)
    except MmdataError:
        raise
    except Exception as error:  # noqa: BLE001  row isolation: whatever the stage raises becomes its rows' reason
        _raise_if_device(tracker.name, error)
        failure, detail = _as_failure(error), f"{type(error).__name__}: {error}{at(error)}"
    else:
        _note_success(batch, results, tracker)
        return results
    if failure.transient and tracker.unanswered >= SINGLE_FAILURES:
        # What the stage asks is down: one question a batch is enough, all rows are tried again later anyway.
        return [failure] * len(batch)
    if len(batch) == 1:
        tracker.examples.setdefault(failure.kind, detail[:300])
        if failure.transient:
            tracker.unanswered += 1
        else:
            _suspect_stage(stage, contract, tracker, detail)
        return [failure]
    middle = len(batch) // 2
    halves = (range(middle), range(middle, len(batch)))
    return [r for half in halves for r in _guarded(stage, contract, batch.take(half), tracker)]


def _note_success(batch: Batch, results: Sequence[RowResult], tracker: StepTracker) -> None:
    for index, result in enumerate(results):
        if not isinstance(result, Failed):
            tracker.has_succeeded = True
            tracker.singles_failed = tracker.unanswered = 0
            if tracker.good is None:
                tracker.good = batch.take([index]).apart()
            return


def _suspect_stage(stage: Stage[Any], contract: Contract, tracker: StepTracker, detail: str) -> None:
    """After many rows failed alone, ask whether it is the rows or the stage."""
    tracker.singles_failed += 1
    if tracker.singles_failed < SINGLE_FAILURES:
        return
    if not tracker.has_succeeded:
        raise FailsEverywhere(
            f"step {tracker.name} failed on every row it tried ({tracker.singles_failed} of them alone), last with "
            f"{detail}; mend the stage or its options and run again",
            tracker.name,
        )
    tracker.singles_failed = 0
    if tracker.good is not None:
        try:
            _checked(stage, contract, tracker.good)
        except Exception as error:
            _raise_if_device(tracker.name, error)
            if _as_failure(error).transient:
                return
            raise ContractError(
                f"step {tracker.name} now fails on a row it had computed ({type(error).__name__}: {error}), "
                f"so the stage is broken, not the rows; run again"
            ) from error


def _as_failure(error: Exception) -> Failed:
    if isinstance(error, TimeoutError):
        return Failed("timeout", transient=True)
    if isinstance(error, ConnectionError):
        return Failed("connect", transient=True)
    return Failed(type(error).__name__)


def raise_not_opened(step: str, error: Exception) -> NoReturn:
    """Say whose it is that a stage could not be opened: the device's, the network's, or its author's."""
    if isinstance(error, MmdataError):
        raise error
    _raise_if_device(step, error)
    text = f"step {step} could not be opened ({type(error).__name__}: {error}{at(error)})"
    if _as_failure(error).transient:
        raise RetryableError(f"{text}; the same command tries again") from error
    raise ContractError(f"{text}; mend the stage or its options and run again") from error


def _raise_if_device(step: str, error: Exception) -> None:
    names = {c.__name__ for c in type(error).__mro__}
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "OutOfMemoryError" in names:
        raise DeviceOutOfMemory(f"step {step}: the accelerator is out of memory ({text})", step) from error
    if "AcceleratorError" in names or "CUDA error" in text or "CUBLAS_STATUS" in text:
        raise DeviceLost(f"step {step}: the accelerator failed ({text})") from error


def _checked(stage: Stage[Any], contract: Contract, batch: Batch) -> list[RowResult]:
    return checked_columns(stage.name, contract, stage.compute(batch), len(batch))


def checked_columns(operator: str, contract: Contract, answer: Any, rows: int) -> list[RowResult]:
    """An operator's answer as one result per row; ContractError when its names or lengths are not as promised.

    One `Failed` cell fails the row in all columns; NaN and infinities fail it as `not_finite`. A value that does not
    fit its declared type raises what Arrow raises.
    """
    promised = contract.writes.names
    if not isinstance(answer, Mapping) or sorted(answer) != sorted(promised):
        got = sorted(answer) if isinstance(answer, Mapping) else type(answer).__name__
        raise ContractError(f"{operator} must return columns {sorted(promised)}, but returned {got}")
    columns = {f.name: _cells(operator, f, answer[f.name], rows) for f in contract.writes}
    results: list[RowResult] = []
    for index in range(rows):
        row = {name: cells[index] for name, cells in columns.items()}
        failed = next((v for v in row.values() if isinstance(v, Failed)), None)
        if failed is not None and (failed.kind in ("", UNCOVERED) or failed.kind.startswith("!")):
            raise ContractError(f"{operator} failed a row with the kind {failed.kind!r}, which is taken; use another")
        results.append(failed or row)
    _convertible(contract.writes, results)
    return results


def _cells(operator: str, field: pa.Field, values: Any, rows: int) -> list[Any]:
    is_arrow = isinstance(values, pa.Array | pa.ChunkedArray)
    if is_arrow and is_aside(field) and values.type == field.type:
        cells = vector_rows(values)
    else:
        cells = values.to_pylist() if is_arrow else list(values)
    if len(cells) != rows:
        raise ContractError(f"{operator} returned {len(cells)} values of {field.name} for {rows} rows")
    if is_aside(field):
        return [_vector(v, field.type.value_type.to_pandas_dtype()) for v in cells]
    largest = _largest(field.type)
    return [_plain(v, largest) for v in cells]


def _vector(value: Any, kind: Any) -> Any:
    """An embedding as one numpy array: as Python's numbers a shard of them would take gigabytes."""
    if value is None or isinstance(value, Failed):
        return value
    with np.errstate(over="ignore"):
        vector = np.asarray(value, kind)
    return vector if np.isfinite(vector).all() else Failed("not_finite")


def _largest(kind: pa.DataType) -> float:
    """The largest magnitude that is still finite once it is stored."""
    while pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    narrow = pa.types.is_float16(kind) or pa.types.is_float32(kind)
    return float(np.finfo(kind.to_pandas_dtype()).max) if narrow else sys.float_info.max


def _plain(value: Any, largest: float) -> Any:
    """Numpy scalars as Python's; NaN and infinities, also inside lists, as a failure."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return value if _is_finite(value, largest) else Failed("not_finite")


def _is_finite(value: Any, largest: float) -> bool:
    if isinstance(value, float):
        return abs(value) <= largest  # False for NaN
    if isinstance(value, list | tuple):
        return all(_is_finite(v, largest) for v in value)
    return not isinstance(value, dict) or all(_is_finite(v, sys.float_info.max) for v in value.values())


def _convertible(schema: pa.Schema, results: Sequence[RowResult]) -> None:
    """Raises where a value does not fit its declared type, so that isolation finds the row."""
    for item in schema:
        pa.array([r[item.name] for r in results if not isinstance(r, Failed)], item.type)
