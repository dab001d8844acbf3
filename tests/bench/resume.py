"""How long a run takes that finds everything done: 100,000 finished shards, six column sets, on a local disk.

Run by `python tests/bench/resume.py [shards] [folder]`. The files of the shards are names of a few small files, since
no run is to open them; what is known of them is logged and published through the driver's own parts. Measured is
`mmdata run` without its imports, in a process of its own, beside the peer: listing the same folders with sizes, as any
resume by existence must. Exit code 1 above the limit. The figures go to tests/bench/results/resume.json.
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

import numpy as np
import pool
import yaml

from mmdata.column_files import ColumnFile
from mmdata.coverage_log import CoverageLog, pass_key
from mmdata.plan import chain, identity
from mmdata.planned import Resolved
from mmdata.preflight import prove
from mmdata.recipe import document_of, parse
from mmdata.run_ledger import Ledger
from mmdata.set_files import SetFiles
from mmdata.store import shard_name
from mmdata.survivors import BoundStep
from mmdata.verdict_work import Settled

RESULTS = Path(__file__).parent / "results" / "resume.json"
ROUNDS = 3
LIMIT_S = 10.0

_RUN = """
import json, os, sys, time
import mmdata.dataset, mmdata.driver, mmdata.preflight
sys.path.insert(0, {bench!r})
import pool
from pathlib import Path
import resource
import pyarrow.parquet as pq
pool.register()
opened = []
inner = pq.ParquetFile.__init__
def counted(self, source, *args, **kwargs):
    opened.append(str(source))
    inner(self, source, *args, **kwargs)
pq.ParquetFile.__init__ = counted
recipe = pool.recipe_over(Path(sys.argv[1]), 10)
began, cpu = time.perf_counter(), time.process_time()
ds = mmdata.run(recipe, runner="inline")
seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
assert not ds.report.changed and not any(w.computed for w in ds.report.work.values())
shards = sum(1 for name in opened if "/rows/" in name or "/columns/" in name or "/verdicts/" in name)
with open("/proc/self/status") as status:
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1e6
print(json.dumps([seconds, cpu, shards, peak]))
"""
_LIST = """
import json, os, sys, time
began = time.perf_counter()
files = 0
for folder, folders, names in os.walk(sys.argv[1] + "/dataset"):
    for name in names:
        files += os.stat(os.path.join(folder, name)).st_size >= 0
print(json.dumps([time.perf_counter() - began, files]))
"""


def finished_dataset(folder: Path, shards: int) -> None:
    """A dataset whose shards are all done; made once."""
    recipe = pool.make_pool(folder, 10, 10)
    if (folder / "finished").exists():
        return
    proved = prove(parse(recipe))
    root = Path(proved.store.root)
    bound, sets = [], {}
    for step in proved.plan.steps:
        if step.kind == "filter":
            bound.append(BoundStep(step))
            continue
        assert step.contract is not None
        name, document, full = identity(step, Resolved(precision=step.contract.precision), sets)
        sets[step.position] = name
        bound.append(BoundStep(step, name, document, full))
    key, hashed = pass_key(bound, 0), chain([b.step for b in bound], sets)
    (root / f"verdicts/{hashed}-made").mkdir(parents=True)
    (root / f"verdicts/{hashed}-made/{shard_name(0)}.parquet").write_bytes(b"verdicts of ten rows")
    for pattern in ("rows/{}.g0.parquet", *(f"columns/{n}/{{}}.c0.parquet" for n in sets.values())):
        _names(root / pattern, shards)
    _names(root / f"verdicts/{hashed}-made/{{}}.parquet", shards)
    held: dict[str, SetFiles] = {}
    log = CoverageLog(proved.store, "made", held)
    for bound_step in bound:
        if bound_step.set_name:
            held[bound_step.set_name] = found = SetFiles.none(f"columns/{bound_step.set_name}")
            for shard in range(shards):
                file = f"columns/{bound_step.set_name}/{shard_name(shard)}.c0.parquet"
                found[shard] = ColumnFile(file, 0, 10, 10, "0" * 64, bound_step.full_hash)
    log.flush()
    log.name_inputs(key, sets.values())
    ledger = Ledger(proved.store, log, "bench", hashed, "made")
    log.name_inputs(hashed, sets.values())
    counts = (("kept", None, None, 6), ("dropped", 2, "f0", 4))
    for shard in range(shards):
        log.add_pass(key, shard, [10, 6] + [10, 0] * len(bound))
        file = f"{ledger.folder}/{shard_name(shard)}.parquet"
        ledger.take(Settled(shard, file, 10, counts, 0, f"{shard:05d}0", f"{shard:05d}9", 10))
    log.flush()
    text = yaml.safe_dump(document_of(proved.plan.recipe), sort_keys=False, allow_unicode=True)
    ledger.publish(text, np.arange(shards), bound, lambda: None)
    proved.document.sources[0]["shards"] = shards
    (root / "dataset.json").write_bytes(proved.document.to_bytes())
    (folder / "finished").touch()


def _names(pattern: Path, shards: int) -> None:
    """The file of shard 0 under the names of the others; a file system takes some 60,000 names of one file."""
    first = Path(str(pattern).format(shard_name(0)))
    source, data = first, first.read_bytes()
    for shard in range(1, shards):
        name = Path(str(pattern).format(shard_name(shard)))
        if shard % 50_000 == 0:
            name.write_bytes(data)
            source = name
        else:
            os.link(source, name)


def main() -> int:
    """Measure, print, write; 1 when the limit is broken."""
    shards = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(scratch)
        finished_dataset(folder, shards)
        code = _RUN.format(bench=str(Path(__file__).parent))
        found = []
        for _ in range(ROUNDS):
            ours = _in_a_process(code, folder)
            assert ours[2] == 0, f"{ours[2]} files of finished shards were opened"
            found.append((*ours, *_in_a_process(_LIST, folder)))
    seconds, cpu, _, memory, peer, files = (statistics.median(column) for column in zip(*found, strict=True))
    figures = {
        "median_s": round(seconds, 2),
        "best_s": round(min(f[0] for f in found), 2),
        "cpu_s": round(cpu, 2),
        "limit_s": LIMIT_S,
        "peak_rss_gb": round(memory, 3),
        "files_listed": int(files),
        "peer_listing_s": round(peer, 2),
        "ratio_to_peer": round(seconds / peer, 2),
    }
    print(("TOO MUCH" if seconds > LIMIT_S else "ok"), figures)
    machine = {"python": platform.python_version(), "cpus": os.cpu_count(), "rounds": ROUNDS, "shards": shards}
    machine["load"] = round(os.getloadavg()[0], 1)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": machine, "resume": figures}, indent=2) + "\n", encoding="utf-8")
    return 1 if seconds > LIMIT_S else 0


def _in_a_process(code: str, folder: Path) -> list[float]:
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: list[float] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    raise SystemExit(main())
