"""Accepted filters and orders against outcomes worked out by hand, and against an unchecked DuckDB for random text."""

from __future__ import annotations

import time
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from filter_rows import SCHEMA, TABLE
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdata.errors import RecipeError
from mmdata.filters import CheckedExpression, FilterEngine, check_filter, check_order

ENGINE = FilterEngine()


# text → (columns, outcome on each row of TABLE), worked out by hand; -1 NULL, -2 raises
ACCEPTED = {
    "width_px >= 200": (["width_px"], [0, 1, 1, -1, 0, 1]),
    "WIDTH_PX >= 200 -- at least": (["width_px"], [0, 1, 1, -1, 0, 1]),
    "/* note */ is_english": (["is_english"], [1, 0, -1, 1, 0, -1]),
    "not is_english": (["is_english"], [0, 1, -1, 0, 1, -1]),
    "true": ([], [1, 1, 1, 1, 1, 1]),
    "license = 'CC0'": (["License"], [1, 0, -1, 0, 1, 0]),
    '"odd name" in (1, 2, 5)': (["odd name"], [1, 1, 0, -1, 1, 0]),
    "least(width_px, height_px) >= 200 AND aspect_ratio <= 3": (
        ["aspect_ratio", "height_px", "width_px"],
        # least skips NULL: 0, 480, 200, 0, -5, 2^31-1; NaN <= 3 and NULL <= 3 are FALSE and NULL
        [0, 0, -1, 0, 0, 1],
    ),
    # NaN and infinity are above every number
    "clip_score > 0.2": (["clip_score"], [1, 0, -1, 1, 1, 0]),
    "isfinite(clip_score) and clip_score > 0.2": (["clip_score"], [1, 0, -1, 0, 0, 0]),
    "aspect_ratio = 0": (["aspect_ratio"], [0, 0, -1, 0, 0, 1]),
    "clip_score is not null": (["clip_score"], [1, 1, 0, 1, 1, 1]),
    # 2^64 - 1 fits; one more does not
    "phash >= 9223372036854775808": (["phash"], [1, 0, -1, 0, 1, 0]),
    "phash + 1 > 0": (["phash"], [-2, 1, -1, 1, 1, 1]),
    # 2^62 * 4 = 2^64 does not fit in int64
    "width_px * 4 > 800": (["width_px"], [0, 1, 0, -1, 0, -2]),
    "cast(caption as int) = 12": (["caption"], [-2, 1, -1, -2, -2, -2]),
    "try_cast(caption as int) = 12": (["caption"], [-1, 1, -1, -1, -1, -1]),
    "try(cast(caption as int)) is null": (["caption"], [1, 0, 1, 1, 1, 1]),
    "1000 // width_px >= 1": (["width_px"], [-2, 1, 1, -1, 0, 0]),
    # the same cast twice, which DuckDB's optimizer would compute once, outside what catches its error
    "caption::int > 5 and caption::int < 50": (["caption"], [-2, 1, -1, -2, -2, -2]),
    # an error that DuckDB's TRY lets through
    "caption like 'a%' escape license": (["License", "caption"], [-2, -2, -1, 0, -2, 0]),
    # AND is not cut short, CASE is
    "width_px <> 0 and 1000 // width_px >= 1": (["width_px"], [-2, 1, 1, -1, 0, 0]),
    "case when width_px <> 0 then 1000 // width_px >= 1 else false end": (["width_px"], [0, 1, 1, 0, 0, 0]),
    "len(string_split(caption, ' ')) >= 3": (["caption"], [1, 0, -1, 0, 1, 1]),
    "split_part(caption, ' ', 2) = 'red'": (["caption"], [1, 0, -1, 0, 0, 0]),
    "caption like '%cat'": (["caption"], [1, 0, -1, 0, 0, 0]),
    "caption like '%!%!_' escape '!'": (["caption"], [0, 0, -1, 0, 0, 1]),
    "caption = 'it''s 5 o''clock'": (["caption"], [0, 0, -1, 0, 1, 0]),
    "regexp_matches(caption, '^[0-9]+$')": (["caption"], [0, 1, -1, 0, 0, 0]),
    "length(caption) between 1 and 9": (["caption"], [1, 1, -1, 0, 0, 1]),
    "caption = ''": (["caption"], [0, 0, -1, 1, 0, 0]),
    "nullif(small, 1) > 0": (["small"], [-1, 0, -1, 1, 0, 0]),
    "if(is_english, small > 0, true)": (["is_english", "small"], [1, 1, 1, 1, 1, 1]),
    "coalesce(is_english, small = 0)": (["is_english", "small"], [1, 0, -1, 1, 0, 1]),
    "list_contains(tags, 'a')": (["tags"], [1, 0, -1, 0, 1, 1]),
    "len(tags) > 0": (["tags"], [1, 0, -1, 1, 1, 1]),
    "list_sum(sizes) > 2": (["sizes"], [1, -1, -1, 1, 1, 1]),
    "list_aggr(sizes, 'max') > 2": (["sizes"], [0, -1, -1, 1, 1, 1]),
    "len(list_filter(sizes, lambda s: s > 1)) = 1": (["sizes"], [1, 0, -1, 1, 0, 1]),
    "len([s for s in sizes if s > 1]) = 1": (["sizes"], [1, 0, -1, 1, 0, 1]),
    "len(list_filter(sizes, lambda s: s > small)) > 0": (["sizes", "small"], [1, 0, -1, 0, 1, 1]),
    "list_reduce(sizes, lambda p, q: greatest(p, q), 0) >= 3": (["sizes"], [0, 0, -1, 1, 1, 1]),
    "faces[1]['label'] = 'p'": (["faces"], [1, -1, -1, -1, 0, 0]),
    "bit_count(xor(phash, 1::ubigint)) <= 1": (["phash"], [0, 1, -1, 1, 0, 1]),
    "caption is distinct from license": (["License", "caption"], [1, 1, 0, 1, 1, 1]),
    "width_px::text = '640'": (["width_px"], [0, 1, 0, -1, 0, 0]),
    "(width_px, small) = (640, -1)": (["small", "width_px"], [0, 1, 0, 0, 0, 0]),
}


