"""Every shipped recipe, run over a small list whose rows stand on either side of each of its rules.

Expectations are written by hand from the rules as published. Where a recipe's weights would come from a hub, a small
checkpoint with random weights stands in, and every cosine passes.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import skimage
from batches import noise
from PIL import Image
from server import BadServer
from tiny_clip import save_tiny_clip

import mmdata
from mmdata import catalogue
from mmdata.preflight import prove
from mmdata.recipe import load

NAMES = [
    "adopt-webdataset",
    "coyo",
    "datacomp_basic",
    "datacomp_clip",
    "datacomp_laion2b",
    "image-text-offline",
    "laion-2b-en",
]
HOUSE = "an old house by the river"


@dataclass(frozen=True)
class Row:
    """A line of the list, and why its row goes: the reason in the ledger, None = kept."""

    caption: str | None
    picture: bytes
    reason: str | None = None


def jpeg(picture: Image.Image, size_bytes: int | None = None) -> bytes:
    """As JPEG; of exactly `size_bytes`, by a comment, where that is given."""

    def encoded(comment: int) -> bytes:
        sink = io.BytesIO()
        picture.save(sink, "JPEG", quality=90, comment=b"x" * comment)
        return sink.getvalue()

    data = encoded(1)
    return data if size_bytes is None else encoded(1 + size_bytes - len(data))


def speckled(width: int, height: int, seed: int = 0) -> bytes:
    """A picture of some hundred kilobytes that looks like no other."""
    return jpeg(Image.fromarray(noise(height, width, seed)))


def of_bytes(size_bytes: int, seed: int) -> bytes:
    """A picture of 240 × 240 px in a file of that many bytes."""
    small = Image.fromarray(noise(4, 4, seed)).resize((240, 240), Image.Resampling.BILINEAR)
    return jpeg(small, size_bytes)


def datacomp() -> list[Row]:
    """DataComp's basic filter: English, > 2 words, > 5 characters, short side >= 200, long / short <= 3."""
    return [
        Row(HOUSE, speckled(300, 300)),
        Row("I am a", speckled(300, 301)),  # 3 words, 6 characters
        Row("the house", speckled(300, 302), "long_enough"),  # 2 words
        Row("I a m", speckled(300, 303), "long_enough"),  # 5 characters
        Row(None, speckled(300, 304), "english:null"),
        Row("ein altes Haus steht am Fluss", speckled(300, 305), "english"),
        Row(HOUSE, speckled(200, 600)),
        Row(HOUSE, speckled(200, 601), "shape"),
        Row(HOUSE, speckled(601, 200), "shape"),
        Row(HOUSE, speckled(199, 500), "size"),
        Row(HOUSE, b"<html>gone</html>", "not_media"),
    ]


def any_pairs() -> list[Row]:
    """DataComp's clip_score: nothing but the score counts; the whole of three pairs is kept here."""
    return [
        Row(HOUSE, speckled(100, 500)),
        Row("x", speckled(300, 301)),
        Row("ein altes Haus steht am Fluss", speckled(300, 302)),
        Row(None, speckled(300, 303), "aligned:null"),
        Row(HOUSE, b"<html>gone</html>", "not_media"),
    ]


def english() -> list[Row]:
    """DataComp's laion2b: English, and the score."""
    return [
        Row(HOUSE, speckled(100, 500)),
        Row("the house", speckled(300, 301)),
        Row("ein altes Haus steht am Fluss", speckled(300, 302), "english"),
        Row(None, speckled(300, 303), "english:null"),
    ]


def laion() -> list[Row]:
    """LAION-2B-en: >= 5 characters, >= 5 KB, English, each URL once."""
    twice = speckled(300, 306)
    return [
        Row("I see", speckled(100, 300)),  # 5 characters; no rule on size or shape
        Row("I am", speckled(300, 301), "long_enough"),  # 4
        Row(HOUSE, of_bytes(5120, 1)),
        Row(HOUSE, of_bytes(5119, 2), "heavy_enough"),
        Row("ein altes Haus steht am Fluss", speckled(300, 303), "english"),
        Row("one caption of the picture", twice),
        Row("another caption of the picture", twice, "unique"),
    ]


