"""`near_duplicates` over 1,000,000 and 10,000,000 hashes at radius 4 and 6, beside imagededup and a DuckDB self-join.

By hand: `python tests/bench/near_duplicates.py`, or with `--rows 1000000 --seconds 60` for less. Hashes are random; a
fifth of the rows is planted, 0 to 8 bits from another row; one in a hundred is one and the same hash. The rows lie in
Parquet files of 10,000, and each measurement is a process of its own: the time of the whole group (files in, columns
out) and its largest memory: anonymous, which it needs, and resident, where pages of scratch files that the system may
drop count too. Recall: every planted pair within the radius must be among the pairs of the search, and so must every
pair of 200 (of 10,000,000: 50) rows that a comparison with all rows finds.

Peers in the same run: imagededup's `PHash.find_duplicates` (of .venv-peers; it is given the hashes) at 3,000 rows,
then three times as many again, until one takes longer than `--seconds`; and DuckDB's join on five (radius 6: seven)
bands. Exit code 1 above 20 s for a million, 300 s for ten, 1 GB of anonymous memory for either, or when a pair is
missed. The figures go to tests/bench/results/near_duplicates.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmdata.groups.near_duplicates import NearDuplicates, NearDuplicatesOptions
from mmdata.groups.near_pairs import each_pair

RESULTS = Path(__file__).parent / "results" / "near_duplicates.json"
PEERS = Path(__file__).parents[2] / ".venv-peers" / "bin" / "python"
LIMITS = {1_000_000: (20, 1.0), 10_000_000: (300, 1.0)}  # seconds, GB of anonymous memory
SHARD_ROWS = 10_000
SAMPLE = {10_000_000: 50}

IMAGEDEDUP = """
import sys, time, numpy as np
from imagededup.methods import PHash
if __name__ == "__main__":
    hashes = {str(i): f"{h:016x}" for i, h in enumerate(np.load(sys.argv[1]).tolist())}
    began = time.perf_counter()
    PHash(verbose=False).find_duplicates(encoding_map=hashes, max_distance_threshold=int(sys.argv[2]))
    print(time.perf_counter() - began)
