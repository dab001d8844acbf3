"""What may stand in a filter: the kinds of syntax node, the functions, the types.

Everything not named here is refused, also what a later DuckDB adds to its grammar. Functions are the exception: those
of DuckDB's own catalogue pass when it calls every overload CONSISTENT (same arguments, same answer), less a written
list of those that are not what they claim or can make a value of any size, plus a written list of built-in macros.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import duckdb

from mmdata.errors import nearest
from mmdata.registry import maker

__all__ = ["Catalogue", "Refused", "check_tree", "meaning", "read_catalogue", "with_names", "without_positions"]


class Refused(Exception):
    """Why an expression is refused: the end of a sentence that begins with the expression's name."""


_PLAIN_NODES = frozenset(["CONJUNCTION", "COMPARISON", "BETWEEN", "CASE", "CONSTANT", "CAST"])
_OPERATORS = frozenset(
    "OPERATOR_NOT OPERATOR_IS_NULL OPERATOR_IS_NOT_NULL OPERATOR_COALESCE OPERATOR_NULLIF OPERATOR_TRY COMPARE_IN "
    "COMPARE_NOT_IN ARRAY_EXTRACT ARRAY_SLICE ARRAY_CONSTRUCTOR STRUCT_EXTRACT".split()
)
_ONE_ROW = "but a filter sees one row"
_NODE_NAMES = {
    "SUBQUERY": f"has a subquery, {_ONE_ROW}; a share of the rows is a group's work, as top_fraction's",
    "WINDOW": f"has a window function (OVER), {_ONE_ROW}; ranks are a group's work, as top_fraction's",
    "PARAMETER": "has a parameter (? or $1)",
    "POSITIONAL_REFERENCE": "refers to a column by position (#1)",
    "STAR": "has * or COLUMNS(…)",
    "COLLATE": "has COLLATE; compare lower(…) or strip_accents(…) instead",
    "LAMBDA": "has a lambda outside list_filter, list_transform or list_reduce; for JSON write json_extract(…)",
    "DEFAULT": "has DEFAULT",
}
_LIST_LAMBDAS = frozenset(
    "list_filter array_filter filter list_transform list_apply array_transform array_apply apply list_reduce "
    "array_reduce reduce".split()
)
_LIST_AGGREGATES = frozenset(["list_aggr", "list_aggregate", "array_aggr", "array_aggregate", "aggregate"])
_AGGREGATE_NAMES = frozenset(
    "sum avg min max count bool_and bool_or product median mode first last any_value stddev_pop stddev_samp var_pop "
    "var_samp skewness kurtosis entropy string_agg".split()
)
_NAMED_ARGUMENTS = frozenset(["struct_pack", "struct_insert", "struct_update"])

# Macros of DuckDB's main schema whose definition is one scalar expression without volatile parts.
_MACROS = frozenset(
    "nullif if split_part array_append array_prepend array_push_back array_push_front array_pop_back array_pop_front "
    "array_reverse array_to_string list_any_value list_append list_prepend list_reverse list_avg list_bool_and "
    "list_bool_or list_count list_entropy list_first list_last list_max list_median list_min list_mode list_product "
    "list_kurtosis list_skewness list_stddev_pop list_stddev_samp list_string_agg list_sum list_var_pop list_var_samp "
    "date_add days_in_month fdiv fmod md5_number_lower md5_number_upper map_contains_entry map_contains_value".split()
)
# CONSISTENT in the catalogue, and still not a function of the row alone, or an inner part of DuckDB.
_NOT_FUNCTIONS = frozenset(
    "current_localtime current_localtimestamp version alias invoke combine finalize to_aggregate_state index_key "
    "create_sort_key icu_sort_key constant_or_null json_serialize_plan json_serialize_sql json_deserialize_sql "
    "parse_duckdb_log_message can_cast_implicitly cast_to_type replace_type make_type get_type remap_struct "
    "unpivot_list switch variant_bytes_to_variant variant_to_parquet_variant vertex_extract stats".split()
)
_ANY_SIZE = frozenset("repeat range generate_series lpad rpad list_resize array_resize bar format printf".split())
_INNER_PREFIXES = ("__", "current_", "pg_", "collate_", "icu_collate_")

_TYPES = {
    "BOOLEAN": "bool boolean logical",
    "TINYINT": "tinyint int1",
    "SMALLINT": "smallint int2 int16 short",
    "INTEGER": "integer int int4 int32 signed",
    "BIGINT": "bigint int8 int64 long",
    "HUGEINT": "hugeint int128",
    "UTINYINT": "utinyint uint8",
    "USMALLINT": "usmallint uint16",
    "UINTEGER": "uinteger uint32",
    "UBIGINT": "ubigint uint64",
    "UHUGEINT": "uhugeint uint128",
    "FLOAT": "float float4 real",
    "DOUBLE": "double float8",
    "DECIMAL": "decimal dec numeric",
    "VARCHAR": "varchar text string char bpchar nvarchar",
    "BLOB": "blob bytea binary varbinary",
    "DATE": "date",
    "TIME": "time",
    "INTERVAL": "interval",
    "TIMESTAMP": "timestamp datetime timestamp_us",
    "TIMESTAMP_S": "timestamp_s",
    "TIMESTAMP_MS": "timestamp_ms",
    "TIMESTAMP_NS": "timestamp_ns",
    "TIMESTAMP WITH TIME ZONE": "timestamptz",
    "UUID": "uuid guid",
    "json": "json",
    "list": "list",
    "array": "array",
    "STRUCT": "struct",
    "MAP": "map",
}
_TYPE_NAMES = {alias: name for name, aliases in _TYPES.items() for alias in [name.lower(), *aliases.split()]}


