"""The tar appender against tarfile and GNU tar."""

from __future__ import annotations

import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdata.media.tar import TarAppender

PAYLOADS = [b"", b"a", b"x" * 511, b"y" * 512, b"z" * 513, bytes(range(256)) * 40]


def write(path: Path, payloads: list[bytes]) -> list[tuple[int, int]]:
    with TarAppender(path) as tar:
        return [tar.append(f"{number:09d}.jpg", payload) for number, payload in enumerate(payloads)]


def test_tarfile_and_gnu_tar_read_it(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write(path, PAYLOADS)
    names = [f"{number:09d}.jpg" for number in range(len(PAYLOADS))]
    with tarfile.open(path, "r:") as tar:
        assert tar.getnames() == names
        members = tar.getmembers()
        assert [tar.extractfile(m).read() for m in members] == PAYLOADS  # type: ignore[union-attr]
        assert {(m.mode, m.uid, m.gid, m.uname, m.gname, m.mtime) for m in members} == {
            (0o444, 0, 0, "", "", 946684800)
        }
    listed = subprocess.run(["tar", "tf", path], capture_output=True, text=True, check=True)
    assert listed.stdout.split() == names
    assert listed.stderr == ""
    (tmp_path / "out").mkdir()
    taken = subprocess.run(["tar", "xf", path, "-C", tmp_path / "out"], capture_output=True, text=True, check=True)
    assert taken.stderr == ""
    assert [(tmp_path / "out" / name).read_bytes() for name in names] == PAYLOADS


@settings(max_examples=30, deadline=None)
@given(payloads=st.lists(st.binary(max_size=1600), max_size=6))
def test_offsets_are_payloads_and_bytes_are_a_function_of_the_input(
    payloads: list[bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("tar")
    places = write(folder / "a.tar", payloads)
    write(folder / "b.tar", payloads)
    data = (folder / "a.tar").read_bytes()
    assert [data[offset : offset + size] for offset, size in places] == payloads
    assert data == (folder / "b.tar").read_bytes()


def test_a_body_that_raises_leaves_no_end_mark(tmp_path: Path) -> None:
    def fail() -> None:
        with TarAppender(tmp_path / "a.tar") as tar:
            tar.append("0.jpg", b"x" * 600)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (tmp_path / "a.tar").stat().st_size == 512 + 1024


@pytest.mark.parametrize(
    "name",
    [
        "/a.jpg",
        "../a.jpg",
        "a//b.jpg",
        "./a.jpg",
        "a/.b.jpg",
        "..jpg",
        "noext",
        ".jpg",
        "a.",
        "k" * 97 + ".jpg",
        "",
        "a\0.jpg",
    ],
)
def test_names_that_would_break_a_reader_are_refused(name: str, tmp_path: Path) -> None:
    with TarAppender(tmp_path / "a.tar") as tar, pytest.raises(ValueError, match="tar member name"):
        tar.append(name, b"")


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", [])
    with pytest.raises(FileExistsError):
        TarAppender(tmp_path / "a.tar")


def test_keys_may_have_folders(tmp_path: Path) -> None:
    names = ["cats.v1/deep/0001.jpg", "cats.v1/deep/0001.txt", "k" * 80 + "/" + "m" * 15 + ".jpg"]
    with TarAppender(tmp_path / "a.tar") as tar:
        for name in names:
            tar.append(name, name.encode())
    with tarfile.open(tmp_path / "a.tar", "r:") as tar:
        assert [(m.name, tar.extractfile(m).read()) for m in tar] == [(n, n.encode()) for n in names]  # type: ignore[union-attr]
