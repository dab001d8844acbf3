"""Object stores: lost answers, 503s, slow and cut connections; one winner a name, and no secret anywhere.

Against moto's S3 server through a proxy that injects the faults (`fixtures/faulty_proxy.py`).
"""

from __future__ import annotations

import gc
import os
import pickle
import random
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faulty_proxy import FaultyProxy
from s3 import ENVIRONMENT, S3Server, in_environment, running_s3

from mmdata import cli, object_store
from mmdata.errors import MissingExtra, RecipeError, StoreError
from mmdata.store import Store

PART = 5 << 20  # the smallest part S3 takes


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with running_s3() as running:
        yield running


@pytest.fixture
def proxy(server: S3Server) -> Iterator[FaultyProxy]:
    with FaultyProxy(server.port, bucket=("pets-bucket", server.bucket())) as running:
        with in_environment(server.environment(running)):
            yield running


@pytest.fixture
def store(proxy: FaultyProxy) -> Store:
    return Store("s3://pets-bucket/data/pets")


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """The waits between tries, a hundredth as long."""
    monkeypatch.setattr(object_store, "_FIRST_WAIT_S", 0.001)


def file_with(folder: Path, data: bytes) -> Path:
    path = folder / uuid.uuid4().hex
    path.write_bytes(data)
    return path


def is_put(method: str, path: str) -> bool:
    return method == "PUT" and "uploadId" not in path


def is_part(method: str, path: str) -> bool:
    return method == "PUT" and "partNumber=" in path


def is_complete(method: str, path: str) -> bool:
    return method == "POST" and "uploadId=" in path


def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmdata.objects.s3 import S3Wire

    monkeypatch.setattr(S3Wire, "part_bytes", PART)


@pytest.mark.parametrize("fault", ["slow_down", "slow", "cut", "lost"])
def test_a_commit_that_is_disturbed_is_ours(store: Store, proxy: FaultyProxy, tmp_path: Path, fault: str) -> None:
    proxy.next(fault, is_put, times=1 if fault == "slow" else 2)
    assert store.commit("media/a.tar", file_with(tmp_path, b"ours"))
    assert store.read("media/a.tar") == b"ours"
    assert proxy.all_came()
    # The loser, disturbed in the same way, loses.
    proxy.next(fault, is_put, times=1 if fault == "slow" else 2)
    assert not store.commit("media/a.tar", file_with(tmp_path, b"late"))
    assert store.read("media/a.tar") == b"ours"


@pytest.mark.parametrize("fault", ["slow_down", "slow", "cut", "lost"])
def test_a_replacement_that_is_disturbed_is_ours(store: Store, proxy: FaultyProxy, fault: str) -> None:
    assert store.replace("current.json", b"1", None)
    proxy.next(fault, is_put, times=2 if fault in ("slow_down", "cut") else 1)
    assert store.replace("current.json", b"2", b"1")
    assert proxy.all_came()
    assert store.read("current.json") == b"2"
    proxy.next(fault, is_put)
    assert not store.replace("current.json", b"3", b"1")
    assert not store.replace("current.json", b"3", None)
    assert store.read("current.json") == b"2"


def test_a_lost_answer_and_another_ones_object(
    store: Store, proxy: FaultyProxy, server: S3Server, tmp_path: Path
) -> None:
    """The put never reached the server, another took the name, and the retry meets that object."""
    bucket = proxy.bucket[1] if proxy.bucket else ""

    def other_comes_first(method: str, path: str) -> bool:
        if is_put(method, path):
            server.client().put_object(Bucket=bucket, Key="data/pets/media/a.tar", Body=b"another's")
            return True
        return False

    proxy.next("cut", other_comes_first)
    assert not store.commit("media/a.tar", file_with(tmp_path, b"ours"))
    assert store.read("media/a.tar") == b"another's"


@pytest.mark.parametrize("fault", ["slow_down", "cut", "lost"])
@pytest.mark.parametrize("at", [is_part, is_complete], ids=["part", "complete"])
def test_a_large_file_is_published_by_its_last_request(
    store: Store, proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, at: object
) -> None:
    in_parts(monkeypatch)
    data = os.urandom(PART) * 2 + b"and a rest"
    proxy.next(fault, at)  # type: ignore[arg-type]
    assert store.commit("media/big.tar", file_with(tmp_path, data))
    assert proxy.all_came()
    assert store.read("media/big.tar") == data
    assert store.read_range("media/big.tar", 2 * PART, 10) == b"and a rest"
    assert len([1 for method, path in proxy.requests if is_part(method, path)]) >= 3