@dataclass(frozen=True)
class Catalogue:
    """DuckDB's functions: those a filter may call, and the kinds of the others (`aggregate`, `volatile`, …)."""

    allowed: frozenset[str]
    kinds: Mapping[str, str]


def read_catalogue(connection: duckdb.DuckDBPyConnection) -> Catalogue:
    """The functions of this DuckDB, sorted into allowed ones and kinds of refused ones."""
    rows = connection.execute(
        "SELECT function_name, list(DISTINCT function_type), bool_and(coalesce(stability, '') = 'CONSISTENT') "
        "FROM duckdb_functions() GROUP BY function_name"
    ).fetchall()
    allowed, kinds = set(), {}
    for name, types, consistent in rows:
        if name in _ANY_SIZE:
            kinds[name] = "any size"
        elif name in _NOT_FUNCTIONS or name.startswith(_INNER_PREFIXES):
            kinds[name] = "inner"
        elif name in _MACROS or (types == ["scalar"] and consistent):
            allowed.add(name)
        else:
            kinds[name] = "volatile" if types == ["scalar"] else next(t for t in sorted(types) if t != "scalar")
    return Catalogue(frozenset(allowed), kinds)


_KIND_SENTENCES = {
    "aggregate": f"which needs many rows, {_ONE_ROW}; a share of the rows is a group's work, as top_fraction's",
    "window": f"which needs many rows, {_ONE_ROW}; ranks are a group's work, as top_fraction's",
    "table": "which makes a table, but a filter gives one value per row",
    "table_macro": "which makes a table, but a filter gives one value per row",
    "volatile": "which may answer differently each time; a filter must give the same answer for the same row",
    "any size": "which can make a value of any size",
}


def check_tree(
    tree: dict[str, Any], names: Collection[str], later: Mapping[str, str], catalogue: Catalogue
) -> tuple[str, ...]:
    """The columns that a syntax tree of `json_serialize_sql` reads, sorted; Refused when it holds more than it may.

    Changes the tree to one spelling: columns as in `names` (upper and lower case do not count where that is
    unambiguous), functions in lower case, types by their DuckDB name. `later`: column → step that makes it later.
    """
    walk = _Walk(names, later, catalogue)
    try:
        walk.visit(tree, frozenset())
    except RecursionError:
        raise Refused("is nested too deeply") from None
    return tuple(sorted(walk.columns))


