"""Exact clusters against SQL window functions."""

from __future__ import annotations

from typing import Any

import duckdb
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdata.errors import RecipeError
from mmdata.groups.exact_duplicates import ExactDuplicates, ExactDuplicatesOptions


def rows_of(**columns: Any) -> pa.Table:
    """Rows in visit order; row_ids are not in that order, as after `prefer`."""
    n = len(next(iter(columns.values())))
    ids = pa.array([(i * 7919) % 100_003 for i in range(n)], pa.int64())
    return pa.table({"row_id": ids, "key": [f"k{i:05d}" for i in range(n)], **columns})


def compute(rows: pa.Table, *of: str) -> dict[str, list[Any]]:
    columns = ExactDuplicates(ExactDuplicatesOptions(of=list(of))).compute(rows)
    prefix = "exact_duplicates_"
    found = {name.removeprefix(prefix): values for name, values in columns.items()}
    return {k: v.to_pylist() if hasattr(v, "to_pylist") else v.tolist() for k, v in found.items()}


def test_by_hand():
    rows = rows_of(sha256=["a", "b", "a", None, "a", None, "b"])
    ids = rows.column("row_id").to_pylist()
    found = compute(rows, "sha256")
    assert found["rank"] == [1, 1, 2, 1, 3, 1, 2]
    assert found["count"] == [3, 2, 3, 1, 3, 1, 2]
    assert found["id"] == [ids[i] for i in (0, 1, 0, 3, 0, 5, 1)]
    assert found["of"] == ["k00000", "k00001", "k00000", "k00003", "k00000", "k00005", "k00001"]


ORACLE = """
WITH numbered AS (SELECT *, row_number() OVER () AS visit FROM rows),
coded AS (SELECT *, CASE WHEN {any_null} THEN 'null' || visit::VARCHAR ELSE 'v' END AS apart FROM numbered)
SELECT first_value(row_id) OVER w AS id, row_number() OVER w AS rank, first_value(key) OVER w AS of_key,
       count(*) OVER (PARTITION BY apart, {of}) AS count
FROM coded WINDOW w AS (PARTITION BY apart, {of} ORDER BY visit) ORDER BY visit
"""

SMALL = st.lists(
    st.tuples(
        st.sampled_from([None, "a", "A", "", "a\x00", "ä", "a\u0308"]),
        st.sampled_from([None, 0, 1, 2**62]),
        st.sampled_from([None, True, False]),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(values=SMALL, of=st.permutations(["x", "y", "z"]), many=st.integers(1, 3), chunk=st.integers(1, 20))
def test_equals_sql(values: list[tuple[Any, ...]], of: list[str], many: int, chunk: int):
    of = of[:many]
    x, y, z = ([v[i] for v in values] for i in range(3))
    rows = rows_of(x=pa.array(x, pa.string()), y=pa.array(y, pa.int64()), z=pa.array(z, pa.bool_()))
    any_null = " OR ".join(f"{c} IS NULL" for c in of)
    expected = duckdb.sql(ORACLE.format(any_null=any_null, of=", ".join(of))).fetchall()
    pieces = [rows.slice(start, chunk) for start in range(0, len(rows), chunk)]
    found = compute(pa.concat_tables(pieces) if pieces else rows, *of)
    assert list(zip(found["id"], found["rank"], found["of"], found["count"], strict=True)) == expected


def test_codes_of_several_columns_do_not_overflow():
    n = 20_000
    columns = {f"c{i}": [f"{i}-{(j * (i + 3)) % n}" for j in range(n)] for i in range(6)}
    found = compute(rows_of(**columns), *columns)
    assert set(found["count"]) == {1}


def test_all_equal_and_empty():
    assert compute(rows_of(caption=["x"] * 100_000), "caption")["rank"] == list(range(1, 100_001))
    assert compute(rows_of(caption=pa.array([], pa.string())), "caption")["id"] == []


def test_lists_cannot_be_compared():
    with pytest.raises(RecipeError, match="'tags' is of type list"):
        compute(rows_of(tags=[["a"], ["b"]]), "tags")
