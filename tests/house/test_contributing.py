"""The two stages that CONTRIBUTING.md shows run as they stand there."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batches import make_batch, png
from house import ROOT
from server import BadServer

import mmdata
from mmdata import registry
from mmdata.stage import Failed, Stage

RED = np.zeros((90, 120, 3), np.uint8)
RED[:, :, 0] = 200
GREY = np.full((90, 120, 3), 50, np.uint8)
BLACK = np.zeros((90, 120, 3), np.uint8)


def _example(number: int, folder: Path) -> dict[str, Any]:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    path = folder / "example.py"
    path.write_text(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[number], encoding="utf-8")
    return runpy.run_path(str(path))


def test_the_decorator_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    made: type[Stage[Any]] = _example(0, tmp_path)["measure_redness"]
    assert registry.operator("measure_redness") is made
    stage = made(made.options_type())
    values = stage.compute(make_batch([png(RED), png(GREY), png(BLACK)]))["redness"]
    assert list(values) == pytest.approx([1.0, 1 / 3, 0.0])


def test_the_decorator_form_in_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    _example(0, tmp_path)
    pictures = {"/red.png": ("image/png", png(RED)), "/grey.png": ("image/png", png(GREY))}
    with BadServer(pictures) as server:
        (tmp_path / "list.txt").write_text(f"{server.url('/red.png')}\n{server.url('/grey.png')}\n")
        recipe = {
            "name": "redness",
            "dataset": str(tmp_path / "dataset"),
            "source": {"kind": "urls", "path": str(tmp_path / "list.txt")},
            "fetch": {"allow_private": True, "resize_mode": "no", "encode_format": "png"},
            "steps": ["measure_redness", {"filter": {"reddish": "redness > 0.5"}}],
        }
        ds = mmdata.run(recipe, runner="inline", quiet=True)
    found = ds.sql("SELECT redness, reason FROM samples ORDER BY row_id").fetchall()
    assert [r for r, _ in found] == pytest.approx([1.0, 1 / 3])
    assert [reason for _, reason in found] == [None, "reddish"]


def test_the_class_form(tmp_path: Path) -> None:
    made: type[Stage[Any]] = _example(1, tmp_path)["MeasureRedness"]
    stage = made(made.options_type(size=16))
    values = stage.compute(make_batch([png(RED), png(GREY), png(BLACK)]))["redness"]
    assert list(values[:2]) == pytest.approx([1.0, 1 / 3])
    assert values[2] == Failed("black")
