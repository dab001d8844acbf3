"""The story of one row: its base columns, its verdict, and step by step how it came about.

In: a selection and a key. Out: a `Story`, read from the files of the row's shard alone. The shard is found by the
smallest and largest key of each shard, which the selection records; where keys are in no order, the key columns of the
shards in question are read. SourceError when no row has the key, StoreError when a file has other rows than its shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mmdata.errors import SourceError, StoreError
from mmdata.selections import Current
from mmdata.store import Store

__all__ = ["StepStory", "Story", "tell"]


@dataclass(frozen=True)
class StepStory:
    """What one step did to one row: `state` is passed, dropped, failed or gated (the row had gone before)."""

    position: int
    name: str
    kind: str
    state: str
    reason: str | None
    values: Mapping[str, Any]
    sql: str = ""


@dataclass(frozen=True)
class Story:
    """Everything known of one row. `others` are the stories of rows with the same key: adopted keys need not differ."""

    row: Mapping[str, Any]
    verdict: str
    step_name: str | None
    reason: str | None
    steps: tuple[StepStory, ...]
    others: tuple[Story, ...] = ()


def tell(store: Store, current: Current, key: str) -> Story:
    """The story of the row with this key, and of others that have it too."""
    found = [_story(store, current, place, index) for place, index in _rows_of(store, current, key)]
    if not found:
        raise SourceError(f"no row of {store.url} has the key {key!r}; find keys with mmdata sql")
    return replace(found[0], others=tuple(found[1:]))


def _rows_of(store: Store, current: Current, key: str) -> Iterator[tuple[int, int]]:
    """(place of the shard, index in it) of every row with the key, in the order of the rows."""
    table = current.table
    # In Python: Arrow's way to numpy loads pandas where it is installed, which takes longer than all of this.
    bounds = zip(table["key_min"].to_pylist(), table["key_max"].to_pylist(), strict=True)
    for place in [p for p, (least, most) in enumerate(bounds) if least is not None and least <= key <= most]:
        keys = store.read_table(table["rows"][place].as_py(), ["key"]).column(0).to_pylist()
        yield from ((place, index) for index, found in enumerate(keys) if found == key)


def _story(store: Store, current: Current, place: int, index: int) -> Story:
    table = current.table
    row = _at(store, table["rows"][place].as_py(), index)

    def beside(what: str) -> dict[str, Any]:
        name = table[what][place].as_py()
        found = _at(store, name, index)
        if found.get("row_id") != row["row_id"]:
            raise StoreError(
                f"{name} of {store.url} holds other rows than the base rows (row_id differs); remove it and run the "
                "recipe again"
            )
        return found

    verdict = beside("verdicts")
    steps = []
    for step in current.steps:
        values = beside(step.set_name) if step.set_name else {}
        gated = verdict["step"] is not None and step.position > verdict["step"]
        here = verdict["step"] == step.position
        reason = verdict["reason"] if here else None if gated else values.get("reason")
        state = "gated" if gated else verdict["verdict"] if here else "passed"
        shown = {} if gated else {visible: values.get(own) for own, visible in step.outputs}
        steps.append(StepStory(step.position, step.name, step.kind, state, reason, shown, step.sql))
    return Story(row, verdict["verdict"], verdict["step_name"], verdict["reason"], tuple(steps))


def _at(store: Store, name: str, index: int) -> dict[str, Any]:
    """One row of a file; empty where the file is shorter."""
    found: list[dict[str, Any]] = store.read_table(name).slice(index, 1).to_pylist()
    return found[0] if found else {}