def coyo() -> list[Row]:
    """COYO-700M: >= 5 KB, >= 200 px, <= 3:1, English, 6 to 1000 characters, 3 to 256 words, captions <= 10 times."""
    same = speckled(300, 309)
    return [
        Row(HOUSE, speckled(200, 600)),
        Row(HOUSE, speckled(200, 601), "shape"),
        Row(HOUSE, speckled(199, 500), "size"),
        Row(HOUSE, of_bytes(5120, 1)),
        Row(HOUSE, of_bytes(5119, 2), "heavy_enough"),
        Row("ein altes Haus steht am Fluss", speckled(300, 301), "english"),
        Row(" I   a \n m ", speckled(300, 302), "characters"),  # "I a m": 5, though 11 as written
        Row("wonderful " * 100 + "w", speckled(300, 303), "characters"),  # 1001 characters, 101 words
        Row("wonderful " * 100, speckled(300, 304)),  # 999 when trimmed
        Row("I see " * 128 + "I", speckled(300, 305), "words"),  # 257 words, 769 characters
        Row("I see " * 128, speckled(300, 306)),  # 256
        Row("the house", speckled(300, 307), "words"),
        *(Row("this is the photograph", speckled(300, 300, seed)) for seed in range(10, 20)),  # 10 times
        *(Row("there is no photograph", speckled(300, 300, seed), "rare") for seed in range(20, 31)),  # 11 times
        Row("the same picture of it", same),
        Row("the same picture of it", same + b"\0", "unique"),  # another file, the same pixels
        Row("and yet another caption", same),
    ]


def offline() -> list[Row]:
    """Sides >= 64, entropy >= 1 bit, a caption that says something and fits, one picture per look."""
    cat, coffee, rocket = (
        Image.fromarray(p) for p in (skimage.data.cat(), skimage.data.coffee(), skimage.data.rocket())
    )
    return [
        Row("a cup of coffee on a saucer", jpeg(coffee.resize((300, 200))), "unique"),
        Row("a cup of coffee on a saucer", jpeg(coffee)),  # the larger of two
        Row("a cat", jpeg(cat)),
        Row("a rocket on its launch pad", jpeg(rocket)),
        Row("terms and conditions of the annual tax return", jpeg(cat.transpose(Image.Transpose.ROTATE_90)), "aligned"),
        Row("a cat", jpeg(cat.resize((90, 63))), "size"),
        Row("a cat", jpeg(cat.crop((0, 0, 450, 149))), "size"),  # 450 / 149 > 3
        Row("a plain wall", jpeg(Image.new("RGB", (300, 200), "white")), "not_flat"),
        Row("IMG_0042.jpg", jpeg(rocket), "captioned"),
        Row("see www.example.org for the cat", jpeg(cat), "captioned"),
        Row("a", jpeg(cat), "captioned"),
    ]


def tidied() -> list[Row]:
    """Short side >= 200, long / short <= 3, at least 3 words and no file name, one picture per look."""
    coffee = Image.fromarray(skimage.data.coffee())  # 600 x 400
    return [
        Row(HOUSE, speckled(200, 600)),
        Row(HOUSE, speckled(200, 601), "shape"),
        Row(HOUSE, speckled(199, 500), "size"),
        Row("the house", speckled(300, 301), "captioned"),
        Row("see my photo.JPEG", speckled(300, 302), "captioned"),
        Row(None, speckled(300, 303), "captioned:null"),
        Row("a cup of coffee", jpeg(coffee.resize((450, 300))), "unique"),
        Row("a cup of coffee", jpeg(coffee)),
        Row(HOUSE, b"<html>gone</html>", "not_media"),
    ]


LISTS: dict[str, Callable[[], list[Row]]] = {
    "adopt-webdataset": tidied,
    "coyo": coyo,
    "datacomp_basic": datacomp,
    "datacomp_clip": any_pairs,
    "datacomp_laion2b": english,
    "image-text-offline": offline,
    "laion-2b-en": laion,
}


def path_of(name: str) -> Path:
    return Path(str(catalogue.recipe_folder() / f"{name}.yaml"))


def served(rows: list[Row]) -> dict[bytes, str]:
    """Picture → its path on the server; rows with the same bytes share one."""
    return {picture: f"/{index}.jpg" for index, picture in enumerate(dict.fromkeys(r.picture for r in rows))}


