"""The filter check: SQL expressions from a recipe, proved harmless before they run, and the engine that evaluates them.

A filter is one SQL expression over one row. DuckDB parses it, its syntax tree is walked against a list of what is
allowed, and only the text that DuckDB writes back from the checked tree is ever put into a query. That text is also
what the recipe's identity hashes, so that white space, comments and spelling (`text` for `VARCHAR`) do not count.
What an expression may call is one part catalogue, one part list: see `mmdata.filters_allowed`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mmdata.errors import RecipeError
from mmdata.filters_allowed import (
    Catalogue,
    Refused,
    check_tree,
    meaning,
    read_catalogue,
    with_names,
    without_positions,
)
from mmdata.sealed_duckdb import MAX_DEPTH, ROWS, TOO_DEEP, connect, rows_of, sentence, shown

__all__ = ["CheckedExpression", "FilterEngine", "check_filter", "check_order", "order_error", "ordering", "renamed"]

MAX_LENGTH = 10_000  # characters of one expression
_ROUNDS = 4  # a text is canonical when writing it again changes nothing; DuckDB needs two rounds at most

_NONE: Mapping[str, str] = {}


@dataclass(frozen=True)
class CheckedExpression:
    """An expression that passed the check.

    `sql`: DuckDB's own writing of it, the only text ever put into a query; for an ordering term it ends with
    `direction`. `columns`: what it reads, sorted, spelt as in the schema. `direction`: `ASC NULLS LAST` and the like,
    empty for a filter.
    """

    sql: str
    columns: tuple[str, ...]
    direction: str = ""

    @property
    def value(self) -> str:
        """The expression without its direction."""
        return self.sql.removesuffix(self.direction).rstrip()


@cache
def _checking() -> tuple[duckdb.DuckDBPyConnection, Catalogue]:
    connection = connect()
    return connection, read_catalogue(connection)


def check_filter(name: str, sql: str, schema: pa.Schema, later: Mapping[str, str] = _NONE) -> CheckedExpression:
    """The checked form of a filter; `schema` holds the columns that exist where it stands.

    `later`: column → the step further down that makes it, for the message. RecipeError, in one sentence, when the
    text is anything but one boolean expression over those columns that gives the same answer for the same row each
    time: see `mmdata.filters_allowed` for what may stand in it.
    """
    try:
        with _checking()[0].cursor() as cursor:
            text, columns = _canonical(cursor, _select(cursor, sql), schema.names, later)
            with rows_of(cursor, _row_of_nulls(schema, columns)) as table:
                found = _type(cursor, text, table)
                if found != "BOOLEAN":
                    raise Refused(f"gives {found}, but a filter must be true or false; compare it with something")
                _run(cursor, f"SELECT (\n{text}\n) FROM {table}")
                _run(cursor, f"SELECT {_outcome(text)} FROM {table} WHERE (\n{text}\n)")
    except Refused as refused:
        raise RecipeError(f"filter {name!r} {refused}") from None
    return CheckedExpression(text, columns)


_SORTABLE = re.compile(r"(U?(TINY|SMALL|BIG|HUGE)INT|U?INTEGER|FLOAT|DOUBLE|DECIMAL.*|BOOLEAN|VARCHAR|DATE|TIME.*)")
_DIRECTIONS = {"ORDER_DEFAULT": "ASC", "ASCENDING": "ASC", "DESCENDING": "DESC"}
_NULLS = {"ORDER_DEFAULT": "NULLS LAST", "NULLS LAST": "NULLS LAST", "NULLS FIRST": "NULLS FIRST"}


def check_order(where: str, term: str, schema: pa.Schema) -> CheckedExpression:
    """The checked form of one ordering term such as `width_px * height_px desc nulls last`.

    The same rules as for a filter, but it must read a column and give a number, text, a truth value or a time.
    Without a direction it ascends; NULL comes last unless the term says otherwise. `where` opens the message.
    """
    try:
        with _checking()[0].cursor() as cursor:
            tree, direction = _split_term(cursor, term)
            text, columns = _canonical(cursor, tree, schema.names)
            if not columns:
                raise Refused("reads no column, so it orders nothing; a position such as 1 is not a column")
            with rows_of(cursor, _row_of_nulls(schema, columns)) as table:
                found = _type(cursor, text, table)
                if not _SORTABLE.fullmatch(found):
                    raise Refused(f"gives {found}; order by a number, text, a truth value or a time")
                _run(cursor, f"SELECT (\n{text}\n) FROM {table}")
                _run(cursor, f"SELECT 0 FROM {table} ORDER BY TRY({text}) {direction}")
    except Refused as refused:
        raise RecipeError(f"{where}: the ordering term {shown(term)} {refused}") from None
    return CheckedExpression(f"{text} {direction}", columns, direction)


class FilterEngine:
    """Evaluates checked expressions over Arrow tables, in one private DuckDB connection; one per worker process."""

    def __init__(self) -> None:
        self._connection = connect()

    def evaluate(self, table: pa.Table, expression: CheckedExpression) -> npt.NDArray[np.int8]:
        """One outcome per row, (N,) int8 in row order: 1 TRUE, 0 FALSE, -1 NULL, -2 the expression raised.

        An error costs its own row only, and the outcome of a row depends on no other row: `AND` and `OR` are not cut
        short, so `a <> 0 AND 10 // a > 1` raises where a is 0; write `CASE WHEN` to guard an operand.
        NaN compares as in DuckDB: equal to itself and above every number.
        """
        read = table.select(list(expression.columns)) if expression.columns else _placeholder(len(table))
        query = f"SELECT coalesce({_outcome(expression.sql)}, -2) AS outcome FROM {ROWS}"
        outcome = np.empty(len(read), np.int8)
        waiting = [(0, len(read))]
        while waiting:
            start, stop = waiting.pop()
            try:
                outcome[start:stop] = self._fetch(read.slice(start, stop - start), query, "outcome")
            except (duckdb.ProgrammingError, duckdb.DataError) as error:
                # Some errors pass through TRY, such as an ESCAPE of two characters: halve until the row is alone.
                if isinstance(error, duckdb.BinderException | duckdb.CatalogException):
                    raise RecipeError(f"a checked filter no longer fits its columns: {sentence(error)}") from None
                middle = (start + stop) // 2
                waiting += [(start, middle), (middle, stop)] if stop - start > 1 else []
                outcome[start:stop] = -2
        return outcome

    def evaluate_together(
        self, table: pa.Table, expressions: Sequence[CheckedExpression]
    ) -> list[npt.NDArray[np.int8]] | None:
        """What `evaluate` gives for each of them, in one query; None where one raises what TRY lets through."""
        read = table.select(sorted({c for e in expressions for c in e.columns})) if table.num_columns else table
        if not read.num_columns:
            return None
        listed = ", ".join(f"coalesce({_outcome(e.sql)}, -2) AS o{i}" for i, e in enumerate(expressions))
        try:
            with rows_of(self._connection, read):
                found = self._connection.execute(f"SELECT {listed} FROM {ROWS}").fetchnumpy()
        except (duckdb.ProgrammingError, duckdb.DataError):
            return None
        return [np.asarray(found[f"o{i}"], np.int8) for i in range(len(expressions))]

    def order(self, table: pa.Table, terms: Sequence[CheckedExpression]) -> npt.NDArray[np.int64]:
        """The row indexes, (N,) int64, in the order of the terms; ties by column `row_id`, ascending.

        A term that raises for a row counts as NULL there; RecipeError for the few errors that TRY lets through.
        """
        read, position, query = ordering(terms)
        numbered = table.select(read).append_column(position, pa.array(np.arange(len(table))))
        try:
            return np.asarray(self._fetch(numbered, query, position), np.int64)
        except (duckdb.ProgrammingError, duckdb.DataError) as error:
            raise order_error(terms, error) from None

    def _fetch(self, table: pa.Table, query: str, column: str) -> npt.NDArray[Any]:
        """One column of a query over the table."""
        with rows_of(self._connection, table):
            found: npt.NDArray[Any] = self._connection.execute(query).fetchnumpy()[column]
        return found


def ordering(terms: Sequence[CheckedExpression]) -> tuple[list[str], str, str]:
    """The columns that the terms read, a name for one of positions beside them, and the query that sorts it."""
    read = sorted({"row_id", *(column for term in terms for column in term.columns)})
    position = "position"
    while position.casefold() in {column.casefold() for column in read}:
        position += "_"
    by = ", ".join([*(f"TRY({term.value}) {term.direction}" for term in terms), "row_id"])
    return read, position, f"SELECT {position} FROM {ROWS} ORDER BY {by}"


def order_error(terms: Sequence[CheckedExpression], error: duckdb.Error) -> RecipeError:
    """What to raise for an ordering that DuckDB refuses."""
    return RecipeError(f"the order {shown(', '.join(term.sql for term in terms))} {sentence(error)}")


def _outcome(text: str) -> str:
    """1, 0 or -1 for NULL, and NULL where the expression raises: the expression is evaluated once."""
    return f"TRY(coalesce(CAST((\n{text}\n) AS TINYINT), CAST(-1 AS TINYINT)))"


def _placeholder(rows: int) -> pa.Table:
    return pa.table({"nothing": np.zeros(rows, np.int8)})


def _canonical(
    cursor: duckdb.DuckDBPyConnection, tree: dict[str, Any], names: Sequence[str], later: Mapping[str, str] = _NONE
) -> tuple[str, tuple[str, ...]]:
    """DuckDB's own writing of a tree, proved to mean the same, and the columns it reads."""
    _, catalogue = _checking()
    text = ""
    for _ in range(_ROUNDS):
        columns = check_tree(tree, names, later, catalogue)
        written = _write(cursor, tree)
        if written == text:
            return text, columns
        again = _select(cursor, written)
        if meaning(again) != meaning(tree):
            raise Refused("cannot be written back by DuckDB without a change of meaning; write it more simply")
        text, tree = written, again
    raise Refused("has no settled form in DuckDB; write it more simply")


