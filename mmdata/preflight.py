"""Everything that is proved before a run writes its first byte: the recipe, the source, the folder, the export.

In: a recipe. Out: a `Proved`, or one clear error. Nothing is written here.
"""

from __future__ import annotations

import base64
import itertools
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from mmdata.attach_work import check_files
from mmdata.block_lists import BlockFiles, block_files
from mmdata.columns import base_schema
from mmdata.errors import RecipeError, SourceError
from mmdata.layout import export_columns
from mmdata.ledger import DatasetDocument, dataset_document
from mmdata.local_disk import TEMPORARY
from mmdata.older_rows import require_older
from mmdata.plan import Plan, plan_recipe
from mmdata.publish import Target
from mmdata.recipe import Recipe
from mmdata.sources.adopted import AdoptingSource
from mmdata.sources.kinds import Source
from mmdata.sources.places import absolute
from mmdata.store import Store

__all__ = ["Proved", "prove"]


@dataclass(frozen=True)
class Proved:
    """A plan with the dataset folder it is for; `document.data` is None where the folder is yet to be made.

    `schemas` are the extra columns of every source, `extra` those of all of them; `document` has the
    `added` sources already that the recipe appends to an existing dataset.
    """

    plan: Plan
    store: Store
    document: DatasetDocument
    schemas: tuple[pa.Schema, ...]
    extra: pa.Schema
    added: int = 0
    block: BlockFiles | None = None


def prove(recipe: Recipe) -> Proved:
    """Check a recipe against its source and its dataset folder.

    Raises RecipeError, SourceError or MissingExtra (the user's to mend), StoreError when the folder is damaged.
    """
    schemas, extra = _extra_columns(recipe)
    plan = plan_recipe(recipe, extra)
    plan = replace(plan, warnings=(*plan.warnings, *_source_warnings(recipe)))
    if recipe.export is not None:
        export_columns(_kept_schema(plan, extra), recipe.export.columns)  # columns that exist
    store = Store(recipe.dataset)
    check_files(plan.steps, store)
    require_older(plan.steps, store)
    if recipe.export is not None:
        Target(recipe.export.path, store).require_free()
    described = [_described(source, schema) for source, schema in zip(recipe.sources, schemas, strict=True)]
    if store.is_local and os.path.exists(store.root) and not os.path.isdir(store.root):
        raise RecipeError(f"dataset {store.url} is a file; name a folder")
    columns = [[f.name, str(f.type)] for f in extra]
    block = block_files(recipe.block) if recipe.block is not None and recipe.block.paths else None
    found = dataset_document(store)
    if found is not None:
        _require_same(recipe, store, found, described)
        new = recipe.sources[len(found.sources) :]
        if new:
            _require_rows(new)
            found.sources += described[len(found.sources) :]
            found.columns = columns
        plan = replace(plan, warnings=(*plan.warnings, *_with_blocks(found, store, block)))
        return Proved(plan, store, found, schemas, extra, len(new), block)
    foreign = [name for name, _ in store.entries("") if name not in _OURS and not name.startswith(TEMPORARY)]
    if foreign:
        raise RecipeError(
            f"dataset {store.url} is not empty and no dataset (it holds {foreign[0]!r}); name another folder"
        )
    _require_rows(recipe.sources)
    described[0]["first_shard"] = 0
    document = DatasetDocument(uuid.uuid4().hex, described, recipe.fetch.model_dump(mode="json"), columns)
    _with_blocks(document, None, block)
    return Proved(plan, store, document, schemas, extra, block=block)


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


