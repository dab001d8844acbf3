"""Answers for people and pipes: SQL results as a table, CSV, JSON lines or Parquet, and a row's story."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, TextIO

import duckdb
import pyarrow as pa
from pydantic import ValidationError

from mmdata.errors import RecipeError, SourceError

if TYPE_CHECKING:
    from rich.console import Console

    from mmdata.dataset import Dataset, Story

__all__ = ["export_dataset", "render_story", "write_answer"]

_TABLE_ROWS = 100
_CELL = 60


def write_answer(dataset: Dataset, query: str, kind: str, out: TextIO) -> None:
    """Run a query and write its answer to `out`; SourceError with DuckDB's own first line when it is wrong.

    `table` shows at most 100 rows, cells cut at 60 characters; csv, json (one object a line) and parquet are whole.
    """
    if kind not in ("table", "csv", "json", "parquet"):
        raise RecipeError(f"--format {kind}: expected table, csv, json or parquet")
    if kind == "parquet" and out.isatty():
        raise RecipeError("--format parquet is binary: redirect it into a file, such as > answer.parquet")
    try:
        relation = dataset.sql(query)
        if relation is None:
            raise SourceError("the query returns nothing to show; ask with SELECT")
        reader = relation.to_arrow_reader(100_000)
        if kind == "table":
            _write_table(reader, out)
        else:
            _write_batches(reader, kind, out)
    except duckdb.Error as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise SourceError(f"the query does not run: {' '.join(lines[:2])}") from None


def _write_batches(reader: pa.RecordBatchReader, kind: str, out: TextIO) -> None:
    import pyarrow.csv
    import pyarrow.parquet

    if kind == "json":
        for batch in reader:
            out.writelines(json.dumps(row, default=_json, ensure_ascii=False) + "\n" for row in batch.to_pylist())
        return
    binary = out.buffer
    if kind == "csv":
        with pyarrow.csv.CSVWriter(binary, reader.schema) as csv:
            for batch in reader:
                csv.write_batch(batch)
        return
    with pyarrow.parquet.ParquetWriter(binary, reader.schema) as parquet:
        for batch in reader:
            parquet.write_batch(batch)


def _json(value: Any) -> Any:
    return value.hex() if isinstance(value, bytes) else str(value)


def _write_table(reader: pa.RecordBatchReader, out: TextIO) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_edge=False, header_style="bold")
    for item in reader.schema:
        is_number = pa.types.is_integer(item.type) or pa.types.is_floating(item.type)
        table.add_column(Text(item.name), justify="right" if is_number else "left", no_wrap=True)
    shown = rows = 0
    for batch in reader:
        for row in batch.slice(0, max(0, _TABLE_ROWS - shown)).to_pylist():
            table.add_row(*(Text(_cell(v)) for v in row.values()))
            shown += 1
        rows += len(batch)
    console = Console(file=out, highlight=False, width=None if out.isatty() else 200)
    console.print(table)
    if rows > shown:
        console.print(f"{rows - shown} more rows; use --format csv for all of them")


def _cell(value: Any) -> str:
    if value is None:
        return "NULL"
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    text = "".join(c if c.isprintable() else "�" for c in text)
    return text if len(text) <= _CELL else text[: _CELL - 1] + "…"


def render_story(story: Story, console: Console) -> None:
    """A row's verdict, where it came from, and each step with its values, as plain lines."""
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


def export_dataset(dataset: Dataset, given: dict[str, Any]) -> str:
    """Export with options as the command line gives them; returns a line on what was written."""
    from mmdata.export import export
    from mmdata.recipe import describe_errors
    from mmdata.settings import ExportOptions

    try:
        options = ExportOptions.model_validate(given)
    except ValidationError as error:
        raise RecipeError(describe_errors("export", error, ExportOptions)) from None
    recipe = dataset.current.recipe if dataset.current is not None else None
    done = export(dataset, options, recipe)
    verb = "wrote" if done.written else "already there:"
    return f"{verb} {done.rows:,} samples in {done.shards} shards, {done.data_bytes:,} bytes, at {done.path}"
