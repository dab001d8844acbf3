"""Answers for people and pipes: SQL results as a table, CSV, JSON lines or Parquet, and a row's story."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, TextIO

import duckdb
import pyarrow as pa

from mmdata.errors import RecipeError, SourceError
from mmdata.layout import json_value

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from mmdata.dataset import Dataset, Story

__all__ = [
    "export_dataset",
    "render_cleaned",
    "render_hosts",
    "render_selections",
    "render_story",
    "require_format",
    "write_answer",
    "write_relation",
]

_QUICK_ROWS = 20_000_000  # of more rows the funnel says how to ask instead
_KINDS_SHOWN = 3
_TABLE_ROWS = 100
_CELL = 60
_PIPE_COLUMNS = 200  # where nobody's terminal sets a width


def write_answer(dataset: Dataset, query: str, kind: str, out: TextIO) -> None:
    """Run a query and write its answer to `out`; SourceError with DuckDB's own first line when it is wrong.

    `table` shows at most 100 rows, cells cut at 60 characters, a block of lines a row where a line would be too long;
    csv, json (one object a line) and parquet are whole.
    """
    require_format(kind, out)
    try:
        relation = dataset.sql(query)
        if relation is None:
            raise SourceError("the query returns nothing to show; ask with SELECT")
        write_relation(relation, kind, out)
    except duckdb.Error as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise SourceError(f"the query does not run: {' '.join(lines[:2])}") from None


def require_format(kind: str, out: TextIO) -> None:
    """RecipeError unless answers can be written to `out` in this format."""
    if kind not in ("table", "csv", "json", "parquet"):
        raise RecipeError(f"--format {kind}: expected table, csv, json or parquet")
    if kind == "parquet" and out.isatty():
        raise RecipeError("--format parquet is binary: redirect it into a file, such as > answer.parquet")


def write_relation(relation: duckdb.DuckDBPyRelation, kind: str, out: TextIO) -> None:
    """Write a relation to `out` as `write_answer` does; SourceError where the format cannot hold it."""
    try:
        reader = relation.to_arrow_reader(100_000)
        if kind == "table":
            _write_table(reader, out)
        else:
            _write_batches(reader, kind, out)
    except pa.ArrowException as error:
        raise SourceError(f"{kind} cannot hold this answer ({error}); CAST that column to VARCHAR") from None


def _write_batches(reader: pa.RecordBatchReader, kind: str, out: TextIO) -> None:
    import pyarrow.csv
    import pyarrow.parquet

    if kind == "json":
        for batch in reader:
            out.writelines(_as_json(row) + "\n" for row in batch.to_pylist())
        return
    binary = out.buffer
    if kind == "csv":
        schema = pa.schema([pa.field(f.name, _csv_type(f.type)) for f in reader.schema])
        with pyarrow.csv.CSVWriter(binary, schema) as csv:
            for batch in reader:
                cells = [_csv_column(c, f.type) for c, f in zip(batch.columns, schema, strict=True)]
                csv.write_batch(pa.record_batch(cells, schema=schema))
        return
    with pyarrow.parquet.ParquetWriter(binary, reader.schema) as parquet:
        for batch in reader:
            parquet.write_batch(batch)


def _as_json(value: Any) -> str:
    return json.dumps(json_value(value), ensure_ascii=False, allow_nan=False)


def _csv_type(kind: pa.DataType) -> pa.DataType:
    number = pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_decimal(kind)
    floating = pa.types.is_floating(kind) and not pa.types.is_float16(kind)
    moment = pa.types.is_temporal(kind) and not pa.types.is_interval(kind)
    return kind if number or floating or moment or pa.types.is_string(kind) else pa.string()


def _csv_column(column: pa.Array, kind: pa.DataType) -> pa.Array:
    """As it is where CSV can hold it; else JSON text, for lists and structs, or plain text."""
    if column.type == kind:
        return column
    values = [json_value(v) for v in column.to_pylist()]
    return pa.array([v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values], kind)


def _write_table(reader: pa.RecordBatchReader, out: TextIO) -> None:
    from rich.cells import cell_len
    from rich.console import Console

    shown: list[list[str]] = []
    rows = 0
    for batch in reader:
        few = batch.slice(0, max(0, _TABLE_ROWS - len(shown)))
        # By position: two columns of an answer may have one name.
        shown += map(list, zip(*([_cell(v) for v in column.to_pylist()] for column in few.columns), strict=True))
        rows += len(batch)
    console = Console(file=out, highlight=False, soft_wrap=True, width=None if out.isatty() else _PIPE_COLUMNS)
    names = reader.schema.names
    widths = [max(cell_len(n), *(cell_len(row[i]) for row in shown), 0) for i, n in enumerate(names)]
    if sum(widths) + 3 * len(widths) <= console.width:
        console.print(_as_table(reader.schema, shown))
    else:
        _print_blocks(console, names, shown)
    if rows > len(shown):
        console.print(f"{rows - len(shown):,} more rows; use --format csv for all of them")


def _as_table(schema: pa.Schema, rows: list[list[str]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(show_edge=False, header_style="bold")
    for item in schema:
        is_number = any(f(item.type) for f in (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal))
        table.add_column(Text(item.name), justify="right" if is_number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _print_blocks(console: Console, names: list[str], rows: list[list[str]]) -> None:
    """A line a value, for rows too wide for a table."""
    from rich.text import Text

    widest = max(map(len, names))
    for number, row in enumerate(rows, 1):
        console.print(Text(f"row {number}", style="bold"))
        for name, cell in zip(names, row, strict=True):
            console.print(Text(f"  {name:<{widest}}  {cell}"))


def _cell(value: Any) -> str:
    if value is None:
        return "NULL"
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    text = "".join(c if c.isprintable() else "�" for c in text)
    return text if len(text) <= _CELL else text[: _CELL - 1] + "…"


def render_story(story: Story, console: Console) -> None:
    """A row's verdict, where it came from, and each step with its values, as plain lines; then rows of the same key."""
    from rich.text import Text

    row = story.row
    console.print(Text(f"{row['key']}  {story.verdict}", style="bold"))
    if story.step_name is not None:
        console.print(Text(f"  at step {story.step_name}: {story.reason}"))
    for name in ("url", "path", "caption", "status", "status_detail", "http_status", "final_url", "sha256"):
        if row.get(name) is not None:
            console.print(Text(f"  {name}: {_cell(row[name])}"))
    for step in story.steps:
        reason = f" ({step.reason})" if step.reason else ""
        console.print(Text(f"{step.position:3d} {step.name}: {step.state}{reason}", style="bold"))
        if step.sql:
            console.print(Text(f"      {step.sql}"))
        for name, value in step.values.items():
            console.print(Text(f"      {name} = {_cell(value)}"))
    for other in story.others:
        console.print(Text("and another row with this key:"))
        render_story(other, console)


