"""The worked examples of docs/operators.md run as they stand there, with the values they should have."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import synthetic
import yaml
from PIL import Image

import mmdata
from mmdata.errors import RecipeError
from mmdata.recipe import parse

PAGE = (Path(__file__).resolve().parents[1] / "docs/operators.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", PAGE, re.S | re.M))
RECIPES = [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", PAGE, re.S | re.M)]
ROWS = 12


def texture(number: int) -> npt.NDArray[np.uint8]:
    """A grey picture of its own, (32, 32): what the model sees of it is the picture itself."""
    return np.random.default_rng(number).integers(0, 256, (32, 32)).astype(np.uint8)


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(texture(number)).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], mmdata.dataset.Dataset]:
    """Runs the recipe of the page that names this file, over pictures of the test."""
    monkeypatch.chdir(tmp_path)
    base = synthetic.make_dataset(tmp_path / "data", list(range(ROWS)), shard_rows=5, picture=png)

    def run_one(name: str) -> Any:
        (tmp_path / name).write_text(FILES[name])
        [steps] = [r for r in RECIPES if r["operators"] == [name]]
        return mmdata.run({**base, **steps}, runner="inline")

    return run_one


def test_every_block_of_the_page_is_tried() -> None:
    assert sorted(FILES) == ["colour.py", "per_site.py", "sharpness.py"]
    assert len(re.findall(r"^```python", PAGE, re.M)) == 3
    assert sorted(r["operators"][0] for r in RECIPES) == sorted(FILES)


def test_the_stage_in_six_lines(run: Callable[[str], Any]) -> None:
    """Against SciPy's Laplacian, with the border mirrored about the outermost pixels as OpenCV's is by default."""
    from scipy.ndimage import laplace

    made = run("sharpness.py")
    got = [value for (value,) in made.sql("SELECT sharpness FROM samples ORDER BY row_id").fetchall()]
    expected = [laplace(texture(n).astype(float), mode="mirror").var() for n in range(ROWS)]
    assert got == pytest.approx(expected, rel=1e-5)
    assert made.funnel().kept == ROWS  # noise is sharp
    code = [line for line in FILES["sharpness.py"].splitlines() if line.strip()]
    assert len(code) == 6


def test_the_model(run: Callable[[str], Any], tmp_path: Path) -> None:
    import torch

    weight = torch.linspace(-1, 1, 3 * 32 * 32)[None]
    torch.save({"weight": weight, "bias": torch.tensor([0.5])}, tmp_path / "colour.pt")
    made = run("colour.py")
    got = [value for (value,) in made.sql("SELECT colour_score FROM samples ORDER BY row_id").fetchall()]
    pictures = [np.repeat(texture(n)[:, :, None], 3, axis=2).reshape(-1) for n in range(ROWS)]
    expected = [float(p.astype(float) @ weight[0].double().numpy() / 255 + 0.5) for p in pictures]
    assert got == pytest.approx(expected, abs=1e-3)
    before = made.current.steps[0].set_name
    torch.save({"weight": weight, "bias": torch.tensor([1.5])}, tmp_path / "colour.pt")
    after = run("colour.py")
    assert after.current.steps[0].set_name != before
    assert [v for (v,) in after.sql("SELECT colour_score FROM samples ORDER BY row_id").fetchall()] == pytest.approx(
        [v + 1 for v in got], abs=1e-4
    )


def test_the_group(run: Callable[[str], Any]) -> None:
    made = run("per_site.py")
    ranks = made.sql("SELECT number, site_rank FROM samples ORDER BY site_rank").fetchall()
    # One host; longer captions first (two digits, then one), ties by row; 0 and 9 have no caption and come last.
    assert [n for n, _ in ranks] == [10, 11, *(n for n in range(1, 9)), 0, 9]
    assert [r for _, r in ranks] == list(range(1, ROWS + 1))
    assert made.funnel().kept == 2


def test_a_class_version_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "per_site.py").write_text(FILES["per_site.py"])
    recipe = synthetic.synthetic_recipe(tmp_path, [1], operators=["per_site.py"])
    [operator] = parse(recipe).own.values()
    assert len(str(operator.version)) == 64
    with pytest.raises(RecipeError, match="no operator is called"):
        parse({**recipe, "operators": [], "steps": ["rank_in_site"]})
