"""Each further format, opened by the library it is for, which must give the captions, values and bytes that went in.

MosaicML streaming and Energon live in `.venv-peers` (see scripts/setup-peers), where this package is installed too.
"""

# long because: one section a format, each with its library

from __future__ import annotations

import hashlib
import io
import json
import os
import sqlite3
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb
import kept_rows
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from mmdata.errors import MissingExtra, RecipeError, StoreError
from mmdata.export import ExportOptions, export

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / ".venv-peers" / "bin" / "python"
KEYS = [f"{n:07d}" for n in range(48) if n % 3]
CAPTIONS = [kept_rows.caption(int(k)) for k in KEYS]
RARE = [None if int(k) < 11 else int(k) / 3 for k in KEYS]
PHASH = [int(k) * 0x9E3779B97F4A7C15 % 2**64 for k in KEYS]
VECTOR = pa.list_(pa.float16(), 4)


def _with_vectors(rows: kept_rows.KeptRows) -> kept_rows.KeptRows:
    """The rows with an embedding (n, n/2, -n, 1) beside the other columns."""
    for shard, table in enumerate(rows.tables):
        numbers = [int(k) for k in table.column("key").to_pylist()]
        values = np.array([[n, n / 2, -n, 1] for n in numbers], np.float16).ravel()
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(values), type=VECTOR)
        rows.tables[shard] = table.append_column("vector", vectors)
    return rows


def vectors() -> list[list[float]]:
    return [[int(k), int(k) / 2, -int(k), 1] for k in KEYS]


@pytest.fixture
def rows(tmp_path: Path) -> kept_rows.KeptRows:
    return _with_vectors(kept_rows.dataset(tmp_path / "dataset"))


def run(rows: Any, path: Path, **options: Any) -> Path:
    return export(rows, ExportOptions(path=str(path), shard_rows=10, **options), "name: pets\n").path


CHOSEN = ("license", "rare", "phash", "labels", "clip_score", "vector")


def test_embeddings_are_exported_when_they_are_named(rows: kept_rows.KeptRows, tmp_path: Path) -> None:
    plain = run(rows, tmp_path / "plain")
    assert "vector" not in pq.read_schema(plain / "00000.parquet").names
    named = run(rows, tmp_path / "named", columns=("vector",), json_nulls=True)
    schema = pq.read_schema(named / "00000.parquet")
    assert schema.field("vector").type == VECTOR
    found = [v for p in sorted(named.glob("*.parquet")) for v in pq.read_table(p).column("vector").to_pylist()]
    assert found == vectors()
    tarred = subprocess.run(["tar", "xOf", str(named / "00000.tar"), "0000001.json"], check=True, capture_output=True)
    assert "vector" not in json.loads(tarred.stdout)
    assert "exif" in json.loads(tarred.stdout)


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    return lambda path: datasets.load_dataset(str(path), cache_dir=str(tmp_path / "cache"), split="train")


def test_hugging_face_datasets(rows: kept_rows.KeptRows, tmp_path: Path, load: Any) -> None:
    import datasets

    out = run(rows, tmp_path / "out", format="datasets", columns=CHOSEN)
    assert sorted(p.name for p in (out / "data").iterdir()) == [f"train-{n:05d}-of-00004.parquet" for n in range(4)]
    header = yaml.safe_load((out / "README.md").read_text().split("---\n")[1])
    declared = datasets.Features._from_yaml_list(header["dataset_info"]["features"])
    found = load(out)
    assert found.features == declared
    assert isinstance(found.features["image"], datasets.Image)
    assert found.features["vector"] == datasets.List(datasets.Value("float16"), length=4)
    assert found["key"][:] == KEYS
    assert found["caption"][:] == CAPTIONS
    assert found["rare"][:] == RARE
    assert found["phash"][:] == PHASH
    assert found["vector"][:] == vectors()
    raw = found.cast_column("image", datasets.Image(decode=False))
    assert [(i["path"], i["bytes"]) for i in raw["image"]] == [(f"{k}.jpg", rows.pictures[k]) for k in KEYS]
    assert found[0]["image"].size == (49, 40)
    streamed = datasets.load_dataset(str(out), split="train", streaming=True)
    assert [s["key"] for s in streamed] == KEYS


