"""How long `import mmdata`, `mmdata --help` and `mmdata stages` take to start, beside a bare Python.

Run by `make bench`. Each command runs in a process of its own, in turns with the others; limits are for the median.
Exit code 1 when one is above its limit or loads what it must not. The figures go to tests/bench/results/startup.json.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "startup.json"
ROUNDS = 15
COMMANDS = {
    "bare python": ["-c", ""],
    "import mmdata": ["-c", "import mmdata"],
    "mmdata --help": ["-c", "from mmdata.cli import main; main(['--help'])"],
    "mmdata stages": ["-c", "from mmdata.cli import main; main(['stages'])"],
}
LIMITS_S = {"import mmdata": 0.3, "mmdata --help": 0.6}
LIGHT = ("import mmdata", "mmdata --help")
# What a command that only prints must not load.
HEAVY = ("torch", "ray", "transformers", "open_clip", "pandas", "datasets", "pyarrow.dataset", "duckdb", "cv2")
_REPORT = "import atexit, sys; atexit.register(lambda: print(*sorted(sys.modules), file=sys.stderr)); "


def seconds(arguments: list[str]) -> float:
    """Wall-clock time of one process from its start to its end."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def loaded(arguments: list[str]) -> list[str]:
    """Heavy modules that are loaded when the command ends."""
    command = [sys.executable, "-c", _REPORT + arguments[1]]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return sorted(set(HEAVY) & set(done.stderr.split()))


def main() -> int:
    """Measure, print, write; 1 when a limit is broken."""
    for arguments in COMMANDS.values():
        seconds(arguments)  # reads files into the page cache, writes bytecode
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS):
        for name, arguments in COMMANDS.items():
            times[name].append(seconds(arguments))
    report: dict[str, dict[str, object]] = {}
    for name, found in times.items():
        median = statistics.median(found)
        report[name] = {"median_s": round(median, 3), "best_s": round(min(found), 3), "limit_s": LIMITS_S.get(name)}
        report[name]["ratio_of_best_to_bare_python"] = round(min(found) / min(times["bare python"]), 1)
        if name in LIGHT:
            report[name]["heavy_modules"] = loaded(COMMANDS[name])
    machine = {"python": platform.python_version(), "cpus": os.cpu_count(), "rounds": ROUNDS}
    broken = [n for n, limit in LIMITS_S.items() if statistics.median(times[n]) >= limit or report[n]["heavy_modules"]]
    for name, line in report.items():
        print(f"{name:<14}  {'TOO MUCH' if name in broken else 'ok':<8}  {line}")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": machine, "commands": report}, indent=2) + "\n", encoding="utf-8")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