def _extra_columns(recipe: Recipe) -> tuple[tuple[pa.Schema, ...], pa.Schema]:
    """The extra columns of every source and of all of them; SourceError where one name has two types."""
    schemas = tuple(source.schema() for source in recipe.sources)
    found: dict[str, tuple[pa.Field, str]] = {}
    for source, schema in zip(recipe.sources, schemas, strict=True):
        for field in schema:
            known, where = found.setdefault(field.name.lower(), (field, source.path))
            if (known.name, known.type) != (field.name, field.type):
                raise SourceError(
                    f"column {field.name!r} is {field.type} in {source.path}, but {known.name!r} is {known.type} in "
                    f"{where}: make them alike, or leave one out of source.columns"
                )
    return schemas, pa.schema([pa.field(f.name, f.type) for f, _ in found.values()])


def _source_warnings(recipe: Recipe) -> list[str]:
    """What is asked for and has no effect."""
    if any(source.is_fetched for source in recipe.sources):
        return []
    given = recipe.fetch.model_dump(exclude_defaults=True).keys() - {"shard_rows"}
    if not given:
        return []
    return [f"fetch.{sorted(given)[0]} has no effect: no source is fetched, media is adopted as it is"]


def _require_rows(sources: Sequence[Source]) -> None:
    for source in sources:
        pieces = source.parts(1) if isinstance(source, AdoptingSource) else source.tables(1)
        if next(iter(pieces), None) is None:
            raise SourceError(f"source {source.path} holds no rows")


# What an interrupted first run may leave before dataset.json stands.
_OURS = {"lease.json", ".lock", "runs"}


def _described(source: Source, schema: pa.Schema) -> dict[str, Any]:
    """The source as `dataset.json` keeps it; `schema` is Arrow's own form of its extra columns, for reading them."""
    return {
        "kind": source.kind,
        "options": source.model_dump(mode="json"),
        "location": absolute(source.path),
        "fingerprint": source.fingerprint(),
        "schema": base64.b64encode(schema.serialize().to_pybytes()).decode(),
        "first_shard": None,
        "shards": None,
    }


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
    if len(described) < len(found.sources):
        gone = found.sources[len(described)]["options"]["path"]
        raise RecipeError(
            f"dataset {store.url} was made from {len(found.sources)} sources, the recipe names {len(described)}: "
            f"sources are added, never taken away; put {gone} back, or {cure}"
        )
    for number, (source, now) in enumerate(zip(found.sources, described, strict=False)):
        name = "source" if len(described) == 1 else f"source.{number}"
        _require_same_source(f"dataset {store.url} was made", name, source, now, cure)
    fetch = recipe.fetch.model_dump(mode="json")
    for name in sorted({*found.fetch, *fetch} - recipe.fetch.OPERATIONAL):
        if found.fetch.get(name) != fetch.get(name):
            was, is_now = found.fetch.get(name), fetch.get(name)
            raise RecipeError(f"dataset {store.url} was made with fetch.{name}: {was!r}, not {is_now!r}; {cure}")


def _require_same_source(made: str, name: str, source: Mapping[str, Any], now: Mapping[str, Any], cure: str) -> None:
    path, adopts = now["options"]["path"], now["kind"] != "urls"
    if source["kind"] != now["kind"]:
        raise RecipeError(f"{made} with {name}.kind: {source['kind']!r}, not {now['kind']!r}; {cure}")
    if adopts and source.get("location") != now["location"]:
        raise RecipeError(
            f"{made} with {name}.path: {source.get('location')!r}, where its media lies, not {now['location']!r}; {cure}"
        )
    if source["fingerprint"] != now["fingerprint"]:
        if adopts:
            more = f"what was added to it belongs in a source of its own, after the others; or {cure}"
            raise RecipeError(f"{made} from other files than {path} holds now (names, sizes or times differ); {more}")
        raise RecipeError(f"{made} from another list than {path} (its content differs); {cure}")
    before, options = source["options"], now["options"]
    for option in sorted({*before, *options} - {"path"}):
        if before.get(option) != options.get(option):
            was, is_now = before.get(option), options.get(option)
            raise RecipeError(f"{made} with {name}.{option}: {was!r}, not {is_now!r}; {cure}")