def test_a_large_file_whose_name_is_taken_meanwhile(
    store: Store, proxy: FaultyProxy, server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_parts(monkeypatch)
    bucket = proxy.bucket[1] if proxy.bucket else ""

    def other_comes_first(method: str, path: str) -> bool:
        if is_complete(method, path):
            server.client().put_object(Bucket=bucket, Key="data/pets/media/big.tar", Body=b"another's")
        return False

    proxy.next("slow", other_comes_first)
    assert not store.commit("media/big.tar", file_with(tmp_path, os.urandom(2 * PART)))
    assert store.read("media/big.tar") == b"another's"
    assert server.client().list_multipart_uploads(Bucket=bucket).get("Uploads", []) == [], "its parts are given up"


@pytest.mark.parametrize("fault", ["slow_down", "cut", "half", "lost"])
def test_reads_that_are_disturbed(store: Store, proxy: FaultyProxy, fault: str) -> None:
    data = bytes(range(256)) * 100
    store.create("media/x.tar", data)
    proxy.next(fault, lambda method, path: method == "GET", times=2)
    assert store.read_range("media/x.tar", 1000, 300) == data[1000:1300]
    proxy.next(fault, lambda method, path: method == "GET", times=2)
    assert store.list("media") == ["x.tar"]
    proxy.next(fault, lambda method, path: method == "GET")
    assert store.read("media/x.tar") == data
    assert proxy.all_came()


def test_a_server_that_is_always_busy_is_one_sentence(store: Store, proxy: FaultyProxy, tmp_path: Path) -> None:
    proxy.rates = {"slow_down": 1.0}
    with pytest.raises(StoreError, match=r"did not do it in 10 tries .*503 SlowDown.*the same command goes on") as told:
        store.commit("media/x.tar", file_with(tmp_path, b"x"))
    assert len(proxy.requests) == 10
    assert not any(secret in str(told.value) for secret in ENVIRONMENT.values())


@pytest.mark.timeout(120)
def test_eight_writers_and_a_bad_wire(store: Store, proxy: FaultyProxy, server: S3Server, tmp_path: Path) -> None:
    """25 names, eight processes' worth of threads, a fault in every third request: one winner a name, and whole."""
    proxy.rates = {"slow_down": 0.08, "cut": 0.08, "lost": 0.12, "slow": 0.02}
    won: dict[int, list[int]] = {writer: [] for writer in range(8)}

    def write(writer: int) -> None:
        for name in random.Random(writer).sample(range(25), 25):
            local = file_with(tmp_path, bytes([writer]) * 1000)
            if store.commit(f"media/{name}.tar", local):
                won[writer].append(name)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in won]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(name for names in won.values() for name in names) == list(range(25))
    assert sum(1 for names in won.values() if names) > 4, "there was a race"
    assert min(proxy.done[fault] for fault in ("slow_down", "cut", "lost")) > 5
    proxy.rates = {}
    for writer, names in won.items():
        for name in names:
            assert store.read(f"media/{name}.tar") == bytes([writer]) * 1000


@pytest.mark.timeout(120)
def test_replace_loses_no_update_on_a_bad_wire(store: Store, proxy: FaultyProxy) -> None:
    assert store.replace("current.json", b"0", None)
    proxy.rates = {"slow_down": 0.1, "cut": 0.1, "lost": 0.1}

    def count() -> None:
        done = 0
        while done < 6:
            seen = store.read("current.json")
            done += store.replace("current.json", str(int(seen) + 1).encode(), seen)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    proxy.rates = {}
    # An update whose answer was lost and that another built upon is told as False and counted twice, never lost.
    assert int(store.read("current.json")) >= 24
    assert proxy.done["lost"] > 0


