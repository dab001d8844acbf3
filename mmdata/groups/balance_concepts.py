"""MetaCLIP's balancing: common concepts are thinned out, rare ones stay whole.

In: a column of lists, the concepts of each row. Out: per row the probability that it stays, whether it does, and its
rarest concept. Fails: only a column that holds no lists of texts or numbers, before anything runs. Rows are read twice,
a shard at a time; what is held is a count per concept and some 70 bytes a row, the answer among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from mmdata.errors import RecipeError
from mmdata.groups.draws import row_words, text_word, uniform
from mmdata.stage import ColumnName, Columns, Contract, Group, GroupRows, Options, parse_schema

__all__ = ["BalanceConcepts", "BalanceConceptsOptions"]

Integers = npt.NDArray[np.int64]


class BalanceConceptsOptions(Options):
    """Which concepts, and how many rows of each."""

    of: ColumnName = Field("concepts", description="column of lists of texts or integers: the concepts of a row")
    t: int = Field(20_000, gt=0, description="a concept in more rows is thinned out to about so many")
    seed: int = Field(0, ge=0, lt=1 << 63, description="of the draws; default: the recipe's")


class BalanceConcepts(Group[BalanceConceptsOptions]):
    """Whether a row stays when no concept may have much more than `t` rows: MetaCLIP's balancing.

    Reads uid and `of`. A concept e is counted once a row, over all rows that reach the group; it is kept with
    p_e = t / max(count_e, t). A row draws once for each of its concepts, and stays if any of them is kept. Writes
    `balance_concepts_kept` (boolean), `balance_concepts_probability` in [0, 1] (float64: 1 − Π(1 − p_e), what `kept`
    is drawn with), `balance_concepts_rarest` (the row's concept with the smallest count, as text; of equal ones the
    first in the alphabet) and `balance_concepts_rarest_count` (its count, int64). A row without any concept is not
    kept: probability 0, no rarest one. A row whose list is NULL has NULL everywhere, so a filter drops it too.

    A draw is a hash of seed, uid and concept: it depends neither on shards nor on other rows, but two rows with one uid
    (the same address and caption twice) stay or go together; deduplicate first, as MetaCLIP does. t is 20,000 for
    MetaCLIP's 400 million pairs, and 170,000 for its 2.5 billion ([M]: the second could not be verified); a smaller
    pool wants a smaller t.
    Source: metaclip/balancing.py of facebookresearch/MetaCLIP; Xu et al. 2023 (arXiv 2309.16671), section 3.3. Their
    demonstration may write a pair several times, once for each of its texts; here a row stays once or not at all.
    """

    name = "balance_concepts"
    version = 1
    label = "balance_concepts"
    streams = True

    @classmethod
    def contract(cls, options: BalanceConceptsOptions) -> Contract:
        """Reads uid and the column that the options name."""
        schema = (
            "balance_concepts_kept: bool, balance_concepts_probability: float64, balance_concepts_rarest: string, "
            "balance_concepts_rarest_count: int64"
        )
        return Contract(writes=parse_schema(schema), reads=("uid", options.of))

    @classmethod
    def check_types(cls, options: BalanceConceptsOptions, schema: pa.Schema) -> None:
        """RecipeError when `of` holds no lists of texts or integers."""
        kind = schema.field(options.of).type
        inner = kind.value_type if pa.types.is_list(kind) else None
        if inner is None or not (pa.types.is_string(inner) or pa.types.is_integer(inner)):
            raise RecipeError(
                f"balance_concepts: column {options.of!r} is of type {kind}, and is to hold lists of texts or integers"
            )

    def compute_streamed(self, rows: GroupRows, scratch: Path) -> Columns:
        """Count every concept, then draw."""
        concepts = _Concepts(self.options.of)
        counts = concepts.count(rows)
        names = concepts.names
        # From the rarest to the commonest; equal ones by name.
        by_rarity = np.array(sorted(range(len(names)), key=lambda c: (counts[c], names[c])), np.int64)
        place = np.empty(len(names), np.int64)
        place[by_rarity] = np.arange(len(names))
        words = np.fromiter((text_word(name) for name in names), np.uint64, len(names))
        keep = self.options.t / np.maximum(counts, self.options.t)
        probability, kept = np.zeros(len(rows)), np.zeros(len(rows), bool)
        rarest, there = np.full(len(rows), -1), np.zeros(len(rows), bool)
        start = 0
        for part in rows.parts(["uid", self.options.of]):
            some = slice(start, start + len(part))
            found = self._drawn(concepts, part, place, words, keep)
            probability[some], kept[some], rarest[some], there[some] = found
            start = some.stop
        has_any = rarest >= 0
        code = by_rarity[rarest] if len(names) else rarest
        texts = pa.DictionaryArray.from_arrays(
            pa.array(code.astype(np.int32), mask=~has_any), pa.array(names, pa.string())
        )
        rarest_counts = counts[np.where(has_any, code, 0)] if len(names) else np.zeros(len(code), np.int64)
        return {
            "balance_concepts_kept": pa.array(kept, mask=~there),
            "balance_concepts_probability": pa.array(probability, mask=~there),
            "balance_concepts_rarest": _decoded(texts),
            "balance_concepts_rarest_count": pa.array(rarest_counts, mask=~has_any),
        }

    def _drawn(
        self,
        concepts: _Concepts,
        part: pa.Table,
        place: Integers,
        words: npt.NDArray[np.uint64],
        keep: npt.NDArray[np.float64],
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_], Integers, npt.NDArray[np.bool_]]:
        """Probability, kept, place of the rarest concept (-1 = none), and whether there is a list, of each row."""
        owner, code = concepts.of(part)
        there = np.asarray(part.column(self.options.of).is_valid())
        stays_out, kept = np.ones(len(part)), np.zeros(len(part), bool)
        rarest = np.full(len(part), -1)
        if len(owner):
            first = np.flatnonzero(np.r_[True, np.diff(owner) > 0])
            with_any = owner[first]
            stays_out[with_any] = np.multiply.reduceat(1 - keep[code], first)
            drawn = uniform(self.options.seed, row_words(part)[owner], words[code]) < keep[code]
            kept[with_any] = np.logical_or.reduceat(drawn, first)
            rarest[with_any] = np.minimum.reduceat(place[code], first)
        return 1 - stays_out, kept, rarest, there


_CHUNK = 1 << 20  # texts of an Arrow array, whose bytes may not pass 2 GiB


def _decoded(texts: pa.DictionaryArray) -> pa.ChunkedArray:
    chunks = [texts.slice(start, _CHUNK).dictionary_decode() for start in range(0, len(texts), _CHUNK)]
    return pa.chunked_array(chunks, pa.string())


class _Concepts:
    """Numbers for the concepts of a column, in the order in which they are met."""

    def __init__(self, column: str) -> None:
        self._column = column
        self._codes: dict[str, int] = {}

    @property
    def names(self) -> list[str]:
        """The concepts as texts, by number."""
        return list(self._codes)

    def count(self, rows: GroupRows) -> Integers:
        """In how many rows each concept is."""
        counts = np.zeros(0, np.int64)
        for part in rows.parts([self._column]):
            _, code = self.of(part)
            counts = np.concatenate([counts, np.zeros(len(self._codes) - len(counts), np.int64)])
            counts += np.bincount(code, minlength=len(counts))
        return counts

    def of(self, part: pa.Table) -> tuple[Integers, Integers]:
        """Pairs of a row's place and a concept's number, sorted, each once."""
        owners, codes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for first, chunk in _chunks(part.column(self._column)):
            encoded = pc.dictionary_encode(pc.list_flatten(chunk))
            names = encoded.dictionary.cast(pa.string()).to_pylist()
            numbers = np.array([self._codes.setdefault(n, len(self._codes)) for n in names], np.int64)
            there = np.asarray(encoded.indices.is_valid())
            lengths = np.asarray(pc.list_value_length(chunk).fill_null(0), np.int64)
            owners.append(first + np.repeat(np.arange(len(chunk)), lengths)[there])
            codes.append(numbers[np.asarray(encoded.indices.drop_null(), np.int64)])
        pairs = np.unique(np.concatenate(owners) * max(1, len(self._codes)) + np.concatenate(codes))
        owner, code = np.divmod(pairs, max(1, len(self._codes)))
        return owner, code


def _chunks(column: pa.ChunkedArray) -> Iterator[tuple[int, pa.Array]]:
    first = 0
    for chunk in column.chunks:
        yield first, chunk
        first += len(chunk)
