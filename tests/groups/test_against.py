"""Duplicates of older rows, and components, against plain-Python readings of the definition."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import held_rows
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_steps import small_steps

from mmdata.errors import RecipeError
from mmdata.groups.exact_duplicates import ExactDuplicates, ExactDuplicatesOptions
from mmdata.groups.near_duplicates import NearDuplicates, NearDuplicatesOptions

Hashes = list[int | None]


class Older:
    """Older rows held in memory, handed out `size` at a time; row_id 1000 + place, key `o<place>`."""

    def __init__(self, columns: dict[str, pa.Array], size: int) -> None:
        self.table = pa.table({**columns, "place": pa.array(range(len(next(iter(columns.values())))), pa.int64())})
        self.size = size

    def parts(self) -> Iterator[pa.Table]:
        for first in range(0, len(self.table), self.size):
            yield self.table.slice(first, self.size)

    def look_up(self, places: npt.NDArray[np.int64]) -> pa.Table:
        assert np.all(np.diff(places) > 0)
        found = [(1000 + p, f"o{p}", "pool" if p % 2 == 0 else "other") for p in places.tolist()]
        names = pa.schema([("row_id", pa.int64()), ("key", pa.string()), ("dataset", pa.string())])
        return pa.Table.from_pylist([dict(zip(names.names, f, strict=True)) for f in found], names)


def rows_of(**columns: pa.Array) -> pa.Table:
    n = len(next(iter(columns.values())))
    return pa.table(
        {"row_id": pa.array(range(n), pa.int64()), "key": pa.array([f"k{i}" for i in range(n)], pa.string()), **columns}
    )


def as_rows(columns: Any, label: str) -> list[dict[str, Any]]:
    lists = {
        k.removeprefix(f"{label}_"): v.to_pylist() if hasattr(v, "to_pylist") else v.tolist()
        for k, v in columns.items()
    }
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def near(
    hashes: Hashes, older: Hashes | None, size: int = 3, in_small_steps: bool = False, **options: Any
) -> list[dict[str, Any]]:
    if older is not None:
        options["against"] = ["pool", "other"]
    group = NearDuplicates(NearDuplicatesOptions(**options))
    rows = rows_of(phash=pa.array(hashes, pa.uint64()))
    steps = small_steps() if in_small_steps else nullcontext()
    theirs = None if older is None else Older({"phash": pa.array(older, pa.uint64())}, size)
    with steps, tempfile.TemporaryDirectory() as scratch:
        columns = held_rows.compute(group, rows, Path(scratch), part_rows=max(1, len(rows) // 3), older=theirs)
    return as_rows(columns, "near_duplicates")


def described(cluster: list[Any], hashes: list[Any], older: list[Any]) -> list[dict[str, Any]]:
    """Columns from each row's cluster: ("old", place) or ("own", first row)."""
    rows = []
    for i, (kind, first) in enumerate(cluster):
        before = sum(c == (kind, first) for c in cluster[: i + 1])
        size = sum(c == (kind, first) for c in cluster)
        mine, theirs = hashes[i], older[first] if kind == "old" else hashes[first]
        is_old = kind == "old"
        rows.append(
            {
                "id": 1000 + first if is_old else first,
                "rank": before + is_old,
                "distance": 0 if mine is None else (mine ^ theirs).bit_count(),
                "count": size + is_old,
                "of": f"o{first}" if is_old else f"k{first}",
                "against": ("pool" if first % 2 == 0 else "other") if is_old else None,
            }
        )
    return rows


def close(a: int | None, b: int | None, radius: int) -> bool:
    return a is not None and b is not None and (a ^ b).bit_count() <= radius


def star(hashes: Hashes, older: Hashes, radius: int) -> list[Any]:
    cluster: list[Any] = [None] * len(hashes)
    for i, mine in enumerate(hashes):
        place = next((p for p, other in enumerate(older) if close(mine, other, radius)), None)
        if place is not None:
            cluster[i] = ("old", place)
    for i, mine in enumerate(hashes):
        if cluster[i] is None:
            for j in range(i, len(hashes)):
                if cluster[j] is None and (i == j or close(mine, hashes[j], radius)):
                    cluster[j] = ("own", i)
    return cluster


def component(hashes: Hashes, older: Hashes, radius: int) -> list[Any]:
    """Breadth first over rows and the older rows next to them; older rows do not link one another."""
    cluster: list[Any] = [None] * len(hashes)
    for start in range(len(hashes)):
        if cluster[start] is not None:
            continue
        reached, places, open_rows = {start}, set(), [start]
        while open_rows:
            mine = hashes[open_rows.pop(0)]
            next_to = {p for p, other in enumerate(older) if close(mine, other, radius)}
            for place in next_to - places:
                places.add(place)
            for j, other in enumerate(hashes):
                if j not in reached and (
                    close(mine, other, radius) or any(close(other, older[p], radius) for p in next_to)
                ):
                    reached.add(j)
                    open_rows.append(j)
        first = ("old", min(places)) if places else ("own", min(reached))
        for j in reached:
            cluster[j] = first
    return cluster


