"""The recipes that come with mmdata, by name; and any recipe put over a dataset that is there already.

In: what the user typed, a path or a name, and perhaps a dataset folder. Out: a `Recipe`. Fails with RecipeError where
neither a file nor a shipped recipe is called so, or the folder's own source cannot be said in a recipe.

A recipe says what to build and from where. Over an existing dataset the second part is settled: rows and media are
those of the folder, so its source, its fetch options and its block lists take the place of the recipe's, and the steps
add columns and a selection of the recipe's name.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from mmdata import recipe as recipes
from mmdata.errors import RecipeError, nearest
from mmdata.ledger import Current, dataset_document
from mmdata.recipe import Recipe
from mmdata.recipe_yaml import from_yaml, text_of
from mmdata.store import Store

__all__ = ["find_recipe", "recipe_folder", "shipped_recipe", "shipped_recipes"]


def recipe_folder() -> Traversable:
    """Where the shipped recipes are: in the package, or beside it in a checkout."""
    packaged = files("mmdata") / "recipes"
    if packaged.is_dir():
        return packaged
    return Path(str(files("mmdata"))).parent / "recipes"


def _shipped() -> dict[str, Traversable]:
    found = [p for p in recipe_folder().iterdir() if p.name.endswith(".yaml")]
    return {p.name.removesuffix(".yaml"): p for p in sorted(found, key=lambda p: p.name)}


def shipped_recipes() -> str:
    """Each shipped recipe with the first line of its comment."""
    lines = []
    for name, path in _shipped().items():
        first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ").strip()
        lines.append(f"{name}  {first}")
    return "\n".join(lines)


def shipped_recipe(name: str) -> str:
    """The text of a shipped recipe; RecipeError with the nearest name when there is none."""
    found = _shipped()
    if name not in found:
        raise RecipeError(f"no recipe is called {name!r}{nearest(name, found)}")
    return found[name].read_text(encoding="utf-8")


def find_recipe(recipe: str | Path, overrides: Sequence[str] = (), dataset: str | Path | None = None) -> Recipe:
    """The recipe in a file, or the shipped one of that name; with `dataset`, over that folder instead of its own.

    `overrides` are `--set` assignments, and have the last word. Where the folder is a dataset already, the recipe's
    `source`, `fetch` and `block` are the dataset's, and an export goes beside it, to `<dataset>-<recipe's name>`.
    """
    text, where = _text(recipe)
    if dataset is None:
        return recipes.parse(text, where=where, overrides=overrides)
    try:
        document = from_yaml(text)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
    if not isinstance(document, dict):
        raise RecipeError(f"{where}: expected a mapping with name, dataset, source and steps")
    if not str(dataset):
        raise RecipeError(f"{where}: the dataset to put it over has an empty name; give a folder")
    folder = str(dataset).rstrip("/") or "/"
    document = {**document, "dataset": folder, **_of_dataset(folder)}
    if isinstance(document.get("export"), dict):
        document["export"] = {**document["export"], "path": f"{folder}-{document.get('name', 'export')}"}
    return recipes.parse(document, where=where, overrides=overrides)


def _text(recipe: str | Path) -> tuple[str, str]:
    """The recipe's YAML and what to call it in messages; a file wins over a shipped recipe of the same name."""
    path = Path(recipe)
    is_name = path.name == str(recipe) and path.suffix not in (".yaml", ".yml")
    if is_name and not os.path.isfile(path):  # which is False for what is no path at all
        found = _shipped()
        if path.name in found:
            return found[path.name].read_text(encoding="utf-8"), path.name
        close = nearest(path.name, found)
        raise RecipeError(f"there is no recipe at {recipe}, and none called so comes with mmdata{close}")
    return text_of(path), str(recipe)


def _of_dataset(folder: str) -> dict[str, Any]:
    """`source`, `fetch` and `block` of the dataset in the folder; nothing where there is none yet."""
    store = Store(folder)
    document = dataset_document(store)
    if document is None:
        return {}
    sources = [
        {**entry["options"], "kind": entry["kind"], "path": entry.get("location") or entry["options"].get("path")}
        for entry in document.sources
    ]
    found: dict[str, Any] = {"source": sources[0] if len(sources) == 1 else sources, "fetch": dict(document.fetch)}
    current = Current.load(store)
    written = yaml.safe_load(current.recipe) if current is not None else {}
    return {**found, "block": written.get("block")}
