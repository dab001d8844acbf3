"""ICC → sRGB: profiles are written here by hand, and what they mean is worked out from the published primaries."""

from __future__ import annotations

import io
import struct
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageCms

from mmdata.media import colour, image
from mmdata.prepare import prepare
from mmdata.settings import FetchOptions

D50 = (0.9642, 1.0, 0.8249)
# Primaries' chromaticities and the white's: SMPTE EG 432-1 (Display P3), Adobe RGB (1998) section 4.2, IEC 61966-2-1.
P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
ADOBE = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
D65 = (0.3127, 0.3290)
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])

Matrix = npt.NDArray[np.float64]


def _xyz(point: tuple[float, float]) -> Matrix:
    x, y = point
    return np.array([x / y, 1.0, (1 - x - y) / y])


def to_xyz_d50(primaries: tuple[tuple[float, float], ...]) -> Matrix:
    """Linear RGB → XYZ under D50: primaries scaled to the white, then Bradford's adaptation (Lindbloom)."""
    columns = np.stack([_xyz(p) for p in primaries], axis=1)
    white = _xyz(D65)
    rgb = columns * np.linalg.solve(columns, white)
    gains = (BRADFORD @ np.array(D50)) / (BRADFORD @ white)
    return np.linalg.inv(BRADFORD) @ np.diag(gains) @ BRADFORD @ rgb


def _s15(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def profile(space: bytes, gamma: float, primaries: tuple[tuple[float, float], ...] = SRGB) -> bytes:
    """A display profile of version 2: one gamma, and for RGB the three primaries (ICC.1:2001-04)."""
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags = {b"wtpt": b"XYZ \0\0\0\0" + b"".join(map(_s15, D50))}
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), to_xyz_d50(primaries).T, strict=True):
            tags[name] = b"XYZ \0\0\0\0" + b"".join(map(_s15, column))
        tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    at, table, body = 132 + 12 * len(tags), b"", b""
    for name, value in tags.items():
        table += name + struct.pack(">II", at + len(body), len(value))
        body += value
    head = struct.pack(">I4sI4s4s4s", at + len(body), b"none", 0x02400000, b"mntr", space, b"XYZ ")
    head = head.ljust(36, b"\0") + b"acsp" + b"\0" * 28 + b"".join(map(_s15, D50))
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def srgb(linear: Matrix) -> Matrix:
    clipped = np.clip(linear, 0, 1)
    return 255 * np.where(clipped <= 0.0031308, 12.92 * clipped, 1.055 * clipped ** (1 / 2.4) - 0.055)


def by_hand(pixel: tuple[int, int, int], primaries: tuple[tuple[float, float], ...], gamma: float) -> Matrix:
    linear = (np.array(pixel) / 255) ** gamma
    return srgb(np.linalg.inv(to_xyz_d50(SRGB)) @ to_xyz_d50(primaries) @ linear)


def saved(pixels: Any, mode: str | None = None, **options: Any) -> bytes:
    sink = io.BytesIO()
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.array(pixels, np.uint8), mode)
    picture.save(sink, **options)
    return sink.getvalue()


def test_the_arithmetic_agrees_with_published_matrices() -> None:
    # Adobe RGB (1998), section 4.3.6.1: XYZ of the primaries under D50.
    expected = [[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]]
    assert np.abs(to_xyz_d50(ADOBE) - expected).max() < 2e-4


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "AVIF", "HEIF"])
@pytest.mark.parametrize(("primaries", "gamma"), [(P3, 2.2), (ADOBE, 2.19921875)])
def test_wide_colours_become_srgb(kind: str, primaries: Any, gamma: float) -> None:
    import pillow_heif

    pillow_heif.register_heif_opener()
    lossless = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}
    lossless["HEIF"] = {"quality": -1, "chroma": "444"}
    for pixel in ((200, 120, 60), (60, 150, 90), (128, 128, 128), (255, 0, 0), (0, 255, 0)):
        data = saved(
            np.full((16, 16, 3), pixel),
            format=kind,
            icc_profile=profile(b"RGB ", gamma, primaries),
            **lossless.get(kind, {}),
        )
        found = image.decode(data)[8, 8]
        tolerance = 3 if kind in ("AVIF", "HEIF") else 1.5  # these store YCbCr
        assert np.abs(found - by_hand(pixel, primaries, gamma)).max() <= tolerance
        assert not image.probe(data).is_plain


