"""`mmdata retry`: the command.

In: a dataset folder, the statuses to try again, how to run. Out: a line on what the rows became, then the funnel as
`mmdata run` prints it. Exit codes are those of `mmdata run`.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mmdata.retry import Retried

__all__ = ["retry_command"]


def retry_command(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="dataset folder")],
    error: Annotated[
        str | None,
        typer.Option(
            metavar="STATUS,…",
            help="fetch rows with these statuses; default: deferred,dns,connect,timeout,http_429,http_5xx",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="how to fetch this time, e.g. fetch.timeout_s=60"),
    ] = None,
    runner: Annotated[str, typer.Option(help="ray, processes, or inline: this process only")] = "ray",
    workers: Annotated[int | None, typer.Option(min=1, help="CPUs to use; default: all")] = None,
    address: Annotated[str | None, typer.Option(help="join the Ray cluster at this address")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress")] = False,
) -> None:
    """Fetch failed rows again, then compute what they lack.

    Rows keep their keys, and all others stay as they are. Rows of hosts that opted out are never asked for again. The
    recipe is the one that was run last.

    \b
    Examples:
      mmdata retry data/pets
      mmdata retry data/pets --error timeout,http_5xx --set fetch.timeout_s=60
    """  # noqa: D301  the mark keeps lines as they are in --help
    from mmdata.errors import RecipeError
    from mmdata.retry import retry

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as `mmdata run` does
    if runner not in ("ray", "processes", "inline"):
        raise RecipeError(f"--runner {runner}: expected ray, processes or inline")
    if device not in ("auto", "cpu", "cuda"):
        raise RecipeError(f"--device {device}: expected auto, cpu or cuda")
    done = retry(
        dataset,
        [name.strip() for name in (error or "").split(",") if name.strip()],
        overrides=tuple(set_ or ()),
        runner=runner,  # type: ignore[arg-type]
        workers=workers,
        address=address,
        device=device,  # type: ignore[arg-type]
        quiet=quiet,
    )
    if _tell(done):
        raise typer.Exit(1)


def _tell(done: Retried) -> int:
    """Print the funnel and what became of the rows; returns how many rows failed for a passing reason."""
    from rich.console import Console

    from mmdata import funnel

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120  # as `mmdata run` does
    funnel.render(done.dataset.funnel(), Console(highlight=False, soft_wrap=True, width=width))
    found = done.refetched
    became = ", ".join(f"{count:,} {status}" for status, count in found.by_status.most_common())
    typer.echo(f"fetched {found.rows:,} rows again: {became}" if found.rows else "no row had one of these statuses")
    if done.stale_export is not None:
        typer.echo(f"there is no export at {done.stale_export}, seen from here: run the recipe to write it")
    current, report = done.dataset.current, done.dataset.report
    passing = (current.transient if current else 0) + (report.unsettled if report else 0)
    if passing:
        typer.echo(f"{passing} rows failed for a passing reason; the same command tries them again")
    return passing
