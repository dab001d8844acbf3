"""What is on a block list is never stored: before the request, after a redirect, by its bytes, and by its looks."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from server import JPEG, BadServer, picture

import mmdata
from mmdata.block_lists import BlockLists, BlockOptions, block_files
from mmdata.errors import SourceError
from mmdata.media.addresses import parse_url
from mmdata.preflight import prove
from mmdata.recipe import parse

OTHER = picture(200, 120)


def flat(value: int) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(np.full((64, 64, 3), value, np.uint8)).save(sink, "PNG")
    return sink.getvalue()


@pytest.fixture(scope="module")
def server() -> Iterator[BadServer]:
    extra = {"/other": ("image/jpeg", OTHER), "/flat": ("image/png", flat(9)), "/small": ("image/jpeg", resaved())}
    with BadServer(extra) as running:
        yield running


def resaved() -> bytes:
    """The picture of /ok at 60 % of its size, compressed hard: other bytes, the same motif."""
    sink = io.BytesIO()
    with Image.open(io.BytesIO(JPEG)) as image:
        image.resize((image.width * 3 // 5, image.height * 3 // 5), Image.Resampling.BICUBIC).save(
            sink, "JPEG", quality=70
        )
    return sink.getvalue()


def run(folder: Path, urls: list[str], block: Any, **changes: Any) -> mmdata.Dataset:
    pq.write_table(pa.table({"url": urls}), folder / "list.parquet")
    fetch = {"allow_private": True, "image_size": 64, "max_redirects": 3, "shard_rows": 2, **changes.pop("fetch", {})}
    source = {"kind": "urls", "path": str(folder / "list.parquet")}
    recipe = {"name": "n", "dataset": str(folder / "data"), "source": source, "fetch": fetch, "block": block, **changes}
    return mmdata.run(recipe, runner="inline")


def rows(ds: mmdata.Dataset) -> list[Any]:
    return ds.sql("SELECT status, status_detail, attempts, image_path IS NULL FROM rows ORDER BY row_id").fetchall()


def media(folder: Path) -> list[str]:
    names = []
    for path in sorted((folder / "data/media").glob("*.tar")):
        with tarfile.open(path) as tar:
            names += tar.getnames()
    return names


def test_urls_and_domains_are_never_asked_not_even_by_a_redirect(server: BadServer, tmp_path: Path) -> None:
    (tmp_path / "urls.txt").write_text(f"{server.url('/other')}\nhttp://elsewhere.example/x\n")
    (tmp_path / "domains.csv").write_text("domain\nLocalHost\n")
    before = dict(server.hits)
    urls = [
        server.url("/other?x=1"),
        server.url("/other") + "#part",
        server.url("/ok", host="localhost"),
        server.url(f"/to/{server.url('/ok?no', host='localhost')}"),
        server.url(f"/to/{server.url('/other')}"),
    ]
    block = {"urls": str(tmp_path / "urls.txt"), "domains": str(tmp_path / "domains.csv")}
    ds = run(tmp_path, urls, block)
    assert rows(ds) == [
        ("http_4xx", "HTTP 404", 1, True),
        ("blocked", "urls", 0, True),
        ("blocked", "domains (localhost)", 0, True),
        ("blocked", "domains (localhost)", 1, True),
        ("blocked", "urls", 1, True),
    ]
    asked = {path for path in server.hits if server.hits[path] > before.get(path, 0)} - {"/robots.txt"}
    assert asked == {"/other?x=1", *(u.partition(str(server.port))[2] for u in urls[3:])}
    assert ds.funnel().steps[0].reasons == {"blocked": 4, "http_4xx": 1}


def test_bytes_and_looks_are_checked_before_anything_is_stored(server: BadServer, tmp_path: Path) -> None:
    (tmp_path / "sha.txt").write_text(hashlib.sha256(OTHER).hexdigest().upper())
    with Image.open(io.BytesIO(JPEG)) as image:
        known = str(imagehash.phash(image.convert("RGB")))
    (tmp_path / "looks.txt").write_text(known)
    urls = [server.url(p) for p in ("/ok", "/other", "/small", "/flat")]
    block = {"sha256": str(tmp_path / "sha.txt"), "phash": {"path": str(tmp_path / "looks.txt"), "max_distance": 6}}
    ds = run(tmp_path, urls, block)
    found = rows(ds)
    assert [(status, blank) for status, _, _, blank in found] == [("blocked", True)] * 3 + [("ok", False)]
    with Image.open(io.BytesIO(resaved())) as image:
        distance = imagehash.phash(image) - imagehash.hex_to_hash(known)
    assert 0 <= distance <= 6
    assert [detail for _, detail, *_ in found[:3]] == ["phash (distance 0)", "sha256", f"phash (distance {distance})"]
    assert media(tmp_path) == ["000011.jpg"]  # key of the second row of shard 1


def test_the_distance_decides(server: BadServer, tmp_path: Path) -> None:
    with Image.open(io.BytesIO(JPEG)) as image:
        known = int(str(imagehash.phash(image.convert("RGB"))), 16)
    for flipped, radius, status in ((3, 3, "blocked"), (4, 3, "ok"), (0, 0, "blocked")):
        folder = tmp_path / f"{flipped}-{radius}"
        folder.mkdir()
        np.save(folder / "looks.npy", np.array([known ^ ((1 << flipped) - 1), 2**64 - 1 - known], np.uint64))
        ds = run(folder, [server.url("/ok")], {"phash": {"path": str(folder / "looks.npy"), "max_distance": radius}})
        assert [r[0] for r in rows(ds)] == [status]


def test_adopted_rows_lose_their_reference_and_no_file_is_touched(tmp_path: Path) -> None:
    source = tmp_path / "crawl"
    source.mkdir()
    bodies = [JPEG, OTHER, flat(7), flat(8)]
    urls = ["http://a.example/1", "http://b.example/2", "http://sub.bad.example/3", "http://c.example/4"]
    with tarfile.open(source / "00000.tar", "w") as tar:
        for number, (body, url) in enumerate(zip(bodies, urls, strict=True)):
            for ext, data in (("jpg", body), ("json", json.dumps({"url": url}).encode())):
                info = tarfile.TarInfo(f"00000000{number}.{ext}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    columns = {
        "url": urls,
        "key": [f"00000000{n}" for n in range(4)],
        "status": ["success"] * 4,
        "error_message": pa.nulls(4, pa.string()),
        "width": [64] * 4,
        "height": [64] * 4,
        "original_width": [64] * 4,
        "original_height": [64] * 4,
        "sha256": [hashlib.sha256(b).hexdigest() for b in bodies],
        "exif": ["{}"] * 4,
    }
    pq.write_table(pa.table(columns), source / "00000.parquet")
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    (tmp_path / "domains.txt").write_text("*.bad.example\n")
    pq.write_table(pa.table({"sha256": [hashlib.sha256(OTHER).hexdigest()]}), tmp_path / "sha.parquet")
    block = {"domains": str(tmp_path / "domains.txt"), "sha256": str(tmp_path / "sha.parquet")}
    recipe = {"name": "n", "dataset": str(tmp_path / "data"), "source": {"kind": "img2dataset", "path": str(source)}}
    ds = mmdata.run({**recipe, "block": block}, runner="inline")
    question = (
        "SELECT status, status_detail, image_path IS NULL, image_size IS NULL, exif IS NULL FROM rows ORDER BY row_id"
    )
    assert ds.sql(question).fetchall() == [
        ("ok", None, False, False, False),
        ("blocked", "sha256", True, True, True),
        ("blocked", "domains (bad.example)", True, True, True),
        ("ok", None, False, False, False),
    ]
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before


def test_other_lists_are_for_new_shards_only_and_it_is_said(server: BadServer, tmp_path: Path) -> None:
    (tmp_path / "urls.txt").write_text("http://elsewhere.example/\n")
    block = {"urls": str(tmp_path / "urls.txt")}
    ds = run(tmp_path, [server.url("/ok")], block)
    assert [r[0] for r in rows(ds)] == ["ok"]
    first = json.loads((tmp_path / "data/dataset.json").read_text())["blocks"]
    assert [b["first_shard"] for b in first] == [0]
    assert first[0]["lists"] == {"urls": hashlib.sha256(b"http://elsewhere.example/\n").hexdigest()}

    (tmp_path / "urls.txt").write_text(server.url("/ok"))
    pq.write_table(pa.table({"url": [server.url("/ok"), server.url("/flat")]}), tmp_path / "more.parquet")
    sources = [{"kind": "urls", "path": str(tmp_path / f"{n}.parquet")} for n in ("list", "more")]
    fetch = {"allow_private": True, "image_size": 64, "max_redirects": 3, "shard_rows": 2}
    recipe = {"name": "n", "dataset": str(tmp_path / "data"), "source": sources, "fetch": fetch, "block": block}
    warned = [w for w in prove(parse(recipe)).plan.warnings if "block" in w]
    assert warned == ["the lists under block are not those of the 1 shards there are: they apply to new shards only"]
    ds = mmdata.run(recipe, runner="inline")
    assert [r[0] for r in rows(ds)] == ["ok", "blocked", "ok"]
    again = json.loads((tmp_path / "data/dataset.json").read_text())["blocks"]
    assert [b["first_shard"] for b in again] == [0, 1]
    assert not [w for w in prove(parse(recipe)).plan.warnings if "block" in w]


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("urls", "ftp://x.example/a\n", r"block.urls: .* no http or https URLs \('ftp://x.example/a'\)"),
        ("domains", "good.example\nbad domain\n", r"block.domains: .* no domains \('bad domain'\)"),
        ("sha256", "abc\n", r"block.sha256: .* no 64 hex digits \('abc'\)"),
        ("phash", "1234\n", r"block.phash: .* no phash .* such as '1234'"),
        *((kind, "\n", rf"block.{kind}: .* is empty, so it blocks nothing") for kind in ("urls", "sha256", "phash")),
        ("domains", "", r"block.domains: .* is empty, so it blocks nothing"),
    ],
)
def test_a_list_of_something_else_is_refused_before_anything_is_written(
    kind: str, text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(SourceError, match=message):
        run(tmp_path, ["http://x.example/"], {kind: str(tmp_path / "list.txt")})
    assert not (tmp_path / "data").exists()
    with pytest.raises(SourceError, match=f"block.{kind}: there is no list at"):
        run(tmp_path, ["http://x.example/"], {kind: str(tmp_path / "nowhere.txt")})


def test_a_list_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a.example\n")
    files = block_files(BlockOptions(domains=str(tmp_path / "list.txt")))
    (tmp_path / "list.txt").write_text("a.example\nb.example\n")
    with pytest.raises(SourceError, match=r"block.domains was changed"):
        files.load()


def listing(folder: Path, **lists: list[str]) -> BlockLists:
    for kind, values in lists.items():
        (folder / f"{kind}.txt").write_text("\n".join(values))
    return BlockLists(BlockOptions(**{kind: str(folder / f"{kind}.txt") for kind in lists}))


def test_domains_in_every_writing(tmp_path: Path) -> None:
    found = listing(tmp_path, domains=["Bücher.example", "*.CDN.example.", "203.0.113.9", "https://page.example/x"])
    on_it = {
        "https://xn--bcher-kva.example/a": "xn--bcher-kva.example",
        "http://img.BÜCHER.example:8080/": "xn--bcher-kva.example",
        "http://a.b.cdn.example./x": "cdn.example",
        "http://203.0.113.9/": "203.0.113.9",
        "http://3405803785/": "203.0.113.9",
        "http://page.example/other": "page.example",
    }
    for url, domain in on_it.items():
        assert found.url(url) == f"domains ({domain})", url
    for url in ("http://notcdn.example/", "http://example/", "http://203.0.113.90/", "http://9/", "bücher", None, ""):
        assert found.url(url) is None, url


URL_PARTS = st.tuples(
    st.sampled_from(["http", "https", "HTTP"]),
    st.sampled_from(["", "user:pw@"]),
    st.sampled_from(["a.example", "A.Example", "x-1.a.example", "a.example.", "1.2.3.4"]),
    st.sampled_from(["", ":80", ":443", ":8080"]),
    st.sampled_from(["", "/", "/a b", "/%20", "/a;b=[c]|~!$&'()*+,:=@", "/ä", "/p//q"]),
    st.sampled_from(["", "?q=1&r=%2F", "?[x]"]),
    st.sampled_from(["", "#frag"]),
)


@settings(max_examples=200, deadline=None)
@given(listed=URL_PARTS, asked=URL_PARTS)
def test_urls_are_alike_when_the_same_is_asked_of_the_same_server(
    listed: tuple[str, ...], asked: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    def wire(parts: tuple[str, ...]) -> tuple[str, int, str]:
        """What is connected to and sent, scheme and TLS apart: 80 and 443 are their schemes' own ports."""
        scheme, user, host, port, path, query, fragment = parts
        url = parse_url(f"{scheme}://{user}{host}{port}{path}{query}{fragment}")
        usual = {"http": 80, "https": 443}[url.scheme]
        return str(url.raw_host).rstrip("."), 0 if url.port == usual else int(url.port or 0), url.raw_path_qs

    found = listing(tmp_path_factory.mktemp("l"), urls=["{}://{}{}{}{}{}{}".format(*listed)])
    assert (found.url("{}://{}{}{}{}{}{}".format(*asked)) == "urls") == (wire(listed) == wire(asked))
