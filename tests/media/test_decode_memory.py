"""The largest pictures that are decoded at all, each prepared in a process of its own: what it takes beyond its start.

The pictures are written here row by row, so that making them takes no memory to speak of.
"""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmdata.media import image
from mmdata.media.memory import Room, pixels_allowed

SIDE = 8190  # 67 Mpx, just within max_pixels
MEASURE = """
import io, resource, sys
from PIL import Image
from mmdata.prepare import prepare
from mmdata.settings import FetchOptions

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

for format in ("JPEG", "PNG", "WEBP"):  # what every process has loaded after its first pictures
    sink = io.BytesIO()
    Image.new("RGB", (600, 500)).save(sink, format)
    assert prepare(sink.getvalue(), FetchOptions()).status == "ok"
body = open(sys.argv[1], "rb").read()
before = peak()
found = prepare(body, FetchOptions())
print(found.status, found.width_px, found.height_px, peak() - before)
"""


def png(depth: int, colour: int, bytes_per_px: int, side: int = SIDE) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    packer = zlib.compressobj(1)
    row = b"\0" + (bytes(range(256)) * (side * bytes_per_px // 256 + 1))[: side * bytes_per_px]
    pixels = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def drawn(mode: str, size: tuple[int, int], **options: object) -> bytes:
    sink = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert(mode).save(sink, **options)  # type: ignore[arg-type]
    return sink.getvalue()


BODIES = {
    "png rgba": lambda: png(8, 6, 4),
    "png rgb 16": lambda: png(16, 2, 6),
    "jpeg progressive": lambda: drawn("L", (SIDE, SIDE), format="JPEG", progressive=True),
    "jpeg strip": lambda: drawn("CMYK", (65_000, 767), format="JPEG"),
    "webp": lambda: drawn("RGB", (6_000, 6_000), format="WEBP", quality=30, method=0),
    "gif": lambda: drawn("L", (SIDE, SIDE), format="GIF"),
    "png grey 16": lambda: png(16, 0, 2),
    "png rgba 16": lambda: png(16, 6, 8),
    "png la": lambda: png(8, 4, 2),
    "jpeg 4:2:0 progressive": lambda: drawn("RGB", (SIDE, SIDE), format="JPEG", progressive=True),
    "avif": lambda: drawn("RGB", (4_400, 4_400), format="AVIF", speed=10),
    "tiff": lambda: drawn("RGB", (4_600, 4_600), format="TIFF", compression="tiff_lzw"),
    "jpeg2000": lambda: drawn("RGB", (3_800, 3_800), format="JPEG2000"),
}


def _measured(body: bytes, folder: Path) -> int:
    (folder / "body").write_bytes(body)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder / "body")], capture_output=True, text=True, check=True
    )
    status, width, height, megabytes = done.stdout.split()
    assert status == "ok"
    assert min(int(width), int(height)) == 256
    return int(megabytes)


def test_a_huge_picture_takes_at_most_300_mb(tmp_path: Path) -> None:
    assert _measured(BODIES["png rgba"](), tmp_path) <= 300


@pytest.mark.long
@pytest.mark.parametrize("name", [*BODIES][1:])
def test_any_huge_picture_takes_at_most_300_mb(name: str, tmp_path: Path) -> None:
    assert _measured(BODIES[name](), tmp_path) <= 300


def test_decoders_that_hold_more_are_allowed_fewer_pixels() -> None:
    assert pixels_allowed("png", 2**26) == pixels_allowed("jpeg", 2**26) == 2**26
    assert pixels_allowed("jpeg2000", 2**26) == int(2**26 * 4.5 / 20)
    data = drawn("RGB", (300, 300), format="JPEG2000")
    assert image.decode(data, max_pixels=90_000 * 20 // 4 + 1).shape == (300, 300, 3)
    with pytest.raises(image.DecodeError, match="takes more memory") as caught:
        image.decode(data, max_pixels=90_000)
    assert caught.value.kind == "too_many_pixels"


def test_the_coefficients_of_a_progressive_jpeg_count() -> None:
    flat = drawn("RGB", (1_000, 1_000), format="JPEG", progressive=True, subsampling=0)  # 6 bytes a px
    assert image.decode(flat, max_pixels=1_400_000).shape == (1_000, 1_000, 3)
    with pytest.raises(image.DecodeError, match="several scans") as caught:
        image.decode(flat, max_pixels=1_000_000)
    assert caught.value.kind == "too_many_pixels"
    at_once = drawn("RGB", (1_000, 1_000), format="JPEG", subsampling=0)
    assert image.decode(at_once, max_pixels=1_000_000).shape == (1_000, 1_000, 3)


def test_a_picture_by_bands_is_the_picture_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    pixels = Image.fromarray(rng.integers(0, 256, (301, 203, 4), dtype=np.uint8), "RGBA")
    for format in ("PNG", "WEBP"):
        sink = io.BytesIO()
        pixels.save(sink, format, lossless=True)
        opened = image.Opened(sink.getvalue())
        whole, shrunk = opened.decode().picture, opened.decode(60, quick=True).picture
        monkeypatch.setattr("mmdata.media.decoding._BAND_PX", 203 * 7)
        assert np.array_equal(opened.decode().picture, whole)
        assert np.array_equal(opened.decode(60, quick=True).picture, shrunk)
        # Whole numbers: 203 // 60 = 3; each px the mean of a 3x3 box.
        assert shrunk.shape == (101, 68, 3)
        boxes = whole[:300, :201].reshape(100, 3, 67, 3, 3).mean(axis=(1, 3))
        assert np.abs(shrunk[:100, :67] - boxes).max() <= 0.51
        monkeypatch.undo()


def test_a_room_holds_so_many_bytes_and_keeps_the_order() -> None:
    room, inside, most, order = Room(100), [0], [0], []
    lock = threading.Lock()

    def work(number: int, size: int) -> None:
        with room.held(size):
            with lock:
                order.append(number)
                inside[0] += min(size, 100)
                most[0] = max(most[0], inside[0])
            time.sleep(0.01)
            with lock:
                inside[0] -= min(size, 100)

    threads = [threading.Thread(target=work, args=(n, size)) for n, size in enumerate([60, 60, 500, 30, 30, 30])]
    for thread in threads:
        thread.start()
        time.sleep(0.002)
    for thread in threads:
        thread.join(5)
    assert most[0] == 100
    assert order[:3] == [0, 1, 2]
    assert sorted(order) == list(range(6))
