"""Every command: what its help shows works, what it prints parses back, and where it prints it."""

# long because: one section a command

from __future__ import annotations

import csv
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import synthetic
import yaml

import mmdata
from mmdata import cli, registry
from mmdata.stage import Failed, stage

COMMANDS = [
    "demo",
    "run",
    "plan",
    "show",
    "sql",
    "why",
    "download",
    "export",
    "diff",
    "retry",
    "clean",
    "stages",
    "recipes",
    "doctor",
]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line in this process: (exit code, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as done:
            cli.main(arguments)
        out, err = capsys.readouterr()
        code = done.value.code
        assert code is None or isinstance(code, int)
        return code or 0, out, err

    return call


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


def binary(*arguments: str, cwd: Path) -> bytes:
    """Standard output of a command in a process of its own."""
    command = [sys.executable, "-c", "from mmdata.cli import main; main()", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, timeout=120, check=True).stdout


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """20 rows, one not fetched, run to the end; `low` drops 10 … 19."""
    synthetic.register_all()
    made = synthetic.make_dataset(
        tmp_path_factory.mktemp("cli"), list(range(20)), status=lambda n: "http_4xx" if n == 4 else "ok"
    )
    made["name"] = "pets"
    made["steps"] = ["probe_text", {"filter": {"low": "number < 10"}}]
    mmdata.run(made, runner="inline")
    return made


@pytest.fixture
def pets(recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a recipe `pets.yaml` over the dataset `data/pets`, as the helps' examples have it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    os.symlink(recipe["dataset"], tmp_path / "data" / "pets")
    (tmp_path / "pets.yaml").write_text(yaml.safe_dump({**recipe, "dataset": "data/pets"}))
    return tmp_path


# Help


def test_the_commands_are_those_of_this_part(run: Run) -> None:
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    listed = out.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in listed] == COMMANDS
    # No summary is cut off.
    assert not any(line.endswith("...") for line in listed)


def _examples(out: str) -> list[str]:
    return [shlex.split(line) for line in re.findall(r"mmdata ([^\n]+)", out.partition("Example")[2].split("\n\n")[0])]  # type: ignore[misc]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_an_example_of_that_command(run: Run, command: str) -> None:
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: mmdata {command} ")
    examples = _examples(out)
    assert examples
    assert all(words[0] == command for words in examples)
    options = out.partition("Options:")[2]
    for line in options.splitlines():
        # Every option says what it is for.
        assert not re.fullmatch(r"  --\S+( <[^>]+>)?", line), line


@pytest.mark.parametrize("command", ["plan", "show", "sql", "clean", "stages", "doctor", "export"])
def test_the_examples_work(run: Run, pets: Path, command: str) -> None:
    _, out, _ = run(command, "--help")
    for words in _examples(out):
        if ">" in words:
            words = words[: words.index(">")]
        if command == "export":
            words = [w.replace("data/signs", "data/pets#pets") for w in words]
            words = ["caption,text_word_count" if w == "caption,clip_score" else w for w in words]
        if "parquet" in words:
            assert pq.read_table(io.BytesIO(binary(*words, cwd=pets))).num_rows > 0
            continue
        code, out, err = run(*words)
        assert (code, err) == (0, "")
        assert out


def test_without_a_command_the_help_is_shown(run: Run) -> None:
    code, out, err = run()
    assert code == 2
    assert "Commands:" in out + err


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"mmdata {mmdata.__version__}\n", "")


# run, plan, show


def test_run_says_the_funnel_on_stdout_and_progress_on_stderr(run: Run, pets: Path) -> None:
    code, out, err = run("run", "pets.yaml", "--runner", "inline")
    assert code == 0
    assert "9 kept of 20 rows in (45.0 %)" in out
    assert re.search(r"^probe_text, low: 20 rows", err, re.MULTILINE)
    assert "rows/s" not in out
    code, out, err = run("run", "pets.yaml", "--runner", "inline", "--quiet", "--set", "filters.low=number < 5")
    assert (code, err) == (0, "")
    assert "4 kept of 20 rows in (20.0 %)" in out
    assert run("run", "pets.yaml", "--runner", "inline", "--quiet")[0] == 0  # back to what other tests expect


