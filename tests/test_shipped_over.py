"""A shipped recipe by its name, and any recipe over a dataset that is there: no row is fetched again."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from batches import noise
from PIL import Image
from server import BadServer
from typer.testing import CliRunner

import mmdata
from mmdata.cli import app
from mmdata.errors import RecipeError
from mmdata.shipped import find_recipe, shipped_recipe

WIDE, SMALL = (320, 240), (150, 300)
ROWS = [("an old house by the river", WIDE), ("a dog", WIDE), ("an old house by the river", SMALL), (None, WIDE)]


def picture(size: tuple[int, int], seed: int) -> bytes:
    import io

    sink = io.BytesIO()
    Image.fromarray(noise(size[1], size[0], seed)).save(sink, "JPEG")
    return sink.getvalue()


@pytest.fixture
def pets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`data/pets`: a dataset built by a recipe without steps, whose server is gone."""
    monkeypatch.chdir(tmp_path)
    files = {f"/{i}.jpg": ("image/jpeg", picture(size, i)) for i, (_, size) in enumerate(ROWS)}
    with BadServer(files) as server:
        table = pa.table({"URL": [server.url(path) for path in files], "TEXT": [caption for caption, _ in ROWS]})
        pq.write_table(table, tmp_path / "pets.parquet")
        recipe = {
            "name": "pets",
            "dataset": "data/pets",
            "source": {"kind": "urls", "path": "pets.parquet", "url": "URL", "caption": "TEXT"},
            "fetch": {"allow_private": True, "image_size": 512, "resize_only_if_bigger": True},
        }
        mmdata.run(recipe, runner="inline")
    return tmp_path / "data" / "pets"


def test_by_name_over_a_dataset(pets: Path):
    media = sorted(p.stat().st_mtime_ns for p in (pets / "media").iterdir())
    ds = mmdata.run("datacomp_basic", dataset="data/pets", runner="inline")
    assert ds.sql("SELECT reason FROM samples ORDER BY row_id").fetchall() == [
        (None,),
        ("long_enough",),
        ("size",),
        ("english:null",),
    ]
    assert sorted(p.stat().st_mtime_ns for p in (pets / "media").iterdir()) == media
    assert ds.selections()["datacomp_basic"].kept == 1
    assert ds.selections()["pets"].kept == 4
    assert len(list(Path("data/pets-datacomp_basic").glob("*.tar"))) == 1


def test_by_the_command_from_another_folder(pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    over = ["datacomp_basic", "--dataset", str(pets), "--set", "export.path=out"]
    planned = CliRunner().invoke(app, ["plan", *over])
    assert planned.exit_code == 0, planned.output
    assert "4 rows" in planned.output.replace(",", "")
    done = CliRunner().invoke(app, ["run", *over, "--runner", "inline", "--quiet"])
    assert done.exit_code == 0, done.output
    assert json.loads(Path("out/00000_stats.json").read_text())["successes"] == 1


def test_a_file_wins_over_a_name_and_overrides_have_the_last_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe("datacomp_basic").dataset == "data/datacomp_basic"
    Path("datacomp_basic").write_text(shipped_recipe("datacomp_basic").replace("data/", "mine/"))
    assert find_recipe("datacomp_basic").dataset == "mine/datacomp_basic"
    found = find_recipe("datacomp_basic", ["dataset=other"], dataset="data/new/")
    assert found.dataset == "other"
    assert found.export is not None
    assert found.export.path == "data/new-datacomp_basic"


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("datacomp_basik", "none called so comes with mmdata; did you mean 'datacomp_basic'"),
        ("pets.yaml", "there is no recipe at pets.yaml"),
        ("some/datacomp_basic", "there is no recipe at some/datacomp_basic"),
        ("x" * 5000, "none called so comes with mmdata"),  # longer than a file's name may be
    ],
)
def test_what_is_not_there(recipe: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=words):
        find_recipe(recipe)


def test_over_a_folder_without_a_name():
    """As of a shell's variable that is not set: it is not the root of the file system."""
    with pytest.raises(RecipeError, match="empty name"):
        find_recipe("datacomp_basic", dataset="")


def test_a_recipe_that_is_no_file_names_its_own_dataset():
    with pytest.raises(RecipeError, match="names its own"):
        mmdata.run({"name": "x"}, dataset="data/pets")
