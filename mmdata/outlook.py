"""What a plan has left to do on an existing dataset, step by step, without computing anything.

Per step: rows that still need a value. Exact as long as everything before the step is complete; below that the number
is an upper bound, because a filter may yet drop rows.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mmdata.attach_work import summaries
from mmdata.column_files import ColumnFile
from mmdata.errors import StoreError
from mmdata.filters import FilterEngine
from mmdata.group_work import GroupJob
from mmdata.plan import PlannedStep, Resolved, base_identity, identity
from mmdata.preflight import Proved
from mmdata.resolve import resolved_before
from mmdata.survivors import PERMANENT, BoundStep, ShardView, tracks, walk

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Outlook", "StepOutlook", "look", "render"]


@dataclass(frozen=True)
class StepOutlook:
    """`rows_left`: rows to compute, None = not known yet; `is_bound`: at most that many."""

    step: PlannedStep
    set_name: str
    rows_left: int | None
    is_bound: bool


@dataclass(frozen=True)
class Outlook:
    """`rows` and `shards` are those ingested; `shards_expected` None = the list has not been read to its end."""

    rows: int
    shards: int
    shards_expected: int | None
    steps: tuple[StepOutlook, ...]


def look(proved: Proved) -> Outlook:
    """See what is left; reads Parquet columns and footers only."""
    store, steps = proved.store, proved.plan.steps
    rows_files = store.row_files() if proved.document.data is not None else {}
    known = [source["shards"] for source in proved.document.sources]
    expected = None if None in known else sum(known)
    engine = FilterEngine()
    bound: list[BoundStep] = []
    files: dict[str, dict[int, ColumnFile]] = {}
    found: list[StepOutlook] = []
    complete = expected is not None and len(rows_files) == expected
    rows = sum(int(store.footer(name)["num_rows"]) for name in rows_files.values())
    sets: dict[int, str] = {}
    is_cut = False  # a step has no identity yet: whom it and what follows drop is not known
    for step in steps:
        if step.kind == "filter":
            if not is_cut:
                bound.append(BoundStep(step))
            found.append(StepOutlook(step, "", 0, False))
            continue
        if {i.made_by for i in step.inputs} - {None} - set(sets):
            is_cut, complete = True, False
            found.append(StepOutlook(step, "", None, True))  # reads a set that has no identity yet
            continue
        named = _bind(proved, step, sets, bound, rows_files, files, engine, complete)
        if named is None:
            is_cut, complete = True, False
            found.append(StepOutlook(step, "", None if step.kind == "group" else rows, True))
            continue
        sets[step.position] = named.set_name
        is_repeat = named.set_name in files
        files[named.set_name] = store.coverage(named.set_name)
        # What an earlier step of the same set has, this one has.
        left = 0 if is_repeat else sum(_left(proved, named, bound, s, f, files, engine) for s, f in rows_files.items())
        found.append(StepOutlook(step, named.set_name, left, not complete))
        if not is_cut:
            bound.append(named)
        complete = complete and left == 0
    return Outlook(rows, len(rows_files), expected, tuple(found))


def _bind(
    proved: Proved,
    step: PlannedStep,
    sets: Mapping[int, str],
    bound: list[BoundStep],
    rows_files: Mapping[int, str],
    files: Mapping[str, Mapping[int, ColumnFile]],
    engine: FilterEngine,
    complete: bool,
) -> BoundStep | None:
    if step.kind == "group":
        return GroupJob(proved.store, bound, step, rows_files, files, engine).survey() if complete else None
    resolved: Resolved | None = resolved_before(proved.store, step, base_identity(step, sets))
    if resolved is None:
        return None
    name, document, full = identity(step, resolved, sets)
    return BoundStep(step, name, document, full, resolved)


def _left(
    proved: Proved,
    named: BoundStep,
    before: list[BoundStep],
    shard: int,
    rows_file: str,
    files: Mapping[str, Mapping[int, ColumnFile]],
    engine: FilterEngine,
) -> int:
    """Rows of one shard that may reach the step and are not covered in its set."""
    sets = {b.step.position: b.set_name for b in (*before, named) if b.set_name}
    there = {name: found[shard] for name, found in files.items() if shard in found}
    view = ShardView(proved.store, shard, rows_file, sets, there)
    try:
        ways = [track[:-1] for track in tracks([*before, named]) if track[-1] is named]
        alive = np.any([walk(view, way, engine).alive for way in ways], axis=0)
    except StoreError:  # an earlier set has no file for the shard: every row may come
        alive = np.ones(len(view), bool)
    return int((alive & (view.columns(named.set_name).codes > PERMANENT)).sum())


def render(proved: Proved, outlook: Outlook, console: Console) -> None:
    """The plan as a table: each step, what it reads and adds, and the rows left to compute."""
    from rich.table import Table
    from rich.text import Text

    recipe = proved.plan.recipe
    console.print(Text(f"{recipe.name}: {', '.join(s.path for s in recipe.sources)} → {proved.store.url}"))
    for source in recipe.sources[len(recipe.sources) - proved.added :] if proved.added else ():
        console.print(Text(f"to be added: {source.path} ({source.kind}), in shards after those there are"))
    shards = "not read to its end yet" if outlook.shards_expected is None else f"{outlook.shards_expected} shards"
    console.print(Text(f"list: {shards}; ingested: {outlook.rows:,} rows in {outlook.shards} shards"))
    table = Table(show_edge=False, header_style="bold")
    for title in ("", "step", "kind", "reads", "adds", "left to compute"):
        table.add_column(title)
    for item in outlook.steps:
        step = item.step
        reads = [i.visible for i in step.inputs] + (["image"] if step.media else [])
        adds = [visible for _, visible in (*step.outputs, *step.aside)]
        left = _left_words(item, outlook)
        cells = (str(step.position), step.name, step.kind, ", ".join(reads), ", ".join(adds), left)
        table.add_row(*(Text(c) for c in cells))
    console.print(table)
    for line in summaries(proved.plan.steps):
        console.print(Text(line))
    for warning in proved.plan.warnings:
        console.print(Text(f"warning: {warning}"))
    if recipe.export is not None:
        console.print(Text(f"export: {recipe.export.format} at {recipe.export.path}"))
    if proved.store.is_local:
        folder = proved.store.root
        while not os.path.isdir(folder):
            folder = os.path.dirname(folder)
        console.print(Text(f"free disk there: {shutil.disk_usage(folder).free / 1e9:.1f} GB"))


def _left_words(item: StepOutlook, outlook: Outlook) -> str:
    if item.step.kind == "filter":
        return ""
    if item.rows_left is None or not outlook.shards:
        return "all rows that reach it"
    if outlook.shards_expected != outlook.shards:
        return f"up to {item.rows_left:,} rows, and those not fetched yet"
    return f"{'up to ' if item.is_bound and item.rows_left else ''}{item.rows_left:,} rows"