def test_plan_and_show(run: Run, pets: Path) -> None:
    code, out, err = run("plan", "pets.yaml")
    assert (code, err) == (0, "")
    assert "ingested: 20 rows in 2 shards" in out
    assert "probe_text" in out
    code, out, err = run("show", "data/pets")
    assert (code, err) == (0, "")
    assert "http_4xx 1" in out
    assert "low 10" in out
    assert "\n9 kept of 20 rows in (45.0 %)" in out
    assert "hosts that lost most" in out.partition("9 kept of 20")[2]
    assert max(map(len, out.splitlines())) <= 120


@pytest.mark.parametrize("columns", ["80", "100", "200"])
def test_the_funnel_fits_the_terminal(run: Run, pets: Path, monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    _, out, _ = run("show", "data/pets")
    assert max(map(len, out.splitlines())) <= int(columns)


def test_a_run_that_must_stop_has_exit_code_1(run: Run, tmp_path: Path) -> None:
    synthetic.register_all()

    @stage(reads="number", writes="never: int64", name="fail_always")
    def fail_always(batch: Any) -> Any:
        """Fails every row."""
        return {"never": [Failed("no_luck")] * len(batch)}

    recipe = synthetic.make_dataset(tmp_path / "bad", list(range(300)), shard_rows=100)
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({**recipe, "steps": ["fail_always"]}))
    code, out, err = run("run", str(tmp_path / "bad.yaml"), "--runner", "inline", "--quiet")
    assert (code, out) == (1, "")
    assert err.startswith("mmdata: step fail_always: ")
    assert err.count("\n") == 1
    assert "max_failed" in err
    code, _, err = run("show", recipe["dataset"])
    assert code == 1
    assert "no run has finished" in err


def test_rows_that_failed_for_a_passing_reason_have_exit_code_1(run: Run, tmp_path: Path) -> None:
    @stage(reads="number", writes="later: int64", name="fail_for_now")
    def fail_for_now(batch: Any) -> Any:
        """Fails one row, transiently."""
        return {"later": [Failed("busy", transient=True) if n == 7 else n for n in batch["number"]]}

    recipe = synthetic.make_dataset(tmp_path / "slow", list(range(20)))
    (tmp_path / "slow.yaml").write_text(yaml.safe_dump({**recipe, "steps": ["fail_for_now"]}))
    code, out, _ = run("run", str(tmp_path / "slow.yaml"), "--runner", "inline", "--quiet")
    assert code == 1
    assert out.splitlines()[-1] == "1 rows failed for a passing reason; the same command tries them again"
    assert "19 kept of 20" in out


# sql


QUERY = """
SELECT key, number, number / 4 AS quarter, number > 5 AS is_large,
       CASE number WHEN 1 THEN NULL WHEN 2 THEN '' WHEN 3 THEN E'two\nlines, "quoted" – é' ELSE caption END AS said,
       [number, NULL] AS list, {'n': number} AS record, DATE '2024-02-29' AS day, sum(number) OVER () AS total
FROM samples WHERE number < 6 ORDER BY number
"""
SAID = ["", None, "", 'two\nlines, "quoted" – é', "picture of 4", "picture of 5"]


def test_sql_as_csv(pets: Path) -> None:
    data = binary("sql", "data/pets", QUERY, "--format", "csv", cwd=pets)
    rows = list(csv.DictReader(io.StringIO(data.decode(), newline="")))
    assert [r["number"] for r in rows] == ["0", "1", "2", "3", "4", "5"]
    assert [r["said"] for r in rows] == [s or "" for s in SAID]
    assert [json.loads(r["list"]) for r in rows] == [[n, None] for n in range(6)]
    assert json.loads(rows[5]["record"]) == {"n": 5}
    assert (rows[0]["day"], rows[0]["total"], rows[3]["quarter"], rows[5]["is_large"]) == (
        "2024-02-29",
        "15",
        "0.75",
        "false",
    )
    # NULL and an empty text are told apart: only the text has quotes.
    lines = data.decode().splitlines()
    assert (lines[2].split(",")[4], lines[3].split(",")[4]) == ("", '""')
    frame = pandas.read_csv(io.BytesIO(data), dtype={"key": str})
    assert frame["key"].str.len().tolist() == [6] * 6
    assert frame["quarter"].tolist() == [n / 4 for n in range(6)]


