"""The store: published once and whole, or not at all; the three mutable files change only as their writer saw them."""

# long because: the rules of one door, on every kind of store

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3 import S3Server, in_environment, running_s3

import mmdata
from mmdata.errors import StoreError
from mmdata.scratch import scratch_folder, stale_scratch
from mmdata.store import Store

REPOSITORY = str(Path(mmdata.__file__).parents[1])


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with running_s3() as server, in_environment(server.environment()):
        yield server


@pytest.fixture(params=["local", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "s3":
        return Store(f"s3://{request.getfixturevalue('s3').bucket()}/a/pets")
    return Store(str(tmp_path / "a" / "pets") if request.param == "local" else f"memory://{uuid.uuid4().hex}/pets")


def start(code: str, *arguments: str, **options: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": REPOSITORY}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        env=environment, text=True, stdout=subprocess.PIPE, stdin=subprocess.PIPE, **options,  # type: ignore[call-overload]
    )  # fmt: skip


def file_with(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / uuid.uuid4().hex
    path.write_bytes(data)
    return path


def test_a_name_is_published_once(store: Store, tmp_path: Path) -> None:
    assert not store.exists("media/00000-a.tar")
    assert store.commit("media/00000-a.tar", file_with(tmp_path, b"first"))
    assert not store.commit("media/00000-a.tar", file_with(tmp_path, b"second"))
    assert store.read("media/00000-a.tar") == b"first"
    assert store.exists("media/00000-a.tar")
    assert not store.exists("media")
    assert store.list("media") == ["00000-a.tar"]
    assert store.create("runs/b.json", b"{}")
    assert not store.create("runs/b.json", b"[]")
    assert store.read("runs/b.json") == b"{}"
    assert store.folders("") == ["media", "runs"]
    assert store.list("nowhere") == []


def test_writing_to_the_local_file_again_leaves_what_was_published(store: Store, tmp_path: Path) -> None:
    local = file_with(tmp_path, b"shard 0")
    assert store.commit("media/00000-a.tar", local)
    local.write_bytes(b"shard 1, in the same scratch file")
    assert store.read("media/00000-a.tar") == b"shard 0"


def test_replace_needs_what_the_caller_saw(store: Store) -> None:
    assert not store.replace("current.json", b"1", expected=b"0")
    assert store.list("") == []
    assert store.replace("current.json", b"1", expected=None)
    assert not store.replace("current.json", b"2", expected=None)
    assert not store.replace("current.json", b"2", expected=b"0")
    assert store.read("current.json") == b"1"
    assert store.replace("current.json", b"2", expected=b"1")
    assert store.read("current.json") == b"2"
    with pytest.raises(StoreError, match="written once"):
        store.replace("rows/00000.g0.parquet", b"", expected=None)


def test_a_mutable_file_is_not_committed(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"Store\.replace"):
        store.commit("current.json", file_with(tmp_path, b"{}"))


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "rows/../../x", "rows//x", "rows/.", "rows/x\0", "rows/"])
def test_names_stay_inside_the_dataset(store: Store, tmp_path: Path, name: str) -> None:
    local = file_with(tmp_path, b"x")
    for attempt in (
        lambda: store.read(name),
        lambda: store.commit(name, local),
        lambda: store.read_range(name, 0, 1),
        lambda: store.remove(name),
    ):
        with pytest.raises(StoreError, match="names are relative"):
            attempt()
    assert local.read_bytes() == b"x"


@pytest.mark.parametrize("name", ["rows/.hidden", "media/a b", "media/a\n", "media/é", "media/" + "x" * 201])
def test_odd_names_are_not_written(store: Store, tmp_path: Path, name: str) -> None:
    with pytest.raises(StoreError, match="may not be written"):
        store.commit(name, file_with(tmp_path, b"x"))


def test_ranges_are_exact(store: Store) -> None:
    store.create("media/x.tar", bytes(range(100)))
    assert store.read_range("media/x.tar", 10, 5) == bytes([10, 11, 12, 13, 14])
    assert store.read_range("media/x.tar", 100, 0) == b""
    with pytest.raises(StoreError, match=r"media/x\.tar .* ends before byte 101"):
        store.read_range("media/x.tar", 98, 3)
    for missing in (lambda: store.read("media/y.tar"), lambda: store.read_range("media/y.tar", 0, 1)):
        with pytest.raises(StoreError, match=r"media/y\.tar is missing"):
            missing()
    assert store.read_if_there("media/y.tar") is None


def test_remove(store: Store) -> None:
    store.create("media/x.tar", b"x")
    store.create("media/y.tar", b"y")
    store.remove("media/x.tar")
    store.remove("media/x.tar")
    assert store.list("media") == ["y.tar"]
    store.remove("media/y.tar")
    assert store.list("media") == []


def test_a_torn_parquet_file_is_never_published(store: Store, tmp_path: Path) -> None:
    whole = tmp_path / "whole.parquet"
    pq.write_table(pa.table({"row_id": list(range(1000))}), whole)
    torn = file_with(tmp_path, whole.read_bytes()[:-20])
    with pytest.raises(StoreError, match=r"rows/00000\.g0\.parquet.* not a whole Parquet file"):
        store.commit("rows/00000.g0.parquet", torn)
    assert store.list("rows") == []
    assert store.commit("rows/00000.g0.parquet", whole)
    assert store.row_files() == {0: "rows/00000.g0.parquet"}


def test_tables_and_footers(store: Store, tmp_path: Path) -> None:
    table = pa.table({"row_id": [1, 2], "url": ["u", None], "n": [3, 4]}).replace_schema_metadata({"mmdata.x": "é"})
    pq.write_table(table, tmp_path / "t.parquet")
    store.commit("rows/00000.g0.parquet", tmp_path / "t.parquet")
    assert store.read_table("rows/00000.g0.parquet").to_pydict() == table.to_pydict()
    assert store.read_table("rows/00000.g0.parquet", ["n", "row_id"]).to_pydict() == {"n": [3, 4], "row_id": [1, 2]}
    assert store.column_names("rows/00000.g0.parquet") == ["row_id", "url", "n"]
    assert store.footer("rows/00000.g0.parquet") == {"mmdata.x": "é", "num_rows": "2"}
    with pytest.raises(StoreError, match=r"rows/00000\.g0\.parquet .* has no column 'm'; it has row_id, url, n"):
        store.read_table("rows/00000.g0.parquet", ["m"])
    with pytest.raises(StoreError, match=r"rows/00001\.g0\.parquet is missing"):
        store.footer("rows/00001.g0.parquet")


def test_the_highest_generation_wins_and_strangers_are_named(store: Store, tmp_path: Path) -> None:
    for name in ("00000.g0", "00000.g10", "00000.g9", "00012.g0", "100000.g0"):
        pq.write_table(pa.table({"row_id": [1]}), tmp_path / "t.parquet")
        assert store.commit(f"rows/{name}.parquet", tmp_path / "t.parquet")
    newest = {0: "rows/00000.g10.parquet", 12: "rows/00012.g0.parquet", 100_000: "rows/100000.g0.parquet"}
    assert store.row_files() == newest
    store.create("rows/notes.txt", b"mine")
    with pytest.raises(StoreError, match=r"rows/notes\.txt"):
        store.row_files()


def test_duckdb_reads_this_very_file(tmp_path: Path) -> None:
    for folder, value in (("a[bc]*?", 1), ("ab_x", 2), ("ac_y", 3)):
        store = Store(str(tmp_path / folder))
        pq.write_table(pa.table({"row_id": [value]}), tmp_path / "t.parquet")
        store.commit("rows/00000.g0.parquet", tmp_path / "t.parquet")
    path = Store(str(tmp_path / "a[bc]*?")).path_for_duckdb("rows/00000.g0.parquet")
    with duckdb.connect() as connection:
        assert connection.execute("SELECT * FROM read_parquet(?)", [path]).fetchall() == [(1,)]


def test_duckdb_reads_memory(tmp_path: Path) -> None:
    store = Store(f"memory://{uuid.uuid4().hex}/pets")
    pq.write_table(pa.table({"row_id": [7]}), tmp_path / "t.parquet")
    store.commit("rows/00000.g0.parquet", tmp_path / "t.parquet")
    with duckdb.connect() as connection:
        connection.register_filesystem(store.fs)
        path = store.path_for_duckdb("rows/00000.g0.parquet")
        assert connection.execute("SELECT * FROM read_parquet(?)", [path]).fetchall() == [(7,)]


def test_a_store_travels_as_its_url(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store.create("runs/a.json", b"{}")
    assert pickle.loads(pickle.dumps(store)).read("runs/a.json") == b"{}"
    assert len(pickle.dumps(store)) < 400
    monkeypatch.chdir(tmp_path)
    relative = Store("a/pets")
    assert relative.url == str(tmp_path / "a" / "pets")
    assert Store(f"file://{tmp_path}/a/pets").url == relative.url


RACER = """
    import sys, pathlib
    from mmdata.store import Store
    url, scratch, mark = sys.argv[1:]
    store = Store(url)
    won = []
    print("ready", flush=True)
    sys.stdin.readline()
    for n in range(25):
        local = pathlib.Path(scratch, mark)
        local.write_bytes(mark.encode() * 200_000)
        if store.commit(f"media/{n}.tar", local):
            won.append(n)
    print(*won)
"""


def test_one_of_eight_processes_wins_each_name(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "pets"))
    racers = [start(RACER, store.url, str(tmp_path), mark) for mark in "abcdefgh"]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    won = {
        mark: [int(n) for n in racer.communicate()[0].split()] for mark, racer in zip("abcdefgh", racers, strict=True)
    }
    assert sorted(n for names in won.values() for n in names) == list(range(25))
    for mark, names in won.items():
        for n in names:
            assert store.read(f"media/{n}.tar") == mark.encode() * 200_000
    assert [name for name, _ in store.entries("media")] == store.list("media"), "no temporary file is left"


def test_one_of_eight_threads_wins_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(f"memory://{uuid.uuid4().hex}/pets")
    exists, won = store.fs.exists, []

    def slowly(path: str) -> bool:
        found = bool(exists(path))
        time.sleep(0.02)  # the others come in between
        return found

    monkeypatch.setattr(store.fs, "exists", slowly)
    locals_ = [file_with(tmp_path, str(n).encode()) for n in range(8)]
    threads = [
        threading.Thread(target=lambda n: won.append(n) if store.commit("media/x.tar", locals_[n]) else None, args=(n,))
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.read("media/x.tar") == str(won[0]).encode()


# Each dies of SIGKILL inside the write; `moved`: scratch is on the dataset's filesystem, `copied`: it is not.
DEATHS = {
    "before the link": "os.link = die",
    "in the copy": "os.rename = other_filesystem; shutil.copyfile = half",
    "after the copy, before the link": "os.rename = other_filesystem; os.link = die",
}
VICTIM = """
    import errno, os, pathlib, shutil, signal, sys
    from mmdata.store import Store
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)
    def other_filesystem(*_):
        raise OSError(errno.EXDEV, "another filesystem")
    def half(source, target):
        pathlib.Path(target).write_bytes(pathlib.Path(source).read_bytes()[:5])
        die()
"""


@pytest.mark.parametrize("death", DEATHS)
def test_killed_inside_commit(tmp_path: Path, death: str) -> None:
    store = Store(str(tmp_path / "pets"))
    local = file_with(tmp_path, b"0123456789")
    code = (
        textwrap.dedent(VICTIM)
        + f"{DEATHS[death]}\nStore(sys.argv[1]).commit('media/x.tar', pathlib.Path(sys.argv[2]))"
    )
    victim = start(code, store.url, str(local))
    victim.communicate()
    assert victim.returncode == -signal.SIGKILL
    assert store.list("media") == []
    assert not store.exists("media/x.tar")
    assert [name[:5] for name, _ in store.entries("media")] == [".tmp-"]
    assert store.commit("media/x.tar", file_with(tmp_path, b"again"))
    assert store.read("media/x.tar") == b"again"


def test_killed_inside_replace_keeps_the_old_file_and_frees_the_lock(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "pets"))
    assert store.replace("current.json", b"old", None)
    code = textwrap.dedent(VICTIM) + "os.replace = die\nStore(sys.argv[1]).replace('current.json', b'new', b'old')"
    victim = start(code, store.url)
    victim.communicate()
    assert victim.returncode == -signal.SIGKILL
    assert store.read("current.json") == b"old"
    assert store.replace("current.json", b"newer", b"old")


def test_replace_loses_no_update(tmp_path: Path) -> None:
    code = """
        import sys
        from mmdata.store import Store
        store, done = Store(sys.argv[1]), 0
        while done < 25:
            seen = store.read("current.json")
            done += store.replace("current.json", str(int(seen) + 1).encode(), seen)
    """
    store = Store(str(tmp_path / "pets"))
    assert store.replace("current.json", b"0", None)
    counters = [start(code, store.url) for _ in range(4)]
    for counter in counters:
        counter.communicate()
        assert counter.returncode == 0
    assert store.read("current.json") == b"100"


FULL = """
    import os, pathlib, resource, subprocess, sys, tempfile
    from mmdata.errors import StoreError
    from mmdata.store import Store
    kind, folder, scratch = sys.argv[1:]
    local = pathlib.Path(scratch, "big")
    local.write_bytes(b"x" * 1_000_000)
    if kind == "disk":
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], check=True)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (256 * 1024, 256 * 1024))
        os.rename = lambda *_: (_ for _ in ()).throw(OSError(18, "another filesystem"))
    store = Store(folder + "/pets")
    assert store.create("runs/a.json", b"{}")
    try:
        store.commit("media/00000-a.tar", local)
    except StoreError as error:
        print(error)
    assert store.entries("media") == [], store.entries("media")
    assert store.read("runs/a.json") == b"{}"
"""


@pytest.mark.parametrize("kind", ["disk", "file size limit"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing_torn(tmp_path: Path, kind: str) -> None:
    (tmp_path / "mounted").mkdir()
    arguments = [sys.executable, "-c", textwrap.dedent(FULL), kind, str(tmp_path / "mounted"), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": REPOSITORY}
    alone = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--user", "--map-root-user"]
    if (
        kind == "disk"
        and subprocess.run([*alone, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], check=False).returncode == 0
    ):
        expected = "the disk is full"  # a mount of its own, gone with the process
        arguments = [*alone, *arguments]
    else:  # nobody may mount here: the other limit a write can meet
        arguments[3], expected = "file size limit", "ulimit -f"
    done = subprocess.run(arguments, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "cannot write media/00000-a.tar" in done.stdout
    assert expected in done.stdout
    assert "1000000 bytes" in done.stdout


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "pets").write_bytes(b"a file")
    with pytest.raises(StoreError, match=r"cannot write runs/a\.json .*Not a directory"):
        Store(str(tmp_path / "pets")).create("runs/a.json", b"{}")


def test_scratch_is_removed_at_the_end_and_after_a_death(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMDATA_SCRATCH", str(tmp_path / "scratch"))
    with scratch_folder() as one, scratch_folder() as two:
        assert one != two
        assert one.parent == two.parent == tmp_path / "scratch"
        (one / "file").write_bytes(b"x")
        code = """
            import os, signal
            from mmdata.scratch import scratch_folder
            with scratch_folder() as folder:
                (folder / "file").write_bytes(b"x")
                os.kill(os.getpid(), signal.SIGKILL)
        """
        start(code).communicate()
        left = [p for p in (tmp_path / "scratch").iterdir() if p not in (one, two)]
        assert len(left) == 1
        assert stale_scratch() == left
        swept = start("from mmdata.scratch import scratch_folder\nwith scratch_folder(): pass")
        swept.communicate()
        assert not left[0].exists()
        assert (one / "file").exists(), "a live process's scratch stays"
    assert list((tmp_path / "scratch").iterdir()) == []
