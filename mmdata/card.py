"""The README.md of an export: what is inside, what became of every row, where it came from, how to open it.

It holds no time, host or path of its own, so that the same export has the same card.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, ClassVar, Protocol

import yaml

from mmdata import __version__
from mmdata.funnel import Funnel, markdown_cell
from mmdata.layout import ExportColumn

__all__ = ["Card", "Opened", "Origin", "render"]

_VERSIONS_OF = ("pyarrow", "duckdb", "numpy", "pillow", "opencv-python-headless", "simplejpeg")
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"),
          (10_000_000, "1M<n<10M"), (100_000_000, "10M<n<100M"), (1_000_000_000, "100M<n<1B"))  # fmt: skip


@dataclass(frozen=True)
class Origin:
    """A dataset that an export takes from: `samples` of its `rows` kept rows. `name` is empty when there is one."""

    name: str
    samples: int
    rows: int
    funnel: Funnel
    chain: str


class Opened(Protocol):
    """What a card asks of the format that wrote the export."""

    tags: ClassVar[tuple[str, ...]]
    reserved: ClassVar[tuple[str, ...]]
    shape: Any

    def header(self) -> dict[str, Any]:
        """Fields of the YAML block."""

    def opening(self) -> str:
        """Markdown: how to open the export."""


@dataclass(frozen=True)
class Card:
    """What a card tells. `writer`: the format, which says how to open it, and its `shape` what the samples look like.

    `extensions`: image format → rows, as stored; `blurred`: pictures with a box that is blurred.
    """

    rows: int
    shards: int
    data_bytes: int
    origins: Sequence[Origin]
    recipe_yaml: str | None
    columns: Sequence[ExportColumn]
    writer: Opened
    extensions: dict[str, int]
    blurred: int


def render(card: Card) -> str:
    """The whole README.md."""
    name = _name(card.recipe_yaml)
    parts = [
        f"---\n{_header(card, name)}---\n",
        f"# {markdown_cell(name)}\n",
        f"{card.rows:,} samples in {card.shards:,} shards, {card.data_bytes:,} bytes, made by mmdata {__version__}.\n",
        "## Open it\n",
        card.writer.opening(),
        *_pictures(card),
        "## What became of every row\n",
        *_funnels(card),
        "## Columns\n",
        _columns(card),
        "## Provenance\n",
        _provenance(card),
        "## Licences\n",
        "Captions and pictures belong to their authors and carry their own licences; mmdata grants no rights to them. "
        "`url` names where each came from, `sha256` the bytes as fetched. Check what your use needs before you train "
        "or publish.\n",
    ]
    return "\n".join(parts)


def _name(recipe_yaml: str | None) -> str:
    try:
        recipe = yaml.safe_load(recipe_yaml or "")
    except yaml.YAMLError:
        return "dataset"
    name = recipe.get("name") if isinstance(recipe, dict) else None
    return str(name) if name else "dataset"


def _header(card: Card, name: str) -> str:
    """The YAML block that Hugging Face's hub and `load_dataset(<folder>)` read."""
    fields: dict[str, Any] = {
        "pretty_name": name,
        "size_categories": [next((label for limit, label in _SIZES if card.rows < limit), "n>1B")],
        "tags": [f"{card.writer.shape.media_name}-text", "mmdata", *card.writer.tags],
        **card.writer.header(),
    }
    text: str = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
    return text


def _pictures(card: Card) -> list[str]:
    """What a reader of the pictures should know of them."""
    found = []
    if len(card.extensions) > 1 and card.writer.shape.extension is not None:
        kinds = ", ".join(f"{n:,} {e}" for e, n in sorted(card.extensions.items()))
        found.append(
            f"The pictures are of several formats ({kinds}) under the one extension `{card.writer.shape.extension}`, "
            "because every sample of a tar must have the same members; decoders look at the bytes.\n"
        )
    if card.blurred:
        found.append(f"Boxes are blurred in {card.blurred:,} pictures, which were encoded anew.\n")
    if found and len(card.origins) > 1:
        found.append("Pictures are counted in the datasets mixed, before samples were chosen or repeated.\n")
    return found


def _funnels(card: Card) -> list[str]:
    """The one funnel, or that of each dataset of a mix under its name."""
    if [origin.name for origin in card.origins] == [""]:
        [one] = card.origins
        repeat = card.writer.shape.options.repeat
        said = (
            f"{one.samples:,} samples of {one.rows:,} kept rows, each as often as its `{repeat}` says; keys of repeats "
        )
        said += "end in `-r1`, `-r2` …\n"
        return [one.funnel.markdown(), *([said] if repeat is not None else [])]
    found = []
    for origin in card.origins:
        passes = f"{origin.samples:,} samples of {origin.rows:,} kept rows, keys `{origin.name}-<key>`"
        if origin.samples > origin.rows:
            passes += "; repeated rows end in `-r1`, `-r2` …"
        found += [f"### {markdown_cell(origin.name)}\n", f"{passes}.\n", origin.funnel.markdown()]
    return found


def _columns(card: Card) -> str:
    lines = ["| column | type | unit | where | meaning |", "|---|---|---|---|---|"]
    shape = card.writer.shape
    if "image" in card.writer.reserved and card.extensions:
        name = card.writer.shape.media_name
        what = "picture" if name == "image" else name
        lines.append(f"| {name} | struct&lt;bytes, path&gt; |  | parquet | the {what} as stored; NULL = none |")
    for c in card.columns:
        where = "json, parquet" if c.name in shape.json_names else "parquet"
        cells = [markdown_cell(c.name), markdown_cell(str(c.type)), c.unit, where, markdown_cell(c.meaning)]
        lines.append(f"| {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    left_out = [c.name for c in card.columns if c.name not in shape.json_names]
    if shape.json_names and left_out:
        text += (
            "\nA column stands in the `.json` of all samples or of none: those with a NULL, an empty list or a value "
            "JSON cannot hold in any exported row are in the Parquet only, because readers infer a column's type from "
            "the first samples.\n"
        )
    return text


def _provenance(card: Card) -> str:
    versions = [f"mmdata {__version__}", f"Python {platform.python_version()}"]
    versions += [f"{package} {metadata.version(package)}" for package in _VERSIONS_OF if _is_installed(package)]
    text = ""
    for origin in card.origins:
        of = f" of {origin.name}" if origin.name else ""
        text += f"- chain{of}: `{origin.chain or 'none'}` "
        text += "(hash of every step, filter and option that decided what is kept)\n"
    text += f"- versions: {', '.join(versions)}\n"
    if card.recipe_yaml is None:
        return text + "- recipe: none; this dataset was exported by hand\n"
    recipe = card.recipe_yaml.rstrip("\n")
    longest = max((len(run) for run in re.findall(r"`+", recipe)), default=0)
    fence = "`" * max(3, longest + 1)  # a recipe cannot close its own block
    return f"{text}- recipe:\n\n{fence}yaml\n{recipe}\n{fence}\n"


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
