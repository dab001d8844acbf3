"""A shard from URLs to base rows and a tar: every row accounted for, whatever its URL does."""

# long because: one hard list of rows, and what must become of each

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import pickle
import random
import socket
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pydantic import ValidationError
from server import JPEG, BadServer, picture

from mmdata import fetch_rows
from mmdata.columns import STATUSES, base_schema
from mmdata.errors import RetryableError, StoreError
from mmdata.ingest import IngestCounts, ingest_shard, key_of, uid_of
from mmdata.media import image, resolver
from mmdata.pool import Unwatched
from mmdata.prepare import prepare
from mmdata.settings import FetchOptions
from mmdata.store import Store

# pytest sets its own filters, so that Pillow's remarks on damaged EXIF show here; mmdata filters them.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

FREE = {"host_limits": {"127.0.0.1": {"connections": None, "per_s": None}}, "host_failures": 1000}
FETCH = FetchOptions(allow_private=True, timeout_s=2, shard_rows=1000, max_bytes=2_000_000, **FREE)


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture(400, 300, exif=exif)


def sixteen_bit() -> bytes:
    sink = io.BytesIO()
    Image.fromarray(np.full((300, 400), 100 * 257, np.uint16)).save(sink, format="PNG")
    return sink.getvalue()


def bomb() -> bytes:
    """A small PNG whose header announces 65,536 x 65,536 px, with the right checksum."""
    data = bytearray(picture(20, 20, format="PNG"))
    data[16:24] = struct.pack(">II", 65_536, 65_536)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


