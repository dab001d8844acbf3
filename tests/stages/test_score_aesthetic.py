"""Aesthetic scores against torch's own linear layers and against arithmetic by hand, and through a whole run."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import synthetic
import torch
from batches import make_batch
from safetensors.torch import save_file
from server import BadServer
from tiny_clip import save_tiny_clip

import mmdata
from mmdata.errors import RecipeError
from mmdata.stages.score_aesthetic import ScoreAesthetic, ScoreAestheticOptions

WIDTHS = (1024, 128, 64, 16, 1)  # the layers of LAION's V2


def deep(width: int) -> torch.nn.Sequential:
    """V2's stack: linear layers with dropout after the first three, and no activations."""
    torch.manual_seed(1)
    parts: list[torch.nn.Module] = []
    for index, out in enumerate(WIDTHS):
        parts.append(torch.nn.Linear(width, out))
        parts += [torch.nn.Dropout(0.2)] if index < 3 else []
        width = out
    torch.nn.init.normal_(parts[0].weight)  # or the scores of all vectors are nearly equal
    return torch.nn.Sequential(*parts).eval()


def opened(path: Path, **options: Any) -> ScoreAesthetic:
    stage = ScoreAesthetic(ScoreAestheticOptions(weights=str(path), **options))
    stage.open("cpu")
    return stage


def score(stage: ScoreAesthetic, vectors: list[np.ndarray | None], width: int) -> list[float | None]:
    column = pa.array(vectors, pa.list_(pa.float16(), width))
    return list(stage.compute(make_batch(None, clip_image_embedding=column))["aesthetic_score"].to_pylist())


def test_v1_is_one_layer_by_hand(tmp_path: Path):
    torch.save({"weight": torch.tensor([[3.0, 4.0]]), "bias": torch.tensor([5.0])}, tmp_path / "v1.pth")
    vectors = [np.array(v, np.float16) for v in ([1, 0], [0, 1], [0.6, 0.8], [10, 0], [0, -2])]
    # the third is (0.6, 0.8) up to 16 bits: 1.8 + 3.2 + 5; the last two are made of length 1
    assert score(opened(tmp_path / "v1.pth"), vectors, 2) == pytest.approx([8, 9, 10, 8, 1], abs=2e-3)


@pytest.mark.parametrize("form", ["pth", "safetensors", "prefixed", "wrapped"])
def test_v2_equals_torchs_own_layers(tmp_path: Path, form: str):
    network = deep(768)
    path = tmp_path / f"v2.{'safetensors' if form == 'safetensors' else 'pth'}"
    state = {f"{'layers.' if form == 'prefixed' else ''}{n}": t for n, t in network.state_dict().items()}
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state} if form == "wrapped" else state, path)
    rng = np.random.default_rng(2)
    vectors = [v.astype(np.float16) for v in rng.normal(size=(5, 768)) / 28]
    units = np.stack([v.astype(np.float64) / np.linalg.norm(v.astype(np.float64)) for v in vectors])
    with torch.no_grad():
        expected = network(torch.from_numpy(units.astype(np.float32)))[:, 0].numpy()
    found = score(opened(path), [*vectors, None], 768)
    assert found[:5] == pytest.approx(expected.tolist(), abs=1e-6)
    assert found[5] is None
    assert np.ptp(expected) > 0.01


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": torch.zeros(2, 4)}, "its last layer gives 2 numbers, not one"),
        ({"0.weight": torch.zeros(3, 4), "1.weight": torch.zeros(1, 2)}, r"layer 1 is \(1, 2\)"),
        ({"weight": torch.zeros(1, 4), "bias": torch.zeros(3)}, r"layer 0 is \(1, 4\) with a bias of \(3,\)"),
        ({"bias": torch.zeros(1)}, "layer 0 has no weight"),
        ({"a.weight": torch.zeros(1, 4), "b.weight": torch.zeros(1, 1)}, "there are two layers 0|2 stacks"),
        ({"conv.kernel": torch.zeros(1, 4)}, "'conv.kernel' is neither a weight nor a bias"),
        ({}, "0 stacks"),
        ([1, 2], "no file of tensors"),
    ],
)
def test_files_that_are_no_linear_head(tmp_path: Path, tensors: Any, message: str):
    torch.save(tensors, tmp_path / "x.pth")
    with pytest.raises(RecipeError, match=message):
        opened(tmp_path / "x.pth")


def test_a_pickle_is_not_run(tmp_path: Path):
    import os
    import pickle

    class Bomb:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (os.mkdir, (str(tmp_path / "ran"),))

    (tmp_path / "x.pth").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(RecipeError, match="no file of tensors"):
        opened(tmp_path / "x.pth")
    (tmp_path / "x.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(RecipeError, match="no file of tensors"):
        opened(tmp_path / "x.safetensors")
    assert not (tmp_path / "ran").exists()


def test_embeddings_of_another_model_are_refused(tmp_path: Path):
    torch.save({"weight": torch.zeros(1, 768)}, tmp_path / "v1.pth")
    with pytest.raises(RecipeError, match="have 512 numbers, and the head wants 768"):
        score(opened(tmp_path / "v1.pth"), [np.ones(512, np.float16)], 512)


def test_through_a_run_with_a_head_by_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """score_clip writes the embeddings, the head comes over HTTP, a filter decides; a wrong column stops the plan."""
    monkeypatch.setenv("MMDATA_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(3)
    head = torch.nn.Linear(32, 1)
    torch.save(head.state_dict(), tmp_path / "head.pth")
    data = (tmp_path / "head.pth").read_bytes()
    clip = save_tiny_clip(tmp_path / "clip")
    made = synthetic.make_dataset(tmp_path, list(range(1, 9)), 4, lambda number: synthetic.png(number * 9))
    clip_step = {"score_clip": {"model": clip, "embeddings": ["image"]}}
    with BadServer({"/head.pth": ("application/octet-stream", data)}) as server:
        options = {"weights": server.url("/head.pth"), "sha256": hashlib.sha256(data).hexdigest()}
        steps = [clip_step, {"score_aesthetic": options}, {"filter": {"pretty": "aesthetic_score > -100"}}]
        ds = mmdata.run({**made, "steps": steps}, runner="inline")
        assert server.hits["/head.pth"] == 1
    assert ds.current is not None
    [clip_set] = [s.set_name for s in ds.current.steps if s.name == "score_clip"]
    vectors = ds.sql(f'SELECT clip_image_embedding FROM columns."{clip_set}" ORDER BY row_id').fetchall()
    found = [s for (s,) in ds.sql("SELECT aesthetic_score FROM samples ORDER BY row_id").fetchall()]
    units = np.array([v for (v,) in vectors], np.float64)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    expected = units @ head.weight.detach().numpy()[0].astype(np.float64) + float(head.bias.detach()[0])
    assert found == pytest.approx(expected.tolist(), abs=1e-6)
    assert len(set(found)) > 1
    # the same content by path is the same column: nothing is computed anew
    steps[1] = {"score_aesthetic": {"weights": str(tmp_path / "head.pth"), "sha256": options["sha256"]}}
    again = mmdata.run({**made, "steps": steps}, runner="inline")
    assert again.report is not None
    assert again.report.work["score_aesthetic"].computed == 0
    steps[1] = {"score_aesthetic": {**options, "embedding": "clip_score"}}
    with pytest.raises(RecipeError, match="'clip_score' is float, and an embedding is a fixed-size list of floats"):
        mmdata.run({**made, "steps": steps}, runner="inline")