def _select(cursor: duckdb.DuckDBPyConnection, text: str) -> dict[str, Any]:
    """The tree of `SELECT (text)`, which must be one statement, one item and nothing else.

    In brackets no second clause can follow; without them nothing can close the brackets, as `true) OR (true` does.
    Both readings must agree.
    """
    found = []
    for query in (f"SELECT\n{text}\n", f"SELECT (\n{text}\n)"):  # without them first: it says more of what is wrong
        node = _parse(cursor, text, query)
        items = node.pop("select_list")
        if node != _bare_select() or len(items) != 1:
            raise Refused("must be one expression, without a second value, FROM, WHERE, ORDER BY or LIMIT")
        found.append(items[0])
    alone, inside = found
    if meaning(inside) != meaning(alone):
        raise Refused("must be one expression, with its brackets in pairs")
    tree: dict[str, Any] = inside
    return tree


def _split_term(cursor: duckdb.DuckDBPyConnection, term: str) -> tuple[dict[str, Any], str]:
    """An ordering term as the tree of its expression, and its direction."""
    node = _parse(cursor, term, f"SELECT 0 ORDER BY\n{term}\n")
    modifiers = node.pop("modifiers")
    node.pop("select_list")
    bare = _bare_select()
    bare.pop("modifiers")
    orders = modifiers[0].get("orders", []) if len(modifiers) == 1 else []
    if len(orders) != 1 or node != bare:
        raise Refused("must be one expression with an optional ASC or DESC and NULLS FIRST or LAST; give one each")
    direction = f"{_DIRECTIONS[orders[0]['type']]} {_NULLS[orders[0]['null_order']]}"
    return orders[0]["expression"], direction