def test_a_jpeg_is_converted_as_little_cms_converts_it() -> None:
    rng = np.random.default_rng(2)
    small = Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)).resize(
        (900, 600), Image.Resampling.BICUBIC
    )
    mine = profile(b"RGB ", 1.8, ADOBE)
    data = saved(small, format="JPEG", quality=95, icc_profile=mine)
    with Image.open(io.BytesIO(data)) as oracle:
        expected = ImageCms.profileToProfile(
            oracle, ImageCms.ImageCmsProfile(io.BytesIO(mine)), ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    difference = np.abs(image.decode(data).astype(int) - np.asarray(expected))
    assert difference.max() <= 4  # two builds of libjpeg-turbo
    assert difference.mean() < 0.1
    # Stored, it is converted after it was shrunk; that moves little.
    fast, exact = (
        image.decode(prepare(data, FetchOptions(decode=d, encode_format="png")).data or b"").astype(int)
        for d in ("fast", "exact")
    )
    assert np.abs(fast - exact).mean() < 1
    plain = image.decode(saved(small, format="JPEG", quality=95))
    assert np.abs(plain.astype(int) - np.asarray(expected)).mean() > 10  # the profile meant something


def test_grey_by_its_own_gamma() -> None:
    values = [0, 40, 128, 220, 255]
    data = saved([values], format="PNG", icc_profile=profile(b"GRAY", 1.8))
    expected = srgb((np.array(values) / 255) ** 1.8)
    found = image.decode(data)[0]
    assert np.abs(found[:, 0] - expected).max() <= 1
    assert (found[:, 0] == found[:, 1]).all()


def test_srgb_in_its_many_spellings_is_left_alone() -> None:
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert colour.transform_of(own, "RGB") is None
    assert image.probe(saved(np.full((9, 9, 3), 7), format="JPEG", icc_profile=own)).is_plain


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"no profile at all",
        profile(b"RGB ", 1.8)[:200],
        profile(b"RGB ", 1.8).replace(b"rTRC", b"xTRC"),
        profile(b"GRAY", 1.8),  # of another kind of picture
        profile(b"RGB ", 1.8)[:16] + b"CMYK" + profile(b"RGB ", 1.8)[20:],
    ],
)
def test_a_broken_profile_costs_the_conversion_alone(broken: bytes) -> None:
    pixels = np.full((8, 8, 3), (200, 100, 50), np.uint8)
    assert image.decode(saved(pixels, format="PNG", icc_profile=broken))[4, 4].tolist() == [200, 100, 50]


def test_cmyk_by_its_profile() -> None:
    # A profile of inks: a table of 2x2x2x2 corners in Lab, paper white and everything else black.
    corners = bytes(v for i in range(16) for v in ((255, 128, 128) if i == 0 else (0, 128, 128)))
    curves = bytes(range(256)) * 4
    identity = b"".join(map(_s15, (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    table = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + identity + curves + corners + bytes(range(256)) * 3
    head = struct.pack(">I4sI4s4s4s", 144 + len(table), b"none", 0x02400000, b"prtr", b"CMYK", b"Lab ")
    head = head.ljust(36, b"\0") + b"acsp" + b"\0" * 28 + b"".join(map(_s15, D50))
    inks = head.ljust(128, b"\0") + struct.pack(">I4sII", 1, b"A2B0", 144, len(table)) + table
    for ink, expected in (((0, 0, 0, 0), 255), ((255, 0, 0, 0), 0), ((0, 0, 0, 255), 0)):
        data = saved(np.full((16, 16, 4), ink), "CMYK", format="JPEG", quality=100, icc_profile=inks)
        assert np.abs(image.decode(data)[8, 8].astype(int) - expected).max() <= 3
    # Without it cyan is cyan.
    cyan = image.decode(saved(np.full((16, 16, 4), (255, 0, 0, 0)), "CMYK", format="JPEG", quality=100))
    assert np.abs(cyan[8, 8].astype(int) - (0, 255, 255)).max() <= 3


def test_what_is_kept_of_profiles_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(colour, "_KEPT", 3)
    for step in range(5):
        assert colour.transform_of(profile(b"RGB ", 1.1 + step / 64), "RGB") is not None
    assert len(colour._kept) == 3


def test_of_sixteen_bits_the_high_byte_is_kept_as_opencv_and_pillow_keep_it() -> None:
    values = np.random.default_rng(0).integers(0, 65536, (20, 30, 3), dtype=np.uint16)
    data = cv2.imencode(".png", values)[1].tobytes()
    found = image.decode(data)
    assert np.array_equal(found, values[:, :, ::-1] >> 8)
    assert np.array_equal(found[:, :, ::-1], cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR))
    with Image.open(io.BytesIO(data)) as oracle:
        assert np.array_equal(found, np.asarray(oracle.convert("RGB")))
