"""near_duplicates in a run, against the definition: shards, NULL hashes, `prefer`, `over`, in large and small steps."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_steps import small_steps

import mmdata

ROWS, RADIUS = 90, 3


def pool() -> pa.Table:
    """Hashes about six centres, some equal, some NULL."""
    rng = np.random.default_rng(5)
    hashes = rng.integers(0, 2**63, 6)[rng.integers(0, 6, ROWS)]
    for _ in range(4):
        hashes ^= np.where(rng.random(ROWS) < 0.5, np.int64(1) << rng.integers(0, 62, ROWS), 0)
    return pa.table(
        {
            "uid": [f"{i:032x}" for i in range(ROWS)],
            "text": [f"caption {i}" for i in range(ROWS)],
            "hash": pa.array(hashes, pa.int64(), mask=rng.random(ROWS) < 0.1),
            "width": pa.array(rng.integers(0, 5, ROWS), pa.int32()),
        }
    )


def expected(hashes: list[int | None], order: list[int], link: str) -> dict[int, tuple[int, int, int, int]]:
    """Position → (first of its cluster, rank, count, distance), of the positions in `order`, as they are visited."""

    def near(i: int, j: int) -> bool:
        mine, other = hashes[i], hashes[j]
        return i == j or (mine is not None and other is not None and (mine ^ other).bit_count() <= RADIUS)

    found: dict[int, tuple[int, int, int, int]] = {}
    for first in order:
        if first in found:
            continue
        members = {j for j in order if j not in found and near(first, j)}
        while link == "component" and (more := {j for j in order for i in members if near(i, j)} - members):
            members |= more
        for rank, j in enumerate([j for j in order if j in members], 1):
            a, b = hashes[first], hashes[j]
            distance = 0 if a is None or b is None else (a ^ b).bit_count()
            found[j] = (first, rank, len(members), distance)
    return found


@pytest.mark.parametrize("steps", ["large", "small"])
@pytest.mark.parametrize(
    ("link", "over", "prefer"),
    [("star", "kept", None), ("star", "kept", "width desc"), ("component", "kept", "width"), ("star", "all", "width")],
)
def test_equals_the_definition(tmp_path: Path, link: str, over: str, prefer: str | None, steps: str):
    table = pool()
    pq.write_table(table, tmp_path / "pool.parquet")
    hashes, widths = table.column("hash").to_pylist(), table.column("width").to_pylist()
    near = {"of": "hash", "max_distance": RADIUS, "link": link, "over": over}
    document: dict[str, Any] = {
        "name": "near",
        "dataset": str(tmp_path / "dataset"),
        "source": {
            "kind": "parquet",
            "media": "none",
            "path": str(tmp_path / "pool.parquet"),
            "uid": "uid",
            "columns": ["hash", "width"],
        },
        "fetch": {"shard_rows": 20},
        "steps": [
            {"filter": {"wide": "width <> 1"}},
            {"near_duplicates": {**near, **({"prefer": [prefer]} if prefer else {})}},
        ],
    }
    with small_steps() if steps == "small" else nullcontext():
        ds = mmdata.run(document, runner="inline")
    [folder] = (tmp_path / "dataset" / "columns").iterdir()
    query = f'SELECT r.uid, r.key, r.row_id, c.* FROM rows r JOIN columns."{folder.name}" c USING (row_id)'
    answers = ds.sql(f"{query} ORDER BY r.row_id").to_arrow_table().to_pylist()
    seen = [i for i in range(ROWS) if over == "all" or widths[i] != 1]
    sign = {None: 0, "width": 1, "width desc": -1}[prefer]
    clusters = expected(hashes, sorted(seen, key=lambda i: (sign * widths[i], i)), link)
    assert len(answers) == ROWS
    at = [int(a["uid"], 16) for a in answers]
    assert at == list(range(ROWS))
    for i, answer in enumerate(answers):
        found = tuple(answer[f"near_duplicates_{c}"] for c in ("id", "of", "rank", "count", "distance"))
        if i in clusters:
            first, rank, count, distance = clusters[i]
            assert found == (answers[first]["row_id"], answers[first]["key"], rank, count, distance)
        else:
            assert found == (None,) * 5
    assert max(c[2] for c in clusters.values()) > 4
    assert len({c[0] for c in clusters.values()}) > 10
