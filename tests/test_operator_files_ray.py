"""Own operators on real Ray workers: sent as the bytes of their file, which the workers need not see."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import synthetic

import mmdata
from mmdata import registry
from mmdata.errors import ContractError, RecipeError
from mmdata.recipe import parse
from mmdata.stage import Options, Stage

FILE = """import os

from mmdata.stage import Contract, Options, Stage, parse_schema


class ModelOptions(Options):
    add: int = 5


class Model(Stage[ModelOptions]):
    name = "add_by_model"

    @classmethod
    def contract(cls, options):
        return Contract(writes=parse_schema("sum: int64, pid: int64"), reads=("number",), batch_shape=4)

    def open(self, device):
        self.opened = os.getpid()

    def compute(self, batch):
        return {"sum": [n + self.options.add for n in batch["number"]], "pid": [self.opened] * len(batch)}
"""
PLAIN = """import mmdata
import os


@mmdata.stage(reads="number", writes="double: int64, plain_pid: int64")
def double(batch):
    return {"double": [2 * n for n in batch["number"]], "plain_pid": [os.getpid()] * len(batch)}
"""


@pytest.fixture(scope="module", autouse=True)
def _cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMDATA_SCRATCH", str(tmp_path_factory.mktemp("scratch")))
        patch.setattr(registry, "_registered", dict(registry._registered))
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        try:
            yield
        finally:
            ray.shutdown()


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Any]:
    return synthetic.make_dataset(tmp_path / "data", list(range(40)), shard_rows=20)


def test_workers_need_not_see_the_file(tmp_path: Path, base: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in (("model.py", FILE), ("plain.py", PLAIN)):
        (tmp_path / name).write_text(text)
    recipe = parse({**base, "operators": ["model.py", "plain.py"], "steps": [{"add_by_model": {"add": 7}}, "double"]})
    for name in ("model.py", "plain.py"):
        (tmp_path / name).unlink()
    made = mmdata.run(recipe, runner="ray")
    assert made.sql("SELECT sum, double FROM samples ORDER BY row_id").fetchall() == [(n + 7, 2 * n) for n in range(40)]
    pids = {p for row in made.sql("SELECT DISTINCT pid, plain_pid FROM samples").fetchall() for p in row}
    assert os.getpid() not in pids


def test_the_same_sets_inline_and_on_ray(tmp_path: Path, base: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.py").write_text(PLAIN)
    recipe = {**base, "operators": ["plain.py"], "steps": ["double"]}
    inline = mmdata.run(recipe, runner="inline")
    again = mmdata.run(recipe, runner="ray")
    assert again.report is not None
    assert again.report.work["double"].computed == 0
    assert inline.current == again.current


def test_an_error_on_a_worker_has_file_and_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = synthetic.make_dataset(tmp_path / "data", list(range(40)), shard_rows=40)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.py").write_text(PLAIN.replace("    return", "    {}['colour']\n    return"))
    with pytest.raises(ContractError, match=r"KeyError: 'colour' at plain\.py:7"):
        mmdata.run({**base, "operators": ["plain.py"], "steps": ["double"]}, runner="ray")


def _local(value: Any) -> type[Stage[Options]]:
    """A class that no module holds, as in a notebook."""

    class Local(Stage[Options]):
        name, reads, writes = "make_local", "number", "local: int64"

        def compute(self, batch: Any) -> Any:
            return {"local": [n + (1 if value else 0) for n in batch["number"]]}

    registry.register(Local)
    return Local


def test_what_a_notebook_defines_travels_too_where_it_can(base: dict[str, Any]) -> None:
    _local(True)
    recipe = {**base, "steps": ["make_local"]}
    made = mmdata.run(recipe, runner="ray")
    assert made.sql("SELECT local FROM samples ORDER BY row_id").fetchall() == [(n + 1,) for n in range(40)]
    _local(threading.Lock()).version = 2
    with pytest.raises(RecipeError, match=r"cannot be sent to workers .*put it into a file of its own and name that"):
        mmdata.run(recipe, runner="ray")
    assert mmdata.run(recipe, runner="inline").funnel().kept == 40


def test_a_script_defines_its_own_stage(tmp_path: Path, base: dict[str, Any]) -> None:
    script = tmp_path / "mine.py"
    script.write_text(
        f"{PLAIN}\n\nrecipe = { ({**base, 'steps': ['double']})!r}\n"
        "made = mmdata.run(recipe, runner='ray', workers=1)\n"
        "print(made.sql('SELECT sum(double), count(DISTINCT plain_pid) FROM samples').fetchall(), os.getpid() in "
        "[p for p, in made.sql('SELECT plain_pid FROM samples').fetchall()])\n"
    )
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[(1560, 1)] False"


def test_a_worker_without_the_module_says_so(
    tmp_path: Path, base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "only_here"
    folder.mkdir()
    (folder / "only_the_driver_has_this.py").write_text(PLAIN)
    monkeypatch.syspath_prepend(str(folder))
    __import__("only_the_driver_has_this")
    with pytest.raises(mmdata.MmdataError, match=r"a worker on \S+ cannot import .*only_the_driver_has_this"):
        mmdata.run({**base, "steps": ["double"]}, runner="ray")
