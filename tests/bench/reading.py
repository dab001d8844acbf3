"""Samples per second of `Dataset.to_torch`, beside webdataset over an export of the same dataset; one process.

Run by hand: `python tests/bench/reading.py`. Both read shuffled, three times each; the figure is the best. webdataset
mixes 1,000 samples, `to_torch` the rows of all 4 shards. The figures go to tests/bench/results/reading.json.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fixtures"))
import synthetic

import mmdata

RESULTS = Path(__file__).parent / "results" / "reading.json"
ROWS, SHARD_ROWS, ROUNDS = 4000, 1000, 3
FORMS = {"bytes": None, "tensor": "rgb8", "pil": "pil"}  # mmdata's name → webdataset's


def photograph() -> bytes:
    """A JPEG of 256 × 256 px, about 24 kB."""
    small = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    sink = io.BytesIO()
    Image.fromarray(small).resize((256, 256), Image.Resampling.BICUBIC).save(sink, "JPEG", quality=95)
    return sink.getvalue()


def rate(samples: Callable[[], Iterable[Any]]) -> float:
    """Samples per second, reading all of them."""
    began = time.perf_counter()
    count = sum(1 for _ in samples())
    assert count == ROWS, count
    return count / (time.perf_counter() - began)


def main() -> int:
    """Measure, print, write."""
    import webdataset

    data = photograph()
    with tempfile.TemporaryDirectory() as folder:
        recipe = synthetic.make_dataset(Path(folder), list(range(ROWS)), SHARD_ROWS, picture=lambda number: data)
        ds = mmdata.run(recipe, runner="inline")
        ds.export(f"{folder}/out")
        tars = sorted(str(p) for p in Path(folder, "out").glob("*.tar"))

        def theirs(form: str | None) -> Iterable[Any]:
            found = webdataset.WebDataset(tars, shardshuffle=False).shuffle(1000)
            return found.decode(form) if form else found

        found: dict[str, dict[str, float]] = {}
        for form, their_form in FORMS.items():
            ours = max(rate(lambda f=form: ds.to_torch(decode=f)) for _ in range(ROUNDS))
            peer = max(rate(lambda f=their_form: theirs(f)) for _ in range(ROUNDS))
            found[form] = {"to_torch": round(ours), "webdataset": round(peer), "ratio": round(ours / peer, 2)}
            print(form, found[form])
    machine = {"cpus": os.cpu_count(), "load": round(os.getloadavg()[0], 1), "rows": ROWS, "picture_bytes": len(data)}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": machine, "samples_per_s": found}, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
