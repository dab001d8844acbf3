"""The command line: one thin function a command. Exit codes: 0 done, 1 stopped or incomplete, 2 the input is wrong."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmdata.diff_command import diff_command
from mmdata.download_command import download_command
from mmdata.errors import MmdataError, RecipeError
from mmdata.export_command import export_command
from mmdata.retry_command import retry_command

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["app", "main"]

app = typer.Typer(
    name="mmdata",
    help="Build, curate and inspect multimodal training data: nothing lost, everything resumable, every answer in SQL.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="override a value of the recipe, e.g. fetch.timeout_s=5"),
]
Runner = Annotated[str, typer.Option(help="ray; processes: of this machine, without Ray; inline: this process")]
Workers = Annotated[int | None, typer.Option(min=1, help="CPUs to use; default: all of this machine or cluster")]
Dataset = Annotated[str, typer.Argument(metavar="DATASET", help="dataset folder")]
Selection = Annotated[
    str | None, typer.Option("--selection", metavar="NAME", help="as this recipe left it; default: the latest run's")
]
RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="recipe: a YAML file, or the name of a shipped one")]
Over = Annotated[
    str | None,
    typer.Option("--dataset", metavar="FOLDER", help="over this dataset, instead of the folder and source it names"),
]


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False, soft_wrap=True)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 120  # a file or pipe has no width, and 80 columns fold names
    return console


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"cannot write {path}: {error.strerror}") from None


def _say(text: str) -> None:
    typer.echo(text)


@app.command()
def demo(
    runner: Runner = "ray",
    out: Annotated[str, typer.Option(help="folder for the demo's dataset and shards")] = "demo-out",
) -> None:
    """Run the whole job on a small picture set.

    This machine serves the pictures to itself; nothing is fetched from elsewhere.

    Example: mmdata demo
    """
    kind = _runner(runner)
    from mmdata.demo import run_demo

    raise typer.Exit(run_demo(runner=kind, out=out))


@app.command()
def run(
    recipe: RecipePath,
    set_: Set = None,
    over: Over = None,
    runner: Runner = "ray",
    workers: Workers = None,
    address: Annotated[str | None, typer.Option(help="join the Ray cluster at this address")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    allow_mixed: Annotated[bool, typer.Option("--allow-mixed", help="let two device classes compute a set")] = False,
    sample: Annotated[int | None, typer.Option(min=1, help="try so many rows of the list, keep nothing")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress")] = False,
) -> None:
    """Build or go on with a recipe's dataset, export it.

    An interrupted run resumes with the same command.

    \b
    Examples:
      mmdata run pets.yaml
      mmdata run pets.yaml --sample 500
      mmdata run datacomp_basic --dataset data/pets
      mmdata run pets.yaml --set "filters.aligned=clip_score >= 0.3"
    """  # noqa: D301  the mark keeps lines as they are in --help
    from mmdata import dataset, funnel

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill ends like Ctrl-C: finished work is kept
    kind = _runner(runner)
    if device not in ("auto", "cpu", "cuda"):
        raise RecipeError(f"--device {device}: expected auto, cpu or cuda")
    overrides = tuple(set_ or ())
    if sample is not None:
        if over is not None:
            raise RecipeError("--sample tries rows of a list, and --dataset has its rows: give one of them")
        from mmdata.sample import render_sample, run_sample

        _say(render_sample(run_sample(recipe, sample, overrides=overrides, device=device, quiet=quiet)))  # type: ignore[arg-type]
        return
    ds = dataset.run(
        recipe,
        overrides=overrides,
        dataset=over,
        runner=kind,
        workers=workers,
        address=address,
        device=device,  # type: ignore[arg-type]
        allow_mixed=allow_mixed,
        quiet=quiet,
    )
    funnel.render(ds.funnel(), _console())
    current = ds.current
    passing = (current.transient if current else 0) + (ds.report.unsettled if ds.report else 0)
    if passing:
        _say(f"{passing} rows failed for a passing reason; the same command tries them again")
        raise typer.Exit(1)


@app.command()
def plan(recipe: RecipePath, set_: Set = None, over: Over = None) -> None:
    """Prove a recipe, and say what is left to do.

    Computes nothing and writes nothing.

    Example: mmdata plan pets.yaml
    """
    from mmdata.outlook import look, render
    from mmdata.preflight import prove
    from mmdata.shipped import find_recipe

    proved = prove(find_recipe(recipe, tuple(set_ or ()), over))
    render(proved, look(proved), _console())


@app.command()
def show(
    dataset: Dataset,
    svg: Annotated[Path | None, typer.Option(metavar="FILE", help="draw the funnel into this SVG file instead")] = None,
    hosts: Annotated[bool, typer.Option("--hosts", help="what became of the rows of every host instead")] = False,
    selection: Selection = None,
) -> None:
    """The funnel: what became of every row.

    Rows in, kept, dropped by reason, failed by reason, and seconds per step; then the selections of the dataset, and
    the hosts that lost most rows.

    \b
    Examples:
      mmdata show data/pets
      mmdata show data/pets --hosts
      mmdata show data/pets --selection pets
      mmdata show data/pets --svg funnel.svg
    """  # noqa: D301  see run
    from mmdata import funnel
    from mmdata.answers import render_hosts, render_selections
    from mmdata.dataset import open as open_dataset

    ds = open_dataset(dataset, selection)
    if hosts:
        render_hosts(ds, _console())
        return
    found = ds.funnel()
    if svg is None:
        funnel.render(found, _console())
        render_selections(ds, _console())
        render_hosts(ds, _console(), 10)
    else:
        _write(svg, funnel.svg(found))
        _say(f"drawn: {svg}")


@app.command()
def sql(
    dataset: Dataset,
    query: Annotated[
        str, typer.Argument(metavar="QUERY", help="DuckDB SQL over samples, rows, hosts, verdicts, runs, columns.<set>")
    ],
    format_: Annotated[str, typer.Option("--format", help="table, csv, json or parquet")] = "table",
    selection: Selection = None,
) -> None:
    """Ask the data a question.

    \b
    Examples:
      mmdata sql data/pets "SELECT reason, count(*) FROM samples GROUP BY ALL ORDER BY 2 DESC"
      mmdata sql data/pets "SELECT * FROM samples WHERE verdict = 'kept'" --format parquet > kept.parquet
    """  # noqa: D301  see run
    from mmdata.answers import write_answer
    from mmdata.dataset import open as open_dataset

    write_answer(open_dataset(dataset, selection), query, format_, sys.stdout)


@app.command()
def why(
    dataset: Dataset,
    key: Annotated[str, typer.Argument(metavar="KEY", help="a sample's key, as in exports")],
    selection: Selection = None,
) -> None:
    """Why a sample was kept or is gone, step by step.

    Example: mmdata why data/pets 000000017
    """
    from mmdata.answers import render_story
    from mmdata.dataset import open as open_dataset

    render_story(open_dataset(dataset, selection).why(key), _console())


# It reads img2dataset's command line by itself, --help too.
app.command("download", add_help_option=False, context_settings={"ignore_unknown_options": True})(download_command)
app.command("export")(export_command)
app.command("diff")(diff_command)
app.command("retry")(retry_command)


@app.command()
def clean(
    dataset: Dataset,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would go")] = False,
    grace: Annotated[
        float, typer.Option(min=0, help="hours; younger files stay, somebody may be about to need them")
    ] = 1,
    forget: Annotated[str | None, typer.Option(metavar="NAME", help="drop the selection of this name first")] = None,
) -> None:
    """Remove files that no selection needs any more.

    Killed runs, earlier verdicts, column sets that no recipe reads now and grown column files leave them.

    \b
    Examples:
      mmdata clean data/pets --dry-run
      mmdata clean data/pets --forget pets --dry-run
    """  # noqa: D301  see run
    from mmdata.answers import render_cleaned
    from mmdata.clean import clean as clean_store
    from mmdata.dataset import open as open_dataset

    store = open_dataset(dataset).store
    removed = clean_store(store, dry_run=dry_run, grace_s=grace * 3600, forgotten=forget)
    _say(render_cleaned(removed, dry_run))


@app.command()
def stages(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="one operator, with its options")] = None,
) -> None:
    """Every operator, or one of them in full.

    Example: mmdata stages score_clip
    """
    from mmdata.catalogue import describe, table

    _say(table() if name is None else describe(name))


@app.command()
def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="print this recipe, to be redirected into a file")
    ] = None,
) -> None:
    """The recipes that come with mmdata, or one in full.

    Example: mmdata recipes datacomp_basic > mine.yaml
    """
    from mmdata.catalogue import shipped_recipe, shipped_recipes

    _say(shipped_recipes() if name is None else shipped_recipe(name).rstrip("\n"))


@app.command()
def doctor() -> None:
    """What is installed and what is missing.

    With the command that brings what is missing, and its size.

    Example: mmdata doctor
    """
    from mmdata.doctor import render

    _say(render())


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    if version:
        from mmdata import __version__

        _say(f"mmdata {__version__}")
        raise typer.Exit


def _runner(name: str) -> Any:
    if name not in ("ray", "processes", "inline"):
        raise RecipeError(f"--runner {name}: expected ray, processes or inline")
    if name == "processes":
        from mmdata import nursery

        nursery.prestart()  # it loads while this process reads the recipe
    return name


_INTERRUPTED = 130  # what typer makes of Ctrl-C


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; every error of mmdata is one sentence on stderr and an exit code."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="mmdata")
    except MmdataError as error:
        typer.echo(f"mmdata: {error}", err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != _INTERRUPTED:
            raise
        typer.echo("\nmmdata: stopped; finished work is kept, and the same command goes on from here", err=True)
        sys.exit(1)
    except BrokenPipeError:
        sys.exit(0)
