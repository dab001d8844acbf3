"""20,000 URLs over 200 host names, a tenth of them bad: how long two workers take, and what each host was asked.

Run by hand: `python tests/bench/hosts.py`. First the healthy hosts' URLs alone, then all; the bad hosts refuse
connections, never answer them, drip their bodies, or answer 429 with Retry-After: 2. Timeout 5 s, one retry. It fails
unless the second run ends within the first one's time and two deadlines, no row is lost, every healthy host's row is
ok, and no host sees more than 4 connections at once or 10 requests/s (and one) over any 5 s. The cost of robots.txt is
measured over the healthy hosts, without allowances: `respect` beside `ignore`. Figures: results/hosts.json.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fixtures"))
from many_hosts import ManyHosts, fetch_from, host_names, most_in

RESULTS = Path(__file__).parent / "results" / "hosts.json"
HOSTS, BAD, URLS, TIMEOUT_S = 200, 20, 20_000, 5.0
CONNECTIONS, PER_S, WINDOW_S = 4, 10, 5.0


def run(names: list[str], folder: Path, **fetch: Any) -> tuple[dict[str, Any], float, ManyHosts]:
    """One run over those hosts."""
    with ManyHosts() as hosts:
        found, seconds = fetch_from(hosts, names, URLS // HOSTS, folder, timeout_s=TIMEOUT_S, retries=1, **fetch)
    return found, seconds, hosts


def robots_cost(healthy: list[str], folder: Path, rounds: int = 3) -> dict[str, float]:
    """Seconds of runs over the healthy hosts that answer at once, allowances lifted."""
    near = [name for name in healthy if name.startswith("ok")]
    free = {"per_host": 1000, "per_host_rate": None}
    taken: dict[str, list[float]] = {"respect": [], "ignore": []}
    for number in range(rounds):
        for robots, seconds in taken.items():
            seconds.append(run(near, folder / f"{robots}{number}", robots=robots, **free)[1])
    medians = {f"{robots}_s": round(statistics.median(s), 2) for robots, s in taken.items()}
    return {"hosts": len(near), "urls": len(near) * (URLS // HOSTS), **medians}


def main() -> int:
    """Measure, check, print, write."""
    names = host_names(HOSTS - BAD, BAD)
    healthy, bad = names[:-BAD], names[-BAD:]
    with tempfile.TemporaryDirectory() as scratch:
        _, alone_s, _ = run(healthy, Path(scratch, "healthy"))
        print(f"healthy hosts alone: {alone_s:.1f} s", flush=True)
        found, seconds, hosts = run(names, Path(scratch, "all"))
        print(f"all: {seconds:.1f} s, most requests in 5 s: ", flush=True, end="")
        print(max(most_in(seen["starts"], WINDOW_S) for seen in hosts.seen.values()), flush=True)
        cost = robots_cost(healthy, Path(scratch))
    by_kind: dict[str, dict[str, int]] = {}
    for name, statuses in found.items():
        for status, count in statuses.items():
            kind = by_kind.setdefault(name.partition("-")[0], {})
            kind[status] = kind.get(status, 0) + count
    asked = {name: seen["starts"] for name, seen in hosts.seen.items()}
    figures = {
        "machine": {"cpus": os.cpu_count()},
        "urls": URLS,
        "hosts": HOSTS,
        "bad_hosts": BAD,
        "timeout_s": TIMEOUT_S,
        "healthy_alone_s": round(alone_s, 1),
        "all_s": round(seconds, 1),
        "allowed_s": round(alone_s + 2 * TIMEOUT_S, 1),
        "rows_by_kind_of_host": by_kind,
        "most_connections_of_a_host": max(seen["most"] for seen in hosts.seen.values()),
        "most_requests_of_a_host_in_1_s": max(most_in(starts, 1.0) for starts in asked.values()),
        "most_requests_of_a_host_in_5_s": max(most_in(starts, WINDOW_S) for starts in asked.values()),
        "robots": cost,
    }
    print(json.dumps(figures, indent=2))
    assert sum(sum(statuses.values()) for statuses in found.values()) == URLS
    assert all(found[name] == {"ok": URLS // HOSTS} for name in healthy)
    assert all("ok" not in found[name] for name in bad)
    assert seconds <= alone_s + 2 * TIMEOUT_S
    assert figures["most_connections_of_a_host"] <= CONNECTIONS
    assert figures["most_requests_of_a_host_in_5_s"] <= PER_S * WINDOW_S + 1
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
