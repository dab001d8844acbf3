"""An attach that is killed, that is read by Ray's workers, and that is larger than its memory."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from killing import DATASET, RECIPE, Place
from synthetic import make_dataset

import mmdata

ROWS = 35
STEPS = [{"attach": {"path": "s.parquet", "columns": ["n"]}}, {"keep_list": {"path": "l.txt", "on": "key"}}]


def prepared(folder: Path) -> Place:
    """35 rows in four shards; 30 of them have a number in `s.parquet`, 25 are in `l.txt`, 20 in both."""
    recipe = make_dataset(folder, range(1, ROWS + 1))
    rows = duckdb.sql(
        f"SELECT uid, key FROM read_parquet('{recipe['dataset']}/rows/*.parquet') ORDER BY row_id"
    ).fetchall()
    place = Place(folder / "place", pa.table({"url": ["http://images.invalid/0"]}))
    place.dataset.parent.mkdir()
    Path(recipe["dataset"]).rename(place.dataset)
    pq.write_table(pa.table({"uid": [uid for uid, _ in rows[5:]], "n": range(30)}), place.folder / "s.parquet")
    (place.folder / "l.txt").write_text("\n".join(key for _, key in rows[:25]))
    (place.folder / RECIPE).write_text(yaml.safe_dump({**recipe, "dataset": DATASET, "steps": STEPS}))
    return place


def answer(place: Place) -> list[Any]:
    found = mmdata.open(place.dataset).sql("SELECT row_id, n, is_listed, verdict, reason FROM samples ORDER BY 1")
    return found.fetchall()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What an uninterrupted run answers; by hand: row i has number i - 5, and is listed below 25."""
    place = prepared(tmp_path_factory.mktemp("whole"))
    code, errors = place.command("--runner", "inline")
    assert code == 0, errors
    found = answer(place)
    assert [n for _, n, *_ in found] == [None] * 5 + list(range(30))
    assert [row for row, (*_, verdict, _) in enumerate(found) if verdict == "kept"] == list(range(5, 25))
    return found


@pytest.mark.parametrize("event", ["attach:half#1", "attach:linked#2", "attach:done#3", "keep_list:unlinked#2"])
def test_killed_while_it_attaches(event: str, tmp_path: Path, whole: list[Any]) -> None:
    """What is done stays, nothing is torn, and the same command ends where an uninterrupted one does."""
    place = prepared(tmp_path)
    code, _ = place.command("--runner", "inline", stop=f"{event}=kill")
    assert (code, place.was_stopped()) == (-signal.SIGKILL, event)
    code, errors = place.command("--runner", "inline")
    assert code == 0, errors
    assert answer(place) == whole
    names = sorted(f.rpartition("/")[2] for f in place.files("columns") if "/attach-" in f and "/." not in f)
    assert names == [f"0000{shard}.c0.parquet" for shard in range(4)]


def test_ray_reads_what_was_joined(tmp_path: Path, whole: list[Any]) -> None:
    place = prepared(tmp_path)
    recipe = yaml.safe_load((place.folder / RECIPE).read_text())
    steps = [*STEPS, {"filter": {"even": "n % 2 = 0"}}, "probe_text"]
    (place.folder / RECIPE).write_text(yaml.safe_dump({**recipe, "steps": steps}))
    code, errors = place.command("--runner", "ray", "--workers", "1")
    assert code == 0, errors
    found = answer(place)
    assert [row[:3] for row in found] == [(r, n, m if n is not None else None) for r, n, m, *_ in whole]
    assert [n for _, n, _, verdict, _ in found if verdict == "kept"] == list(range(0, 20, 2))


BIG = """
import sys
from pathlib import Path
import numpy as np, pyarrow as pa
from mmdata.joins.attach import Attach, AttachOptions
folder = Path(sys.argv[1])
attach = Attach(AttachOptions(path=str(folder / "big.parquet"), columns=["score", "text"]))
attach.open(folder)
rng, wrong = np.random.default_rng(1), 0
for shard in range(20):
    numbers = rng.integers(0, 2_500_000, 10_000)
    found = attach.compute(pa.chunked_array([[f"{n * 7919 % (1 << 61):032x}" for n in numbers.tolist()]]))
    expected = np.where(numbers < 2_000_000, numbers, -1)
    wrong += int((found["score"].fill_null(-1).to_numpy() != expected).sum())
# Not ru_maxrss, which a child has from the process that started it.
print(wrong, int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) // 1024)
"""


def test_two_million_rows_take_bounded_memory(tmp_path: Path) -> None:
    with pq.ParquetWriter(
        tmp_path / "big.parquet", pa.schema({"uid": "string", "score": "int64", "text": "string"})
    ) as to:
        for first in range(0, 2_000_000, 100_000):
            uids = [f"{n * 7919 % (1 << 61):032x}" for n in range(first, first + 100_000)]
            text = pa.array([f"text of row {n} " * 4 for n in range(first, first + 100_000)])
            to.write_table(pa.table({"uid": uids, "score": range(first, first + 100_000), "text": text}))
    command = [sys.executable, "-c", BIG, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    wrong, megabytes = map(int, done.stdout.split())
    assert wrong == 0
    assert megabytes < 500
