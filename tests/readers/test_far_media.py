"""The readers and `diff` on an S3-protocol server: forked workers ask for themselves, files come whole."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import synthetic
from faulty_proxy import FaultyProxy
from s3 import in_environment, running_s3
from torch.utils.data import DataLoader

import mmdata
from mmdata.dataset import Dataset
from mmdata.inspect import diff

NUMBERS = list(range(36))


@pytest.fixture(scope="module")
def proxy() -> Iterator[FaultyProxy]:
    with running_s3() as server, FaultyProxy(server.port, bucket=("pets-bucket", server.bucket())) as running:
        with in_environment(server.environment(running)):
            yield running


@pytest.fixture(scope="module")
def ds(proxy: FaultyProxy) -> Dataset:
    """Three shards with two selections; the readers see the later one, without the multiples of 5."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        plain = synthetic.synthetic_recipe
        patch.setattr(
            synthetic,
            "synthetic_recipe",
            lambda *given, **changes: plain(*given, **changes) | {"dataset": "s3://pets-bucket/pets"},
        )
        recipe = synthetic.make_dataset(Path(folder), NUMBERS, shard_rows=12)
        mmdata.run({**recipe, "name": "all"}, runner="inline")
        few = {**recipe, "name": "few", "steps": [{"filter": {"few": "number % 5 <> 0"}}]}
        return mmdata.run(few, runner="inline")


KEPT = [n for n in NUMBERS if n % 5]


def level(image: Any) -> int:
    return int(image.getpixel((0, 0))[0])


@pytest.mark.parametrize("how", ["fork", None])
def test_workers(ds: Dataset, how: str | None) -> None:
    _ = ds.read_media(*_reference(ds))  # this process has asked before it forks
    dataset = ds.to_torch(["number"])
    workers = 0 if how is None else 2
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, multiprocessing_context=how)
    assert sorted((s["number"], level(s["image"])) for s in loader) == [(n, n) for n in KEPT]


def _reference(ds: Dataset) -> tuple[str, int, int]:
    row = ds.kept(0).to_pylist()[0]
    return row["image_path"], row["image_offset"], row["image_size"]


def test_a_shuffled_window_brings_each_file_once(ds: Dataset) -> None:
    dataset = ds.to_torch(["number"], decode="bytes")
    assert {s["number"]: s["image"] for s in dataset} == {n: synthetic.png(n) for n in KEPT}
    # Most of every tar is wanted: one request each, where 28 pictures would be 28.
    assert dataset.samples.dataset.media.requests <= 2 * 3


def test_arrow_and_hugging_face(ds: Dataset) -> None:
    images = ds.to_arrow(["number"], media=True).to_pylist()
    assert {row["number"]: row["image"]["bytes"] for row in images} == {n: synthetic.png(n) for n in KEPT}
    assert [(r["number"], level(r["image"])) for r in ds.to_datasets(["number"])] == [(n, n) for n in KEPT]
    assert [(r["number"], level(r["image"])) for r in ds.to_datasets(["number"], stream=True)] == [(n, n) for n in KEPT]


def test_diff(ds: Dataset, tmp_path: Path) -> None:
    found = diff("s3://pets-bucket/pets#all", ds)
    assert (found.total("left"), found.total("unchanged"), found.total("entered")) == (8, 28, 0)
    pq.write_table(found.rows.to_arrow_table(), tmp_path / "changed.parquet")
    assert set(pq.read_table(tmp_path / "changed.parquet")["reason_b"].to_pylist()) == {"few"}