@pytest.mark.parametrize("sql", ACCEPTED, ids=ascii)
def test_accepted_and_evaluated(sql: str) -> None:
    columns, outcome = ACCEPTED[sql]
    checked = check_filter("f", sql, SCHEMA)
    assert list(checked.columns) == columns
    assert ENGINE.evaluate(TABLE, checked).tolist() == outcome
    assert check_filter("f", checked.sql, SCHEMA) == checked


@pytest.mark.parametrize(
    "group",
    [
        [
            "width_px>=200",
            "(width_px >= 200)",
            "Width_PX  >= 200",
            '"width_px" >= 200 -- x',
            "((width_px)) /**/ >= 200",
        ],
        ["caption::text = 'a'", "CAST(caption AS string) = 'a'", "cast(caption as VarChar) == 'a'"],
        ["small::int4 > 1", 'small::"INTEGER" > 1', "CAST(small AS int) > 1"],
        ["LOWER(caption) <> 'a'", "lower(caption) != 'a'"],
    ],
)
def test_spellings_of_one_filter_have_one_canonical_text(group: list[str]) -> None:
    assert len({check_filter("f", sql, SCHEMA).sql for sql in group}) == 1


def test_canonical_text_keeps_what_differs() -> None:
    texts = ["caption = 'A'", "caption = 'a'", "width_px > 1", "width_px >= 1", "width_px > 1.0", "1 < width_px"]
    assert len({check_filter("f", sql, SCHEMA).sql for sql in texts}) == len(texts)


