"""Which column sets a run is computing, so that `mmdata clean` leaves them to the run that goes on where it stopped.

In: a recipe's name and sets. Out: `state/computing-<run>-<n>.json`, written once before anything of those sets is
computed, removed when a run of that recipe has finished. A file that does not read as JSON is a StoreError.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from typing import Any

from mmdata.errors import StoreError
from mmdata.store import Store

__all__ = ["note_computing", "remove_notes", "sets_being_computed"]

_PREFIX = "computing-"


def note_computing(store: Store, name: str, run: str, sets: Collection[str]) -> None:
    """Note that the recipe `name` computes these sets; nothing is written where earlier notes say so."""
    notes = list(_notes(store))
    noted = {s for _, note in notes if note["name"] == name for s in note["sets"]}
    if set(sets) - noted:
        number = sum(note["run"] == run for _, note in notes)
        note = {"name": name, "run": run, "sets": sorted(sets)}
        store.create(f"state/{_PREFIX}{run}-{number}.json", json.dumps(note, indent=1).encode())


def remove_notes(store: Store, name: str) -> None:
    """The recipe has run to its end: its selection names what it needs."""
    for file, note in list(_notes(store)):
        if note["name"] == name:
            store.remove(file)


def sets_being_computed(store: Store, forgotten: str | None = None) -> tuple[set[str], set[str]]:
    """(sets that unfinished runs were computing, the notes of the recipe that is `forgotten`)."""
    notes = list(_notes(store))
    sets = {s for _, note in notes if note["name"] != forgotten for s in note["sets"]}
    return sets, {file for file, note in notes if note["name"] == forgotten}


def _notes(store: Store) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in store.list("state"):
        if file.startswith(_PREFIX):
            try:
                note = json.loads(store.read(f"state/{file}"))
                yield f"state/{file}", {"name": note["name"], "run": note["run"], "sets": list(note["sets"])}
            except (ValueError, KeyError, TypeError) as error:
                raise StoreError(f"state/{file} of {store.url} is damaged ({error!r}); remove it") from None