def render_selections(dataset: Dataset, console: Console) -> None:
    """The selections of the dataset, a line each, where there are several; the one shown and the latest are marked."""
    from rich.text import Text

    selections, latest = dataset.selections(), dataset.latest()
    widest = max((len(name) for name in selections), default=0)
    shown = dataset.current.name if dataset.current is not None else None
    if len(selections) < 2:
        return
    console.print(Text("selections:", style="bold"))
    for name, current in selections.items():
        share = f"{100 * current.kept / current.rows_in:.1f} %" if current.rows_in else "-"
        marks = ", ".join(w for w, is_so in (("shown", name == shown), ("latest", name == latest)) if is_so)
        when = current.finished.replace("T", " ")[:16]
        line = f"  {name:<{widest}}  {current.kept:,} of {current.rows_in:,} kept ({share}), {when} UTC"
        console.print(Text(line + (f", {marks}" if marks else "")))


def render_hosts(dataset: Dataset, console: Console, most: int | None = None) -> None:
    """Print the hosts with the most failed rows first, then by rows: all of them, or the `most` that lost any.

    With `most` nothing is printed where no host lost a row, and of a very large dataset only how to ask.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    if most is not None and sum(dataset.current.row_counts if dataset.current else ()) > _QUICK_ROWS:
        console.print("hosts: mmdata show DATASET --hosts")
        return
    lost = "" if most is None else f"WHERE failed + deferred + opted_out > 0 LIMIT {most}"
    order = "ORDER BY failed DESC, deferred DESC, opted_out DESC, rows DESC, host"
    found = dataset.sql(f"SELECT * FROM (SELECT * FROM hosts {order}) {lost}").fetchall()
    if not found:
        return
    box_style = box.ASCII if console.options.ascii_only else box.SIMPLE_HEAD
    table = Table(box=box_style, pad_edge=False, header_style="bold")
    table.add_column("host", overflow="fold")
    for name in ("rows", "ok", "failed", "opted out", "deferred", "median ms", "95 % ms", "MB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("why", overflow="fold", ratio=1)
    for host, *counts, statuses, median, high, size in found:
        why = ", ".join(f"{kind} {rows:,}" for kind, rows in list((statuses or {}).items())[:_KINDS_SHOWN])
        times = ("-" if ms is None else f"{ms:,.0f}" for ms in (median, high))
        table.add_row(Text(host), *(f"{n:,}" for n in counts), *times, f"{size / 1e6:,.1f}", Text(why))
    if most is not None:
        console.print("hosts that lost most:")
    console.print(table)


def render_cleaned(removed: list[tuple[str, int]], dry_run: bool) -> str:
    """What `mmdata clean` removed, file by file, then files and bytes of each kind."""
    from mmdata.clean import by_kind

    lines = [f"{name}  {size:,} bytes" for name, size in removed]
    verb = "would free" if dry_run else "freed"
    lines += [f"{kind}: {files:,} files, {size:,} bytes" for kind, (files, size) in by_kind(removed).items()]
    return "\n".join([*lines, f"{len(removed)} files, {verb} {sum(size for _, size in removed):,} bytes"])


def export_dataset(dataset: Dataset, given: dict[str, Any]) -> str:
    """Export with options as the command line gives them; returns a line on what was written."""
    done = dataset.export(**given)
    verb = "wrote" if done.written else "already there:"
    pushed = f", and at {done.pushed}" if done.pushed else ""
    return f"{verb} {done.rows:,} samples in {done.shards} shards, {done.data_bytes:,} bytes, at {done.path}{pushed}"
