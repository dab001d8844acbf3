"""What entered and what left between two selections, against counts by hand; the sums are those of the ledgers."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import synthetic
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mmdata
from mmdata import cli
from mmdata.errors import RecipeError, SourceError, StoreError
from mmdata.inspect import Difference, diff

NUMBERS = list(range(1, 41))
# make_sevens fails multiples of 11: 11, 22 and 33.
STRICT: list[Any] = ["make_sevens", {"filter": {"low": "number <= 30", "odd": "number % 2 = 1"}}]
LOOSE: list[Any] = ["make_sevens", {"filter": {"low": "number <= 36", "seven": "number % 7 <> 0"}}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One dataset of 40 rows with two selections, `strict` (the earlier) and `loose`."""
    synthetic.register_all()
    folder = tmp_path_factory.mktemp("diff")
    recipe = synthetic.make_dataset(folder, NUMBERS, shard_rows=7)
    for name, steps in (("strict", STRICT), ("loose", LOOSE)):
        document = {**recipe, "name": name, "steps": steps}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(document))
        mmdata.run(document, runner="inline")
    return folder


def _strict(n: int) -> bool:
    return n % 11 != 0 and n <= 30 and n % 2 == 1


def _loose(n: int) -> bool:
    return n % 11 != 0 and n <= 36 and n % 7 != 0


def changes(found: Difference) -> dict[tuple[str, str | None, str | None], int]:
    return {(c.change, c.step_name, c.reason): c.rows for c in found.counts}


def test_two_selections_of_one_dataset(folder: Path) -> None:
    data = str(folder / "dataset")
    found = diff(f"{data}#strict", f"{data}#loose")
    entered = [n for n in NUMBERS if _loose(n) and not _strict(n)]
    left = [n for n in NUMBERS if _strict(n) and not _loose(n)]
    assert changes(found) == {
        ("entered", "low", "low"): sum(n > 30 for n in entered),
        ("entered", "odd", "odd"): sum(n <= 30 for n in entered),
        ("left", "seven", "seven"): len(left),
        ("unchanged", None, None): sum(_strict(n) and _loose(n) for n in NUMBERS),
        ("in neither", None, None): sum(not _strict(n) and not _loose(n) for n in NUMBERS),
    }
    assert left == [7, 21]
    assert found.by == "row_id"
    assert found.kept == (sum(map(_strict, NUMBERS)), sum(map(_loose, NUMBERS)))
    assert sum(c.rows for c in found.counts) == 40 == found.rows_in[0] == found.rows_in[1]
    rows = found.rows.fetchall()
    assert Counter(r[0] for r in rows) == {"entered": len(entered), "left": 2}
    by_change = {r[1]: r[0] for r in rows}
    keys = dict(mmdata.open(data).sql("SELECT number, key FROM samples").fetchall())
    assert by_change == {keys[n]: "entered" if n in entered else "left" for n in [*entered, *left]}
    assert found.examples(1)["left", "seven", "seven"] == [keys[7]]
    assert len(found.examples(5)["entered", "odd", "odd"]) == 5


def test_the_other_way_round(folder: Path) -> None:
    there = diff(folder / "strict.yaml", folder / "loose.yaml")  # as recipes, this time
    back = diff(mmdata.open(folder / "dataset", "loose"), mmdata.open(folder / "dataset", "strict"))
    assert back.total("entered") == there.total("left") == 2
    assert back.total("left") == there.total("entered")
    assert back.names == (f"{folder}/dataset#loose", f"{folder}/dataset#strict")
    assert ("entered", "seven", "seven") in changes(back)
    assert ("left", "odd", "odd") in changes(back)