def test_names_that_differ_in_case_only() -> None:
    schema = pa.schema([("URL", pa.string()), ("url", pa.string())])
    table = pa.table({"URL": ["a"], "url": ["b"]})
    assert ENGINE.evaluate(table, check_filter("f", "URL = 'a'", schema)).tolist() == [1]
    assert ENGINE.evaluate(table, check_filter("f", "url = 'a'", schema)).tolist() == [0]
    with pytest.raises(RecipeError, match="did you mean"):
        check_filter("f", "Url = 'a'", schema)
    with pytest.raises(RecipeError, match="tell apart"):
        check_filter("f", "URL = url", schema)


def test_an_error_costs_its_own_row_in_a_long_table() -> None:
    # several vectors of DuckDB (2,048 rows); every 1,000th row does not cast
    texts = [None if i % 7 == 0 else "x" if i % 1000 == 1 else str(i) for i in range(10_000)]
    expected = [-1 if i % 7 == 0 else -2 if i % 1000 == 1 else int(i > 5000) for i in range(10_000)]
    table = pa.table({"caption": pa.chunked_array([texts[:3333], texts[3333:3334], texts[3334:]])})
    found = ENGINE.evaluate(table, check_filter("f", "caption::int > 5000", SCHEMA))
    assert found.dtype == np.int8
    assert found.tolist() == expected


def test_an_error_that_try_lets_through_costs_its_own_row_too() -> None:
    escapes = ["!!" if i % 1000 == 1 else "!" for i in range(10_000)]
    table = pa.table({"caption": ["a"] * 10_000, "License": escapes})
    found = ENGINE.evaluate(table, check_filter("f", "caption like 'a' escape License", SCHEMA))
    assert found.tolist() == [-2 if i % 1000 == 1 else 1 for i in range(10_000)]


def test_an_empty_table_and_a_slice() -> None:
    checked = check_filter("f", "width_px >= 200", SCHEMA)
    assert ENGINE.evaluate(TABLE.slice(0, 0), checked).tolist() == []
    assert ENGINE.evaluate(TABLE.slice(1, 2), checked).tolist() == [1, 1]
    assert ENGINE.evaluate(TABLE.slice(0, 2), check_filter("f", "true", SCHEMA)).tolist() == [1, 1]


def test_columns_of_other_types_than_were_checked() -> None:
    checked = check_filter("f", "list_contains(tags, 'a')", SCHEMA)
    with pytest.raises(RecipeError, match="no longer fits"):
        ENGINE.evaluate(pa.table({"tags": [1, 2]}), checked)
    assert ENGINE.evaluate(TABLE, checked).tolist() == [1, 0, -1, 0, 1, 1]  # the engine goes on


def test_the_engine_reaches_no_file_and_stays_locked(tmp_path: Path) -> None:
    name = tmp_path / "x.csv"
    name.write_text("a\n1\n")
    for query in (f"FROM read_csv('{name}')", f"COPY (SELECT 1) TO '{name}'", f"ATTACH '{name}'", "INSTALL httpfs"):
        with pytest.raises(duckdb.Error):
            ENGINE._connection.execute(query)
    for setting in ("enable_external_access = true", "lock_configuration = false", "threads = 4"):
        with pytest.raises(duckdb.Error):
            ENGINE._connection.execute(f"SET {setting}")
    secret = pa.table({"a": [1]})  # a Python variable is no table
    with pytest.raises(duckdb.Error, match="does not exist"):
        ENGINE._connection.execute("SELECT * FROM secret")
    assert len(secret) == 1


def test_time_zone_of_the_machine_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    schema = pa.schema([("seen", pa.timestamp("us", "UTC"))])
    table = pa.table({"seen": [1_600_000_000_000_000]}, schema=schema)  # 2020-09-13 12:26:40 UTC
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        checked = check_filter("f", "seen::text like '2020-09-13 12:26:40%' and hour(seen) = 12", schema)
        assert FilterEngine().evaluate(table, checked).tolist() == [1]
    finally:
        monkeypatch.undo()
        time.tzset()


