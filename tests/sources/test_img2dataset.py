"""Adopting folders in img2dataset's layouts, made by hand here; the golden test runs the real img2dataset.

Column names, types and messages are those of img2dataset 1.47.0; the messages of failed downloads come out of urllib.
"""

from __future__ import annotations

import http.client
import io
import socket
import ssl
import tarfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import adopted, media_of, picture, rows_of

from mmdata.errors import SourceError
from mmdata.ingest import uid_of
from mmdata.sources.img2dataset import status_of


def http_error(code: int) -> str:
    return str(urllib.error.HTTPError("http://x", code, "whatever", http.client.HTTPMessage(), None))


def url_error(reason: Exception) -> str:
    return str(urllib.error.URLError(reason))  # type: ignore[arg-type]


LOOP = urllib.request.HTTPRedirectHandler.inf_msg
MESSAGES: list[tuple[str, str | None, tuple[str, int | None]]] = [
    ("success", None, ("ok", None)),
    ("failed_to_download", http_error(404), ("http_4xx", 404)),
    ("failed_to_download", http_error(410), ("http_4xx", 410)),
    ("failed_to_download", http_error(429), ("http_429", 429)),
    ("failed_to_download", http_error(503), ("http_5xx", 503)),
    ("failed_to_download", f"HTTP Error 302: {LOOP}Found", ("too_many_redirects", 302)),
    ("failed_to_download", url_error(socket.gaierror(-2, "Name or service not known")), ("dns", None)),
    ("failed_to_download", url_error(socket.gaierror(-3, "Temporary failure in name resolution")), ("dns", None)),
    ("failed_to_download", url_error(ConnectionRefusedError(111, "Connection refused")), ("connect", None)),
    ("failed_to_download", str(ConnectionResetError(104, "Connection reset by peer")), ("connect", None)),
    ("failed_to_download", str(http.client.RemoteDisconnected("Remote end closed connection")), ("connect", None)),
    ("failed_to_download", str(http.client.IncompleteRead(b"ab", 3)), ("connect", None)),
    ("failed_to_download", url_error(OSError(113, "No route to host")), ("connect", None)),
    ("failed_to_download", url_error(TimeoutError("timed out")), ("timeout", None)),
    ("failed_to_download", "The read operation timed out", ("timeout", None)),
    (
        "failed_to_download",
        url_error(ssl.SSLCertVerificationError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed")),
        ("tls", None),
    ),
    ("failed_to_download", "unknown url type: 'nonsense'", ("bad_url", None)),
    ("failed_to_download", "URL can't contain control characters. '/a b'", ("bad_url", None)),
    ("failed_to_download", "Use of image disallowed by X-Robots-Tag directive", ("opted_out", None)),
    ("failed_to_download", "hash mismatch", ("hash_mismatch", None)),
    ("failed_to_resize", "image too small", ("filtered", None)),
    ("failed_to_resize", "aspect ratio too large", ("filtered", None)),
    ("failed_to_resize", "Image decoding error", ("decode", None)),
    ("failed_to_download", None, ("connect", None)),
]


@pytest.mark.parametrize(("status", "message", "expected"), MESSAGES)
def test_what_img2dataset_says(status: str, message: str | None, expected: tuple[str, int | None]) -> None:
    assert status_of(status, message) == expected


def parquet_row(key: str, status: str = "success", message: str | None = None, **more: Any) -> dict[str, Any]:
    ok = status == "success"
    return {
        "license": f"l{key[-1]}",
        "caption": f"caption {key}",
        "url": f"http://x/{key}",
        "key": key,
        "status": status,
        "error_message": message,
        "width": 40 + int(key) if ok else None,
        "height": 30 if ok else None,
        "original_width": 400 if ok else None,
        "original_height": 300 if ok else None,
        "exif": "{}" if ok else None,
        "sha256": "ab" * 32 if ok else None,
        **more,
    }


def shard(folder: Path, name: str, rows: list[dict[str, Any]], keys: list[str] | None, drop: int = 0) -> None:
    """`<name>.parquet` and a tar with pictures of these keys, cut short by `drop` bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    types = {n: pa.int32() for n in ("width", "height", "original_width", "original_height")}
    columns = {n: pa.array([r[n] for r in rows], types.get(n)) for n in rows[0]}
    pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    if keys is None:
        return
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key in keys:
            for extension, data in (("jpg", picture(int(key))), ("txt", b"x"), ("json", b"{}")):
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    data = buffer.getvalue()
    (folder / f"{name}.tar").write_bytes(data[: len(data) - drop])


def test_the_rows_of_the_parquet_in_its_order(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    rows = [
        parquet_row("002"),
        parquet_row("000", "failed_to_download", http_error(404)),
        parquet_row("001"),
        parquet_row("003", "failed_to_resize", "image too small"),
    ]
    shard(folder, "00000", rows, ["001", "002"])
    shard(folder, "00007", [parquet_row("010"), parquet_row("011")], ["010"])
    (folder / "00000_stats.json").write_text("{}")
    (folder / "_tmp").mkdir()
    ds = adopted(tmp_path / "ds", {"kind": "img2dataset", "path": str(folder), "columns": ["license"]})
    found = rows_of(ds)
    assert [(r["key"], r["status"], r["status_detail"], r["http_status"]) for r in found] == [
        ("002", "ok", None, None),
        ("000", "http_4xx", "HTTP Error 404: whatever", 404),
        ("001", "ok", None, None),
        ("003", "filtered", "image too small", None),
        ("010", "ok", None, None),
        ("011", "missing_media", "not in 00007.tar", None),
    ]
    assert media_of(ds) == [picture(2), None, picture(1), None, picture(10), None]
    first = found[0]
    assert (first["width_px"], first["original_width_px"], first["sha256"], first["exif"]) == (42, 400, "ab" * 32, "{}")
    assert (first["license"], first["uid"]) == ("l2", uid_of("url", "http://x/002", "caption 002"))
    assert found[5]["width_px"] is None
    assert [r["row_id"] >> 24 for r in found] == [0, 0, 0, 0, 1, 1]


def test_a_cut_tar_costs_the_rows_behind_the_cut(tmp_path: Path) -> None:
    keys = ["000", "001", "002"]
    shard(tmp_path / "in", "00000", [parquet_row(k) for k in keys], keys, drop=10240)
    found = rows_of(ds := adopted(tmp_path / "ds", {"kind": "img2dataset", "path": str(tmp_path / "in")}))
    sound = [p for p in media_of(ds) if p is not None]
    assert sound == [picture(i) for i in range(len(sound))]
    lost = [r for r in found if r["status"] != "ok"]
    assert {r["status"] for r in lost} <= {"missing_media"}
    shard(tmp_path / "more", "00000", [parquet_row(k) for k in keys], keys, drop=10240 + 5000)
    found = rows_of(adopted(tmp_path / "ds2", {"kind": "img2dataset", "path": str(tmp_path / "more")}))
    assert found[2]["status"] == "missing_media"
    assert "cut short" in found[2]["status_detail"]


def test_without_a_parquet_the_tars_samples_are_the_rows(tmp_path: Path) -> None:
    shard(tmp_path / "in", "00000", [parquet_row("000")], ["000", "001"])
    (tmp_path / "in" / "00000.parquet").unlink()
    found = rows_of(adopted(tmp_path / "ds", {"kind": "img2dataset", "path": str(tmp_path / "in")}))
    assert [(r["key"], r["caption"], r["status"]) for r in found] == [("000", "x", "ok"), ("001", "x", "ok")]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "00000.parquet").write_bytes(b""), "img2dataset was stopped in that shard"),
        (lambda f: (f / "00000.parquet").write_bytes(b"PAR1 torn"), "cannot read .*00000.parquet"),
        (lambda f: [p.unlink() for p in f.iterdir()], "holds no shards of img2dataset"),
    ],
)
def test_what_cannot_be_read_is_the_users_to_mend(tmp_path: Path, spoil: Any, message: str) -> None:
    shard(tmp_path / "in", "00000", [parquet_row("000")], ["000"])
    spoil(tmp_path / "in")
    with pytest.raises(SourceError, match=message):
        adopted(tmp_path / "ds", {"kind": "img2dataset", "path": str(tmp_path / "in")})


@pytest.mark.parametrize("changes", [{"columns": ["licence"]}, {"uid": "uuid"}, {"caption": "text"}])
def test_columns_that_are_not_there(tmp_path: Path, changes: dict[str, Any]) -> None:
    shard(tmp_path / "in", "00000", [parquet_row("000")], ["000"])
    with pytest.raises(SourceError, match="has no column"):
        adopted(tmp_path / "ds", {"kind": "img2dataset", "path": str(tmp_path / "in"), **changes})
    assert not (tmp_path / "ds").exists()


def test_datacomp_keeps_uids_and_tells_of_what_no_shard_has(tmp_path: Path) -> None:
    uids = [f"{n:032x}" for n in range(5)]
    rows = [parquet_row("000", uid=uids[0]), parquet_row("001", "failed_to_download", "timed out", uid=uids[1])]
    shard(tmp_path / "pool" / "shards", "00000000", rows, ["000"])
    (tmp_path / "pool" / "metadata").mkdir()
    for part, some in enumerate([uids[:2], uids[2:]]):
        metadata = {
            "uid": some,
            "url": [f"http://y/{u}" for u in some],
            "text": [f"text {u}" for u in some],
            "original_width": pa.array([500] * len(some), pa.int32()),
            "original_height": [400] * len(some),
            "clip_l14_similarity_score": [0.25] * len(some),
            "sha256": ["cd" * 32] * len(some),
        }
        pq.write_table(pa.table(metadata), tmp_path / "pool" / "metadata" / f"{part}.parquet")
    source = {"kind": "datacomp", "path": str(tmp_path / "pool")}
    found = rows_of(adopted(tmp_path / "ds", source, fetch={"shard_rows": 2}))
    assert [(r["uid"], r["status"]) for r in found] == [
        (uids[0], "ok"),
        (uids[1], "timeout"),
        *((u, "missing_media") for u in uids[2:]),
    ]
    assert [r["row_id"] >> 24 for r in found] == [0, 0, 1, 1, 2]
    assert (found[2]["url"], found[2]["caption"]) == (f"http://y/{uids[2]}", f"text {uids[2]}")
    assert (found[2]["original_width_px"], found[2]["sha256"]) == (500, "cd" * 32)
    assert len({r["key"] for r in found}) == 5