def test_datasets_without_images(rows: kept_rows.KeptRows, tmp_path: Path, load: Any) -> None:
    found = load(run(rows, tmp_path / "out", format="datasets", include_media=False))
    assert "image" not in found.column_names
    assert found["key"][:] == KEYS


def test_plain_files(rows: kept_rows.KeptRows, tmp_path: Path) -> None:
    out = run(rows, tmp_path / "out", format="files")
    found = sorted(p.relative_to(out).as_posix() for p in out.glob("*/*"))
    per_shard = [KEYS[n : n + 10] for n in range(0, 32, 10)]
    assert found == sorted(
        f"{shard:05d}/{key}.{end}"
        for shard, keys in enumerate(per_shard)
        for key in keys
        for end in ("jpg", "txt", "json")
    )
    for shard, keys in enumerate(per_shard):
        assert pq.read_table(out / f"{shard:05d}.parquet").column("key").to_pylist() == keys
        assert json.loads((out / f"{shard:05d}_stats.json").read_text())["successes"] == len(keys)
        for key in keys:
            folder = out / f"{shard:05d}"
            assert (folder / f"{key}.jpg").read_bytes() == rows.pictures[key]
            assert (folder / f"{key}.txt").read_text() == (kept_rows.caption(int(key)) or "")
            values = json.loads((folder / f"{key}.json").read_text())
            assert values["caption"] == kept_rows.caption(int(key))
            assert values["phash"] == PHASH[KEYS.index(key)]
            assert values["error_message"] is None


def test_plain_files_keep_their_own_extensions_and_need_no_picture(tmp_path: Path) -> None:
    rows = kept_rows.dataset(
        tmp_path / "dataset",
        image_ext=lambda n: "png" if n % 2 else "jpeg",
        image_path=lambda n: None if n == 4 else "media/blob.tar",
    )
    out = run(rows, tmp_path / "out", format="files")
    found = {p.name for p in out.glob("*/00000[0]*")}
    assert {"0000001.png", "0000002.jpg", "0000004.json", "0000004.txt"} <= found
    assert not {"0000004.jpg", "0000004.png"} & found


def test_keys_that_begin_with_folders(tmp_path: Path) -> None:
    """As those of an adopted WebDataset do."""
    rows = kept_rows.dataset(tmp_path / "dataset", key=lambda n: f"part.{n % 2}/{n:03d}")
    files = run(rows, tmp_path / "files", format="files")
    assert (files / "00000" / "part.1" / "001.jpg").read_bytes() == rows.pictures["0000001"]
    with sqlite3.connect(run(rows, tmp_path / "energon", format="energon") / ".nv-meta" / "index.sqlite") as database:
        found = database.execute("SELECT sample_key FROM samples ORDER BY tar_file_id, sample_index").fetchall()
    database.close()
    assert [k for (k,) in found] == [f"part.{int(k) % 2}/{int(k):03d}" for k in KEYS]


def test_plain_files_by_size(rows: kept_rows.KeptRows, tmp_path: Path) -> None:
    options = ExportOptions(path=str(tmp_path / "out"), format="files", shard_size="10KB")
    out = export(rows, options, None).path
    sizes = [sum(f.stat().st_size for f in p.iterdir()) for p in sorted(out.iterdir()) if p.is_dir()]
    assert len(sizes) > 4
    assert max(sizes) <= 10_000


def test_lance(rows: kept_rows.KeptRows, tmp_path: Path) -> None:
    import lance

    out = run(rows, tmp_path / "out", format="lance", columns=CHOSEN)
    table = lance.dataset(out / "data.lance")
    assert [f.count_rows() for f in table.get_fragments()] == [10, 10, 10, 2]
    assert table.schema.field("vector").type == VECTOR
    found = table.to_table().to_pylist()
    assert [r["key"] for r in found] == KEYS
    assert [r["caption"] for r in found] == CAPTIONS
    assert [r["rare"] for r in found] == RARE
    assert [r["phash"] for r in found] == PHASH
    assert [r["vector"] for r in found] == vectors()
    assert [r["image"] for r in found] == [rows.pictures[k] for k in KEYS]
    assert table.take([31, 0], columns=["image"]).column(0).to_pylist() == [
        rows.pictures[KEYS[31]],
        rows.pictures[KEYS[0]],
    ]
    assert table.count_rows("phash > 9223372036854775807") == sum(p > 2**63 - 1 for p in PHASH)
    assert not list(out.glob(".fragments"))
    again = run(rows, tmp_path / "again", format="lance", columns=CHOSEN, workers=3)
    one, two = (sorted((o / "data.lance" / "data").iterdir()) for o in (out, again))
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]


