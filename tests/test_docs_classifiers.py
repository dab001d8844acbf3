"""The steps that docs/classifiers.md shows are proved, with small models where the page has its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from tiny_transformers import save_tiny_text_classifier, save_tiny_vit

from mmdata.plan import plan_recipe
from mmdata.recipe import parse

PAGE = Path(__file__).resolve().parents[1] / "docs" / "classifiers.md"


def test_every_block_of_steps_is_proved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_vit(tmp_path / "models" / "watermark", ("watermark", "clean"))
    save_tiny_text_classifier(tmp_path / "models" / "toxic-bert", ("toxic", "insult"))
    (tmp_path / "models" / "sac+logos+ava1-l14-linearMSE.pth").write_bytes(b"read when it is opened")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.S | re.M)
    made = set()
    for block in blocks:
        source = {"kind": "urls", "path": "list.parquet", "caption": "caption"}
        recipe = {"name": "page", "dataset": "page", "source": source, "steps": yaml.safe_load(block)}
        made |= {s.operator.name for s in plan_recipe(parse(recipe)).steps if s.operator is not None}
    assert made == {
        "classify_image",
        "classify_text",
        "embed_text",
        "score_aesthetic",
        "score_clip",
        "score_nsfw_zero_shot",
    }
