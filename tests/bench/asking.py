"""How long questions to a large dataset take, beside the same questions to one flat Parquet file.

Run by `python tests/bench/asking.py [rows] [folder]`. The dataset has ten million rows in 1,000 shards and six column
sets. Every question is a process of its own; its time includes `mmdata.open`, but not the imports, as the peer's does
not; its memory is that of the process. The peer is DuckDB on one Parquet file with the same rows and columns, sorted as
the dataset is. Exit code 1 above a limit. The figures go to tests/bench/results/asking.json.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import duckdb
import pool

import mmdata

RESULTS = Path(__file__).parent / "results" / "asking.json"
ROUNDS = 5
SHARD_ROWS = 10_000
LIMITS_S = {"funnel": 2.0, "survivors": 2.0, "why": 0.3}
MAX_RSS_GB = 1.0

_FUNNEL = "SELECT step_name, reason, count(*) FROM {} GROUP BY step_name, reason"
_KEPT = "SELECT row_id FROM {} WHERE verdict = 'kept'"
_MEASURE = """
import json, sys, time
{imports}
began, cpu = time.perf_counter(), time.process_time()
{work}
seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
with open("/proc/self/status") as status:
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1e6
print(json.dumps([seconds, cpu, peak, answer]))
"""
_OURS = {
    "funnel": f'answer = sum(mmdata.open(sys.argv[1]).sql("{_FUNNEL.format("samples")}").fetchnumpy()["count_star()"])',
    "survivors": f'answer = len(mmdata.open(sys.argv[1]).sql("{_KEPT.format("samples")}").fetchnumpy()["row_id"])',
    "why": "answer = mmdata.open(sys.argv[1]).why(sys.argv[2]).verdict",
}
_FLAT = "read_parquet('\" + sys.argv[1] + \"')"
_PEER = {
    "funnel": f'answer = sum(duckdb.sql("{_FUNNEL.format(_FLAT)}").fetchnumpy()["count_star()"])',
    "survivors": f'answer = len(duckdb.sql("{_KEPT.format(_FLAT)}").fetchnumpy()["row_id"])',
    "why": f'answer = duckdb.sql("SELECT * FROM {_FLAT} WHERE key = \'" + sys.argv[2] + "\'")'
    ".to_arrow_table().to_pylist()[0]['verdict']",
}


def asked(imports: str, work: str, *arguments: str) -> tuple[float, float, float, object]:
    """(seconds, CPU seconds, peak resident memory in GB, the answer) of one question in a process of its own."""
    code = _MEASURE.format(imports=imports, work=work.replace("sum(", "int(sum(").replace('()"])', '()"]))'))
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
    seconds, cpu, memory, answer = json.loads(done.stdout)
    return seconds, cpu, memory, answer


def flat_file(dataset: Path, path: Path) -> None:
    """The whole of `samples` as one Parquet file, which is what a user without mmdata would ask."""
    ds = mmdata.open(dataset)
    if not path.exists():
        ds.sql(f"COPY (SELECT * FROM samples) TO '{path}' (FORMAT parquet, COMPRESSION zstd)")


def main() -> int:
    """Measure, print, write; 1 when a limit is broken."""
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000_000
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(scratch)
        recipe = pool.make_pool(folder, rows, SHARD_ROWS)
        mmdata.run(recipe, runner="inline")
        flat_file(folder / "dataset", folder / "flat.parquet")
        [(key,)] = mmdata.open(folder / "dataset").sql(f"SELECT key FROM rows LIMIT 1 OFFSET {rows // 3}").fetchall()
        found: dict[str, dict[str, list[float]]] = {}
        for _ in range(ROUNDS):
            for name, work in _OURS.items():
                ours = asked("import mmdata.dataset", work, str(folder / "dataset"), key)
                theirs = asked("import duckdb", _PEER[name], str(folder / "flat.parquet"), key)
                assert ours[3] == theirs[3], f"{name}: {ours[3]} here, {theirs[3]} there"
                entry = found.setdefault(name, {"ours": [], "cpu": [], "rss": [], "peer": [], "peer_rss": []})
                for column, value in zip(entry, (*ours[:3], theirs[0], theirs[2]), strict=True):
                    entry[column].append(value)
    return report(rows, found)


def report(rows: int, found: dict[str, dict[str, list[float]]]) -> int:
    """Print and write what was measured; 1 when a limit is broken."""
    questions, broken = {}, []
    for name, entry in found.items():
        ours, peer = statistics.median(entry["ours"]), statistics.median(entry["peer"])
        questions[name] = {
            "median_s": round(ours, 3),
            "best_s": round(min(entry["ours"]), 3),
            "cpu_s": round(statistics.median(entry["cpu"]), 3),
            "limit_s": LIMITS_S[name],
            "peak_rss_gb": round(max(entry["rss"]), 3),
            "peer_median_s": round(peer, 3),
            "peer_peak_rss_gb": round(max(entry["peer_rss"]), 3),
            "ratio_to_peer": round(ours / peer, 2),
        }
        if ours > LIMITS_S[name] or max(entry["rss"]) > MAX_RSS_GB:
            broken.append(name)
        print(f"{name:<10} {'TOO MUCH' if name in broken else 'ok':<8} {questions[name]}")
    machine = {"python": platform.python_version(), "cpus": os.cpu_count(), "rounds": ROUNDS, "rows": rows}
    machine |= {"duckdb": duckdb.__version__, "load": round(os.getloadavg()[0], 1)}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": machine, "questions": questions}, indent=2) + "\n", encoding="utf-8")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
