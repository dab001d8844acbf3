"""Captions that say nearly the same: clusters of MinHash signatures of a Jaccard similarity."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from mmdata.errors import RecipeError
from mmdata.groups.clusters import VisitOrder, cluster_columns, cluster_remark, cluster_schema
from mmdata.groups.hamming import distinct_in_order
from mmdata.groups.lsh import Similarity, choose_bands, component_clusters, runs_of, star_clusters
from mmdata.models.shingles import Normal, Shingled, Shingling, Unit, cut, digests, jaccard, pieces, shingle
from mmdata.models.xxh64 import xxh64
from mmdata.stage import ColumnName, Columns, Contract, Group, GroupRows, Needs, parse_schema

__all__ = ["MinhashDuplicates", "MinhashDuplicatesOptions"]

Positions = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]
Signatures = npt.NDArray[np.uint32]

_COMPARED = 1 << 16  # pairs of signatures at a time: 64 MB at 128 places
_SHINGLES = 1 << 22  # of the pairs of sets at a time: some 200 MB, whatever the captions' length


class MinhashDuplicatesOptions(VisitOrder):
    """What is compared, how alike it must be, and which row comes first."""

    of: ColumnName = Field("minhash", description="column of signatures, such as hash_text makes")
    threshold: float = Field(0.8, gt=0, le=1, description="least Jaccard similarity to the cluster's first row")
    link: Literal["star", "component"] = Field(
        "star", description="star: all as alike to the first row; component: whatever a chain of rows links"
    )
    recall_weight: float = Field(
        0.9, gt=0, lt=1, description="how much a missed pair weighs against a needless comparison, for bands and rows"
    )
    bands: int | None = Field(None, ge=1, description="bands of a signature; null = the optimum for the threshold")
    rows: int | None = Field(None, ge=1, description="places in a band; null = the optimum for the threshold")
    exact_of: ColumnName | None = Field(
        None, description="text column whose shingles decide candidates exactly; null = the signatures' estimate"
    )
    unit: Unit = Field("characters", description="with exact_of: what a shingle is made of, as for hash_text")
    size: int = Field(5, ge=1, le=64, description="with exact_of: units in a shingle, as for hash_text")
    normalise: tuple[Normal, ...] = Field(
        ("nfkc", "lower", "punctuation", "whitespace"), description="with exact_of: as for hash_text"
    )

    @model_validator(mode="after")
    def _both_or_neither(self) -> MinhashDuplicatesOptions:
        if (self.bands is None) != (self.rows is None):
            raise ValueError("give bands and rows together, or neither")
        return self

    def banding(self, permutations: int) -> tuple[int, int]:
        """(bands, rows) for signatures of so many places; RecipeError when they do not have as many."""
        if self.bands is None or self.rows is None:
            return choose_bands(self.threshold, permutations, self.recall_weight)
        if self.bands * self.rows > permutations:
            raise RecipeError(
                f"minhash_duplicates: {self.bands} bands of {self.rows} rows are more than the {permutations} places "
                f"of a signature in {self.of!r}; lower them, or raise hash_text's permutations"
            )
        return self.bands, self.rows


class MinhashDuplicates(Group[MinhashDuplicatesOptions]):
    """Clusters of captions whose shingle sets have a Jaccard similarity of at least `threshold`.

    Reads key and `of`; with `exact_of` that text too. Rows are visited in the order of `prefer`, ties by row_id.
    `link: star`: one that is in no cluster opens one and takes every later row in no cluster that is as alike.
    `link: component`: a cluster is all that chains of such pairs connect, and the similarity to the first row may be
    lower.

    A signature is cut into `bands` of `rows` places; pairs that agree in a whole band, which those of similarity s do
    with probability 1 − (1 − s^rows)^bands, are compared in full: by the share of places that agree (at 128 places the
    standard deviation is at most 0.044), or, with `exact_of`, by the shingles themselves. Bands and rows are, unless
    given, the optimum for the threshold (areas above and below the curve, missed pairs weighing `recall_weight`): at
    0.8 and 128 places 14 bands of 9 rows, which look at 0.87 of the pairs at 0.8, 0.99 of those at 0.88 and 0.03 of
    those at 0.5. No candidate is left out, however many share a band; equal signatures are looked at once.

    Writes `minhash_duplicates_id` (row_id of the cluster's first row), `minhash_duplicates_rank` (from 1, in visit
    order), `minhash_duplicates_similarity` (to the first row, float32 in [0, 1], 1 for itself),
    `minhash_duplicates_count` (rows in the cluster), `minhash_duplicates_of` (key of the cluster's first row). Never
    NULL: a row whose signature is NULL has its own id, rank 1, similarity 1 and count 1.

    Signatures are read a shard at a time; those of rows that share a band (with `exact_of` their shingles, 8 bytes
    each), and the keys of all bands (8 bytes a band and row), lie in a scratch folder. In memory: about 100 bytes a
    row, and 16 for each band that a row shares.
    Source: Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, section 3.4; see `lsh`.
    """

    name = "minhash_duplicates"
    version = 1
    label = "minhash_duplicates"
    streams = True

    @classmethod
    def contract(cls, options: MinhashDuplicatesOptions) -> Contract:
        """Reads key and the columns that the options name."""
        text = [options.exact_of] if options.exact_of is not None else []
        return Contract(
            writes=parse_schema(cluster_schema(cls.label, False, f"{cls.label}_similarity: float32")),
            reads=tuple(dict.fromkeys(["key", options.of, *text])),
            needs=Needs(modules=("xxhash",), extra="minhash") if text else Needs(),
        )

    @classmethod
    def check_types(cls, options: MinhashDuplicatesOptions, schema: pa.Schema) -> None:
        """RecipeError when `of` holds no signatures, or too short ones for the bands, or `exact_of` no text."""
        kind = schema.field(options.of).type
        if not pa.types.is_fixed_size_list(kind) or not pa.types.is_uint32(kind.value_type):
            raise RecipeError(
                f"minhash_duplicates: column {options.of!r} is of type {kind}, not signatures; name hash_text's minhash"
            )
        options.banding(kind.list_size)
        if options.exact_of is not None and not pa.types.is_string(schema.field(options.exact_of).type):
            raise RecipeError(
                f"minhash_duplicates: exact_of names {options.exact_of!r}, which is of type "
                f"{schema.field(options.exact_of).type}; name a text column"
            )

    def compute_streamed(self, rows: GroupRows, scratch: Path) -> Columns:
        """One cluster a row."""
        order = rows.visit_order()
        visit = np.empty_like(order)
        visit[order] = np.arange(len(order))
        keys, whole, there = self._keys(rows, visit, scratch)
        present = np.flatnonzero(there)
        _, where, which = distinct_in_order(whole[present])
        distinct = present[where]  # visits, ascending
        bands = [runs_of(band[distinct]) for band in keys]
        alone = np.ones(len(distinct), bool)
        for runs in bands:
            alone[runs.order] = False
        similarity = self._similarity(rows, visit, distinct, ~alone, scratch)
        options = self.options
        if options.link == "star":
            centre, alike = star_clusters(bands, len(distinct), similarity, options.threshold)
        else:
            centre = component_clusters(bands, len(distinct), similarity, options.threshold)
            alike, linked = np.ones(len(distinct), np.float32), np.flatnonzero(centre != np.arange(len(distinct)))
            alike[linked] = similarity(linked, centre[linked])
        first = np.arange(len(order))
        first[present] = distinct[centre][which]
        likeness = np.ones(len(order), np.float32)
        likeness[present] = alike[which]
        columns = cluster_columns(self.label, rows.read(["key"]).take(pa.array(order)), first)
        self.remark = cluster_remark(self.label, columns)
        columns[f"{self.label}_similarity"] = likeness
        return {n: v[visit] if isinstance(v, np.ndarray) else v.take(pa.array(visit)) for n, v in columns.items()}

    def _keys(self, rows: GroupRows, visit: Positions, scratch: Path) -> tuple[Hashes, Hashes, npt.NDArray[np.bool_]]:
        """By visit: the key of each band (bands, N), a hash of the whole, and whether there is a signature."""
        whole, there = np.zeros(len(visit), np.uint64), np.zeros(len(visit), bool)
        keys: Hashes | None = None
        for part in self._parts(rows, visit):
            bands, places = self.options.banding(part.signatures.shape[1])
            if keys is None:
                keys = _mapped(scratch / "keys", np.uint64, (bands, len(visit)))
            columns = [np.ascontiguousarray(c) for c in part.signatures.T]
            for band in range(bands):
                keys[band, part.visits] = xxh64(columns[band * places : (band + 1) * places])
            whole[part.visits] = xxh64(columns) if part.sets is None else digests(part.sets)
            there[part.visits] = True
        return np.empty((0, len(visit)), np.uint64) if keys is None else keys, whole, there

    def _similarity(
        self, rows: GroupRows, visit: Positions, distinct: Positions, wanted: npt.NDArray[np.bool_], scratch: Path
    ) -> Similarity:
        """Of pairs of positions in `distinct`, as far as they are `wanted`: what they need is read once."""
        at = np.full(len(visit), -1, np.int64)  # visit → place among the wanted
        at[distinct[wanted]] = np.arange(int(wanted.sum()))
        place = np.cumsum(wanted) - 1  # position → the same place
        if self.options.exact_of is not None:
            return _exact(*self._sets(rows, visit, at, scratch), place)
        signatures: Signatures | None = None
        for part in self._parts(rows, visit):
            if signatures is None:
                signatures = _mapped(scratch / "signatures", np.uint32, (int(wanted.sum()), part.signatures.shape[1]))
            mine = at[part.visits] >= 0
            signatures[at[part.visits[mine]]] = part.signatures[mine]
        return _estimate(np.empty((0, 1), np.uint32) if signatures is None else signatures, place)

    def _sets(
        self, rows: GroupRows, visit: Positions, at: Positions, scratch: Path
    ) -> tuple[Hashes, Positions, Positions]:
        """The shingle sets that are wanted, one after the other in a file, where each begins, and its size."""
        wanted = int(at.max(initial=-1)) + 1
        begins, sizes, written = np.zeros(wanted, np.int64), np.zeros(wanted, np.int64), 0
        with (scratch / "sets").open("wb") as file:
            for part in self._parts(rows, visit):
                assert part.sets is not None
                mine = at[part.visits]
                sets = part.sets.only(mine >= 0)
                begins[mine[mine >= 0]] = written + sets.offsets[:-1]
                sizes[mine[mine >= 0]] = np.diff(sets.offsets)
                file.write(np.ascontiguousarray(sets.hashes, np.uint64).tobytes())
                written += len(sets.hashes)
        hashes: Hashes = np.memmap(scratch / "sets", np.uint64, "r") if written else np.empty(0, np.uint64)
        return hashes, begins, sizes

    def _tables(self, rows: GroupRows, columns: list[str]) -> Iterator[pa.Table]:
        """The rows in row order: a shard at a time, in pieces where their text is cut."""
        for part in rows.parts(columns):
            exact_of = self.options.exact_of
            for start, stop in [(0, len(part))] if exact_of is None else pieces(part.column(exact_of)):
                yield part.slice(start, stop - start)

    def _parts(self, rows: GroupRows, visit: Positions) -> Iterator[_Part]:
        options, first = self.options, 0
        read = [options.of, *([options.exact_of] if options.exact_of is not None else [])]
        how = Shingling(options.unit, options.size, options.normalise)
        for table in self._tables(rows, read):
            visits = visit[first : first + len(table)]
            first += len(table)
            column = table.column(options.of).combine_chunks()
            there = column.is_valid()
            sets = None
            if options.exact_of is not None:
                sets = shingle(table.column(options.exact_of), how).sets()
                there = pc.and_(there, pa.array(np.diff(sets.offsets) > 0))
                sets = sets.only(there.to_numpy(zero_copy_only=False))
            if len(column):
                numbers = column.filter(there).flatten().to_numpy().reshape(-1, column.type.list_size)
                yield _Part(visits[there.to_numpy(zero_copy_only=False)], numbers, sets)


@dataclass(frozen=True)
class _Part:
    """Rows of one shard that have a signature: their visits, signatures and, where asked for, shingle sets."""

    visits: Positions
    signatures: Signatures
    sets: Shingled | None


def _mapped(path: Path, kind: type, shape: tuple[int, int]) -> npt.NDArray[Any]:
    """An array in a file, which the system may write out; in memory where there is nothing to hold."""
    return np.memmap(path, kind, "w+", shape=shape) if shape[0] * shape[1] else np.zeros(shape, kind)


def _estimate(signatures: Signatures, place: Positions) -> Similarity:
    """The share of places in which signatures agree."""

    def similarity(left: Positions, right: Positions) -> npt.NDArray[np.float64]:
        found = np.empty(len(left))
        for first in range(0, len(left), _COMPARED):
            some = slice(first, first + _COMPARED)
            found[some] = (signatures[place[left[some]]] == signatures[place[right[some]]]).mean(axis=1)
        return found

    return similarity


def _exact(hashes: Hashes, begins: Positions, sizes: Positions, place: Positions) -> Similarity:
    """The Jaccard similarity of shingle sets."""

    def sets(some: Positions) -> Shingled:
        counts = sizes[some]
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        within = np.arange(int(offsets[-1])) - np.repeat(offsets[:-1], counts)
        return Shingled(np.asarray(hashes[np.repeat(begins[some], counts) + within]), offsets)

    def similarity(left: Positions, right: Positions) -> npt.NDArray[np.float64]:
        found = np.empty(len(left))
        one, other = place[left], place[right]
        for start, stop in cut(sizes[one] + sizes[other], _SHINGLES):
            found[start:stop] = jaccard(sets(one[start:stop]), sets(other[start:stop]))
        return found

    return similarity
