"""Two worker processes over forty hosts, some dead, slow or busy: nothing lost, nobody asked more than allowed."""

from __future__ import annotations

import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from many_hosts import ManyHosts, fetch_from, host_names, most_in

PER_HOST, TIMEOUT_S, PAUSE_S = 25, 2.0, 2.0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Counter[str]], float, ManyHosts]:
    """Statuses by host, when the run ended (the server's clock is this one), and what the server saw."""
    with ManyHosts() as hosts:
        names = host_names(36, 4)
        folder: Path = tmp_path_factory.mktemp("hosts")
        found, _ = fetch_from(hosts, names, PER_HOST, folder, shard_rows=600, timeout_s=TIMEOUT_S, retries=1)
        ended = time.time()
    return found, ended, hosts


def test_every_row_has_a_status_that_fits_its_host(run: tuple[dict[str, Counter[str]], float, ManyHosts]) -> None:
    found = run[0]
    allowed = {
        "ok": {"ok"},
        "far": {"ok"},
        "busy": {"http_429", "deferred"},
        "slow": {"timeout", "deferred"},
        "gone": {"connect", "deferred"},
        "hole": {"timeout", "deferred"},
    }
    assert len(found) == 40
    for host, statuses in found.items():
        assert sum(statuses.values()) == PER_HOST, (host, statuses)
        assert set(statuses) <= allowed[host.partition("-")[0]], (host, statuses)


def test_a_host_that_never_gets_done_does_not_hold_the_run_up(
    run: tuple[dict[str, Counter[str]], float, ManyHosts],
) -> None:
    found, ended, hosts = run
    # 25 rows, two attempts each, a pause of 2 s after each answer: more than a minute
    assert sum(statuses["deferred"] for host, statuses in found.items() if host.startswith("busy")) > 0
    assert ended - hosts.last_good < 30


def test_no_host_sees_more_than_its_allowance(run: tuple[dict[str, Counter[str]], float, ManyHosts]) -> None:
    seen = run[2].seen
    assert max(host["most"] for host in seen.values()) == 4  # the far ones are asked as fast as allowed
    assert max(most_in(host["starts"], 3.0) for host in seen.values()) <= 10 * 3.0 + 1


def test_a_host_that_says_when_is_asked_then(run: tuple[dict[str, Counter[str]], float, ManyHosts]) -> None:
    """429 with Retry-After: 2, and both workers know; what was on its way when the first came may still arrive."""
    (starts,) = [sorted(host["starts"]) for name, host in run[2].seen.items() if name.startswith("busy")]
    waits = [later - earlier for earlier, later in pairwise(starts)]
    assert len(starts) >= 3
    assert sum(wait < PAUSE_S - 0.3 for wait in waits) <= 4, waits