"""


def planted(rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hashes, and two lists of rows of which one is made from the other."""
    rng = np.random.default_rng(rows)
    hashes = rng.integers(0, 2**64, rows, np.uint64)
    many = rows // 5
    at = rng.permutation(rows)
    source, target, same = at[:many], at[many : 2 * many], at[2 * many : 2 * many + rows // 100]
    changed, bits = hashes[source], rng.integers(0, 9, many)
    for bit in range(8):
        changed ^= np.where(bits > bit, np.uint64(1) << rng.integers(0, 64, many, np.uint64), np.uint64(0))
    hashes[target] = changed
    hashes[same] = hashes[same[0]]
    return hashes, source, target


def missed(rows: int, radius: int) -> dict[str, int]:
    """Pairs that were looked for, and how many of them the search does not give."""
    hashes, source, target = planted(rows)
    distinct, where = np.unique(hashes, return_inverse=True)
    rng = np.random.default_rng(0)
    sample = rng.choice(len(distinct), SAMPLE.get(rows, 200), replace=False)
    wanted = [np.stack([where[source], where[target]])]
    for one in sample.tolist():
        near = np.flatnonzero(np.bitwise_count(distinct ^ distinct[one]) <= radius)
        wanted.append(np.stack([np.full(len(near), one), near]))
    low, high = np.sort(np.concatenate(wanted, axis=1), axis=0)
    close = (np.bitwise_count(distinct[low] ^ distinct[high]) <= radius) & (low != high)
    found: list[np.ndarray] = []
    each_pair(distinct, radius, lambda a, b: found.append(a * len(distinct) + b), threads=2)
    asked = np.unique(low[close] * len(distinct) + high[close])
    return {"asked": len(asked), "missed": int((~np.isin(asked, np.concatenate(found))).sum())}


def make(rows: int, folder: Path) -> None:
    """The rows in files."""
    hashes = planted(rows)[0]
    for number, first in enumerate(range(0, rows, SHARD_ROWS)):
        ids = np.arange(first, min(first + SHARD_ROWS, rows))
        columns = {"row_id": ids, "key": [f"{i:08d}" for i in ids.tolist()], "phash": hashes[ids]}
        pq.write_table(pa.table(columns), folder / f"{number:06d}.parquet")


class Shards:
    """`mmdata.stage.GroupRows` over the files, as far as the group asks."""

    older = None

    def __init__(self, folder: Path, rows: int) -> None:
        self._paths, self._rows = sorted(folder.glob("*.parquet")), rows

    def __len__(self) -> int:
        return self._rows

    def parts(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        return (pq.read_table(p, columns=["row_id", *columns]) for p in self._paths)

    def visit_order_in(self, scratch: Path) -> None:
        return None


class Watch:
    """The largest anonymous memory of this process while it is open, in GB."""

    def __enter__(self) -> Watch:
        self.peak_gb = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._done.wait(0.005):
            found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
            self.peak_gb = max(self.peak_gb, int(found[1]) / 2**20 if found else np.inf)

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()


def ours(rows: int, radius: int, folder: Path) -> dict[str, Any]:
    """The group as a run calls it; the rows are in `folder`."""
    group = NearDuplicates(NearDuplicatesOptions(max_distance=radius))
    began, used = time.perf_counter(), time.process_time()
    with Watch() as watch, tempfile.TemporaryDirectory() as scratch:
        group.compute_streamed(Shards(folder, rows), Path(scratch))
    seconds, cpu = time.perf_counter() - began, time.process_time() - used
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "peak_anonymous_gb": round(watch.peak_gb, 2),
        "peak_resident_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "says": group.remark,
    }


def bands(rows: int, radius: int) -> dict[str, Any]:
    """All close pairs by a join on radius + 1 bands."""
    found = (
        pa.table({"id": np.arange(rows), "h": np.asarray(planted(rows)[0])}).group_by("h").aggregate([("id", "min")])
    )
    edges = np.linspace(0, 64, radius + 2).round().astype(int).tolist()
    pieces = [
        f"SELECT id_min AS id, h, {i} AS band, (h >> {low}) & {(1 << (high - low)) - 1} AS piece FROM found"
        for i, (low, high) in enumerate(pairwise(edges))
    ]
    connection = duckdb.connect()
    connection.register("found", found)
    began = time.perf_counter()
    query = (
        f"WITH banded AS ({' UNION ALL '.join(pieces)}) SELECT count(*) FROM (SELECT DISTINCT a.id, b.id AS other "
        f"FROM banded a JOIN banded b USING (band, piece) WHERE a.id < b.id AND bit_count(xor(a.h, b.h)) <= {radius})"
    )
    pairs = connection.sql(query).fetchall()[0][0]
    return {"seconds": round(time.perf_counter() - began, 2), "pairs": pairs}


def child(what: str, rows: int, radius: int = 0, folder: str = "") -> Any:
    """The answer of one measurement, made in a process of its own."""
    command = [sys.executable, __file__, "--child", what, "--rows", str(rows), "--radius", str(radius)]
    command += ["--folder", folder] if folder else []
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def imagededup(radius: int, limit_s: float, most: int) -> dict[str, Any]:
    """Seconds by rows, up to the largest size that ends in time."""
    found: dict[str, Any] = {}
    rows = 3_000
    with tempfile.TemporaryDirectory() as folder:
        while PEERS.exists() and rows <= most:
            path = Path(folder) / "hashes.npy"
            np.save(path, planted(rows)[0])
            command = [str(PEERS), "-c", IMAGEDEDUP, str(path), str(radius)]
            # It starts processes of its own: they end with it.
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
                try:
                    answer = process.communicate(timeout=limit_s + 30)[0]
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    found[str(rows)] = f"not in {limit_s:.0f} s"
                    break
            found[str(rows)] = round(float(answer.split()[-1]), 2)
            rows *= 3
    return found


def main() -> int:
    """Measure, print, write; 1 when a limit is broken."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="*", default=[1_000_000, 10_000_000])
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--child")
    parser.add_argument("--radius", type=int)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.child:
        rows, radius, folder = given.rows[0], given.radius, given.folder
        asked = {"make": lambda: make(rows, folder), "ours": lambda: ours(rows, radius, folder)}
        asked |= {"bands": lambda: bands(rows, radius), "missed": lambda: missed(rows, radius)}
        print(json.dumps(asked[given.child]()))
        return 0
    report: dict[str, Any] = {"cores": os.cpu_count()}
    broken = False
    for radius in (4, 6):
        peer = imagededup(radius, given.seconds, max(given.rows))
        print(f"radius {radius}: imagededup {peer}", flush=True)
        largest = max((int(n) for n, s in peer.items() if isinstance(s, float)), default=None)
        line: dict[str, Any] = {"imagededup_seconds_by_rows": peer}
        for rows in sorted({*given.rows, *([largest] if largest else [])}):
            with tempfile.TemporaryDirectory() as folder:
                child("make", rows, folder=folder)
                found = child("ours", rows, radius, folder)
            found["recall"] = child("missed", rows, radius)
            if rows <= 1_000_000:
                found["duckdb_bands"] = child("bands", rows, radius)
                found["ratio_to_duckdb"] = round(found["duckdb_bands"]["seconds"] / found["seconds"], 1)
            if rows == largest:
                found["ratio_to_imagededup"] = round(peer[str(rows)] / found["seconds"], 1)
            seconds, gigabytes = LIMITS.get(rows, (np.inf, np.inf))
            broken |= found["recall"]["missed"] > 0
            broken |= found["seconds"] > seconds or found["peak_anonymous_gb"] > gigabytes
            line[str(rows)] = found
            print(f"radius {radius}, {rows:,} rows: {found}", flush=True)
        report[f"radius {radius}"] = line
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=2) + "\n")
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
