"""T-MARS over pictures with and without text in them: who is scored anew, and which half goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import skimage
import yaml
from batches import png
from PIL import Image, ImageDraw, ImageFont
from server import BadServer
from tiny_clip import save_tiny_clip

import mmdata
from mmdata import catalogue

CAPTION = "summer sale"


def _blurred(picture: np.ndarray, side: int) -> Image.Image:
    """A picture without anything that could be taken for a letter."""
    return Image.fromarray(picture).resize((side, side)).resize((320, 240), Image.Resampling.BICUBIC)


def _lettered(image: Image.Image) -> Image.Image:
    draw = ImageDraw.Draw(image)
    draw.rectangle((10, 60, 310, 140), fill="white")
    draw.text((20, 75), "SUMMER SALE", fill="black", font=ImageFont.load_default(40))
    return image


@pytest.mark.long
def test_the_half_whose_caption_is_only_written_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bare = [_blurred(skimage.data.coffee(), 4), _blurred(skimage.data.cat(), 12)]
    images = [*bare, *(_lettered(p.copy()) for p in bare)]
    document: dict[str, Any] = yaml.safe_load(catalogue.shipped_recipe("tmars"))
    model = save_tiny_clip(tmp_path / "clip")
    document["steps"][1]["score_clip"] |= {"model": model}
    document["steps"].insert(1, {"score_clip": {"model": model}})
    document["fetch"]["allow_private"] = True
    del document["export"]
    files = {f"/{i}.png": ("image/png", png(np.asarray(p))) for i, p in enumerate(images)}
    with BadServer(files) as server:
        table = {"url": [server.url(path) for path in files], "text": [CAPTION] * len(images)}
        pq.write_table(pa.table(table), "pairs.parquet")
        ds = mmdata.run(document, runner="inline", quiet=True)
    rows = ds.sql("SELECT ocr_count, clip_score, masked_score, reason FROM samples ORDER BY row_id").fetchall()
    assert [count > 0 for count, *_ in rows] == [False] * 2 + [True] * 2
    for count, plain, masked, _ in rows:
        assert (masked == plain) is (count == 0)
    # Of four numbers the two largest: not those below their median.
    scores = [masked for _, _, masked, _ in rows]
    expected = [None if score > np.median(scores) else "fits_unread" for score in scores]
    assert [reason for *_, reason in rows] == expected
    assert expected.count(None) == 2
