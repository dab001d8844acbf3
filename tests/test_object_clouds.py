"""Google Cloud Storage and Azure: the same promises as on S3, against an emulator and a stand-in, over a bad wire.

See `fixtures/clouds.py` for what the two are. What is common to all stores is tested in `test_object_store`.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from clouds import AzureStandIn, gcs_bucket, running_gcs
from faulty_proxy import FaultyProxy
from s3 import in_environment

from mmdata import object_store
from mmdata.errors import RecipeError, StoreError
from mmdata.store import Store

# Azure's client hands its blocks to aiohttp as plain bytes, and aiohttp remarks on it.
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning")


@pytest.fixture(scope="module")
def gcs() -> Iterator[int]:
    with running_gcs() as port:
        yield port


@pytest.fixture(params=["gs", "abfs"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def proxy(kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    monkeypatch.setattr(object_store, "_FIRST_WAIT_S", 0.001)
    if kind == "gs":
        with FaultyProxy(request.getfixturevalue("gcs")) as running:
            import fsspec

            monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
            with in_environment({"STORAGE_EMULATOR_HOST": running.url}):
                yield running
    else:
        with AzureStandIn() as azure, FaultyProxy(azure.port) as running:
            with in_environment(azure.environment(running.port)):
                yield running


@pytest.fixture
def store(kind: str, proxy: FaultyProxy) -> Store:
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    if kind == "gs":
        gcs_bucket(proxy.upstream, bucket)
    return Store(f"{kind}://{bucket}/data/pets")


def file_with(folder: Path, data: bytes) -> Path:
    path = folder / uuid.uuid4().hex
    path.write_bytes(data)
    return path


def is_put(method: str, path: str) -> bool:
    return method in ("PUT", "POST") and "comp=block&" not in path


def test_names_are_published_once_and_listed(store: Store, tmp_path: Path) -> None:
    assert store.commit("media/a.tar", file_with(tmp_path, b"first"))
    assert not store.commit("media/a.tar", file_with(tmp_path, b"second"))
    assert store.read("media/a.tar") == b"first"
    assert store.create("rows/x.json", b"{}")
    assert store.entries("") == [("media", None), ("rows", None)]
    assert store.entries("media") == [("a.tar", 5)]
    assert store.exists("media/a.tar")
    assert not store.exists("media")
    assert store.list("nowhere") == []
    written = store.modified("media/a.tar")
    assert written is not None
    assert abs(written - os.stat(tmp_path).st_mtime) < 60
    store.remove("media/a.tar")
    store.remove("media/a.tar")
    assert store.read_if_there("media/a.tar") is None
    assert store.unfinished_uploads() == []


def test_replace_needs_what_the_caller_saw(store: Store) -> None:
    assert not store.replace("current.json", b"1", expected=b"0")
    assert store.replace("current.json", b"1", expected=None)
    assert not store.replace("current.json", b"2", expected=None)
    assert store.replace("current.json", b"2", expected=b"1")
    assert store.read("current.json") == b"2"


def test_ranges_are_exact(store: Store) -> None:
    store.create("media/x.tar", bytes(range(100)))
    assert store.read_range("media/x.tar", 10, 5) == bytes([10, 11, 12, 13, 14])
    assert store.read_range("media/x.tar", 100, 0) == b""
    with pytest.raises(StoreError, match=r"media/x\.tar .* ends before byte 101"):
        store.read_range("media/x.tar", 98, 3)
    with pytest.raises(StoreError, match=r"ends before byte 201"):
        store.read_range("media/x.tar", 200, 1)
    assert store._objects.tail("/".join((store.root, "media/x.tar")), 7) == (bytes(range(93, 100)), 100)
    with pytest.raises(StoreError, match=r"media/y\.tar is missing"):
        store.read_range("media/y.tar", 0, 1)


@pytest.mark.parametrize("fault", ["slow_down", "cut", "lost"])
def test_a_disturbed_write_is_ours(store: Store, proxy: FaultyProxy, tmp_path: Path, fault: str) -> None:
    proxy.next(fault, is_put, times=2)
    assert store.commit("media/a.tar", file_with(tmp_path, b"ours"))
    assert proxy.all_came()
    proxy.next(fault, is_put)
    assert not store.commit("media/a.tar", file_with(tmp_path, b"late"))
    assert store.read("media/a.tar") == b"ours"
    assert store.replace("current.json", b"1", None)
    proxy.next(fault, is_put)
    assert store.replace("current.json", b"2", b"1")
    assert proxy.all_came()
    assert not store.replace("current.json", b"3", b"1")
    assert store.read("current.json") == b"2"


def test_a_large_file(store: Store, proxy: FaultyProxy, tmp_path: Path) -> None:
    """Above what Azure's client puts in one request (64 MiB): blocks, whose list is the commit."""
    data = os.urandom(1 << 20) * 66
    proxy.next("lost", lambda method, path: is_put(method, path))
    assert store.commit("media/big.tar", file_with(tmp_path, data))
    assert proxy.all_came()
    assert store.read("media/big.tar") == data
    assert not store.commit("media/big.tar", file_with(tmp_path, data[:-1]))
    assert store.read_range("media/big.tar", (1 << 20) - 2, 4) == data[(1 << 20) - 2 : (1 << 20) + 2]


def test_one_of_eight_writers_wins_on_a_bad_wire(store: Store, proxy: FaultyProxy, tmp_path: Path) -> None:
    proxy.rates = {"slow_down": 0.1, "cut": 0.1, "lost": 0.1}
    won: list[tuple[int, int]] = []

    def write(writer: int) -> None:
        for name in range(6):
            if store.commit(f"media/{name}.tar", file_with(tmp_path, bytes([writer]) * 100)):
                won.append((name, writer))

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    proxy.rates = {}
    assert sorted(name for name, _ in won) == list(range(6))
    assert {store.read(f"media/{name}.tar") == bytes([writer]) * 100 for name, writer in won} == {True}
    assert proxy.done["lost"] > 0


def test_duckdb_and_parquet(store: Store, tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"row_id": range(100_000), "noise": [os.urandom(8) for _ in range(100_000)]}), tmp_path / "t"
    )
    (tmp_path / "t").rename(tmp_path / "t.parquet")
    assert store.commit("rows/00000.g0.parquet", tmp_path / "t.parquet")
    assert store.footer("rows/00000.g0.parquet")["num_rows"] == "100000"
    assert store.read_table("rows/00000.g0.parquet", ["row_id"]).num_rows == 100_000
    with duckdb.connect() as connection:
        connection.register_filesystem(store.fs)
        path = store.path_for_duckdb("rows/00000.g0.parquet")
        assert connection.execute("SELECT sum(row_id) FROM read_parquet(?)", [path]).fetchall() == [(4_999_950_000,)]


def test_a_bucket_that_is_not_there(kind: str, proxy: FaultyProxy) -> None:
    if kind == "gs":
        with pytest.raises(RecipeError, match="there is no bucket nowhere-here"):
            Store("gs://nowhere-here/pets").entries("")
    else:
        assert Store("abfs://nowhere-here/pets").entries("") == [], "the stand-in has every container"
