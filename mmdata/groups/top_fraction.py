"""The best part of the rows by a score: an exact quantile over all rows that reach the group.

In: one column of numbers. Out: per row the threshold, the row's place, and whether it is among the best. Fails: only
a column that holds no numbers, and a fraction that is none, both before anything runs.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from mmdata.errors import RecipeError
from mmdata.stage import ColumnName, Columns, Contract, Group, Options, parse_schema

__all__ = ["TopFraction", "TopFractionOptions"]

Floats = npt.NDArray[np.float64]
Positions = npt.NDArray[np.int64]


class TopFractionOptions(Options):
    """Which number decides, and how many rows stay."""

    of: ColumnName = Field("clip_score", description="column of numbers")
    fraction: float | None = Field(None, gt=0, le=1, description="part of the rows that have a number; or `count`")
    count: int | None = Field(None, gt=0, description="so many rows instead")
    best: Literal["highest", "lowest"] = Field("highest", description="which end is kept")
    per: ColumnName | None = Field(None, description="column of groups, such as language: the best part of each")
    ties: Literal["keep", "row_id"] = Field(
        "keep", description="rows equal to the threshold: keep them all, or as many as fill the number, by row_id"
    )
    datacomp: bool = Field(
        False,
        description="DataComp's threshold, which is one row too far down: keeps n + 1 rows where n were asked for",
    )

    @model_validator(mode="after")
    def _one_size(self) -> TopFractionOptions:
        if (self.fraction is None) == (self.count is None):
            raise ValueError("give fraction or count, and not both")
        if self.datacomp and (self.fraction is None or self.ties != "keep" or self.per or self.best == "lowest"):
            raise ValueError("datacomp is a rule for a fraction of the highest, with all ties, and without `per`")
        return self


class TopFraction(Group[TopFractionOptions]):
    """Whether a row is in the best part of all rows by a number.

    Reads `of`, and `per` where given. Of N rows with a number the n = ⌊fraction · N⌋ best are kept (the product is
    exact: 0.29 of 100 is 29), or `count`, at most N. Writes `top_fraction_kept` (boolean), `top_fraction_threshold`
    (float64, unit of `of`: the number of the n-th row, so that kept rows are those not worse than it; NULL where
    n = 0 or that number is infinite) and `top_fraction_rank` (from 1, equal numbers share the smallest). With `per`, N,
    n and all columns are those of the row's group; rows whose `per` is NULL are a group. A row without a number has
    NULL everywhere, so a filter on `top_fraction_kept` drops it. It is a function of the whole set: a changed filter
    above it moves the threshold.

    `datacomp: true` is what DataComp's code does: n = int(N · fraction) in floating point, the threshold is the number
    at place n counted from 0, that is of row n + 1, and all rows not below it are kept: n + 1 of them, and ties. At
    `fraction: 1`, where theirs fails, all are kept.
    Source: baselines/apply_filter.py of mlfoundations/datacomp; Gadre et al. 2023 (arXiv 2304.14108), section 5.
    """

    name = "top_fraction"
    version = 1
    label = "top_fraction"

    @classmethod
    def contract(cls, options: TopFractionOptions) -> Contract:
        """Reads the columns that the options name."""
        schema = "top_fraction_kept: bool, top_fraction_threshold: float64, top_fraction_rank: int64"
        reads = tuple(dict.fromkeys(filter(None, [options.of, options.per])))
        return Contract(writes=parse_schema(schema), reads=reads)

    @classmethod
    def check_types(cls, options: TopFractionOptions, schema: pa.Schema) -> None:
        """RecipeError when `of` holds no numbers, or `per` lists."""
        kind = schema.field(options.of).type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
            raise RecipeError(f"top_fraction: column {options.of!r} is of type {kind}, and is to hold numbers")
        if options.per is not None and pa.types.is_nested(schema.field(options.per).type):
            kind = schema.field(options.per).type
            raise RecipeError(f"top_fraction: column {options.per!r} is of type {kind}; name text or numbers")

    def compute(self, rows: pa.Table) -> Columns:
        """One threshold for all rows, or one for each group of `per`."""
        values, there = _numbers(rows.column(self.options.of))
        worth = values if self.options.best == "highest" else -values
        threshold, rank = np.full(len(rows), np.nan), np.zeros(len(rows), np.int64)
        kept = np.zeros(len(rows), bool)
        for some in self._groups(rows, there):
            limit, chosen, places = self._best(worth[some])
            threshold[some], kept[some], rank[some] = limit, chosen, places
        if self.options.best == "lowest":
            threshold = -threshold
        return {
            "top_fraction_kept": pa.array(kept, mask=~there),
            "top_fraction_threshold": pa.array(threshold, mask=~np.isfinite(threshold)),
            "top_fraction_rank": pa.array(rank, mask=~there),
        }

    def _groups(self, rows: pa.Table, there: npt.NDArray[np.bool_]) -> list[Positions]:
        """Positions, ascending, of the rows with a number, group by group."""
        present = np.flatnonzero(there)
        if self.options.per is None or not len(present):
            return [present] if len(present) else []
        column = rows.column(self.options.per).combine_chunks()
        codes = pc.dictionary_encode(column, null_encoding="encode").indices.to_numpy()[present]
        order = np.argsort(codes, kind="stable")
        return np.split(present[order], np.flatnonzero(np.diff(codes[order])) + 1)

    def _best(self, worth: Floats) -> tuple[float, npt.NDArray[np.bool_], Positions]:
        """Threshold (NaN = no row is kept), which rows are kept, and their places, of one group; more is better."""
        order = np.argsort(-worth, kind="stable")  # ties by row_id
        descending = worth[order]
        rank = np.empty(len(worth), np.int64)
        rank[order] = 1 + np.searchsorted(-descending, -descending, side="left")
        wanted = self._wanted(len(worth))
        if wanted == 0:
            return np.nan, np.zeros(len(worth), bool), rank
        limit = float(descending[wanted - 1])
        if self.options.ties == "keep":
            return limit, worth >= limit, rank
        chosen = np.zeros(len(worth), bool)
        chosen[order[:wanted]] = True
        return limit, chosen, rank

    def _wanted(self, rows: int) -> int:
        options = self.options
        if options.count is not None:
            return min(options.count, rows)
        assert options.fraction is not None
        if options.datacomp:
            return min(int(rows * options.fraction) + 1, rows)
        # As it is written in the recipe, not as the nearest binary number: 0.29 * 100 is 28.999999999999996.
        return int(Decimal(repr(options.fraction)) * rows)


def _numbers(column: pa.ChunkedArray) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """(N,) float64 and whether there is one; integers beyond 2^53 share their neighbour's."""
    values: Any = np.asarray(column.cast(pa.float64(), safe=False).fill_null(np.nan).to_numpy(), np.float64)
    return values, ~np.isnan(values)
