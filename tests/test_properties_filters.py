"""The filter engine against SQLite, which shares no code with DuckDB, and orders against Python's sort."""

from __future__ import annotations

import sqlite3
from typing import Any

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdata.filters import FilterEngine, check_filter, check_order

SCHEMA = pa.schema(
    [("row_id", pa.int64()), ("a", pa.int64()), ("b", pa.int32()), ("x", pa.float64()), ("t", pa.string())]
)
ENGINE = FilterEngine()

# Values on which the two databases agree by definition: no NaN (SQLite makes it NULL), and four of the largest integers
# still add up within 32 bits (SQLite adds in 64).
integers = st.none() | st.integers(-20, 20) | st.integers(-(2**28), 2**28)
floats = st.none() | st.floats(-1e6, 1e6, width=32)
texts = st.none() | st.text("ab%_' é😀", max_size=5)
rows = st.lists(st.tuples(integers, integers, floats, texts), max_size=30)

numbers = st.recursive(
    st.sampled_from(["a", "b", "x"]) | st.integers(-30, 30).map(str) | st.sampled_from(["0.5", "2.25", "NULL"]),
    lambda inner: st.one_of(
        st.builds("({} {} {})".format, inner, st.sampled_from("+-"), inner),
        st.builds("(- {})".format, inner),
        st.builds("abs({})".format, inner),
        st.builds("coalesce({}, {})".format, inner, inner),
        st.builds("length({})".format, st.just("t")),
    ),
    max_leaves=4,
)
words = st.sampled_from(["t", "'a'", "'b%'", "''", "'it''s'", "'é'"])
comparisons = st.one_of(
    st.builds("{} {} {}".format, numbers, st.sampled_from(["<", "<=", "=", "<>", ">", ">="]), numbers),
    st.builds("{} BETWEEN {} AND {}".format, numbers, numbers, numbers),
    st.builds("{} {}IN ({}, {})".format, numbers, st.sampled_from(["", "NOT "]), numbers, numbers),
    st.builds("{} IS {}NULL".format, numbers | words, st.sampled_from(["", "NOT "])),
    st.builds("{} {} {}".format, words, st.sampled_from(["<", "<=", "=", "<>", ">", ">="]), words),
)
conditions = st.recursive(
    comparisons,
    lambda inner: st.one_of(
        st.builds("({}) {} ({})".format, inner, st.sampled_from(["AND", "OR"]), inner),
        st.builds("{} {} {}".format, inner, st.sampled_from(["AND", "OR"]), inner),
        st.builds("NOT ({})".format, inner),
        st.builds("CASE WHEN {} THEN {} ELSE {} END".format, inner, inner, inner),
    ),
    max_leaves=5,
)


def table_of(values: list[tuple[Any, ...]]) -> pa.Table:
    numbered = [(i, *value) for i, value in enumerate(values)]
    columns = zip(*numbered, strict=True) if numbered else [()] * len(SCHEMA)
    return pa.Table.from_arrays([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)


def sqlite_outcome(sql: str, values: list[tuple[Any, ...]]) -> list[int]:
    connection = sqlite3.connect(":memory:")
    try:
        connection.execute("CREATE TABLE r (row_id INTEGER, a INTEGER, b INTEGER, x REAL, t TEXT)")
        connection.executemany("INSERT INTO r VALUES (?, ?, ?, ?, ?)", [(i, *v) for i, v in enumerate(values)])
        found = connection.execute(f"SELECT ({sql}) FROM r ORDER BY row_id").fetchall()
    finally:
        connection.close()
    return [-1 if value is None else int(value) for (value,) in found]


@settings(max_examples=250, deadline=None)
@given(conditions, rows)
def test_a_filter_is_what_sqlite_says(sql: str, values: list[tuple[Any, ...]]) -> None:
    found = ENGINE.evaluate(table_of(values), check_filter("f", sql, SCHEMA)).tolist()
    assert found == sqlite_outcome(sql, values)


@settings(max_examples=150, deadline=None)
@given(
    rows,
    st.lists(
        st.tuples(st.sampled_from(["a", "b", "x", "t"]), st.booleans(), st.booleans()),
        max_size=3,
        unique_by=lambda term: term[0],
    ),
)
def test_an_order_is_a_stable_sort(values: list[tuple[Any, ...]], terms: list[tuple[str, bool, bool]]) -> None:
    checked = [
        check_order("x", f"{column} {'desc' if down else 'asc'} nulls {'first' if first else 'last'}", SCHEMA)
        for column, down, first in terms
    ]
    expected = list(range(len(values)))
    for column, down, first in reversed(terms):
        at = "abxt".index(column)
        known = [i for i in expected if values[i][at] is not None]
        missing = [i for i in expected if values[i][at] is None]
        # stable in both directions; code points sort as their UTF-8 bytes do
        known.sort(key=lambda i: values[i][at], reverse=down)
        expected = missing + known if first else known + missing
    assert ENGINE.order(table_of(values), checked).tolist() == expected
