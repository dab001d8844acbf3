"""The order of rows sorted out of core, beside the filters' engine, which sorts them in memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mmdata.errors import RecipeError, StoreError
from mmdata.filters import FilterEngine, check_order
from mmdata.row_order import order_of_parts

ROWS = 5_000


def table() -> pa.Table:
    rng = np.random.default_rng(4)
    numbers = rng.integers(-9, 9, ROWS)
    return pa.table(
        {
            "row_id": np.arange(ROWS) * 3,
            "number": pa.array(numbers, pa.int64(), mask=rng.random(ROWS) < 0.1),
            "share": pa.array(np.where(numbers > 5, np.nan, numbers / 3), pa.float32()),
            "words": pa.array([f"{'ä' * (n % 3)}{n}" for n in numbers.tolist()]),
            "Position": pa.array(rng.integers(0, 50, ROWS)),
        }
    )


def order(whole: pa.Table, terms: list[str], scratch: Path, part_rows: int) -> list[int]:
    checked = [check_order("prefer", t, whole.schema) for t in terms]
    parts = (whole.slice(first, part_rows) for first in range(0, len(whole), part_rows))
    into = np.full(len(whole), -1)
    order_of_parts(parts, checked, scratch, into)
    assert into.tolist() == FilterEngine().order(whole, checked).tolist()
    return into.tolist()


@pytest.mark.parametrize("part_rows", [300, ROWS])
@pytest.mark.parametrize(
    "terms",
    [
        ["number desc"],
        ["words", "number desc nulls first"],
        ["share desc", "position"],
        ["row_id desc"],
        ["9223372036854775807 - number"],  # raises where the number is below 0: NULL there
    ],
)
def test_as_the_engine_sorts_a_table(terms: list[str], part_rows: int, tmp_path: Path):
    assert sorted(order(table(), terms, tmp_path, part_rows)) == list(range(ROWS))


def test_a_term_that_only_fails_on_values(tmp_path: Path):
    whole = table()
    with pytest.raises(RecipeError, match="the order"):
        order(whole, ["words LIKE 'x' ESCAPE words"], tmp_path, 300)


def test_what_a_part_raises_is_raised(tmp_path: Path):
    whole = table()
    checked = [check_order("prefer", "number", whole.schema)]

    def parts() -> Iterator[pa.Table]:
        yield whole.slice(0, 100)
        raise StoreError("a shard is gone")

    with pytest.raises(StoreError, match="a shard is gone"):
        order_of_parts(parts(), checked, tmp_path, np.zeros(ROWS, np.int64))
    with pytest.raises(StoreError, match="100 of 5000 rows"):
        order_of_parts(iter([whole.slice(0, 100)]), checked, tmp_path, np.zeros(ROWS, np.int64))


@pytest.mark.long
def test_many_rows_are_sorted_in_scratch(tmp_path: Path):
    """Text of 600 MB, of which DuckDB may hold 200 MB."""
    rows, part_rows = 3_000_000, 50_000
    schema = pa.schema([("row_id", pa.int64()), ("words", pa.string())])

    def parts() -> Iterator[pa.Table]:
        for first in range(0, rows, part_rows):
            numbers = np.arange(first, first + part_rows)
            words = [f"{n * 7919 % rows:0200d}" for n in numbers.tolist()]
            yield pa.table([pa.array(numbers), pa.array(words)], schema=schema)

    def anonymous_mb() -> int:
        status = Path("/proc/self/status").read_text()
        return int(re.findall(r"RssAnon:\s+(\d+) kB", status)[0]) // 1024

    def watched() -> Iterator[pa.Table]:
        for part in parts():
            peaks.append(anonymous_mb())
            yield part

    before, peaks = anonymous_mb(), [0]
    into = np.zeros(rows, np.int64)
    order_of_parts(watched(), [check_order("prefer", "words", schema)], tmp_path, into)
    assert np.array_equal(into * 7919 % rows, np.arange(rows))
    assert max(peaks) - before < 400