def write_list(folder: Path, rows: list[Row], address: Callable[[str], str]) -> None:
    """`pairs.parquet`, with the columns that the recipes name."""
    paths = served(rows)
    table = pa.table({"url": [address(paths[r.picture]) for r in rows], "text": [r.caption for r in rows]})
    pq.write_table(table, folder / "pairs.parquet")


def write_tar(folder: Path, rows: list[Row]) -> None:
    """`shards/00000.tar`, for the recipe that adopts it."""
    (folder / "shards").mkdir()
    with tarfile.open(folder / "shards" / "00000.tar", "w") as tar:
        for number, row in enumerate(rows):
            texts = {} if row.caption is None else {"txt": row.caption.encode()}
            for extension, data in {"jpg": row.picture, **texts}.items():
                info = tarfile.TarInfo(f"{number:05d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def write_source(name: str, folder: Path, rows: list[Row], address: Callable[[str], str]) -> None:
    """What the recipe of that name starts from."""
    if name == "adopt-webdataset":
        write_tar(folder, rows)
    else:
        write_list(folder, rows, address)


def test_these_are_all():
    assert sorted(p.name for p in catalogue.recipe_folder().iterdir()) == [f"{name}.yaml" for name in NAMES]
    assert sorted(LISTS) == NAMES
    assert [line.split()[0] for line in catalogue.shipped_recipes().splitlines()] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_says_what_it_is(name: str):
    text = catalogue.shipped_recipe(name)
    comment = re.match(r"(?:#.*\n)+", text)
    assert comment is not None
    for word in ("# Source: ", "# Expect", "# Needs: ", "# To start: "):
        assert word in comment[0], f"{name}.yaml: its first comment has no {word!r}"
    recipe = load(path_of(name))
    assert recipe.name == name
    assert recipe.dataset == f"data/{name}"
    assert recipe.export is not None
    assert recipe.export.path == f"data/{name}-shards"


@pytest.mark.parametrize("name", NAMES)
def test_is_proved_as_it_is(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Only a list is missing: with one, `plan` finds no fault, also where the weights are yet to be fetched."""
    monkeypatch.chdir(tmp_path)
    write_source(name, tmp_path, [Row(HOUSE, b"")], lambda path: f"http://127.0.0.1:1{path}")
    before = sorted(p.name for p in tmp_path.iterdir())
    proved = prove(load(path_of(name)))
    assert [s.name for s in proved.plan.steps] == [s.name for s in proved.plan.recipe.steps]
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["datacomp_clip", "datacomp_laion2b", "laion-2b-en"])
def test_names_weights_that_open_clip_knows(name: str):
    """And the architecture has the activation that the weights were trained with; open_clip only warns of another."""
    import open_clip

    [options] = [s.options for s in load(path_of(name)).steps if getattr(s, "operator", "") == "score_clip"]
    weights = open_clip.get_pretrained_cfg(options["model"], options["pretrained"])
    assert weights
    assert weights.get("quick_gelu", False) == open_clip.get_model_config(options["model"]).get("quick_gelu", False)


@pytest.mark.parametrize("name", NAMES)
def test_keeps_what_its_rules_say(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    rows = LISTS[name]()
    overrides = ["fetch.allow_private=true"]
    if "score_clip" in catalogue.shipped_recipe(name):
        overrides += [f"steps.score_clip.model={save_tiny_clip(tmp_path / 'clip')}"]
        has_quantile = "top_fraction" in catalogue.shipped_recipe(name)
        overrides += ["steps.top_fraction.fraction=1" if has_quantile else "filters.aligned=clip_score >= -1"]
    with BadServer({path: ("image/jpeg", picture) for picture, path in served(rows).items()}) as server:
        write_source(name, tmp_path, rows, server.url)
        ds = mmdata.run(path_of(name), overrides=overrides, runner="inline", quiet=True)
    found = ds.sql("SELECT caption, reason FROM samples ORDER BY row_id").fetchall()
    assert found == [(r.caption, r.reason) for r in rows]
    exported = pa.concat_tables(pq.read_table(p) for p in sorted(Path(f"data/{name}-shards").glob("*.parquet")))
    assert exported["caption"].to_pylist() == [r.caption for r in rows if r.reason is None]
    recipe = load(path_of(name))
    assert recipe.export is not None
    assert set(recipe.export.columns or ()) <= set(exported.column_names)
