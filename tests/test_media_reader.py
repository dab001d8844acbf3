"""Reading media from anywhere: whose bytes come, how many requests they cost, and what a failure costs."""

from __future__ import annotations

import io
import os
import random
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pictures import adopted, media_of, picture, rows_of
from range_server import RangeServer, serving

import mmdata
from mmdata.errors import MissingMedia, StoreError
from mmdata.media_ranges import GAP_BYTES, RANGE_BYTES, coalesced
from mmdata.media_reader import MediaReader
from mmdata.store import Store


@pytest.fixture
def server() -> Iterator[RangeServer]:
    with serving() as running:
        yield running


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[MediaReader]:
    with MediaReader(Store(str(tmp_path / "ds"))) as made:
        yield made


NOISE = np.random.default_rng(7).integers(0, 256, 24 << 20, np.uint8).tobytes()


@given(
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 900)), max_size=40),
    st.integers(0, 600),
    st.integers(1, 2000),
)
def test_ranges_cover_their_references_and_bridge_no_more_than_the_gap(
    references: list[tuple[int, int]], gap: int, most: int
) -> None:
    ranges = coalesced(references, gap, most)
    told = [r for found in ranges for r in found.wanted.elements()]
    assert sorted(told) == sorted(references)
    for found in ranges:
        assert all(found.start <= o and o + s <= found.start + found.size for o, s in found.wanted)
        assert found.size <= max([most, *(s for _, s in found.wanted)])
        needed = np.zeros(found.size, bool)
        for offset, size in found.wanted:
            needed[offset - found.start : offset - found.start + size] = True
        holes = "".join("x" if n else "." for n in needed).split("x")
        assert all(len(hole) <= gap for hole in holes)


def test_few_survivors_cost_few_small_requests(server: RangeServer, reader: MediaReader) -> None:
    server.files["/x.tar"] = NOISE
    url = f"{server.url}/x.tar"
    # Two groups of neighbours and a loner: three requests for five pictures.
    wanted = [(1000, 500), (2000, 700), (3 << 20, 900), ((3 << 20) + 1000 + GAP_BYTES - 100, 300), (20 << 20, 50)]
    reader.expect([(url, o, s) for o, s in wanted])
    assert server.asked == []
    assert [reader.read(url, o, s) for o, s in wanted] == [NOISE[o : o + s] for o, s in wanted]
    assert sorted(server.asked) == [
        ("/x.tar", 1000, 1700),
        ("/x.tar", 3 << 20, 1000 + GAP_BYTES - 100 + 300),
        ("/x.tar", 20 << 20, 50),
    ]
    assert reader.read(url, 77, 5) == NOISE[77:82]  # not planned: a request of its own


def test_a_third_of_a_file_in_a_row_is_read_in_order_in_large_pieces(server: RangeServer, reader: MediaReader) -> None:
    server.files["/x.tar"] = NOISE + NOISE + NOISE
    url = f"{server.url}/x.tar"
    wanted = [(o, 30_000) for o in range(0, len(NOISE) - 30_000, 31_000)]
    reader.expect([(url, o, s) for o, s in wanted])
    assert all(reader.read(url, o, s) == NOISE[o : o + s] for o, s in wanted)
    assert len(server.asked) == 2
    assert all(length <= RANGE_BYTES for _, _, length in server.asked)


def test_most_of_a_file_is_one_stream(server: RangeServer, reader: MediaReader) -> None:
    server.files["/x.tar"] = NOISE
    url = f"{server.url}/x.tar"
    wanted = [(o, 30_000) for o in range(0, len(NOISE) - 30_000, 50_000)]
    reader.expect([(url, o, s) for o, s in wanted])
    random.Random(3).shuffle(wanted)
    assert all(reader.read(url, o, s) == NOISE[o : o + s] for o, s in wanted)
    assert server.asked == [("/x.tar", None, len(NOISE))]


def test_a_server_without_ranges_is_asked_once_for_the_whole(server: RangeServer, reader: MediaReader) -> None:
    server.files["/x.tar"] = NOISE
    server.knows_ranges = False
    url = f"{server.url}/x.tar"
    wanted = [(o, 100) for o in range(0, 20 << 20, 2 << 20)]
    reader.expect([(url, o, s) for o, s in wanted])
    assert [reader.read(url, o, s) for o, s in wanted] == [NOISE[o : o + s] for o, s in wanted]
    assert len(server.asked) <= 5  # those in flight before it was known, and the whole


def test_many_threads_get_their_own_bytes(server: RangeServer, tmp_path: Path, reader: MediaReader) -> None:
    server.files["/x.tar"] = NOISE
    files = []
    for i in range(100):  # more than are kept open
        (tmp_path / f"{i}.bin").write_bytes(NOISE[i * 1000 : i * 1000 + 900])
        files.append((str(tmp_path / f"{i}.bin"), 0, 900, i * 1000))
    url = f"{server.url}/x.tar"
    far = [(url, o, 500, o) for o in range(0, 4 << 20, 9000)]
    reader.expect([(path, o, s) for path, o, s, _ in far])
    every = [*files * 3, *far]
    random.Random(5).shuffle(every)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda r: reader.read(*r[:3]), every))
    assert found == [NOISE[at : at + size] for _, _, size, at in every]


