"""The PyTorch reader in real DataLoaders: each kept sample once, in the order of its epoch, with its own values."""

from __future__ import annotations

import gc
import json
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
import synthetic
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

import mmdata
from mmdata.dataset import Dataset
from mmdata.errors import RecipeError, SourceError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
NUMBERS = list(range(103))
BROKEN = 29


@pytest.fixture(scope="module")
def ds(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """11 shards, 82 kept samples; the level of each grey picture is its number."""
    synthetic.register_all()
    recipe = synthetic.make_dataset(tmp_path_factory.mktemp("torch"), NUMBERS, shard_rows=10)
    steps = [{"make_sevens": {"on_error": "keep"}}, {"filter": {"f": "number % 5 <> 0"}}]
    return mmdata.run({**recipe, "steps": steps}, runner="inline")


@pytest.fixture(scope="module")
def expected(ds: Dataset) -> dict[str, tuple[int, str | None, float | None]]:
    rows = ds.samples().project("key, number, caption, sevens_value").fetchall()
    assert len(rows) == 82
    return {key: tuple(values) for key, *values in rows}


def as_list(batch: list[Any]) -> list[Any]:
    return batch


def read(dataset: Any, workers: int = 0, **how: Any) -> list[Any]:
    loader = DataLoader(dataset, batch_size=4, num_workers=workers, collate_fn=as_list, **how)
    return [sample for batch in loader for sample in batch]


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_each_sample_once_with_its_own_values(ds: Dataset, expected: dict[str, Any], workers: int) -> None:
    dataset = ds.to_torch(["number", "sevens_value"], decode="tensor", seed=3)
    assert isinstance(dataset, IterableDataset)
    samples = read(dataset, workers)
    assert {s["key"]: (s["number"], s["caption"], s["sevens_value"]) for s in samples} == expected
    assert len(samples) == len(expected) == len(dataset)
    for sample in samples:
        assert sample["image"].dtype == torch.uint8
        assert sample["image"].shape == (8, 8, 3)
        assert sample["image"].unique().tolist() == [sample["number"]]
    assert set(samples[0]) == {"key", "image", "caption", "number", "sevens_value"}


def test_two_nodes_with_two_workers_each(ds: Dataset, expected: dict[str, Any]) -> None:
    nodes = [ds.to_torch(rank=rank, world=2, decode=None) for rank in range(2)]
    seen = [Counter(s["key"] for s in read(node, 2)) for node in nodes]
    assert seen[0] + seen[1] == dict.fromkeys(expected, 1)
    assert [sum(s.values()) for s in seen] == [len(node) for node in nodes] == [41, 41]
    three = [read(ds.to_torch(rank=r, world=3, decode=None, uneven="drop")) for r in range(3)]
    assert [len(t) for t in three] == [27, 27, 27]


def collecting(sample: dict[str, Any]) -> int:
    gc.collect()
    return int(sample["number"])


@pytest.mark.parametrize("stream", [False, True], ids=["torch", "hugging_face"])
def test_forked_workers_leave_the_parents_garbage_alone(ds: Dataset, stream: bool) -> None:
    """A forked process that closes a DuckDB connection dies: the threads that it waits for are not there."""
    dataset = ds.to_datasets(["number"], media=False, stream=True) if stream else ds.to_torch(["number"], decode=None)
    gc.disable()
    try:
        garbage: list[Any] = [duckdb.connect()]
        garbage[0].execute("SELECT sum(range) FROM range(1000000)").fetchall()
        garbage.append(garbage)
        del garbage
        loader = DataLoader(dataset, None, num_workers=2, multiprocessing_context="fork", collate_fn=collecting)
        assert sorted(loader) == [n for n in NUMBERS if n % 5]
    finally:
        gc.enable()
        gc.collect()  # here, in the parent, it is


def test_more_workers_than_shards(tmp_path: Path) -> None:
    recipe = synthetic.make_dataset(tmp_path, list(range(7)), shard_rows=10)
    dataset = mmdata.run(recipe, runner="inline").to_torch(["number"])
    assert sorted(s["number"] for s in read(dataset, 3)) == list(range(7))
    many = [ds["number"] for r in range(5) for ds in read(_with_node(dataset, r, 5))]
    assert sorted(many) == list(range(7))


def _with_node(dataset: Any, rank: int, world: int) -> Any:
    return dataset.samples.dataset.to_torch(["number"], rank=rank, world=world)


def test_workers_that_are_started_afresh(ds: Dataset, expected: dict[str, Any]) -> None:
    """Under `spawn` the dataset is pickled; it opens its files there."""
    samples = read(ds.to_torch(["number"]), 2, multiprocessing_context="spawn")
    assert sorted(s["key"] for s in samples) == sorted(expected)
    assert all(s["image"].getpixel((0, 0)) == (s["number"],) * 3 for s in samples)


def test_orders(ds: Dataset) -> None:
    def keys(workers: int = 0, **how: Any) -> list[str]:
        return [s["key"] for s in read(ds.to_torch(decode=None, **how), workers)]

    plain = [key for (key,) in ds.sql("SELECT key FROM samples WHERE verdict = 'kept' ORDER BY row_id").fetchall()]
    assert keys(shuffle=False) == plain
    assert keys(seed=1) == keys(seed=1) != keys(seed=2)
    assert keys(seed=1, epoch=1) != keys(seed=1)
    assert keys(2, seed=1) == keys(2, seed=1)
    assert keys(seed=1) != plain


def test_set_epoch_reaches_workers_that_live_on(ds: Dataset) -> None:
    dataset = ds.to_torch(decode=None, seed=1)
    loader = DataLoader(dataset, batch_size=None, num_workers=2, persistent_workers=True)
    epochs = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        epochs.append([s["key"] for s in loader])
    assert epochs[0] == epochs[2] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])


