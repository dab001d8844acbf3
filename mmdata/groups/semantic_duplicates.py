"""Rows whose embeddings point the same way: SemDeDup.

In: a column of embeddings. Out: clusters of rows, named by the row that stays, and how alike they are. Fails: only a
column that holds no embeddings, before anything runs. The embeddings never stand in memory together: they are read a
shard at a time, sorted by cluster into a file in scratch (as wide as they are stored), and compared from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from mmdata.groups.clusters import VisitOrder, cluster_columns, cluster_remark, cluster_schema
from mmdata.groups.embedded import Embedded, KMeansOptions
from mmdata.models.cosines import Rows, Vectors, cosines_of, in_threads, spans, take_better, unit_rows_of, vectors_of
from mmdata.models.kmeans import NEEDS
from mmdata.models.vectors import require_embedding
from mmdata.stage import ColumnName, Columns, Contract, Group, GroupRows, parse_schema

__all__ = ["SemanticDuplicates", "SemanticDuplicatesOptions", "clusters_for"]

Positions = npt.NDArray[np.int64]
_Reader = Callable[[Positions], Rows]

_PAPERS_ROWS, _PAPERS_CLUSTERS = 440_000_000, 50_000
_TILE = 1024
_HELD_BYTES = 256 << 20  # unit rows of whole clusters that are held for comparison
_NOTHING = -1


class SemanticDuplicatesOptions(VisitOrder, KMeansOptions):
    """What is compared, how alike duplicates are, and which row of them stays."""

    own_orders: ClassVar[tuple[str, ...]] = ("hard", "easy", "random", "first")

    of: ColumnName = Field("clip_image_embedding", description="column of embeddings; any length, they are made 1")
    epsilon: float = Field(
        0.05, ge=0, le=2, description="a row is a duplicate above a cosine of 1 - epsilon to one before it"
    )
    keep: Literal["hard", "easy", "random", "first", "largest"] | dict[Literal["best"], str] | None = Field(  # type: ignore[assignment]
        None,
        description="which comes first: hard (the default: farthest from its cluster's mean), easy (nearest), random, "
        "first (row); or, short for prefer, largest (picture, in px) or {best: column}",
    )
    clusters: int | None = Field(
        None, gt=0, description="k-means clusters; null = by the number of rows: the paper's 50,000 for 440 million"
    )
    iterations: int = Field(100, gt=0, description="k-means iterations")
    seed: int = Field(
        0, ge=0, lt=1 << 63, description="of the k-means, its rows and keep: random; the recipe's, where none is given"
    )


class SemanticDuplicates(Group[SemanticDuplicatesOptions]):
    """Rows whose embedding has a cosine above 1 - epsilon to that of a row before it, within k-means clusters.

    Reads key and `of`. The embeddings are made of length 1 and gathered in clusters by spherical k-means (faiss) of a
    hash-chosen sample. Within a cluster rows are visited by `keep`: hard, the default, begins farthest from the
    cluster's mean; ties by row_id. A row is a duplicate when its largest cosine to any row visited before it in its
    cluster, a duplicate or not, is above 1 - epsilon; it follows that row, the first of several equal ones, and so at
    last a row that stays. Duplicates that k-means put into different clusters are not seen; one cluster compares all
    pairs, which is the default up to 8800 rows, the paper's rows per cluster. Beyond, clusters grow with the power 2/3
    of the rows, so that training and comparing stay in balance, and reach the paper's 50,000 at 440 million.

    Writes `semantic_duplicates_id` (row_id of the row that stays), `semantic_duplicates_rank` (1 for the row that
    stays: filter for it; then in visit order), `semantic_duplicates_count` (that row and all that follow it),
    `semantic_duplicates_of` (key of the row that stays), `semantic_duplicates_is_duplicate` (boolean),
    `semantic_duplicates_similarity` (float32 in [-1, 1]: the largest cosine to a row before it; NULL for the first row
    of a cluster), `semantic_duplicates_nearest` (key of that row), `semantic_duplicates_cluster` (number of the k-means
    cluster, from 0) and `semantic_duplicates_distance` (float32 in [0, 2]: 1 - cosine to that cluster's mean). The last
    four do not depend on epsilon: filter for `coalesce(semantic_duplicates_similarity, -1) <= 0.9` to try another
    without computing anything. A row whose embedding is NULL, zero or not finite is no duplicate: own id, rank 1,
    count 1, and NULL in those four.

    Memory: about 150 bytes a row, the sample, and the embeddings of one cluster up to 256 MB, beyond which it is read
    in tiles; the answer is the same for any number of threads. Scratch: the embeddings as stored. Time grows with rows
    times rows per cluster.
    Source: Abbas et al. 2023 (arXiv 2303.09540), algorithm and Table of LAION-440M: 50,000 clusters, 100 iterations,
    seed 1234. Their code neither normalises nor breaks ties, and its text says that a smaller epsilon removes more: it
    removes less.
    """

    name = "semantic_duplicates"
    version = 1
    label = "semantic_duplicates"
    streams: ClassVar[bool] = True

    @classmethod
    def contract(cls, options: SemanticDuplicatesOptions) -> Contract:
        """Reads key and the column that the options name."""
        own = "is_duplicate: bool, similarity: float32, nearest: string, cluster: int64, distance: float32"
        more = ", ".join(f"{cls.label}_{column.strip()}" for column in own.split(","))
        schema = parse_schema(cluster_schema(cls.label, False, more))
        return Contract(writes=schema, reads=tuple(dict.fromkeys(["key", options.of])), needs=NEEDS)

    @classmethod
    def check_types(cls, options: SemanticDuplicatesOptions, schema: pa.Schema) -> None:
        """RecipeError when `of` holds no embeddings."""
        require_embedding(cls.name, options.of, schema)

    def compute_streamed(self, rows: GroupRows, scratch: Path) -> Columns:
        """One answer per row; see the class."""
        options = self.options
        embedded = Embedded.open(rows, options.of)
        means = embedded.train(options, options.clusters or clusters_for(embedded.count), spherical=True)
        cluster, cosine = embedded.assign(means)
        order = self._order(embedded, cluster, cosine)
        sizes = np.bincount(cluster[embedded.there], minlength=1)
        sorted_rows = _sorted_into(scratch / "embeddings.bin", embedded, order)
        best, similarity = _before(sorted_rows, sizes, pa.cpu_count())
        found = {
            **self._followed(rows, order, best, similarity),
            "cluster": pa.array(cluster, mask=~embedded.there),
            "distance": pa.array(1 - cosine, mask=~embedded.there),
        }
        columns = {f"{self.label}_{name}": values for name, values in found.items()}
        self.remark = cluster_remark(self.label, columns)
        return columns

    def _order(self, embedded: Embedded, cluster: Positions, cosine: npt.NDArray[np.float32]) -> Positions:
        """(N,) positions of rows: cluster by cluster, those without an embedding last, each in the order of `keep`."""
        options = self.options
        key: npt.NDArray[Any]
        if options.prefer:
            key = np.empty(len(cluster), np.int64)
            key[embedded.rows.visit_order()] = np.arange(len(cluster))
        elif options.keep == "random":
            key = embedded.hashes(options.seed)
        elif options.keep == "first":
            key = np.zeros(len(cluster))
        else:
            key = -cosine if options.keep == "easy" else cosine
        return np.lexsort((key, np.where(embedded.there, cluster, np.iinfo(np.int64).max)))  # stable: ties by row_id

    def _followed(
        self, rows: GroupRows, order: Positions, best: Positions, similarity: npt.NDArray[np.float32]
    ) -> dict[str, Any]:
        """The columns that tell of duplicates, in row order; `best` and `similarity` are in visit order."""
        table = rows.read(["key"]).take(pa.array(order))
        alike = np.zeros(len(order), bool)
        alike[: len(best)] = similarity.astype(np.float64) > 1 - self.options.epsilon
        first = np.arange(len(order))
        first[alike] = best[alike[: len(best)]]
        while (further := first[first] != first).any():
            first[further] = first[first[further]]
        nearest = np.full(len(order), _NOTHING)
        nearest[: len(best)] = best
        alone = nearest == _NOTHING
        cosine = np.zeros(len(order), np.float32)
        cosine[: len(best)] = similarity
        found = {
            **{name.removeprefix(f"{self.label}_"): v for name, v in cluster_columns(self.label, table, first).items()},
            "is_duplicate": alike,
            "similarity": pa.array(cosine, mask=alone),
            "nearest": table.column("key").take(pa.array(nearest, mask=alone)),
        }
        back = np.empty(len(order), np.int64)
        back[order] = np.arange(len(order))
        return {n: v[back] if isinstance(v, np.ndarray) else v.take(pa.array(back)) for n, v in found.items()}


def clusters_for(rows: int) -> int:
    """How many clusters so many rows get where the options do not say."""
    if rows * _PAPERS_CLUSTERS <= _PAPERS_ROWS:
        return 1
    return round(_PAPERS_CLUSTERS * math.pow(rows / _PAPERS_ROWS, 2 / 3))


def _sorted_into(path: Path, embedded: Embedded, order: Positions) -> Vectors:
    """(M, D): the embeddings in visit order, as they are stored, in a file that is read as memory."""
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    file: Vectors | None = None
    start = 0
    for part in embedded.rows.parts([embedded.of]):
        vectors = vectors_of(part.column(embedded.of))
        if file is None:
            shape = (max(1, embedded.count), embedded.width)
            file = np.memmap(path, vectors.dtype, "w+", shape=shape)[: embedded.count]
        mine = np.flatnonzero(embedded.there[start : start + len(part)])
        to = place[start + mine]
        along = np.argsort(to)
        file[to[along]] = vectors[mine[along]]
        start += len(part)
    return np.zeros((0, 1), np.float32) if file is None else file


def _before(vectors: Vectors, sizes: Positions, threads: int) -> tuple[Positions, npt.NDArray[np.float32]]:
    """Per row of the clusters, of `sizes` rows one after the other, the row before it that is most alike.

    Returns its position, _NOTHING for the first row of a cluster, and their cosine (then NaN).
    """
    best = np.full(len(vectors), _NOTHING)
    similarity = np.full(len(vectors), np.nan, np.float32)
    stops = np.cumsum(sizes)
    starts = stops - sizes
    most = max(_TILE, _HELD_BYTES // (4 * vectors.shape[1]))
    first = 0
    while first < len(sizes):
        # As many whole clusters as may be held, or one that may not.
        last = max(first + 1, int(np.searchsorted(stops, starts[first] + most, side="right")))
        read = _reader(vectors, int(starts[first]), int(stops[last - 1]), most)

        def look(tile: tuple[int, int, int], read: _Reader = read) -> None:
            start, begin, end = tile
            best[begin:end], similarity[begin:end] = _tile(read, start, begin, end)

        tiles = [
            (int(start), int(start) + begin, int(start) + end)
            for start, size in zip(starts[first:last], sizes[first:last], strict=True)
            for begin, end in spans(int(size), _TILE)
        ]
        in_threads(look, tiles, threads)
        del read, look  # before the next rows are held
        first = last
    return best, similarity


def _tile(read: _Reader, start: int, begin: int, end: int) -> tuple[Positions, npt.NDArray[np.float32]]:
    """`_before` for rows [begin, end) of the cluster that starts at `start`."""
    mine = read(np.arange(begin, end))
    value, which = np.full(len(mine), -np.inf, np.float32), np.full(len(mine), _NOTHING)
    for other in range(start, end, _TILE):
        products = mine @ read(np.arange(other, min(other + _TILE, end))).T
        if other == begin:
            products[_itself_and_later(_TILE)[: len(mine), : len(mine)]] = -np.inf
        take_better(products, other, value, which)
    found = which != _NOTHING
    similarity = np.full(len(mine), np.nan, np.float32)
    similarity[found] = cosines_of(mine[found], read(which[found]))
    return which, similarity


@cache
def _itself_and_later(size: int) -> npt.NDArray[np.bool_]:
    return np.triu(np.ones((size, size), bool))


def _reader(vectors: Vectors, first: int, last: int, most: int) -> _Reader:
    """Unit rows by their positions, from memory where rows [first, last) may be held."""
    if last - first > most:
        return lambda at: unit_rows_of(vectors[at])[0]
    held = unit_rows_of(vectors[first:last])[0]
    return lambda at: held[at - first]