@st.composite
def crowded(draw: st.DrawFn) -> tuple[Hashes, Hashes]:
    """Few centres and many small changes of them, so that distances lie on both sides of any radius."""
    centres = draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4))

    def flip(value: int, bits: list[int]) -> int:
        for bit in bits:
            value ^= 1 << bit
        return value

    changed = st.builds(flip, st.sampled_from(centres), st.lists(st.integers(0, 63), max_size=12))
    one = st.one_of(changed, changed, changed, st.none())
    return draw(st.lists(one, max_size=40)), draw(st.lists(one, max_size=12))


@settings(max_examples=150, deadline=None)
@given(lists=crowded(), radius=st.integers(0, 16))
def test_components_equal_breadth_first_search(lists: tuple[Hashes, Hashes], radius: int):
    hashes = lists[0]
    expected = described(component(hashes, [], radius), hashes, [])
    for row in expected:
        del row["against"]
    assert near(hashes, None, max_distance=radius, link="component") == expected


@settings(max_examples=150, deadline=None)
@given(lists=crowded(), radius=st.integers(0, 16), size=st.integers(1, 12))
def test_star_against_older_rows(lists: tuple[Hashes, Hashes], radius: int, size: int):
    hashes, older = lists
    assert near(hashes, older, size, max_distance=radius) == described(star(hashes, older, radius), hashes, older)


@settings(max_examples=150, deadline=None)
@given(lists=crowded(), radius=st.integers(0, 16), size=st.integers(1, 12))
def test_components_against_older_rows(lists: tuple[Hashes, Hashes], radius: int, size: int):
    hashes, older = lists
    found = near(hashes, older, size, max_distance=radius, link="component")
    assert found == described(component(hashes, older, radius), hashes, older)


@settings(max_examples=60, deadline=None)
@given(lists=crowded(), radius=st.integers(0, 8), size=st.integers(1, 12), link=st.sampled_from(["star", "component"]))
def test_in_small_steps_over_files(lists: tuple[Hashes, Hashes], radius: int, size: int, link: str):
    hashes, older = lists
    clusters = (star if link == "star" else component)(hashes, older, radius)
    found = near(hashes, older, size, in_small_steps=True, max_distance=radius, link=link)
    assert found == described(clusters, hashes, older)


def test_a_chain_is_one_component():
    a, b, c = 0, 0b111, 0b111111
    found = near([a, c, b], None, max_distance=4, link="component")
    assert [r["id"] for r in found] == [0, 0, 0]
    assert [r["distance"] for r in found] == [0, 6, 3]


def test_two_rows_next_to_one_older_row_are_one_component_whatever_part_it_is_in():
    older = [0b1 << 40, 0, 0b11 << 50]
    found = near([0b1111, 0b1111 << 8], older, 1, max_distance=4, link="component")
    assert [(r["id"], r["rank"], r["count"], r["against"]) for r in found] == [
        (1001, 2, 3, "other"),
        (1001, 3, 3, "other"),
    ]


def test_among_many_no_older_row_is_missed():
    rng = np.random.default_rng(3)
    older = rng.integers(0, 2**64, 30_000, dtype=np.uint64)
    hashes = older[::30].copy()
    for row in range(1000):
        for bit in rng.choice(64, row % 6, replace=False):
            hashes[row] ^= np.uint64(1) << np.uint64(bit)
    found = near(hashes.tolist(), older.tolist(), 7000, max_distance=4)
    assert [r["id"] - 1000 for r in found if r["against"]] == [30 * i for i in range(1000) if i % 6 <= 4]
    assert [r["distance"] for r in found] == [i % 6 if i % 6 <= 4 else 0 for i in range(1000)]


def exact(rows: list[tuple[Any, Any]], older: list[tuple[Any, Any]], size: int) -> list[dict[str, Any]]:
    options = ExactDuplicatesOptions(of=["url", "caption"], against=["pool", "other"])

    def columns(found: list[tuple[Any, Any]]) -> dict[str, pa.Array]:
        return {
            "url": pa.array([u for u, _ in found], pa.string()),
            "caption": pa.array([c for _, c in found], pa.int64()),
        }

    answer = ExactDuplicates(options).compute_against(rows_of(**columns(rows)), Older(columns(older), size))
    return as_rows(answer, "exact_duplicates")


_PAIRS = st.lists(st.tuples(st.sampled_from(["a", "b", "c", None]), st.sampled_from([1, 2, None])), max_size=25)


@settings(max_examples=100, deadline=None)
@given(rows=_PAIRS, older=_PAIRS, size=st.integers(1, 12))
def test_exact_duplicates_of_older_rows(rows: list[tuple[Any, Any]], older: list[tuple[Any, Any]], size: int):
    cluster: list[Any] = []
    for i, pair in enumerate(rows):
        if None in pair:
            cluster.append(("own", i))
        elif pair in older:
            cluster.append(("old", older.index(pair)))
        else:
            cluster.append(("own", rows.index(pair)))
    numbers = [0] * max(len(rows), len(older))
    expected = described(cluster, numbers, numbers)
    for row in expected:
        del row["distance"]
    assert exact(rows, older, size) == expected


def test_exact_duplicates_of_another_type_are_refused():
    options = ExactDuplicatesOptions(of=["n"], against=["pool"])
    older = Older({"n": pa.array(["1"])}, 1)
    with pytest.raises(RecipeError, match=r"column 'n' is string in a dataset of `against`, and int64 here"):
        ExactDuplicates(options).compute_against(rows_of(n=pa.array([1])), older)
