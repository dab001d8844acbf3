"""The source `hf` by Hub id: the real datasets and huggingface_hub against a repository on loopback.

The client runs in a process of its own, because it reads its environment when it is imported.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pytest
from hub_repository import COMMIT, NAME, Repository, repository
from pictures import adopted, picture, rows_of

CODE = """
import hashlib, json, pathlib, sys
from pictures import adopted, media_of, rows_of
ds = adopted(pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), fetch={"shard_rows": 4})
digests = [data and hashlib.sha256(data).hexdigest() for data in media_of(ds)]
print(json.dumps([rows_of(ds), digests], default=str))
"""
SOURCE = {"kind": "hf", "path": NAME, "revision": COMMIT}
PICTURES = [picture(i, "PNG" if i == 2 else "JPEG") for i in range(7)]
# What the row is and how it looks, wherever its bytes lie.
SAME = ["row_id", "key", "caption", "label", "status", "image_size", "image_ext", "width_px", "height_px"]


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Seven pictures in two Parquet files, as push_to_hub names them."""
    folder = tmp_path_factory.mktemp("parquet")
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "label": datasets.Value("int64")}
    )
    files = {}
    for number, (first, last) in enumerate([(0, 3), (3, 7)]):
        rows = {
            "image": [{"bytes": data, "path": None} for data in PICTURES[first:last]],
            "text": [f"caption {i} ü" for i in range(first, last)],
            "label": list(range(first, last)),
        }
        name = f"train-{number:05d}-of-00002.parquet"
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / name))
        files[f"data/{name}"] = (folder / name).read_bytes()
    return files


def run(arguments: list[str], home: Path, hub: Repository, **more: str) -> subprocess.CompletedProcess[str]:
    fixtures = Path(__file__).parents[1] / "fixtures"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(fixtures.parents[1]), str(fixtures)]),
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    return subprocess.run(
        [sys.executable, *arguments], env=environment | more, cwd=home, capture_output=True, text=True, timeout=120
    )


