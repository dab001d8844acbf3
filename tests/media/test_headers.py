"""Headers are read without decoding: Pillow's own reading of the same bytes is the oracle, for damaged ones too."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pillow_jxl  # noqa: F401  importing it registers it
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmdata.media import image, jpeg_header, jxl_header, webp_header
from mmdata.media.picture import DecodeError


def saved(picture: Image.Image, **options: Any) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, **options)
    return sink.getvalue()


def scene(width: int = 90, height: int = 60, mode: str = "RGB") -> Image.Image:
    return Image.linear_gradient("L").resize((width, height)).convert(mode)


def with_exif(orientation: int, *, big_endian: bool = False) -> Image.Exif:
    exif = Image.Exif()
    exif[0x010F] = "a maker"
    exif[0x0112] = orientation
    if big_endian:
        exif.endian = ">"
    return exif


XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'
JPEGS: dict[str, bytes] = {
    "baseline": saved(scene(), format="JPEG"),
    "progressive": saved(scene(), format="JPEG", progressive=True),
    "4:4:4": saved(scene(), format="JPEG", subsampling=0),
    "4:2:2": saved(scene(), format="JPEG", subsampling=1),
    "grey": saved(scene(mode="L"), format="JPEG"),
    "cmyk": saved(scene(mode="CMYK"), format="JPEG"),
    "restarts": saved(scene(), format="JPEG", restart_marker_rows=1),
    "profile": saved(scene(), format="JPEG", icc_profile=bytes(range(256)) * 700),  # three segments
    "comment": saved(scene(), format="JPEG", comment=b"\xff\xda\xff\xc0" * 50),
    "xmp": saved(scene(), format="JPEG", xmp=XMP),
    **{f"exif {n}": saved(scene(), format="JPEG", exif=with_exif(n)) for n in range(10)},
    "exif MM": saved(scene(), format="JPEG", exif=with_exif(6, big_endian=True)),
    "exif over xmp": saved(scene(), format="JPEG", exif=with_exif(3), xmp=XMP),
}


@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_says_what_pillow_reads(name: str) -> None:
    data = JPEGS[name]
    found = jpeg_header.read(data)
    with Image.open(io.BytesIO(data)) as oracle:
        turned = oracle.getexif().get(0x0112, 1)
        assert (found.width, found.height) == oracle.size
        assert found.components == len(oracle.getbands())
        assert found.icc == oracle.info.get("icc_profile")
        assert found.orientation == (turned if turned in range(1, 9) else 1)
        assert found.is_buffered == ("progressive" in oracle.info)


def test_samples_by_hand() -> None:
    assert jpeg_header.read(JPEGS["baseline"]).samples == 1.5  # 4:2:0: a quarter of each chroma
    assert jpeg_header.read(JPEGS["4:2:2"]).samples == 2
    assert jpeg_header.read(JPEGS["4:4:4"]).samples == 3
    assert jpeg_header.read(JPEGS["cmyk"]).samples == 4
    assert jpeg_header.read(JPEGS["grey"]).samples == 1


def test_a_scan_of_one_component_means_several_scans() -> None:
    data = bytearray(JPEGS["baseline"])
    at = data.index(b"\xff\xda")
    data[at + 4] = 1
    assert jpeg_header.read(bytes(data)).is_buffered


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xd8\xff",
        b"\xff\xd8" + b"\xff" * 100_000 + b"\0",
        b"\xff\xd8" + b"\xff\0" * 100_000,
        b"\xff\xd8" + b"\xff\xe1\0\2" * 5_000,
        b"\xff\xd8" + b"\xff\xd0" * 5_000,
        b"\xff\xd8\xff\xd9",
        b"\xff\xd8\xff\xe0\0\1",
        b"\xff\xd8\xff\xda\0\3\1",
        JPEGS["baseline"][: JPEGS["baseline"].index(b"\xff\xda") + 3],
    ],
)
def test_what_is_no_header_is_a_decode_error(data: bytes) -> None:
    with pytest.raises(DecodeError) as caught:
        jpeg_header.read(data)
    assert caught.value.kind == "decode"


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(JPEGS)), st.data())
def test_a_damaged_header_gives_pillows_size_or_an_error(name: str, data: st.DataObject) -> None:
    whole = bytearray(JPEGS[name])
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(2, 700 if len(whole) > 700 else len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = image.decode(bytes(whole), max_pixels=10**6)
    except DecodeError:
        return
    # What is decoded is what libjpeg decodes: Pillow, on the same library, sees the same size.
    with Image.open(io.BytesIO(bytes(whole)), formats=["JPEG", "MPO"]) as oracle:
        assert sorted(found.shape[:2]) == sorted(oracle.size)


def test_a_profile_with_a_missing_part_is_none() -> None:
    data = JPEGS["profile"]
    at = data.index(b"ICC_PROFILE\0") - 4
    end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    assert jpeg_header.read(data[:at] + data[end:]).icc is None


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("extended", [False, True])
def test_a_webp_says_what_pillow_reads(lossless: bool, mode: str, extended: bool) -> None:
    more = {"icc_profile": b"p" * 131, "exif": with_exif(6).tobytes(), "xmp": XMP} if extended else {}
    picture = scene(mode=mode)
    if mode == "RGBA":
        picture.putalpha(scene().convert("L"))
    data = saved(picture, format="WEBP", lossless=lossless, **more)
    found = webp_header.read(data)
    with Image.open(io.BytesIO(data)) as oracle:
        assert (found.width, found.height) == oracle.size
        assert found.has_alpha == (oracle.mode == "RGBA")
        assert found.icc == oracle.info.get("icc_profile")
        assert found.is_animated is False
        assert image.probe(data).orientation == oracle.getexif().get(0x0112, 1)
    frames = saved(scene(), format="WEBP", save_all=True, append_images=[scene().transpose(1)])
    assert webp_header.read(frames).is_animated


def test_a_webp_without_a_picture() -> None:
    for data in (b"RIFF\x04\0\0\0WEBP", b"RIFF\x10\0\0\0WEBPVP8 \0\0\0\x40", b"RIFF\xff\0\0\0WEBP" + b"\0" * 100_000):
        with pytest.raises(DecodeError):
            webp_header.read(data)


@pytest.mark.parametrize("container", [False, True])
@pytest.mark.parametrize(
    "size", [(8, 8), (64, 200), (13, 700), (640, 480), (160, 90), (300, 300), (200, 100), (9000, 3)]
)
def test_a_jpeg_xl_says_its_size(size: tuple[int, int], container: bool) -> None:
    data = saved(scene(*size), format="JXL", effort=1, use_container=container)
    assert jxl_header.size(data) == size


def test_a_png_is_not_decoded_to_look_for_exif_behind_its_pixels() -> None:
    data = saved(scene(), format="PNG")
    body = with_exif(6).tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(body)) + b"eXIf" + body + struct.pack(">I", zlib.crc32(b"eXIf" + body))
    late = data[:-12] + chunk + data[-12:]
    assert image.probe(late).orientation == 6
    assert (image.probe(late).width, image.probe(late).height) == (60, 90)
    assert image.probe(late[:60] + b"\0" * 40 + late[100:]).format == "png"  # pixels that do not decode


def test_a_png_with_a_wrong_checksum_is_no_picture_though_asked_twice() -> None:
    rng = np.random.default_rng(1)
    data = bytearray(saved(Image.fromarray(rng.integers(0, 256, (200, 200, 3), dtype=np.uint8)), format="PNG"))
    data[len(data) // 2] ^= 1
    opened = image.Opened(bytes(data))
    for _ in range(2):
        with pytest.raises(DecodeError, match="broken data stream"):
            opened.decode()