ORDERS = {
    # width 0, 640, 200, NULL, -5, 2^62; height 480, 480, NULL, 0, 7, 2^31-1
    "width_px": ("ASC NULLS LAST", [4, 0, 2, 1, 5, 3]),
    "width_px desc": ("DESC NULLS LAST", [5, 1, 2, 0, 4, 3]),
    "width_px DESC NULLS FIRST": ("DESC NULLS FIRST", [3, 5, 1, 2, 0, 4]),
    "width_px nulls first": ("ASC NULLS FIRST", [3, 4, 0, 2, 1, 5]),
    # products 0, 307200, NULL, NULL, -35, overflow, which counts as NULL; ties by row_id
    "width_px * height_px desc nulls last": ("DESC NULLS LAST", [1, 0, 4, 2, 3, 5]),
    "clip_score desc": ("DESC NULLS LAST", [3, 4, 0, 1, 5, 2]),  # NaN above infinity
    "caption": ("ASC NULLS LAST", [3, 1, 0, 4, 5, 2]),  # by bytes
    "is_english": ("ASC NULLS LAST", [1, 4, 0, 3, 2, 5]),
    "phash desc": ("DESC NULLS LAST", [0, 4, 5, 3, 1, 2]),
    "len(tags) desc": ("DESC NULLS LAST", [0, 5, 3, 4, 1, 2]),
    "row_id desc": ("DESC NULLS LAST", [5, 4, 3, 2, 1, 0]),
}


@pytest.mark.parametrize("term", ORDERS)
def test_order(term: str) -> None:
    direction, expected = ORDERS[term]
    checked = check_order("near.prefer[0]", term, SCHEMA)
    assert checked.sql == f"{checked.value} {direction}"
    assert checked.direction == direction
    assert check_order("x", checked.sql, SCHEMA) == checked
    assert ENGINE.order(TABLE, [checked]).tolist() == expected


def test_order_by_several_terms_then_row_id() -> None:
    # English rows 0, 3; not 1, 4; NULL 2, 5; row_id decides when no term does
    terms = [check_order("x", t, SCHEMA) for t in ("is_english desc", "small desc")]
    shuffled = TABLE.take([5, 3, 1, 0, 2, 4])
    # small: row 3 32767, row 0 1; row 1 -1, row 4 -32768; row 5 0, row 2 NULL; as indexes of `shuffled`
    assert ENGINE.order(shuffled, terms).tolist() == [1, 3, 2, 5, 0, 4]
    assert ENGINE.order(shuffled, []).tolist() == [3, 2, 4, 1, 5, 0]
    assert ENGINE.order(TABLE.slice(0, 0), terms).tolist() == []


