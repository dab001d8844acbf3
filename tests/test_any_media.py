"""Sound, video and whatever else: fetched as it is, referred to by its role, exported and read like pictures."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tarfile
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from server import JPEG, BadServer

import mmdata
from mmdata.errors import RecipeError


def tone(rate_hz: int) -> bytes:
    """A tenth of a second of silence as WAV, made by Python's own writer."""
    sink = io.BytesIO()
    with wave.open(sink, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(rate_hz)
        sound.writeframes(bytes(2 * (rate_hz // 10)))
    return sink.getvalue()


def film() -> bytes:
    """The boxes that an MP4 begins with (ISO/IEC 14496-12, 4.3): its type, then media data."""
    brands = b"isom" + struct.pack(">I", 512) + b"isomavc1"
    return struct.pack(">I", 8 + len(brands)) + b"ftyp" + brands + struct.pack(">I", 24) + b"mdat" + bytes(16)


BODIES = {
    "/a.wav": ("audio/wav", tone(8000)),
    "/b.wav": ("audio/wav", tone(16_000)),
    "/c.mp4": ("video/mp4", film()),
    "/d.jpg": ("image/jpeg", JPEG),
    "/e.html": ("audio/wav", b"<!DOCTYPE html><html><p>not here any more</p></html>"),
}


@pytest.fixture(scope="module")
def server() -> Iterator[BadServer]:
    with BadServer(BODIES) as running:
        yield running


def run(server: BadServer, tmp_path: Path, media: str, steps: list[Any] | None = None, **more: Any) -> Any:
    urls = [server.url(path) for path in BODIES]
    pq.write_table(pa.table({"url": urls, "caption": list(BODIES)}), tmp_path / "list.parquet")
    fetch = {"media": media, "allow_private": True, "robots": "ignore", "per_host": 9, "per_host_rate": None}
    source = {"kind": "urls", "path": str(tmp_path / "list.parquet"), "caption": "caption"}
    recipe = {"name": "any", "dataset": str(tmp_path / "ds"), "source": source, "fetch": fetch, "steps": steps or []}
    return mmdata.run({**recipe, **more}, runner="inline")


def rows(ds: Any) -> dict[str, dict[str, Any]]:
    return {r["caption"]: r for r in ds.sql("SELECT * FROM samples ORDER BY row_id").to_arrow_table().to_pylist()}


def stored(ds: Any, row: dict[str, Any], role: str) -> bytes:
    data: bytes = ds.read_media(*(row[f"{role}_{part}"] for part in ("path", "offset", "size")))
    return data


def test_sound_is_stored_as_fetched(server: BadServer, tmp_path: Path) -> None:
    ds = run(server, tmp_path, "audio")
    found = rows(ds)
    assert {c: r["status"] for c, r in found.items() if r["status"] == "ok" and c != "/c.mp4"} == {
        "/a.wav": "ok",
        "/b.wav": "ok",
    }
    assert found["/d.jpg"]["status"] == found["/e.html"]["status"] == "not_media"
    row = found["/a.wav"]
    assert stored(ds, row, "audio") == BODIES["/a.wav"][1]
    assert (row["audio_ext"], row["image_path"], row["width_px"]) == ("wav", None, None)
    assert row["sha256"] == hashlib.sha256(BODIES["/a.wav"][1]).hexdigest()
    assert not [name for name in row if name.startswith("video_")]


def test_any_media_has_the_role_that_its_bytes_have(server: BadServer, tmp_path: Path) -> None:
    ds = run(server, tmp_path, "any")
    found = rows(ds)
    for caption, role, ext in (("/a.wav", "audio", "wav"), ("/c.mp4", "video", "mp4"), ("/d.jpg", "image", "jpg")):
        row = found[caption]
        assert (row["status"], row[f"{role}_ext"]) == ("ok", ext)
        assert [r for r in ("image", "video", "audio") if row[f"{r}_path"] is not None] == [role]
        assert stored(ds, row, role) == BODIES[caption][1]
    assert found["/e.html"]["status"] == "not_media"


def test_a_stage_that_reads_images_is_refused_where_there_are_none(server: BadServer, tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"step 1 \(probe_image\) reads images, and there are none: fetch.media is au"
    ):
        run(server, tmp_path, "audio", ["probe_image"])
    assert not (tmp_path / "ds").exists()


def test_a_stage_that_reads_images_leaves_the_others_with_a_reason(server: BadServer, tmp_path: Path) -> None:
    ds = run(server, tmp_path, "any", [{"probe_image": {"on_error": "keep"}}])
    found = rows(ds)
    assert found["/a.wav"]["image_probe_reason"] == "missing_media"
    assert (found["/d.jpg"]["image_probe_reason"], found["/d.jpg"]["verdict"]) == (None, "kept")


FILTER = [{"filter": {"wav": "audio_ext = 'wav'"}}]


# webdataset closes a tar when the garbage is collected
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_sound_is_exported_and_read(server: BadServer, tmp_path: Path) -> None:
    import webdataset

    ds = run(server, tmp_path, "audio", FILTER)
    kept = [BODIES["/a.wav"][1], BODIES["/b.wav"][1]]
    ds.export(tmp_path / "tars")
    with tarfile.open(tmp_path / "tars" / "00000.tar") as tar:
        assert [m.name.rpartition(".")[2] for m in tar] == ["wav", "txt", "json"] * 2
    shards = webdataset.WebDataset(str(tmp_path / "tars" / "00000.tar"), shardshuffle=False)
    assert [s["wav"] for s in shards] == kept
    ds.export(tmp_path / "parquet", format="parquet")
    table = pq.read_table(tmp_path / "parquet" / "00000.parquet")
    assert [row["bytes"] for row in table["audio"].to_pylist()] == kept
    assert json.loads(table.schema.metadata[b"huggingface"]) == {"info": {"features": {"audio": {"_type": "Audio"}}}}
    table = ds.to_arrow(["caption"], media=True)
    assert table.column_names == ["caption", "audio"]
    assert [row["audio"]["bytes"] for row in table.to_pylist()] == kept
    with pytest.raises(RecipeError, match="decode='pil' is for images, and this is audio; ask for decode='bytes'"):
        ds.to_torch()
    with pytest.raises(RecipeError, match="energon is written for images"):
        ds.export(tmp_path / "energon", format="energon")


@pytest.mark.long
def test_hugging_face_and_torch_read_sound(server: BadServer, tmp_path: Path) -> None:
    import datasets

    ds = run(server, tmp_path, "audio", FILTER)
    kept = [BODIES["/a.wav"][1], BODIES["/b.wav"][1]]
    for form in ("parquet", "datasets"):
        ds.export(tmp_path / form, format=form)
        [file] = [p for p in (tmp_path / form).rglob("*.parquet")]
        found = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache"))
        assert isinstance(found.features["audio"], datasets.Audio)
        plain = found.cast_column("audio", datasets.Audio(decode=False))
        assert [row["audio"]["bytes"] for row in plain] == kept
    stream = ds.to_datasets(["caption"], stream=True)
    assert [row["audio"]["bytes"] for row in stream] == kept
    whole = ds.to_datasets(["caption"])
    assert isinstance(whole.features["audio"], datasets.Audio)
    plain = whole.cast_column("audio", datasets.Audio(decode=False))
    assert [fsspec.open(row["audio"]["path"]).open().read() for row in plain] == kept
    assert [s["audio"] for s in ds.to_torch(decode="bytes", shuffle=False)] == kept


def test_a_further_hash_is_a_column(server: BadServer, tmp_path: Path) -> None:
    urls = [server.url("/d.jpg"), server.url("/status/404")]
    pq.write_table(pa.table({"url": urls, "n": [1, 2]}), tmp_path / "list.parquet")
    fetch = {"compute_hash": "md5", "allow_private": True, "robots": "ignore"}
    source = {"kind": "urls", "path": str(tmp_path / "list.parquet"), "columns": ["n"]}
    recipe = {"name": "h", "dataset": str(tmp_path / "h"), "source": source, "fetch": fetch}
    ds = mmdata.run({**recipe, "steps": [{"filter": {"hashed": "md5 IS NOT NULL"}}]}, runner="inline")
    found = ds.sql("SELECT n, md5 FROM samples ORDER BY row_id").fetchall()
    assert found == [(1, hashlib.md5(JPEG).hexdigest()), (2, None)]
    ds.export(tmp_path / "out", columns=["md5"])
    assert pq.read_table(tmp_path / "out" / "00000.parquet")["md5"].to_pylist() == [found[0][1]]


@pytest.mark.parametrize(
    ("fetch", "source", "message"),
    [
        ({"compute_hash": "md5"}, {"columns": ["MD5"]}, "fetch.compute_hash writes a column 'md5', and source.columns"),
        ({"verify_hash": ["sha1", "sha256"]}, {}, r"has no column 'sha1' \(fetch.verify_hash\)"),
        ({"bbox": "faces"}, {}, r"has no column 'faces' \(fetch.bbox\)"),
        ({"media": "video"}, None, "fetch.media: video gives rows columns that adopted media has not"),
    ],
)
def test_what_does_not_go_together_is_told_first(
    tmp_path: Path, fetch: dict[str, Any], source: dict[str, Any] | None, message: str
) -> None:
    pq.write_table(pa.table({"url": ["http://a.test/"], "MD5": ["x"]}), tmp_path / "list.parquet")
    mine: Any = {"kind": "urls", "path": str(tmp_path / "list.parquet"), **(source or {})}
    if source is None:
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos" / "a.jpg").write_bytes(JPEG)
        mine = [mine, {"kind": "images", "path": str(tmp_path / "photos")}]
    with pytest.raises(mmdata.MmdataError, match=message):
        mmdata.run({"name": "x", "dataset": str(tmp_path / "ds"), "source": mine, "fetch": fetch}, runner="inline")
    assert not (tmp_path / "ds").exists()
