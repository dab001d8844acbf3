"""Near-duplicates among a million captions by MinHash, beside datasketch: from text to clusters.

Run by `python tests/bench/minhash.py [rows] [datasketch rows]`. Ours is what a run does: `hash_text` in batches of 256
rows, a Parquet file for each shard of 10,000, `minhash_duplicates` over those files. The peer is datasketch's MinHash
and MinHashLSH with the same shingles, places, bands and rows, its candidates verified by their signatures, over fewer
rows, extrapolated in proportion to the rows (its dictionaries grow, so this flatters it). Both on one process; rensa
may use every core. Then precision and recall against exact Jaccard over a sample, for ours and for the peer. Exit code
1 below ten times the peer. The figures go to tests/bench/results/minhash.json.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from captions import captions
from datasketch import MinHash, MinHashLSH

from mmdata.batch import Batch
from mmdata.column_files import write_parquet
from mmdata.groups.lsh import choose_bands
from mmdata.groups.minhash_duplicates import MinhashDuplicates, MinhashDuplicatesOptions
from mmdata.stages.hash_text import HashText, HashTextOptions

RESULTS = Path(__file__).parent / "results" / "minhash.json"
SHARD_ROWS, BATCH_ROWS = 10_000, 256
THRESHOLD, PERMUTATIONS = 0.8, 128
LIMIT = 10.0
SAMPLE = 10_000


@dataclass
class ShardFiles:
    """Rows of a group that streams (`mmdata.stage.GroupRows`), from one Parquet file a shard."""

    files: list[Path]
    rows: int
    older = None

    def __len__(self) -> int:
        return self.rows

    def row_ids(self) -> np.ndarray:
        return np.arange(self.rows)

    def parts(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        return (pq.read_table(file, columns=["row_id", *columns]) for file in self.files)

    def read(self, columns: Sequence[str]) -> pa.Table:
        return pa.concat_tables(self.parts(columns))

    def visit_order(self) -> np.ndarray:
        return np.arange(self.rows)


def hashed(texts: list[str], folder: Path) -> ShardFiles:
    """`hash_text` over all captions, a file a shard."""
    stage, files = HashText(HashTextOptions(permutations=PERMUTATIONS)), []
    for first in range(0, len(texts), SHARD_ROWS):
        shard = pa.table({"caption": pa.array(texts[first : first + SHARD_ROWS])})
        found = []
        for begin in range(0, len(shard), BATCH_ROWS):
            some = shard.slice(begin, BATCH_ROWS)
            found.append(stage.compute(Batch(some, None, list(range(len(some)))))["minhash"])
        rows = np.arange(first, first + len(shard))
        keys = pa.array([f"{r:09d}" for r in rows.tolist()])
        files.append(folder / f"{first:09d}.parquet")
        table = pa.table({"row_id": rows, "key": keys, "minhash": pa.chunked_array(found)})
        write_parquet(table, files[-1])
    return ShardFiles(files, len(texts))


def ours(texts: list[str]) -> tuple[np.ndarray, dict[str, float]]:
    """(the row that each one's cluster begins with, seconds of each part)."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        began, used = time.perf_counter(), time.process_time()
        rows = hashed(texts, folder)
        between = time.perf_counter()
        (folder / "scratch").mkdir()
        group = MinhashDuplicates(MinhashDuplicatesOptions(threshold=THRESHOLD))
        columns = group.compute_streamed(rows, folder / "scratch")
        ended, used = time.perf_counter(), time.process_time() - used
    ids = columns["minhash_duplicates_id"]
    return ids.to_numpy(), {"hash_text_s": between - began, "minhash_duplicates_s": ended - between, "cpu_s": used}


def shingles(text: str) -> set[str]:
    """The same that `hash_text` cuts, in plain Python: all captions here are of few scripts."""
    normal = " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())
    return {normal[i : i + 5] for i in range(max(1, len(normal) - 4))}


def datasketch(texts: list[str]) -> tuple[np.ndarray, float, float]:
    """(the row that each one's cluster begins with, seconds, CPU seconds), by the same rule."""
    began, used = time.perf_counter(), time.process_time()
    bands = choose_bands(THRESHOLD, PERMUTATIONS, MinhashDuplicatesOptions().recall_weight)
    index = MinHashLSH(num_perm=PERMUTATIONS, params=bands)
    signatures = []
    for row, text in enumerate(texts):
        signature = MinHash(PERMUTATIONS)
        signature.update_batch([s.encode() for s in shingles(text)])
        signatures.append(signature)
        index.insert(row, signature)
    first = np.full(len(texts), -1)
    for row, signature in enumerate(signatures):
        if first[row] < 0:
            first[row] = row
            for other in index.query(signature):
                if first[other] < 0 and signature.jaccard(signatures[other]) >= THRESHOLD:
                    first[other] = row
    return first, time.perf_counter() - began, time.process_time() - used


def quality(texts: list[str], first: np.ndarray) -> dict[str, float]:
    """Against exact Jaccard of all pairs. Recall: of rows with an earlier one as alike, how many are not first."""
    sets = [shingles(t) for t in texts]
    number = {s: i for i, s in enumerate(sorted(set().union(*sets)))}
    holders: list[list[int]] = [[] for _ in number]
    for row, mine in enumerate(sets):
        for s in mine:
            holders[number[s]].append(row)
    held = [np.array(h, np.int32) for h in holders]
    sizes, alike = np.array([len(s) for s in sets]), np.zeros(len(sets), bool)
    for row, mine in enumerate(sets):
        both = np.bincount(np.concatenate([held[number[s]] for s in mine]), minlength=len(sets))[:row]
        alike[row] = bool((both / (sizes[row] + sizes[:row] - both) >= THRESHOLD).any())
    taken = np.flatnonzero(first != np.arange(len(texts)))
    true = np.array([len(sets[a] & sets[b]) / len(sets[a] | sets[b]) for a, b in zip(taken, first[taken], strict=True)])
    return {
        "rows": len(texts),
        "rows_with_an_earlier_one_as_alike": int(alike.sum()),
        "recall": round(float((first[alike] != np.flatnonzero(alike)).mean()), 4),
        "precision": round(float((true >= THRESHOLD).mean()), 4),
        "least_true_similarity": round(float(true.min()), 3),
    }


def main() -> int:
    """Measure, print, write; 1 below the limit."""
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    peer_rows = int(sys.argv[2]) if len(sys.argv) > 2 else 20_000
    texts = captions(rows, seed=11)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    first, parts = ours(texts)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = parts["hash_text_s"] + parts["minhash_duplicates_s"]
    _, peer, peer_cpu = datasketch(texts[:peer_rows])
    ratio = peer / peer_rows * rows / seconds
    sample = captions(min(rows, SAMPLE), seed=12)
    sizes = np.unique(first, return_counts=True)[1]
    bands = MinhashDuplicatesOptions(threshold=THRESHOLD).banding(PERMUTATIONS)
    found: dict[str, Any] = {
        "rows": rows,
        "mean_characters": round(float(np.mean([len(t) for t in texts[:SAMPLE]])), 1),
        "threshold": THRESHOLD,
        "permutations": PERMUTATIONS,
        "bands_and_rows": bands,
        "seconds": round(seconds, 2),
        **{k: round(v, 2) for k, v in parts.items()},
        "rows_per_s": round(rows / seconds),
        "peak_mb_above_the_captions": round(peak - held),
        "clusters_of_two_or_more": int((sizes > 1).sum()),
        "largest_cluster": int(sizes.max()),
        "datasketch_rows": peer_rows,
        "datasketch_seconds": round(peer, 2),
        "datasketch_rows_per_s": round(peer_rows / peer),
        "datasketch_cpu_s": round(peer_cpu, 2),
        "ratio": round(ratio, 1),
        "ratio_of_cpu": round(peer_cpu / peer_rows * rows / parts["cpu_s"], 1),
        "limit": LIMIT,
        "sample_ours": quality(sample, ours(sample)[0]),
        "sample_datasketch": quality(sample, datasketch(sample)[0]),
        "packages": {name: version(name) for name in ("datasketch", "rensa", "numpy", "pyarrow")},
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }
    print(json.dumps(found, indent=1))
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    if ratio < LIMIT:
        print(f"{ratio:.1f} times datasketch is less than {LIMIT}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
