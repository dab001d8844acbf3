"""The verdicts of one shard: from its base rows and columns, all steps done, to a file of the ledger.

In: a shard's files and every step of the chain. Out: the file, and what the driver must know without reading it: counts
by verdict, step and reason, the smallest and largest key, and which rows came in ok. A file that an earlier run wrote
of the same chain stands where its rows say the same. StoreError when a step has rows that are not computed.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmdata.column_files import ColumnFile, shard_name, write_parquet
from mmdata.columns import VERDICT_SCHEMA
from mmdata.errors import StoreError
from mmdata.filters import FilterEngine
from mmdata.store import Store
from mmdata.survivors import STILL_IN, TRANSIENT, BoundStep, ShardView, Walk, walk

__all__ = ["Settled", "add_counts", "settle", "settle_shard"]

Counts = tuple[tuple[str, int | None, str | None, int], ...]


@dataclass(frozen=True)
class Settled:
    """The verdicts of one shard. `counts` is (verdict, position, reason, rows); `unsettled` as in `Current`.

    `ok` rows came in with status ok. Keys are None where there are no rows.
    """

    shard: int
    file: str
    rows: int
    counts: Counts
    unsettled: int
    key_min: str | None
    key_max: str | None
    ok: int


def settle_shard(
    store: Store,
    steps: Sequence[BoundStep],
    shard: int,
    rows_file: str,
    files: Mapping[str, ColumnFile],
    folder: str,
    earlier: str,
    engine: FilterEngine,
) -> Settled:
    """Judge every row of a shard by what is committed. `earlier` and `folder` as in `settle`."""
    view = ShardView(store, shard, rows_file, {b.step.position: b.set_name for b in steps if b.set_name}, files)
    view.expect(steps)
    return settle(steps, view, walk(view, steps, engine), folder, earlier)


def settle(steps: Sequence[BoundStep], view: ShardView, state: Walk, folder: str, earlier: str) -> Settled:
    """Write the verdicts of a shard whose rows stand, after all steps, as in `state`.

    `folder` is where the run's verdicts go; `earlier` names a file of the same chain that may say the same already.
    """
    table = _verdicts(view, steps, state)
    base = view.base(["key", "status"])
    is_ok = np.asarray(pc.equal(base["status"], "ok").to_numpy(), bool)
    keys = pc.min_max(base["key"])
    return Settled(
        view.shard,
        _publish(view.store, folder, view.shard, table, earlier),
        len(view),
        _counts(table),
        _unsettled(view, steps, state),
        keys["min"].as_py(),
        keys["max"].as_py(),
        int(is_ok.sum()),
    )


def _counts(table: pa.Table) -> Counts:
    grouped = table.group_by(["verdict", "step", "reason"], use_threads=False).aggregate([([], "count_all")])
    return tuple((g["verdict"], g["step"], g["reason"], g["count_all"]) for g in grouped.to_pylist())


def _publish(store: Store, folder: str, shard: int, table: pa.Table, earlier: str) -> str:
    """Commit the table; a name that is taken holds what a worker of this run left before it died."""
    if earlier and _holds(store, earlier, table):
        return earlier
    name = f"{folder}/{shard_name(shard)}.parquet"
    while True:
        with store.scratch() as scratch:
            write_parquet(table, scratch / "verdicts.parquet")
            if store.commit(name, scratch / "verdicts.parquet") or _holds(store, name, table):
                return name
        name = f"{folder}/{shard_name(shard)}-{secrets.token_hex(3)}.parquet"


def _holds(store: Store, name: str, table: pa.Table) -> bool:
    return store.exists(name) and store.read_table(name).equals(table)


def add_counts(parts: Sequence[Counts]) -> Counts:
    """The counts of several shards together, in a fixed order."""
    total: dict[tuple[str, int | None, str | None], int] = {}
    for part in parts:
        for verdict, step, reason, rows in part:
            total[verdict, step, reason] = total.get((verdict, step, reason), 0) + rows
    return tuple(sorted(((*key, rows) for key, rows in total.items()), key=repr))


def _unsettled(view: ShardView, steps: Sequence[BoundStep], state: Walk) -> int:
    """Rows that lack a value for a transient reason, but did not fail for one.

    Either they went on without it (`on_error: keep`), or an `over: all` group does without them.
    """
    found = np.zeros(len(view), bool)
    for bound in steps:
        if bound.set_name and bound.step.on_error == "keep":
            went_on = state.alive | (state.left > bound.step.position)
            found |= went_on & (view.columns(bound.set_name).codes == TRANSIENT)
        if bound.step.ungated_for:
            found |= view.columns(bound.set_name).codes == TRANSIENT
    return sum(not str(reason).startswith("!") for reason in state.reason[found])


def _verdicts(view: ShardView, steps: Sequence[BoundStep], state: Walk) -> pa.Table:
    """The ledger of one shard: kept, dropped or failed, at which step, why; schema VERDICT_SCHEMA, row order."""
    if state.missing:
        position = min(state.missing)
        raise StoreError(f"shard {view.shard}: step {position} has rows that are not computed; run the recipe again")
    names = {0: "ingest", **{b.step.position: b.step.name for b in steps}}
    is_filter = {b.step.position for b in steps if b.step.kind in ("filter", "keep_list")}
    words = ["dropped" if p in is_filter else "failed" for p in range(max(names) + 1)]
    left, is_kept = state.left, state.left == STILL_IN
    places = pa.array(left, mask=is_kept)
    verdict = pc.fill_null(pa.array(words, pa.string()).take(places), "kept")
    named = pa.array([names.get(p) for p in range(max(names) + 1)], pa.string())
    return pa.table(
        [
            pa.array(view.row_ids),
            verdict,
            places,
            named.take(places),
            pa.array(state.reason, pa.string()),
        ],
        schema=VERDICT_SCHEMA,
    )