@cache
def _bare_select_text() -> str:
    node = _parse(_checking()[0].cursor(), "0", "SELECT 0")
    node.pop("select_list")
    return json.dumps(node)


def _bare_select() -> dict[str, Any]:
    """What DuckDB says of a SELECT without any clause, its items apart."""
    node: dict[str, Any] = json.loads(_bare_select_text())
    return node


def _parse(cursor: duckdb.DuckDBPyConnection, text: str, query: str) -> dict[str, Any]:
    """The tree of the only statement in `query`, without positions in the text."""
    if not text.strip():
        raise Refused("is empty; write a condition such as width_px >= 200")
    if len(text) > MAX_LENGTH:
        raise Refused(f"is {len(text)} characters long; the limit is {MAX_LENGTH}")
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise Refused("contains a NUL or half a character, which SQL text cannot hold")
    if _open_brackets(text) > 2 * MAX_DEPTH:
        raise Refused(TOO_DEEP)
    try:
        ((answer,),) = cursor.execute("SELECT json_serialize_sql(?)", [query]).fetchall()
        parsed = without_positions(json.loads(answer))
    except duckdb.Error as error:
        raise Refused(sentence(error)) from None
    except RecursionError:
        raise Refused(TOO_DEEP) from None
    if parsed.get("error"):
        message = parsed.get("error_message", "syntax error")
        raise Refused(_SEVERAL if "Only SELECT statements" in message else sentence(message))
    statements = parsed["statements"]
    if len(statements) != 1 or statements[0].get("named_param_map"):
        raise Refused(_SEVERAL)
    node: dict[str, Any] = statements[0]["node"]
    if node.get("type") != "SELECT_NODE":
        raise Refused("must be one expression, without UNION, EXCEPT or INTERSECT")
    return node


