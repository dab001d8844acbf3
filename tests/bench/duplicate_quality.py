"""How well hashes find copies: recall and precision by method, change and radius, on photographs with known changes.

By hand: `python tests/bench/duplicate_quality.py`; it needs the packages that photographs.py names. The originals are
tiles of the photographs, no two of which overlap; flat ones and those that look alike (their 16 × 16 px correlate above
0.95) are left out. Each is changed in eighteen ways. A copy that is within the radius of its original is found; a copy
that is within the radius of another original is a false pair. Precision is of all found pairs, and depends on how many
originals there are; false pairs a million compared ones do not.

Writes tests/bench/results/duplicate_quality.json, docs/duplicate-quality.svg, and the table in docs/duplicates.md.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from photographs import A, photographs
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from mmdata.stages.hash_image import image_hashes

RESULTS = Path(__file__).parent / "results" / "duplicate_quality.json"
DOCS = Path(__file__).parents[2] / "docs"
LONG_PX = 512
RADII = tuple(range(0, 17, 2))
SHOWN = (4, 6, 8, 10)
METHODS = {"phash": "phash", "phash, flip_invariant": "phash", "dhash": "dhash", "ahash": "ahash"}
COLOURS = ("#1f5fa8", "#d1731a", "#2c8a4b", "#a03070")


def jpeg(quality: int) -> Callable[[Image.Image], Image.Image]:
    """Stored as JPEG."""

    def change(picture: Image.Image) -> Image.Image:
        sink = io.BytesIO()
        picture.save(sink, "JPEG", quality=quality)
        return Image.open(io.BytesIO(sink.getvalue())).convert("RGB")

    return change


def resized(scale: float) -> Callable[[Image.Image], Image.Image]:
    """Both sides by `scale`."""
    return lambda p: p.resize((round(p.width * scale), round(p.height * scale)), Image.Resampling.BICUBIC)


def cropped(share: float) -> Callable[[Image.Image], Image.Image]:
    """`share` of each side cut off, two thirds of it at the left and the top."""

    def change(picture: Image.Image) -> Image.Image:
        left, top = round(picture.width * share * 2 / 3), round(picture.height * share * 2 / 3)
        return picture.crop(
            (left, top, left + round(picture.width * (1 - share)), top + round(picture.height * (1 - share)))
        )

    return change


def captioned(picture: Image.Image) -> Image.Image:
    """A white bar with text below, an eighth of the height."""
    bar = picture.height // 8
    whole = Image.new("RGB", (picture.width, picture.height + bar), "white")
    whole.paste(picture)
    ImageDraw.Draw(whole).text((10, picture.height + bar // 4), "a photograph, as somebody shared it", fill="black")
    return whole


def tinted(picture: Image.Image) -> Image.Image:
    """Red 15 % up, blue 15 % down."""
    red, green, blue = picture.split()
    return Image.merge("RGB", (red.point(lambda v: min(255, v * 1.15)), green, blue.point(lambda v: v * 0.85)))


CHANGES: dict[str, list[Callable[[Image.Image], Image.Image]]] = {
    "JPEG 95, 75": [jpeg(95), jpeg(75)],
    "JPEG 50, 30": [jpeg(50), jpeg(30)],
    "resize × 0.25 to 1.5": [resized(0.25), resized(0.5), resized(1.5)],
    "blur σ 1, 3 px": [
        lambda p: p.filter(ImageFilter.GaussianBlur(1)),
        lambda p: p.filter(ImageFilter.GaussianBlur(3)),
    ],
    "colour, brightness, contrast": [
        tinted,
        lambda p: ImageEnhance.Brightness(p).enhance(1.2),
        lambda p: ImageEnhance.Contrast(p).enhance(1.3),
    ],
    "crop 5 %": [cropped(0.05)],
    "crop 10 %": [cropped(0.1)],
    "crop 20 %": [cropped(0.2)],
    "caption bar": [captioned],
    "rotation 2°": [lambda p: p.rotate(2, Image.Resampling.BICUBIC)],
    "rotation 5°": [lambda p: p.rotate(5, Image.Resampling.BICUBIC)],
    "mirror image": [ImageOps.mirror],
}


def originals(most: int) -> list[Image.Image]:
    """Tiles of 4 : 3 of the largest picture of each wallpaper."""
    largest: dict[Path, Path] = {}
    for path in photographs(A):
        known = largest.get(path.parent) if path.parent.name == "images" else None
        if known is None or path.stat().st_size > known.stat().st_size:
            largest[path.parent if path.parent.name == "images" else path] = path
    found: list[Image.Image] = []
    seen = np.zeros((0, 256))
    for path in largest.values():
        with Image.open(path) as opened:
            whole = opened.convert("RGB")
        for row in range(4):
            for column in range(4):
                width, height = whole.width // 4, whole.height // 4
                box = (column * width, row * height, (column + 1) * width, (row + 1) * height)
                tile = ImageOps.fit(whole.crop(box), (LONG_PX, LONG_PX * 3 // 4), Image.Resampling.BICUBIC)
                small = np.asarray(tile.convert("L").resize((16, 16), Image.Resampling.BOX), float).ravel()
                if small.std() < 8:
                    continue
                small = (small - small.mean()) / np.linalg.norm(small - small.mean())
                if (
                    len(seen)
                    and max((seen @ small).max(), (seen.reshape(-1, 16, 16)[:, :, ::-1].reshape(-1, 256) @ small).max())
                    > 0.95
                ):
                    continue
                seen = np.vstack([seen, small])
                found.append(tile)
                if len(found) == most:
                    return found
    return found


def distances(pictures: list[Image.Image]) -> dict[str, dict[str, np.ndarray]]:
    """Method → change → (copies, originals) bits; copy i is made of original i mod the number of originals."""

    def hashed(some: list[Image.Image]) -> dict[str, np.ndarray]:
        arrays = [np.asarray(p) for p in some]
        plain = image_hashes(arrays, ["phash", "dhash", "ahash"])
        return {**plain, "phash, flip_invariant": image_hashes(arrays, flip_invariant=True)["phash"]}

    base = hashed(pictures)
    found: dict[str, dict[str, np.ndarray]] = {method: {} for method in METHODS}
    for change, ways in CHANGES.items():
        copies = hashed([way(p) for way in ways for p in pictures])
        for method in METHODS:
            found[method][change] = np.bitwise_count(copies[method][:, None] ^ base[method][None, :])
    return found


def figures(of_changes: dict[str, np.ndarray], radius: int) -> dict[str, object]:
    """Recall of each change and of all, precision, and false pairs a million."""
    recall: dict[str, float] = {}
    right = wrong = compared = copies = 0
    for change, bits in of_changes.items():
        own = np.arange(len(bits)) % bits.shape[1]
        near = bits <= radius
        hit = near[np.arange(len(bits)), own]
        recall[change] = round(float(hit.mean()), 4)
        right, wrong = right + int(hit.sum()), wrong + int(near.sum() - hit.sum())
        copies, compared = copies + len(bits), compared + near.size - len(bits)
    return {
        "recall": recall,
        "recall_of_all": round(right / copies, 4),
        "precision": round(right / max(1, right + wrong), 4),
        "false_per_million": round(1e6 * wrong / compared, 1),
    }


def table(report: dict[str, dict[str, dict[str, object]]]) -> str:
    """Recall by change at some radii, then precision, as Markdown."""
    columns = [(m, r) for m in ("phash", "phash, flip_invariant") for r in SHOWN] + [("dhash", 10), ("ahash", 6)]
    short = {"phash": "p", "phash, flip_invariant": "flip", "dhash": "d", "ahash": "a"}
    lines = [
        "| change | " + " | ".join(f"{short[m]} {r}" for m, r in columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for change in CHANGES:
        cells = [f"{100 * report[m][str(r)]['recall'][change]:.0f}" for m, r in columns]  # type: ignore[index]
        lines.append(f"| {change} | " + " | ".join(cells) + " |")
    for name, key, form in (("all", "recall_of_all", "{:.0%}"), ("precision", "precision", "{:.1%}")):
        lines.append(f"| **{name}** | " + " | ".join(form.format(report[m][str(r)][key]) for m, r in columns) + " |")
    false = " | ".join(f"{report[m][str(r)]['false_per_million']:g}" for m, r in columns)
    return "\n".join([*lines, f"| false pairs a million | {false} |"])


def plot(report: dict[str, dict[str, dict[str, object]]]) -> str:
    """Recall by radius, and by false pairs a million, as SVG."""
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 330" font-family="sans-serif" font-size="11">']
    parts.append('<rect width="760" height="330" fill="white"/>')
    ticks = [1, 10, 100, 1000, 10000, 100000]
    panels = (
        (50, "radius, bits", [(r, str(r)) for r in RADII], lambda row: float(row[0]), 0, RADII[-1]),
        (
            430,
            "false pairs a million compared",
            [(np.log10(t), f"{t:,}" if t > 1 else "≤ 1") for t in ticks],
            lambda row: np.log10(max(1, row[1]["false_per_million"])),
            0,
            5,
        ),
    )
    for left, label, marks, x_of, low, high in panels:
        across = lambda value, left=left, low=low, high=high: left + 300 * (value - low) / (high - low)  # noqa: E731
        parts.append(f'<rect x="{left}" y="20" width="300" height="240" fill="none" stroke="#999"/>')
        for share in range(0, 101, 20):
            y = 260 - 2.4 * share
            parts.append(f'<line x1="{left}" x2="{left + 300}" y1="{y}" y2="{y}" stroke="#ddd"/>')
            parts.append(f'<text x="{left - 5}" y="{y + 4}" text-anchor="end">{share}</text>')
        for value, text in marks:
            parts.append(f'<text x="{across(value):.1f}" y="275" text-anchor="middle">{text}</text>')
        parts.append(f'<text x="{left + 150}" y="292" text-anchor="middle">{label}</text>')
        for colour, method in zip(COLOURS, METHODS, strict=True):
            rows = [(r, report[method][str(r)]) for r in RADII]
            points = " ".join(
                f"{across(x_of(row)):.1f},{260 - 240 * float(row[1]['recall_of_all']):.1f}" for row in rows
            )  # type: ignore[arg-type]
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
    parts.append('<text x="50" y="14">copies found, %</text>')
    for index, (colour, method) in enumerate(zip(COLOURS, METHODS, strict=True)):
        parts.append(f'<rect x="{60 + 170 * index}" y="305" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{77 + 170 * index}" y="315">{method}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--originals", type=int, default=400)
    pictures = originals(parser.parse_args().originals)
    found = distances(pictures)
    report = {m: {str(r): figures(found[m], r) for r in RADII} for m in METHODS}
    rows = table(report)
    print(f"{len(pictures)} originals\n{rows}")
    document = {
        "originals": len(pictures),
        "copies": len(pictures) * sum(map(len, CHANGES.values())),
        "methods": report,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")
    (DOCS / "duplicate-quality.svg").write_text(plot(report))
    page = DOCS / "duplicates.md"
    text = page.read_text()
    begin, end = "<!-- quality -->\n", "\n<!-- /quality -->"
    if begin in text:
        head, rest = text.split(begin)
        page.write_text(head + begin + rows + end + rest.split(end)[1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