def test_an_error_inside_lances_writer_is_ours(rows: kept_rows.KeptRows, tmp_path: Path) -> None:
    rows.media = rows.media[:-30_000]
    with pytest.raises(StoreError, match=r"media/blob.tar is cut short"):
        run(rows, tmp_path / "out", format="lance")
    assert [p.name for p in tmp_path.iterdir()] == []


def test_lance_of_nothing(rows: kept_rows.KeptRows, tmp_path: Path) -> None:
    import lance

    rows.tables = [t.slice(0, 0) for t in rows.tables]
    assert lance.dataset(run(rows, tmp_path / "out", format="lance") / "data.lance").count_rows() == 0


def _subset(path: Path) -> list[str]:
    """As DataComp's resharder reads it: dtype u8,u8, sorted, searched by halves of the uid."""
    subset = np.load(path, mmap_mode="r")
    assert subset.dtype == np.dtype("u8,u8")
    pairs = [(int(a), int(b)) for a, b in subset]
    assert pairs == sorted(set(pairs))
    return [f"{a:016x}{b:016x}" for a, b in pairs]


def test_datacomp_subset(tmp_path: Path) -> None:
    """Uids whose halves sort otherwise than their rows, one of them twice, and one in capitals."""
    uids = {n: f"{(n * 0x9E3779B97F4A7C15) % 2**64:016x}{n:016x}" for n in range(48)}
    uids[2], uids[4] = uids[1], uids[4].upper()
    rows = kept_rows.dataset(tmp_path / "dataset", uid=lambda n: uids[n])
    out = run(rows, tmp_path / "out", format="datacomp")
    expected = {uids[int(k)].lower() for k in KEYS}
    assert len(expected) == 31
    assert _subset(out / "subset.npy") == sorted(expected)
    assert rows.reads == 0
    assert "subset.npy" in (out / "README.md").read_text()


def test_a_uid_that_is_no_number_is_told(tmp_path: Path) -> None:
    rows = kept_rows.dataset(tmp_path / "dataset", uid=lambda n: "row-1" if n == 1 else f"{n:032x}")
    with pytest.raises(RecipeError, match="uid 'row-1'"):
        run(rows, tmp_path / "out", format="datacomp")


def test_an_empty_subset(rows: kept_rows.KeptRows, tmp_path: Path) -> None:
    rows.tables = [t.slice(0, 0) for t in rows.tables]
    assert _subset(run(rows, tmp_path / "out", format="datacomp") / "subset.npy") == []


# In .venv-peers