def _open_brackets(text: str) -> int:
    """The most brackets open at once, those in strings too: DuckDB needs time with the square of open ones."""
    return max(accumulate({"(": 1, ")": -1}.get(c, 0) for c in text))


def _write(cursor: duckdb.DuckDBPyConnection, expression: dict[str, Any]) -> str:
    """The SQL text of a checked tree, as DuckDB writes it."""
    node = {**_bare_select(), "select_list": [expression]}
    statement = json.dumps({"error": False, "statements": [{"node": node, "named_param_map": []}]})
    try:
        ((text,),) = cursor.execute("SELECT json_deserialize_sql(?)", [statement]).fetchall()
    except duckdb.Error as error:
        raise Refused(sentence(error)) from None
    return str(text).removeprefix("SELECT ")


def renamed(expression: CheckedExpression, names: Mapping[str, str]) -> str:
    """The text of a checked expression with other names for its columns, such as those an identity is hashed from."""
    with _checking()[0].cursor() as cursor:
        tree = with_names(_select(cursor, expression.value), names)
        return f"{_write(cursor, tree)} {expression.direction}".rstrip()


def _row_of_nulls(schema: pa.Schema, columns: Sequence[str]) -> pa.Table:
    """One row of NULLs in the columns read: what raises for it, such as a constant no cast can take, always does.

    DuckDB must know the types and tell the names apart.
    """
    folded: dict[str, str] = {}
    for column in columns:
        other = folded.setdefault(column.casefold(), column)
        if other != column:
            raise Refused(f"reads {other!r} and {column!r}, which SQL cannot tell apart; rename one in the source")
        if _holds_float16(schema.field(column).type):
            raise Refused(f"reads {column!r}, a vector of 16-bit floats, which SQL cannot compare; use its score")
    if not columns:
        return _placeholder(1)
    return pa.table({column: pa.nulls(1, schema.field(column).type) for column in columns})


def _holds_float16(kind: pa.DataType) -> bool:
    return pa.types.is_float16(kind) or any(_holds_float16(kind.field(i).type) for i in range(kind.num_fields))


def _type(cursor: duckdb.DuckDBPyConnection, text: str, table: str) -> str:
    return str(_run(cursor, f"DESCRIBE SELECT (\n{text}\n) AS value FROM {table}")[0][1])


def _run(cursor: duckdb.DuckDBPyConnection, query: str) -> list[Any]:
    try:
        return cursor.execute(query).fetchall()
    except duckdb.Error as error:
        raise Refused(sentence(error)) from None


_SEVERAL = "must be one expression, not several statements and not one with parameters"
