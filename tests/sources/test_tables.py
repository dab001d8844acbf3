"""Adopting Parquet with picture bytes and datasets of HF `datasets`: cells stay where they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import adopted, media_of, picture, rows_of

from mmdata.errors import SourceError
from mmdata.ingest import uid_of


def test_parquet_of_bytes_over_several_files_and_row_groups(tmp_path: Path) -> None:
    pictures = [picture(i, "PNG" if i % 3 else "JPEG") for i in range(11)]
    folder = tmp_path / "in"
    folder.mkdir()
    for part, (first, last) in enumerate([(0, 4), (4, 5), (5, 11)]):
        table = pa.table(
            {
                "img": pa.array(pictures[first:last], pa.large_binary()),
                "alt": [f"caption {i}" for i in range(first, last)],
                "link": [f"http://x/{i}" if i % 2 else None for i in range(first, last)],
                "note": pa.array([i / 4 for i in range(first, last)], pa.float16()),
            }
        )
        pq.write_table(table, folder / f"{part}.parquet", row_group_size=2)
    source = {
        "kind": "parquet",
        "path": str(folder),
        "image": "img",
        "caption": "alt",
        "url": "link",
        "columns": ["note"],
    }
    ds = adopted(tmp_path / "ds", source, fetch={"shard_rows": 3})
    rows = rows_of(ds)
    assert media_of(ds) == pictures
    assert [r["row_id"] >> 24 for r in rows] == [i // 3 for i in range(11)]
    assert [r["caption"] for r in rows] == [f"caption {i}" for i in range(11)]
    assert [r["note"] for r in rows] == [i / 4 for i in range(11)]
    assert [r["image_ext"] for r in rows] == ["png" if i % 3 else "jpg" for i in range(11)]
    assert [r["width_px"] for r in rows] == [40 + i for i in range(11)]
    assert rows[5]["image_path"] == f"{folder}/2.parquet#img"
    assert rows[5]["image_offset"] == 0
    assert rows[5]["uid"] == uid_of("url", "http://x/5", "caption 5")
    assert rows[6]["uid"] == uid_of("path", "2.parquet#1", "caption 6")
    assert len({r["key"] for r in rows}) == 11


def test_struct_cells_nulls_and_paths_that_lead_out(tmp_path: Path) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(picture(1))
    cells = [
        {"bytes": picture(0), "path": "a.jpg"},
        {"bytes": None, "path": str(secret)},
        None,
        {"bytes": b"no picture", "path": None},
    ]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(cells, kind), "text": ["a", "b", "c", "d"]}), tmp_path / "x.parquet")
    ds = adopted(tmp_path / "ds", {"kind": "parquet", "path": str(tmp_path / "x.parquet")})
    rows = rows_of(ds)
    assert [r["status"] for r in rows] == ["ok", "missing_media", "missing_media", "not_media"]
    assert rows[0]["image_path"] == f"{tmp_path}/x.parquet#image.bytes"
    assert "leads out" in rows[1]["status_detail"]
    assert media_of(ds) == [picture(0), None, None, None]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": "imgae"}, "no column 'imgae' .*did you mean 'image'"),
        ({"image": "text"}, "expected bytes"),
        ({"columns": ["licence"]}, "no column 'licence'"),
        ({"caption": "txt"}, "no column 'txt'"),
        ({"path": "nothing.parquet"}, "there is nothing at"),
    ],
)
def test_wrong_columns_are_said_at_plan(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    pq.write_table(pa.table({"image": [picture(0)], "text": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(SourceError, match=message):
        adopted(tmp_path / "ds", {"kind": "parquet", "path": str(tmp_path / "x.parquet"), **changes})
    assert not (tmp_path / "ds").exists()


def hf_dataset(pictures: list[bytes]) -> datasets.Dataset:
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    rows = {
        "image": [{"bytes": p, "path": None} for p in pictures],
        "text": [f"caption {i} ü" for i in range(len(pictures))],
        "label": [i % 2 for i in range(len(pictures))],
    }
    return datasets.Dataset.from_dict(rows, features=features)


def test_a_folder_of_save_to_disk(tmp_path: Path) -> None:
    pictures = [picture(i, "PNG") for i in range(9)]
    made = hf_dataset(pictures)
    made.save_to_disk(str(tmp_path / "one"), num_shards=2)
    datasets.DatasetDict({"train": made, "test": made.select(range(2))}).save_to_disk(str(tmp_path / "several"))
    for name, split, count in (("one", "train", 9), ("several", "train", 9), ("several", "test", 2)):
        source = {"kind": "hf", "path": str(tmp_path / name), "split": split, "columns": ["label"]}
        ds = adopted(tmp_path / f"ds-{name}-{split}", source, fetch={"shard_rows": 4})
        rows = rows_of(ds)
        assert media_of(ds) == pictures[:count]
        assert [(r["caption"], r["label"]) for r in rows] == [(f"caption {i} ü", i % 2) for i in range(count)]
        assert all(r["image_path"].startswith(f"{tmp_path}/{name}/") for r in rows)
        assert all(r["image_path"].endswith(".arrow#image.bytes") for r in rows)
    with pytest.raises(SourceError, match=r"has no split 'tset'.*did you mean 'test'"):
        adopted(tmp_path / "no", {"kind": "hf", "path": str(tmp_path / "several"), "split": "tset"})


def test_what_load_dataset_reads_and_streaming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pictures = [picture(i) for i in range(5)]
    folder = tmp_path / "data"
    folder.mkdir()
    hf_dataset(pictures).to_parquet(str(folder / "train-00000.parquet"))
    cached = adopted(tmp_path / "ds1", {"kind": "hf", "path": str(folder)})
    assert media_of(cached) == pictures
    assert rows_of(cached)[0]["image_path"].startswith(f"{tmp_path}/cache/")
    streamed = adopted(tmp_path / "ds2", {"kind": "hf", "path": str(folder), "streaming": True})
    assert media_of(streamed) == pictures
    assert rows_of(streamed)[0]["image_path"] == f"{folder}/train-00000.parquet#image.bytes"
    expected = [(r["text"], r["label"]) for r in datasets.load_dataset(str(folder), split="train")]
    labelled = adopted(tmp_path / "ds3", {"kind": "hf", "path": str(folder), "columns": ["label"]})
    assert [(r["caption"], r["label"]) for r in rows_of(labelled)] == expected


def test_pictures_that_a_cached_imagefolder_only_refers_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.jpg").write_bytes(picture(i))
    ds = adopted(tmp_path / "ds", {"kind": "hf", "path": str(folder)})
    assert media_of(ds) == [picture(i) for i in range(3)]
    assert [r["image_path"] for r in rows_of(ds)] == [f"{folder}/{i}.jpg" for i in range(3)]


@pytest.mark.parametrize("revision", [None, "main", "abc"])
def test_a_hub_id_needs_a_commit(tmp_path: Path, revision: str | None) -> None:
    with pytest.raises(SourceError, match=r"needs source\.revision: the commit"):
        adopted(tmp_path / "ds", {"kind": "hf", "path": "somebody/pictures", "revision": revision})


def test_hostile_state_json(tmp_path: Path) -> None:
    hf_dataset([picture(0)]).save_to_disk(str(tmp_path / "x"))
    state = tmp_path / "x" / "state.json"
    state.write_text(state.read_text().replace("data-00000-of-00001.arrow", "../../../etc/passwd"))
    with pytest.raises(SourceError, match="outside of its folder"):
        adopted(tmp_path / "ds", {"kind": "hf", "path": str(tmp_path / "x")})
