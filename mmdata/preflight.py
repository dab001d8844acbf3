"""Everything that is proved before a run writes its first byte: the recipe, the source, the folder, the export.

In: a recipe. Out: a `Proved`, or one clear error. Nothing is written here.
"""

from __future__ import annotations

import itertools
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from mmdata import img2dataset_backend
from mmdata.attach_work import check_files
from mmdata.block_lists import BlockFiles, block_files
from mmdata.columns import base_schema
from mmdata.errors import RecipeError
from mmdata.exporters.formats import prove_export
from mmdata.fetched_before import EarlierFiles, earlier_files
from mmdata.ledger import DatasetDocument, dataset_document
from mmdata.local_disk import TEMPORARY
from mmdata.older_rows import require_older
from mmdata.plan import Plan, plan_recipe
from mmdata.publish import Target
from mmdata.recipe import Recipe
from mmdata.sample_layout import require_names
from mmdata.settings import FetchOptions
from mmdata.shard_layout import is_layout_name
from mmdata.source_entries import all_columns, look_at, require_rows, require_same_sources, source_warnings
from mmdata.store import Store

__all__ = ["Proved", "prove"]


@dataclass(frozen=True)
class Proved:
    """A plan with the dataset folder it is for; `document.data` is None where the folder is yet to be made.

    `schemas` are the extra columns of every source, `extra` those of all of them; `document` has the
    `added` sources already that the recipe appends to an existing dataset. `drifted` are the sources that are not as
    they were adopted.
    """

    plan: Plan
    store: Store
    document: DatasetDocument
    schemas: tuple[pa.Schema, ...]
    extra: pa.Schema
    added: int = 0
    drifted: frozenset[int] = frozenset()
    block: BlockFiles | None = None
    earlier: EarlierFiles | None = None


def prove(recipe: Recipe) -> Proved:
    """Check a recipe against its source and its dataset folder.

    Raises RecipeError, SourceError or MissingExtra (the user's to mend), StoreError when the folder is damaged.
    """
    store = Store(recipe.dataset)
    if store.is_local and os.path.exists(store.root) and not os.path.isdir(store.root):
        raise RecipeError(f"dataset {store.url} is a file; name a folder")
    found = dataset_document(store)
    entries = [] if found is None else found.sources
    looks = [look_at(s, e) for s, e in itertools.zip_longest(recipe.sources, entries) if s is not None]
    schemas = tuple(look.schema for look in looks)
    extra = all_columns(recipe.sources, schemas)
    plan = plan_recipe(recipe, extra)
    require_names(extra.names, recipe.fetch)
    img2dataset_backend.require(recipe.fetch)
    told = [look.warning for look in looks if look.warning]
    if recipe.fetch.backend == "img2dataset":
        told.append(img2dataset_backend.WARNING)
    plan = replace(plan, warnings=(*plan.warnings, *source_warnings(recipe), *told))
    if recipe.export is not None:
        prove_export(recipe.export, _kept_schema(plan, extra), recipe.dataset)
    check_files(plan.steps, store)
    require_older(plan.steps, store)
    if recipe.export is not None:
        target = Target(recipe.export.path, store)
        for source in recipe.sources:
            if source.kind != "urls":
                target.require_apart_from(source.path)
        target.require_free()
    described = [look.entry for look in looks]
    columns = [[f.name, str(f.type)] for f in extra]
    block = block_files(recipe.block) if recipe.block is not None and recipe.block.paths else None
    earlier = earlier_files(recipe.fetch.skip_existing, store)
    if found is not None:
        _require_same(recipe, store, found, described)
        new = recipe.sources[len(found.sources) :]
        if new:
            require_rows(new)
            found.sources += described[len(found.sources) :]
            found.columns = columns
        plan = replace(plan, warnings=(*plan.warnings, *_with_blocks(found, store, block)))
        drifted = frozenset(number for number, look in enumerate(looks) if look.warning)
        return Proved(plan, store, found, schemas, extra, len(new), drifted, block, earlier)
    foreign = [name for name, _ in store.entries("") if name not in _OURS and not name.startswith(TEMPORARY)]
    if foreign:
        if dataset_document(store) is not None:
            return prove(recipe)  # another run has made it a dataset since we looked
        raise RecipeError(_not_ours(store, foreign))
    require_rows(recipe.sources)
    described[0]["first_shard"] = 0
    document = DatasetDocument(uuid.uuid4().hex, described, recipe.fetch.model_dump(mode="json"), columns)
    _with_blocks(document, None, block)
    return Proved(plan, store, document, schemas, extra, block=block, earlier=earlier)


def _with_blocks(document: DatasetDocument, store: Store | None, block: BlockFiles | None) -> list[str]:
    """Note the lists from the first shard on that they are for; a warning when those that are there had others."""
    lists = block.described() if block is not None else {}
    if (document.blocks[-1]["lists"] if document.blocks else {}) == lists:
        return []
    if block is not None:
        block.load()  # what is wrong with their values is told now
    there = store.row_files() if store is not None else {}
    first = next(shard for shard in itertools.count() if shard not in there)
    document.blocks.append({"lists": lists, "first_shard": first})
    if not there:
        return []
    return [f"the lists under block are not those of the {len(there)} shards there are: they apply to new shards only"]


def _not_ours(store: Store, foreign: Sequence[str]) -> str:
    """Why the folder cannot become a dataset, and what to do."""
    if any(name.endswith("_stats.json") and is_layout_name(name) for name in foreign):
        return (
            f"{store.url} was made by img2dataset: adopt it with source: {{kind: img2dataset, path: {store.url}}} and "
            "another folder for the dataset, or name another folder"
        )
    return f"dataset {store.url} is not empty and no dataset (it holds {foreign[0]!r}); name another folder"


# What an interrupted first run may leave before dataset.json stands.
_OURS = {"lease.json", ".lock", "runs"}


def _kept_schema(plan: Plan, extra: pa.Schema) -> pa.Schema:
    fields = {f.name: f for f in base_schema(extra)}
    fields.update({f.name: f for f in plan.columns})
    for step in plan.steps:
        if step.reason_column:
            fields[step.reason_column] = pa.field(step.reason_column, pa.string())
    return pa.schema(list(fields.values()))


def _require_same(recipe: Recipe, store: Store, found: DatasetDocument, described: Sequence[Mapping[str, Any]]) -> None:
    """An existing dataset is edited by its steps and grows by sources; another source or fetch would make another."""
    cure = f"name another dataset folder, or remove {store.url} to build it anew"
    require_same_sources(recipe, store.url, found.sources, described, cure)
    fetch, usual = recipe.fetch.model_dump(mode="json"), FetchOptions().model_dump(mode="json")
    for name in sorted({*found.fetch, *fetch} - recipe.fetch.OPERATIONAL):
        # What a dataset of an older version does not mention was as it is by default now.
        was, is_now = found.fetch.get(name, usual.get(name)), fetch.get(name)
        if was != is_now:
            raise RecipeError(f"dataset {store.url} was made with fetch.{name}: {was!r}, not {is_now!r}; {cure}")
