"""What differs between two selections: which samples entered, which left, at which step and for which reason.

In: two datasets as they were opened, or their names: `DATASET`, `DATASET#SELECTION`, or a recipe file, which means the
selection of that recipe's name in that recipe's dataset. A row is known on both sides by `row_id` within one dataset,
by `uid` or `key` between two; of rows that share one, kept ones meet first, each the next in the order of rows.
Out: a `Difference`. A sample *entered* when B keeps it and A does not, *left* when A keeps it and B does not; the step
and reason are those of the side that does not keep it, `absent` where it has no such row at all.
Proved: kept in A = unchanged + left, kept in B = unchanged + entered, and every row of both sides is counted once.

Only what stands on disk can be compared: the last run of every selection. What an earlier run of the same recipe kept
is gone with the next one; give the edited recipe another name to keep both.

RecipeError: a name that means nothing, or twice the same selection. StoreError: the sums do not come out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import duckdb

from mmdata import recipe as recipes
from mmdata.dataset import Dataset
from mmdata.dataset import open as open_dataset
from mmdata.errors import RecipeError, SourceError, StoreError
from mmdata.scratch import scratch_root

if TYPE_CHECKING:
    from mmdata.store import Store

__all__ = ["By", "Change", "Difference", "DifferenceCount", "diff", "opened"]

By = Literal["row_id", "uid", "key"]
Change = Literal["entered", "left", "unchanged", "in neither"]
ABSENT = "absent"


@dataclass(frozen=True)
class DifferenceCount:
    """So many rows changed in this way, at this step of the side that does not keep them and for this reason."""

    change: Change
    step: int | None
    step_name: str | None
    reason: str | None
    rows: int


@dataclass(frozen=True)
class Difference:
    """Two selections, A and B, row by row. `names` are what they were called, `by` is how rows were matched."""

    names: tuple[str, str]
    by: By
    kept: tuple[int, int]
    rows_in: tuple[int, int]
    counts: tuple[DifferenceCount, ...]
    connection: duckdb.DuckDBPyConnection

    def total(self, change: Change) -> int:
        """Rows that changed in this way."""
        return sum(c.rows for c in self.counts if c.change == change)

    @cached_property
    def rows(self) -> duckdb.DuckDBPyRelation:
        """Every row that entered or left, in the order of A, then of B.

        Columns: `change`, `key`, `uid`, then per side `row_id`, `verdict`, `step`, `step_name`, `reason` with `_a` and
        `_b`; all NULL on a side that has no such row.
        """
        return self.connection.sql("SELECT * FROM changed ORDER BY row_id_a NULLS LAST, row_id_b")

    def examples(self, number: int) -> dict[tuple[str, str | None, str | None], list[str]]:
        """(change, step name, reason) → keys of the first so many rows that changed in this way, there."""
        found = self.connection.execute(
            f"SELECT change, {_WHERE_GONE}, key FROM changed QUALIFY row_number() OVER "
            "(PARTITION BY change, gone_step, gone_step_name, gone_reason ORDER BY row_id_a, row_id_b) <= $number "
            "ORDER BY row_id_a, row_id_b",
            {"number": number},
        ).fetchall()
        keys: dict[tuple[str, str | None, str | None], list[str]] = {}
        for change, _, step_name, reason, key in found:
            keys.setdefault((change, step_name, reason), []).append(key)
        return keys

    def to_dict(self) -> dict[str, Any]:
        """The counts as plain values."""
        return {
            "a": self.names[0],
            "b": self.names[1],
            "by": self.by,
            "kept": list(self.kept),
            "rows_in": list(self.rows_in),
            "counts": [vars(c) for c in self.counts],
        }

    def check(self) -> None:
        """StoreError unless every kept row of both sides is in exactly one of unchanged, left and entered."""
        unchanged, left, entered = (self.total(c) for c in ("unchanged", "left", "entered"))
        if (unchanged + left, unchanged + entered) != self.kept:
            raise StoreError(
                f"{self.names[0]} keeps {self.kept[0]} rows and {self.names[1]} keeps {self.kept[1]}, but "
                f"{unchanged} + {left} and {unchanged} + {entered} were found; run the recipes again"
            )


def diff(a: Dataset | str | Path, b: Dataset | str | Path, *, by: By | None = None) -> Difference:
    """What B keeps and A does not, and the other way round; see the top of this file.

    `by` defaults to `row_id` where both are of one dataset, and to `uid` where they are not.
    """
    sides = opened(a), opened(b)
    names = (_name(a, sides[0]), _name(b, sides[1]))
    one = _dataset_id(sides[0].store) == _dataset_id(sides[1].store)
    chosen: By = by or ("row_id" if one else "uid")
    if chosen not in ("row_id", "uid", "key"):
        raise RecipeError(f"--by {chosen}: expected row_id, uid or key")
    if chosen == "row_id" and not one:
        raise RecipeError(
            "--by row_id: these are two datasets, whose row_ids mean nothing to one another; use uid or key"
        )
    current = [s.current for s in sides]
    if current[0] is None or current[1] is None:
        missing = names[0] if current[0] is None else names[1]
        raise RecipeError(f"no run has finished on {missing} yet; run its recipe to the end first")
    if one and current[0] == current[1]:
        raise RecipeError(
            f"{names[0]} and {names[1]} are one selection, of which only the last run is on disk; give the edited "
            "recipe a name of its own, run it, and compare the two"
        )
    connection = _connect(sides, chosen)
    counts = tuple(DifferenceCount(*row) for row in connection.execute(_COUNTS).fetchall())
    kept = tuple(sum(n for verdict, *_, n in c.counts if verdict == "kept") for c in current if c is not None)
    rows_in = tuple(sum(n for *_, n in c.counts) for c in current if c is not None)
    found = Difference(names, chosen, (kept[0], kept[1]), (rows_in[0], rows_in[1]), counts, connection)
    found.check()
    return found


def opened(side: Dataset | str | Path) -> Dataset:
    """The dataset that a side means, at its selection."""
    if isinstance(side, Dataset):
        return side
    text = str(side)
    if text.endswith((".yaml", ".yml")):
        recipe = recipes.load(text)
        return open_dataset(recipe.dataset, recipe.name)
    folder, mark, selection = text.rpartition("#")
    if not mark:
        return open_dataset(text)
    if "://" in text:
        return open_dataset(folder, selection)
    try:
        return open_dataset(text)  # a folder may have a # in its name
    except SourceError:
        return open_dataset(folder, selection)


def _name(given: Dataset | str | Path, side: Dataset) -> str:
    if not isinstance(given, Dataset):
        return str(given)
    name = getattr(side.current, "name", "")
    return f"{side.store.url}#{name}" if name else side.store.url


def _dataset_id(store: Store) -> Any:
    return json.loads(store.read("dataset.json")).get("id")


def _connect(sides: Sequence[Dataset], by: By) -> duckdb.DuckDBPyConnection:
    """A connection with `matched`, every row of both sides, and `changed`, those that entered or left."""
    for side in sides:
        _ = side.connection  # proves that the files hold the rows of their shards
    connection = duckdb.connect(":memory:")
    connection.execute("SET enable_progress_bar = false")
    # Where a join does not fit into memory: in our scratch folder, not in the current one.
    connection.execute("SET temp_directory = ?", [str(scratch_root() / "duckdb")])
    for fs in {str(s.store.fs.protocol): s.store.fs for s in sides if not s.store.is_local}.values():
        connection.register_filesystem(fs)
    if by == "row_id":
        connection.execute(f"CREATE VIEW matched AS {_by_position(sides)}")
        [[astray]] = connection.execute("SELECT count(*) FROM matched WHERE row_id_a <> row_id_b").fetchall()
        if astray:
            raise StoreError(f"{sides[0].store.url}: {astray} rows stand in other places of two selections' verdicts")
    else:
        # Two passes over a join of texts take longer than its rows take space, which may be on disk.
        pairs = (f"({_side(side, by)}) AS {letter}" for letter, side in zip("ab", sides, strict=True))
        joined = " FULL JOIN ".join(pairs) + " ON a.match = b.match AND a.turn = b.turn"
        names = "coalesce(a.key, b.key) AS key, coalesce(a.uid, b.uid) AS uid"
        connection.execute(f"CREATE TABLE matched AS SELECT {_CHANGE}, {names}, {_BOTH} FROM {joined}")
    connection.execute("CREATE VIEW changed AS SELECT * FROM matched WHERE change IN ('entered', 'left')")
    return connection


def _by_position(sides: Sequence[Dataset]) -> str:
    """Rows of one dataset beside their verdicts on both sides: no shard ever changes its rows or their order."""
    shards = [set(side.current.shards) for side in sides if side.current is not None]
    parts = []
    for common, seen in ((shards[0] & shards[1], "ab"), (shards[0] - shards[1], "a"), (shards[1] - shards[0], "b")):
        if not common:
            continue
        sources = [f"(SELECT key, uid FROM {_listed(sides['ab'.index(seen[-1])], 'rows', common)}) AS r"]
        for letter, side in zip("ab", sides, strict=True):
            if letter in seen:
                sources.append(f"{_listed(side, 'verdicts', common)} AS {letter}")
        absent = "".join(f" CROSS JOIN ({_NOBODY}) AS {letter}" for letter in "ab" if letter not in seen)
        parts.append(f"SELECT {_CHANGE}, r.key, r.uid, {_BOTH} FROM {' POSITIONAL JOIN '.join(sources)}{absent}")
    return "\nUNION ALL\n".join(parts) or f"SELECT {_CHANGE}, '' AS key, '' AS uid, {_BOTH} FROM {_EMPTY}"


def _listed(side: Dataset, what: Literal["rows", "verdicts"], shards: set[int]) -> str:
    assert side.current is not None
    names = side.current.rows if what == "rows" else side.current.verdicts
    return _files(side.store, [n for s, n in zip(side.current.shards, names, strict=True) if s in shards])


def _side(side: Dataset, by: By) -> str:
    assert side.current is not None
    rows, verdicts = (_files(side.store, names) for names in (side.current.rows, side.current.verdicts))
    # A NULL, as of a purged row, meets nothing.
    order = "v.verdict IS DISTINCT FROM 'kept', r.row_id"
    turn = f"row_number() OVER (PARTITION BY r.{by} ORDER BY {order})"
    return (
        f"SELECT r.{by} AS match, {turn} AS turn, r.key, r.uid, r.row_id, v.verdict, v.step, v.step_name, v.reason "
        f"FROM (SELECT row_id, key, uid FROM {rows}) AS r POSITIONAL JOIN {verdicts} AS v"
    )


def _files(store: Store, names: Sequence[str]) -> str:
    paths = ", ".join("'" + store.path_for_duckdb(n).replace("'", "''") + "'" for n in names)
    return f"read_parquet([{paths}])"


_SIDE = ("row_id", "verdict", "step", "step_name", "reason")
_BOTH = ", ".join(f"{side}.{name} AS {name}_{side}" for side in "ab" for name in _SIDE)
_NOBODY = (
    "SELECT NULL::BIGINT AS row_id, NULL::VARCHAR AS verdict, NULL::SMALLINT AS step, NULL::VARCHAR AS step_name, "
    "NULL::VARCHAR AS reason"
)
_EMPTY = f"({_NOBODY}) AS a, ({_NOBODY}) AS b WHERE false"
_CHANGE = """
CASE WHEN a.verdict IS NOT DISTINCT FROM 'kept' AND b.verdict IS NOT DISTINCT FROM 'kept' THEN 'unchanged'
     WHEN a.verdict IS NOT DISTINCT FROM 'kept' THEN 'left'
     WHEN b.verdict IS NOT DISTINCT FROM 'kept' THEN 'entered'
     ELSE 'in neither' END AS change
"""
# Of the side that does not keep the row.
_WHERE_GONE = f"""
CASE change WHEN 'entered' THEN step_a WHEN 'left' THEN step_b END AS gone_step,
CASE WHEN change = 'entered' AND row_id_a IS NULL THEN '{ABSENT}' WHEN change = 'entered' THEN step_name_a
     WHEN change = 'left' AND row_id_b IS NULL THEN '{ABSENT}' WHEN change = 'left' THEN step_name_b END
  AS gone_step_name,
CASE change WHEN 'entered' THEN reason_a WHEN 'left' THEN reason_b END AS gone_reason
"""
_COUNTS = f"""
SELECT change, {_WHERE_GONE}, count(*) AS rows FROM matched GROUP BY 1, 2, 3, 4
ORDER BY list_position(['entered', 'left', 'unchanged', 'in neither'], change), gone_step NULLS LAST, gone_step_name,
  gone_reason
"""
