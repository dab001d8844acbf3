"""Hashes a second of `hash_image` beside `imagehash.phash`, each on one thread, given decoded pictures of 341 × 256 px.

Run by `make bench`, or by hand: `python tests/bench/hashing.py`. The pictures are crops of the photographs that
scikit-image brings. `imagehash` is given them as Pillow pictures (RGB), `hash_image` as the arrays that a batch holds.
Both go in turns; the best of each counts. Exit code 1 below 3 times imagehash's, or where values differ in more than
one picture of a hundred. The figures go to tests/bench/results/hashing.json.
"""

from __future__ import annotations

import os

os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")  # before numpy is imported

import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import imagehash
import numpy as np
import PIL
import skimage
from PIL import Image

from mmdata.stages.hash_image import image_hashes

RESULTS = Path(__file__).parent / "results" / "hashing.json"
NAMES = ("astronaut", "coffee", "cat", "rocket", "chelsea", "camera", "moon", "clock")
PICTURES, ROUNDS = 96, 15
LEAST_RATIO = 3.0


def pictures() -> list[np.ndarray]:
    """Crops of 4 : 3, (256, 341, 3)."""
    rng = np.random.default_rng(3)
    found = []
    for index in range(PICTURES):
        whole = Image.fromarray(getattr(skimage.data, NAMES[index % len(NAMES)])()).convert("RGB")
        height = int(rng.integers(150, min(whole.height, whole.width * 3 // 4)))
        width = height * 4 // 3
        left, top = int(rng.integers(0, whole.width - width + 1)), int(rng.integers(0, whole.height - height + 1))
        crop = whole.crop((left, top, left + width, top + height))
        found.append(np.asarray(crop.resize((341, 256), Image.Resampling.BICUBIC)))
    return found


def main() -> int:
    """Measure, print, write; 1 when a limit is broken."""
    cv2.setNumThreads(1)
    arrays = pictures()
    images = [Image.fromarray(a) for a in arrays]
    work: dict[str, Callable[[], Any]] = {
        "imagehash.phash": lambda: [imagehash.phash(i) for i in images],
        "hash_image": lambda: image_hashes(arrays),
        "hash_image, flip_invariant": lambda: image_hashes(arrays, flip_invariant=True),
        "hash_image, phash + dhash + ahash": lambda: image_hashes(arrays, ["phash", "dhash", "ahash"]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(ROUNDS):
        for name, run in work.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    theirs = np.array([int(str(h), 16) for h in work["imagehash.phash"]()], np.uint64)
    equal = float((image_hashes(arrays)["phash"] == theirs).mean())
    peer = min(seconds["imagehash.phash"])
    report: dict[str, Any] = {}
    for name, found in seconds.items():
        best = min(found)
        report[name] = {
            "ms_a_picture": round(1000 * best / PICTURES, 4),
            "hashes_a_second": round(PICTURES / best),
            "ratio_to_imagehash": round(peer / best, 2),
        }
        print(f"{name:36} {report[name]}")
    print(f"equal to imagehash: {equal:.1%}")
    report["equal_to_imagehash"] = equal
    report["machine"] = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    report["versions"] = {"python": platform.python_version(), "numpy": np.__version__, "pillow": PIL.__version__}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=2) + "\n")
    return int(report["hash_image"]["ratio_to_imagehash"] < LEAST_RATIO or equal < 0.99)


if __name__ == "__main__":
    sys.exit(main())
