"""Thirty recipes with different thresholds over one dataset of a million rows with six column sets.

Run by `python tests/bench/selections.py [rows] [folder] [recipes]`. Every recipe is `mmdata run` as typed, in a process
of its own, its start included. The peer is the least that anybody must do for the same answer: DuckDB reads the same
columns and writes the ids of the rows that pass, its start included too. Checked is that nothing is computed and what
the disk grows by. Exit code 1 above the limit. The figures go to tests/bench/results/selections.json.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pool
import yaml

import mmdata

RESULTS = Path(__file__).parent / "results" / "selections.json"
RECIPES = 30 if len(sys.argv) < 4 else int(sys.argv[3])
SHARD_ROWS = 10_000
LIMIT_S = 5.0

_RUN = """
import sys
sys.path.insert(0, {bench!r})
import pool
pool.register()
from mmdata.cli import main
main({args!r})
"""
_PEER = """
import sys, glob, duckdb
folder, out, bound = sys.argv[1], sys.argv[2], float(sys.argv[3])
sets = sorted(glob.glob(folder + "/columns/*"))
joins = " ".join(f"POSITIONAL JOIN read_parquet('{s}/*.parquet') s{i}" for i, s in enumerate(sets))
passes = " AND ".join(f"s{i}.random_score >= {bound}" for i in range(len(sets)))
query = f"SELECT r.row_id FROM read_parquet('{folder}/rows/*.parquet') r {joins} WHERE r.status = 'ok' AND {passes}"
duckdb.sql(f"COPY ({query}) TO '{out}' (FORMAT parquet)")
"""


def sizes(folder: Path) -> dict[str, int]:
    """Bytes in each folder of the dataset."""
    found: dict[str, int] = {}
    for path in folder.rglob("*"):
        if path.is_file():
            kind = path.relative_to(folder).parts[0]
            found[kind] = found.get(kind, 0) + path.stat().st_size
    return found


def timed(command: list[str]) -> tuple[float, float]:
    """(seconds, CPU seconds) of a process from its start to its end."""
    before, began = os.times(), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - began, used


def main() -> int:
    """Measure, print, write; 1 when the limit is broken."""
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(scratch)
        pool.make_pool(folder, rows, SHARD_ROWS)
        dataset = folder / "dataset"
        for name in ("verdicts", "state", "current.json"):
            path = dataset / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        before = sizes(dataset)
        ours, peers = [], []
        for number in range(RECIPES):
            bound = 0.02 + number / 100
            recipe = pool.recipe_over(folder, SHARD_ROWS, f"bound-{number:02d}", (bound,) * pool.SETS)
            (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
            arguments = ["run", str(folder / "recipe.yaml"), "--quiet"]
            code = _RUN.format(bench=str(Path(__file__).parent), args=arguments)
            ours.append(timed([sys.executable, "-c", code]))
            peers.append(timed([sys.executable, "-c", _PEER, str(dataset), str(folder / "ids.parquet"), str(bound)]))
        grown = {kind: size - before.get(kind, 0) for kind, size in sizes(dataset).items() if size != before.get(kind)}
        computed = (
            mmdata.open(dataset).sql("SELECT sum(s.computed) FROM (SELECT unnest(steps) AS s FROM runs)").fetchall()
        )
        [(last,)] = (
            mmdata.open(dataset, f"bound-{RECIPES - 1:02d}")
            .sql("SELECT count(*) FROM samples WHERE verdict = 'kept'")
            .fetchall()
        )
        import pyarrow.parquet as pq

        assert pq.ParquetFile(folder / "ids.parquet").metadata.num_rows == last, "the peer keeps other rows"
    assert computed == [(0,)], f"{computed} rows were computed"
    later = [seconds for seconds, _ in ours[1:]]
    figures = {
        "first_s": round(ours[0][0], 2),
        "later_median_s": round(statistics.median(later), 2),
        "later_worst_s": round(max(later), 2),
        "later_cpu_s": round(statistics.median(cpu for _, cpu in ours[1:]), 2),
        "limit_s": LIMIT_S,
        "peer_median_s": round(statistics.median(s for s, _ in peers), 2),
        "ratio_to_peer": round(statistics.median(later) / statistics.median(s for s, _ in peers), 2),
        "rows_computed": 0,
        "grown_bytes": grown,
    }
    is_broken = max(later) > LIMIT_S or not grown.keys() <= {"verdicts", "state", "runs", "current.json", "lease.json"}
    print("TOO MUCH" if is_broken else "ok", figures)
    machine = {"python": platform.python_version(), "cpus": os.cpu_count(), "recipes": RECIPES, "rows": rows}
    machine["load"] = round(os.getloadavg()[0], 1)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": machine, "selections": figures}, indent=2) + "\n", encoding="utf-8")
    return 1 if is_broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
