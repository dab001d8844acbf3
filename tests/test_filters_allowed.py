"""Texts that try to be more than one expression over one row: each is refused with one sentence."""

from __future__ import annotations

import pytest
from filter_rows import SCHEMA

from mmdata.errors import RecipeError
from mmdata.filters import check_filter


def refusal(sql: str) -> str:
    with pytest.raises(RecipeError) as caught:
        check_filter("f", sql, SCHEMA, {"aesthetic_score": "score_aesthetic"})
    message = str(caught.value)
    assert message.startswith("filter 'f' ")
    assert "\n" not in message
    assert len(message) < 600
    return message


REFUSED = {
    # more than one expression
    "true) OR (true": "syntax error",
    "1=1) --": "syntax error",
    "1=1) OR (1=1": "syntax error",
    "true) FROM (SELECT 1": "syntax error",
    "/*": "unterminated",
    "width_px > 1 /*": "unterminated",
    "TRUE); DROP TABLE x": "syntax error",
    "TRUE; DROP TABLE x": "not several statements",
    "width_px > 1, is_english": "one expression",
    "is_english FROM x": "one expression",
    "is_english WHERE true": "one expression",
    "is_english ORDER BY 1": "one expression",
    "is_english LIMIT 1": "one expression",
    "is_english GROUP BY 1": "one expression",
    "is_english QUALIFY true": "one expression",
    "is_english USING SAMPLE 1": "one expression",
    "is_english UNION SELECT true": "one expression",
    "is_english AS x": "syntax error",
    "DISTINCT is_english": "one expression",
    "SELECT": "",
    "SELECT true": "",
    "FROM duckdb_settings()": "",
    "VALUES (true)": "syntax error",
    "WITH x AS (SELECT true) SELECT * FROM x": "",
    "": "is empty",
    " \n\t": "is empty",
    "-- nothing": "",
    ";": "without selection",
    "width_px := 1": "syntax error",
    # other rows, other tables
    "(SELECT true)": "subquery",
    "EXISTS (FROM duckdb_settings())": "subquery",
    "width_px IN (SELECT 1)": "subquery",
    "width_px > ANY([1, 2])": "subquery",
    "row_number() OVER () > 1": "window",
    "sum(width_px) OVER () > 1": "window",
    "sum(width_px) > 1": "'sum'",
    "count(*) > 1": "'count'",
    "quantile_cont(clip_score, 0.7) < 0.5": "'quantile_cont'",
    "unnest(sizes) > 1": "'unnest'",
    "read_csv('/etc/passwd')": "'read_csv'",
    "len(read_text('/etc/passwd')) > 1": "'read_text'",
    "glob('/*') IS NULL": "'glob'",
    # what is not the row's
    "now() > '2020-01-01'": "'now'",
    "today() > '2020-01-01'": "'today'",
    "random() > 0.5": "'random'",
    "uuid() = caption": "'uuid'",
    "is_english AND (width_px > 1 OR random() > 0.5)": "'random'",
    "[random()] = [0.5]": "'random'",
    "{'a': random()} = {'a': 0.5}": "'random'",
    "CASE WHEN random() > 0.5 THEN true END": "'random'",
    "CASE WHEN true THEN random() > 0.5 END": "'random'",
    "CASE WHEN false THEN true ELSE random() > 0.5 END": "'random'",
    "width_px BETWEEN 0 AND random()": "'random'",
    "CAST(random() AS BOOLEAN)": "'random'",
    "list_filter(sizes, lambda y: random() > 0.5) = []": "'random'",
    "sizes[random()::INT] = 1": "'random'",
    "current_localtime() > '00:00'": "'current_localtime'",
    "current_localtimestamp() > '2020-01-01'": "'current_localtimestamp'",
    "age(caption::TIMESTAMP) > INTERVAL 1 DAY": "'age'",
    "getenv('HOME') = '/root'": "'getenv'",
    "current_setting('threads') = '1'": "'current_setting'",
    "getvariable('x')": "'getvariable'",
    "nextval('s') > 1": "'nextval'",
    "error('x')": "'error'",
    "sleep_ms(1000) IS NULL": "'sleep_ms'",
    "version() = 'x'": "'version'",
    "pg_typeof(width_px) = 'x'": "'pg_typeof'",
    "current_database() = 'x'": "'current_database'",
    "current_date > '2020-01-01'": "'current_date'",
    "current_timestamp > '2020-01-01'": "'current_timestamp'",
    "localtime > '00:00'": "'localtime'",
    "user = 'x'": "'user'",
    "current_user": "'current_user'",
    "current_user = 'x'": "'current_user'",
    "rowid > 1": "'rowid'",
    "json_serialize_sql(caption) IS NULL": "'json_serialize_sql'",
    "repeat(caption, 1000000000) = 'x'": "any size",
    "len(range(1000000000000)) > 1": "any size",
    "list_aggr(sizes, 'reservoir_quantile', 0.5) > 1": "'list_aggr'",
    "list_aggregate(sizes, caption) > 1": "'list_aggregate'",
    "__internal_barrier(width_px) > 1": "'__internal_barrier'",
    # forms that are not allowed
    "?": "parameter",
    "width_px > $1": "parameter",
    "width_px > $w": "parameter",
    "#1": "position",
    "*": "COLUMNS",
    "COLUMNS(*)": "COLUMNS",
    "COLUMNS('w.*') > 1": "COLUMNS",
    "greatest(*COLUMNS(*)) > 1": "",
    "faces[1].* = 1": "",
    "caption COLLATE nocase = 'x'": "COLLATE",
    "caption COLLATE": "syntax error",
    "caption -> '$.x' = 'y'": "json_extract",
    "x -> x > 1": "",
    "lambda x: x > 1": "lambda",
    "list_filter(sizes, lambda width_px: width_px > 1) = []": "hides",
    "list_filter(sizes, lambda y: z > 1) = []": "'z'",
    "list_filter(sizes, lambda y: y > 1) = [] AND y = 1": "'y'",
    "system.main.abs(width_px) > 1": "plain name",
    "main.abs(width_px) > 1": "plain name",
    "caption.upper() = 'X'": "plain name",
    "width_px.height_px > 1": "plain name",
    "lower(DISTINCT caption) = 'x'": "DISTINCT",
    "lower(caption ORDER BY 1) = 'x'": "ORDER BY",
    "lower(string := caption) = 'x'": "named argument",
    "lower(caption) FILTER (WHERE true) = 'x'": "FILTER",
    "caption::ENUM('a') = 'a'": "'ENUM'",
    "width_px::secret > 1": "'secret'",
    "DEFAULT": "DEFAULT",
    "GROUPING(width_px) = 1": "grouping",
    # not a filter over these columns
    "width_px": "BIGINT",
    "height_px + 1": "INTEGER",
    "caption": "VARCHAR",
    "NULL": "NULL",
    "1": "INTEGER",
    "'true'": "VARCHAR",
    "caption > 3 + []": "",
    "width_px > [1]": "",
    "no_such_function(width_px) > 1": "no such function",
    "abs() > 1": "",
    "clip_scor > 0.2": "did you mean 'clip_score'",
    "aesthetic_score > 5": "made by step 'score_aesthetic'",
    "aesthetic_scor > 5": "did you mean 'aesthetic_score'",
    "embedding[1] > 0": "16-bit",
    "regexp_matches(caption, '[')": "missing ]",
    "width_px > CAST('abc' AS INT)": "'abc'",
    "'now'::TIMESTAMP > '2020-01-01'": "now",
    # hostile characters and sizes
    "\u2018a\u2019 = caption": "no such column",
    "caption = \u201ca\u201d": "no such column",
    "caption = 'a\0b'": "NUL",
    "caption = '\ud800'": "half a character",
    "caption = 'a": "",
    "x" * 10_001: "10001 characters",
    "NOT " * 400 + "true": "nested too deeply",
    "width_px + " * 400 + "1 > 0": "nested too deeply",
    "(" * 10_000: "nested too deeply",
    "[" * 10_000: "",
    "abs(" * 900 + "1" + ")" * 900 + " > 0": "nested too deeply",
}


@pytest.mark.parametrize("sql", REFUSED, ids=lambda sql: ascii(sql[:40]))
def test_refused_with_one_sentence(sql: str) -> None:
    assert REFUSED[sql] in refusal(sql)
