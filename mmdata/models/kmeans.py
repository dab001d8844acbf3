"""k-means of embeddings in faiss.

In: (N, D) float32, none of them NaN, at least one. Out: (K, D) float32 means. The result depends on the rows, their
order, and the seed; on one machine it is the same bits for any number of threads: faiss adds up each mean in one
thread, and each product of its BLAS is a sum in one order (a test looks at 1, 2 and 3 threads).

`spherical` means have length 1, and rows go to the one with the largest inner product: SemDeDup's. Plain means go by
Euclidean distance, and are as long as the rows of a cluster agree: DataComp's.
"""

from __future__ import annotations

import numpy as np

from mmdata.models.cosines import Rows
from mmdata.stage import Needs

__all__ = ["NEEDS", "train_means"]

NEEDS = Needs(modules=("faiss", "threadpoolctl"), extra="faiss")


def train_means(rows: Rows, clusters: int, iterations: int, seed: int, spherical: bool, threads: int) -> Rows:
    """At most `clusters` means, for there are no more than rows; `seed` in [0, 2⁶³), of which faiss uses 31 bits."""
    import faiss

    found = min(clusters, len(rows))
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(max(1, threads))
    try:
        kmeans = faiss.Kmeans(
            rows.shape[1],
            found,
            niter=iterations,
            seed=seed % (1 << 31),
            spherical=spherical,
            # All rows given are used: what a sample is, is decided before.
            min_points_per_centroid=1,
            max_points_per_centroid=max(1, len(rows)),
        )
        kmeans.train(np.ascontiguousarray(rows, np.float32))
    finally:
        faiss.omp_set_num_threads(before)
    return np.asarray(kmeans.centroids, np.float32)
