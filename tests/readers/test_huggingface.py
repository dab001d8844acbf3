"""The Hugging Face reader: the library's own features and pictures, read where they lie."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import fsspec
import pytest
import synthetic
from PIL import Image
from torch.utils.data import DataLoader

import mmdata
from mmdata.dataset import Dataset
from mmdata.readers.media_files import media_url


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def ds(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    synthetic.register_all()
    recipe = synthetic.make_dataset(
        tmp_path_factory.mktemp("hf"), list(range(30)), shard_rows=8, picture=lambda n: synthetic.png(n) if n else None
    )
    steps = [{"make_sevens": {"on_error": "keep"}}, {"filter": {"f": "number % 5 <> 1"}}]
    return mmdata.run({**recipe, "steps": steps}, runner="inline")


NUMBERS = [n for n in range(30) if n % 5 != 1]


def level(image: Any) -> int | None:
    return None if image is None else image.getpixel((0, 0))[0]


@pytest.mark.parametrize("stream", [False, True])
def test_features_and_pictures(ds: Dataset, stream: bool) -> None:
    import datasets

    made = ds.to_datasets(["number", "caption", "sevens_value"], stream=stream)
    assert isinstance(made, datasets.IterableDataset if stream else datasets.Dataset)
    assert made.features == datasets.Features(
        {
            "number": datasets.Value("int64"),
            "caption": datasets.Value("string"),
            "sevens_value": datasets.Value("float32"),
            "image": datasets.Image(),
        }
    )
    rows = list(made)
    assert [(r["number"], level(r["image"])) for r in rows] == [(n, n or None) for n in NUMBERS]
    assert isinstance(rows[1]["image"], Image.Image)
    expected = ds.samples().project("caption, sevens_value").fetchall()
    assert [(r["caption"], r["sevens_value"]) for r in rows] == expected


def test_no_media_is_copied(ds: Dataset, tmp_path: Path) -> None:
    """The table holds where a picture is; what is saved and loaded again does too."""
    import datasets

    made = ds.to_datasets(["number"])
    stored = made.cast_column("image", datasets.Image(decode=False))
    assert stored[3]["image"]["bytes"] is None
    assert stored[3]["image"]["path"].startswith("mmdata-media://")
    made.save_to_disk(tmp_path / "saved")
    again = datasets.load_from_disk(tmp_path / "saved")
    assert level(again[3]["image"]) == NUMBERS[3]


def test_the_librarys_own_work(ds: Dataset) -> None:
    made = ds.to_datasets(["number"])
    few = made.filter(lambda n: n > 20, input_columns="number").map(lambda row: {"bright": level(row["image"])})
    assert few["bright"][:] == [n for n in NUMBERS if n > 20]
    assert ds.to_datasets(["number"], media=False).column_names == ["number"]
    assert "row_id" in ds.to_datasets(media=False).column_names


def test_workers_share_a_stream(ds: Dataset) -> None:
    stream = ds.to_datasets(["number"], stream=True)
    assert stream.num_shards == 4
    loader = DataLoader(stream, batch_size=None, num_workers=2)
    assert sorted((r["number"], level(r["image"])) for r in loader if r["image"]) == [(n, n) for n in NUMBERS if n]


def test_a_reference_is_a_file(ds: Dataset) -> None:
    ds.to_datasets(["number"])  # registers the file system
    row = ds.kept(0).to_pylist()[1]
    url = media_url(ds.store.url, row["image_path"], row["image_offset"], row["image_size"], "a b.png")
    with fsspec.open(url) as file:
        assert file.read() == synthetic.png(row["number"])
    fs, path = fsspec.core.url_to_fs(url)
    assert fs.info(path)["size"] == row["image_size"]
    assert Image.open(io.BytesIO(fs.cat_file(path))).size == (8, 8)
    with pytest.raises(FileNotFoundError):
        fs.open("mmdata-media://somewhere")
    with pytest.raises(OSError, match="is for reading"):
        fs.open(path, "wb")
