"""Operators of installed packages: found by their entry points, listed with their origin, refused when names clash."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import synthetic
import yaml

MODULE = """from mmdata.stage import Stage


class Tint(Stage):
    \"\"\"Share of red in the picture, in [0, 1].\"\"\"

    name, reads, writes = "measure_tint", "number", "tint: float32"

    def compute(self, batch):
        return {"tint": [n / 2 for n in batch["number"]]}


class Misnamed(Tint):
    name = "other_name"


not_an_operator = "text"
"""


def _install(folder: Path, name: str, points: str, module: str | None = None) -> None:
    """Build and install a package of one module, as a user would, into a folder of the test."""
    module = module or name.replace("-", "_")
    source = folder.parent / f"{name}-source"
    source.mkdir()
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        f'[project]\nname = "{name}"\nversion = "1.5"\n[project.entry-points."mmdata.operators"]\n{points}\n'
        f'[tool.hatch.build.targets.wheel]\ninclude = ["{module}.py"]\n'
    )
    (source / f"{module}.py").write_text(MODULE)
    command = [
        sys.executable,
        "-m",
        "uv",
        "pip",
        "install",
        "--offline",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
    ]
    command += ["--python", sys.executable, "--target", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def _mmdata(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from mmdata.cli import main; main()", *arguments]
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "packages"
    points = [
        'measure_tint = "tiny_ops:Tint"',
        'measure_what = "tiny_ops:Misnamed"',
        'no_class = "tiny_ops:not_an_operator"',
        'no_module = "tiny_ops_extra:Tint"',
        'hash_image = "tiny_ops:Tint"',
    ]
    _install(folder, "tiny-ops", "\n".join(points))
    return folder


def _recipe(folder: Path, *steps: Any, **more: Any) -> str:
    document = synthetic.make_dataset(folder / "data", [2, 4, 6])
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**document, "steps": list(steps), **more}))
    return str(folder / "recipe.yaml")


def test_stages_lists_them_with_their_package(site: Path) -> None:
    done = _mmdata(site, "stages")
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert lines["measure_tint"].split() == [
        *("measure_tint", "stage", "Share", "of", "red", "in", "the", "picture,", "in", "[0,", "1].", "[package"),
        *("tiny-ops", "1.5]"),
    ]
    assert "[package" not in lines["probe_image"]
    assert "the class tiny_ops:Misnamed is called 'other_name'" in lines["measure_what"]
    assert "is neither a Stage nor a Group" in lines["no_class"]
    assert "No module named 'tiny_ops_extra'" in lines["no_module"]
    one = _mmdata(site, "stages", "measure_tint")
    assert one.stdout.startswith("measure_tint\n[package tiny-ops 1.5]\n\nShare of red")


def test_a_recipe_uses_one(site: Path, tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, "measure_tint")
    done = _mmdata(site, "run", recipe, "--runner", "inline", "--quiet")
    assert done.returncode == 0, done.stderr
    asked = _mmdata(site, "sql", str(tmp_path / "data/dataset"), "SELECT tint FROM samples", "--format", "json")
    assert [json.loads(line)["tint"] for line in asked.stdout.splitlines()] == [1.0, 2.0, 3.0]
    without = _mmdata(tmp_path, "run", recipe, "--runner", "inline")
    assert (without.returncode, "no operator is called 'measure_tint'" in without.stderr) == (2, True)


def test_a_name_that_mmdata_has_is_refused_when_it_is_used(site: Path, tmp_path: Path) -> None:
    done = _mmdata(site, "plan", _recipe(tmp_path, "hash_image"))
    assert done.returncode == 2
    assert "'hash_image' is offered by mmdata and by tiny-ops 1.5; uninstall one of the packages" in done.stderr


def test_a_name_of_two_packages_is_refused_when_it_is_used(site: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    _install(other, "more-ops", 'measure_tint = "more_ops:Tint"')
    both = Path(os.pathsep.join([str(site), str(other)]))
    done = _mmdata(both, "plan", _recipe(tmp_path, "measure_tint"))
    assert done.returncode == 2
    assert "offered by tiny-ops 1.5 and by more-ops 1.5" in done.stderr


def test_the_package_is_part_of_what_is_computed(site: Path, tmp_path: Path) -> None:
    """One name, one version, another package: nobody may take the columns of one for those of the other."""
    other = tmp_path / "other"
    _install(other, "more-ops", 'measure_tint = "more_ops:Tint"')
    recipe = _recipe(tmp_path, "measure_tint")
    for folder in (site, other, site):
        assert _mmdata(folder, "run", recipe, "--runner", "inline", "--quiet").returncode == 0
    sets = [p.name for p in (tmp_path / "data/dataset/columns").iterdir()]
    assert len(sets) == 2


def test_own_files_may_not_take_a_packages_name(site: Path, tmp_path: Path) -> None:
    own = tmp_path / "mine.py"
    own.write_text(
        "import mmdata\n@mmdata.stage(reads='number', writes='a: int64')\ndef measure_tint(b):\n    return {}\n"
    )
    done = _mmdata(site, "plan", _recipe(tmp_path, "measure_tint", operators=[str(own)]))
    assert done.returncode == 2
    assert "mine.py:2: operator name 'measure_tint' is taken by package tiny-ops 1.5" in done.stderr