def test_what_is_gone_or_changed_costs_the_row(server: RangeServer, tmp_path: Path, reader: MediaReader) -> None:
    (tmp_path / "short.bin").write_bytes(b"abc")
    (tmp_path / "longer.jpg").write_bytes(b"abcdef")
    pq.write_table(pa.table({"image": [b"abc", None]}), tmp_path / "x.parquet")
    server.files["/short"] = b"abc"
    for path, offset, size in [
        (str(tmp_path / "no.tar"), 512, 3),
        (str(tmp_path / "short.bin"), 1, 3),
        (str(tmp_path / "longer.jpg"), 0, 3),
        (f"{tmp_path}/no.parquet#image", 0, 3),
        (f"{tmp_path}/x.parquet#image", 0, 4),
        (f"{tmp_path}/x.parquet#image", 1, 3),
        (f"{tmp_path}/x.parquet#image", 2, 3),
        (f"{tmp_path}/x.parquet#picture", 0, 3),
        (f"{server.url}/nothing", 0, 3),
        (f"{server.url}/short", 1, 3),
    ]:
        with pytest.raises(MissingMedia) as raised:
            reader.read(path, offset, size)
        assert not raised.value.transient, path
    assert reader.read(f"{tmp_path}/x.parquet#image", 0, 3) == b"abc"
    server.fails = True
    with pytest.raises(MissingMedia) as raised:
        reader.read(f"{server.url}/short", 0, 3)
    assert raised.value.transient


def test_own_media_that_is_gone_is_the_operators(reader: MediaReader) -> None:
    with pytest.raises(StoreError) as raised:
        reader.read("media/00000-x.tar", 512, 3)
    assert not isinstance(raised.value, MissingMedia)


def test_cells_hold_a_bounded_number_of_bytes(tmp_path: Path) -> None:
    blobs = [NOISE[i * 10_000 : (i + 1) * 10_000] for i in range(64)]
    pq.write_table(pa.table({"a.b": blobs}), tmp_path / "x.parquet", row_group_size=4)
    with MediaReader(Store(str(tmp_path / "ds")), held_bytes=100_000) as reader:
        order = list(range(64)) * 2
        random.Random(1).shuffle(order)
        for row in order:
            assert reader.read(f"{tmp_path}/x.parquet#a.b", row, 10_000) == blobs[row]
            assert sum(v.nbytes for v in reader._cells._groups.values()) <= 100_000
    with (
        pa.OSFile(str(tmp_path / "x.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, pa.schema([("i", pa.binary())])) as file,
    ):
        for i in range(0, 64, 8):
            file.write_batch(pa.record_batch({"i": blobs[i : i + 8]}))
    with MediaReader(Store(str(tmp_path / "ds"))) as reader:
        assert [reader.read(f"{tmp_path}/x.arrow#i", row, 10_000) for row in order] == [blobs[row] for row in order]


# In a run


def remote_tar(server: RangeServer, count: int) -> list[bytes]:
    pictures = [picture(i, width=400, height=300) for i in range(count)]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for i, data in enumerate(pictures):
            info = tarfile.TarInfo(f"{i:03d}.jpg")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    server.files["/x.tar"] = buffer.getvalue()
    return pictures


def test_a_remote_tar_is_indexed_in_one_go_and_read_as_far_as_rows_survive(server: RangeServer, tmp_path: Path) -> None:
    pictures = remote_tar(server, 40)
    source = {"kind": "webdataset", "path": f"{server.url}/x.tar"}
    ds = adopted(tmp_path / "ds", source, steps=[])
    assert [r["width_px"] for r in rows_of(ds)] == [400 + i for i in range(40)]
    indexing = len(server.asked)
    assert indexing == 2  # a look at plan, then a block of at least 4 MiB
    server.asked.clear()
    some = {"filter": {"few": "width_px IN (401, 402, 430)"}}
    chosen = adopted(tmp_path / "ds", source, steps=[some, {"hash_image": {}}])
    read = [a for a in server.asked if a[1] is not None and a[2] < 1 << 20]
    assert len(read) == 2
    assert sum(length for _, _, length in read) < 5 * max(map(len, pictures))
    assert chosen.funnel().kept == 3
    assert media_of(chosen) == pictures


def test_adopted_media_that_goes_away_costs_its_rows_and_a_server_that_is_down_is_tried_again(
    server: RangeServer, tmp_path: Path
) -> None:
    for i in range(4):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{i}.jpg").write_bytes(picture(i))
    source = {"kind": "images", "path": str(tmp_path / "in")}
    adopted(tmp_path / "ds", source, steps=[])
    # The same size and time of change, other content: nobody can know; a hole in the row's own reference is found.
    status = os.stat(tmp_path / "in" / "2.jpg")
    (tmp_path / "in" / "2.jpg").write_bytes(bytes(status.st_size))
    os.utime(tmp_path / "in" / "2.jpg", ns=(status.st_atime_ns, status.st_mtime_ns))
    recipe = {
        "name": "x",
        "dataset": str(tmp_path / "ds"),
        "source": source,
        "steps": [{"hash_image": {"max_failed": 1}}],
    }
    (tmp_path / "in" / "1.jpg").unlink()
    ds = mmdata.run(recipe, runner="inline")
    assert [r["reason"] for r in rows_of(ds)] == [None, "missing_media", "not_media", None]

    pictures = remote_tar(server, 3)
    far = {"kind": "webdataset", "path": f"{server.url}/x.tar"}
    adopted(tmp_path / "far", far, steps=[])
    server.fails = True
    down = mmdata.run({**recipe, "dataset": str(tmp_path / "far"), "source": far}, runner="inline")
    assert {r["reason"] for r in rows_of(down)} == {"!media"}
    server.fails = False
    again = adopted(tmp_path / "far", far, steps=[{"hash_image": {"max_failed": 1}}])
    assert {r["reason"] for r in rows_of(again)} == {None}
    assert media_of(again) == pictures
