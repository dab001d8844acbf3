"""`mmdata export`: the options of `ExportOptions` on the command line.

In: the dataset's folder, the folder to write, options. Out: one line on what was written. RecipeError for what does not
fit an option, before anything is written.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mmdata.errors import RecipeError

__all__ = ["export_command", "mix_entry"]


def export_command(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="dataset folder")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="folder to write")],
    format_: Annotated[
        str, typer.Option("--format", help="webdataset, parquet, datasets, files, mds, lance, energon or datacomp")
    ] = "webdataset",
    shard_size: Annotated[str | None, typer.Option(help="largest shard, e.g. 1GB")] = None,
    shard_rows: Annotated[int | None, typer.Option(min=1, help="most samples of a shard")] = None,
    columns: Annotated[str | None, typer.Option(help="columns to write, separated by commas")] = None,
    json_nulls: Annotated[bool, typer.Option("--json-nulls", help="write columns with NULLs into .json too")] = False,
    no_media: Annotated[bool, typer.Option("--no-media", help="columns only, no images")] = False,
    row_group_bytes: Annotated[str | None, typer.Option(help="largest row group, e.g. 64MB")] = None,
    shuffle: Annotated[str, typer.Option(help="none, buffer or full")] = "none",
    seed: Annotated[int, typer.Option(min=0, help="of the shuffle, and of what a mix chooses")] = 0,
    blur: Annotated[str | None, typer.Option(metavar="COLUMN", help="blur the boxes of this column")] = None,
    repeat: Annotated[str | None, typer.Option(metavar="COLUMN", help="how often to write a row")] = None,
    mix: Annotated[
        list[str] | None,
        typer.Option(metavar="FOLDER=WEIGHT", help="mix in another dataset (FOLDER#SELECTION=WEIGHT: one selection)"),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="samples of the mix")] = None,
    epochs: Annotated[float | None, typer.Option(help="samples of the mix, as a multiple of all rows")] = None,
    workers: Annotated[int, typer.Option(min=1, help="shards written at once")] = 1,
    push_to_hub: Annotated[str | None, typer.Option(metavar="REPO", help="upload it, e.g. me/pets")] = None,
    selection: Annotated[str | None, typer.Option(metavar="NAME", help="as this recipe left it")] = None,
) -> None:
    """Write the kept samples as shards.

    A killed export goes on where it was.

    \b
    Examples:
      mmdata export data/pets pets-shards --shard-size 1GB --columns caption,clip_score
      mmdata export data/pets pets-hf --format datasets --shuffle full
      mmdata export data/pets mixed --mix data/signs=0.3 --seed 7
    """  # noqa: D301  the mark keeps lines as they are in --help
    from mmdata.answers import export_dataset
    from mmdata.dataset import open as open_dataset

    given: dict[str, Any] = {
        "format": format_,
        "path": out,
        "json_nulls": json_nulls,
        "include_media": not no_media,
        "shuffle": shuffle,
        "seed": seed,
        "workers": workers,
        "mix": tuple(map(mix_entry, mix or ())),
    }
    names = None if columns is None else tuple(c.strip() for c in columns.split(",") if c.strip())
    more: dict[str, Any] = dict(columns=names, shard_size=shard_size, shard_rows=shard_rows, blur=blur, repeat=repeat)
    more |= dict(row_group_bytes=row_group_bytes, samples=samples, epochs=epochs, push_to_hub=push_to_hub)
    given |= {name: value for name, value in more.items() if value is not None}
    typer.echo(export_dataset(open_dataset(dataset, selection), given))


def mix_entry(text: str) -> dict[str, Any]:
    """`FOLDER=WEIGHT` or `FOLDER#SELECTION=WEIGHT` as an entry of `mix`; RecipeError when it is neither."""
    place, equals, weight = text.rpartition("=")
    folder, _, selection = place.partition("#")
    try:
        number = float(weight)
    except ValueError:
        number = 0.0
    if not equals or not folder or not 0 < number < float("inf"):
        raise RecipeError(f"--mix {text}: expected FOLDER=WEIGHT with a weight above zero, such as data/signs=0.3")
    return {"dataset": folder, "weight": number, "selection": selection or None}
