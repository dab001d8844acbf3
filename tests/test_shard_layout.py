"""The layout of a shard at the top of the dataset folder: made from its rows, mended after a crash, made anew."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from server import BadServer, picture

import mmdata
from mmdata import local_disk
from mmdata.clean import clean
from mmdata.errors import RecipeError, StoreError
from mmdata.generations import publish_generation
from mmdata.ledger import dataset_document
from mmdata.sample_layout import message_of, record, require_names, their_status
from mmdata.settings import FetchOptions
from mmdata.shard_layout import complete_layouts, lay_out
from mmdata.store import Store

LAYOUTS = ("webdataset", "files", "parquet")
NAMES = {"webdataset": "00000.tar", "files": "00000", "parquet": None}


@pytest.fixture(scope="module")
def server() -> Iterator[BadServer]:
    pictures = {f"/{i}.jpg": ("image/jpeg", picture(300 + i, 200)) for i in range(5)}
    pictures["/page"] = ("text/html", b"<!doctype html><p>no picture")
    with BadServer(pictures) as running:
        yield running


def _run(server: BadServer, folder: Path | str, layout: str, scratch: Path, **fetch: Any) -> Store:
    paths = [*(f"/{i}.jpg" for i in range(5)), "/gone.jpg", "/page"]
    rows = [{"url": server.url(p), "text": f"caption of {p}", "n": i} for i, p in enumerate(paths)]
    (scratch / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"kind": "urls", "path": str(scratch / "list.jsonl"), "caption": "text", "columns": ["n"]}
    quick = {"allow_private": True, "per_host": 64, "per_host_rate": None, "shard_rows": 4, "layout": layout}
    recipe = {"name": "laid", "dataset": str(folder), "source": source, "fetch": {**quick, **fetch}, "steps": []}
    return mmdata.run(recipe, runner="inline").store


def _files(store: Store, name: str = "0000") -> dict[str, bytes]:
    """Every file of the layout, by name."""
    top = [n for n, size in store.entries("") if size is not None and n.startswith(name)]
    below = [f"{f}/{n}" for f in store.folders("") if f.startswith(name) for n in store.list(f)]
    return {n: store.read(n) for n in [*top, *below]}


def _members(data: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]


def _fetch(store: Store) -> FetchOptions:
    document = dataset_document(store)
    assert document is not None
    return FetchOptions(**document.fetch)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_crash_left_out_is_made_by_the_next_run(layout: str, server: BadServer, tmp_path: Path) -> None:
    store = _run(server, tmp_path / "out", layout, tmp_path)
    whole, hits = _files(store), sum(server.hits.values())
    assert {n for n in whole if n.endswith("_stats.json")} == {"00000_stats.json", "00001_stats.json"}
    store.remove("00000_stats.json")  # stopped before it was whole
    store.remove("00001_stats.json")
    for name in [n for n in whole if n.startswith("00001") and not n.endswith("_stats.json")]:
        store.remove(name)
    assert _run(server, tmp_path / "out", layout, tmp_path).url == store.url
    assert sum(server.hits.values()) == hits
    again = _files(store)
    assert set(again) == set(whole)
    assert all(again[n] == whole[n] for n in whole if not n.endswith("_stats.json"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_follows_a_new_generation(layout: str, server: BadServer, tmp_path: Path) -> None:
    """A row is purged, and one that had failed is there now, in another tar."""
    store = _run(server, tmp_path / "out", layout, tmp_path, shard_rows=7)
    rows = store.read_table("rows/00000.g0.parquet").to_pylist()
    with store.scratch() as folder:
        (folder / "late.tar").write_bytes(b"\0" * 512 + b"late picture")
        store.commit("media/late.tar", folder / "late.tar")
    late = {"status": "ok", "width_px": 8, "height_px": 9, "image_path": "media/late.tar"}
    late |= {"image_offset": 512, "image_size": 12, "image_ext": "png"}
    assert [r["status"] for r in rows] == [*["ok"] * 5, "http_4xx", "not_media"]
    publish_generation(store, 0, {1: {"status": "purged"}, 5: late})
    document = dataset_document(store)
    assert document is not None
    assert complete_layouts(store, document.sources, _fetch(store)) == 1
    found = _files(store)
    table = pq.read_table(io.BytesIO(found["00000.parquet"])).to_pylist()
    assert [r["mmdata_status"] for r in table] == ["ok", "purged", "ok", "ok", "ok", "ok", "not_media"]
    assert [r["width"] for r in table][5] == 8
    stats = json.loads(found["00000_stats.json"])
    assert (stats["count"], stats["successes"], stats["failed_to_download"], stats["failed_to_resize"]) == (7, 5, 1, 1)
    there = [r["key"] for r in table if r["status"] == "success"]
    if layout == "parquet":
        assert [r["jpg"] is not None for r in table] == [r["status"] == "success" for r in table]
        assert table[5]["jpg"] == b"late picture"
    else:
        below = {n.partition("/")[2]: d for n, d in found.items() if "/" in n}
        members = _members(found["00000.tar"]) if layout == "webdataset" else below
        assert set(members) == {f"{k}.{e}" for k in there for e in ("jpg", "txt", "json")}
        assert members[f"{table[5]['key']}.jpg"] == b"late picture"
    before = {n: store.modified(n) for n in found}
    assert complete_layouts(store, document.sources, _fetch(store)) == 0
    lay_out(store, 0, _fetch(store), True)
    assert {n: store.modified(n) for n in _files(store)} == before


def test_a_tar_is_a_second_name_of_the_shards_own(server: BadServer, tmp_path: Path) -> None:
    store = _run(server, tmp_path / "out", "webdataset", tmp_path)
    [own] = (tmp_path / "out" / "media").glob("00000-*.tar")
    assert own.samefile(tmp_path / "out" / "00000.tar")
    assert store.list("media") != []


def test_a_shard_without_pictures_has_an_empty_tar(server: BadServer, tmp_path: Path) -> None:
    store = _run(server, tmp_path / "out", "webdataset", tmp_path, min_image_size=5000)
    assert _members(store.read("00000.tar")) == {}
    stats = json.loads(store.read("00000_stats.json"))
    assert (stats["failed_to_resize"], stats["status_dict"]) == (4, {"image too small": 4})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_far_away_the_layout_is_a_copy(layout: str, server: BadServer, tmp_path: Path) -> None:
    """In a store without hard links and renames (`memory://`): the files of a local folder, byte for byte."""
    local = _files(_run(server, tmp_path / "out", layout, tmp_path))
    far = _files(_run(server, f"memory://layout-{layout}-{tmp_path.name}", layout, tmp_path))
    assert set(local) == set(far)
    order = [json.loads(d)["successes"] for n, d in sorted(local.items()) if n.endswith("_stats.json")]
    assert order == [json.loads(d)["successes"] for n, d in sorted(far.items()) if n.endswith("_stats.json")]
    for name in [n for n in local if not n.endswith((".parquet", "_stats.json"))]:
        assert (_members(local[name]) == _members(far[name])) if name.endswith(".tar") else local[name] == far[name]


def test_who_was_taken_for_dead_does_not_leave_older_rows(
    server: BadServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker with the first generation writes its Parquet between the removal and the making of the second."""
    store = _run(server, tmp_path / "out", "parquet", tmp_path, shard_rows=7)
    stale, real, late = store.read("00000.parquet"), Store.commit, [True]
    publish_generation(store, 0, {1: {"status": "purged"}})

    def commit(self: Store, name: str, local: Path) -> bool:
        if name == "00000.parquet" and late:
            late.pop()
            (tmp_path / "stale").write_bytes(stale)
            assert real(self, name, tmp_path / "stale")
        return real(self, name, local)

    monkeypatch.setattr(Store, "commit", commit)
    lay_out(store, 0, _fetch(store), True)
    assert late == []
    assert pq.read_table(io.BytesIO(store.read("00000.parquet")))["mmdata_status"].to_pylist()[1] == "purged"
    assert json.loads(store.read("00000_stats.json"))["successes"] == 4