def peer(code: str, *arguments: str) -> Any:
    """The JSON that the last line of a program in `.venv-peers` prints."""
    assert PEERS.exists(), "the environment of the peers is not there: run make test"
    fixtures = Path(kept_rows.__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(fixtures)])}
    environment |= {"NO_ALBUMENTATIONS_UPDATE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([str(PEERS), "-c", code, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


MDS = """
import hashlib, json, pathlib, sys, kept_rows
from mmdata.export import ExportOptions, export
from streaming import StreamingDataset
folder = pathlib.Path(sys.argv[1])
rows = kept_rows.dataset(folder / "dataset")
def run(name, **options):
    return export(rows, ExportOptions(path=str(folder / name), format="mds", shard_rows=10, **options), None).path
plain, shuffled, again = run("plain"), run("shuffled", shuffle="full"), run("again", shuffle="full", workers=3)
def plainly(value):
    return value.item() if hasattr(value, "item") else value
def read(path):
    ds = StreamingDataset(local=str(path), batch_size=1, shuffle=False)
    samples = [ds[i] for i in range(len(ds))]
    return [{k: hashlib.sha256(v).hexdigest() if k == "image" else plainly(v) for k, v in s.items()} for s in samples]
same = all((again / p.name).read_bytes() == p.read_bytes() for p in shuffled.iterdir())
print(json.dumps([sorted(p.name for p in plain.iterdir()), same, read(plain), [s["key"] for s in read(shuffled)]]))
"""


def test_mosaicml_streaming(tmp_path: Path) -> None:
    names, same, found, shuffled = peer(MDS, str(tmp_path))
    assert names == ["README.md", "_mmdata_export.json", "index.json", *(f"shard.{n:05d}.mds" for n in range(4))]
    assert same
    assert [sample["key"] for sample in found] == KEYS
    assert shuffled != KEYS
    assert sorted(shuffled) == KEYS
    for sample, key, caption, rare, phash in zip(found, KEYS, CAPTIONS, RARE, PHASH, strict=True):
        assert (sample["caption"], sample["rare"], sample["phash"]) == (caption, rare, phash)
        assert sample["image"] == hashlib.sha256(kept_rows.picture(int(key))).hexdigest()
        assert sample["labels"] == ["cat", "ü"][: 1 + int(key) % 2]
        assert sample["clip_score"] == np.float32(int(key) / 100 - 0.25)
        assert sample["error_message"] is None


def test_mds_is_asked_for_where_it_is_not_installed(rows: kept_rows.KeptRows, tmp_path: Path) -> None:
    with pytest.raises(MissingExtra, match=r"pip install 'mmdata\[mds\]'"):
        run(rows, tmp_path / "out", format="mds")
    assert list(tmp_path.iterdir()) == []


ENERGON = """
import json, sys
from megatron.energon import WorkerConfig, get_loader, get_val_dataset
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset import BaseWebdatasetFactory
ours, theirs, tars = sys.argv[1], EPath(sys.argv[2]), sys.argv[3].split(",")
config = WorkerConfig(rank=0, world_size=1, num_workers=0)
ds = get_val_dataset(ours, split_part="train", batch_size=1, worker_config=config)
found = []
for batch in get_loader(ds):
    image = batch.image[0]
    found.append([batch.__key__[0], batch.caption[0], list(image.shape), float(image.sum())])
parts = BaseWebdatasetFactory.prepare_dataset(
    theirs, tars, split_parts_ratio=[("train", 1.0)], shuffle_seed=None, workers=1)
print(json.dumps([found, sorted(parts)]))
"""


def _tables(path: Path) -> dict[str, list[Any]]:
    with sqlite3.connect(path) as database:
        found = {t: sorted(database.execute(f"SELECT * FROM {t}").fetchall()) for t in ("samples", "sample_parts")}
        found["schema"] = sorted(
            n for (n,) in database.execute("SELECT name FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'")
        )
    database.close()
    return found


def test_energon_loads_it_and_its_own_prepare_writes_the_same_metadata(tmp_path: Path) -> None:
    rows = kept_rows.dataset(tmp_path / "dataset")
    out, theirs = run(rows, tmp_path / "out", format="energon"), run(rows, tmp_path / "theirs")
    samples, parts = peer(ENERGON, str(out), str(theirs), ",".join(f"{n:05d}.tar" for n in range(4)))
    assert parts == ["jpg", "json", "txt"]
    found = {key.rpartition("/")[2]: rest for key, *rest in samples}
    assert sorted(found) == KEYS
    for key, caption in zip(KEYS, CAPTIONS, strict=True):
        text, shape, total = found[key]
        with Image.open(io.BytesIO(rows.pictures[key])) as image:
            pixels = np.asarray(image.convert("RGB"))
        assert text == (caption or "")
        assert shape == [3, *pixels.shape[:2]]
        assert total == pytest.approx(float(pixels.sum()) / 255, rel=1e-5)
    for tar in sorted(out.glob("*.tar")):
        assert tar.read_bytes() == (theirs / tar.name).read_bytes()
        ours = tar.with_suffix(".tar.idx").read_bytes()
        assert ours == (theirs / tar.name).with_suffix(".tar.idx").read_bytes()
        assert struct.unpack("<Q", ours[-8:])[0] == tar.stat().st_size - 1024
    assert _tables(out / ".nv-meta" / "index.sqlite") == _tables(theirs / ".nv-meta" / "index.sqlite")
    info = [json.loads((o / ".nv-meta" / ".info.json").read_text()) for o in (out, theirs)]
    assert info[0] == info[1]
    split = [yaml.safe_load((o / ".nv-meta" / "split.yaml").read_text())["split_parts"] for o in (out, theirs)]
    assert split[0]["train"] == [f"{n:05d}.tar" for n in range(4)]
    assert split[1]["train"] == ["{00000..00003}.tar"]  # collapsed, the same four


def test_energon_refuses_one_key_twice(tmp_path: Path) -> None:
    """In different shards, which no other format minds."""
    rows = kept_rows.dataset(tmp_path / "dataset", key=lambda n: f"{n % 24:07d}")
    assert run(rows, tmp_path / "tars").exists()
    with pytest.raises(RecipeError, match="two samples of the export have the same key"):
        run(rows, tmp_path / "out", format="energon")


@pytest.mark.parametrize(("folder", "is_refused"), [("x.jpg", True), ("x.json/deep", True), ("x.png", False)])
def test_a_file_and_a_folder_of_one_name_are_refused(tmp_path: Path, folder: str, is_refused: bool) -> None:
    rows = kept_rows.dataset(tmp_path / "dataset", key=lambda n: {1: "x", 2: f"{folder}/y"}.get(n, f"{n:07d}"))
    if is_refused:
        clash = rf"{folder.split('/')[0]} would be a file of the sample 'x' and the folder of the sample '{folder}/y'"
        with pytest.raises(RecipeError, match=clash):
            run(rows, tmp_path / "out", format="files")
        assert not (tmp_path / "out").exists()
    else:
        out = run(rows, tmp_path / "out", format="files")
        assert sorted(p.suffix for p in out.glob(f"*/{folder}/y.*")) == [".jpg", ".json", ".txt"]


@pytest.mark.parametrize(
    ("format", "event", "count"),
    [
        ("lance", "commit", 3),
        ("lance", "rename", 1),
        ("energon", "commit", 6),
        ("datasets", "commit", 3),
        ("files", "commit", 4),
    ],
)
def test_killed_and_run_again(tmp_path: Path, format: str, event: str, count: int) -> None:
    """In the middle of the shards, and when all is written and noted; lance's own names and times are its own."""
    fixtures = Path(kept_rows.__file__).parent
    paths = os.pathsep.join([str(fixtures.parents[1]), str(fixtures)])
    command = [sys.executable, kept_rows.__file__, str(tmp_path / "dataset"), str(tmp_path / "out"), format, event]
    subprocess.run([*command, str(count)], env={**os.environ, "PYTHONPATH": paths}, check=False)
    assert not (tmp_path / "out").exists()
    rows = kept_rows.dataset(tmp_path / "dataset")
    out, whole = (export(rows, ExportOptions(path=str(tmp_path / n), format=format, shard_rows=10), "name: pets\n").path
                  for n in ("out", "whole"))  # fmt: skip
    if event == "rename":
        assert rows.reads == 32  # of `whole` alone
    files = [
        {
            p.relative_to(o).as_posix(): p.read_bytes()
            for p in o.rglob("*")
            if p.is_file() and not p.name.endswith(("_stats.json", ".manifest", ".txn", "_hint.json"))
        }
        for o in (out, whole)
    ]
    manifest = [f.pop("_mmdata_export.json") for f in files]
    assert files[0] == files[1]
    if format != "lance":
        assert manifest[0] == manifest[1]
    else:
        import lance

        assert lance.dataset(out / "data.lance").to_table().equals(lance.dataset(whole / "data.lance").to_table())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


def test_duckdb_reads_the_columns_of_every_format_that_has_parquet(rows: kept_rows.KeptRows, tmp_path: Path) -> None:
    for format in ("datasets", "files", "energon"):
        out = run(rows, tmp_path / format, format=format, shuffle="full", seed=9)
        pattern = "data/*.parquet" if format == "datasets" else "*.parquet"
        found = duckdb.sql(f"SELECT key, caption, rare, phash FROM '{out}/{pattern}' ORDER BY key").fetchall()
        assert found == list(zip(KEYS, CAPTIONS, RARE, PHASH, strict=True))
