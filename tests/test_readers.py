"""An export read by the tools people use: webdataset, Hugging Face datasets, DuckDB, pandas, tar.

Every reader must give the captions and the pixels that went in; pixels are those Pillow decodes from the source bytes.
"""

from __future__ import annotations

import io
import subprocess
from pathlib import Path
from typing import Any

import duckdb
import kept_rows
import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from PIL import Image

from mmdata.export import ExportOptions, export

Pixels = npt.NDArray[np.uint8]


def pixels(data: bytes) -> Pixels:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> kept_rows.KeptRows:
    """32 kept rows; captions NULL in every fifth row, `rare` NULL in the first seven only."""
    return kept_rows.dataset(tmp_path_factory.mktemp("dataset") / "dataset")


@pytest.fixture(scope="module")
def tars(rows: kept_rows.KeptRows, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tars") / "out"
    return export(rows, ExportOptions(path=str(out), shard_rows=12), "name: pets\n").path


@pytest.fixture(scope="module")
def parquet(rows: kept_rows.KeptRows, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("parquet") / "out"
    options = ExportOptions(path=str(out), shard_rows=12, format="parquet", row_group_bytes="6KB")
    return export(rows, options, "name: pets\n").path


@pytest.fixture
def hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`datasets` with its caches in a folder of the test, and no network."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", str(tmp_path / "downloads"))
    monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", str(tmp_path / "extracted"))
    datasets.disable_progress_bars()
    return lambda *args, **kwargs: datasets.load_dataset(*args, cache_dir=str(tmp_path / "cache"), **kwargs)["train"]


KEYS = [f"{n:07d}" for n in range(48) if n % 3]
CAPTIONS = [kept_rows.caption(int(k)) for k in KEYS]
RARE = [None if int(k) < 11 else int(k) / 3 for k in KEYS]


# webdataset 1.0 and datasets 5 leave the tars they read to the garbage collector, which is theirs to mend
leaks = pytest.mark.filterwarnings("ignore::ResourceWarning", "default::pytest.PytestUnraisableExceptionWarning")


@leaks
def test_webdataset(rows: kept_rows.KeptRows, tars: Path) -> None:
    import webdataset

    dataset = webdataset.WebDataset([str(p) for p in sorted(tars.glob("*.tar"))], shardshuffle=False).decode("rgb8")
    samples = list(dataset)
    assert [s["__key__"] for s in samples] == KEYS
    assert [s["txt"] for s in samples] == [c or "" for c in CAPTIONS]
    for sample in samples:
        assert np.array_equal(sample["jpg"], pixels(rows.pictures[sample["__key__"]]))
        assert sample["json"]["clip_score"] == np.float32(int(sample["__key__"]) / 100 - 0.25)


def _check_hugging_face(rows: kept_rows.KeptRows, dataset: Any, image: str) -> None:
    import datasets

    assert isinstance(dataset.features[image], datasets.Image)
    decoded = [np.asarray(picture.convert("RGB")) for picture in dataset[image]]
    assert len(decoded) == len(KEYS)
    for key, found in zip(KEYS, decoded, strict=True):
        assert np.array_equal(found, pixels(rows.pictures[key]))


@leaks
def test_hugging_face_webdataset(rows: kept_rows.KeptRows, tars: Path, hugging_face: Any) -> None:
    dataset = hugging_face("webdataset", data_files={"train": str(tars / "*.tar")})
    assert dataset["__key__"][:] == KEYS
    assert dataset["txt"][:] == [c or "" for c in CAPTIONS]
    _check_hugging_face(rows, dataset, "jpg")
    scores = [sample["clip_score"] for sample in dataset["json"]]
    assert scores == [np.float32(int(k) / 100 - 0.25) for k in KEYS]


@leaks
def test_hugging_face_on_the_folder_reads_the_card(rows: kept_rows.KeptRows, tars: Path, hugging_face: Any) -> None:
    """The card's header says which files are data, so that statistics and Parquet files beside are left alone."""
    _check_hugging_face(rows, hugging_face(str(tars)), "jpg")


@leaks
def test_hugging_face_stumbles_over_json_nulls_which_is_why_they_stay_out(
    rows: kept_rows.KeptRows, tmp_path: Path, hugging_face: Any
) -> None:
    """The form of img2dataset, a NULL in the first five rows and a number later: if this passes, the rule can go."""
    out = export(rows, ExportOptions(path=str(tmp_path / "out"), columns=("rare",), json_nulls=True), None).path
    with pytest.raises(Exception, match="An error occurred while generating the dataset") as caught:
        hugging_face("webdataset", data_files={"train": str(out / "*.tar")})
    assert "double to null" in str(caught.value.__cause__)


@leaks
def test_hugging_face_parquet(rows: kept_rows.KeptRows, parquet: Path, hugging_face: Any) -> None:
    dataset = hugging_face("parquet", data_files={"train": str(parquet / "*.parquet")})
    assert dataset["caption"][:] == CAPTIONS
    assert dataset["rare"][:] == RARE
    _check_hugging_face(rows, dataset, "image")
    _check_hugging_face(rows, hugging_face(str(parquet)), "image")


@pytest.mark.parametrize("folder", ["tars", "parquet"])
def test_duckdb_and_pandas(folder: str, request: pytest.FixtureRequest) -> None:
    out: Path = request.getfixturevalue(folder)
    query = f"SELECT key, caption, rare, phash, labels FROM '{out}/*.parquet' ORDER BY key"
    found = duckdb.sql(query).fetchall()
    assert [r[:3] for r in found] == list(zip(KEYS, CAPTIONS, RARE, strict=True))
    assert [r[3] for r in found] == [int(k) * 0x9E3779B97F4A7C15 % 2**64 for k in KEYS]
    assert [r[4] for r in found] == [["cat", "ü"][: 1 + int(k) % 2] for k in KEYS]
    frame = pd.concat([pd.read_parquet(p) for p in sorted(out.glob("*.parquet"))])
    assert [None if pd.isna(c) else c for c in frame["caption"]] == CAPTIONS
    assert [None if pd.isna(v) else v for v in frame["rare"]] == RARE


def test_pandas_reads_the_pictures(rows: kept_rows.KeptRows, parquet: Path) -> None:
    frame = pd.concat([pd.read_parquet(p) for p in sorted(parquet.glob("*.parquet"))])
    for key, image in zip(frame["key"], frame["image"], strict=True):
        assert np.array_equal(pixels(image["bytes"]), pixels(rows.pictures[key]))


def test_gnu_tar_lists_without_a_word(tars: Path) -> None:
    for tar in sorted(tars.glob("*.tar")):
        done = subprocess.run(["tar", "tf", str(tar)], check=True, capture_output=True, text=True)
        assert done.stderr == ""
        assert len(done.stdout.splitlines()) % 3 == 0
