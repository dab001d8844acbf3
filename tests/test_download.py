"""`mmdata download`: img2dataset's command line, option by option, and what comes of it."""

from __future__ import annotations

import ast
import gzip
import hashlib
import json
import re
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from img2dataset_peer import PEERS, ROOT
from server import BadServer, picture

import mmdata
from mmdata.cli import main
from mmdata.download import download, planned
from mmdata.download_options import OPTIONS, THEIR_NAMES, help_text, read_command_line
from mmdata.errors import RecipeError
from mmdata.recipe import parse
from mmdata.settings import FetchOptions

QUICK = ["--allow_private", "--per_host=64", "--per_host_rate=None", "--runner=inline", "--quiet"]


# The command line


def test_every_option_of_img2dataset_is_there_with_its_default() -> None:
    """Against the signature in its own main.py (1.47.0); `ignore_ssl_certificate` is only in its repository."""
    [path] = PEERS.glob("lib/python3*/site-packages/img2dataset/main.py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    [function] = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "download"]
    arguments = function.args.args
    defaults = dict(zip([a.arg for a in reversed(arguments)], reversed(function.args.defaults), strict=False))
    theirs = {a.arg: ast.unparse(defaults[a.arg]).strip("'") if a.arg in defaults else None for a in arguments}
    assert len(theirs) == 37
    ours = {o.name: o.default for o in OPTIONS.values() if o.is_theirs and o.name != "ignore_ssl_certificate"}
    assert list(ours) == list(theirs)
    assert {n: d for n, d in ours.items() if d != "inf"} == {n: d for n, d in theirs.items() if d != "float('inf')"}
    assert {n for n, d in ours.items() if d == "inf"} == {"max_image_area", "max_aspect_ratio"}


def test_every_option_of_fetch_is_there() -> None:
    assert set(FetchOptions.model_fields) <= set(OPTIONS)
    assert set(THEIR_NAMES.values()) <= set(FetchOptions.model_fields)
    text = help_text()
    assert [name for name in OPTIONS if f"--{name}=" not in text and name != "url_list"] == []
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(
    ("words", "given"),
    [
        (["a.txt", "--image_size=128"], {"url_list": "a.txt", "image_size": 128}),
        (["--image_size", "128", "a.txt"], {"url_list": "a.txt", "image_size": 128}),
        (["a.txt", "128", "out"], {"url_list": "a.txt", "image_size": 128, "output_folder": "out"}),
        (["--url_list=a.txt", "-image-size=128"], {"url_list": "a.txt", "image_size": 128}),
        (["--skip_reencode", "a.txt"], {"skip_reencode": True, "url_list": "a.txt"}),
        (["--skip_reencode", "False"], {"skip_reencode": False}),
        (["--skip_reencode=True"], {"skip_reencode": True}),
        (["--noextract_exif"], {"extract_exif": False}),
        (["--no-extract-exif"], {"extract_exif": False}),
        (["--caption_col=None", "--url_col=1"], {"caption_col": None, "url_col": "1"}),
        (["--compute_hash=None"], {"compute_hash": None}),
        (["--max_image_area=inf", "--timeout", "2.5"], {"max_image_area": float("inf"), "timeout": 2.5}),
        (['--save_additional_columns=["a","b"]'], {"save_additional_columns": ["a", "b"]}),
        (["--save_additional_columns", "[a, b]"], {"save_additional_columns": ["a", "b"]}),
        (["--save_additional_columns=a,b"], {"save_additional_columns": ["a", "b"]}),
        (["--verify_hash", "('h', 'md5')"], {"verify_hash": ["h", "md5"]}),
        (["--disallowed_header_directives", "[]"], {"disallowed_header_directives": []}),
        (
            ["--per_host_rate=None", "--resolve={a.org: 127.0.0.1}"],
            {"per_host_rate": None, "resolve": {"a.org": "127.0.0.1"}},
        ),
        (["--host_limits={'a.org': {'per_s': 2}}"], {"host_limits": {"a.org": {"per_s": 2}}}),
    ],
)
def test_words_are_read_as_python_fire_reads_them(words: list[str], given: dict[str, Any]) -> None:
    assert read_command_line(words) == given


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image_sise=1"], r"no option is called --image_sise; did you mean 'image_size'\?"),
        (["--image_size"], "--image_size needs a value, such as --image_size=256"),
        (["--image_size", "--timeout=3"], "--image_size needs a value"),
        (["--timeout=3", "--timeout=4"], "--timeout is given twice"),
        (["--extract_exif=maybe"], "--extract_exif: expected True or False, got 'maybe'"),
        (["--save_additional_columns=3"], "--save_additional_columns: expected a list"),
        (["--noimage_size"], "no option is called --noimage_size"),
    ],
)
def test_words_that_are_wrong_are_told(words: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_command_line(words)


@pytest.mark.parametrize("text", [help_text(), (ROOT / "docs" / "download.md").read_text(encoding="utf-8")])
def test_examples_are_command_lines(text: str) -> None:
    lines = re.findall(r"^ *mmdata download (?!URL_LIST)(.*)$", text.replace("\\\n", " "), re.M)
    assert lines
    for line in lines:
        assert parse(planned(read_command_line(shlex.split(line))).recipe).name == "download"


# What the options mean


def _fetch(**given: Any) -> FetchOptions:
    return parse(planned({"url_list": "a.txt", **given}).recipe).fetch


def test_the_defaults_are_img2datasets() -> None:
    found = planned({"url_list": "a.txt"})
    fetch = parse(found.recipe).fetch
    assert (fetch.resize_mode, fetch.timeout_s, fetch.shard_rows, fetch.concurrency) == ("border", 10, 10_000, 256)
    assert (fetch.layout, fetch.oom_shard_count, fetch.retries, fetch.encode_quality) == ("files", 5, 0, 95)
    assert (found.runner, found.workers, found.mode) == ("processes", 1, "incremental")
    assert found.recipe["dataset"].endswith("/images")
    assert (fetch.robots, fetch.allow_private, fetch.decode) == ("respect", False, "fast")  # ours, on purpose


def test_options_mean_what_they_mean_there() -> None:
    fetch = _fetch(
        thread_count=7, timeout=3, number_sample_per_shard=50, output_format="webdataset", max_image_area=9.0
    )
    assert (fetch.concurrency, fetch.timeout_s, fetch.shard_rows, fetch.max_image_area) == (7, 3, 50, 9)
    assert (fetch.layout, fetch.disallowed_header_directives) == (
        "webdataset",
        FetchOptions().disallowed_header_directives,
    )
    assert _fetch(disallowed_header_directives=[]).disallowed_header_directives == ()
    assert _fetch(max_aspect_ratio=float("inf")).max_aspect_ratio is None
    assert [_fetch(compute_hash=h).compute_hash for h in ("sha256", None, "md5")] == [None, None, "md5"]
    assert _fetch(verify_hash=["h", "md5"]).verify_hash == ("h", "md5")
    assert str(_fetch(user_agent_token="mybot").user_agent).startswith("mybot mmdata/")
    assert _fetch(encode_format="png").encode_quality == 6
    assert _fetch(shard_rows=9, layout="none").shard_rows == 9
    found = planned({"url_list": "a.txt", "distributor": "ray", "processes_count": 3, "address": "auto"})
    assert (found.runner, found.workers, found.address) == ("ray", 3, "auto")
    source = planned(
        {"url_list": "a.parquet", "url_col": "U", "caption_col": "T", "save_additional_columns": ["n"], "bbox_col": "b"}
    ).recipe["source"]
    assert {**source, "path": ""} == {
        **{"kind": "urls", "path": "", "format": "parquet", "url": "U", "caption": "T"},
        "columns": ["n", "b"],
    }
    assert planned({"url_list": "a.csv.gz"}).recipe["source"]["format"] == "csv"
    assert planned({"url_list": "list"}).recipe["source"]["format"] == "txt"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"output_format": "tfrecord"}, "is not written; take webdataset or parquet"),
        ({"output_format": "dummy"}, "take none, which adds no layout"),
        ({"output_format": "webdatset"}, r"no such format; did you mean 'webdataset'\?"),
        ({"distributor": "pyspark"}, "take ray"),
        ({"distributor": "slurm"}, "expected multiprocessing or ray"),
        ({"enable_wandb": True}, "--enable_wandb=True is not there"),
        ({"ignore_ssl_certificate": True}, "certificates are verified"),
        ({"incremental_mode": "append"}, "expected incremental, overwrite or extend"),
        ({"input_format": "jsonlines"}, r"no such format; did you mean 'jsonl'\?"),
        ({"input_format": "csv.gz"}, r"a.txt does not end in .gz"),
        ({"save_additional_columns": ["width"]}, "img2dataset keeps the name 'width' for itself"),
        ({"resize_mode": "stretch"}, "--resize_mode: input should be 'no'"),
        ({"timeout": 0}, "--timeout: input should be greater than 0, got 0"),
        ({"timeout": 1, "timeout_s": 1}, "--timeout and --timeout_s say the same"),
        ({"processes_count": 0}, "--processes_count: expected a whole number from 1 on"),
        ({"processes_count": 2, "workers": 2}, "say the same"),
        ({"address": "auto"}, "add --distributor=ray"),
        ({"encode_format": "png", "encode_quality": 95}, "for png it is a zlib level"),
        ({"url_list": None}, "no list is given"),
    ],
)
def test_what_cannot_be_is_refused_with_a_way_out(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        planned({"url_list": "a.txt", **given})


@pytest.mark.parametrize(
    "option", [{"subjob_size": 7}, {"max_shard_retry": 3}, {"wandb_project": "x"}, {"enable_wandb": False}]
)
def test_what_has_no_effect_is_taken(option: dict[str, Any]) -> None:
    assert planned({"url_list": "a.txt", **option}) == planned({"url_list": "a.txt"})


# Runs


@pytest.fixture(scope="module")
def server() -> Iterator[BadServer]:
    pictures = {f"/{i},x.jpg": ("image/jpeg", picture(300 + i, 200)) for i in range(6)}
    with BadServer(pictures) as running:
        yield running


def _list(server: BadServer, path: Path, numbers: range) -> Path:
    """A txt list; its URLs hold commas, over which img2dataset stops."""
    path.write_text("".join(server.url(f"/{i},x.jpg") + "\n" for i in numbers))
    return path


def _run(*words: str | Path) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return int(end.value.code or 0)


def _call(*words: str | Path) -> int:
    return _run("download", *words)


def _shards(folder: Path) -> dict[str, int]:
    return {p.name: json.loads(p.read_text())["successes"] for p in sorted(folder.glob("*_stats.json"))}


def test_a_list_comes_in_goes_on_and_grows(
    server: BadServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    first, more = _list(server, tmp_path / "first.txt", range(4)), _list(server, tmp_path / "more.txt", range(4, 7))
    options = [f"--output_folder={out}", "--output_format=webdataset", "--number_sample_per_shard=2", *QUICK]
    assert _call(first, *options) == 0
    assert _shards(out) == {"00000_stats.json": 2, "00001_stats.json": 2}
    hits = server.hits.total()
    assert _call(first, *options) == 0  # again: nothing is left to do
    assert server.hits.total() == hits
    capsys.readouterr()
    assert _call(more, *options) == 2  # another list is not taken for the same
    assert "--incremental_mode=extend adds it" in capsys.readouterr().err
    assert _call(more, "--incremental_mode=extend", *options) == 0
    assert _call(more, "--incremental_mode=extend", *options) == 0  # as after a kill: it is not added twice
    assert _call(first, *options) == 0  # both lists are its own now
    assert _shards(out) == {f"0000{i}_stats.json": n for i, n in enumerate((2, 2, 2, 0))}
    ds = mmdata.open(out)
    assert ds.sql("SELECT status, count(*) FROM rows GROUP BY 1 ORDER BY 2").fetchall() == [("http_4xx", 1), ("ok", 6)]
    assert ds.why("000030").reason == "http_4xx"
    (out / "notes.txt").write_text("mine")
    assert _call(more, "--incremental_mode=overwrite", *options) == 2
    assert "it holds 'notes.txt'" in capsys.readouterr().err
    (out / "notes.txt").unlink()
    assert _call(more, "--incremental_mode=overwrite", *options) == 0
    assert _shards(out) == {"00000_stats.json": 2, "00001_stats.json": 0}
    assert sorted(p.name for p in out.glob("*.tar")) == ["00000.tar", "00001.tar"]


def test_a_retry_reaches_the_layout_and_other_commands_the_folder(
    server: BadServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row of the second shard answers 503 once, and is in its tar after `mmdata retry`."""
    out, listing = tmp_path / "out", tmp_path / "list.txt"
    paths = ["/0,x.jpg", "/1,x.jpg", "/2,x.jpg", f"/flaky/503/1?{tmp_path.name}"]
    listing.write_text("".join(server.url(p) + "\n" for p in paths))
    words = [f"--output_folder={out}", "--output_format=webdataset", "--number_sample_per_shard=2"]
    assert _call(listing, *words, *QUICK) == 0
    assert _shards(out) == {"00000_stats.json": 2, "00001_stats.json": 1}
    untouched = (out / "00000.parquet").stat().st_mtime_ns
    assert _run("retry", out, "--error", "http_5xx", "--runner", "inline", "--quiet") == 0
    assert _shards(out) == {"00000_stats.json": 2, "00001_stats.json": 2}
    with tarfile.open(out / "00001.tar") as tar:
        assert tar.getnames() == ["000010.jpg", "000010.json", "000011.jpg", "000011.json"]
    assert pq.read_table(out / "00001.parquet")["status"].to_pylist() == ["success", "success"]
    assert (out / "00000.parquet").stat().st_mtime_ns == untouched
    assert _call(listing, *words, *QUICK) == 0  # the same command finds all done
    assert _run("clean", out, "--grace", "0") == 0
    capsys.readouterr()
    assert _run("sql", out, "SELECT count(*) FROM samples WHERE status = 'ok'", "--format", "csv") == 0
    assert capsys.readouterr().out.split()[1:] == ["4"]
    assert _run("export", out, tmp_path / "exported") == 0
    assert pq.read_table(tmp_path / "exported" / "00000.parquet").num_rows == 4
    assert _shards(out) == {"00000_stats.json": 2, "00001_stats.json": 2}


def test_nothing_is_written_for_what_is_refused(server: BadServer, tmp_path: Path) -> None:
    listing = _list(server, tmp_path / "list.txt", range(1))
    for wrong in ("--output_format=tfrecord", "--image_size=0", "--caption_col=text", "--nothing=1"):
        assert _call(listing, f"--output_folder={tmp_path / 'out'}", wrong) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["list.txt"]
    (tmp_path / "peer").mkdir()
    (tmp_path / "peer" / "00000_stats.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"was made by img2dataset: adopt it with source: \{kind: img2dataset"):
        download({"url_list": str(listing), "output_folder": str(tmp_path / "peer"), "runner": "inline"})
    assert [p.name for p in (tmp_path / "peer").iterdir()] == ["00000_stats.json"]


def test_a_list_with_uids_of_its_own(server: BadServer, tmp_path: Path) -> None:
    """As DataComp's scripts call it: `uid` is saved, so that its resharder finds it in every `.json`."""
    (tmp_path / "list.csv").write_text(f'url,uid,n\n"{server.url("/0,x.jpg")}",{"ab" * 16},7\n')
    words = [
        f"--output_folder={tmp_path / 'out'}",
        '--save_additional_columns=["uid","n"]',
        "--output_format=webdataset",
    ]
    assert _call(tmp_path / "list.csv", *words, *QUICK) == 0
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        found = json.loads(tar.extractfile("000000000.json").read())  # type: ignore[union-attr]
    assert (found["uid"], found["n"]) == ("ab" * 16, 7)
    assert pq.read_table(tmp_path / "out" / "00000.parquet")["uid"].to_pylist() == ["ab" * 16]
    assert mmdata.open(tmp_path / "out").sql("SELECT uid FROM rows").fetchall() == [("ab" * 16,)]


def test_a_folder_of_lists(server: BadServer, tmp_path: Path) -> None:
    """The files of the format named, as img2dataset looks for them; compressed ones, too."""
    (tmp_path / "lists").mkdir()
    for part in range(2):
        text = f'u,t\n"{server.url(f"/{part},x.jpg")}",caption {part}\n'
        (tmp_path / "lists" / f"{part}.csv.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "lists" / "other.txt").write_text("no list of this run\n")
    given = {"url_list": str(tmp_path / "lists"), "input_format": "csv.gz", "url_col": "u", "caption_col": "t"}
    more = {"allow_private": True, "output_folder": str(tmp_path / "out"), "runner": "inline", "compute_hash": "md5"}
    download({**given, **more})
    assert sorted(p.name for p in (tmp_path / "out" / "00000").iterdir()) == [
        f"00000000{i}.{e}" for i in range(2) for e in ("jpg", "json", "txt")
    ]
    rows = pq.read_table(tmp_path / "out" / "00000.parquet").to_pylist()
    assert [(r["caption"], len(r["sha256"])) for r in rows] == [("caption 0", 64), ("caption 1", 64)]


def test_hashes_and_boxes_of_the_list(server: BadServer, tmp_path: Path) -> None:
    """`verify_hash` and `bbox_col`: columns of the list; boxes are saved, the hash is not."""
    urls = [server.url(f"/{i},x.jpg") for i in range(3)]
    hashes = [hashlib.md5(picture(300 + i, 200)).hexdigest() for i in range(3)]
    boxes = [[[0.0, 0.0, 0.5, 0.5]], [], None]
    table = pa.table(
        {"url": urls, "h": [*hashes[:2], "0" * 32], "b": pa.array(boxes, pa.list_(pa.list_(pa.float64())))}
    )
    pq.write_table(table, tmp_path / "list.parquet")
    words = [f"--output_folder={tmp_path / 'out'}", "--verify_hash=[h, md5]", "--compute_hash=md5", "--bbox_col=b"]
    assert _call(tmp_path / "list.parquet", *words, "--output_format=parquet", *QUICK) == 0
    rows = pq.read_table(tmp_path / "out" / "00000.parquet").to_pylist()
    assert [r["status"] for r in rows] == ["success", "success", "failed_to_download"]
    assert [r["error_message"] for r in rows] == [None, None, "hash mismatch"]
    assert [r["md5"] for r in rows] == [*hashes[:2], None]
    assert [r["b"] for r in rows] == boxes
    assert "h" not in rows[0]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the library leaves its file open
def test_worker_processes_and_the_readers_of_others(server: BadServer, tmp_path: Path) -> None:
    """The command as users type it; webdataset and Hugging Face datasets read what it leaves."""
    from datasets import load_dataset
    from webdataset import WebDataset

    listing = tmp_path / "list.csv"
    urls = [server.url(f"/{i},x.jpg") for i in range(6)]
    listing.write_text("url,text\n" + "".join(f'"{url}",caption {i}\n' for i, url in enumerate(urls)))
    words = [str(listing), f"--output_folder={tmp_path / 'webdataset'}", "--output_format=webdataset"]
    words += ["--caption_col=text", "--processes_count=2", "--number_sample_per_shard=3", *QUICK[:3], "--image_size=32"]
    command = [sys.executable, "-c", "from mmdata.cli import main; main()", "download", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"6 of 6 rows are stored in {tmp_path / 'webdataset'}" in done.stdout
    given = {"url_list": str(listing), "output_folder": str(tmp_path / "parquet"), "output_format": "parquet"}
    more = {"caption_col": "text", "number_sample_per_shard": 3, "allow_private": True, "runner": "inline"}
    download({**given, **more})
    tars = sorted(str(p) for p in (tmp_path / "webdataset").glob("*.tar"))
    assert len(tars) == 2
    found = {s["__key__"]: s for s in WebDataset(tars, shardshuffle=False).decode("pil")}
    assert {k: s["txt"] for k, s in found.items()} == {
        f"0000{s}{i}": f"caption {3 * s + i}" for s in (0, 1) for i in (0, 1, 2)
    }
    assert {s["jpg"].size for s in found.values()} == {(32, 32)}
    assert {s["json"]["status"] for s in found.values()} == {"success"}
    cache = str(tmp_path / "cache")
    hugging = load_dataset("webdataset", data_files={"train": tars}, split="train", cache_dir=cache)
    assert {r["__key__"]: r["txt"] for r in hugging} == {k: s["txt"] for k, s in found.items()}
    tables = load_dataset(
        "parquet", data_files=[str(tmp_path / "parquet" / "*.parquet")], split="train", cache_dir=cache
    )
    assert {r["key"]: r["caption"] for r in tables} == {k: s["txt"] for k, s in found.items()}
    assert all(r["jpg"][:2] == b"\xff\xd8" for r in tables)
