"""What a user gets from the wheel: built here without a network, unpacked, and asked from another folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from house import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the wheel's content."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, text=True)
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def ask(installed: Path, code: str) -> str:
    command = [sys.executable, "-P", "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(command, cwd=installed.parent, env=environment, check=True, capture_output=True, text=True)
    return done.stdout


def test_holds_every_module_and_data_file_of_the_package_and_no_other_package(installed: Path) -> None:
    def files(root: Path) -> set[str]:
        found = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}
        return {f for f in found if "__pycache__" not in f}

    recipes = {f"recipes/{p.name}" for p in (ROOT / "recipes").iterdir()}
    assert files(installed / "mmdata") == files(ROOT / "mmdata") | recipes
    assert (installed / "mmdata" / "py.typed").is_file()
    assert sorted(p.name.partition("-")[0] for p in installed.iterdir()) == ["mmdata", "mmdata"]
    [metadata] = installed.glob("*.dist-info")
    assert (metadata / "licenses" / "LICENSE").is_file()
    assert "mmdata = mmdata.cli:main" in (metadata / "entry_points.txt").read_text()


def test_finds_its_recipes(installed: Path) -> None:
    code = "from mmdata import catalogue; print(catalogue.recipe_folder()); print(catalogue.shipped_recipes())"
    folder, *lines = ask(installed, code).splitlines()
    assert folder == str(installed / "mmdata" / "recipes")
    assert [line.split()[0] for line in lines] == sorted(p.stem for p in (ROOT / "recipes").glob("*.yaml"))


def test_a_checkout_finds_its_recipes() -> None:
    from mmdata import catalogue

    assert str(catalogue.recipe_folder()) == str(ROOT / "recipes")