def test_two_datasets_by_uid(folder: Path, tmp_path: Path) -> None:
    """The second list lacks the first ten rows, has its rows in other places, and five twice."""
    synthetic.register_all()
    other = synthetic.make_dataset(tmp_path, NUMBERS, shard_rows=9)
    table = pq.read_table(tmp_path / "list.parquet")
    urls = table.column("url").to_pylist()
    picked = [*range(39, 9, -1), *range(10, 15)]
    new = tmp_path / "new"
    new.mkdir()
    pq.write_table(table.take(picked), new / "list.parquet")
    document = _remade(new, [NUMBERS[i] for i in picked], [urls[i] for i in picked])
    mmdata.run({**document, "name": "loose", "steps": LOOSE}, runner="inline")
    found = diff(f"{folder}/dataset#loose", f"{new}/dataset")
    assert found.by == "uid"
    kept_a = [n for n in NUMBERS if _loose(n)]
    twice = [n for n in range(11, 16) if _loose(n)]
    assert changes(found) == {
        ("entered", "absent", None): len(twice),
        ("left", "absent", None): sum(n <= 10 for n in kept_a),
        ("unchanged", None, None): sum(n > 10 for n in kept_a),
        ("in neither", None, None): 40 - len(kept_a) + 5 - len(twice),  # what A drops, and the second of what both drop
    }
    assert other["dataset"] != document["dataset"]
    with pytest.raises(RecipeError, match="--by row_id: these are two datasets"):
        diff(f"{folder}/dataset", f"{new}/dataset", by="row_id")
    assert diff(f"{folder}/dataset", f"{new}/dataset", by="key").by == "key"


def _remade(folder: Path, numbers: list[int], urls: list[str]) -> dict[str, Any]:
    """A dataset over these numbers whose rows have these URLs, and so the uids of the first."""
    row = synthetic._row

    def with_url(*given: Any) -> dict[str, Any]:
        from mmdata.ingest import uid_of

        made = row(*given)
        url = urls[given[2]]
        return {**made, "url": url, "uid": uid_of("url", url, made["caption"])}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "_row", with_url)
        return synthetic.make_dataset(folder, numbers, shard_rows=6)


# Whatever two recipes keep: every row is counted once, and the sums are the ledgers'.
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=6)
@given(st.sets(st.sampled_from(NUMBERS)), st.sets(st.sampled_from(NUMBERS)))
def test_nothing_is_lost(folder: Path, one: set[int], two: set[int]) -> None:
    recipe = yaml.safe_load((folder / "strict.yaml").read_text())
    for name, keep in (("one", one), ("two", two)):
        chosen = " OR ".join(f"number = {n}" for n in sorted(keep)) or "false"
        mmdata.run({**recipe, "name": name, "steps": [{"filter": {"chosen": chosen}}]}, runner="inline")
    found = diff(f"{folder}/dataset#one", f"{folder}/dataset#two")
    assert {c: found.total(c) for c in ("entered", "left", "unchanged", "in neither")} == {  # type: ignore[arg-type]
        "entered": len(two - one),
        "left": len(one - two),
        "unchanged": len(one & two),
        "in neither": 40 - len(one | two),
    }


def test_sums_that_do_not_come_out_are_an_error(folder: Path) -> None:
    found = diff(folder / "strict.yaml", folder / "loose.yaml")
    with pytest.raises(StoreError, match=r"keeps \d+ rows and .* keeps \d+, but"):
        replace(found, kept=(found.kept[0] + 1, found.kept[1])).check()


# The command

Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run_one(*arguments: str, code: int = 0) -> str:
        with pytest.raises(SystemExit) as end:
            cli.main(["diff", *arguments])
        said = capsys.readouterr()
        assert (end.value.code or 0) == code, said.err
        return said.err if code else said.out

    return run_one


