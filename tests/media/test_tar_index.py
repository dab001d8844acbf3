"""The walk over foreign tars, against Python's tarfile and GNU tar; and what damage costs."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdata.media.tar_index import Member, TarDamage, walk_tar


class Stream(io.RawIOBase):
    """Bytes that come in small pieces and cannot be sought, as from a socket."""

    def __init__(self, data: bytes, piece: int = 700) -> None:
        self._data, self._piece, self._at = data, piece, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def read(self, size: int = -1) -> bytes:
        part = self._data[self._at : self._at + min(size, self._piece)]
        self._at += len(part)
        return part


def members(data: bytes, streamed: bool = False) -> list[Member]:
    if streamed:
        return list(walk_tar(Stream(data), None))  # type: ignore[arg-type]
    return list(walk_tar(io.BytesIO(data), len(data)))


def expected(data: bytes) -> list[tuple[str, int, int]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [(m.name, m.offset_data, m.size) for m in tar if m.isfile()]


def made(entries: list[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, payload in entries:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return buffer.getvalue()


names = st.text(st.characters(exclude_characters="\0/", exclude_categories=("Cs",)), min_size=1, max_size=200).filter(
    lambda n: n.strip(". ") != "" and not n.endswith("/")
)


@settings(max_examples=60, deadline=None)
@given(
    entries=st.lists(st.tuples(names, st.binary(max_size=2000)), max_size=8),
    format=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
    streamed=st.booleans(),
)
def test_the_same_members_as_tarfile(entries: list[tuple[str, bytes]], format: int, streamed: bool) -> None:
    data = made(entries, format)
    found = members(data, streamed)
    assert [(m.name, m.offset, m.size) for m in found] == expected(data)
    assert [data[m.offset : m.offset + m.size] for m in found] == [payload for _, payload in entries]


def test_links_folders_and_sparse_files(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a.txt").write_bytes(b"text")
    (folder / "soft.jpg").symlink_to("/etc/passwd")
    (folder / "hard.jpg").hardlink_to(folder / "deep" / "a.txt")
    with (folder / "holes.jpg").open("wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"x" * 4096)
    for format in ("gnu", "posix"):
        archive = tmp_path / f"{format}.tar"
        subprocess.run(
            ["tar", f"--format={format}", "--sparse", "--sort=name", "-cf", archive, "-C", folder, "."], check=True
        )
        with archive.open("rb") as file:
            found = list(walk_tar(file, archive.stat().st_size))
        assert [m.name for m in found if not m.sparse] == ["./deep/a.txt"], format
        assert [m.name for m in found if m.sparse] == ["./holes.jpg"], format


def test_heads_can_be_read_on_the_way() -> None:
    payloads = [bytes([i]) * size for i, size in enumerate((10, 100_000, 0, 200_000))]
    data = made([(f"{i}.bin", p) for i, p in enumerate(payloads)])
    for file, size in ((io.BytesIO(data), len(data)), (Stream(data), None)):
        walk = walk_tar(file, size)  # type: ignore[arg-type]
        assert [walk.head(64) + walk.head(64) for _ in walk] == [p[:128] for p in payloads]


@pytest.mark.parametrize("streamed", [False, True])
def test_every_cut_is_told_and_what_came_before_is_sound(streamed: bool) -> None:
    payloads = [b"a" * 700, b"b" * 100, b"c" * 1500]
    data = made([(f"{i}.bin", p) for i, p in enumerate(payloads)], tarfile.USTAR_FORMAT)
    end = 512 + 1024 + 512 + 512 + 512 + 1536  # of the last member's padding
    for length in range(0, end + 1, 97):
        found: list[Member] = []
        cut = data[:length]
        walk = walk_tar(Stream(cut), None) if streamed else walk_tar(io.BytesIO(cut), length)  # type: ignore[arg-type]
        with pytest.raises(TarDamage) as raised:
            found.extend(walk)
        assert raised.value.cut
        whole = [m for m in found if m.offset + m.size <= length]
        assert [data[m.offset : m.offset + m.size] for m in whole] == payloads[: len(whole)]
        assert len(found) - len(whole) <= 1


def test_malice_is_damage() -> None:
    good = bytearray(made([("a.jpg", b"x" * 10), ("b.jpg", b"y")], tarfile.USTAR_FORMAT))
    flipped = bytes(good[:100]) + b"\1" + bytes(good[101:])
    with pytest.raises(TarDamage, match="checksum"):
        members(flipped)
    with pytest.raises(TarDamage, match="checksum"):
        members(b"\xff\xd8\xff" + bytes(5000))
    huge = io.BytesIO()
    info = tarfile.TarInfo("a.jpg")
    info.size = 1 << 60
    huge.write(info.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(TarDamage, match="beyond the end"):
        members(huge.getvalue() + bytes(4096))
    info.pax_headers = {"size": "-5"}
    info.size = 10
    with pytest.raises(TarDamage):
        members(info.tobuf(tarfile.PAX_FORMAT) + bytes(4096))
    long = tarfile.TarInfo("x")
    long.type, long.size = tarfile.GNUTYPE_LONGNAME, 1 << 30
    with pytest.raises(TarDamage, match="a header of"):
        members(long.tobuf(tarfile.USTAR_FORMAT) + bytes(4096))