def test_sql_as_json(run: Run, pets: Path) -> None:
    _, out, err = run("sql", "data/pets", QUERY, "--format", "json")
    assert err == ""
    rows = [json.loads(line, parse_constant=lambda c: pytest.fail(f"{c} is no JSON")) for line in out.splitlines()]
    assert [r["said"] for r in rows] == [None, *SAID[1:]]
    assert rows[3] | {"key": "", "said": ""} == {
        "key": "", "number": 3, "quarter": 0.75, "is_large": False, "said": "", "list": [3, None],
        "record": {"n": 3}, "day": "2024-02-29", "total": 15,
    }  # fmt: skip
    _, out, _ = run("sql", "data/pets", "SELECT 'nan'::DOUBLE AS a, 'ab'::BLOB AS b, 1.25 AS c", "--format", "json")
    assert json.loads(out) == {"a": None, "b": "6162", "c": 1.25}


def test_sql_as_parquet(pets: Path) -> None:
    table = pq.read_table(io.BytesIO(binary("sql", "data/pets", QUERY, "--format", "parquet", cwd=pets)))
    assert table.column("number").to_pylist() == list(range(6))
    assert table.column("said").to_pylist() == [None, *SAID[1:]]
    assert table.column("list").to_pylist()[5] == [5, None]
    assert table.schema.field("number").type == pa.int64()


def test_sql_as_a_table(run: Run, pets: Path) -> None:
    _, out, err = run("sql", "data/pets", "SELECT number, caption FROM samples WHERE number < 3 ORDER BY 1")
    assert err == ""
    lines = [[cell.strip() for cell in re.split("[│┃]", line)] for line in out.splitlines()]
    assert [lines[0], *lines[2:]] == [
        ["number", "caption"],
        ["0", "NULL"],
        ["1", "picture of 1"],
        ["2", "picture of 2"],
    ]
    _, out, _ = run("sql", "data/pets", "SELECT 1 AS a, 2 AS a")
    assert re.split(r"\D+", out.splitlines()[-1].strip()) == ["1", "2"]


def test_a_wide_answer_is_a_line_a_value(run: Run, pets: Path) -> None:
    _, out, _ = run("sql", "data/pets", "SELECT * FROM samples ORDER BY row_id LIMIT 2")
    lines = out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == ["row 1", "row 2"]
    values = dict(line.split(maxsplit=1) for line in lines[lines.index("row 2") + 1 :])
    assert values["caption"] == "picture of 1"
    assert values["number"] == "1"
    assert values["text_word_count"] == "3"


def test_a_long_answer_says_how_much_is_missing(run: Run, pets: Path) -> None:
    _, out, _ = run("sql", "data/pets", "SELECT range AS n FROM range(1234)")
    assert out.splitlines()[-1] == "1,134 more rows; use --format csv for all of them"
    assert len(out.splitlines()) == 103
    _, out, _ = run("sql", "data/pets", "SELECT range AS n FROM range(1234)", "--format", "csv")
    assert len(out.splitlines()) == 1235


def test_foreign_text_cannot_command_the_terminal(run: Run, pets: Path) -> None:
    _, out, _ = run("sql", "data/pets", "SELECT '[red]' || chr(27) || '[2J' || chr(7) AS x, repeat('y', 99) AS y")
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "[red]�[2J�" in out
    assert "y" * 59 + "…" in out


def test_an_answer_that_a_format_cannot_hold(run: Run, pets: Path) -> None:
    code, _, err = run("sql", "data/pets", "SELECT INTERVAL 1 DAY AS x", "--format", "parquet")
    assert code == 2
    assert err.startswith("mmdata: parquet cannot hold this answer")
    assert "CAST that column to VARCHAR" in err


