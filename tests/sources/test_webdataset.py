"""Adopting WebDatasets that the webdataset library wrote, and tars that nobody should have written."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import pytest
import webdataset as wds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures import adopted, media_of, picture, rows_of

from mmdata.errors import SourceError
from mmdata.ingest import uid_of


def write_shards(folder: Path, samples: list[dict[str, Any]], per_tar: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with wds.ShardWriter(f"{folder}/%05d.tar", maxcount=per_tar, verbose=0) as writer:
        for sample in samples:
            writer.write(sample)
    return folder


def tar_of(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_samples_become_rows_and_media_stays_where_it_is(tmp_path: Path) -> None:
    pictures = [picture(i, "JPEG" if i % 2 else "PNG") for i in range(7)]
    samples = [
        {
            "__key__": f"cats/{i:04d}",
            "jpg" if i % 2 else "png": data,
            "txt": f"Katze {i} ü",
            "json": json.dumps({"n": i, "score": i / 2, "tags": ["a", i], "url": None if i == 3 else f"http://x/{i}"}),
        }
        for i, data in enumerate(pictures)
    ]
    folder = write_shards(tmp_path / "in", samples, 3)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    source = {"kind": "webdataset", "path": str(folder), "columns": ["n", "score", "tags"]}
    ds = adopted(tmp_path / "ds", source)
    rows = rows_of(ds)
    assert [r["key"] for r in rows] == [f"cats/{i:04d}" for i in range(7)]
    assert [r["caption"] for r in rows] == [f"Katze {i} ü" for i in range(7)]
    assert [(r["n"], r["score"], json.loads(r["tags"])) for r in rows] == [(i, i / 2, ["a", i]) for i in range(7)]
    assert [(r["width_px"], r["original_height_px"], r["size_bytes"]) for r in rows] == [
        (40 + i, 30, len(p)) for i, p in enumerate(pictures)
    ]
    assert [r["row_id"] >> 24 for r in rows] == [0, 0, 0, 1, 1, 1, 2]
    assert rows[2]["path"] == "00000.tar/cats/0002.png"
    assert rows[2]["uid"] == uid_of("url", "http://x/2", "Katze 2 ü")
    assert rows[3]["uid"] == uid_of("path", "00001.tar/cats/0003.jpg", "Katze 3 ü")
    assert {r["status"] for r in rows} == {"ok"}
    assert {r["attempts"] for r in rows} == {0}
    assert media_of(ds) == pictures
    assert [r["aspect_ratio"] for r in rows] == pytest.approx([(40 + i) / 30 for i in range(7)])
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert not list((tmp_path / "ds").rglob("*.tar"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the library leaves its file open
def test_the_same_samples_as_the_webdataset_library(tmp_path: Path) -> None:
    """Keys with folders and dots in the extension, several pictures a sample, members that belong to none."""
    members = [
        ("readme", b"no extension"),
        ("__meta__/x.json", b"{}"),
        ("a/1.left.jpg", picture(1)),
        ("a/1.right.jpg", picture(2)),
        ("a/1.txt", b"one"),
        ("a.b/2.jpg", picture(3)),
        ("a.b/2.cls", b"7"),
        ("3.PNG", picture(4, "PNG")),
        ("4.txt", b"no picture"),
        ("1.jpg", picture(5)),
    ]
    path = tar_of(tmp_path / "x.tar", members)
    ours = rows_of(adopted(tmp_path / "ds", {"kind": "webdataset", "path": str(path), "image": "right.jpg;jpg;png"}))
    theirs = list(wds.WebDataset(str(path), shardshuffle=False))
    assert [r["key"] for r in ours] == [s["__key__"] for s in theirs]
    chosen = [next((s[e] for e in ("right.jpg", "jpg", "png") if e in s), None) for s in theirs]
    assert (
        media_of(adopted(tmp_path / "ds", {"kind": "webdataset", "path": str(path), "image": "right.jpg;jpg;png"}))
        == chosen
    )
    assert [r["caption"] for r in ours] == [s["txt"].decode() if "txt" in s else None for s in theirs]
    assert [r["status"] for r in ours] == ["ok", "ok", "ok", "missing_media", "ok"]
    assert ours[3]["status_detail"] == "the sample has no image"
    left = rows_of(adopted(tmp_path / "ds2", {"kind": "webdataset", "path": str(path)}))
    assert left[0]["path"] == "x.tar/a/1.left.jpg"


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    keys=st.lists(
        st.from_regex(r"[a-z0-9_\-]{1,6}(/[a-z0-9.]{1,5})?", fullmatch=True), min_size=1, max_size=6, unique=True
    ),
    seed=st.integers(0, 1000),
)
def test_every_byte_that_readers_get_is_the_files(
    tmp_path_factory: pytest.TempPathFactory, keys: list[str], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("property")
    keys = [k for k in keys if not k.rpartition("/")[2].startswith(".") and not k.endswith(".")] or ["k"]
    samples = [(k, picture(seed + i, width=8, height=8)) for i, k in enumerate(keys)]
    path = tar_of(folder / "x.tar", [(f"{k}.jpg", data) for k, data in samples])
    ds = adopted(folder / "ds", {"kind": "webdataset", "path": str(path)}, steps=[])
    with tarfile.open(path) as tar:
        told = [tar.extractfile(m).read() for m in tar]  # type: ignore[union-attr]
    assert media_of(ds) == told


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the library leaves its file open
def test_an_export_keeps_keys_with_folders_and_the_bytes(tmp_path: Path) -> None:
    members = [(f"cats.v1/{i:03d}.{e}", d) for i in range(5) for e, d in (("jpg", picture(i)), ("txt", b"cat %d" % i))]
    source = {"kind": "webdataset", "path": str(tar_of(tmp_path / "x.tar", members))}
    export = {"format": "webdataset", "path": str(tmp_path / "out")}
    ds = adopted(tmp_path / "ds", source, steps=[{"filter": {"odd": "width_px % 2 = 1"}}], export=export)
    samples = list(wds.WebDataset(str(tmp_path / "out" / "00000.tar"), shardshuffle=False))
    assert [(s["__key__"], s["jpg"], s["txt"]) for s in samples] == [
        (f"cats.v1/{i:03d}", picture(i), b"cat %d" % i) for i in (1, 3)
    ]
    assert [ds.why(s["__key__"]).verdict for s in samples] == ["kept", "kept"]


def test_keys_may_repeat_and_why_shows_every_row(tmp_path: Path) -> None:
    for name in ("a", "b"):
        tar_of(tmp_path / "in" / f"{name}.tar", [("1.jpg", picture(ord(name))), ("1.jpg", picture(ord(name) + 1))])
    ds = adopted(tmp_path / "ds", {"kind": "webdataset", "path": str(tmp_path / "in")})
    rows = rows_of(ds)
    assert [r["key"] for r in rows] == ["1"] * 4
    assert len({r["row_id"] for r in rows}) == 4
    assert len({r["image_offset"] for r in rows[:2]}) == 2
    story = ds.why("1")
    assert [s.row["row_id"] for s in (story, *story.others)] == [r["row_id"] for r in rows]


def test_a_cut_tar_keeps_what_came_before_and_tells_of_the_cut(tmp_path: Path) -> None:
    pictures = [picture(i) for i in range(4)]
    path = tar_of(tmp_path / "in" / "x.tar", [(f"{i}.jpg", p) for i, p in enumerate(pictures)])
    whole = path.read_bytes()
    path.write_bytes(whole[: 512 + len(pictures[0]) + 5000])
    ds = adopted(tmp_path / "ds", {"kind": "webdataset", "path": str(path)})
    rows = rows_of(ds)
    sound = [p for p in media_of(ds) if p is not None]
    assert sound == pictures[: len(sound)]
    assert len(sound) == len(rows) - 1
    assert rows[-1]["status"] == "missing_media"
    assert "cut short" in rows[-1]["status_detail"]
    assert rows[-1]["key"] == str(len(sound))
    # At a member's end nothing tells what follows, but that something is lost is told.
    path.write_bytes(whole[: 512 + -(-len(pictures[0]) // 512) * 512])
    rows = rows_of(adopted(tmp_path / "ds2", {"kind": "webdataset", "path": str(path)}))
    assert [(r["key"], r["status"]) for r in rows] == [("0", "ok"), ("x_cut", "missing_media")]
    path.write_bytes(b"")
    assert [r["key"] for r in rows_of(adopted(tmp_path / "ds3", {"kind": "webdataset", "path": str(path)}))] == [
        "x_cut"
    ]


def test_what_is_no_picture_costs_its_row(tmp_path: Path) -> None:
    members = [("1.jpg", b"<html>not here</html>"), ("2.jpg", b""), ("3.jpg", picture(3)), ("4.jpg", picture(4)[:-200])]
    rows = rows_of(adopted(tmp_path / "ds", {"kind": "webdataset", "path": str(tar_of(tmp_path / "x.tar", members))}))
    # A cut body has a good header: the stage that decodes it finds out.
    assert [r["status"] for r in rows] == ["not_media", "not_media", "ok", "ok"]
    assert [r["image_path"] is None for r in rows] == [True, True, False, False]
    assert rows[0]["status_detail"] == "html"


def test_links_and_names_that_lead_out_read_nothing_outside(tmp_path: Path) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(picture(9))
    path = tmp_path / "in" / "x.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for name, kind in (("l.jpg", tarfile.SYMTYPE), ("h.jpg", tarfile.LNKTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, str(secret)
            tar.addfile(link)
        for name in ("../../up.jpg", str(secret)):
            info = tarfile.TarInfo(name)
            data = picture(1)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    ds = adopted(tmp_path / "ds", {"kind": "webdataset", "path": str(path)})
    assert media_of(ds) == [picture(1)] * 2
    assert all(".." not in r["key"] and not r["key"].startswith("/") for r in rows_of(ds))
    assert {r["image_path"] for r in rows_of(ds)} == {str(path)}


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"\xff\xd8\xff" + bytes(2000), "x.tar", "is no tar"),
        (b"\x1f\x8b" + bytes(2000), "x.tar.gz", "is compressed"),
    ],
)
def test_what_is_no_tar_is_the_users_to_mend(tmp_path: Path, content: bytes, name: str, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=message):
        adopted(tmp_path / "ds", {"kind": "webdataset", "path": str(tmp_path / name), "columns": ["n"]})
    assert not (tmp_path / "ds" / "rows").exists()


def test_damage_in_the_middle_names_the_place(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "x.tar", [(f"{i}.jpg", picture(i)) for i in range(3)])
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        second = tar.getmembers()[1].offset
    data[second + 10] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(SourceError, match=f"x.tar is damaged: .* at byte {second}"):
        adopted(tmp_path / "ds", {"kind": "webdataset", "path": str(path)})


def test_braces_globs_and_memory(tmp_path: Path) -> None:
    for i in range(4):
        tar_of(tmp_path / f"{i:03d}.tar", [(f"{i}.jpg", picture(i))])
    for pattern in ("{000..003}.tar", "00{0,1,2,3}.tar", "0*.tar", "00{0..1}.tar|00[23].tar"):
        patterns = [f"{tmp_path}/{p}" for p in pattern.split("|")]
        sources = [{"kind": "webdataset", "path": p} for p in patterns]
        ds = adopted(tmp_path / f"ds-{abs(hash(pattern))}", sources if len(sources) > 1 else sources[0])
        assert [r["key"] for r in rows_of(ds)] == ["0", "1", "2", "3"]
    with pytest.raises(SourceError, match=r"there is no .*004\.tar"):
        adopted(tmp_path / "no", {"kind": "webdataset", "path": f"{tmp_path}/{{000..004}}.tar"})
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/h2/far.tar", (tmp_path / "002.tar").read_bytes())
    try:
        ds = adopted(tmp_path / "far", {"kind": "webdataset", "path": "memory://h2/far.tar"})
        assert rows_of(ds)[0]["image_path"].startswith("memory://")
        assert media_of(ds) == [picture(2)]
    finally:
        fs.rm("/h2", recursive=True)
