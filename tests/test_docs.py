"""Every command that README and docs show after the demo runs, in the order in which they stand."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    "README.md",
    "docs/dataset.md",
    "docs/recipe.md",
    "docs/diff.md",
    "docs/fetching.md",
    "docs/attach.md",
    "docs/download.md",
    "docs/export.md",
    "docs/duplicates.md",
    "docs/curating.md",
    "docs/detecting.md",
    "docs/captions.md",
    "docs/clip.md",
    "docs/balancing.md",
    "docs/embeddings.md",
    "docs/classifiers.md",
    "docs/sources.md",
    "docs/selections.md",
    "docs/retrying.md",
    "docs/runners.md",
]
MMDATA = [sys.executable, "-c", "from mmdata.cli import main; main()"]


def commands(page: str) -> list[list[str]]:
    """The lines that begin with `$ mmdata` in ```console blocks."""
    blocks = re.findall(r"^```console\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.S | re.M)
    lines = [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    assert lines, f"{page} shows no command"
    return [shlex.split(line) for line in lines]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("docs")
    done = subprocess.run([*MMDATA, "demo", "--runner", "inline"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(page: str, demo: Path) -> None:
    for command in commands(page):
        assert command[0] == "mmdata"
        done = subprocess.run([*MMDATA, *command[1:]], cwd=demo, capture_output=True, text=True)
        assert done.returncode == 0, f"{shlex.join(command)}: {done.stderr}"
        assert done.stdout.strip()


@pytest.mark.parametrize("page", ["docs/dataset.md", "docs/training.md", "docs/diff.md"])
def test_the_python_of_a_page_runs(page: str, demo: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.S | re.M)
    assert blocks
    for block in blocks:
        done = subprocess.run([sys.executable, "-c", block], cwd=demo, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "page",
    [
        "docs/duplicates.md",
        "docs/captions.md",
        "docs/clip.md",
        "docs/balancing.md",
        "docs/detecting.md",
        "docs/embeddings.md",
    ],
)
def test_the_steps_of_a_page_are_proved(page: str) -> None:
    from mmdata.plan import plan_recipe
    from mmdata.recipe import parse

    blocks = re.findall(r"^```yaml\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.S | re.M)
    assert len(blocks) > 3
    for block in blocks:
        source = {"kind": "urls", "path": "list.parquet", "caption": "caption"}
        recipe = {"name": "page", "dataset": "page", "source": source, "steps": yaml.safe_load(block)}
        assert plan_recipe(parse(recipe)).steps


def test_the_sources_of_the_page_are_read() -> None:
    from mmdata.recipe import parse
    from mmdata.sources.kinds import KINDS

    blocks = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs/sources.md").read_text(encoding="utf-8"), re.S | re.M)
    kinds = set()
    for block in blocks:
        for document in yaml.safe_load_all(block):
            kinds |= {source.kind for source in parse({"name": "page", "dataset": "page", **document}).sources}
    assert kinds == set(KINDS)


def test_the_stage_of_the_readme_is_a_stage() -> None:
    import mmdata
    from mmdata import registry

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    [block] = [b for b in re.findall(r"^```python\n(.*?)^```", text, re.S | re.M) if "@mmdata.stage" in b]
    code = compile(block, "README.md", "exec")
    exec(code, {"mmdata": mmdata})
    assert registry.operator("measure_red").writes == "red: float32"


def test_the_python_of_the_export_page_runs_after_its_commands(demo: Path) -> None:
    """The blocks for MosaicML streaming and Energon in the environment of the peers, where this package is too."""
    if not (demo / "mixed").exists():  # the last of its commands has not run
        for command in commands("docs/export.md"):
            subprocess.run([*MMDATA, *command[1:]], cwd=demo, check=True, capture_output=True)
    peers = ROOT / ".venv-peers" / "bin" / "python"
    assert peers.exists(), "the environment of the peers is not there: run make test"
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/export.md").read_text(encoding="utf-8"), re.S | re.M)
    in_peers = [b for b in blocks if "streaming" in b or "megatron" in b]
    assert (len(blocks), len(in_peers)) == (8, 2)
    for python, own in ((sys.executable, [b for b in blocks if b not in in_peers]), (str(peers), in_peers)):
        done = subprocess.run([python, "-c", "\n".join(own)], cwd=demo, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
