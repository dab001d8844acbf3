"""The demo: the whole job on 50 rows that this machine serves to itself, as `mmdata demo` and `make demo`."""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Literal

from mmdata.demo.server import Row, Server, rows
from mmdata.errors import RecipeError

if TYPE_CHECKING:
    from rich.console import Console

    from mmdata.dataset import Dataset

__all__ = ["QUESTION", "run_demo"]

_MARKER = ".mmdata-demo"  # says that a folder is a demo's, and may be made anew
QUESTION = """SELECT truth, count(*) AS rows, count(*) FILTER (verdict = 'kept') AS kept,
       coalesce(string_agg(DISTINCT reason, ', ' ORDER BY reason), '') AS reasons
FROM samples GROUP BY truth ORDER BY kept DESC, truth"""


def run_demo(runner: Literal["ray", "inline"] = "ray", out: str | Path | None = None) -> int:
    """Serve, fetch, score, deduplicate, filter and shard the demo's rows into the folder `out`; returns an exit code.

    `out` (default `demo-out`) is made anew when it holds an earlier demo; a recipe edited there is kept as
    `recipe.edited.yaml`. RecipeError when it holds anything else.
    """
    import mmdata

    folder = Path(out or "demo-out")
    console = _console()
    listed = rows()
    recipe = _empty(folder)
    with Server.serving(listed) as server:
        _write_list(folder / "list.csv", listed, server)
        _say(console, f"{len(listed)} rows in {folder / 'list.csv'}; the recipe, {recipe}:\n")
        _say(console, recipe.read_text(encoding="utf-8"))
        dataset = mmdata.run(recipe, runner=runner, quiet=False)
    _report(console, dataset, folder)
    return 0


def _console() -> Console:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 120  # a file or pipe has no width, and 80 columns fold names
    return console


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False)


def _empty(folder: Path) -> Path:
    """The folder with nothing in it but its marker and the recipe; returns the recipe's path."""
    recipe = folder / "recipe.yaml"
    text = Template((files("mmdata") / "demo" / "recipe.yaml").read_text(encoding="utf-8")).substitute(
        {name: json.dumps((folder / file).as_posix()) for name, file in _FILES.items()}
    )
    if folder.exists():
        if not folder.is_dir() or (any(folder.iterdir()) and not (folder / _MARKER).exists()):
            raise RecipeError(
                f"{folder} is there and holds no earlier demo; name another folder: mmdata demo --out DIR"
            )
        if recipe.exists() and recipe.read_text(encoding="utf-8") != text:
            recipe.replace(folder / "recipe.edited.yaml")
        for name in ("dataset", "shards"):
            if (folder / name).exists():
                shutil.rmtree(folder / name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARKER).touch()
    recipe.write_text(text, encoding="utf-8")
    return recipe


_FILES = {"dataset": "dataset", "list": "list.csv", "shards": "shards"}


def _write_list(path: Path, listed: list[Row], server: Server) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["url", "caption", "truth"])
        writer.writerows([server.url(row), row.caption, row.truth] for row in listed)


def _report(console: Console, dataset: Dataset, folder: Path) -> None:
    """The funnel, one question with its answer, and what to type next."""
    from mmdata.funnel import render

    funnel = dataset.funnel()
    funnel.check()
    render(funnel, console)
    relation = dataset.sql(QUESTION)
    _say(console, f"\nAsked in SQL, what became of each kind of row (`truth` is a column of the list):\n\n{QUESTION}\n")
    _print_table(console, relation.columns, relation.fetchall())
    place, again = shlex.quote(str(folder / "dataset")), shlex.quote(str(folder / "recipe.yaml"))
    key = dataset.sql("SELECT key FROM samples WHERE reason = 'aligned' ORDER BY row_id LIMIT 1").fetchall()
    _say(console, f"\nThe shards are in {folder / 'shards'}. Three commands to type next:\n")
    _say(console, f"  mmdata why {place} {key[0][0] if key else '000000000'}      # why this sample was dropped")
    _say(console, f'  mmdata sql {place} "SELECT key, caption, conse_score FROM samples ORDER BY conse_score LIMIT 5"')
    _say(console, f'  mmdata run {again} --set "filters.aligned=conse_score >= 0.5"      # no picture is scored again')


def _print_table(console: Console, columns: list[str], lines: list[tuple[object, ...]]) -> None:
    from rich.table import Table

    table = Table(*columns)
    for line in lines:
        table.add_row(*map(str, line))
    console.print(table, markup=False)
