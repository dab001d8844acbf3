"""Operators from a user's own files: read once, hashed into what they compute, kept apart, refused with their line."""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import synthetic
import yaml

import mmdata
from mmdata import cli, operator_files, registry
from mmdata.errors import ContractError, MmdataError, RecipeError, StoreError
from mmdata.preflight import prove
from mmdata.recipe import Recipe, document_of, parse

SHARPNESS = """import mmdata


@mmdata.stage(reads="image", writes="level: float32")
def measure_level(batch):
    return {"level": [picture.mean() for picture in batch.pixels()]}
"""
CLASSES = """import pyarrow as pa
from pydantic import Field

from mmdata.stage import Group, Options, Stage


class TimesOptions(Options):
    by: int = Field(2, description="factor")


class Times(Stage[TimesOptions]):
    name, version, reads, writes = "times", 1, "number", "times_value: int64"

    def compute(self, batch):
        return {"times_value": [n * self.options.by for n in batch["number"]]}


class Place(Group):
    name, reads, writes = "place", "number", "place_rank: int64"

    def compute(self, rows: pa.Table):
        numbers = rows.column("number").to_pylist()
        return {"place_rank": [1 + sorted(numbers).index(n) for n in numbers]}
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """Writes a file into the current folder, which is the test's own."""
    monkeypatch.chdir(tmp_path)

    def make(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return name

    return make


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Any]:
    """A recipe over ten grey pictures, the level of each its number."""
    return synthetic.make_dataset(tmp_path / "data", list(range(10)), shard_rows=4)


def _sets(recipe: dict[str, Any]) -> dict[str, str]:
    made = mmdata.run(recipe, runner="inline")
    assert made.current is not None
    return {s.name: s.set_name for s in made.current.steps}


def _rows(recipe: dict[str, Any], columns: str) -> list[tuple[Any, ...]]:
    made = mmdata.run(recipe, runner="inline")
    found: list[tuple[Any, ...]] = made.sql(f"SELECT {columns} FROM samples ORDER BY row_id").fetchall()
    return found


def test_a_stage_in_six_lines(write: Callable[[str, str], str], base: dict[str, Any]) -> None:
    file = write("my_ops.py", SHARPNESS)
    assert len([line for line in SHARPNESS.splitlines() if line]) <= 6
    steps = ["measure_level", {"filter": {"bright": "level >= 7"}}]
    recipe = {**base, "operators": [file], "steps": steps}
    assert _rows(recipe, "level") == [(float(n),) for n in range(10)]
    assert mmdata.open(base["dataset"]).funnel().kept == 3
    assert "measure_level" not in registry.names()  # it is this recipe's alone


def test_classes_with_options_and_a_group(write: Callable[[str, str], str], base: dict[str, Any]) -> None:
    file = write("my_ops.py", CLASSES)
    keep = {"filter": {"high": "times_value >= 15"}}
    recipe = {**base, "operators": [file], "steps": [{"times": {"by": 3}}, keep, {"place": {"as": "podium"}}]}
    assert _rows(recipe, "times_value, podium_rank") == [
        *((3 * n, None) for n in range(5)),
        *((3 * n, n - 4) for n in range(5, 10)),
    ]
    with pytest.raises(RecipeError, match=r"step 1 \(times\): no option is called 'buy'; did you mean 'by'"):
        parse_and_plan({**recipe, "steps": [{"times": {"buy": 3}}]})


def parse_and_plan(recipe: dict[str, Any]) -> Recipe:
    read = parse(recipe)
    prove(read)
    return read


def test_the_file_is_part_of_what_its_operators_compute(write: Callable[[str, str], str], base: dict[str, Any]) -> None:
    file = write("my_ops.py", CLASSES)
    recipe = {**base, "operators": [file], "steps": ["times", "place"]}
    before = _sets(recipe)
    assert _sets(recipe) == before
    write("my_ops.py", CLASSES.replace("n * self", "2 * n * self"))  # `version` stays 1
    after = _sets(recipe)
    assert after["times"] != before["times"]
    assert after["place"] != before["place"]
    assert _rows(recipe, "times_value") == [(4 * n,) for n in range(10)]
    write("elsewhere.py", CLASSES)  # where a file lies does not matter
    assert _sets({**recipe, "operators": ["elsewhere.py"]}) == before


def test_the_version_is_the_sha256_of_the_file(write: Callable[[str, str], str], base: dict[str, Any]) -> None:
    file = write("my_ops.py", CLASSES)
    own = parse({**base, "operators": [file]}).own
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    assert {name: cls.version for name, cls in own.items()} == {"times": digest, "place": digest}


def test_two_recipes_with_one_name_do_not_mix(write: Callable[[str, str], str], base: dict[str, Any]) -> None:
    one = write("one.py", SHARPNESS)
    two = write("two.py", SHARPNESS.replace("picture.mean()", "picture.mean() + 1"))
    first, second = ({**base, "operators": [f], "steps": ["measure_level"]} for f in (one, two))
    read = parse(first), parse(second)  # both known before either runs
    assert _rows(second, "level") == [(n + 1.0,) for n in range(10)]
    assert _rows(first, "level") == [(float(n),) for n in range(10)]
    assert read[0].own["measure_level"] is not read[1].own["measure_level"]
    with pytest.raises(RecipeError, match="step 1: no operator is called 'measure_level'"):
        parse({**base, "steps": ["measure_level"]})