def rows(folder: Path, hub: Repository, source: dict[str, Any], **more: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The dataset's rows, and the sha256 of what its readers get for each."""
    done = run(["-c", CODE, str(folder / "ds"), json.dumps(source)], folder, hub, **more)
    assert done.returncode == 0, done.stderr
    found, digests = json.loads(done.stdout.splitlines()[-1])
    return found, digests


def sha256(pictures: list[bytes]) -> list[str]:
    return [hashlib.sha256(data).hexdigest() for data in pictures]


@pytest.mark.parametrize("streaming", [False, True])
def test_the_same_rows_and_bytes_as_of_the_files(tmp_path: Path, parquet: dict[str, bytes], streaming: bool) -> None:
    (tmp_path / "data").mkdir()
    for name, data in parquet.items():
        (tmp_path / name).write_bytes(data)
    wanted = {"columns": ["label"], "streaming": streaming}
    here = rows_of(
        adopted(
            tmp_path / "local",
            {**SOURCE, "path": str(tmp_path / "data"), "streaming": True, "columns": ["label"], "revision": None},
            fetch={"shard_rows": 4},
        )
    )
    with repository(parquet, token="hf_right") as hub:
        far, digests = rows(tmp_path, hub, {**SOURCE, **wanted}, HF_TOKEN="hf_right")
        assert [[r[c] for c in SAME] for r in far] == [[r[c] for c in SAME] for r in here]
        assert [r["caption"] for r in far] == [f"caption {i} ü" for i in range(7)]
        assert digests == sha256(PICTURES)
        arrow = list((tmp_path / "hf").rglob("*.arrow"))
        if streaming:
            whole = [f"hf://datasets/{NAME}@{COMMIT}/{n}#image.bytes" for n in parquet]
            assert [(r["image_path"], r["image_offset"]) for r in far] == [
                *((whole[0], i) for i in range(3)),
                *((whole[1], i) for i in range(4)),
            ]
            assert [r["uid"] for r in far] == [r["uid"] for r in here]
            assert arrow == []
            # Every request for one of the files was for a range of it.
            asked = [a for a in hub.asked if a.startswith("GET") and a.endswith(".parquet")]
            assert len(asked) == len(hub.ranges) > 0
        else:
            assert {r["image_path"] for r in far} == {f"{arrow[0]}#image.bytes"}
            assert hub.sent == {name: len(data) for name, data in parquet.items()}  # each once
    everything = [p for p in (tmp_path / "ds").rglob("*") if p.is_file()]
    assert len(everything) > 3
    assert not [p for p in everything if b"hf_right" in p.read_bytes()]


def test_an_imagefolder_and_a_webdataset(tmp_path: Path) -> None:
    """Pictures that a cell only refers to lie in the cache of the hub's files, wherever that is."""
    folder = {f"train/{i}.jpg": picture(i) for i in range(3)}
    folder["train/metadata.csv"] = b"file_name,text\n0.jpg,zero\n1.jpg,one\n2.jpg,two\n"
    with repository(folder) as hub:
        found, digests = rows(tmp_path, hub, SOURCE, HF_HUB_CACHE=str(tmp_path / "files"))
    assert [(r["caption"], r["status"]) for r in found] == [("zero", "ok"), ("one", "ok"), ("two", "ok")]
    assert digests == sha256([picture(i) for i in range(3)])
    assert all(r["image_path"].startswith(f"{tmp_path}/files/") for r in found)

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for i in range(3):
            for extension, data in (("jpg", picture(i)), ("txt", f"words {i}".encode())):
                entry = tarfile.TarInfo(f"{i:04d}.{extension}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    (tmp_path / "tars").mkdir()
    with repository({"train-0000.tar": buffer.getvalue()}) as hub:
        found, digests = rows(tmp_path / "tars", hub, {**SOURCE, "caption": "txt"})
    assert [r["caption"] for r in found] == ["words 0", "words 1", "words 2"]
    assert digests == sha256([picture(i) for i in range(3)])


COMMANDS = """
import sys
from mmdata.cli import main
for name in sys.argv[1:]:
    try:
        main(["run", name, "--quiet"])
    except SystemExit as done:
        print(f"exit {done.code}", file=sys.stderr)
"""
NOT_THERE = "doesn't exist on the Hub or cannot be accessed"
REFUSED = {
    "missing": ({"path": "somebody/else"}, f"cannot load somebody/else: Dataset 'somebody/else' {NOT_THERE}"),
    "revision": ({"revision": "ab" * 20}, f"cannot load {NAME}: Revision '{'ab' * 20}' doesn't exist"),
    "split": ({"split": "trian"}, f'cannot load {NAME}: Unknown split "trian"'),
    "streamed": (
        {"split": "trian", "streaming": True},
        f"{NAME} has no split 'trian' (source.split); did you mean 'train'",
    ),
    "picky": ({"columns": ["licence"], "streaming": True}, "has no column 'licence' (source.columns)"),
}


def commands(folder: Path, hub: Repository, token: str, sources: dict[str, dict[str, Any]]) -> list[str]:
    """What `mmdata run` says for each source, one after the other, by lines; each ends with its exit status."""
    for name, source in sources.items():
        recipe = {"name": "pets", "dataset": "ds", "source": source, "steps": ["probe_image"]}
        (folder / f"{name}.yaml").write_text(json.dumps(recipe))
    done = run(["-c", COMMANDS, *(f"{name}.yaml" for name in sources)], folder, hub, HF_TOKEN=token)
    assert done.returncode == 0, done.stderr
    assert token not in done.stdout + done.stderr
    assert not (folder / "ds").exists()
    return done.stderr.splitlines()


def test_what_the_hub_refuses_is_one_sentence(tmp_path: Path, parquet: dict[str, bytes]) -> None:
    with repository(parquet, token="hf_right") as hub:
        told = commands(tmp_path, hub, "hf_right", {n: {**SOURCE, **changes} for n, (changes, _) in REFUSED.items()})
        told = [line for line in told if "Generating" not in line and line]  # the library's progress
        assert told[1::2] == ["exit 2"] * len(REFUSED), told
        for line, (_, message) in zip(told[::2], REFUSED.values(), strict=True):
            assert message in line
        (tmp_path / "stranger").mkdir()  # who has it in no cache
        private, status = commands(tmp_path / "stranger", hub, "hf_wrong", {"private": SOURCE})
    assert f"cannot load {NAME}: Dataset '{NAME}' {NOT_THERE}; see that" in private
    assert "HF_TOKEN may read it if it is private" in private
    assert status == "exit 2"


OFFLINE = """
import json, pathlib, sys
from mmdata.errors import SourceError
from pictures import adopted, rows_of
told = []
for number, source in enumerate(json.loads(sys.argv[2])):
    try:
        told.append([r["caption"] for r in rows_of(adopted(pathlib.Path(sys.argv[1], f"offline{number}"), source))])
    except SourceError as error:
        told.append(str(error))
print(json.dumps(told))
"""


CARD = b"""---
configs:
- {config_name: one, data_files: data/train-00000-of-00002.parquet, default: true}
- {config_name: two, data_files: data/train-00001-of-00002.parquet}
---
"""


def test_what_else_the_cache_holds_is_not_taken_for_it(tmp_path: Path, parquet: dict[str, bytes]) -> None:
    """The library falls back on what it cached last, whatever it is, when the hub is out of reach."""
    two = {**SOURCE, "config": "two"}
    with repository({**parquet, "README.md": CARD}) as hub:
        rows(tmp_path, hub, two)
    sources = [two, {**two, "revision": "cd" * 20}, SOURCE, {**two, "streaming": True}]
    done = run(["-c", OFFLINE, str(tmp_path), json.dumps(sources)], tmp_path, hub, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    same, commit, configuration, streamed = json.loads(done.stdout.splitlines()[-1])
    assert same == [f"caption {i} ü" for i in range(3, 7)]
    assert f"the cache has it at commit {COMMIT}, not at {'cd' * 20} (source.revision)" in commit
    assert "the cache has 'two'; name one with source.config" in configuration
    assert f"cannot load {NAME}: the hub did not say which files it has" in streamed
    assert [(tmp_path / f"offline{n}").exists() for n in range(4)] == [True, False, False, False]
