"""Planted copies of stamps and captions, from the command line: an evaluation set as a dataset and as lists."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from stamps import stamp_pairs

import mmdata
from mmdata.joins.decontaminate import DecontaminateOptions
from mmdata.plan import plan_recipe
from mmdata.recipe import parse

ROOT = Path(__file__).resolve().parents[2]

MMDATA = [sys.executable, "-c", "from mmdata.cli import main; main()"]
CAPTION = "a photograph of an old steam train crossing the bridge at noon"


def typed(folder: Path, *args: str, code: int = 0) -> str:
    done = subprocess.run([*MMDATA, *args], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def write(folder: Path, name: str, picture: Image.Image, caption: str | None) -> None:
    folder.mkdir(exist_ok=True)
    picture.save(folder / name)
    if caption is not None:
        (folder / name).with_suffix(".txt").write_text(caption)


def recipe(folder: Path, name: str, *steps: Any, images: str = "") -> str:
    source = {"kind": "images", "path": str(folder / f"{images or name}-images")}
    document = {"name": name, "dataset": str(folder / name), "source": source, "steps": ["hash_image", *steps]}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    return f"{name}.yaml"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve stamps as the evaluation set `exam`; a pool of others, two smaller copies and two copied captions."""
    folder = tmp_path_factory.mktemp("exam")
    stamps = [p for p, _ in stamp_pairs()][:300:10]
    pictures = []
    for path in stamps:
        with Image.open(path) as opened:
            rgba = opened.convert("RGBA")
            pictures.append(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"))
    for number in range(12):
        write(
            folder / "exam-images", f"e{number:02d}.png", pictures[number], CAPTION if number == 5 else f"item {number}"
        )
    for number in range(12, 28):
        write(folder / "pool-images", f"p{number:02d}.png", pictures[number], f"picture {number}")
    half = pictures[3].resize((pictures[3].width // 2, pictures[3].height // 2), Image.Resampling.LANCZOS)
    write(folder / "pool-images", "q0.jpg", half, "a smaller copy")
    write(folder / "pool-images", "q1.jpg", pictures[7], None)
    write(folder / "pool-images", "q2.png", pictures[28], CAPTION.upper() + "!")
    write(folder / "pool-images", "q3.png", pictures[29], "stock: " + CAPTION[16:])
    typed(folder, "run", recipe(folder, "exam"), "--runner", "inline")
    return folder


def ask(folder: Path, dataset: str, query: str) -> list[tuple[Any, ...]]:
    return mmdata.open(str(folder / dataset)).sql(query).fetchall()


CLEAN = {"filter": {"clean": "NOT decontaminate_is_match"}}
MATCHES = """
SELECT parse_filename(path), decontaminate_by, decontaminate_set, decontaminate_of, decontaminate_distance
FROM samples WHERE decontaminate_is_match ORDER BY path
"""


def test_planted_copies_of_a_dataset_are_found_and_named(work: Path):
    step = {"decontaminate": {"against": ["exam"], "phash": "phash", "caption": "caption"}}
    file = recipe(work, "pool", step, CLEAN)
    typed(work, "run", file, "--runner", "inline")
    found = ask(work, "pool", MATCHES)
    keys = dict(ask(work, "exam", "SELECT parse_filename(path), key FROM samples"))
    assert [f[:4] for f in found] == [
        ("q0.jpg", "image", "exam", keys["e03.png"]),
        ("q1.jpg", "image", "exam", keys["e07.png"]),
        ("q2.png", "caption", "exam", keys["e05.png"]),
        ("q3.png", "caption", "exam", keys["e05.png"]),
    ]
    assert max(f[4] for f in found[:2]) <= 4
    assert found[2][4] == 0
    # 9 words are left of 12, after one other: 3 n-grams of 8 words, of which the first is no one's
    assert found[3][4] == pytest.approx(1 / 3)
    counted = """
    SELECT decontaminate_set, count(*), count(DISTINCT decontaminate_of) FROM samples
    WHERE decontaminate_is_match GROUP BY ALL
    """
    assert ask(work, "pool", counted) == [("exam", 4, 3)]
    assert ask(work, "pool", "SELECT count(*) FROM samples WHERE verdict = 'kept'") == [(16,)]


def test_lists_say_the_same_and_their_content_is_the_identity(work: Path):
    query = [*MMDATA, "sql", "exam", "SELECT phash, caption FROM samples", "--format", "parquet"]
    with (work / "exam.parquet").open("wb") as file:
        subprocess.run(query, cwd=work, stdout=file, check=True)
    options = {
        "hash_lists": {"pictures": str(work / "exam.parquet")},
        "text_lists": {"words": str(work / "exam.parquet")},
        "phash": "phash",
        "caption": "caption",
    }
    before = set((work / "pool" / "columns").glob("decontaminate-*"))
    mmdata.run(work / recipe(work, "pool", {"decontaminate": options}, CLEAN), runner="inline")
    found = ask(work, "pool", MATCHES)
    assert [f[2:4] for f in found] == [("pictures", "4"), ("pictures", "8"), ("words", "6"), ("words", "6")]
    # The same list elsewhere is the same question; another one is not.
    moved = work / "elsewhere.parquet"
    shutil.copy(work / "exam.parquet", moved)
    (work / "one.txt").write_text(f"{int(ask(work, 'exam', 'SELECT phash FROM samples')[3][0]):016x}\n")
    for pictures, sets in ((moved, 1), (work / "one.txt", 2)):
        options = {**options, "hash_lists": {"pictures": str(pictures)}}
        mmdata.run(work / recipe(work, "pool", {"decontaminate": options}, CLEAN), runner="inline")
        assert len(set((work / "pool" / "columns").glob("decontaminate-*")) - before) == sets
    assert [f[2:4] for f in ask(work, "pool", MATCHES)] == [("pictures", "1"), ("words", "6"), ("words", "6")]


def test_a_list_that_is_none_stops_the_plan(work: Path):
    (work / "bad.txt").write_text("not a hash\n")
    step = {"decontaminate": {"hash_lists": {"exam": str(work / "bad.txt")}, "phash": "phash"}}
    said = typed(work, "run", recipe(work, "other", step, images="pool"), "--runner", "inline", code=2)
    assert "hash_lists.exam: " in said
    assert "such as 'not a hash'" in said
    assert "Traceback" not in said
    assert not (work / "other").exists()


def test_the_steps_of_the_page_are_proved(work: Path, monkeypatch: pytest.MonkeyPatch):
    page = (ROOT / "docs/decontamination.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```yaml\n(.*?)^```", page, re.S | re.M)
    monkeypatch.chdir(work)
    (work / "coco-phash.txt").write_text("00ff00ff00ff00ff\n")
    (work / "coco-captions.txt").write_text("a man rides a horse\n")
    pq.write_table(pa.table({"phash": pa.array([7], pa.uint64())}), work / "imagenet-phash.parquet")
    source = {"kind": "images", "path": "pool-images"}
    for block in blocks:
        steps = yaml.safe_load(block)
        if steps[0] == "hash_image":
            assert plan_recipe(parse({"name": "page", "dataset": "page", "source": source, "steps": steps})).steps
        else:  # the weights of score_clip are not here
            assert DecontaminateOptions.model_validate(steps[1]["decontaminate"]).embedding == "clip_image_embedding"
    assert len(blocks) == 3
