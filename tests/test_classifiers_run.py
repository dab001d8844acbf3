"""Classifiers and embeddings of captions through whole runs: columns in samples, a filter, an export, no second run."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import synthetic
from PIL import Image
from tiny_transformers import save_tiny_sentences, save_tiny_text_classifier, save_tiny_vit
from transformers import pipeline

import mmdata

NUMBERS = list(range(1, 13))


def _picture(number: int) -> bytes | None:
    return b"not a picture" if number == 5 else synthetic.png(number * 20)


def test_from_pictures_and_captions_to_an_export(tmp_path: Path):
    vit, bert = save_tiny_vit(tmp_path / "vit"), save_tiny_text_classifier(tmp_path / "bert")
    sentences = save_tiny_sentences(tmp_path / "sentences")
    made = synthetic.make_dataset(tmp_path, NUMBERS, 5, _picture)
    steps = [
        {"classify_image": {"as": "mark", "model": vit, "labels": ["watermark"], "max_failed": 1}},
        {"classify_text": {"as": "tone", "model": bert, "labels": ["clean"], "top": 2}},
        {"filter": {"some": "mark_watermark >= 0 AND tone_clean <= 1"}},
        {"embed_text": {"model": sentences}},
    ]
    columns = ["mark_label", "mark_top", "tone_clean", "text_embedding"]
    export = {"format": "parquet", "path": str(tmp_path / "out"), "columns": columns}
    ds = mmdata.run({**made, "steps": steps, "export": export}, runner="inline")
    rows = ds.sql("SELECT caption, mark_top, mark_watermark, tone_top, reason FROM samples ORDER BY row_id").fetchall()
    ask = pipeline("image-classification", model=vit, device="cpu")
    grey = Image.new("RGB", (8, 8), (60, 60, 60))
    expected = {one["label"]: one["score"] for one in ask(grey, top_k=3)}
    _, top, score, tone, reason = rows[2]
    assert reason is None
    assert score == pytest.approx(expected["watermark"], abs=1e-5)
    assert {one["label"]: one["score"] for one in top} == pytest.approx(expected, abs=1e-5)
    assert len(tone) == 2
    assert rows[4][1:] == (None, None, None, "not_media")
    without = [n for n, row in zip(NUMBERS, rows, strict=True) if row[0] is None]
    assert without == [9]  # no caption: no score, and the filter drops it
    assert rows[8][-1] == "some:null"

    table = pa.concat_tables(pq.read_table(p) for p in sorted((tmp_path / "out").glob("*.parquet")))
    assert table.num_rows == len(NUMBERS) - 2
    assert table["text_embedding"].type == pa.list_(pa.float16(), 32)
    assert table["text_embedding"].null_count == 0
    assert table["mark_top"].to_pylist()[2] == top

    again = mmdata.run({**made, "steps": steps}, runner="inline")
    assert again.report is not None
    assert [w.computed for w in again.report.work.values()] == [0] * len(again.report.work)
    moved = (tmp_path / "vit").rename(tmp_path / "elsewhere")
    steps[0]["classify_image"]["model"] = str(moved)
    third = mmdata.run({**made, "steps": steps}, runner="inline")
    assert third.report is not None
    assert third.report.work["mark"].computed == 0