def test_a_server_that_ignores_conditions_is_refused(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """As older S3-compatible servers do: the header is dropped on the way."""
    from mmdata.objects.s3 import S3Wire

    inner = S3Wire._call

    def without_condition(self: S3Wire, method: str, path: str, **arguments: object) -> object:
        arguments.pop("IfNoneMatch", None)
        arguments.pop("IfMatch", None)
        return inner(self, method, path, **arguments)

    monkeypatch.setattr(S3Wire, "_call", without_condition)
    with in_environment({**server.environment(), "AWS_PROFILE_OF_TEST": uuid.uuid4().hex}):
        store = Store(f"s3://{server.bucket()}/pets")
        with pytest.raises(StoreError, match="ignores the condition of a write"):
            store.replace("dataset.json", b"{}", None)
        assert store.read("dataset.json") == b"{}"


def test_parquet_by_ranges(store: Store, proxy: FaultyProxy, tmp_path: Path) -> None:
    """One column of a file is read by footer and column chunks, not whole; DuckDB in threads gets the right bytes."""
    rows = 400_000
    table = pa.table({"row_id": range(rows), "noise": [os.urandom(12) for _ in range(rows)]})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=100_000)
    size = (tmp_path / "t.parquet").stat().st_size
    assert store.commit("rows/00000.g0.parquet", tmp_path / "t.parquet")
    proxy.requests.clear()
    assert store.footer("rows/00000.g0.parquet")["num_rows"] == str(rows)
    assert len(proxy.requests) == 1
    assert store.read_table("rows/00000.g0.parquet", ["row_id"])["row_id"].to_pylist() == list(range(rows))
    assert len(proxy.requests) < 8
    assert size > 5_000_000
    with duckdb.connect() as connection:
        connection.register_filesystem(store.fs)
        path = store.path_for_duckdb("rows/00000.g0.parquet")
        found = connection.execute("SELECT sum(row_id), count(DISTINCT noise) FROM read_parquet(?)", [path]).fetchall()
    assert found == [(rows * (rows - 1) // 2, rows)]


def test_duckdb_through_a_bad_wire(store: Store, proxy: FaultyProxy, tmp_path: Path) -> None:
    for shard in range(12):
        pq.write_table(pa.table({"row_id": [shard]}), tmp_path / "t.parquet")
        assert store.commit(f"rows/{shard:05d}.g0.parquet", tmp_path / "t.parquet")
    paths = [store.path_for_duckdb(name) for name in store.row_files().values()]
    proxy.rates = {"slow_down": 0.15, "cut": 0.15, "half": 0.15}
    with duckdb.connect() as connection:
        connection.register_filesystem(store.fs)
        store.fs.expect(paths)
        assert connection.execute("SELECT sum(row_id) FROM read_parquet(?)", [paths]).fetchall() == [(66,)]
    assert sum(proxy.done.values()) > 0


def test_a_child_process_reads_on(store: Store) -> None:
    """After a fork the parent's connections and loop thread are not there."""
    store.create("media/x.tar", b"abc")
    assert store.read("media/x.tar") == b"abc"
    child = os.fork()
    if child == 0:
        gc.freeze()  # what other tests left to collect is not this process' to end
        os._exit(0 if store.read_range("media/x.tar", 1, 1) == b"b" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert store.read("media/x.tar") == b"abc"


def test_unfinished_uploads_are_seen_and_given_up(store: Store, server: S3Server, proxy: FaultyProxy) -> None:
    bucket = proxy.bucket[1] if proxy.bucket else ""
    client = server.client()
    for key in ("data/pets/media/half.tar", "data/other/half.tar"):
        begun = client.create_multipart_upload(Bucket=bucket, Key=key)
        client.upload_part(Bucket=bucket, Key=key, UploadId=begun["UploadId"], PartNumber=1, Body=b"x" * 100)
    (found,) = store.unfinished_uploads()
    assert (found.path, found.size) == ("pets-bucket/data/pets/media/half.tar", 100)
    store.abort_upload(found)
    store.abort_upload(found)
    assert store.unfinished_uploads() == []
    assert len(client.list_multipart_uploads(Bucket=bucket)["Uploads"]) == 1


BAD_URLS = [
    "s3://AKIAKEY:SECRET@bucket/pets",
    "s3://SECRET@bucket/pets",
    "s3://bucket/pets?X-Amz-Signature=SECRET",
    "s3://bucket/pets#SECRET",
    "simplecache::s3://SECRET@bucket/pets",
    "https://user:SECRET@host/pets",
    "ftp://user:SECRET@host/pets",
    "abfs://key:SECRET@account/pets",
]


@pytest.mark.parametrize("url", BAD_URLS)
def test_a_url_with_credentials_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(RecipeError, match="credentials come from the environment") as told:
        Store(url)
    assert "SECRET" not in str(told.value)
    assert "AKIAKEY" not in str(told.value)


@pytest.mark.parametrize("url", ["http://host/pets", "ftp://host/pets", "hf://datasets/x", "sftp://host/pets"])
def test_a_store_without_conditional_writes_is_refused(url: str) -> None:
    with pytest.raises(RecipeError, match=r"has no conditional write.* s3://, gs:// or abfs://"):
        Store(url)


@pytest.mark.parametrize("url", ["s3://", "s3:///pets", "s3://bucket//pets", "s3://bucket/../other"])
def test_a_url_without_a_place_is_refused(url: str) -> None:
    with pytest.raises(RecipeError, match="without empty parts"):
        Store(url)


def test_a_missing_package_is_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store.importlib.util, "find_spec", lambda name: None)
    for url, extra in (("s3://b/p", "s3"), ("gs://b/p", "gcs"), ("abfs://c@a.dfs.core.windows.net/p", "azure")):
        with pytest.raises(MissingExtra, match=rf"pip install 'mmdata\[{extra}\]'"):
            Store(url)


def test_what_is_wrong_at_the_server_is_one_sentence(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with in_environment(server.environment()):
        with pytest.raises(RecipeError, match="there is no bucket nowhere-here"):
            Store("s3://nowhere-here/pets").replace("dataset.json", b"{}", None)
        sent = pickle.loads(pickle.dumps(Store("s3://nowhere-here/pets")))  # a run is on: no more the recipe's fault
        with pytest.raises(StoreError, match="there is no bucket nowhere-here"):
            sent.entries("")
        with pytest.raises(SystemExit) as exit_:
            cli.main(["show", "s3://nowhere-here/pets"])
        assert exit_.value.code == 2
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(RecipeError, match="no S3 credentials are set"):
        Store("s3://nowhere-here/pets").read_if_there("dataset.json")


def test_a_store_travels_without_its_credentials(store: Store) -> None:
    data = pickle.dumps(store)
    assert not any(secret.encode() in data for secret in ENVIRONMENT.values())
    assert pickle.loads(data).url == "s3://pets-bucket/data/pets"
