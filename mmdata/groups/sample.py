"""A random part of the rows: so many, or a fraction, over all or of each group, by weight, with capped repeats.

In: columns of weights and of groups, where they are given. Out: per row how often it is taken. Fails: only a column of
weights that holds no numbers, before anything runs. Some 60 bytes a row are held.
"""

from __future__ import annotations

import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from mmdata.errors import RecipeError
from mmdata.groups.draws import row_words, uniform
from mmdata.stage import ColumnName, Columns, Contract, Group, GroupRows, Options, parse_schema

__all__ = ["Sample", "SampleOptions"]

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


class SampleOptions(Options):
    """How many rows, of which groups, and what makes one likelier than another."""

    count: int | None = Field(None, gt=0, description="so many rows; with `per` so many of each group; or `fraction`")
    fraction: float | None = Field(None, gt=0, le=1, description="part of the rows; with `per` of each group")
    per: ColumnName | None = Field(None, description="column of groups, such as language or concept")
    weight: ColumnName | None = Field(None, description="column of numbers: a row's chance; NULL, 0 or less: none")
    repeats: int = Field(
        1, ge=1, le=100, description="a group with fewer rows than `count` takes its rows up to so many times each"
    )
    seed: int = Field(0, ge=0, lt=1 << 63, description="of the draws; default: the recipe's")

    @model_validator(mode="after")
    def _one_size(self) -> SampleOptions:
        if (self.fraction is None) == (self.count is None):
            raise ValueError("give fraction or count, and not both")
        if self.repeats > 1 and self.count is None:
            raise ValueError("repeats fill up a count; a fraction never takes a row twice")
        return self


class Sample(Group[SampleOptions]):
    """A random sample of the rows, exact in its size.

    Reads uid, and `per` and `weight` where given. Of N rows that may be taken, `count` are (at most `repeats` · N), or
    ⌊fraction · N⌋ (the product is exact: 0.29 of 100 is 29). With `per` that holds for each of its values, so that
    `count` balances groups and `fraction` keeps their proportions; rows whose `per` is NULL are a group. Writes
    `sample_repeats` (int32: how often the row is taken, 0 = not at all) and `sample_kept` (boolean: whether at least
    once), never NULL. Rows are never doubled in a dataset: filter by `sample_kept`, and let `export.repeat:
    sample_repeats` write a row as often as it says.

    Without `weight` every row has the same chance. With it, rows are drawn one after the other without replacement,
    each time with probabilities in proportion to the weights left; a row whose weight is NULL, 0 or less is never
    taken. Where a count is more than the rows there are, all are taken alike often, and the rest once more by the same
    draw. `repeats` ends at 100: DataComp saw training diverge where classes were balanced by repetition.

    A draw is a hash of seed and uid: it depends neither on shards nor on other rows; of rows with one uid the first
    comes first.
    Source: Efraimidis and Spirakis 2006 (Information Processing Letters 97), algorithm A: the largest u^(1/w), here the
    smallest of ln(−ln u) − ln w.
    """

    name = "sample"
    version = 1
    label = "sample"
    streams = True

    @classmethod
    def contract(cls, options: SampleOptions) -> Contract:
        """Reads uid and the columns that the options name."""
        reads = tuple(dict.fromkeys(filter(None, ["uid", options.per, options.weight])))
        return Contract(writes=parse_schema("sample_repeats: int32, sample_kept: bool"), reads=reads)

    @classmethod
    def check_types(cls, options: SampleOptions, schema: pa.Schema) -> None:
        """RecipeError when `weight` holds no numbers, or `per` lists."""
        if options.weight is not None:
            kind = schema.field(options.weight).type
            if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
                raise RecipeError(f"sample: column {options.weight!r} is of type {kind}, and is to hold numbers")
        if options.per is not None and pa.types.is_nested(schema.field(options.per).type):
            raise RecipeError(f"sample: column {options.per!r} is of type {schema.field(options.per).type}; name text")

    def compute_streamed(self, rows: GroupRows, scratch: Path) -> Columns:
        """One look at the rows, then a sort of their keys in each group."""
        keys, groups = [np.zeros(0)], [np.zeros(0, np.int64)]
        codes: dict[Any, int] = {}
        options = self.options
        columns = list(dict.fromkeys(c for c in ("uid", options.per, options.weight) if c is not None))
        for part in rows.parts(columns):
            keys.append(self._keys(part))
            groups.append(_groups(part, options.per, codes))
        repeats = self._repeats(np.concatenate(keys), np.concatenate(groups))
        return {"sample_repeats": repeats.astype(np.int32), "sample_kept": repeats > 0}

    def _keys(self, part: pa.Table) -> Floats:
        """Per row the key that orders the draw, the smallest first; infinite for one that is never taken."""
        key = np.log(-np.log(uniform(self.options.seed, row_words(part))))
        if self.options.weight is None:
            return key
        column = part.column(self.options.weight).cast(pa.float64(), safe=False).fill_null(0)
        weight: Floats = np.nan_to_num(np.asarray(column, np.float64))
        can = weight > 0
        return np.where(can, key - np.log(np.where(can, weight, 1)), np.inf)

    def _repeats(self, keys: Floats, groups: Integers) -> Integers:
        """How often each row is taken."""
        there = np.flatnonzero(np.isfinite(keys))
        order = there[np.lexsort((keys[there], groups[there]))]  # equal keys by row_id
        sizes = np.bincount(groups[there])
        wanted = np.array([self._wanted(int(size)) for size in sizes], np.int64)
        group = groups[order]
        rank = np.arange(len(order)) - (np.cumsum(sizes) - sizes)[group]
        whole, rest = np.divmod(wanted, np.maximum(sizes, 1))
        repeats = np.zeros(len(keys), np.int64)
        repeats[order] = whole[group] + (rank < rest[group])
        return repeats

    def _wanted(self, size: int) -> int:
        if self.options.count is not None:
            return min(self.options.count, self.options.repeats * size)
        # As it is written in the recipe, not as the nearest binary number: 0.29 * 100 is 28.999999999999996.
        return int(Decimal(repr(self.options.fraction)) * size)


def _groups(part: pa.Table, per: str | None, codes: dict[Any, int]) -> Integers:
    """Per row the number of its group; `codes` maps values to numbers and grows."""
    if per is None:
        return np.zeros(len(part), np.int64)
    encoded = pc.dictionary_encode(part.column(per).combine_chunks(), null_encoding="encode")
    # NaN is not equal to itself: one object for all of them, so that they are one group in every shard.
    values = [v if v == v else math.nan for v in encoded.dictionary.to_pylist()]
    numbers = np.array([codes.setdefault(v, len(codes)) for v in values], np.int64)
    return numbers[np.asarray(encoded.indices, np.int64)]
