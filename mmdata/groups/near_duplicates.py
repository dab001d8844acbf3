"""Pictures that look alike: clusters within a Hamming radius of a perceptual hash."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from mmdata.errors import RecipeError
from mmdata.groups.clusters import cluster_columns
from mmdata.groups.hamming import star_clusters
from mmdata.stage import ColumnName, Columns, Contract, Group, Options, OrderBy, parse_schema

__all__ = ["NearDuplicates", "NearDuplicatesOptions"]


class NearDuplicatesOptions(Options):
    """What is compared, how far apart it may be, and which row comes first."""

    of: ColumnName = Field("phash", description="column of 64-bit hashes, such as hash_image makes")
    max_distance: int = Field(4, ge=0, le=16, description="bits in which a row may differ from its cluster's first")
    prefer: list[OrderBy] = Field([], description="SQL ordering terms: rows are visited in this order, ties by row_id")


class NearDuplicates(Group[NearDuplicatesOptions]):
    """Star clusters of hashes at most `max_distance` bits apart; no such pair is missed.

    Reads key and `of`. Rows are visited in the order of `prefer`, ties by row_id; one that is in no cluster opens one
    and takes every row in no cluster within the radius. A chain a–b–c whose ends are far apart is therefore not one
    cluster, and every member is within `max_distance` of the row that stays when you filter for
    `near_duplicates_rank = 1`. Writes `near_duplicates_id` (row_id of the cluster's first row),
    `near_duplicates_rank` (from 1, in visit order), `near_duplicates_distance` (bits to the first row, 0 for itself),
    `near_duplicates_count` (rows in the cluster), `near_duplicates_of` (key of the cluster's first row). Never NULL: a
    row whose hash is NULL has its own id, rank 1, distance 0 and count 1.

    Flat pictures of any colour have one and the same pHash, and count as duplicates. Cost grows with the number of
    distinct hashes, mildly up to a distance of about 6, more steeply beyond.
    Source: candidate pairs by the block-permutation index of Manku, Jain and Das Sarma 2007; see `hamming`.
    """

    name = "near_duplicates"
    version = 1
    label = "near_duplicates"

    @classmethod
    def contract(cls, options: NearDuplicatesOptions) -> Contract:
        """Reads key and the column that the options name."""
        writes = parse_schema(
            "near_duplicates_id: int64, near_duplicates_rank: int32, near_duplicates_distance: int32, "
            "near_duplicates_count: int64, near_duplicates_of: string"
        )
        return Contract(writes=writes, reads=tuple(dict.fromkeys(["key", options.of])))

    def compute(self, rows: pa.Table) -> Columns:
        """One star cluster per row that none before it took; RecipeError when `of` holds no 64-bit numbers."""
        hashes, missing = _hashes(rows, self.options.of)
        first = np.arange(len(rows))
        present = np.flatnonzero(~missing)
        first[present] = present[star_clusters(hashes[present], self.options.max_distance)]
        distance = np.bitwise_count(hashes ^ hashes[first]).astype(np.int32)
        columns = cluster_columns(self.label, rows, first)
        return {**columns, f"{self.label}_distance": distance}


def _hashes(rows: pa.Table, name: str) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
    column = rows.column(name)
    if column.type not in (pa.uint64(), pa.int64()):
        raise RecipeError(
            f"near_duplicates: column {name!r} is of type {column.type}, not 64-bit hashes; name hash_image's phash"
        )
    missing = np.asarray(column.is_null())
    values = column.fill_null(0).combine_chunks()
    return np.asarray(values).view(np.uint64), missing