def test_a_number_of_digits_for_the_shard(server: BadServer, tmp_path: Path) -> None:
    """img2dataset's key: 10^ceil(log10(4)) * shard + index, in 3 + 1 digits."""
    store = _run(server, tmp_path / "out", "webdataset", tmp_path, oom_shard_count=3)
    assert {n for n in _files(store, "00")} == {
        f"00{i}{e}" for i in (0, 1) for e in (".tar", ".parquet", "_stats.json")
    }
    keys = store.read_table("rows/00001.g0.parquet", ["key"])["key"].to_pylist()
    assert keys == ["0010", "0011", "0012"]
    assert "0010.jpg" in _members(store.read("001.tar"))


def test_a_folder_is_published_whole_or_not_at_all(tmp_path: Path) -> None:
    def files(broken: bool) -> Iterator[tuple[str, bytes]]:
        yield "a.txt", b"a"
        if broken:
            raise StoreError("the second is gone")
        yield "b.txt", b"b"

    with pytest.raises(StoreError):
        local_disk.publish_folder(files(True), str(tmp_path / "shard"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "shard").mkdir()  # an empty one that another generation left
    assert local_disk.publish_folder(files(False), str(tmp_path / "shard"))
    assert not local_disk.publish_folder(iter([("c.txt", b"c")]), str(tmp_path / "shard"))
    assert sorted(p.name for p in (tmp_path / "shard").iterdir()) == ["a.txt", "b.txt"]
    assert [p.name for p in tmp_path.iterdir()] == ["shard"]


def test_clean_takes_what_a_killed_worker_left_and_nothing_of_the_layout(server: BadServer, tmp_path: Path) -> None:
    store = _run(server, tmp_path / "out", "files", tmp_path)
    before = _files(store)
    (tmp_path / "out" / ".tmp-1-abc").mkdir()
    (tmp_path / "out" / ".tmp-1-abc" / "000000.jpg").write_bytes(b"half")
    assert ".tmp-1-abc/000000.jpg" in dict(clean(store, grace_s=0))
    assert not (tmp_path / "out" / ".tmp-1-abc").exists()
    assert _files(store) == before


@pytest.mark.parametrize(
    ("row", "status", "message"),
    [
        ({"status": "ok"}, "success", None),
        ({"status": "http_4xx", "http_status": 404}, "failed_to_download", "HTTP Error 404: Not Found"),
        ({"status": "http_5xx", "http_status": 599}, "failed_to_download", "HTTP Error 599"),
        ({"status": "timeout", "status_detail": "5 s passed"}, "failed_to_download", "timed out"),
        ({"status": "hash_mismatch"}, "failed_to_download", "hash mismatch"),
        ({"status": "not_media"}, "failed_to_resize", "Image decoding error"),
        (
            {"status": "filtered", "status_detail": "short side 9 px, at least 10 asked"},
            "failed_to_resize",
            "image too small",
        ),
        (
            {"status": "filtered", "status_detail": "aspect ratio 9.00, at most 3 allowed"},
            "failed_to_resize",
            "aspect ratio too large",
        ),
        ({"status": "filtered", "status_detail": "in data/pets"}, "failed_to_download", "in data/pets"),
        ({"status": "opted_out"}, "failed_to_download", "Use of image disallowed by X-Robots-Tag directive"),
        (
            {"status": "opted_out", "status_detail": "robots.txt disallows it"},
            "failed_to_download",
            "Use of image disallowed by robots.txt",
        ),
    ],
)
def test_what_img2dataset_would_say(row: dict[str, Any], status: str, message: str | None) -> None:
    """Its words where it has words for it (downloader.py, resizer.py; urllib's for HTTP)."""
    assert (their_status(row), message_of(row)) == (status, message)


def test_the_record_has_img2datasets_fields_in_its_order() -> None:
    """downloader.py: the list's columns, then key, status, error_message, sizes, exif, hash."""
    row = {"status": "ok", "key": "0000", "url": "u", "caption": None, "n": 3, "sha256": "ab", "md5": "cd"}
    row |= {"width_px": 1, "height_px": 2, "original_width_px": 3, "original_height_px": 4, "exif": None}
    fetch = FetchOptions(layout="webdataset", compute_hash="md5")
    assert list(record(row, fetch, ["n"], True).items()) == [
        ("n", 3),
        ("caption", None),
        ("url", "u"),
        ("key", "0000"),
        ("status", "success"),
        ("error_message", None),
        ("width", 1),
        ("height", 2),
        ("original_width", 3),
        ("original_height", 4),
        ("exif", "{}"),
        ("md5", "cd"),
        ("sha256", "ab"),
    ]


@pytest.mark.parametrize("name", ["Width", "sha512", "mmdata_status", "jpg"])
def test_names_of_the_layout_are_its_own(name: str) -> None:
    require_names([name], FetchOptions())
    with pytest.raises(RecipeError, match=name):
        require_names(["fine", name], FetchOptions(layout="parquet"))