BODIES = {
    "/cut.jpg": ("image/jpeg", JPEG[: len(JPEG) // 2]),
    "/page.jpg": ("image/jpeg", b"<!DOCTYPE html><html></html>"),
    "/drawing.svg": ("image/svg+xml", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    "/turned.jpg": ("image/jpeg", turned()),
    "/deep.png": ("image/png", sixteen_bit()),
    "/glass.png": ("image/png", picture(400, 300, "RGBA", format="PNG")),
    "/print.jpg": ("image/jpeg", picture(400, 300, "CMYK")),
    "/bomb.png": ("image/png", bomb()),
    "/empty.jpg": ("image/jpeg", b""),
    "/wrong.txt": ("text/plain", JPEG),
    "/x,y.jpg": ("image/jpeg", JPEG),
}


@pytest.fixture(scope="module")
def server() -> Iterator[BadServer]:
    with BadServer(BODIES) as running:
        yield running


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "data"))


def listed(urls: list[str | None], **more: list[Any]) -> pa.Table:
    captions = more.pop("caption", [f"caption {n}" for n in range(len(urls))])
    return pa.table({"url": pa.array(urls, pa.string()), "caption": pa.array(captions, pa.string()), **more})


def ingested(store: Store, table: pa.Table, fetch: FetchOptions = FETCH, shard: int = 0) -> list[dict[str, Any]]:
    ingest_shard(store, shard, table, "urls", fetch, "a1")
    return store.read_table(f"rows/{shard:05d}.g0.parquet").to_pylist()


def test_uid_by_hand() -> None:
    # printf 'url\0http://a.test/x.jpg\0a cat' | sha256sum | cut -c1-32, and so on
    assert uid_of("url", "http://a.test/x.jpg", "a cat") == "a2ddb24991273699810ba4a903296909"
    assert uid_of("url", None, None) == "5595621780ac4b5b67f303e547f1e91a"
    assert uid_of("path", "a\u00fc", "") == "a6efccbab6ce029f82b7671e8a765d29"


@pytest.mark.parametrize(
    ("shard", "index", "shard_rows", "key"),
    [
        (0, 0, 10_000, "000000000"),
        (3, 42, 10_000, "000030042"),
        (123, 9_999, 10_000, "001239999"),
        (100_000, 7, 10_000, "1000000007"),
        (3, 42, 1_000, "00003042"),
        (3, 1_000, 1_001, "000031000"),  # log10(1001) is above 3: four digits
        (2, 0, 1, "00002"),  # log10(1) = 0: the shard alone
    ],
)
def test_keys_are_img2datasets(shard: int, index: int, shard_rows: int, key: str) -> None:
    assert key_of(shard, index, shard_rows) == key


def hard_list(server: BadServer) -> list[tuple[str | None, str]]:
    return [
        (server.url("/ok"), "ok"),
        (server.url("/cut.jpg"), "decode"),
        (server.url("/page.jpg"), "not_media"),
        (server.url("/drawing.svg"), "not_media"),
        (server.url("/turned.jpg"), "ok"),
        (server.url("/deep.png"), "ok"),
        (server.url("/glass.png"), "ok"),
        (server.url("/print.jpg"), "ok"),
        (server.url("/bomb.png"), "too_many_pixels"),
        (server.url("/empty.jpg"), "not_media"),
        (server.url("/wrong.txt"), "ok"),
        (server.url("/x,y.jpg"), "ok"),
        (server.url("/nowhere"), "http_4xx"),
        (server.url("/status/429"), "http_429"),
        (server.url("/status/500"), "http_5xx"),
        (server.url("/hop/2"), "ok"),
        (server.url("/hop/9"), "too_many_redirects"),
        (server.url("/slow/30"), "timeout"),
        (server.url("/drip"), "timeout"),
        (server.url("/endless"), "too_large"),
        (server.url("/gzip/9000000"), "too_large"),
        (server.url("/reset"), "connect"),
        (server.url("/short"), "connect"),
        (server.url("/ok").replace("http:", "https:"), "tls"),
        (server.url("/ok/☃ ü.jpg"), "ok"),
        ("ftp://a.test/x.jpg", "bad_url"),
        ("file:///etc/passwd", "bad_url"),
        ("http://a.test/\ufffd.jpg", "bad_url"),
        ("", "bad_url"),
        (None, "bad_url"),
        (server.url("/ok"), "ok"),
    ]


def test_every_row_of_a_hard_list_is_accounted_for(server: BadServer, store: Store) -> None:
    hard = hard_list(server)
    table = listed([u for u, _ in hard], weight=list(range(len(hard))))
    ticks: list[int] = []
    counts = ingest_shard(store, 2, table, "urls", FETCH, "a1", watch=Unwatched(ticks.append))
    rows = store.read_table("rows/00002.g0.parquet")
    assert rows.schema.remove_metadata() == base_schema(pa.schema([("weight", pa.int64())]))
    found = rows.to_pylist()
    assert [(r["url"], r["status"]) for r in found] == hard
    assert counts.rows == sum(ticks) == len(hard)
    assert counts.by_status == dict(Counter(status for _, status in hard))
    assert set(counts.by_status) <= set(STATUSES)
    assert [r["weight"] for r in found] == list(range(len(hard)))
    assert [r["row_id"] for r in found] == [2 * 2**24 + n for n in range(len(hard))]
    assert [r["key"] for r in found] == [f"00002{n:03d}" for n in range(len(hard))]
    with tarfile.open(Path(store.root) / "media/00002-a1.tar") as tar:
        members = {m.name: (m.offset_data, m.size) for m in tar.getmembers()}
    good = [r for r in found if r["status"] == "ok"]
    assert members == {f"{r['key']}.jpg": (r["image_offset"], r["image_size"]) for r in good}
    for row in good:
        stored = store.read_range(row["image_path"], row["image_offset"], row["image_size"])
        assert row["image_path"] == "media/00002-a1.tar"
        assert row["status_detail"] is None
        with Image.open(io.BytesIO(stored)) as opened:
            assert opened.size == (row["width_px"], row["height_px"])
            assert (opened.format, opened.mode) == ("JPEG", "RGB")
    for row in found:
        if row["status"] != "ok":
            assert row["status_detail"]
            assert row["image_path"] is row["image_offset"] is row["image_size"] is row["width_px"] is None
    assert counts.bytes_stored == sum(r["image_size"] for r in good)
    assert pickle.loads(pickle.dumps(counts)) == counts


def test_what_a_row_says(server: BadServer, store: Store) -> None:
    urls: list[str | None] = [
        server.url(p) for p in ("/ok", "/turned.jpg", "/cut.jpg", "/nowhere", "/hop/1", "/deep.png")
    ]
    ok, upright, cut, missing, moved, deep = ingested(
        store, listed([*urls, None], caption=["a", None, "", "d", "e", "f", "g"])
    )[:6]
    assert ok["sha256"] == hashlib.sha256(JPEG).hexdigest()
    assert (ok["size_bytes"], ok["http_status"], ok["content_type"], ok["attempts"]) == (
        len(JPEG),
        200,
        "image/jpeg",
        1,
    )
    assert (ok["original_width_px"], ok["original_height_px"]) == (400, 300)
    assert (ok["width_px"], ok["height_px"], ok["image_ext"]) == (341, 256, "jpg")
    assert (ok["final_url"], moved["final_url"]) == (None, server.url("/hop/0"))
    assert ok["exif"] is None
    assert json.loads(upright["exif"])["Orientation"] == 6
    assert (upright["original_width_px"], upright["original_height_px"]) == (300, 400)
    assert (upright["width_px"], upright["height_px"]) == (256, 341)
    assert (cut["original_width_px"], cut["width_px"], cut["size_bytes"]) == (400, None, len(JPEG) // 2)
    assert (missing["http_status"], missing["sha256"], missing["content_type"]) == (404, None, "text/html")
    assert ok["uid"] == uid_of("url", urls[0], "a")
    assert upright["uid"] == uid_of("url", urls[1], None)
    grey = image.decode(store.read_range(deep["image_path"], deep["image_offset"], deep["image_size"]))
    assert np.abs(grey.astype(int) - 100).max() <= 1


def test_a_sources_own_uid_is_kept(server: BadServer, store: Store) -> None:
    rows = ingested(store, listed([server.url("/ok"), None], uid=pa.array(["f" * 32, None])))
    assert [r["uid"] for r in rows] == ["f" * 32, uid_of("url", None, "caption 1")]


def test_a_shard_without_any_success_has_no_tar(server: BadServer, store: Store) -> None:
    assert [r["status"] for r in ingested(store, listed([None, server.url("/nowhere")]))] == ["bad_url", "http_4xx"]
    assert store.list("media") == []


def test_done_before_or_lost_the_race_gives_the_winners_counts(
    server: BadServer, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = listed([server.url("/ok?race"), None])
    first = ingest_shard(store, 0, table, "urls", FETCH, "a1")
    hits = sum(server.hits.values())
    again = ingest_shard(store, 0, table, "urls", FETCH, "a2")
    assert sum(server.hits.values()) == hits
    # A zombie that looked before the winner committed: it fetches all, and its rows are refused.
    monkeypatch.setattr(store, "exists", lambda name: False)
    zombie = ingest_shard(store, 0, listed([None, None]), "urls", FETCH, "a3")
    for other in (again, zombie):
        assert (other.rows, other.by_status, other.bytes_stored) == (2, first.by_status, first.bytes_stored)
    assert store.read_table("rows/00000.g0.parquet").column("image_path").to_pylist() == ["media/00000-a1.tar", None]
    with pytest.raises(StoreError, match="was used twice"):
        ingest_shard(store, 0, table, "urls", FETCH, "a1")


def test_rows_keep_their_order_whoever_is_slow(server: BadServer, store: Store) -> None:
    waits = [0.3, 0.0, 0.2, 0.1]
    rows = ingested(store, listed([server.url(f"/slow/{w}?order") for w in waits]))
    assert [r["status"] for r in rows] == ["ok"] * 4
    by_offset = sorted(range(4), key=lambda n: rows[n]["image_offset"])
    assert by_offset == [1, 3, 2, 0]  # completion order: a slow URL holds nobody up


def test_a_decoder_that_raises_anything_costs_its_row(
    server: BadServer, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resize(*args: Any, **options: Any) -> Any:
        raise MemoryError("no room for this one")

    monkeypatch.setattr(image, "resize", resize)
    (row,) = ingested(store, listed([server.url("/ok")]))
    assert (row["status"], row["status_detail"]) == ("decode", "MemoryError: no room for this one")


def test_a_full_scratch_disk_stops_the_shard(server: BadServer, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def append(*args: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetch_rows.TarAppender, "append", append)
    with pytest.raises(StoreError, match="No space left on device"):
        ingest_shard(store, 0, listed([server.url("/ok")] * 50), "urls", FETCH, "a1")
    assert store.list("rows") == []


def test_no_network_stops_the_shard(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(*args: Any, **options: Any) -> Any:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(resolver, "_cache", {})
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with pytest.raises(RetryableError, match="no DNS"):
        ingest_shard(store, 0, listed([f"http://h{n}.test/" for n in range(100)]), "urls", FETCH, "a1")
    assert store.list("rows") == []


def test_it_works_inside_a_running_loop(server: BadServer, store: Store) -> None:
    async def notebook() -> IngestCounts:
        return ingest_shard(store, 0, listed([server.url("/ok")]), "urls", FETCH, "a1")

    assert asyncio.run(notebook()).by_status == {"ok": 1}


def test_private_addresses_are_refused_by_default(server: BadServer, store: Store) -> None:
    rows = ingested(store, listed([server.url("/ok")]), FetchOptions(shard_rows=1000))
    assert [r["status"] for r in rows] == ["refused_address"]
    assert rows[0]["status_detail"] == "127.0.0.1 is loopback"


# prepare: what is stored of a body


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"resize_mode": "no"}, (400, 300)),
        ({}, (341, 256)),
        ({"resize_mode": "keep_ratio_largest"}, (256, 192)),
        ({"resize_mode": "center_crop"}, (256, 256)),
        ({"resize_mode": "border"}, (256, 256)),
        ({"image_size": 500, "resize_only_if_bigger": True}, (400, 300)),
        ({"image_size": 500}, (667, 500)),  # 400 * 500/300 = 666.67
    ],
)
@pytest.mark.parametrize("decode", ["exact", "fast"])
def test_sizes_are_those_of_the_resize_mode(options: dict[str, Any], size: tuple[int, int], decode: str) -> None:
    found = prepare(JPEG, FetchOptions(decode=decode, **options))
    assert (found.status, found.width_px, found.height_px) == ("ok", *size)
    assert image.probe(found.data or b"").width == size[0]


@pytest.mark.parametrize(
    ("options", "detail"),
    [
        ({"min_image_size": 301}, "short side 300 px, at least 301 asked"),
        ({"max_image_area": 119_999}, "area 120000 px, at most 119999 allowed"),
        ({"max_aspect_ratio": 1.3}, "aspect ratio 1.33, at most 1.3 allowed"),
    ],
)
def test_filtered(options: dict[str, Any], detail: str) -> None:
    found = prepare(JPEG, FetchOptions(**options))
    assert (found.status, found.detail, found.data) == ("filtered", detail, None)
    assert (found.original_width_px, found.original_height_px) == (400, 300)
    kept = prepare(JPEG, FetchOptions(min_image_size=300, max_image_area=120_000, max_aspect_ratio=1.34))
    assert kept.status == "ok"


def test_max_pixels_is_counted_before_decoding() -> None:
    assert prepare(JPEG, FetchOptions(max_pixels=119_999)).status == "too_many_pixels"
    assert prepare(JPEG, FetchOptions(max_pixels=120_000)).status == "ok"


def test_bytes_are_kept_only_where_nothing_changes() -> None:
    keep = FetchOptions(skip_reencode=True, resize_only_if_bigger=True, image_size=512)
    assert prepare(JPEG, keep).data == JPEG
    assert prepare(JPEG, FetchOptions(skip_reencode=True)).data != JPEG  # scaled
    png = picture(400, 300, format="PNG")
    assert prepare(png, keep).ext == "jpg"
    for changed in (turned(), picture(400, 300, "CMYK")):
        found = prepare(changed, keep)
        assert found.data != changed
        assert image.probe(found.data or b"").is_plain
    glass = picture(400, 300, "RGBA", format="PNG")
    as_png = keep.model_copy(update={"encode_format": "png", "encode_quality": 6})
    assert prepare(png, as_png).data == png
    assert prepare(glass, as_png).data != glass


def test_disable_all_reencoding_stores_bytes_as_fetched_if_they_decode() -> None:
    for decode in ("exact", "fast"):
        options = FetchOptions(disable_all_reencoding=True, decode=decode)
        for body, ext, size in (
            (JPEG, "jpg", (400, 300)),
            (turned(), "jpg", (300, 400)),
            (picture(40, 30, format="GIF"), "gif", (40, 30)),
        ):
            found = prepare(body, options)
            assert (found.status, found.data, found.ext) == ("ok", body, ext)
            assert (found.width_px, found.height_px) == size
        assert prepare(JPEG[:-500], options).status == "decode"


@pytest.mark.parametrize(("format", "name"), [("jpg", "jpeg"), ("png", "png"), ("webp", "webp")])
def test_encode_formats(format: Any, name: str) -> None:
    found = prepare(JPEG, FetchOptions(encode_format=format))
    assert (found.ext, image.probe(found.data or b"").format) == (format, name)


def test_prepare_never_raises_on_damaged_bytes() -> None:
    rng = random.Random(11)
    bodies = [JPEG, *(body for _, body in BODIES.values())]
    for _ in range(300):
        body = bytearray(rng.choice(bodies))
        for _ in range(rng.randrange(1, 5)):
            if body:
                body[rng.randrange(min(len(body), 400))] = rng.randrange(256)
        assert prepare(bytes(body), FETCH).status in {"ok", "decode", "not_media", "too_many_pixels", "filtered"}


def test_options_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValidationError, match="zlib level, 0 to 9"):
        FetchOptions(encode_format="png", encode_quality=95)
    assert FetchOptions(encode_format="png").encode_quality == 6
    with pytest.raises(ValidationError):
        FetchOptions(user_agent="x\r\nCookie: y")
    assert FetchOptions.OPERATIONAL <= set(FetchOptions.model_fields)
    assert all(field.description for field in FetchOptions.model_fields.values())