def test_a_reader_that_stops_early_is_no_error(pets: Path) -> None:
    command = f"{shlex.quote(sys.executable)} -c 'from mmdata.cli import main; main()' sql data/pets"
    command += " 'SELECT range AS n FROM range(3000000)' --format csv | head -n 2"
    done = subprocess.run(["bash", "-c", command], cwd=pets, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == '"n"\n0\n'
    assert done.stderr == ""


# why, export, clean


def test_why(run: Run, pets: Path) -> None:
    found = mmdata.open("data/pets").sql("SELECT key FROM rows WHERE number IN (4, 5, 15) ORDER BY number").fetchall()
    [failed, kept, dropped] = [key for (key,) in found]
    code, out, err = run("why", "data/pets", dropped)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"{dropped}  dropped"
    assert lines[1] == "  at step low: low"
    assert "  caption: picture of 15" in lines
    assert "  1 probe_text: passed" in lines
    assert "      text_word_count = 3" in lines
    assert lines[-2:] == ["  2 low: dropped (low)", "      (number < 10)"]
    assert run("why", "data/pets", kept)[1].startswith(f"{kept}  kept\n")
    _, out, _ = run("why", "data/pets", failed)
    assert out.startswith(f"{failed}  failed\n  at step ingest: http_4xx\n")
    assert "probe_text: gated" in out


def test_export(run: Run, pets: Path) -> None:
    words = ["export", "data/pets", "out", "--format", "parquet", "--shard-rows", "4", "--columns", "caption, number"]
    code, out, err = run(*words)
    assert (code, err) == (0, "")
    assert re.fullmatch(rf"wrote 9 samples in 3 shards, [\d,]+ bytes, at {pets}/out\n", out)
    shards = sorted((pets / "out").glob("*.parquet"))
    assert [pq.read_metadata(p).num_rows for p in shards] == [4, 4, 1]
    numbers = [n for p in shards for n in pq.read_table(p).column("number").to_pylist()]
    assert numbers == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert "text_word_count" not in pq.read_schema(shards[0]).names
    before = {p: p.stat().st_mtime_ns for p in (pets / "out").iterdir()}
    _, out, _ = run(*words)
    assert out.startswith("already there: 9 samples in 3 shards")
    assert {p: p.stat().st_mtime_ns for p in (pets / "out").iterdir()} == before


def test_clean(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMDATA_SCRATCH", str(tmp_path / "scratch"))
    recipe = synthetic.make_dataset(tmp_path / "clean", list(range(10)))
    folder = Path(recipe["dataset"])
    mmdata.run({**recipe, "steps": [{"filter": {"f": "number < 5"}}]}, runner="inline")
    mmdata.run({**recipe, "steps": [{"filter": {"f": "number < 6"}}]}, runner="inline")
    (folder / "media" / "00000-dead.tar").write_bytes(b"x" * 1000)
    [old, new] = sorted((folder / "verdicts").iterdir(), key=lambda p: p.stat().st_mtime_ns)
    [old_list, _] = sorted((folder / "state").glob("selection-*"), key=lambda p: p.stat().st_mtime_ns)
    old_bytes = sum(p.stat().st_size for p in [*old.iterdir(), old_list])
    everything = {p for p in folder.rglob("*") if p.is_file()}

    code, out, err = run("clean", str(folder), "--dry-run", "--grace", "0")
    assert (code, err) == (0, "")
    assert "media/00000-dead.tar  1,000 bytes" in out.splitlines()
    assert out.splitlines()[-1] == f"3 files, would free {1000 + old_bytes:,} bytes"
    assert {p for p in folder.rglob("*") if p.is_file()} == everything

    _, out, _ = run("clean", str(folder), "--grace", "0")
    assert "media: 1 files, 1,000 bytes" in out.splitlines()
    assert out.splitlines()[-1] == f"3 files, freed {1000 + old_bytes:,} bytes"
    gone = everything - {p for p in folder.rglob("*") if p.is_file()}
    assert gone == {folder / "media" / "00000-dead.tar", old_list, *(old / p.name for p in new.iterdir())}
    assert run("clean", str(folder))[1] == "0 files, freed 0 bytes\n"
    assert mmdata.open(folder).funnel().kept == 6


# stages, recipes, doctor


def test_stages(run: Run) -> None:
    code, out, err = run("stages")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == registry.names()
    assert all(line.split()[1] in ("stage", "group", "attach", "filter") for line in out.splitlines())


@pytest.mark.parametrize("name", ["near_duplicates", "score_clip", "probe_image"])
def test_one_stage_in_full(run: Run, name: str) -> None:
    code, out, err = run("stages", name)
    assert (code, err) == (0, "")
    operator = registry.operator(name)
    for option, info in operator.options_type.model_fields.items():
        assert re.search(rf"^  {option} \(.+\): {re.escape(info.description or '')}$", out, re.MULTILINE)
    for column in operator.contract(operator.options_type()).writes:
        assert f"  {column.name}: {column.type}\n" in out


def test_recipes(run: Run, tmp_path: Path) -> None:
    code, out, err = run("recipes")
    assert (code, err) == (0, "")
    names = [line.split()[0] for line in out.splitlines()]
    assert names
    for name in names:
        code, text, err = run("recipes", name)
        assert (code, err) == (0, "")
        assert set(yaml.safe_load(text)) >= {"name", "dataset", "source", "steps"}


def test_doctor(run: Run) -> None:
    code, out, err = run("doctor")
    assert (code, err) == (0, "")
    assert "torch" in out
