"""push_to_hub, through the real huggingface_hub, to a hub on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import kept_rows
from hub_server import Hub, hub_server

CODE = """
import sys, json, pathlib, kept_rows
from mmdata.export import ExportOptions, export
from mmdata.errors import MmdataError
rows = kept_rows.dataset(pathlib.Path(sys.argv[1], "dataset"))
options = ExportOptions(path=sys.argv[1] + "/out", format="datasets", shard_rows=10, push_to_hub="me/pets")
try:
    done = export(rows, options, "name: pets\\n")
    print(json.dumps([done.written, done.pushed]))
except MmdataError as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""


def push(folder: Path, url: str, token: str | None = "hf_secret") -> tuple[list[object], str]:
    """The export in a process of its own: huggingface_hub reads its environment when it is imported."""
    fixtures = Path(kept_rows.__file__).parent
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(fixtures.parents[1]), str(fixtures)]),
        "HF_ENDPOINT": url,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    if token is not None:
        environment["HF_TOKEN"] = token
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(folder)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    answer: list[object] = json.loads(done.stdout.splitlines()[-1])
    return answer, done.stdout + done.stderr


def check(hub: Hub, out: Path) -> None:
    assert {n for n in hub.files if n.startswith("data/")} == {f"data/train-{n:05d}-of-00004.parquet" for n in range(4)}
    assert set(hub.files) == {*(n for n in hub.files if n.startswith("data/")), "README.md"}
    for name, data in hub.files.items():
        assert data == (out / name).read_bytes(), name


def test_an_export_is_pushed_once_and_again_costs_nothing(tmp_path: Path) -> None:
    with hub_server() as hub:
        answer, said = push(tmp_path, hub.url)
        assert answer == [True, f"{hub.url}/datasets/me/pets"]
        assert hub.created[0] == {**hub.created[0], "name": "pets", "organization": "me", "type": "dataset"}
        assert hub.created[0]["visibility"] == "private"
        assert hub.tokens == {"Bearer hf_secret"}
        check(hub, tmp_path / "out")
        sent = hub.sent
        assert sent == sum(len(data) for name, data in hub.files.items() if name.endswith(".parquet"))
        answer, more = push(tmp_path, hub.url)
        assert answer == [False, f"{hub.url}/datasets/me/pets"]
        check(hub, tmp_path / "out")
        assert hub.sent == sent
    assert "hf_secret" not in said + more
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file() and b"hf_secret" in p.read_bytes()]


def test_what_the_hub_refuses_is_one_sentence_and_the_folder_stands(tmp_path: Path) -> None:
    with hub_server() as hub:
        hub.status = 403
        answer, _ = push(tmp_path, hub.url)
        assert answer[0] == "RecipeError"
        assert "refused me/pets with status 403" in str(answer[1])
        assert (tmp_path / "out" / "README.md").exists()
        hub.status = 0
        answer, _ = push(tmp_path, hub.url)
        assert answer == [False, f"{hub.url}/datasets/me/pets"]
        check(hub, tmp_path / "out")


def test_a_hub_that_is_away_is_worth_another_try(tmp_path: Path) -> None:
    with hub_server() as hub:
        url = hub.url
    answer, _ = push(tmp_path, url)
    assert answer[0] == "RetryableError"
    assert "same command again" in str(answer[1])
