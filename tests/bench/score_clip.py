"""Pairs per second of `score_clip`, end to end over a dataset on disk, beside open_clip's bare forward loop.

Run by hand: `python tests/bench/score_clip.py`. Weights are random, which costs what trained ones cost. The bare loop
runs both encoders over one preloaded batch of the same shape, precision and threads: no decoding, no tokens, no files.
End to end: `mmdata.run` in this process over JPEGs of 256 px, from the first shard's rows to the last verdict; what
comes before (plan, fingerprints, loading the model) is start-up and told apart. On a CPU ViT-B-32 in fp32. On a GPU
B-32 and L-14 in bf16 with embeddings stored, against the smaller of the bare loop and decoding alone on all threads;
utilisation is NVML's. Rounds alternate and the figure is the median of the rounds' ratios. The figures go to
tests/bench/results/score_clip.json.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fixtures"))
import synthetic

import mmdata
import mmdata.pool
from mmdata import open_stages, work
from mmdata.media import image
from mmdata.stages.score_clip import ScoreClip

RESULTS = Path(__file__).parent / "results" / "score_clip.json"
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def photograph(number: int) -> bytes:
    """A JPEG of 256 × 341 px, different for every number."""
    small = np.random.default_rng(number).integers(0, 256, (24, 32, 3), np.uint8)
    sink = io.BytesIO()
    Image.fromarray(small).resize((341, 256), Image.Resampling.BICUBIC).save(sink, "JPEG", quality=90)
    return sink.getvalue()


def save_model(name: str, folder: Path) -> str:
    """An open_clip folder with random weights; returns the `model` option that names it."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = open_clip.create_model(name)
    preprocess = open_clip.get_model_preprocess_cfg(model)
    config = {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": preprocess}
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


class Bare:
    """open_clip's own encoders over one preloaded batch."""

    def __init__(self, model: str, rows: int, precision: str, device: str) -> None:
        import open_clip
        import torch

        self._rows, self._device = rows, device
        self._model = open_clip.create_model(model, precision=precision, device=device).eval()
        size = open_clip.get_model_preprocess_cfg(self._model)["size"]
        side = size if isinstance(size, int) else size[0]
        self._images = torch.randn(rows, 3, side, side, device=device).to(getattr(torch, DTYPES[precision]))
        self._tokens = open_clip.get_tokenizer(model)(["a photograph of a house by the river"] * rows).to(device)

    def rate(self, batches: int) -> float:
        """Pairs per second."""
        import torch

        began = time.perf_counter()
        with torch.inference_mode():
            for _ in range(batches):
                images = torch.nn.functional.normalize(self._model.encode_image(self._images).float(), dim=-1)
                texts = torch.nn.functional.normalize(self._model.encode_text(self._tokens).float(), dim=-1)
                (images * texts).sum(dim=-1).cpu()
        return batches * self._rows / (time.perf_counter() - began)


def decode_rate(data: list[bytes], side: int) -> float:
    """Pictures per second decoded and resized on all threads, and nothing else."""
    many = data * max(1, 2000 // len(data))
    began = time.perf_counter()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(lambda d: image.transform(image.decode(d), side), many))
    return len(many) / (time.perf_counter() - began)


class EndToEnd:
    """Runs over fresh copies of one dataset; start-up ends when the first shard begins, and leaves `open` out."""

    def __init__(self, folder: Path, data: list[bytes], rows: int, shard_rows: int, step: dict[str, Any]) -> None:
        self._folder, self._rows, self._step, self._runs = folder, rows, step, 0
        self._made = folder / "made"
        pictures = {n: data[n % len(data)] for n in range(rows)}
        self._document = synthetic.make_dataset(self._made, range(rows), shard_rows, pictures.get)

    def rate(self) -> tuple[float, float, float]:
        """(pairs per second, start-up seconds, seconds of the rest)."""
        self._runs += 1
        folder = self._folder / f"run{self._runs}"
        shutil.copytree(self._made, folder)
        document = {**self._document, "dataset": str(folder / "dataset"), "steps": [{"score_clip": self._step}]}
        began, first, opening = time.perf_counter(), [], [0.0]
        run_pass, opened = work.run_pass, ScoreClip.open

        def timed_pass(*arguments: Any) -> Any:
            first.append(time.perf_counter())
            return run_pass(*arguments)

        def timed_open(stage: ScoreClip, device: str) -> None:
            at = time.perf_counter()
            opened(stage, device)
            if first:
                opening[0] += time.perf_counter() - at

        mmdata.pool.run_pass, ScoreClip.open = timed_pass, timed_open  # type: ignore[method-assign]
        try:
            ds = mmdata.run(document, runner="inline")
        finally:
            mmdata.pool.run_pass, ScoreClip.open = run_pass, opened  # type: ignore[method-assign]
            open_stages.close_stages()
        end = time.perf_counter()
        [(scored,)] = ds.sql("SELECT count(clip_score) FROM samples").fetchall()
        assert scored == sum(n % 9 > 0 for n in range(self._rows)), scored
        shutil.rmtree(folder)
        start_up = first[0] - began + opening[0]
        return self._rows / (end - began - start_up), start_up, end - began - start_up


class Utilisation:
    """Mean of NVML's GPU utilisation in percent, sampled ten times a second; None without NVML."""

    def __enter__(self) -> Utilisation:
        self._samples: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        import torch

        while not self._stop.wait(0.1):
            try:
                self._samples.append(torch.cuda.utilization())
            except Exception:  # noqa: BLE001  without NVML's binding there is no figure
                return

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def mean(self) -> float | None:
        """Percent."""
        return round(statistics.mean(self._samples), 1) if self._samples else None


def measure(name: str, device: str, precision: str, size: int, rows: int, rounds: int, folder: Path) -> dict[str, Any]:
    """All figures of one model."""
    data = [photograph(n) for n in range(256)]
    model = save_model(name, folder / "model")
    step = {"model": model, "precision": precision, "batch_size": size}
    if device == "cuda":
        step["embeddings"] = ["image", "text"]
    whole = EndToEnd(folder, data, rows, min(rows, 10_000), step)
    bare = Bare(model, size, precision, device)
    batches = max(2, rows // size)
    bare.rate(2)
    decoding = decode_rate(data, 224)
    rates, starts, utilisation = [], [], []
    for _ in range(rounds):
        pure = bare.rate(batches)
        with Utilisation() as used:
            ours, start_up, _ = whole.rate()
        rates.append((ours, pure, ours / (min(pure, decoding) if device == "cuda" else pure)))
        starts.append(start_up)
        utilisation.append(used.mean)
        print(f"{name} {precision} {device}: end to end {ours:.1f}/s, bare {pure:.1f}/s, ratio {rates[-1][2]:.3f}, "
              f"start-up {start_up:.1f} s, GPU {used.mean} %")  # fmt: skip
    ours, pure, ratio = (statistics.median(column) for column in zip(*rates, strict=True))
    return {
        "device": device,
        "precision": precision,
        "batch_size": size,
        "rows": rows,
        "end_to_end_per_s": round(ours, 1),
        "bare_forward_per_s": round(pure, 1),
        "decode_per_s": round(decoding),
        "start_up_s": round(statistics.median(starts), 2),
        "gpu_utilisation_percent": utilisation if device == "cuda" else None,
        "ratio": round(ratio, 3),
    }


def main() -> int:
    """Measure, print, write."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=None, help="pairs; default 512 on a CPU, 40,000 on a GPU")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    cases = [("ViT-B-32", "bf16", 256), ("ViT-L-14", "bf16", 128)] if on_gpu else [("ViT-B-32", "fp32", 32)]
    found = {}
    for name, precision, size in cases:
        rows = options.rows or (40_000 if on_gpu else 512)
        with tempfile.TemporaryDirectory() as folder:
            place = "cuda" if on_gpu else "cpu"
            found[name] = measure(name, place, precision, size, rows, options.rounds, Path(folder))
        print(name, found[name])
    machine: dict[str, Any] = {"cpus": len(os.sched_getaffinity(0)), "torch_threads": torch.get_num_threads()}
    machine |= {"load": round(os.getloadavg()[0], 1), "gpu": torch.cuda.get_device_name(0) if on_gpu else None}
    RESULTS.parent.mkdir(exist_ok=True)
    before = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    before["gpu" if on_gpu else "cpu"] = {"machine": machine, "models": found}
    RESULTS.write_text(json.dumps(before, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
