"""The demo: run as a user runs it, in a folder of its own; every row ends where its `truth` says."""

from __future__ import annotations

import csv
import io
import os
import re
import shlex
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml
from PIL import Image

import mmdata
from mmdata.demo import QUESTION
from mmdata.demo.server import Server, rows

PICTURES = Path(mmdata.__file__).parent / "demo" / "pictures"


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", "from mmdata.cli import main; main()", *arguments]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=280, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """(working folder, stdout, stderr) of one `mmdata demo --runner inline`."""
    folder = tmp_path_factory.mktemp("demo")
    finished = command(folder, "demo", "--runner", "inline")
    assert finished.returncode == 0, finished.stderr
    return folder, finished.stdout, finished.stderr


@pytest.fixture
def dataset(done: tuple[Path, str, str], monkeypatch: pytest.MonkeyPatch) -> mmdata.dataset.Dataset:
    monkeypatch.chdir(done[0])
    return mmdata.open("demo-out/dataset")


def test_no_row_is_lost(dataset: mmdata.dataset.Dataset) -> None:
    with open("demo-out/list.csv", encoding="utf-8", newline="") as file:
        listed = list(csv.DictReader(file))
    funnel = dataset.funnel()
    assert len(listed) >= 40
    assert funnel.rows_in == len(listed) == funnel.kept + funnel.dropped + funnel.failed
    found = dataset.sql("SELECT url, caption, truth FROM samples ORDER BY row_id").fetchall()
    assert found == [(row["url"], row["caption"], row["truth"]) for row in listed]


# What a row of each kind must come to: (verdict, step, reasons); a broken picture is no picture, or does not decode.
FATES = {
    "good": ("kept", None, {None}),
    "missing": ("failed", "ingest", {"http_4xx", "http_5xx"}),
    "broken": ("failed", "ingest", {"decode", "not_media"}),
    "slow": ("failed", "ingest", {"timeout"}),
    "too_small": ("dropped", "basic", {"basic"}),
    "poor_caption": ("dropped", "basic", {"basic"}),
    "mis_captioned": ("dropped", "aligned", {"aligned"}),
    "duplicate": ("dropped", "unique", {"unique"}),
    "near_duplicate": ("dropped", "unique", {"unique"}),
}


@pytest.mark.parametrize("truth", FATES)
def test_each_kind_of_row_ends_where_it_should(dataset: mmdata.dataset.Dataset, truth: str) -> None:
    verdict, step, reasons = FATES[truth]
    query = "SELECT key, verdict, step_name, reason, caption FROM samples WHERE truth = "
    found = dataset.sql(f"{query}'{truth}'").fetchall()
    wrong = [row for row in found if row[1:3] != (verdict, step)]
    assert found
    assert not wrong
    assert {row[3] for row in found} == reasons


def test_there_are_no_other_kinds(dataset: mmdata.dataset.Dataset) -> None:
    assert {truth for (truth,) in dataset.sql("SELECT DISTINCT truth FROM samples").fetchall()} == set(FATES)


def test_copies_are_found_to_be_copies_of_their_originals(dataset: mmdata.dataset.Dataset) -> None:
    pairs = dataset.sql(
        "SELECT c.url, o.url, c.sha256 = o.sha256, c.near_duplicates_distance, c.truth FROM samples c "
        "JOIN samples o ON c.near_duplicates_of = o.key WHERE c.truth IN ('duplicate', 'near_duplicate')"
    ).fetchall()
    assert len(pairs) == len([row for row in rows() if row.truth in ("duplicate", "near_duplicate")])
    for copy, original, same_bytes, distance, truth in pairs:
        assert Path(copy).stem == Path(original).stem
        assert same_bytes == (truth == "duplicate")
        assert distance <= (0 if truth == "duplicate" else 4)


def test_wrong_captions_score_below_every_right_one(dataset: mmdata.dataset.Dataset) -> None:
    scores = dataset.sql(
        "SELECT max(conse_score) FILTER (truth = 'mis_captioned'), min(conse_score) FILTER (truth = 'good') "
        "FROM samples"
    ).fetchall()
    # With room on either side of the recipe's 0.25, so that another machine's last bits change nothing.
    assert scores[0][0] < 0.23
    assert scores[0][1] > 0.3


def test_the_export_holds_the_kept_pictures_and_their_captions(dataset: mmdata.dataset.Dataset) -> None:
    kept = dict(dataset.sql("SELECT key, caption FROM samples WHERE verdict = 'kept'").fetchall())
    tars = sorted(Path("demo-out/shards").glob("*.tar"))
    assert len(tars) == -(-len(kept) // 10)
    captions = {}
    for path in tars:
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member) for member in tar if member.isfile()}
            for name, file in members.items():
                assert file is not None
                if name.endswith(".txt"):
                    captions[name.removesuffix(".txt")] = file.read().decode()
                elif not name.endswith(".json"):
                    with Image.open(io.BytesIO(file.read())) as picture:
                        picture.load()
                        assert min(picture.size) <= 224
    assert captions == kept


def test_it_ends_with_the_funnel_a_question_and_three_commands(done: tuple[Path, str, str]) -> None:
    folder, out, err = done
    order = ["near_duplicates", " kept of ", QUESTION, "mis_captioned", "mmdata why "]
    places = [out.rindex(text) for text in order]
    assert places == sorted(places)
    commands = [shlex.split(line, comments=True)[1:] for line in re.findall(r"^  (mmdata .*)$", out, re.MULTILINE)]
    assert [words[0] for words in commands] == ["why", "sql", "run"]
    for words in commands[:2]:
        finished = command(folder, *words)
        assert (finished.returncode, finished.stderr) == (0, "")
        assert finished.stdout
    for text in (out, err):
        assert "Traceback" not in text
        assert "Warning" not in text
    assert "oken authentication" not in out + err


def test_the_server_is_gone_afterwards_and_the_recipe_still_runs(done: tuple[Path, str, str]) -> None:
    folder, out, _ = done
    with open(folder / "demo-out" / "list.csv", encoding="utf-8", newline="") as file:
        url = next(csv.DictReader(file))["url"]
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url, timeout=5)
    last = shlex.split(re.findall(r"^  (mmdata run .*)$", out, re.MULTILINE)[0], comments=True)[1:]
    before = mmdata.open(str(folder / "demo-out" / "dataset")).funnel()
    finished = command(folder, *last, "--runner", "inline", "--quiet")
    assert finished.returncode == 0, finished.stderr
    after = mmdata.open(str(folder / "demo-out" / "dataset")).funnel()
    assert (after.rows_in, after.failed) == (before.rows_in, before.failed)
    assert 0 < after.kept < before.kept
    recipe = folder / "demo-out" / "recipe.yaml"  # and as the demo left it, for the tests that read the dataset
    assert command(folder, "run", str(recipe.relative_to(folder)), "--runner", "inline", "--quiet").returncode == 0
    assert mmdata.open(str(folder / "demo-out" / "dataset")).funnel().kept == before.kept


def test_a_second_demo_starts_afresh_and_keeps_an_edited_recipe(tmp_path: Path, done: tuple[Path, str, str]) -> None:
    """The first demo is interrupted at its start here; the second, on Ray, keeps what the inline one kept."""
    folder = tmp_path / "a folder: 'quoted'"
    (folder / "dataset").mkdir(parents=True)
    (folder / ".mmdata-demo").touch()
    (folder / "dataset" / "left-over").touch()
    edited = "name: mine\n"
    (folder / "recipe.yaml").write_text(edited, encoding="utf-8")
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    finished = command(tmp_path, "demo", "--out", folder.name)
    assert finished.returncode == 0, finished.stderr
    assert "oken authentication" not in finished.stdout + finished.stderr
    assert not (folder / "dataset" / "left-over").exists()
    assert (folder / "recipe.edited.yaml").read_text(encoding="utf-8") == edited
    assert (folder / "notes.txt").read_text(encoding="utf-8") == "mine"
    written = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    assert (written["dataset"], written["source"]["path"]) == (f"{folder.name}/dataset", f"{folder.name}/list.csv")
    query = "SELECT key, caption, verdict, reason FROM samples ORDER BY row_id"
    inline = mmdata.open(str(done[0] / "demo-out" / "dataset")).sql(query).fetchall()
    assert mmdata.open(str(folder / "dataset")).sql(query).fetchall() == inline


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_it_touches_nothing_that_is_not_its_own(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "demo-out"
    mine = out
    if kind == "folder":
        (out / "dataset").mkdir(parents=True)
        mine = out / "dataset" / "mine.txt"
    mine.write_text("mine", encoding="utf-8")
    finished = command(tmp_path, "demo", "--runner", "inline")
    assert finished.returncode == 2
    assert re.fullmatch(r"mmdata: demo-out .* --out DIR\n", finished.stderr)
    assert mine.read_text(encoding="utf-8") == "mine"
    assert sorted(os.listdir(tmp_path)) == ["demo-out"]


def test_the_server_serves_what_the_rows_say() -> None:
    originals = {row.path: row for row in rows()}
    with Server.serving(list(originals.values())) as server:
        for row in originals.values():
            if row.body is None:
                with pytest.raises(TimeoutError):
                    urllib.request.urlopen(server.url(row), timeout=0.2)
                continue
            try:
                with urllib.request.urlopen(server.url(row), timeout=10) as answer:
                    status, kind, body = answer.status, answer.headers["Content-Type"], answer.read()
            except urllib.error.HTTPError as error:
                status, kind, body = error.code, error.headers["Content-Type"], error.read()
                error.close()
            assert (status, kind, body) == (row.status, row.content_type, row.body)
            assert (status >= 400) == (row.truth == "missing")
            if status == 200:
                assert _decodes(body) == (row.truth != "broken"), row.path
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(server.url(rows()[0]), timeout=5)


def _decodes(body: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(body)) as picture:
            picture.load()
    except OSError:
        return False
    return True


def test_every_picture_is_listed_with_its_licence_and_small() -> None:
    pictures = {p.name for p in PICTURES.iterdir()} - {"LICENCES.md", "captions.csv"}
    text = (PICTURES / "LICENCES.md").read_text(encoding="utf-8")
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"][2:]
    assert {row[0] for row in table} == pictures
    for file, origin, author, licence in table:
        assert origin.startswith(("openclipart/png/", "skimage/data/")), file
        assert author not in ("", "not named"), file
        assert licence in ("public domain", "CC0 1.0"), file
    with open(PICTURES / "captions.csv", encoding="utf-8", newline="") as lines:
        assert {row["file"] for row in csv.DictReader(lines)} == pictures
    sizes = [(PICTURES / name).stat().st_size for name in pictures]
    assert max(sizes) < 100_000
    assert sum(sizes) < 900_000
