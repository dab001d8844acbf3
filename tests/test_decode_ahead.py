"""Pictures made on threads beside the model: each once, few at a time, noted before they are begun, within bounds."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import faulty
import numpy as np
import pyarrow as pa
import pytest
import synthetic
from batches import noise, png
from PIL import Image

import mmdata
from mmdata import registry, shard_job, work
from mmdata.batch import DecodedCache
from mmdata.chunks import Chunks
from mmdata.decode_ahead import LEAST_ROWS, DecodeAhead
from mmdata.stage import Contract, Options, Pixels, Stage, parse_schema
from mmdata.worker_journal import Journal

SMALL, FLIPPED = Pixels(8), Pixels(8, flipped=True)


class _Look(Stage[Options]):
    """Mean of the left half of a variant; fixed batches of 16."""

    variant: ClassVar[Pixels]

    @classmethod
    def contract(cls, options: Options) -> Contract:
        schema = parse_schema(f"{cls.label}_mean: float32")
        return Contract(writes=schema, reads=("image",), pixels=(cls.variant,), batch_shape=16)

    def compute(self, batch: Any) -> Mapping[str, Sequence[Any]]:
        return {f"{self.label}_mean": [float(p[:, :4].mean()) for p in batch.pixels(self.variant)]}


class LookStraight(_Look):
    name, label, variant = "look_straight", "straight", SMALL


class LookAgain(_Look):
    name, label, variant = "look_again", "again", SMALL


class LookFlipped(_Look):
    name, label, variant = "look_flipped", "mirrored", FLIPPED


@pytest.fixture(autouse=True)
def _two_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synthetic.register_all()
    for stage in (LookStraight, LookAgain, LookFlipped):
        registry.register(stage)
    monkeypatch.setenv("MMDATA_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})


def _halves(number: int) -> bytes:
    """A picture whose left half is `number` and whose right half is 200."""
    picture = np.full((8, 8, 3), 200, np.uint8)
    picture[:, :4] = number
    sink = io.BytesIO()
    Image.fromarray(picture).save(sink, "PNG")
    return sink.getvalue()


@pytest.mark.parametrize("limit", [1, 2 * 20 * (2 * 8 * 8 * 3 + 100), 256 << 20])
def test_several_models_share_one_decode_also_across_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(shard_job, "DECODED_BYTES", limit)
    results = []
    run_pass = work.run_pass
    monkeypatch.setattr("mmdata.pool.run_pass", lambda *a: results.append(run_pass(*a)) or results[-1])
    document = synthetic.make_dataset(tmp_path, range(120), 60, picture=_halves)
    steps = [
        {"filter": {"not_seven": "number % 7 > 0"}},
        "look_straight",
        {"filter": {"even": "straight_mean::int % 2 = 0"}},
        "look_again",
        "look_flipped",
    ]
    ds = mmdata.run({**document, "steps": steps}, runner="inline")
    found = ds.sql("SELECT number, straight_mean, again_mean, mirrored_mean FROM samples WHERE verdict = 'kept'")
    kept = [n for n in range(120) if n % 7 and n % 2 == 0]
    assert sorted(found.fetchall()) == [(n, n, n, 200.0) for n in kept]
    # What the first filter drops is never read, and the later steps find what was made for the first.
    wanted = len([n for n in range(120) if n % 7])
    assert (sum(r.reads for r in results), sum(r.decodes for r in results)) == (wanted, wanted)


def test_a_decoder_that_takes_the_worker_with_it_costs_its_picture_alone(tmp_path: Path) -> None:
    """The picture is decoded while the model works on rows before it: these must not be charged."""
    document = synthetic.make_dataset(
        tmp_path, range(200), 200, lambda n: synthetic.png(n) + (faulty.KILLER if n == 150 else b"")
    )
    step = {"make_faulty": {"log": str(tmp_path / "log"), "image": True, "shape": 8, "max_failed": 1}}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({**document, "steps": [step]}))
    fixtures = Path(faulty.__file__).parent
    environment = {**os.environ, "PYTHONPATH": str(fixtures / "deadly"), "MMDATA_TEST_DEADLY": "1"}
    command = [sys.executable, str(fixtures / "faulty.py"), "--again", "run", str(recipe), "--runner", "inline"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    codes = [int(line) for line in done.stdout.splitlines() if line.lstrip("-").isdecimal()]
    assert codes == [-signal.SIGABRT] * 3 + [0]  # once beside others, twice alone
    ds = mmdata.open(tmp_path / "dataset")
    found = dict(ds.sql("SELECT number, faulty_reason FROM samples").fetchall())
    assert found == {n: "worker_died" if n == 150 else None for n in range(200)}
    assert not list((tmp_path / "scratch" / "journal").rglob("*-ahead.json"))


def _cache(pictures: list[bytes], read: Any, variants: Sequence[Pixels] = (SMALL,)) -> DecodedCache:
    rows = len(pictures)
    table = {"image_path": [str(i) for i in range(rows)], "image_offset": [0] * rows}
    return DecodedCache(pa.table({**table, "image_size": [len(p) for p in pictures]}), read, variants=variants)


def test_rows_are_noted_before_they_are_begun_and_few_at_a_time(tmp_path: Path) -> None:
    rows, size = 400, 20
    data, journal = [png(noise(8, 8, i)) for i in range(rows)], tmp_path / "ahead.json"
    noted: dict[int, bool] = {}
    go = threading.Event()

    def read(path: str, offset: int, length: int) -> bytes:
        go.wait(10)
        noted[int(path)] = int(path) in json.loads(journal.read_text())["running"]
        return data[int(path)]

    cache = _cache(data, read)
    ahead = DecodeAhead(2, Journal(journal, is_alone=False))
    ahead.expect((cache, row, row, (SMALL,)) for row in range(rows))
    ahead.go_on(size, "step")
    running = json.loads(journal.read_text())["running"]
    assert running == list(range(size + LEAST_ROWS))
    ahead.go_on(size, "step")  # nothing has come to its end: of the next batch all is begun, and nothing more
    assert json.loads(journal.read_text())["running"] == running
    go.set()
    for first in range(0, rows, size):
        cache.fill(range(first, first + size), SMALL)
        if first + 2 * size < rows:
            ahead.go_on(size, "step")
    ahead.stop()
    assert not journal.exists()
    assert (cache.reads, cache.decodes) == (rows, rows)
    # A row that was asked for before its turn was made by who asked, in whose own journal it is.
    assert sum(noted.values()) > rows / 2
    for row in range(rows):
        assert (cache.variant(row, SMALL) == noise(8, 8, row)).all()


def test_stopping_calls_off_what_has_not_begun_and_leaves_it_to_who_asks() -> None:
    data = [png(noise(8, 8, i)) for i in range(30)]
    begun, go = threading.Event(), threading.Event()

    def read(path: str, offset: int, length: int) -> bytes:
        begun.set()
        go.wait(10)
        return data[int(path)]

    cache = _cache(data, read)
    with ThreadPoolExecutor(1) as pool:
        for row in range(30):
            cache.begin(pool, row, (SMALL,))
        begun.wait(10)
        pool.shutdown(wait=False, cancel_futures=True)
        go.set()
        pictures = [cache.variant(row, SMALL) for row in range(30)]
    assert all((p == noise(8, 8, i)).all() for i, p in enumerate(pictures))
    assert cache.reads == 30


def test_the_whole_picture_is_kept_only_where_a_step_needs_it() -> None:
    data = [png(noise(40, 60, 1))]
    for variants, decodes in (((SMALL, FLIPPED), 1), ((SMALL, Pixels()), 1), ((SMALL, Pixels(8, masked="boxes")), 1)):
        cache = _cache(data, lambda path, offset, size: data[int(path)], variants)
        cache.know_boxes("boxes", [0], [[]])
        for pixels in variants:
            cache.variant(0, pixels)
        assert cache.decodes == decodes
        assert bool(cache._pictures) == (variants[1] != FLIPPED)


def _chunks(sizes: list[tuple[int, int, int]], *steps: tuple[Pixels, int | None]) -> Chunks:
    columns = dict(zip(["width_px", "height_px", "image_size"], map(list, zip(*sizes, strict=True)), strict=True))
    view = SimpleNamespace(base=lambda names: pa.table({n: columns[n] for n in names}))
    bound = [
        SimpleNamespace(
            step=SimpleNamespace(media=True, contract=Contract(pa.schema([]), ("image",), (pixels,))),
            resolved=SimpleNamespace(batch_shape=shape),
        )
        for pixels, shape in steps
    ]
    return Chunks(view, bound, None, 1)  # type: ignore[arg-type]


def test_chunks_end_at_full_batches_and_count_what_is_kept() -> None:
    rows = np.arange(100)
    sizes = [(100, 100, 1000)] * 100
    # 8 · 8 · 3 + 1000 = 1192 bytes a row: 25 fit into 30,000, of which three batches of 8 are whole.
    assert [len(c) for c in _chunks(sizes, (SMALL, 8)).cut(rows, 30_000)] == [24, 24, 24, 24, 4]
    # With the picture in full 30,000 more: one row a chunk, less than a batch.
    assert [len(c) for c in _chunks(sizes, (SMALL, 8), (Pixels(), None)).cut(rows, 65_000)] == [2] * 50
    # A row above the limit is a chunk of its own.
    assert [len(c) for c in _chunks(sizes, (SMALL, 8)).cut(rows, 1)] == [1] * 100
