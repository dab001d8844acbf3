"""Kinds of media by their first bytes. Headers are written after the formats' own specifications."""

from __future__ import annotations

import importlib.util
import io
import wave
from typing import Any

import numpy as np
import pillow_heif
import pillow_jxl  # noqa: F401  importing it registers it
import pytest
from PIL import Image

from mmdata.media import formats, image


def wav() -> bytes:
    sink = io.BytesIO()
    with wave.open(sink, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(b"\0" * 1600)
    return sink.getvalue()


def ebml(doctype: bytes) -> bytes:
    return b"\x1a\x45\xdf\xa3\x93\x42\x82" + bytes([0x80 | len(doctype)]) + doctype + b"\0" * 40


ID3 = b"ID3\x04\0\0\0\0\0\x05" + b"\0" * 5
SOUND_AND_FILM: list[tuple[bytes, tuple[str, str]]] = [
    (wav(), ("audio", "wav")),
    (b"fLaC\0\0\0\x22" + b"\0" * 40, ("audio", "flac")),
    (b"\xff\xfb\x90\x64" + b"\0" * 413, ("audio", "mp3")),  # MPEG-1 layer III, 128 kbit/s, 44.1 kHz
    (ID3 + b"\xff\xfb\x90\x64", ("audio", "mp3")),
    (ID3 + b"fLaC", ("audio", "flac")),
    (ID3 + b"\xff\xf1\x50\x80", ("audio", "aac")),
    (b"\xff\xf1\x50\x80\x02\x1f\xfc", ("audio", "aac")),
    (b"OggS\0\x02" + b"\0" * 20 + b"\x01\x1e\x01vorbis", ("audio", "ogg")),
    (b"OggS\0\x02" + b"\0" * 20 + b"\x01\x13OpusHead", ("audio", "opus")),
    (b"OggS\0\x02" + b"\0" * 20 + b"\x01\x2a\x80theora", ("video", "ogv")),
    (b"FORM\0\0\0\x40AIFFCOMM", ("audio", "aiff")),
    (b"#!AMR\n", ("audio", "amr")),
    (b"\0\0\0\x20ftypM4A \0\0\0\0M4A mp42isom\0\0\0\0", ("audio", "m4a")),
    (b"\0\0\0\x20ftypisom\0\0\x02\0isomiso2avc1mp41", ("video", "mp4")),
    (b"\0\0\0\x14ftypqt  \0\0\x02\0qt  ", ("video", "mov")),
    (b"\0\0\0\x18ftyp3gp5\0\0\0\0isom3gp5", ("video", "3gp")),
    (ebml(b"webm"), ("video", "webm")),
    (ebml(b"matroska"), ("video", "mkv")),
    (b"RIFF\0\0\x10\0AVI LIST", ("video", "avi")),
    ((b"\x47\x40\0\x10" + b"\xff" * 184) * 3, ("video", "ts")),
    (b"\0\0\x01\xba\x44\0\x04", ("video", "mpg")),
    (b"FLV\x01\x05\0\0\0\x09", ("video", "flv")),
]


@pytest.mark.parametrize(("data", "kind"), SOUND_AND_FILM)
def test_sound_and_film_are_told_by_their_bytes(data: bytes, kind: tuple[str, str]) -> None:
    assert formats.media_kind(data) == kind
    assert formats.sniff(data) is None
    with pytest.raises(image.DecodeError, match="no image") as caught:
        image.probe(data)
    assert caught.value.kind == "not_media"


@pytest.mark.parametrize(
    "data", [b"", b"<html>", b"ID", b"\xff\xff\xff\xff", b"\xff\xe0\xf0\0", b"RIFF\0\0\0\0WEBP", b"GIF89a", b"%PDF-1.4"]
)
def test_what_is_neither(data: bytes) -> None:
    assert formats.media_kind(data) is None


def saved(picture: Image.Image, **options: Any) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, **options)
    return sink.getvalue()


@pytest.mark.parametrize(("kind", "format"), [("heic", "HEIF"), ("jpegxl", "JXL")])
def test_formats_of_extras_decode_as_their_plugin_reads_them(kind: str, format: str) -> None:
    pillow_heif.register_heif_opener()
    rng = np.random.default_rng(5)
    scene = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((120, 80), Image.Resampling.BICUBIC)
    data = saved(scene, format=format, quality=90)
    info, found = image.probe(data), image.decode(data)
    assert (info.format, info.width, info.height) == (kind, 120, 80)
    with Image.open(io.BytesIO(data)) as oracle:
        assert np.array_equal(found, np.asarray(oracle.convert("RGB")))
    assert np.abs(found.astype(int) - np.asarray(scene)).mean() < 6
    for share in (0.3, 0.9):
        with pytest.raises(image.DecodeError) as caught:
            image.decode(data[: int(len(data) * share)])
        assert caught.value.kind == "decode"


def test_heic_is_upright() -> None:
    pillow_heif.register_heif_opener()
    exif = Image.Exif()
    exif[0x0112] = 6
    scene = Image.linear_gradient("L").resize((120, 80)).convert("RGB")
    data = saved(scene, format="HEIF", quality=90, exif=exif.tobytes())
    assert image.decode(data).shape == (120, 80, 3)
    assert (image.probe(data).width, image.probe(data).height) == (80, 120)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", r"mmdata\[heic\]"),
        (b"\xff\x0a" + b"\0" * 30, r"mmdata\[jxl\]"),
    ],
)
def test_a_missing_extra_is_named(data: bytes, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec

    def find_spec(name: str) -> Any:
        return None if name.startswith("pillow_") else found(name)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    with pytest.raises(image.DecodeError, match=words) as caught:
        image.probe(data)
    assert caught.value.kind == "decode"


def test_a_jpeg_xl_bomb_is_refused_before_its_plugin_decodes_it() -> None:
    # SizeHeader: not by eights, height and width 2^30 px each in 30 bits.
    bits = (3 << 1) | ((2**30 - 1) << 3) | (0 << 33) | (3 << 36) | ((2**30 - 1) << 38)
    data = b"\xff\x0a" + bits.to_bytes(10, "little") + b"\0" * 30
    with pytest.raises(image.DecodeError, match="1073741824x1073741824") as caught:
        image.probe(data)
    assert caught.value.kind == "too_many_pixels"
