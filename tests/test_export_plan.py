"""The order and the plan of an export: shuffles that are permutations, shards that any number of writers give alike."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import kept_rows
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmdata import export_order
from mmdata.columns import row_id
from mmdata.errors import StoreError
from mmdata.export import ExportOptions, export
from mmdata.export_order import chosen, hashes, ordered, splitmix64

MANIFEST = "_mmdata_export.json"


def keys(folder: Path) -> list[str]:
    """Of all samples, in order, as the Parquet files have them."""
    return [k for p in sorted(folder.glob("*.parquet")) for k in pq.read_table(p).column("key").to_pylist()]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the statistics, which hold times."""
    found = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.endswith("_stats.json")]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}


def run(rows: Any, path: Path, **options: Any) -> Path:
    return export(rows, ExportOptions(path=str(path), **options), None).path


def test_splitmix64_gives_the_published_numbers() -> None:
    """The first outputs for the seed 1234567, as the reference implementation (Vigna 2015) prints them."""
    step, mask = 0x9E3779B97F4A7C15, 2**64 - 1
    states = np.array([(1234567 + n * step) & mask for n in range(5)], np.uint64)
    assert splitmix64(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_hashes_are_keyed_by_every_seed_and_spread_evenly() -> None:
    ids = np.arange(-2, 100_000, dtype=np.int64)
    one = hashes(ids, 1, 2)
    assert len(np.unique(one)) == len(ids)
    for other in ((2, 1), (1,), (1, 2, 0), (1, 3)):
        assert not np.any(one == hashes(ids, *other))
    counts = np.bincount((one >> np.uint64(60)).astype(int), minlength=16)
    assert counts.min() > 0.95 * len(ids) / 16  # 6250 expected; five standard deviations are 383


@pytest.mark.parametrize("count", [0, 1, 37, 99, 100])
def test_exactly_so_many_are_chosen_and_more_contain_fewer(count: int) -> None:
    ids = np.arange(100, dtype=np.int64) * 7
    mask = chosen(ids, count, 5)
    assert int(mask.sum()) == count
    assert bool(np.all(chosen(ids, min(100, count + 1), 5) >= mask))


def test_equal_hashes_are_chosen_by_position(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_order, "hashes", lambda values, *seeds: np.array([1, 1, 0, 1], np.uint64))
    assert chosen(np.arange(4, dtype=np.int64), 2).tolist() == [True, False, True, False]


def _shards(count: int, rows: int) -> dict[int, pa.Table]:
    made = {}
    for shard in range(count):
        ids = [row_id(shard, n) for n in range(rows)]
        made[shard] = pa.table({"row_id": pa.array(ids, pa.int64()), "text": [f"{i:x}" * 50 for i in ids]})
    return made


def test_a_full_shuffle_out_of_core_is_the_one_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = _shards(40, 500)
    total = sum(t.nbytes for t in tables.values())
    memory = pa.concat_tables(ordered(list(tables), tables.__getitem__, "full", (3, 0, 0), tmp_path, total))
    monkeypatch.setattr(export_order, "_BUCKET_BYTES", 1 << 18)
    pieces = list(ordered(list(tables), tables.__getitem__, "full", (3, 0, 0), tmp_path, total))
    assert len(pieces) > 8
    assert max(t.nbytes for t in pieces) < total / 4
    assert list(tmp_path.iterdir()) == []
    assert pa.concat_tables(pieces).equals(memory)
    ids = memory.column("row_id").to_pylist()
    assert sorted(ids) == sorted(i for t in tables.values() for i in t.column("row_id").to_pylist())
    expected = hashes(np.array(ids, np.int64), 3, 0, 0)
    assert bool(np.all(expected[:-1] < expected[1:]))


def test_a_buffer_mixes_sixteen_neighbours_and_no_more(tmp_path: Path) -> None:
    tables = _shards(40, 100)
    got = list(ordered(list(tables), tables.__getitem__, "buffer", (3, 0, 0), tmp_path, 0))
    groups = [{i >> 24 for i in t.column("row_id").to_pylist()} for t in got]
    assert [len(g) for g in groups] == [16, 16, 8]
    assert set().union(*groups) == set(range(40))
    assert groups[0] != set(range(16))
    first = [i >> 24 for i in got[0].column("row_id").to_pylist()]
    assert sum(a != b for a, b in itertools.pairwise(first)) > 1000  # of 1599 pairs; sorted it would be 15


@pytest.mark.parametrize("shuffle", ["buffer", "full"])
def test_a_shuffled_export_is_a_permutation_by_its_seed(tmp_path: Path, shuffle: str) -> None:
    rows = kept_rows.dataset(tmp_path / "dataset")
    plain = keys(run(rows, tmp_path / "plain", shard_rows=7))
    one = keys(run(rows, tmp_path / "one", shard_rows=7, shuffle=shuffle, seed=1))
    assert one != plain
    assert sorted(one) == plain
    assert one == keys(run(rows, tmp_path / "again", shard_rows=11, shuffle=shuffle, seed=1))
    assert one != keys(run(rows, tmp_path / "other", shard_rows=7, shuffle=shuffle, seed=2))


@pytest.mark.parametrize("format", ["webdataset", "parquet", "files", "energon", "datasets"])
def test_any_number_of_writers_gives_the_same_bytes(tmp_path: Path, format: str) -> None:
    rows = kept_rows.dataset(tmp_path / "dataset")
    options: dict[str, Any] = {"format": format, "shard_rows": 3, "shuffle": "full"}
    one = run(rows, tmp_path / "one", **options)
    four = run(rows, tmp_path / "four", workers=4, **options)
    assert contents(one) == contents(four)
    assert len(contents(one)) > 12


def test_a_failing_writer_among_several_is_the_error_that_is_told(tmp_path: Path) -> None:
    rows = kept_rows.dataset(tmp_path / "dataset")
    rows.media = rows.media[:-3000]
    with pytest.raises(StoreError, match="is cut short"):
        run(rows, tmp_path / "out", workers=4, shard_rows=2)
    assert not (tmp_path / "out").exists()


def test_an_export_that_fails_late_goes_on_where_it_was(tmp_path: Path) -> None:
    rows = kept_rows.dataset(tmp_path / "dataset")
    inner, offsets = rows.read_media, []

    def read(path: str, offset: int, size: int) -> bytes:
        offsets.append(offset)
        return b"" if len(offsets) == 26 else inner(path, offset, size)

    rows.read_media = read  # type: ignore[method-assign]
    with pytest.raises(StoreError, match="cut short"):
        run(rows, tmp_path / "out", shard_rows=10)
    assert sorted(p.name.partition("-")[0] for p in tmp_path.iterdir()) == ["out.attempt", "out.plan"]
    rows.read_media, rows.reads = inner, 0  # type: ignore[method-assign]
    out = run(rows, tmp_path / "out", shard_rows=10)
    assert rows.reads == 12  # the third and fourth shard; the first two stood
    assert contents(out) == contents(run(rows, tmp_path / "fresh", shard_rows=10))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fresh", "out"]


def _killed(tmp_path: Path, event: str, count: int, format: str = "webdataset") -> None:
    fixtures = Path(kept_rows.__file__).parent
    paths = os.pathsep.join([str(fixtures.parents[1]), str(fixtures)])
    command = [sys.executable, kept_rows.__file__, str(tmp_path / "dataset"), str(tmp_path / "out"), format, event]
    done = subprocess.run([*command, str(count)], env={**os.environ, "PYTHONPATH": paths}, check=False)
    assert done.returncode == -signal.SIGKILL


def test_a_killed_export_reads_no_media_twice_that_is_in_a_whole_shard(tmp_path: Path) -> None:
    """Shards of 10, 10, 10 and 2; the 26th read dies: two shards stand, 12 samples are left."""
    _killed(tmp_path, "media", 26)
    rows = kept_rows.dataset(tmp_path / "dataset")
    [attempt] = tmp_path.glob("out.attempt-*")
    stood = {p.name: p.stat().st_ino for p in attempt.glob("0000[01].tar")}
    assert len(stood) == 2
    ticks: list[int] = []
    options = ExportOptions(path=str(tmp_path / "out"), shard_rows=10)
    out = export(rows, options, "name: pets\n", tick=ticks.append).path
    assert rows.reads == 12
    assert sum(ticks) == 32
    assert {n: (out / n).stat().st_ino for n in stood} == stood


def test_an_attempt_of_another_identity_is_not_gone_on_with(tmp_path: Path) -> None:
    _killed(tmp_path, "media", 26)
    rows = kept_rows.dataset(tmp_path / "dataset")
    out = run(rows, tmp_path / "out", shard_rows=10, columns=("clip_score",))
    assert rows.reads == 32
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert contents(out) == contents(run(rows, tmp_path / "fresh", shard_rows=10, columns=("clip_score",)))


def test_a_plan_of_another_version_is_made_anew(tmp_path: Path) -> None:
    _killed(tmp_path, "media", 26)
    [plan] = tmp_path.glob("out.plan-*/plan.json")
    found = json.loads(plan.read_text())
    found["made_by"]["pyarrow"] = "0.1"
    plan.write_text(json.dumps(found))
    rows = kept_rows.dataset(tmp_path / "dataset")
    export(rows, ExportOptions(path=str(tmp_path / "out"), shard_rows=10), "name: pets\n")
    assert rows.reads == 32


def test_a_file_put_into_a_folder_of_an_export_is_not_removed(tmp_path: Path) -> None:
    rows = kept_rows.dataset(tmp_path / "dataset")
    out = run(rows, tmp_path / "out", format="files", shard_rows=10)
    (out / "00001" / "notes.txt").write_text("mine")
    with pytest.raises(Exception, match="a file in 00001', which mmdata did not write"):
        run(rows, out, format="files", shard_rows=5)
    assert (out / "00001" / "notes.txt").read_text() == "mine"


def test_a_lost_file_in_a_folder_is_noticed(tmp_path: Path) -> None:
    rows = kept_rows.dataset(tmp_path / "dataset")
    out = run(rows, tmp_path / "out", format="files", shard_rows=10)
    before = contents(out)
    next((out / "00001").iterdir()).unlink()
    assert export(rows, ExportOptions(path=str(out), format="files", shard_rows=10), None).written is True
    assert contents(out) == before


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """A full shuffle of 800,000 rows of 1 KB of text: 800 MB of values through a process of well under that.

    About 450 MB were seen at 200,000, 400,000 and 800,000 rows: four parts of 64 MB, and what the allocator keeps.
    """
    code = (
        "import sys, pathlib, numpy as np, pyarrow as pa\n"
        "from mmdata.columns import base_schema, row_id\n"
        "from mmdata.export_order import ordered\n"
        "from mmdata.export_plan import PLACES, write_plan\n"
        "def read(shard):\n"
        "    ids = np.arange(10_000, dtype=np.int64) + (shard << 24)\n"
        "    return pa.table({'row_id': ids, 'text': [f'{i:064x}' * 16 for i in ids.tolist()]})\n"
        "def rows():\n"
        "    for t in ordered(range(80), read, 'full', (1,), pathlib.Path(sys.argv[1]), 80 * read(0).nbytes):\n"
        "        yield t, pa.table([t.column('row_id')] * len(PLACES), names=list(PLACES))\n"
        "def cut(pairs):\n"
        "    return [sum(len(t) for t, _ in pairs)]\n"
        "def peak():\n"  # not ru_maxrss, which a child has from the process that started it
        "    return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
        "before = peak()\n"
        "plan = write_plan(pathlib.Path(sys.argv[1]), 'x', rows(), cut)\n"
        "assert plan.rows == 800_000\n"
        "print((peak() - before) // 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 600, f"{done.stdout} MB above the start"


def test_times_of_a_resumed_export_are_nobodys_business(tmp_path: Path) -> None:
    rows = kept_rows.dataset(tmp_path / "dataset")
    one = run(rows, tmp_path / "one", shard_rows=10)
    time.sleep(1.1)
    assert contents(one) == contents(run(rows, tmp_path / "two", shard_rows=10, workers=2))
