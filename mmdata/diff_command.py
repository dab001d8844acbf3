"""`mmdata diff`: what differs between two selections, as a table of counts, or row by row in a format for tools.

In: two names (see `mmdata.inspect.diff`). Out: text or bytes on stdout. RecipeError or SourceError before any of it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from mmdata.inspect.diff import Difference

__all__ = ["diff_command", "render_difference"]

_SIDE = "DATASET, DATASET#SELECTION, or a recipe file: its selection"


def diff_command(
    a: Annotated[str, typer.Argument(metavar="A", help=_SIDE)],
    b: Annotated[str, typer.Argument(metavar="B", help=_SIDE)],
    by: Annotated[
        str | None, typer.Option(help="match rows by row_id (within one dataset), uid or key (between two)")
    ] = None,
    keys: Annotated[int, typer.Option(min=0, help="examples of each change, by their keys")] = 3,
    format_: Annotated[
        str, typer.Option("--format", help="table of counts; or csv, json, parquet of every row")
    ] = "table",
) -> None:
    """What entered and what left from A to B, at which step and why.

    \b
    Examples:
      mmdata diff data/pets#strict data/pets#loose
      mmdata diff strict.yaml loose.yaml --keys 10
      mmdata diff data/pets data/more-pets --by uid --format parquet > changed.parquet
    """  # noqa: D301  the mark keeps lines as they are in --help
    from rich.console import Console

    from mmdata.answers import require_format, write_relation
    from mmdata.inspect.diff import diff

    require_format(format_, sys.stdout)
    found = diff(a, b, by=by)  # type: ignore[arg-type]
    if format_ == "table":
        width = None if sys.stdout.isatty() else 160
        render_difference(found, Console(highlight=False, soft_wrap=True, width=width), keys)
    else:
        write_relation(found.rows, format_, sys.stdout)


def render_difference(found: Difference, console: Console, keys: int) -> None:
    """Both sides with what they keep, then a line for every way in which rows changed, with examples of their keys."""
    from rich.table import Table
    from rich.text import Text

    for letter, name, kept, rows in zip("AB", found.names, found.kept, found.rows_in, strict=True):
        console.print(Text(f"{letter}  {name}: {kept:,} of {rows:,} rows kept"))
    console.print(Text(f"rows matched by {found.by}\n"))
    table = Table(show_edge=False, header_style="bold")
    for heading in ("change", "at step", "reason"):
        table.add_column(heading, no_wrap=True)
    table.add_column("rows", justify="right")
    if keys:
        table.add_column("keys")
    examples = found.examples(keys) if keys else {}
    for count in found.counts:
        where = "" if count.step_name is None else count.step_name
        if count.change in ("entered", "left"):
            where += " of A" if count.change == "entered" else " of B"
        some = ", ".join(str(k) for k in examples.get((count.change, count.step_name, count.reason), []))
        cells = [count.change, where, count.reason or "", f"{count.rows:,}", *([some] if keys else [])]
        table.add_row(*(Text("".join(c if c.isprintable() else "�" for c in cell)) for cell in cells))
    console.print(table)
