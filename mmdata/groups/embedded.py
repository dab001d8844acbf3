"""The embeddings of a group's rows, read a shard at a time: which rows have one, k-means of a sample, assignment.

In: rows of a group that streams and the name of a column of embeddings. Out: numpy arrays with one entry per row, in
row order. Fails: a column that is no embedding is refused at `plan` (`require_embedding`). Rows whose embedding is
NULL, zero or not finite are not `there`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from mmdata.models.cosines import Rows, cosines_of, nearest, unit_rows_of, vectors_of
from mmdata.models.kmeans import train_means
from mmdata.models.xxh64 import xxh64
from mmdata.stage import GroupRows, Options

__all__ = ["NO_CLUSTER", "Embedded", "KMeansOptions"]

NO_CLUSTER = -1
_PIECE = 1 << 14  # rows looked at together

Mask = npt.NDArray[np.bool_]


class KMeansOptions(Options):
    """How k-means is trained, whatever the clusters are for."""

    clusters: int | None = Field(None, gt=0, description="number of clusters")
    iterations: int = Field(20, gt=0, description="k-means iterations")
    rows_per_cluster: int = Field(256, gt=0, description="so many hash-chosen rows for each cluster train the k-means")
    train_mb: int = Field(4096, gt=0, description="most memory for them, in MB: fewer rows where they are wider")
    seed: int = Field(
        0, ge=0, lt=1 << 63, description="of the k-means and the choice of its rows; the recipe's, where none is given"
    )


@dataclass(frozen=True)
class Embedded:
    """`of`'s embeddings of `rows`: `there`, (N,), says which rows have one, `width` how many numbers they have."""

    rows: GroupRows
    of: str
    there: Mask
    width: int

    @classmethod
    def open(cls, rows: GroupRows, of: str) -> Embedded:
        """Look at every row once."""
        found, width = np.zeros(len(rows), bool), 0
        for start, unit, there in _units(rows, of):
            found[start : start + len(there)], width = there, unit.shape[1]
        return cls(rows, of, found, width)

    @property
    def count(self) -> int:
        """Rows with an embedding."""
        return int(self.there.sum())

    def hashes(self, seed: int) -> npt.NDArray[np.uint64]:
        """(N,) XXH64 of each row_id under the seed: random numbers that depend on nothing else."""
        return xxh64([self.rows.row_ids().astype(np.uint64)], seed)

    def train(self, options: KMeansOptions, clusters: int, spherical: bool) -> Rows:
        """(K, D) means of at most `clusters` clusters, K = 0 where no row has an embedding."""
        if not self.count:
            return np.zeros((0, self.width), np.float32)
        most = max(1, options.train_mb * 1_000_000 // (4 * self.width))
        rows = self.sample(min(most, clusters * options.rows_per_cluster), options.seed)
        return train_means(rows, clusters, options.iterations, options.seed, spherical, pa.cpu_count())

    def sample(self, wanted: int, seed: int) -> Rows:
        """Unit rows of the `wanted` rows with the smallest hashes, in row order; of all where there are no more."""
        chosen = self.there.copy()
        if self.count > wanted:
            candidates = np.flatnonzero(self.there)
            smallest = np.argsort(self.hashes(seed)[candidates], kind="stable")[:wanted]
            chosen[:] = False
            chosen[candidates[smallest]] = True
        found, filled = np.empty((int(chosen.sum()), self.width), np.float32), 0
        for start, unit, _ in _units(self.rows, self.of):
            mine = unit[chosen[start : start + len(unit)]]
            found[filled : filled + len(mine)] = mine
            filled += len(mine)
        return found

    def assign(self, means: Rows) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """(N,) the mean with the largest inner product, and the cosine to it; NO_CLUSTER and NaN where none is."""
        cluster = np.full(len(self.rows), NO_CLUSTER, np.int64)
        cosine = np.full(len(self.rows), np.nan, np.float32)
        for start, unit, there in _units(self.rows, self.of):
            at = start + np.flatnonzero(there)
            mine = unit[there]
            cluster[at] = nearest(mine, means, pa.cpu_count())
            cosine[at] = cosines_of(mine, means[cluster[at]])
        return cluster, cosine


def _units(rows: GroupRows, of: str) -> Iterator[tuple[int, Rows, Mask]]:
    """Position of the first row of a piece, its unit rows (zeros where there is none), and which are there.

    A part of which no row is left is a piece too: it tells how wide they are.
    """
    start = 0
    for part in rows.parts([of]):
        for piece in (part.column(of).slice(first, _PIECE) for first in range(0, max(1, len(part)), _PIECE)):
            yield start, *unit_rows_of(vectors_of(piece))
            start += len(piece)
