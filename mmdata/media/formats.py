"""What kind of media some bytes are, told by their first ones alone: never by a name, nor by what a server says.

In: bytes, the first 1,024 are enough. Out: the name of a picture's format, or the role and the file extension of
sound and film, or None; `describe` says in a few words what bytes are that are none of these. Nothing fails.
Sources: the formats' own specifications (RIFF, ISO 14496-12, Matroska, Ogg RFC 3533, ISO 11172-3, ISO 13818-1).
"""

from __future__ import annotations

from typing import Literal

__all__ = ["EXTRAS", "describe", "extension", "media_kind", "sniff"]

_EXTENSIONS = {"jpeg": "jpg", "jpeg2000": "jp2", "jpegxl": "jxl"}  # else the format's own name
# Formats that a package of an extra decodes: extra and module.
EXTRAS = {"heic": ("heic", "pillow_heif"), "jpegxl": ("jxl", "pillow_jxl")}
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

Role = Literal["audio", "video"]
_AUDIO_BRANDS = (b"M4A ", b"M4B ", b"M4P ")
_STARTS: tuple[tuple[bytes, tuple[Role, str]], ...] = (
    (b"fLaC", ("audio", "flac")),
    (b"#!AMR", ("audio", "amr")),
    (b"FLV\x01", ("video", "flv")),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", ("video", "wmv")),
    (b"\0\0\x01\xba", ("video", "mpg")),
    (b"\0\0\x01\xb3", ("video", "mpg")),
)


def sniff(data: bytes) -> str | None:
    """A picture's format: jpeg png webp gif bmp tiff avif jpeg2000, and by an extra heic jpegxl; None for all else."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if data[4:8] == b"ftyp":
        return _iso_picture(data)
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "tiff"
    if data.startswith((b"\0\0\0\x0cjP  \r\n", b"\xff\x4f\xff\x51")):
        return "jpeg2000"
    if data.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")):
        return "jpegxl"
    if data.startswith(b"BM") and len(data) > 26:
        return "bmp"
    return None


def _iso_picture(data: bytes) -> str | None:
    brands = {data[8:12], *(data[at : at + 4] for at in range(16, min(int.from_bytes(data[:4], "big"), 64), 4))}
    if brands & {b"avif", b"avis"}:
        return "avif"
    return "heic" if brands & set(_HEIC_BRANDS) and data[8:12] not in _AUDIO_BRANDS else None


def extension(kind: str) -> str:
    """The file extension, without a dot, of a picture's format."""
    return _EXTENSIONS.get(kind, kind)


def media_kind(data: bytes) -> tuple[Role, str] | None:
    """Role and extension of sound or film; None for all else, pictures too.

    A container that may hold both (mp4, mov, webm, mkv, 3gp) has the role video: its tracks are not looked at.
    """
    for start, kind in _STARTS:
        if data.startswith(start):
            return kind
    if data[:4] in (b"RIFF", b"RF64") and data[8:12] in (b"WAVE", b"AVI "):
        return ("audio", "wav") if data[8:12] == b"WAVE" else ("video", "avi")
    if data[:4] == b"FORM" and data[8:12] in (b"AIFF", b"AIFC"):
        return "audio", "aiff"
    if data[4:8] == b"ftyp" and sniff(data) is None:
        return _iso_media(data[8:12])
    if data.startswith(b"OggS"):
        return _ogg(data[:256])
    if data.startswith(b"\x1a\x45\xdf\xa3"):
        return "video", "webm" if b"webm" in data[:64] else "mkv"
    if data[:1] == b"\x47" and data[188:189] == b"\x47" and data[376:377] in (b"\x47", b""):
        return "video", "ts"
    return _mpeg_audio(data)


def _iso_media(brand: bytes) -> tuple[Role, str]:
    if brand in _AUDIO_BRANDS:
        return "audio", "m4a"
    return "video", "mov" if brand == b"qt  " else "3gp" if brand.startswith((b"3gp", b"3g2")) else "mp4"


def _ogg(page: bytes) -> tuple[Role, str]:
    if b"theora" in page:
        return "video", "ogv"
    return "audio", "opus" if b"OpusHead" in page else "ogg"


def _mpeg_audio(data: bytes) -> tuple[Role, str] | None:
    """MP3 (layers 1 to 3) or AAC in ADTS frames, behind an ID3v2 tag or not."""
    if data.startswith(b"ID3"):
        size = sum((byte & 0x7F) << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0), strict=False))
        behind = data[10 + size : 14 + size]
        if behind.startswith(b"fLaC"):
            return "audio", "flac"
        return "audio", "aac" if len(behind) > 1 and behind[0] == 0xFF and behind[1] & 0xF6 == 0xF0 else "mp3"
    if len(data) < 4 or data[0] != 0xFF:
        return None
    if data[1] & 0xF6 == 0xF0 and (data[2] >> 2) & 15 < 13:
        return "audio", "aac"
    is_frame = data[1] & 0xE0 == 0xE0 and (data[1] >> 3) & 3 != 1 and (data[1] >> 1) & 3 != 0
    return ("audio", "mp3") if is_frame and data[2] >> 4 not in (0, 15) and (data[2] >> 2) & 3 != 3 else None


def describe(data: bytes) -> str:
    """What bytes are that are no picture: `empty`, `svg`, `html`, or what they start with."""
    head = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not data:
        return "empty"
    if b"<svg" in head:
        return "svg: a drawing without pixels"
    if head.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "html"
    if head.startswith((b"<", b"{", b"[")):
        return "text, no image"
    if (kind := media_kind(data)) is not None:
        return f"{kind[0]} ({kind[1]}), no image"
    return f"no known image format, starts with {data[:8].hex()}"