def test_a_recipe_is_stored_as_it_was_written(write: Callable[[str, str], str], base: dict[str, Any]) -> None:
    file = write("my_ops.py", SHARPNESS)
    read = parse({**base, "operators": [file], "steps": ["measure_level"]})
    assert document_of(read)["operators"] == [file]
    assert parse(document_of(read)) == read


# What is wrong is said with file and line, before anything is written

STAGE = "import mmdata\n@mmdata.stage(reads='number', writes='{writes}')\ndef {name}(batch):\n    return {{}}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", r"my_ops\.py defines no operator; see mmdata\.stage"),
        (
            "from mmdata.stage import Stage\nclass Mine(Stage):\n    reads = 'number'\n",
            r"my_ops\.py defines no operator \(class Mine has no `name`\)",
        ),
        ("import mmdata\n\nraise OSError('no licence')\n", r"my_ops\.py:3: OSError: no licence"),
        ("import no_such_package\n", r"my_ops\.py:1: ModuleNotFoundError: No module named 'no_such_package'"),
        ("import sys\nsys.exit(3)\n", r"my_ops\.py:2: SystemExit: 3"),
        ("def broken(:\n    pass\n", r"my_ops\.py:1: invalid syntax"),
        ("\0", r"my_ops\.py:?1?: .*null bytes"),
        (STAGE.format(writes="a: float33", name="mine"), r"my_ops\.py:2: ValueError: cannot read 'a: float33'"),
        (STAGE.format(writes="a: int64", name="hash_image"), r"my_ops\.py:2: .*'hash_image' is taken by mmdata"),
        (STAGE.format(writes="a: int64", name="Mine"), r"my_ops\.py:2: operator name 'Mine' must be lower-case"),
        (STAGE.format(writes="a: int64", name="filter"), r"my_ops\.py:2: operator name 'filter' must be"),
        (
            "from mmdata.stages.hash_image import HashImage\n\n\nclass Mine(HashImage):\n    pass\n",
            r"my_ops\.py:4: operator name 'hash_image' is taken by mmdata",
        ),
        (
            "from mmdata.stage import Stage\nclass Mine(Stage):\n    name, writes = 'mine', 'a float'\n",
            r"operator 'mine': its contract cannot be read \(ValueError: cannot read 'a float'",
        ),
        (2 * STAGE.format(writes="a: int64", name="mine"), r"my_ops\.py:\d: my_ops\.py:\d has an operator 'mine' too"),
    ],
)
def test_a_file_that_cannot_be_used(
    text: str,
    message: str,
    write: Callable[[str, str], str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write("my_ops.py", text)
    recipe = synthetic.synthetic_recipe(tmp_path, [1, 2], operators=["my_ops.py"], steps=["mine"])
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(SystemExit) as stopped:
        cli.main(["run", "recipe.yaml", "--runner", "inline"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert said.startswith("mmdata: ")
    assert len(said.splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    with pytest.raises(MmdataError, match=message):
        parse_and_plan(recipe)


def test_files_that_are_not_there(write: Callable[[str, str], str], base: dict[str, Any]) -> None:
    for given, message in [
        (["none.py"], r"operators: there is no file none\.py"),
        (["."], "operators: cannot read .: Is a directory"),
        (["https://example.org/ops.py"], "name a file on this machine; code is not fetched"),
        ("my_ops.py", r"operators: expected a list of files, such as \[my_ops.py\], got 'my_ops.py'"),
        ([3], "operators: expected the path of a Python file"),
    ]:
        with pytest.raises(RecipeError, match=message):
            parse({**base, "operators": given})


def test_one_name_in_two_files(write: Callable[[str, str], str], base: dict[str, Any]) -> None:
    one, two = write("one.py", SHARPNESS), write("two.py", "# other\n" + SHARPNESS)
    with pytest.raises(RecipeError, match=r"two\.py:6: one\.py:5 has an operator 'measure_level' too"):
        parse({**base, "operators": [one, two]})


# What a stage raises has a place


def test_an_error_in_compute_says_where(write: Callable[[str, str], str], tmp_path: Path) -> None:
    base = synthetic.make_dataset(tmp_path / "data", list(range(40)), shard_rows=40)
    file = write("my_ops.py", SHARPNESS.replace("    return", "    raise KeyError('colour')\n    return"))
    with pytest.raises(ContractError, match=r"failed on every row.*KeyError: 'colour' at my_ops\.py:6"):
        mmdata.run({**base, "operators": [file], "steps": ["measure_level"]}, runner="inline")
    group = write("group.py", CLASSES.replace("        numbers = ", "        1 / 0\n        numbers = "))
    with pytest.raises(ContractError, match=r"ZeroDivisionError: division by zero at group\.py:22"):
        mmdata.run({**base, "operators": [group], "steps": ["place"]}, runner="inline")


def test_a_file_travels_as_its_bytes(write: Callable[[str, str], str], base: dict[str, Any]) -> None:
    file = operator_files.read(write("my_ops.py", SHARPNESS))
    sent = pickle.dumps(file)
    assert SHARPNESS.encode() in sent
    again = pickle.loads(sent)
    assert again.operators is file.operators  # of this process: the file has run here already
    torn = replace(file, content=file.content[:-1], path="torn.py")
    with pytest.raises(StoreError, match=r"torn\.py did not arrive whole"):
        _ = torn.operators