def test_forms_of_the_picture(ds: Dataset) -> None:
    def first(decode: Any) -> Any:
        return next(iter(ds.to_torch(["number"], shuffle=False, decode=decode)))

    number = first("pil")["number"]
    assert isinstance(first("pil")["image"], Image.Image)
    assert first("bytes")["image"] == synthetic.png(number)
    assert (np.asarray(first("pil")["image"]) == first("tensor")["image"].numpy()).all()
    assert "image" not in first(None)
    transformed = ds.to_torch(["number"], decode=None, shuffle=False, transform=lambda s: s["number"] * 2)
    assert list(transformed)[:3] == [2, 4, 6]


def test_the_default_collation_makes_batches(ds: Dataset) -> None:
    dataset = ds.to_torch(["number"], decode="tensor", transform=lambda s: {"image": s["image"], "n": s["number"]})
    batch = next(iter(DataLoader(dataset, batch_size=6)))
    assert batch["image"].shape == (6, 8, 8, 3)
    assert batch["n"].dtype == torch.int64


def test_a_reading_goes_on_where_it_was(ds: Dataset) -> None:
    def fresh(**how: Any) -> Any:
        return ds.to_torch(decode=None, seed=5, **{"epoch": 2, **how})

    whole = [s["key"] for s in fresh()]
    dataset = fresh()
    reading = iter(dataset)
    begun = [next(reading)["key"] for _ in range(37)]
    state = json.loads(json.dumps(dataset.state_dict()))
    reading.close()
    resumed = fresh(epoch=0)
    resumed.load_state_dict(state)
    rest = [s["key"] for s in resumed]
    assert begun + rest == whole
    assert [s["key"] for s in resumed] == whole  # the next reading is a whole one
    for other in (ds.to_torch(decode=None, seed=6), ds.to_torch(decode=None, seed=5, rank=0, world=2)):
        with pytest.raises(RecipeError, match="this state is of"):
            other.load_state_dict(state)


def test_a_picture_that_does_not_decode(tmp_path: Path) -> None:
    recipe = synthetic.make_dataset(
        tmp_path, [1, 2, 3, 4], picture=lambda n: b"no picture" if n == 3 else None if n == 4 else synthetic.png(n)
    )
    made = mmdata.run(recipe, runner="inline")
    key = made.sql("SELECT key FROM samples WHERE number = 3").fetchall()[0][0]
    with pytest.raises(SourceError, match=f"the picture of sample {key} of .* does not decode .*on_error='skip'"):
        list(made.to_torch())
    with pytest.warns(UserWarning, match=f"sample {key} of .* left out"):
        left = list(made.to_torch(["number"], on_error="skip", shuffle=False))
    assert [s["number"] for s in left] == [1, 2, 4]
    assert left[2]["image"] is None


def test_what_cannot_be_asked(ds: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    for given, message in [
        ({"columns": ["numbr"]}, "has no column 'numbr'; did you mean 'number'"),
        ({"decode": "numpy"}, "decode='numpy': expected one of None, 'pil', 'tensor', 'bytes'"),
        ({"uneven": "pad"}, "uneven='pad'"),
        ({"rank": 2, "world": 2}, "rank=2 and world=2: give both"),
        ({"rank": 0}, "give both"),
        ({"buffer": 0}, "buffer and threads"),
    ]:
        with pytest.raises(RecipeError, match=message):
            ds.to_torch(**given)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="RANK=3 and WORLD_SIZE=2 in the environment"):
        len(ds.to_torch())


def test_the_node_of_the_environment(ds: Dataset, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[str] = Counter()
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "4")
        seen.update(s["key"] for s in ds.to_torch(decode=None))
    assert seen == dict.fromkeys(expected, 1)


def test_the_node_that_torch_distributed_says(ds: Dataset, expected: dict[str, Any], tmp_path: Path) -> None:
    """Two real processes of one group; what is pickled for workers there keeps its place when the group is gone."""
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, json, pickle, mmdata\n"
        "import torch.distributed as dist\n"
        "store, rank, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]\n"
        "dist.init_process_group('gloo', init_method='file://' + store, rank=rank, world_size=2)\n"
        "sent = pickle.dumps(mmdata.open(path).to_torch(decode=None))\n"
        "dist.destroy_process_group()\n"
        "print(json.dumps([s['key'] for s in pickle.loads(sent)]))\n"
    )
    command = [sys.executable, str(script), str(tmp_path / "store")]
    running = [
        subprocess.Popen([*command, str(rank), ds.store.url], stdout=subprocess.PIPE, text=True) for rank in range(2)
    ]
    answers = [json.loads(p.communicate(timeout=120)[0]) for p in running]
    assert [len(a) for a in answers] == [41, 41]
    assert Counter(answers[0] + answers[1]) == dict.fromkeys(expected, 1)


def test_a_dataset_pickles_as_what_it_saw(ds: Dataset) -> None:
    again = pickle.loads(pickle.dumps(ds))
    assert again.current == ds.current
    assert again.funnel().kept == 82
