"""The README.md of an export: what is inside, what became of every row, where it came from, how to open it.

It holds no time, host or path of its own, so that the same export has the same card.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import yaml

from mmdata import __version__
from mmdata.funnel import Funnel, markdown_cell
from mmdata.layout import ExportColumn

__all__ = ["Card", "render"]

_VERSIONS_OF = ("pyarrow", "duckdb", "numpy", "pillow", "opencv-python-headless", "simplejpeg")
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"),
          (10_000_000, "1M<n<10M"), (100_000_000, "10M<n<100M"), (1_000_000_000, "100M<n<1B"))  # fmt: skip


@dataclass(frozen=True)
class Card:
    """What a card tells. `json_columns`: names that stand in each sample's `.json`; empty for Parquet.

    `extensions`: image format → rows, as stored; `extension`: the one the members of the tars have.
    """

    format: str
    rows: int
    shards: int
    data_bytes: int
    funnel: Funnel
    chain: str
    recipe_yaml: str | None
    columns: Sequence[ExportColumn]
    json_columns: Sequence[str]
    extensions: dict[str, int]
    extension: str | None
    has_text: bool


def render(card: Card) -> str:
    """The whole README.md."""
    name = _name(card.recipe_yaml)
    parts = [
        f"---\n{_header(card, name)}---\n",
        f"# {markdown_cell(name)}\n",
        f"{card.rows:,} samples in {card.shards:,} shards, {card.data_bytes:,} bytes, made by mmdata {__version__}.\n",
        "## Open it\n",
        _opening(card),
        "## What became of every row\n",
        card.funnel.markdown(),
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
    pattern = "*.tar" if card.format == "webdataset" else "*.parquet"
    fields: dict[str, Any] = {
        "pretty_name": name,
        "size_categories": [next((label for limit, label in _SIZES if card.rows < limit), "n>1B")],
        "tags": ["image-text", "mmdata", *(["webdataset"] if card.format == "webdataset" else [])],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": pattern}]}],
    }
    text: str = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
    return text


def _opening(card: Card) -> str:
    if card.format == "parquet":
        return (
            "```python\nfrom datasets import load_dataset\n"
            'ds = load_dataset("parquet", data_files={"train": "*.parquet"})["train"]\n```\n\n'
            "```sql\nSELECT key, caption FROM '*.parquet' LIMIT 5;  -- DuckDB\n```\n"
        )
    members = [f"`<key>.{card.extension}`"] if card.extension else []
    members += ["`<key>.txt` (the caption, empty where there is none)"] if card.has_text else []
    members.append("`<key>.json`")
    text = (
        "```python\nfrom datasets import load_dataset\n"
        'ds = load_dataset("webdataset", data_files={"train": "*.tar"})["train"]\n```\n\n'
        "```sql\nSELECT key, caption FROM '*.parquet' LIMIT 5;  -- DuckDB; the tars' samples, in their order\n"
        f"```\n\nEach sample of a tar: {', '.join(members)}.\n"
    )
    if len(card.extensions) > 1:
        kinds = ", ".join(f"{n:,} {e}" for e, n in sorted(card.extensions.items()))
        text += (
            f"\nThe pictures are of several formats ({kinds}) under the one extension `{card.extension}`, "
            "because every sample of a tar must have the same members; decoders look at the bytes.\n"
        )
    return text


def _columns(card: Card) -> str:
    lines = ["| column | type | unit | where | meaning |", "|---|---|---|---|---|"]
    if card.format == "parquet" and card.extensions:
        lines.append("| image | struct&lt;bytes, path&gt; |  | parquet | the picture as stored; NULL = none |")
    for c in card.columns:
        where = "json, parquet" if c.name in card.json_columns else "parquet"
        cells = [markdown_cell(c.name), markdown_cell(str(c.type)), c.unit, where, markdown_cell(c.meaning)]
        lines.append(f"| {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    left_out = [c.name for c in card.columns if c.name not in card.json_columns]
    if card.format == "webdataset" and left_out:
        text += (
            "\nA column stands in the `.json` of all samples or of none: those with a NULL, an empty list or a value "
            "JSON cannot hold in any exported row are in the Parquet only, because readers infer a column's type from "
            "the first samples.\n"
        )
    return text


def _provenance(card: Card) -> str:
    versions = [f"mmdata {__version__}", f"Python {platform.python_version()}"]
    versions += [f"{package} {metadata.version(package)}" for package in _VERSIONS_OF if _is_installed(package)]
    text = f"- chain: `{card.chain or 'none'}` (hash of every step, filter and option that decided what is kept)\n"
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
