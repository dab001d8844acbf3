"""k-means clusters of pictures by their embeddings, and DataComp's image-based rule over them.

In: a column of embeddings, and where they are given: means, and embeddings of the pictures that are wanted. Out: each
row's cluster, and whether a wanted picture is in it. Fails: a column that holds no embeddings, a file that is not there
(both before anything runs), and files of another shape or width.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from mmdata.errors import RecipeError
from mmdata.groups.embedded import Embedded, KMeansOptions
from mmdata.models.cosines import Rows, Vectors, nearest, spans, unit_rows_of, vectors_of
from mmdata.models.kmeans import NEEDS
from mmdata.models.vectors import require_embedding, require_width
from mmdata.stage import (
    ColumnName,
    Columns,
    Contract,
    DatasetPath,
    FilePath,
    Group,
    GroupRows,
    Needs,
    Weights,
    parse_schema,
)

__all__ = ["ClusterImages", "ClusterImagesOptions"]

_MOST_CLUSTERS = 100_000
_ROWS_PER_CLUSTER = 128  # DataComp's small pool: 12.8 million in 100,000
_PIECE = 1 << 14


class ClusterImagesOptions(KMeansOptions):
    """What is clustered, how, and which clusters are wanted."""

    of: ColumnName = Field("clip_image_embedding", description="column of embeddings; any length, they are made 1")
    clusters: int | None = Field(
        None, gt=0, description="number of clusters; null = DataComp's 100,000, or one in 128 rows where that is fewer"
    )
    spherical: bool = Field(
        False, description="means of length 1; false = plain k-means, whose means are shorter the less a cluster agrees"
    )
    means: FilePath | None = Field(
        None, description=".npy of (clusters, width) means to use as they are, such as DataComp's; nothing is trained"
    )
    targets: FilePath | None = Field(
        None, description=".npy of (any, width) embeddings of wanted pictures, such as ImageNet's training set"
    )
    against: list[DatasetPath] = Field(
        [], description="dataset folders whose kept rows are the wanted pictures; their column `of` must be the same"
    )


class ClusterImages(Group[ClusterImagesOptions]):
    """The k-means cluster of a picture's embedding, and whether a wanted picture is in the same cluster.

    Reads `of`. The embeddings are made of length 1; k-means (faiss) is trained on a hash-chosen sample of them, all
    where there are no more than `rows_per_cluster` a cluster, and each row belongs to the mean with the largest inner
    product, the first of several. Writes `cluster_images_id` (int64, number of the cluster, from 0),
    `cluster_images_count` (rows in it) and `cluster_images_similarity` (float32 in [-1, 1], cosine to its mean). With
    `targets` or `against`, also `cluster_images_is_target` (boolean): the cluster is the nearest of a wanted picture at
    least. NULL where the embedding is NULL, zero or not finite; a filter drops those.

    Clusters are those of the rows that reach the group: what a filter above it drops takes no part in training. With
    `means` a row's cluster depends on the row alone.

    Memory: about 40 bytes a row, the sample (`train_mb`) and the means; the answer is the same for any number of
    threads.
    Source: baselines/image_based_clustering.py and apply_filter.py of mlfoundations/datacomp, and Gadre et al. 2023
    (arXiv 2304.14108), section 5: plain k-means of the L/14 embeddings of captions that pass their filter, 20
    iterations, seed 0, all rows; then the largest inner product, though the means are not of length 1, as here unless
    `spherical` is set. They use embeddings as published, which have length 1.
    """

    name = "cluster_images"
    version = 1
    on_request = (("cluster_images_is_target", "targets: FILE.npy"),)
    label = "cluster_images"
    streams: ClassVar[bool] = True

    @classmethod
    def contract(cls, options: ClusterImagesOptions) -> Contract:
        """Reads the column that the options name; files enter by their content."""
        columns = "cluster_images_id: int64, cluster_images_count: int64, cluster_images_similarity: float32"
        if options.targets or options.against:
            columns += ", cluster_images_is_target: bool"
        files = tuple(Weights(n, path=p) for n, p in (("means", options.means), ("targets", options.targets)) if p)
        needs = Needs(modules=("threadpoolctl",), extra="faiss") if options.means else NEEDS
        return Contract(writes=parse_schema(columns), reads=(options.of,), weights=files, needs=needs)

    @classmethod
    def check_types(cls, options: ClusterImagesOptions, schema: pa.Schema) -> None:
        """RecipeError when `of` holds no embeddings, or a file's are of another width."""
        require_embedding(cls.name, options.of, schema)
        for path in filter(None, (options.means, options.targets)):
            width = schema.field(options.of).type.list_size
            require_width(cls.name, options.of, width, _array(path).shape[1], path)

    def compute_streamed(self, rows: GroupRows, scratch: Path) -> Columns:
        """One cluster per row that has an embedding."""
        embedded = Embedded.open(rows, self.options.of)
        means = self._means(embedded)
        cluster, cosine = embedded.assign(means)
        sizes = np.bincount(cluster[embedded.there], minlength=len(means))
        nothing = ~embedded.there
        found = {
            "cluster_images_id": pa.array(cluster, mask=nothing),
            "cluster_images_count": pa.array(np.append(sizes, 0)[cluster], pa.int64(), mask=nothing),
            "cluster_images_similarity": pa.array(cosine, mask=nothing),
        }
        if self.options.targets or self.options.against:
            wanted = np.append(self._wanted(rows, means), False)
            found["cluster_images_is_target"] = pa.array(wanted[cluster], mask=nothing)
        return found

    def _means(self, embedded: Embedded) -> Rows:
        options = self.options
        if options.means:
            means = np.ascontiguousarray(_array(options.means), np.float32)
            if not np.isfinite(means).all():
                raise RecipeError(f"cluster_images: {options.means} holds a mean that is not finite; train it again")
            return means
        clusters = options.clusters or min(_MOST_CLUSTERS, max(1, -(-embedded.count // _ROWS_PER_CLUSTER)))
        return embedded.train(options, clusters, options.spherical)

    def _wanted(self, rows: GroupRows, means: Rows) -> npt.NDArray[np.bool_]:
        """(K,) whether the cluster is the nearest of a wanted picture."""
        found = np.zeros(len(means), bool)
        for vectors in self._targets(rows):
            unit, there = unit_rows_of(vectors)
            if len(means) and there.any():
                found[nearest(unit[there], means, pa.cpu_count())] = True
        return found

    def _targets(self, rows: GroupRows) -> Iterator[Vectors]:
        """Embeddings of the wanted pictures, some at a time."""
        if self.options.targets:
            array = _array(self.options.targets)
            yield from (array[start:stop] for start, stop in spans(len(array), _PIECE))
        for part in rows.older.parts() if rows.older is not None else ():
            for start, stop in spans(len(part), _PIECE):
                yield vectors_of(part.column(self.options.of).slice(start, stop - start))


def _array(path: str) -> Vectors:
    """A file's array of embeddings or means, read when it is looked at; RecipeError for what is none."""
    expected = f"cluster_images: {path} is to be a .npy file of (rows, width) floats"
    try:
        found: Vectors = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise RecipeError(f"{expected}; it cannot be read: {error}") from None
    if found.ndim != 2 or not np.issubdtype(found.dtype, np.floating) or not found.size:
        raise RecipeError(f"{expected}; it holds {found.dtype} of shape {found.shape}")
    return found
