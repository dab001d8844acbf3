"""What a dataset keeps of its sources, and how the recipe's are held against it.

In: the recipe's sources, and the entries of `dataset.json` where there is one. Out: per source its extra columns and
its entry. Fails with RecipeError when an entry of the dataset is not what the recipe says, SourceError when a source
cannot be read or two of them contradict each other. A source whose media was adopted to its end is not needed any more:
where it changed since, or cannot be read, that is a warning, and rows whose media is gone fail when a step wants it.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from mmdata.errors import RecipeError, SourceError
from mmdata.recipe import Recipe
from mmdata.sources.adopted import AdoptingSource
from mmdata.sources.kinds import Source
from mmdata.sources.places import absolute

__all__ = ["SourceLook", "all_columns", "look_at", "require_rows", "require_same_sources", "source_warnings"]


@dataclass(frozen=True)
class SourceLook:
    """One source as it is now: its extra columns and its entry; `warning` where it is not as it was adopted."""

    schema: pa.Schema
    entry: dict[str, Any]
    warning: str = ""


def look_at(source: Source, entry: dict[str, Any] | None) -> SourceLook:
    """The source now; `entry` is what the dataset keeps of it, None where the source is new."""
    is_in = (
        entry is not None and not source.is_fetched and entry["shards"] is not None and _is_same_recipe(source, entry)
    )
    try:
        schema = source.schema()
        described = _described(source, schema)
    except SourceError as error:
        if entry is None or not is_in:
            raise
        return SourceLook(_schema_of(entry), entry, f"the source {source.path} cannot be read any more ({error})")
    if entry is not None and is_in and described["fingerprint"] != entry["fingerprint"]:
        warning = (
            f"the source {source.path} changed since it was adopted (names, sizes or times of its files differ): rows "
            "whose media is gone fail as missing_media, and what was added to it belongs in a source of its own"
        )
        return SourceLook(_schema_of(entry), entry, warning)
    return SourceLook(schema, described)


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


def _schema_of(entry: Mapping[str, Any]) -> pa.Schema:
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(entry["schema"])))


def _is_same_recipe(source: Source, entry: Mapping[str, Any]) -> bool:
    here = absolute(source.path)
    return (entry["kind"], entry.get("location")) == (source.kind, here) and _other_option(source, entry) is None


def _other_option(source: Source, entry: Mapping[str, Any]) -> str | None:
    before, now = entry["options"], source.model_dump(mode="json")
    return next((o for o in sorted({*before, *now} - {"path"}) if before.get(o) != now.get(o)), None)


def all_columns(sources: Sequence[Source], schemas: Sequence[pa.Schema]) -> pa.Schema:
    """The extra columns of all sources; SourceError where one name has two types."""
    found: dict[str, tuple[pa.Field, str]] = {}
    for source, schema in zip(sources, schemas, strict=True):
        for field in schema:
            known, where = found.setdefault(field.name.lower(), (field, source.path))
            if (known.name, known.type) != (field.name, field.type):
                raise SourceError(
                    f"column {field.name!r} is {field.type} in {source.path}, but {known.name!r} is {known.type} in "
                    f"{where}: make them alike, or leave one out of source.columns"
                )
    return pa.schema([pa.field(f.name, f.type) for f, _ in found.values()])


def source_warnings(recipe: Recipe) -> list[str]:
    """What is asked for and has no effect."""
    if any(source.is_fetched for source in recipe.sources):
        return []
    given = recipe.fetch.model_dump(exclude_defaults=True).keys() - {"shard_rows"}
    if not given:
        return []
    return [f"fetch.{sorted(given)[0]} has no effect: no source is fetched, media is adopted as it is"]


def require_rows(sources: Sequence[Source]) -> None:
    """SourceError for a source without any."""
    for source in sources:
        pieces = source.parts(1) if isinstance(source, AdoptingSource) else source.tables(1)
        if next(iter(pieces), None) is None:
            raise SourceError(f"source {source.path} holds no rows")


def require_same_sources(
    recipe: Recipe, where: str, entries: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]], cure: str
) -> None:
    """RecipeError unless the recipe's sources begin with those of the dataset at `where`, unchanged."""
    if len(now) < len(entries):
        gone = entries[len(now)]["options"]["path"]
        raise RecipeError(
            f"dataset {where} was made from {len(entries)} sources, the recipe names {len(now)}: sources are added, "
            f"never taken away; put {gone} back, or {cure}"
        )
    for number, (entry, described) in enumerate(zip(entries, now, strict=False)):
        name = "source" if len(now) == 1 else f"source.{number}"
        _require_same(recipe.sources[number], f"dataset {where} was made", name, entry, described, cure)


def _require_same(
    source: Source, made: str, name: str, entry: Mapping[str, Any], now: Mapping[str, Any], cure: str
) -> None:
    if entry["kind"] != source.kind:
        raise RecipeError(f"{made} with {name}.kind: {entry['kind']!r}, not {source.kind!r}; {cure}")
    if not source.is_fetched and entry.get("location") != now["location"]:
        raise RecipeError(
            f"{made} with {name}.path: {entry.get('location')!r}, where its media lies, not {now['location']!r}; {cure}"
        )
    if entry["fingerprint"] != now["fingerprint"]:
        if source.is_fetched:
            raise RecipeError(f"{made} from another list than {source.path} (its content differs); {cure}")
        raise RecipeError(
            f"{made} from other files than {source.path} holds now (names, sizes or times differ), and they are not "
            f"all in yet; {cure}"
        )
    option = _other_option(source, entry)
    if option is not None:
        was, is_now = entry["options"].get(option), source.model_dump(mode="json").get(option)
        raise RecipeError(f"{made} with {name}.{option}: {was!r}, not {is_now!r}; {cure}")
