"""What holds for every test: no hub is asked, Ray reports to nobody, and a GPU test may not pass by skipping."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import pytest

# Before anything imports what reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
if "PYTEST_XDIST_WORKER" in os.environ:
    # Each of several workers would start as many threads as there are CPUs, and they would wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With MMDATA_REQUIRE_GPU=1 a skipped test that is marked `gpu` has failed."""
    report = yield
    if report.skipped and item.get_closest_marker("gpu") and os.environ.get("MMDATA_REQUIRE_GPU") == "1":
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} needs a GPU and was skipped, but MMDATA_REQUIRE_GPU=1"
    return report
