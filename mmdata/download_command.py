"""`mmdata download`: the command line of img2dataset, over a dataset of mmdata.

In: words, as img2dataset takes them. Out: the dataset and its layout, the funnel and one line on where things are.
RecipeError, before anything is written, for what cannot be done.
"""

from __future__ import annotations

import os
import signal
from typing import Annotated

import typer

__all__ = ["download_command"]


def download_command(
    words: Annotated[list[str] | None, typer.Argument(metavar="URL_LIST [OPTIONS]")] = None,
) -> None:
    """Fetch a URL list with img2dataset's options, into its layout."""
    from mmdata.download_options import help_text, read_command_line, runner_of

    if not words or any(word in ("--help", "-h", "-help") for word in words):
        typer.echo(help_text())
        raise typer.Exit(0 if words else 2)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill ends like Ctrl-C: finished work is kept
    given = read_command_line(words)
    from mmdata import nursery

    if runner_of(given) == "processes":
        nursery.prestart()  # it loads while this process reads the list
    from rich.console import Console

    from mmdata import funnel
    from mmdata.download import download, summary

    quiet = bool(given.get("quiet"))
    ds = download(given, quiet=quiet)
    if not quiet:
        console = Console(highlight=False, soft_wrap=True)
        if not console.is_terminal and "COLUMNS" not in os.environ:
            console.width = 120  # a file or pipe has no width, and 80 columns fold names
        funnel.render(ds.funnel(), console)
        typer.echo(summary(ds))