@dataclass
class _Walk:
    """One walk over a tree; `scope` holds the lambda parameters in force, in lower case."""

    names: Collection[str]
    later: Mapping[str, str]
    catalogue: Catalogue
    columns: set[str] = field(default_factory=set)

    def visit(self, node: Any, scope: frozenset[str]) -> None:
        if isinstance(node, list):
            for item in node:
                self.visit(item, scope)
        elif isinstance(node, dict):
            kind = node.get("class")
            if kind == "COLUMN_REF":
                self.column(node, scope)
                return
            if kind == "FUNCTION":
                self.function(node, scope)
                return
            if kind == "TYPE":
                self.type(node)
            elif kind == "OPERATOR":
                if node["type"] not in _OPERATORS:
                    raise Refused(f"has {_words(node['type'])}, which a filter cannot use")
            elif kind is not None and kind not in _PLAIN_NODES:
                raise Refused(_NODE_NAMES.get(kind, f"has {_words(str(kind))}, which a filter cannot use"))
            for value in node.values():
                self.visit(value, scope)

    def column(self, node: dict[str, Any], scope: frozenset[str]) -> None:
        """A column of the schema, or a lambda parameter."""
        path = node["column_names"]
        if len(path) != 1:
            raise Refused(f"has {'.'.join(path)!r}; write a column by its plain name, and its field as column['field']")
        name = path[0]
        if name.lower() in scope:
            node["column_names"] = [name.lower()]
            return
        if name not in self.names:
            same = [n for n in self.names if n.lower() == name.lower()]
            if len(same) != 1:
                raise Refused(self.missing(name))
            name = same[0]
        node["column_names"] = [name]
        self.columns.add(name)

    def missing(self, name: str) -> str:
        if name in self.later:
            return f"reads {name!r}, which is made by step {self.later[name]!r} further down; move the filter below it"
        if name.lower() in self.catalogue.kinds or name.lower() in ("current_time", "localtime", "localtimestamp"):
            return f"has {name!r}, which is no column; a filter may only depend on its row"
        operator = maker(name)
        if operator is not None:
            return f"reads {name!r}, which {operator} makes; put that step before it"
        near = nearest(name, [*self.names, *self.later])
        text = "" if "did you mean" in near else "; if it is a text, put it in single quotes"
        return f"reads {name!r}, but no such column exists at this step{text}{near}"

    def function(self, node: dict[str, Any], scope: frozenset[str]) -> None:
        """A scalar function or operator of the catalogue, called plainly."""
        name = str(node["function_name"]).lower()
        if node.get("schema") or node.get("catalog") or len(node["qualified_name"]["path"]) != 1:
            called = ".".join(node["qualified_name"]["path"])
            raise Refused(f"calls {called!r}; call a function by its plain name, as in {name}(column)")
        if name not in self.catalogue.allowed:
            raise Refused(self.not_allowed(name))
        ordered = (node.get("order_bys") or {}).get("orders")
        if node.get("filter") or ordered or node.get("distinct") or node.get("export_state"):
            raise Refused(f"calls {name!r} with DISTINCT, FILTER or ORDER BY, which only aggregates have")
        arguments = node["arguments"]
        if name == "age" and len(arguments) == 1:
            raise Refused("calls 'age' with one argument, which compares with today; give both times")
        if name in _LIST_AGGREGATES:
            self.list_aggregate(name, arguments)
        node["function_name"], node["qualified_name"]["path"] = name, [name]
        for argument in arguments:
            if argument["name"] and name not in _NAMED_ARGUMENTS:
                raise Refused(f"calls {name!r} with a named argument ({argument['name']} := …)")
            value = argument["expression"]
            if value.get("class") == "LAMBDA" and name in _LIST_LAMBDAS:
                self.visit(value["expr"], scope | self.parameters(value["lhs"]))
            else:
                self.visit(value, scope)

    def not_allowed(self, name: str) -> str:
        kind = self.catalogue.kinds.get(name)
        if kind is None:
            return f"calls {name!r}, but DuckDB has no such function{_near(name, self.catalogue.allowed)}"
        shown = name.removesuffix("_star")
        return f"calls {shown!r}, {_KIND_SENTENCES.get(kind, 'which is not on the list of what a filter may call')}"

    def list_aggregate(self, name: str, arguments: list[dict[str, Any]]) -> None:
        """The aggregate's name is an argument: it must be a known word."""
        literal = arguments[1]["expression"].get("literal", {}) if len(arguments) > 1 else {}
        if literal.get("kind") != "STRING" or literal.get("text") not in _AGGREGATE_NAMES:
            raise Refused(f"calls {name!r} with an aggregate other than {', '.join(sorted(_AGGREGATE_NAMES))}")

    def parameters(self, node: dict[str, Any]) -> frozenset[str]:
        """The names a lambda binds; none may hide a column."""
        refs = [node]
        if node.get("class") == "FUNCTION" and node.get("function_name") == "row":
            refs = [argument["expression"] for argument in node["arguments"]]
        found = set()
        for ref in refs:
            if ref.get("class") != "COLUMN_REF" or len(ref["column_names"]) != 1:
                raise Refused("has a lambda whose parameters are not plain names")
            name = ref["column_names"][0].lower()
            if name in {n.lower() for n in self.names}:
                raise Refused(f"has a lambda parameter {name!r} that hides the column of that name; rename it")
            ref["column_names"] = [name]
            found.add(name)
        return frozenset(found)

    def type(self, node: dict[str, Any]) -> None:
        name = str(node["type_name"]).lower()
        if name not in _TYPE_NAMES or node.get("schema") or node.get("catalog"):
            raise Refused(f"casts to {node['type_name']!r}, which a filter cannot use{_near(name, _TYPE_NAMES)}")
        node["type_name"], node["qualified_name"]["path"] = _TYPE_NAMES[name], [_TYPE_NAMES[name]]


def _words(name: str) -> str:
    return name.lower().replace("_", " ")


def _near(name: str, known: Collection[str]) -> str:
    """The nearest of many names, or nothing: listing them all would bury the sentence."""
    found = nearest(name, known)
    return found if "did you mean" in found else ""


def with_names(node: Any, names: Mapping[str, str]) -> Any:
    """The tree with other names for its columns; those that `names` does not have keep theirs."""
    if isinstance(node, dict):
        if node.get("class") == "COLUMN_REF":  # of one name, and no lambda parameter hides a column
            return {**node, "column_names": [names.get(n, n) for n in node["column_names"]]}
        return {k: with_names(v, names) for k, v in node.items()}
    return [with_names(v, names) for v in node] if isinstance(node, list) else node


def without_positions(node: Any) -> Any:
    """The tree without the places in the text."""
    if isinstance(node, dict):
        return {k: without_positions(v) for k, v in node.items() if not k.startswith("query_location")}
    return [without_positions(v) for v in node] if isinstance(node, list) else node


def meaning(node: Any) -> Any:
    """The tree without what only says how it was written."""
    if isinstance(node, dict):
        return {k: meaning(v) for k, v in node.items() if k not in ("alias", "is_operator")}
    return [meaning(v) for v in node] if isinstance(node, list) else node