def test_order_with_a_column_called_position() -> None:
    schema = pa.schema([("row_id", pa.int64()), ("Position", pa.int64())])
    table = pa.table({"row_id": [1, 2, 3], "Position": [5, 9, 7]}, schema=schema)
    assert ENGINE.order(table, [check_order("x", "position desc", schema)]).tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    ("term", "problem"),
    [
        ("width_px, height_px", "give one each"),
        ("width_px limit 1", "give one each"),
        ("width_px desc limit 1 offset 2", "give one each"),
        ("width_px; select 1", "several statements"),
        ("width_px) --", "syntax error"),
        ("width_px desc nulls last nulls first", "syntax error"),
        ("1", "reads no column"),
        ("'width_px'", "reads no column"),
        ("all", "COLUMNS"),
        ("*", "COLUMNS"),
        ("random()", "'random'"),
        ("(select 1)", "subquery"),
        ("tags", "VARCHAR[]"),
        ("faces[1]", "STRUCT"),
        ("caption collate nocase", "COLLATE"),
        ("widht_px desc", "did you mean 'width_px'"),
        ("", "is empty"),
    ],
)
def test_order_refused(term: str, problem: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check_order("near.prefer[0]", term, SCHEMA)
    assert str(caught.value).startswith("near.prefer[0]: the ordering term ")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


# Random text. The oracle is the user's own text in a DuckDB of its own, one row at a time, unchecked. Its optimizer is
# off because it hides errors: `width_px * 4 > 800` becomes `width_px > 200`, which does not overflow.

WORDS = (
    "width_px height_px small phash clip_score is_english caption License tags sizes faces row_id nope y 0 1 -1 2.5 "
    "'a' 'b''c' '1' '' NULL TRUE FALSE + - * / // % ** & | ^ || = <> < > <= >= ( ) ( ) [ ] { } , . : :: ; AND OR NOT "
    "IS IN LIKE BETWEEN CASE WHEN THEN ELSE END CAST AS INT VARCHAR DOUBLE TRY abs( len( lower( nullif( list_filter( "
    "least( coalesce( if( now() random() lambda y: COLLATE SELECT FROM ORDER BY LIMIT -- /* */ ? $1 * COLUMNS(*) OVER "
    "DISTINCT USING ~ ! @ # \" ` \\ é 😀 FILTER (WHERE INTERVAL DATE EXTRACT UNION , x'00' $$ IS NOT NULL"
).split(" ")

leaves = st.sampled_from(
    "width_px height_px small phash clip_score aspect_ratio is_english caption License tags sizes 0 1 2.5 'a' '12' "
    "NULL true [1,2]".split()
)


def _combine(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    two = st.sampled_from("+ - * / // % & || = <> < > <= >= AND OR LIKE".split())
    one = st.sampled_from(["NOT ({})", "-({})", "({}) IS NULL", "abs({})", "len({})", "CAST({} AS INT)", "lower({})"])
    three = st.sampled_from(
        ["({}) BETWEEN {} AND {}", "CASE WHEN {} THEN {} ELSE {} END", "if({}, {}, {})", "coalesce({}, {}, {})"]
    )
    return st.one_of(
        st.builds(lambda a, o, b: f"{a} {o} {b}", inner, two, inner),
        st.builds(lambda a, o, b: f"({a}) {o} ({b})", inner, two, inner),
        st.builds(lambda f, a: f.format(a), one, inner),
        st.builds(lambda f, a, b, c: f.format(a, b, c), three, inner, inner, inner),
    )


expressions = st.recursive(leaves, _combine, max_leaves=8)
soup = st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)
damaged = st.builds(
    lambda sql, extra, at: sql[: at % (len(sql) + 1)] + extra + sql[at % (len(sql) + 1) :],
    st.sampled_from(sorted(ACCEPTED)),
    st.one_of(soup, st.text(max_size=3)),
    st.integers(0, 200),
)
_oracle = duckdb.connect(config={"threads": 1})
_oracle.execute("SET TimeZone = 'UTC'")
_oracle.execute("PRAGMA disable_optimizer")
_rows = [TABLE.drop_columns(["embedding"]).slice(i, 1) for i in range(len(TABLE))]


def unchecked_outcome(sql: str, row: pa.Table) -> int:
    _oracle.register("one_row", row)
    try:
        ((value,),) = _oracle.execute(f"SELECT (\n{sql}\n) FROM one_row").fetchall()
    except duckdb.Error:
        return -2
    finally:
        _oracle.unregister("one_row")
    return -1 if value is None else int(value)


@settings(max_examples=800, deadline=None)
@given(st.one_of(expressions, damaged, soup, st.text(max_size=60)))
def test_any_text_is_refused_in_one_sentence_or_means_what_it_says(sql: str) -> None:
    try:
        checked = check_filter("f", sql, SCHEMA)
    except RecipeError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert refused.startswith("filter 'f' ")
        assert "\n" not in refused
        return
    assert isinstance(checked, CheckedExpression)
    assert check_filter("f", checked.sql, SCHEMA) == checked
    assert set(checked.columns) <= set(SCHEMA.names)
    whole = ENGINE.evaluate(TABLE, checked).tolist()
    assert whole == [unchecked_outcome(sql, row) for row in _rows]
    # the outcome of a row does not depend on the others
    assert ENGINE.evaluate(TABLE.take([4, 4, 1]), checked).tolist() == [whole[4], whole[4], whole[1]]
