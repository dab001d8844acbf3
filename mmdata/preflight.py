"""Everything that is proved before a run writes its first byte: the recipe, the source, the folder, the export.

In: a recipe. Out: a `Proved`, or one clear error. Nothing is written here.
"""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from mmdata.columns import base_schema
from mmdata.errors import RecipeError, SourceError
from mmdata.layout import export_columns
from mmdata.ledger import DatasetDocument, dataset_document
from mmdata.local_disk import TEMPORARY
from mmdata.plan import Plan, plan_recipe
from mmdata.publish import Target
from mmdata.recipe import Recipe
from mmdata.store import Store

__all__ = ["Proved", "prove"]


@dataclass(frozen=True)
class Proved:
    """A plan with the dataset folder it is for; `document.data` is None where the folder is yet to be made."""

    plan: Plan
    store: Store
    document: DatasetDocument


def prove(recipe: Recipe) -> Proved:
    """Check a recipe against its source and its dataset folder.

    Raises RecipeError, SourceError or MissingExtra (the user's to mend), StoreError when the folder is damaged.
    """
    extra = recipe.source.schema()
    plan = plan_recipe(recipe, extra)
    if recipe.export is not None:
        export_columns(_kept_schema(plan, extra), recipe.export.columns)  # columns that exist
    store = Store(recipe.dataset)
    if recipe.export is not None:
        Target(recipe.export.path, store).require_free()
    fingerprint = recipe.source.fingerprint()
    if store.is_local and os.path.exists(store.root) and not os.path.isdir(store.root):
        raise RecipeError(f"dataset {store.url} is a file; name a folder")
    found = dataset_document(store)
    if found is not None:
        _require_same(recipe, store, found, fingerprint)
        return Proved(plan, store, found)
    foreign = [name for name, _ in store.entries("") if name not in _OURS and not name.startswith(TEMPORARY)]
    if foreign:
        raise RecipeError(
            f"dataset {store.url} is not empty and no dataset (it holds {foreign[0]!r}); name another folder"
        )
    if next(iter(recipe.source.tables(1)), None) is None:
        raise SourceError(f"source {recipe.source.path} holds no rows")
    source = {**_described(recipe), "fingerprint": fingerprint, "first_shard": 0, "shards": None}
    columns = [[f.name, str(f.type)] for f in extra]
    document = DatasetDocument(uuid.uuid4().hex, [source], recipe.fetch.model_dump(mode="json"), columns)
    return Proved(plan, store, document)


# What an interrupted first run may leave before dataset.json stands.
_OURS = {"lease.json", ".lock", "runs"}


def _described(recipe: Recipe) -> dict[str, Any]:
    return {"kind": recipe.source.kind, "options": recipe.source.model_dump(mode="json")}


def _kept_schema(plan: Plan, extra: pa.Schema) -> pa.Schema:
    fields = {f.name: f for f in base_schema(extra)}
    fields.update({f.name: f for f in plan.columns})
    for step in plan.steps:
        if step.reason_column:
            fields[step.reason_column] = pa.field(step.reason_column, pa.string())
    return pa.schema(list(fields.values()))


def _require_same(recipe: Recipe, store: Store, found: DatasetDocument, fingerprint: str) -> None:
    """An existing dataset is edited by its steps; another source or fetch would make another dataset."""
    cure = f"name another dataset folder, or remove {store.url} to build it anew"
    source = found.sources[0]
    if source["fingerprint"] != fingerprint:
        raise RecipeError(
            f"dataset {store.url} was made from another list than {recipe.source.path} (its content differs); {cure}"
        )
    now = _described(recipe)["options"]
    for name in sorted({*source["options"], *now} - {"path"}):
        if source["options"].get(name) != now.get(name):
            was, is_now = source["options"].get(name), now.get(name)
            raise RecipeError(f"dataset {store.url} was made with source.{name}: {was!r}, not {is_now!r}; {cure}")
    fetch = recipe.fetch.model_dump(mode="json")
    for name in sorted({*found.fetch, *fetch} - recipe.fetch.OPERATIONAL):
        if found.fetch.get(name) != fetch.get(name):
            was, is_now = found.fetch.get(name), fetch.get(name)
            raise RecipeError(f"dataset {store.url} was made with fetch.{name}: {was!r}, not {is_now!r}; {cure}")
