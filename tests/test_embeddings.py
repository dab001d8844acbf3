"""Embeddings on request, from the stage to the export: kept apart, whole, and without another score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import synthetic
import torch
from PIL import Image
from tiny_clip import save_tiny_clip

import mmdata
from mmdata.dataset import Dataset

NUMBERS = list(range(1, 25))
BOTH = ["image", "text"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny")


def _picture(number: int) -> bytes | None:
    return b"not a picture" if number == 5 else synthetic.png(number * 9)


@pytest.fixture
def made(tmp_path: Path) -> dict[str, Any]:
    return synthetic.make_dataset(tmp_path, NUMBERS, 10, _picture)


def run(document: dict[str, Any], *steps: Any, **changes: Any) -> Dataset:
    return mmdata.run({**document, "steps": list(steps), **changes}, runner="inline")


def score(model: str, **options: Any) -> dict[str, Any]:
    return {"score_clip": {"model": model, "max_failed": 1, **options}}


def values(ds: Dataset, name: str) -> list[Any]:
    assert ds.current is not None
    [step] = [s for s in ds.current.steps if s.name == "score_clip"]
    return [v for (v,) in ds.sql(f'SELECT {name} FROM columns."{step.set_name}" ORDER BY row_id').fetchall()]


def test_embeddings_stand_beside_samples_and_are_those_of_open_clip(tmp_path: Path, made: dict[str, Any], tiny: str):
    ds = run(made, score(tiny, embeddings=BOTH))
    assert ds.current is not None
    assert "clip_score" in ds.samples().columns
    assert not [c for c in ds.samples().columns if "embedding" in c]
    found = values(ds, "clip_image_embedding")
    reasons = values(ds, "reason")
    assert [n for n, v in zip(NUMBERS, found, strict=True) if v is None] == [5]
    assert [(n, r) for n, r in zip(NUMBERS, reasons, strict=True) if r is not None] == [(5, "not_media")]
    without_text = [n for n, v in zip(NUMBERS, values(ds, "clip_text_embedding"), strict=True) if v is None]
    assert without_text == [5, 9, 18]  # no picture, no caption

    model, _, transform = open_clip.create_model_and_transforms(tiny)
    grey = Image.fromarray(np.full((8, 8, 3), 3 * 9, np.uint8))
    with torch.no_grad():
        expected = model.eval().encode_image(transform(grey)[None], normalize=True)[0].numpy()
    np.testing.assert_allclose(found[NUMBERS.index(3)], expected, atol=1e-3)


def test_asking_for_embeddings_gives_the_same_scores_and_settles_nothing_anew(
    tmp_path: Path, made: dict[str, Any], tiny: str
):
    before = run(made, score(tiny))
    scores, state = values(before, "clip_score"), sorted((tmp_path / "dataset" / "state").glob("resolved-*"))
    assert len(state) == 1
    after = run(made, score(tiny, embeddings=BOTH))
    assert before.current is not None
    assert after.current is not None
    assert before.current.steps[0].set_name != after.current.steps[0].set_name
    assert values(after, "clip_score") == scores
    assert sorted((tmp_path / "dataset" / "state").glob("resolved-*")) == state


def test_rows_admitted_later_leave_the_earlier_embeddings_as_they_are(made: dict[str, Any], tiny: str):
    step = score(tiny, embeddings=["image"])
    first = values(run(made, {"filter": {"f": "number <= 12"}}, step), "clip_image_embedding")
    ds = run(made, {"filter": {"f": "number <= 20"}}, step)
    assert ds.report is not None
    assert ds.report.work["score_clip"].computed == 8
    second = values(ds, "clip_image_embedding")
    assert [v is not None for v in first] == [n <= 12 and n != 5 for n in NUMBERS]
    assert [v is not None for v in second] == [n <= 20 and n != 5 for n in NUMBERS]
    assert second[:12] == first[:12]
    whole = values(run(made, step), "clip_image_embedding")
    assert whole[:20] == second[:20]


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_an_export_has_them_where_it_names_them(tmp_path: Path, made: dict[str, Any], tiny: str, kind: str):
    step = score(tiny, embeddings=BOTH)
    plain = {"format": kind, "path": str(tmp_path / "plain")}
    run(made, step, export=plain)
    assert not [c for c in pq.read_schema(tmp_path / "plain" / "00000.parquet").names if "embedding" in c]
    named = {"format": kind, "path": str(tmp_path / "named"), "columns": ["clip_score", "clip_image_embedding"]}
    ds = run(made, step, export=named)
    table = pq.read_table(tmp_path / "named" / "00000.parquet")
    assert table.column("clip_image_embedding").type == pa.list_(pa.float16(), 32)
    expected = [v for v in values(ds, "clip_image_embedding") if v is not None]
    assert table.column("clip_image_embedding").to_pylist() == expected
    if kind == "webdataset":
        import tarfile

        with tarfile.open(tmp_path / "named" / "00000.tar") as tar:
            name = next(n for n in tar.getnames() if n.endswith(".json"))
            member = tar.extractfile(name)
            assert member is not None
            assert "clip_image_embedding" not in json.load(member)


def test_a_filter_on_an_embedding_is_refused_in_one_sentence(made: dict[str, Any], tiny: str):
    from mmdata.errors import RecipeError

    with pytest.raises(RecipeError, match=r"reads 'clip_image_embedding', a vector of 16-bit floats"):
        run(made, score(tiny, embeddings=BOTH), {"filter": {"f": "clip_image_embedding IS NOT NULL"}})
