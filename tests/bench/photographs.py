"""Two corpora of JPEGs cut from the photographs of Debian's wallpaper packages; the same numbers give the same files.

Run by hand: `python tests/bench/photographs.py FOLDER` makes `FOLDER/A` and `FOLDER/B` unless they are there. It needs
the packages mate-backgrounds, plasma-workspace-wallpapers and ukui-wallpapers. Drawings and gradients, told by how few
bits a pixel of theirs takes, are left out: no list of the web is made of them.
A, web-like: 4,096 crops, long side log-normal around 730 px, quality 75 to 95, three of ten progressive, 120 kB on
average. B, camera-like: 1,000 crops, long side 2,000 to 3,000 px, 630 kB on average.
"""

from __future__ import annotations

import io
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

FOLDERS = ("/usr/share/backgrounds", "/usr/share/wallpapers")
RATIOS = (4 / 3, 3 / 2, 16 / 9, 1.0, 3 / 4, 2 / 3)
RATIO_SHARES = (0.35, 0.2, 0.15, 0.1, 0.12, 0.08)


@dataclass(frozen=True)
class Corpus:
    """`count` JPEGs; a long side is `median_px` times e to a normal of `spread`, or uniform in `uniform_px`."""

    name: str
    count: int
    qualities: tuple[int, int]
    median_px: float = 0.0
    spread: float = 0.0
    uniform_px: tuple[int, int] | None = None
    least_source_px: int = 1000
    least_bits: float = 0.7  # of a pixel of the photograph at 1,000 px and quality 86

    def long_side(self, rng: np.random.Generator) -> int:
        if self.uniform_px is not None:
            return int(rng.integers(*self.uniform_px, endpoint=True))
        return int(np.clip(self.median_px * np.exp(rng.normal(0, self.spread)), 160, 2400))


A = Corpus("A", 4096, (75, 95), median_px=730, spread=0.55, least_bits=0.8)
B = Corpus("B", 1000, (82, 94), uniform_px=(2000, 3000), least_source_px=2000)


def photographs(corpus: Corpus) -> list[Path]:
    """The pictures that crops are cut from, in a fixed order."""
    found = []
    for folder in FOLDERS:
        for path in sorted(Path(folder).rglob("*")):
            if path.suffix.lower() in (".jpg", ".png") and path.is_file() and not path.is_symlink():
                with Image.open(path) as image:
                    if min(image.size) < 1000 or max(image.size) < corpus.least_source_px:
                        continue
                    small = image.convert("RGB")
                small.thumbnail((1000, 1000))
                sink = io.BytesIO()
                small.save(sink, "JPEG", quality=86)
                if 8 * len(sink.getvalue()) >= corpus.least_bits * small.width * small.height:
                    found.append(path)
    assert found, f"no photographs in {FOLDERS}: install the packages named at the top of {__file__}"
    return found


def _crops(task: tuple[Corpus, Path, list[int], str]) -> int:
    corpus, photograph, numbers, folder = task
    with Image.open(photograph) as image:
        whole = image.convert("RGB")
    total = 0
    for number in numbers:
        rng = np.random.default_rng([ord(corpus.name), number])
        long = corpus.long_side(rng)
        ratio = float(rng.choice(RATIOS, p=RATIO_SHARES))
        size = (long, max(1, round(long / ratio))) if ratio >= 1 else (max(1, round(long * ratio)), long)
        most = min(whole.width / size[0], whole.height / size[1])  # px of the photograph to one of the crop
        scale = most * rng.uniform(0.7, 1.0)
        cut = (size[0] * scale, size[1] * scale)
        left, top = rng.uniform(0, whole.width - cut[0]), rng.uniform(0, whole.height - cut[1])
        box = (left, top, left + cut[0], top + cut[1])
        crop = whole.resize(size, Image.Resampling.BICUBIC, box, reducing_gap=3.0)
        quality = int(rng.integers(*corpus.qualities, endpoint=True))
        path = Path(folder, f"{number:05d}.jpg")
        crop.save(path, "JPEG", quality=quality, progressive=bool(rng.random() < 0.3))
        total += path.stat().st_size
    return total


def make(corpus: Corpus, folder: Path) -> Path:
    """`<folder>/<corpus>` with its JPEGs `00000.jpg` …, made in another place first; as it is when it is there."""
    out = folder / corpus.name
    if out.exists():
        return out
    scratch = folder / f".{corpus.name}.{os.getpid()}"
    scratch.mkdir(parents=True)
    sources = photographs(corpus)
    shares = [list(range(n, corpus.count, len(sources))) for n in range(len(sources))]
    with ProcessPoolExecutor() as pool:
        total = sum(pool.map(_crops, [(corpus, p, s, str(scratch)) for p, s in zip(sources, shares, strict=True)]))
    scratch.rename(out)
    print(f"{out}: {corpus.count} of {len(sources)} photographs, {total / corpus.count / 1000:.1f} kB on average")
    return out


def main() -> int:
    """Make both."""
    folder = Path(sys.argv[1])
    for corpus in (A, B):
        make(corpus, folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
