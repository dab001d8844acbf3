"""Pictures that look alike: clusters within a Hamming radius of a perceptual hash."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from mmdata.errors import RecipeError
from mmdata.groups.clusters import VisitOrder, cluster_schema
from mmdata.groups.equal_hashes import Distinct, collapse
from mmdata.groups.hamming import close_between, component_clusters, star_clusters, to_roots, unite
from mmdata.groups.mapped import Mapped, Positions, count_up, gathered, stretches
from mmdata.groups.near_pairs import LONG_RUN, Skew
from mmdata.groups.reached_rows import Reach, Reached
from mmdata.groups.visited_rows import OlderFirsts, VisitedRows
from mmdata.stage import (
    ColumnName,
    Columns,
    Contract,
    DatasetPath,
    Group,
    GroupRows,
    OlderRows,
    parse_schema,
)

__all__ = ["NearDuplicates", "NearDuplicatesOptions"]

Hashes = npt.NDArray[np.uint64]
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
    lie close; it uses up to eight cores. Out of core: rows are read a shard at a time, and all that has a value per row
    or close pair lies in a scratch folder (about 140 bytes a row, up to 200 with `prefer`; 8 a pair, of which at most
    33 million are held). In memory some 300 MB, whatever the number of rows, and the columns of a million older ones.
    Source: candidate pairs by the block-permutation index of Manku, Jain and Das Sarma 2007; see `near_pairs`.
    """

    name = "near_duplicates"
    version = 1
    label = "near_duplicates"
    streams: ClassVar[bool] = True

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

    def compute_streamed(self, rows: GroupRows, scratch: Path) -> Columns:
        """One cluster a row; RecipeError when `of` holds no 64-bit numbers."""
        visited = VisitedRows(rows, scratch)
        mapped, many = visited.mapped, len(visited)
        hashes: Hashes = mapped.array(np.uint64, many)
        there: npt.NDArray[np.bool_] = mapped.array(np.bool_, many)
        for visits, part in visited.read([self.options.of]):
            hashes[visits], missing = _hashes(part, self.options.of)
            there[visits] = ~missing
        distinct = collapse(hashes, there, mapped)
        del there
        if rows.older is None:
            centre, reached, firsts = self._clusters(distinct.hashes, mapped), None, None
        else:
            find = self._star if self.options.link == "star" else self._components
            centre, reached = find(distinct.hashes, rows.older, mapped)
            firsts = OlderFirsts(rows.older, reached.places, mapped)
        cluster = _by_visit(distinct, centre, reached, mapped)
        columns, remark = visited.columns(self.label, cluster, firsts)
        distance: npt.NDArray[np.int32] = mapped.array(np.int32, many)
        for some in stretches(many):
            visits = visited.visits(some)
            first = cluster[visits]
            ends = hashes[np.minimum(first, many - 1)]
            if reached is not None:
                ends[first >= many] = reached.hashes[first[first >= many] - many]
            distance[some] = np.bitwise_count(hashes[visits] ^ ends)
        self.remark = remark + self._unevenness()
        return {**columns, f"{self.label}_distance": distance}

    def _clusters(self, hashes: Hashes, mapped: Mapped) -> Positions:
        cluster = star_clusters if self.options.link == "star" else component_clusters
        return cluster(hashes, self.options.max_distance, self._skew, mapped)

    def _unevenness(self) -> str:
        if not self._skew.long_runs:
            return ""
        return (
            f"; the hashes are uneven: {self._skew.long_runs:,} times more than {LONG_RUN:,} of them, at most "
            f"{self._skew.longest:,}, agree in the bits of one sort (all were compared)"
        )

    def _star(self, distinct: Hashes, older: OlderRows, mapped: Mapped) -> tuple[Positions, Reached]:
        """Per distinct hash: its cluster's first here, and the first older row within reach."""
        reached = Reach(len(distinct), mapped)
        left = count_up(mapped.array(np.int64, len(distinct)))
        for theirs, places in _parts(older, self.options.of):
            mine = gathered(mapped, distinct, left)
            nearest: Positions = mapped.array(np.int64, len(left))
            nearest[:] = _FAR
            for i, j in close_between(theirs, mine, self.options.max_distance, self._skew, mapped):
                np.minimum.at(nearest, j, i)
            with mapped.growing(np.int64) as far:
                for some in stretches(len(left)):
                    found = nearest[some] < _FAR
                    at = nearest[some][found]
                    reached.add(left[some][found], places[at], theirs[at])
                    far.append(left[some][~found])
                left = far.array()
        centre = count_up(mapped.array(np.int64, len(distinct)))
        own = self._clusters(gathered(mapped, distinct, left), mapped)
        for some in stretches(len(left)):
            centre[left[some]] = left[own[some]]
        return centre, reached.settled()

    def _components(self, distinct: Hashes, older: OlderRows, mapped: Mapped) -> tuple[Positions, Reached]:
        """As `_star`, over whole components: two rows close to one older row are linked through it."""
        parent = self._clusters(distinct, mapped)
        reached = Reach(len(distinct), mapped)
        for theirs, places in _parts(older, self.options.of):
            linked = np.full(len(theirs), -1)  # per older row, a hash of this dataset close to it
            for i, j in close_between(theirs, distinct, self.options.max_distance, self._skew, mapped):
                some, at = np.unique(i, return_index=True)
                new = linked[some] < 0
                linked[some[new]] = j[at[new]]
                unite(parent, linked[i], j)
                order = np.lexsort((i, j))
                some, at = np.unique(j[order], return_index=True)
                near = i[order][at]
                reached.add(some, places[near], theirs[near])
        to_roots(parent)
        reached.spread(parent)
        return parent, reached.settled()


def _by_visit(distinct: Distinct, centre: Positions, reached: Reached | None, mapped: Mapped) -> Positions:
    """Per row the visit of its cluster's first, or, beyond all visits, the number of the older row that is."""
    many = len(distinct.which)
    cluster = count_up(mapped.array(np.int64, many))
    for some in stretches(many):
        which = distinct.which[some]
        there = which >= 0
        first = distinct.where[centre[which[there]]]
        if reached is not None:
            older = reached.which[which[there]]
            first = np.where(older >= 0, many + older, first)
        cluster[some][there] = first
    return cluster


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