def test_the_table(folder: Path, run: Run) -> None:
    out = run(str(folder / "strict.yaml"), str(folder / "loose.yaml"), "--keys", "2")
    lines = out.splitlines()
    assert lines[0] == f"A  {folder}/strict.yaml: 14 of 40 rows kept"
    assert lines[1] == f"B  {folder}/loose.yaml: 28 of 40 rows kept"
    rows = {tuple(line.replace("│", " ").split()[:5]) for line in lines[4:]}
    assert ("entered", "odd", "of", "A", "odd") in rows
    assert ("left", "seven", "of", "B", "seven") in rows
    assert ("unchanged", "12") in rows


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_every_row_in_a_format_for_tools(folder: Path, run: Run, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = io.BytesIO()
    text = io.TextIOWrapper(binary, write_through=True)
    monkeypatch.setattr("sys.stdout", text)
    cli_run(folder, kind)
    data = binary.getvalue()
    rows = (
        list(csv.DictReader(io.StringIO(data.decode()))) if kind == "csv" else list(map(json.loads, data.splitlines()))
    )
    assert Counter(r["change"] for r in rows) == {"entered": 16, "left": 2}
    assert set(rows[0]) == {
        *("change", "key", "uid"),
        *(f"{name}_{side}" for side in "ab" for name in ("row_id", "verdict", "step", "step_name", "reason")),
    }


def cli_run(folder: Path, kind: str) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["diff", str(folder / "strict.yaml"), str(folder / "loose.yaml"), "--format", kind])
    assert not end.value.code


def test_parquet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(binary, write_through=True))
    cli_run(folder, "parquet")
    table = pq.read_table(pa.BufferReader(binary.getvalue()))
    assert table.num_rows == 18


def test_what_cannot_be_compared(folder: Path, run: Run, tmp_path: Path) -> None:
    data = str(folder / "dataset")
    assert "are one selection, of which only the last run is on disk" in run(data, data, code=2)
    assert "has no selection 'strikt'; did you mean 'strict'?" in run(f"{data}#strikt", data, code=2)
    assert "there is no dataset at" in run(str(tmp_path / "nothing"), data, code=2)
    assert "--by number: expected row_id, uid or key" in run(f"{data}#strict", data, "--by", "number", code=2)
    assert "--format xml: expected" in run(f"{data}#strict", data, "--format", "xml", code=2)
    recipe = synthetic.make_dataset(tmp_path, [1, 2, 3])
    assert "no run has finished on" in run(recipe["dataset"], data, code=2)
    with pytest.raises(SourceError, match="there is no dataset at"):
        diff("memory://nothing", data)


def test_a_folder_may_have_the_mark_in_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "with#mark"
    recipe = synthetic.make_dataset(folder, [1, 2, 3])
    mmdata.run({**recipe, "name": "all"}, runner="inline")
    mmdata.run({**recipe, "name": "some", "steps": [{"filter": {"f": "number > 1"}}]}, runner="inline")
    found = diff(f"{folder}/dataset#all", f"{folder}/dataset")
    assert changes(found) == {("left", "f", "f"): 1, ("unchanged", None, None): 2}


def test_a_dataset_that_grew(folder: Path) -> None:
    """The earlier selection knows the first four shards of six only; what came later is absent there."""
    later, earlier = mmdata.open(folder / "dataset", "loose"), mmdata.open(folder / "dataset", "loose")
    assert earlier.current is not None
    known = 4 * 7
    counts = later.sql(
        f"SELECT verdict, step, reason, count(*) FROM samples WHERE row_id < {4 << 24} GROUP BY ALL"
    ).fetchall()
    table = earlier.current.table.slice(0, 4)
    earlier.current = replace(earlier.current, counts=tuple(counts))
    earlier.current.__dict__["table"] = table  # as the file that it would have listed
    new = sum(map(_loose, NUMBERS[known:]))
    assert changes(diff(earlier, later)) == {
        ("entered", "absent", None): new,
        ("unchanged", None, None): sum(map(_loose, NUMBERS[:known])),
        ("in neither", None, None): 40 - sum(map(_loose, NUMBERS)),
    }
    assert diff(later, earlier).total("left") == new > 0
