"""semantic_duplicates over 200,000 embeddings of 512 numbers, beside brute force over all pairs.

Run by `python tests/bench/semdedup.py [rows] [width]`. The embeddings are made: topics of very different sizes in a
cone, as CLIP's are, and a fifth of the rows copies of others, with cosines on both sides of the threshold. Both sides
read the same Parquet files, in processes of their own, and say which rows have an earlier row above 1 - epsilon, in row
order; brute force compares every row with all before it, block by block, with all cores. Recall is the share of brute
force's duplicates that the clusters find; none is found that brute force does not find. Beside the default number of
clusters, one for 8800 rows is measured, which is the paper's share. The figures go to
tests/bench/results/semdedup.json.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

RESULTS = Path(__file__).parent / "results" / "semdedup.json"
SHARD_ROWS = 10_000
EPSILON = 0.05
NAME = "clip_image_embedding"


def make(folder: Path, rows: int, width: int) -> None:
    """Shards of row_id, key and a 16-bit embedding."""
    rng = np.random.default_rng(11)
    topics = rng.standard_normal((rows // 100, width), np.float32) + 0.8 * rng.standard_normal((1, width), np.float32)
    made = np.zeros((rows, width), np.float16)
    for first in range(0, rows, SHARD_ROWS):
        count = min(SHARD_ROWS, rows - first)
        topic = (len(topics) * rng.random(count) ** 2).astype(int)  # few topics have most of the rows
        block = topics[topic] + 0.7 * rng.standard_normal((count, width), np.float32)
        if first:
            copies = np.flatnonzero(rng.random(count) < 0.2)
            of = made[rng.integers(0, first, len(copies))].astype(np.float32)
            # A cosine of 1 / sqrt(1 + noise²): from 1 down to 0.89, 0.95 in the middle.
            noise = rng.uniform(0, 0.5, (len(copies), 1)).astype(np.float32) / np.float32(width) ** 0.5
            block[copies] = of + noise * rng.standard_normal(of.shape, np.float32)
        block /= np.linalg.norm(block, axis=1, keepdims=True)
        made[first : first + count] = block
        ids = np.arange(first, first + count)
        cells = pa.FixedSizeListArray.from_arrays(pa.array(made[first : first + count].ravel()), width)
        table = pa.table({"row_id": ids, "key": [f"{i:09d}" for i in ids], NAME: cells})
        pq.write_table(table, folder / f"{first // SHARD_ROWS:05d}.parquet")


class Shards:
    """`mmdata.stage.GroupRows` over the files."""

    older = None

    def __init__(self, folder: Path) -> None:
        self._paths = sorted(folder.glob("*.parquet"))

    def __len__(self) -> int:
        return sum(pq.ParquetFile(p).metadata.num_rows for p in self._paths)

    def row_ids(self) -> npt.NDArray[np.int64]:
        return np.arange(len(self))

    def parts(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        return (pq.read_table(p, columns=["row_id", *columns]) for p in self._paths)

    def read(self, columns: Sequence[str]) -> pa.Table:
        return pa.concat_tables(self.parts(columns))

    def visit_order(self) -> npt.NDArray[np.int64]:
        return np.arange(len(self))


def few_clusters(folder: Path, out: Path) -> dict[str, float]:
    """As `ours`, with the paper's 8800 rows to a cluster."""
    return ours(folder, out, -(-len(Shards(folder)) // 8800))


def ours(folder: Path, out: Path, clusters: int | None = None) -> dict[str, float]:
    """The group as a recipe runs it, its rows read a shard at a time."""
    from mmdata.groups.semantic_duplicates import SemanticDuplicates, SemanticDuplicatesOptions

    group = SemanticDuplicates(SemanticDuplicatesOptions(epsilon=EPSILON, keep="first", seed=1234, clusters=clusters))
    with tempfile.TemporaryDirectory() as scratch:
        found = group.compute_streamed(Shards(folder), Path(scratch))
    np.save(out, np.asarray(found["semantic_duplicates_is_duplicate"]))
    sizes = np.bincount(np.asarray(found["semantic_duplicates_cluster"]))
    return {"clusters": len(sizes), "largest_cluster": int(sizes.max())}


def brute_force(folder: Path, out: Path) -> dict[str, float]:
    """Every row with all rows before it."""
    vectors = np.concatenate(
        [t.column(NAME).combine_chunks().flatten().to_numpy().reshape(len(t), -1) for t in Shards(folder).parts([NAME])]
    ).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    most = np.full(len(vectors), -1, np.float32)
    block = 4096
    for first in range(0, len(vectors), block):
        mine, best = vectors[first : first + block], most[first : first + block]
        for other in range(0, first, block):
            np.maximum(best, (mine @ vectors[other : other + block].T).max(axis=1), out=best)
        own = mine @ mine.T
        own[np.triu_indices(len(mine))] = -1
        np.maximum(best, own.max(axis=1), out=best)
    np.save(out, most > 1 - EPSILON)
    return {}


SIDES = {"ours": ours, "few_clusters": few_clusters, "brute_force": brute_force}


def side(name: str, folder: Path, out: Path) -> dict[str, float]:
    """Seconds and peak memory of one side, in a process of its own."""
    command = [sys.executable, __file__, "--side", name, str(folder), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    """Measure, print, write; 1 when a duplicate is found that is none, or brute force is as fast."""
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 200_000
    width = int(sys.argv[2]) if len(sys.argv) > 2 else 512
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "shards"
        folder.mkdir()
        make(folder, rows, width)
        answers = {}
        sides = {}
        for name in SIDES:
            sides[name] = side(name, folder, Path(scratch) / "answer.npy")
            answers[name] = np.load(Path(scratch) / "answer.npy")
    expected = answers["brute_force"]
    for name in ("ours", "few_clusters"):
        sides[name]["recall"] = round(float((answers[name] & expected).sum() / max(1, expected.sum())), 4)
    wrong = int((answers["ours"] & ~expected).sum())
    figures = {
        "rows": rows,
        "width": width,
        "epsilon": EPSILON,
        **sides,
        "times_faster": round(sides["brute_force"]["seconds"] / sides["ours"]["seconds"], 1),
        "duplicates": int(expected.sum()),
        "found_but_none": wrong,
    }
    print(figures)
    machine = {"python": platform.python_version(), "cpus": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": machine, **figures}, indent=1) + "\n", encoding="utf-8")
    # A pair within rounding of the threshold may fall on either side.
    return int(wrong > expected.sum() / 10_000 or figures["times_faster"] <= 1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        began = time.perf_counter()
        said = SIDES[sys.argv[2]](Path(sys.argv[3]), Path(sys.argv[4]))
        seconds = round(time.perf_counter() - began, 2)
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(json.dumps({"seconds": seconds, "peak_mb": peak_mb, **said}))
    else:
        sys.exit(main())
