"""Scores on a GPU, within the tolerance of each precision of those on a CPU; pictures cross from pinned memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import skimage
import torch
from batches import make_batch, noise
from tiny_clip import save_tiny_clip

from mmdata.stages.score_clip import ScoreClip, ScoreClipOptions

CAPTIONS = [None if i == 7 else f"picture {i} of a cup of coffee" for i in range(70)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_gpu_gives_what_a_cpu_gives(tmp_path: Path, precision: str) -> None:
    """More rows than a batch, so that the pinned buffer is filled again while the device may still be at work."""
    model = save_tiny_clip(tmp_path / "clip")
    pictures = [skimage.data.coffee(), *(noise(60, 50 + i, i) for i in range(69))]
    found = {}
    for device, kind in (("cpu", "fp32"), ("cuda", precision)):
        stage = ScoreClip(ScoreClipOptions(model=model, precision=kind, embeddings=["image", "text"]))
        stage.open(device)
        found[device] = stage.compute(make_batch(pictures, caption=pa.array(CAPTIONS)))
    tolerance = ScoreClip.contract(ScoreClipOptions(model=model, precision=precision)).tolerance
    assert found["cuda"]["clip_score"].is_null().to_pylist() == [i == 7 for i in range(70)]
    for left, right in zip(*(found[d]["clip_score"].to_pylist() for d in ("cpu", "cuda")), strict=True):
        assert left is right or left == pytest.approx(right, abs=tolerance)
    for column in ("clip_image_embedding", "clip_text_embedding"):
        vectors = [np.array(found[d][column].drop_null().to_pylist(), np.float32) for d in ("cpu", "cuda")]
        assert (vectors[0] * vectors[1]).sum(axis=1).min() > 1 - tolerance - 2e-3
