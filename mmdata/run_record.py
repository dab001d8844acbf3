"""`runs/<id>.json`: each run's recipe, versions, timings and counts, also of a run that was stopped."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import version
from typing import Any

from mmdata import __version__
from mmdata.recipe import Recipe, document_of
from mmdata.store import Store

__all__ = ["write_record"]

_PACKAGES = ("pyarrow", "duckdb", "numpy", "opencv-python-headless", "pillow", "simplejpeg")


def write_record(
    store: Store,
    run: str,
    status: str,
    started: datetime,
    seconds: float,
    runner: str,
    recipe: Recipe,
    facts: Mapping[str, Any],
) -> None:
    """Create the record; `facts` are what the run counted: rows by status, media reads, work per step."""
    document = {
        "run": run,
        "status": status,
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "runner": runner,
        "recipe": document_of(recipe),
        "versions": {"python": platform.python_version(), "mmdata": __version__} | {p: version(p) for p in _PACKAGES},
        **facts,
    }
    store.create(f"runs/{run}.json", json.dumps(document, indent=1, default=str).encode())
