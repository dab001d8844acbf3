"""Every shipped recipe, run over a small list whose rows stand on either side of each of its rules.

Expectations are written by hand from the rules as published. Where a recipe's weights would come from a hub, a small
checkpoint with random weights stands in, and every cosine passes.
"""

# long because: one section a recipe, with its list and its rules worked out by hand

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import skimage
import torch
from batches import noise
from PIL import Image
from s3 import in_environment, running_s3
from server import BadServer
from tiny_clip import save_tiny_clip
from tiny_transformers import save_tiny_text_classifier, save_tiny_vit

import mmdata
from mmdata import catalogue
from mmdata.dataset import Dataset
from mmdata.preflight import prove
from mmdata.recipe import load

NAMES = [
    "adopt-webdataset",
    "align",
    "cc12m",
    "cc3m",
    "coyo700m",
    "datacomp_basic",
    "datacomp_clip",
    "datacomp_image",
    "datacomp_image_clip",
    "datacomp_laion2b",
    "datacomp_text",
    "dfn",
    "image-text-offline",
    "laion400m",
    "laion5b",
    "metaclip",
    "semdedup",
    "tmars",
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


def scored(rule: str) -> list[Row]:
    """T-MARS and DFN: nothing but one score counts; test_tmars.py has the half that goes."""
    return [Row(r.caption, r.picture, r.reason and r.reason.replace("aligned", rule)) for r in any_pairs()]


def english() -> list[Row]:
    """DataComp's laion2b: English, and the score."""
    return [
        Row(HOUSE, speckled(100, 500)),
        Row("the house", speckled(300, 301)),
        Row("ein altes Haus steht am Fluss", speckled(300, 302), "english"),
        Row(None, speckled(300, 303), "english:null"),
    ]


def named() -> list[Row]:
    """DataComp's text_based: English, and a word whose first synset is a class of ImageNet-21k (dog n02084071)."""
    return [
        Row("this is a dog", speckled(100, 500)),
        Row("this is a dog, isn't it", speckled(300, 301), "names_a_class"),  # `dog,` is no word of WordNet's
        Row("What are they thinking of?", speckled(300, 302), "names_a_class"),
        Row("ein Bus steht vor dem Haus", speckled(300, 303), "english"),  # bus n02924116
        Row(None, speckled(300, 304), "english:null"),
    ]


def metaclip() -> list[Row]:
    """MetaCLIP: an entry of WordNet's names in the caption, safe, each file once; t is far away."""
    twice = coffee(300, 310)
    return [
        Row("look: dog!", speckled(300, 300)),
        Row("Dogs and CATS", speckled(300, 301), "matched"),  # no entry is in capitals, nor in the plural
        Row("dog-cat", speckled(300, 302), "matched"),
        Row("", speckled(300, 303), "matched"),
        Row(None, speckled(300, 304), "matched:null"),
        Row("coffee", twice),
        Row("coffee cup", twice, "unique"),
        Row("ice cream", coffee(300, 311)),
    ]


def laion400m() -> list[Row]:
    """LAION-400M: >= 5 characters, >= 5 KB, each pair of URL and caption once; the scores pass."""
    twice = speckled(300, 306)
    return [
        Row("I see", speckled(100, 300)),  # 5 characters; no rule on size or shape
        Row("I am", speckled(300, 301), "long_enough"),  # 4
        Row(HOUSE, of_bytes(5120, 1)),
        Row(HOUSE, of_bytes(5119, 2), "heavy_enough"),
        Row("ein altes Haus steht am Fluss", speckled(300, 303)),
        Row("one caption of the picture", twice),
        Row("another caption of the picture", twice),
        Row("one caption of the picture", twice, "unique"),
        Row(None, speckled(300, 307), "long_enough:null"),
    ]


def laion5b() -> list[Row]:
    """LAION-5B: >= 5 characters, >= 5 KB, each URL once, any language; the scores pass."""
    twice = speckled(300, 306)
    return [
        Row("I see", speckled(100, 300)),  # 5 characters; no rule on size or shape
        Row("I am", speckled(300, 301), "long_enough"),  # 4
        Row(HOUSE, of_bytes(5120, 1)),
        Row(HOUSE, of_bytes(5119, 2), "heavy_enough"),
        Row("ein altes Haus steht am Fluss", speckled(300, 303)),
        Row("12345 67890", speckled(300, 304)),
        Row("one caption of the picture", twice),
        Row("another caption of the picture", twice, "unique"),
        Row(None, speckled(300, 307), "long_enough:null"),
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
        Row("wonderful " * 99 + "buildings ", speckled(300, 304)),  # 999 when trimmed
        Row("slowly and very carefully", speckled(300, 299), "noun"),
        Row("I see " * 128 + "I", speckled(300, 305), "words"),  # 257 words, 769 characters
        Row("I see " * 127 + "a dog", speckled(300, 306)),  # 256
        Row("the house", speckled(300, 307), "words"),
        *(Row("this is the photograph", speckled(300, 300, seed)) for seed in range(10, 20)),  # 10 times
        *(Row("there is no photograph", speckled(300, 300, seed), "rare") for seed in range(20, 31)),  # 11 times
        Row("the same picture of it", same),
        Row("the same picture of it", same + b"\0", "unique"),  # another file, the same pixels
        Row("and yet another caption", same),
    ]


def coffee(width: int, height: int) -> bytes:
    """A photograph of a cup of coffee, stretched to that size."""
    return jpeg(Image.fromarray(skimage.data.coffee()).resize((width, height)))


CUP = "a cup of coffee on the saucer"


def cc12m() -> list[Row]:
    """CC12M: sides > 400, long / short <= 2.5, 3 to 256 words, repetition <= 0.2, noun, determiner, a label named."""
    distinct = " ".join(f"{'coffee' if i == 1 else 'house'}{i}" for i in range(252))
    return [
        Row(CUP, coffee(800, 401)),
        Row(CUP, coffee(900, 401)),  # 2.244
        Row(CUP, coffee(400, 400), "size"),
        Row(CUP, coffee(1003, 401), "shape"),  # 2.501
        Row("the cup", coffee(500, 401), "words"),
        Row("the coffee cup", coffee(500, 402)),
        Row(f"a cup of coffee {distinct}", coffee(500, 403)),  # 256 words
        Row(f"a cup of coffee {distinct} more", coffee(500, 404), "words"),
        Row("a a a cup", coffee(500, 405), "repetition"),  # a half
        Row("eine Tasse Kaffee auf dem Tisch", coffee(500, 406), "english"),
        Row("sitting there and waiting quietly", coffee(500, 407), "noun"),
        Row("hot coffee in cups", coffee(500, 408), "determiner"),
        Row("this is the coffee", coffee(500, 409)),  # no preposition
        Row("a rocket on the launch pad", coffee(500, 410), "labelled"),
        Row(None, coffee(500, 411), "words:null"),
    ]


def cc3m() -> list[Row]:
    """CC3M: sides > 400, long / short <= 2, determiner, noun, preposition, a label named; figures of ours elsewhere."""
    return [
        Row(CUP, coffee(800, 401)),  # 1.995
        Row(CUP, coffee(900, 401), "shape"),  # 2.244
        Row(CUP, coffee(400, 400), "size"),
        Row("a cup and a cup and a cup", coffee(500, 401), "distinct"),  # 3 of 8
        Row("The Cup Of Coffee On A Saucer", coffee(500, 402), "capitals"),
        Row("a cup of coffee, stock photo", coffee(500, 403), "no_boilerplate"),
        Row("eine Tasse Kaffee auf dem Tisch", coffee(500, 404), "english"),
        Row("sitting there and waiting quietly", coffee(500, 405), "noun"),
        Row("hot coffee in cups", coffee(500, 406), "determiner"),
        Row("this is the coffee", coffee(500, 407), "preposition"),
        Row("a rocket on the launch pad", coffee(500, 408), "labelled"),
        Row(None, coffee(500, 409), "distinct:null"),
    ]


def align() -> list[Row]:
    """ALIGN: short side > 200, long / short < 3, texts of at most 10 pictures, 3 to 20 words."""
    return [
        Row(HOUSE, speckled(201, 602)),
        Row(HOUSE, speckled(201, 603), "shape"),
        Row(HOUSE, speckled(200, 300), "size"),
        *(Row("this is the photograph", speckled(300, 300, seed)) for seed in range(10, 20)),  # 10 times
        *(Row("there is no photograph", speckled(300, 300, seed), "few_pictures") for seed in range(20, 31)),
        Row("two words", speckled(300, 301), "unigrams"),
        Row(" ".join(f"word{i}" for i in range(20)), speckled(300, 302)),
        Row(" ".join(f"word{i}" for i in range(21)), speckled(300, 303), "unigrams"),
        Row(None, speckled(300, 304), "common_words:null"),
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


def imaged() -> list[Row]:
    """DataComp's image-based filter: English, > 1 token, > 5 characters; so few rows are one cluster, a wanted one."""
    return [
        Row(HOUSE, speckled(100, 400)),  # no rule on size or shape
        Row("the house", speckled(300, 301)),  # 2 tokens
        Row("architecture\n", speckled(300, 302)),  # a line feed is a token
        Row("architecture", speckled(300, 303), "tokens"),
        Row("I a m", speckled(300, 304), "long_enough"),  # 5 characters
        Row("I am a", speckled(300, 305)),
        Row("ein altes Haus steht am Fluss", speckled(300, 306), "english"),
        Row(None, speckled(300, 307), "english:null"),
        Row(HOUSE, b"<html>gone</html>", "not_media"),
    ]


def looking_alike() -> list[Row]:
    """SemDeDup, with an epsilon that random weights are told apart by: of equal pixels the first row stays."""
    twice = speckled(300, 301)
    return [
        Row("one caption", twice),
        Row("another caption", twice + b"\0", "unique"),  # another file
        Row(None, twice + b"\0\0", "unique"),
        Row(HOUSE, coffee(300, 200)),
        Row(HOUSE, speckled(64, 400)),
        Row(HOUSE, b"<html>gone</html>", "not_media"),
    ]


LISTS: dict[str, Callable[[], list[Row]]] = {
    "adopt-webdataset": tidied,
    "align": align,
    "cc12m": cc12m,
    "cc3m": cc3m,
    "coyo700m": coyo,
    "datacomp_basic": datacomp,
    "datacomp_clip": any_pairs,
    "datacomp_image": imaged,
    "datacomp_image_clip": imaged,
    "datacomp_laion2b": english,
    "datacomp_text": named,
    "image-text-offline": offline,
    "laion400m": laion400m,
    "laion5b": laion5b,
    "metaclip": metaclip,
    "dfn": lambda: scored("chosen"),
    "semdedup": looking_alike,
    "tmars": lambda: scored("fits_unread"),
}


TINY_WIDTH = 32
CLIP_STEPS = ("score_clip", "score_nsfw_zero_shot")
# Filters over what a model with random weights says, in a form that every row passes; test_laion.py has the real ones.
PASSING = {
    "laion400m": [f"filters.{f}=nsfw_label IS NOT NULL" for f in ("no_minor_words", "no_minors", "no_animals")],
    "semdedup": ["steps.semantic_duplicates.epsilon=1e-6"],
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


def write_source(name: str, folder: Path, rows: list[Row], address: Callable[[str], str], width: int = 768) -> None:
    """What the recipe of that name starts from; `width` of the embeddings of ImageNet's pictures, where it asks."""
    if "imagenet-train.npy" in catalogue.shipped_recipe(name):
        np.save(folder / "imagenet-train.npy", np.eye(3, width, dtype=np.float32))
    if name == "dfn":
        save_tiny_clip(folder / "dfn-network")
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


@pytest.mark.parametrize(
    "name",
    [
        "datacomp_clip",
        "datacomp_image",
        "datacomp_image_clip",
        "datacomp_laion2b",
        "laion400m",
        "laion5b",
        "semdedup",
        "tmars",
    ],
)
def test_names_weights_that_open_clip_knows(name: str):
    """And the architecture has the activation that the weights were trained with; open_clip only warns of another."""
    import open_clip

    steps = [s for s in load(path_of(name)).steps if getattr(s, "operator", "") in CLIP_STEPS]
    assert steps
    for options in (s.options for s in steps):
        weights = open_clip.get_pretrained_cfg(options["model"], options["pretrained"])
        assert weights
        assert weights.get("quick_gelu", False) == open_clip.get_model_config(options["model"]).get("quick_gelu", False)


def run_shipped(
    name: str, folder: Path, *more: str, runner: str = "inline", rows: Sequence[Row] = (), path: Path | None = None
) -> tuple[list[Row], Dataset]:
    """The rows of the recipe's list and `rows`, served, and the run over them with stand-ins for its CLIP models.

    `path` is that of the recipe, where it is not as shipped.
    """
    rows = [*LISTS[name](), *rows]
    path = path or path_of(name)
    overrides = ["fetch.allow_private=true", *more]
    if "score_clip" in catalogue.shipped_recipe(name):
        clip = save_tiny_clip(folder / "clip")
        steps = [s for s in load(path).steps if getattr(s, "operator", "") in CLIP_STEPS]
        overrides += [f"steps.{s.name}.model={clip}" for s in steps]
        if "top_fraction:" in catalogue.shipped_recipe(name):
            overrides.append("steps.top_fraction.fraction=1")
        elif "aligned:" in catalogue.shipped_recipe(name):
            overrides.append("filters.aligned=clip_score >= -1")
    with BadServer({path: ("image/jpeg", picture) for picture, path in served(rows).items()}) as server:
        write_source(name, folder, rows, server.url, TINY_WIDTH)
        overrides += PASSING.get(name, ())
        return rows, mmdata.run(path, overrides=overrides, runner=runner, quiet=True)


@pytest.mark.parametrize("name", NAMES)
def test_keeps_what_its_rules_say(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    rows, ds = run_shipped(name, tmp_path)
    found = ds.sql("SELECT caption, reason FROM samples ORDER BY row_id").fetchall()
    assert found == [(r.caption, r.reason) for r in rows]
    exported = pa.concat_tables(pq.read_table(p) for p in sorted(Path(f"data/{name}-shards").glob("*.parquet")))
    assert exported["caption"].to_pylist() == [r.caption for r in rows if r.reason is None]
    recipe = load(path_of(name))
    assert recipe.export is not None
    assert set(recipe.export.columns or ()) <= set(exported.column_names)


def long(name: str) -> Any:
    """The case of a name, for the runs that have time."""
    return pytest.param(name, marks=pytest.mark.long)


GRIM = {"cc3m": Row("a cup of coffee on the grim saucer", coffee(800, 402), "decent")}
GRIM["coyo700m"] = Row("an old house by the Grim, river", speckled(300, 298), "decent")


@pytest.mark.parametrize("name", [*map(long, ["cc12m", "cc3m", "laion5b"]), "coyo700m"])
def test_steps_that_wait_for_something_of_yours(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What is commented out, switched on: classifiers and heads with random weights, and a list of one word."""
    monkeypatch.chdir(tmp_path)
    save_tiny_vit(tmp_path / "FOLDER", ("nsfw", "clean", "watermark"))
    save_tiny_text_classifier(tmp_path / "TEXT_FOLDER", ("neutral", "cross"))
    torch.save({"weight": torch.ones(1, TINY_WIDTH), "bias": torch.zeros(1)}, tmp_path / "FILE")
    (tmp_path / "words.txt").write_text("grim\n")
    text, switched = re.subn(r"(?m)^  # - ", "  - ", catalogue.shipped_recipe(name))
    assert switched >= 2
    (tmp_path / f"{name}.yaml").write_text(text)
    filters = ("safe=unsafe_nsfw", "unmarked=marked_watermark", "calm=sentiment_neutral", "pretty=aesthetic_score")
    loose = [f"filters.{f} BETWEEN -9 AND 9" for f in filters if f" {f.partition('=')[0]}: " in text.replace("{", " ")]
    extra = [GRIM[name]] if name in GRIM else []
    rows, ds = run_shipped(name, tmp_path, *loose, rows=extra, path=tmp_path / f"{name}.yaml")
    found = ds.sql("SELECT caption, reason FROM samples ORDER BY row_id").fetchall()
    assert found == [(r.caption, r.reason) for r in rows]


def test_the_query_of_semdedup_counts_what_its_epsilon_would_keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Asked for the epsilon of this run, it says how many rows of the list are kept: a row never fetched is none."""
    monkeypatch.chdir(tmp_path)
    rows, ds = run_shipped("semdedup", tmp_path)
    head = " ".join(catalogue.shipped_recipe("semdedup").partition("\nname:")[0].replace("\n#", " ").split())
    [query] = re.findall(r'mmdata sql data/semdedup "(.*?) <= 0\.9"', head)
    assert ds.sql(f"{query} <= 1 - 1e-6").fetchall() == [(sum(r.reason is None for r in rows),)]


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A bucket of an S3-protocol server that Ray's workers know of as this process does."""
    with running_s3() as server, in_environment(server.environment()), pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMDATA_SCRATCH", str(tmp_path_factory.mktemp("scratch")))
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        try:
            yield server.bucket()
        finally:
            ray.shutdown()


@pytest.mark.parametrize("name", [*map(long, ["coyo700m", "datacomp_image", "semdedup"]), "metaclip"])
def test_groups_over_shards_in_a_bucket_on_ray(name: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The same rules where a group's rows come from several shards, other processes and a store."""
    monkeypatch.chdir(tmp_path)
    here = [f"dataset=s3://{bucket}/{name}", "fetch.shard_rows=3"]
    rows, ds = run_shipped(name, tmp_path, *here, runner="ray")
    assert len(ds.shards()) == -(-len(rows) // 3)
    found = ds.sql("SELECT caption, reason FROM samples ORDER BY row_id").fetchall()
    assert found == [(r.caption, r.reason) for r in rows]
