"""Pictures that look alike: clusters within a Hamming radius of a perceptual hash."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from mmdata.errors import RecipeError
from mmdata.groups.clusters import VisitOrder, cluster_columns, cluster_remark, cluster_schema, older_columns
from mmdata.groups.hamming import close_between, component_clusters, distinct_in_order, roots, star_clusters, unite
from mmdata.groups.near_pairs import LONG_RUN, Skew
from mmdata.stage import (
    ColumnName,
    Columns,
    Contract,
    DatasetPath,
    Group,
    OlderRows,
    parse_schema,
)

__all__ = ["NearDuplicates", "NearDuplicatesOptions"]

Hashes = npt.NDArray[np.uint64]
Positions = npt.NDArray[np.int64]
_FAR = np.iinfo(np.int64).max


class NearDuplicatesOptions(VisitOrder):
    """What is compared, how far apart it may be, and which row comes first."""

    of: ColumnName = Field("phash", description="column of 64-bit hashes, such as hash_image makes")
    max_distance: int = Field(4, ge=0, le=16, description="bits in which a row may differ from its cluster's first")
    link: Literal["star", "component"] = Field(
        "star", description="star: all within max_distance of the first row; component: whatever a chain of rows links"
    )
    against: list[DatasetPath] = Field(
        [], description="older dataset folders (`pets`, or `pets#strict` for a selection): their kept rows come first"
    )


class NearDuplicates(Group[NearDuplicatesOptions]):
    """Clusters of hashes at most `max_distance` bits apart; no such pair is missed.

    Reads key and `of`. Rows are visited in the order of `prefer`, ties by row_id. `link: star`: one that is in no
    cluster opens one and takes every row in no cluster within the radius. A chain a-b-c whose ends are far apart is
    therefore not one cluster, and every member is within `max_distance` of the row that stays when you filter for
    `near_duplicates_rank = 1`. `link: component`: a cluster is all that chains of such pairs connect, so that no two
    rows within the radius are in different clusters, and the distance to the first row may exceed it.

    Writes `near_duplicates_id` (row_id of the cluster's first row), `near_duplicates_rank` (from 1, in visit order),
    `near_duplicates_distance` (bits to the first row, 0 for itself), `near_duplicates_count` (rows in the cluster),
    `near_duplicates_of` (key of the cluster's first row). Never NULL: a row whose hash is NULL has its own id, rank 1,
    distance 0 and count 1.

    With `against`, the kept rows of other datasets come first, in the order given, then in row order; each stands for
    itself. A row within the radius of one (component: linked to one) follows the first such row from rank 2 on, and
    the columns name that row: its row_id and key there, and in `near_duplicates_against` the dataset as the option
    names it, NULL for a cluster of this dataset alone. The count is that row and the rows of this dataset. Their
    column of the same name must be the same set: same operator, version, options.

    Flat pictures of any colour have one and the same pHash, and count as duplicates. Cost grows with the number of
    distinct hashes, mildly up to a distance of about 6, more steeply beyond, and for `component` with the pairs that
    lie close; it uses up to eight cores. About 100 bytes a row, 200 MB a core and at most 1 GB of close pairs.
    Source: candidate pairs by the block-permutation index of Manku, Jain and Das Sarma 2007; see `near_pairs`.
    """

    name = "near_duplicates"
    version = 1
    label = "near_duplicates"

    def __init__(self, options: NearDuplicatesOptions) -> None:
        super().__init__(options)
        self._skew = Skew()

    @classmethod
    def contract(cls, options: NearDuplicatesOptions) -> Contract:
        """Reads key and the column that the options name."""
        schema = cluster_schema(cls.label, bool(options.against), f"{cls.label}_distance: int32")
        return Contract(writes=parse_schema(schema), reads=tuple(dict.fromkeys(["key", options.of])))

    @classmethod
    def check_types(cls, options: NearDuplicatesOptions, schema: pa.Schema) -> None:
        """RecipeError when `of` holds no 64-bit numbers."""
        _require_hashes(options.of, schema.field(options.of).type)

    def compute(self, rows: pa.Table) -> Columns:
        """One cluster a row; RecipeError when `of` holds no 64-bit numbers."""
        hashes, missing = _hashes(rows, self.options.of)
        first = np.arange(len(rows))
        present = np.flatnonzero(~missing)
        first[present] = present[self._clusters(hashes[present])]
        distance = np.bitwise_count(hashes ^ hashes[first]).astype(np.int32)
        columns = cluster_columns(self.label, rows, first)
        self.remark = self._remark(columns)
        return {**columns, f"{self.label}_distance": distance}

    def _clusters(self, hashes: Hashes) -> Positions:
        cluster = star_clusters if self.options.link == "star" else component_clusters
        return cluster(hashes, self.options.max_distance, self._skew)

    def _remark(self, columns: Columns) -> str:
        text = cluster_remark(self.label, columns)
        if self._skew.long_runs:
            text += (
                f"; the hashes are uneven: {self._skew.long_runs:,} times more than {LONG_RUN:,} of them, at most "
                f"{self._skew.longest:,}, agree in the bits of one sort (all were compared)"
            )
        return text

    def compute_against(self, rows: pa.Table, older: OlderRows) -> Columns:
        """As `compute`; the older rows are looked at a part at a time."""
        hashes, missing = _hashes(rows, self.options.of)
        present = np.flatnonzero(~missing)
        distinct, where, which = distinct_in_order(hashes[present])
        if self.options.link == "star":
            centre, place, their_hash = self._star(distinct, older)
        else:
            centre, place, their_hash = self._components(distinct, older)
        first = np.arange(len(rows))
        first[present] = present[where[centre]][which]
        places = np.full(len(rows), -1)
        places[present] = place[which]
        ends = hashes.copy()
        ends[present] = np.where(place >= 0, their_hash, distinct[centre])[which]
        columns = older_columns(self.label, rows, first, places, older)
        self.remark = self._remark(columns)
        return {**columns, f"{self.label}_distance": np.bitwise_count(hashes ^ ends).astype(np.int32)}

    def _star(self, distinct: Hashes, older: OlderRows) -> tuple[Positions, Positions, Hashes]:
        """Per distinct hash: its cluster's first here, the place of the first older row within reach, and its hash."""
        place, their_hash = np.full(len(distinct), -1), np.zeros(len(distinct), np.uint64)
        for theirs, part_places in _parts(older, self.options.of):
            left = np.flatnonzero(place < 0)
            nearest = np.full(len(left), _FAR)
            for i, j in close_between(theirs, distinct[left], self.options.max_distance, self._skew):
                np.minimum.at(nearest, j, i)
            found = nearest < _FAR
            place[left[found]] = part_places[nearest[found]]
            their_hash[left[found]] = theirs[nearest[found]]
        centre = np.arange(len(distinct))
        own = np.flatnonzero(place < 0)
        centre[own] = own[self._clusters(distinct[own])]
        return centre, place, their_hash

    def _components(self, distinct: Hashes, older: OlderRows) -> tuple[Positions, Positions, Hashes]:
        """As `_star`, over whole components: two rows close to one older row are linked through it."""
        parent = self._clusters(distinct)
        place, their_hash = np.full(len(distinct), _FAR), np.zeros(len(distinct), np.uint64)
        for theirs, part_places in _parts(older, self.options.of):
            linked = np.full(len(theirs), -1)  # per older row, a hash of this dataset close to it
            for i, j in close_between(theirs, distinct, self.options.max_distance, self._skew):
                some, at = np.unique(i, return_index=True)
                new = linked[some] < 0
                linked[some[new]] = j[at[new]]
                unite(parent, linked[i], j)
                order = np.lexsort((i, j))
                some, at = np.unique(j[order], return_index=True)
                reached = i[order][at]
                better = part_places[reached] < place[some]
                place[some[better]], their_hash[some[better]] = part_places[reached[better]], theirs[reached[better]]
        root = roots(parent)
        order = np.argsort(place, kind="stable")
        some, at = np.unique(root[order], return_index=True)
        best = np.arange(len(distinct))
        best[some] = order[at]
        place, their_hash = place[best[root]], their_hash[best[root]]
        return root, np.where(place == _FAR, -1, place), their_hash


def _parts(older: OlderRows, name: str) -> Iterator[tuple[Hashes, Positions]]:
    """Hashes and places of the older rows, a part at a time, those without a hash left out."""
    for part in older.parts():
        hashes, missing = _hashes(part, name)
        yield hashes[~missing], part.column("place").to_numpy()[~missing]


def _require_hashes(name: str, kind: pa.DataType) -> None:
    if kind not in (pa.uint64(), pa.int64()):
        raise RecipeError(
            f"near_duplicates: column {name!r} is of type {kind}, not 64-bit hashes; name hash_image's phash"
        )


def _hashes(rows: pa.Table, name: str) -> tuple[Hashes, npt.NDArray[np.bool_]]:
    column = rows.column(name)
    _require_hashes(name, column.type)
    missing = np.asarray(column.is_null())
    values = column.fill_null(0).combine_chunks()
    return np.asarray(values).view(np.uint64), missing
