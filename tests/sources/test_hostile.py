"""Folders nobody should trust: every adopting source gives rows or one sentence, reads nothing outside, and soon.

What the rows must be is by hand: a sample whose bytes are there is ok, what is damaged, linked or too large says so.
"""

from __future__ import annotations

import io
import os
import resource
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmdata.adopt import adopted_rows
from mmdata.errors import SourceError
from mmdata.sources.kinds import KINDS

Rows = list[tuple[str, str]]  # (key or path, status)


def jpeg(value: int = 100) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(np.full((48, 64, 3), value, np.uint8)).save(sink, "JPEG")
    return sink.getvalue()


JPEG = jpeg()


def adopted(kind: str, path: Path, **options: Any) -> pa.Table:
    """Base rows of a whole source, as the first shards of a dataset."""
    source: Any = KINDS[kind](path=str(path), **options)  # type: ignore[call-arg]
    schema = source.schema()
    tables = [
        adopted_rows(shard, source.read(part, schema), kind, schema, 1000, part.label)
        for shard, part in enumerate(source.parts(1000))
    ]
    return pa.concat_tables(tables)


def member(name: str, data: bytes = JPEG, **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, b"", type=kind, linkname=target)


def write_tar(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))


def with_size(path: Path, name: str, claimed: int, length: int, **fields: Any) -> None:
    """A first header that claims `claimed` bytes, in a file of `length` that takes no room on disk."""
    info = member(name, JPEG, size=claimed, **fields)[0]
    with path.open("wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.write(JPEG)
        file.truncate(length)


def damaged(path: Path) -> None:
    write_tar(path, *(member(f"{k}.jpg") for k in "abc"))
    data = bytearray(path.read_bytes())
    second = 512 + -(-len(JPEG) // 512) * 512
    data[second + 100 : second + 300] = os.urandom(200)
    path.write_bytes(data)


def cut(path: Path, keep: int) -> None:
    write_tar(path, member("a.jpg"), member("b.jpg"))
    path.write_bytes(path.read_bytes()[:keep])


ONE = 512 + -(-len(JPEG) // 512) * 512  # bytes of a member

TARS: dict[str, tuple[Callable[[Path], Any], Rows | str]] = {
    "parts that climb": (
        lambda p: write_tar(p, member("../../etc/passwd.jpg"), member("/abs/x.jpg"), member("a/../b.jpg")),
        [("etc/passwd", "ok"), ("abs/x", "ok"), ("a/b", "ok")],
    ),
    "links and devices": (
        lambda p: write_tar(
            p,
            member("a.jpg"),
            link("b.jpg", "/etc/passwd"),
            link("c.jpg", "a.jpg", tarfile.LNKTYPE),
            link("d.jpg", "", tarfile.CHRTYPE),
            member("c.txt", b"only text"),
        ),
        [("a", "ok"), ("c", "missing_media")],
    ),
    "keys that come again": (
        lambda p: write_tar(p, member("a.jpg"), member("b.jpg"), member("a.jpg"), member("a.jpg")),
        [("a", "ok"), ("b", "ok"), ("a", "ok"), ("a", "ok")],
    ),
    "bodies that are none": (
        lambda p: write_tar(p, member("a.jpg", b""), member("b.jpg", b"<html>"), member("c.jpg", JPEG[:30])),
        [("a", "not_media"), ("b", "not_media"), ("c", "decode")],
    ),
    "json that nests": (
        lambda p: write_tar(p, member("a.jpg"), member("a.json", b"[" * 200_000), member("b.json", b'{"url": 5}')),
        [("a", "ok"), ("b", "missing_media")],
    ),
    "cut in a header": (lambda p: cut(p, ONE + 200), [("a", "ok"), ("0_cut", "missing_media")]),
    "cut in a body": (lambda p: cut(p, ONE + 600), [("a", "ok"), ("b", "missing_media")]),
    "empty": (lambda p: p.write_bytes(b""), [("0_cut", "missing_media")]),
    "zeros": (lambda p: p.write_bytes(bytes(10_240)), "holds no samples"),
    "no tar": (lambda p: p.write_bytes(b"%PDF-1.7 and so on" * 100), "is no tar"),
    "noise between members": (damaged, "is damaged"),
    "a member of 8 TB": (lambda p: with_size(p, "a.jpg", 8 << 40, 4096), [("a", "missing_media")]),
    "a picture of 3 GB": (lambda p: with_size(p, "a.jpg", 3 << 30, 4 << 30), [("a", "too_large")]),
    "a text of 3 GB": (lambda p: with_size(p, "a.json", 3 << 30, 4 << 30), [("a", "missing_media")]),
    "a pax header of 3 GB": (
        lambda p: with_size(p, "PaxHeader", 3 << 30, 4 << 30, type=tarfile.XHDTYPE),
        "a header of 3221225472 bytes",
    ),
}


def held_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


@pytest.mark.parametrize("name", TARS)
@pytest.mark.timeout(20)
def test_tars(name: str, tmp_path: Path) -> None:
    make, expected = TARS[name]
    make(tmp_path / "0.tar")
    before = held_mb()
    if isinstance(expected, str):
        with pytest.raises(SourceError, match=expected) as caught:
            adopted("webdataset", tmp_path)
        assert "\n" not in str(caught.value)
    else:
        table = adopted("webdataset", tmp_path)
        assert list(zip(*(table.column(n).to_pylist() for n in ("key", "status")), strict=True)) == expected
        for row in table.to_pylist():  # a reference leads into that very tar, and only where there is media
            assert row["image_path"] == (str(tmp_path / "0.tar") if row["status"] == "ok" else None)
    assert held_mb() - before < 100


@pytest.mark.timeout(20)
def test_a_pipe_is_no_tar_and_nobody_waits_for_it(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", member("a.jpg"))
    os.mkfifo(tmp_path / "1.tar")
    assert adopted("webdataset", tmp_path).column("key").to_pylist() == ["a"]


def test_a_folder_of_pictures_refers_to_nothing_outside(tmp_path: Path) -> None:
    """What is not followed has a row that says so, so that nobody wonders where it went."""
    (tmp_path / "secret").write_bytes(JPEG)
    folder = tmp_path / "pictures"
    (folder / "real").mkdir(parents=True)
    for name in ("a.jpg", "real/b.jpg"):
        (folder / name).write_bytes(JPEG)
    (folder / "inside.jpg").symlink_to("a.jpg")
    (folder / "outside.jpg").symlink_to(tmp_path / "secret")
    (folder / "nothing.jpg").symlink_to("gone.jpg")
    (folder / "up").symlink_to("..")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "metadata.csv").write_text("file_name,text\na.jpg,fine\n../secret,out\n/etc/passwd,abs\n")
    rows = {(r["path"], r["status"]): r for r in adopted("images", folder).to_pylist()}
    expected = {"a.jpg": "ok", "inside.jpg": "ok", "real/b.jpg": "ok"}
    expected |= dict.fromkeys(["outside.jpg", "nothing.jpg", "up", "../secret", "/etc/passwd"], "missing_media")
    assert {path: status for path, status in rows} == expected
    assert {r["image_path"] for r in rows.values() if r["status"] != "ok"} == {None}
    assert rows["a.jpg", "ok"]["caption"] == "fine"


@pytest.mark.parametrize("kind", ["parquet", "img2dataset"])
def test_two_columns_of_one_name(kind: str, tmp_path: Path) -> None:
    names = ["image", "image", "key", "status"]
    arrays = [pa.array([JPEG]), pa.array([JPEG]), pa.array(["0"]), pa.array(["success"])]
    pq.write_table(pa.Table.from_arrays(arrays, names), tmp_path / "00000.parquet")
    with pytest.raises(SourceError, match="has two columns 'image'"):
        adopted(kind, tmp_path)


def test_cells_that_lead_elsewhere(tmp_path: Path) -> None:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = [{"bytes": JPEG, "path": "a"}, {"bytes": None, "path": "/etc/passwd"}, {"bytes": None, "path": None}, None]
    pq.write_table(pa.table({"image": pa.array(cells, image)}), tmp_path / "0.parquet")
    assert adopted("parquet", tmp_path).column("status").to_pylist() == ["ok"] + ["missing_media"] * 3


def shard(folder: Path, **columns: Any) -> Path:
    """A shard as img2dataset writes it, of two rows, with other columns in place of its own."""
    table = {"url": ["u", "v"], "key": ["00", "01"], "status": ["success", "failed_to_download"]}
    table |= {"error_message": [None, "HTTP Error 404: Not Found"], "width": [64, None], **columns}
    pq.write_table(pa.table(table), folder / "00000.parquet")
    write_tar(folder / "00000.tar", member("00.jpg"), member("02.jpg"))
    return folder


def test_numbers_that_went_through_pandas(tmp_path: Path) -> None:
    """Which makes floats of integers where one is missing, and NaN of that."""
    rows = adopted("img2dataset", shard(tmp_path, width=[64.0, float("nan")], height=pa.array([48, None], pa.int8())))
    assert rows.column("width_px").to_pylist() == [64, None]
    assert rows.column("height_px").to_pylist() == [48, None]
    assert rows.column("status").to_pylist() == ["ok", "http_4xx"]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"width": ["wide", None]}, "the column for width_px is string"),
        ({"width": [0.5, 1.0]}, "the column for width_px is double"),
        ({"caption": [["a"], ["b"]]}, "the column for caption is list"),
        ({"url": [{"a": 1}, {"a": 2}]}, "the column for url is struct"),
    ],
)
def test_columns_of_other_types_are_told_by_name(columns: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=words):
        adopted("img2dataset", shard(tmp_path, **columns))


def test_rows_and_tar_that_disagree(tmp_path: Path) -> None:
    """A success without media is missing_media; media without a row is no row: the Parquet says what there is."""
    rows = adopted("img2dataset", shard(tmp_path, key=["07", "01"]))
    assert rows.column("key").to_pylist() == ["07", "01"]
    assert rows.column("status").to_pylist() == ["missing_media", "http_4xx"]


def test_a_torn_parquet_is_one_sentence(tmp_path: Path) -> None:
    shard(tmp_path)
    data = (tmp_path / "00000.parquet").read_bytes()
    (tmp_path / "00000.parquet").write_bytes(data[:-30])
    with pytest.raises(SourceError, match=r"cannot read .*00000\.parquet"):
        adopted("img2dataset", tmp_path)


def test_a_dataset_with_code_is_refused_and_the_code_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(SourceError, match="cannot load"):
        adopted("hf", folder)
    assert not (tmp_path / "ran").exists()
