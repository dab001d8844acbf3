"""Pictures in, arrays out: Pillow's own reading, torchvision and hand-made arrays are the oracles."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zlib
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps
from PIL.TiffImagePlugin import IFDRational

from mmdata.media import image

# pytest sets its own filters, so that Pillow's remarks on damaged EXIF show here; mmdata filters them.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


def saved(picture: Image.Image, **options: Any) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, **options)
    return sink.getvalue()


def scene(width: int = 120, height: int = 80, mode: str = "RGB") -> Image.Image:
    """Smooth colours with a dark corner, so that turning, mirroring and cutting all show."""
    rng = np.random.default_rng(7)
    small = Image.fromarray(rng.integers(40, 256, (4, 6, 3), dtype=np.uint8))
    full = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).copy()
    full[: height // 4, : width // 4] = (10, 20, 200)
    return Image.fromarray(full).convert(mode)


def oriented(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


FORMATS = {
    "jpeg": {"format": "JPEG", "quality": 90},
    "png": {"format": "PNG"},
    "webp": {"format": "WEBP", "lossless": True},
    "gif": {"format": "GIF"},
    "bmp": {"format": "BMP"},
    "tiff": {"format": "TIFF"},
    "avif": {"format": "AVIF"},
    "jpeg2000": {"format": "JPEG2000"},
}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_told_by_its_bytes_and_decodes_as_pillow_reads_it(kind: str) -> None:
    data = saved(scene(), **FORMATS[kind])
    assert image.probe(data) == image.ImageInfo(kind, 120, 80, 1, is_plain=kind in ("jpeg", "png", "webp"))
    found = image.decode(data)
    assert found.dtype == np.uint8
    assert found.shape == (80, 120, 3)
    with Image.open(io.BytesIO(data)) as oracle:
        difference = np.abs(found.astype(int) - np.asarray(oracle.convert("RGB")).astype(int))
    assert difference.max() <= (2 if kind == "jpeg" else 0)  # two builds of libjpeg-turbo may round differently


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    data = saved(scene(), **FORMATS[kind], exif=oriented(orientation))
    info, found = image.probe(data), image.decode(data)
    with Image.open(io.BytesIO(data)) as oracle:
        upright = np.asarray(ImageOps.exif_transpose(oracle).convert("RGB")).astype(int)
    assert found.shape == upright.shape == (info.height, info.width, 3)
    assert info.orientation == orientation
    assert np.abs(found.astype(int) - upright).max() <= 2


def test_an_orientation_by_hand() -> None:
    # Stored 3 wide and 2 high; orientation 6 says that the first row is the right-hand side of the upright picture.
    stored = np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 10
    upright = image.decode(saved(Image.fromarray(stored), format="PNG", exif=oriented(6)))
    expected = [[stored[1, 0], stored[0, 0]], [stored[1, 1], stored[0, 1]], [stored[1, 2], stored[0, 2]]]
    assert np.array_equal(upright, np.array(expected))


def test_broken_exif_costs_the_metadata_only() -> None:
    data = saved(scene(), format="JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert image.probe(data).orientation == 1
    assert image.decode(data).shape == (80, 120, 3)
    assert image.exif_json(data) is None


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_transparency_lies_on_white(kind: str) -> None:
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0] = [(200, 100, 0, 255), (200, 100, 0, 0), (200, 100, 0, 128)]
    found = image.decode(saved(Image.fromarray(pixels, "RGBA"), format=kind.upper(), lossless=True))
    # 200*128/255 + 255*127/255 = 227.4, 100*128/255 + 127 = 177.2, 0 + 127 = 127
    assert found.tolist() == [[[200, 100, 0], [255, 255, 255], [227, 177, 127]]]


def test_grey_with_alpha_and_palette_with_transparency_lie_on_white() -> None:
    grey = np.array([[[50, 255], [50, 0]]], np.uint8)
    assert image.decode(saved(Image.fromarray(grey, "LA"), format="PNG")).tolist() == [[[50] * 3, [255] * 3]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    for kind in ("PNG", "GIF"):
        found = image.decode(saved(palette, format=kind, transparency=1))
        assert found.tolist() == [[[255, 0, 0], [255, 255, 255]]]


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG written by hand: `rows` holds the samples of every row after its filter byte."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def test_sixteen_bit_png_is_scaled_not_saturated() -> None:
    values = [0, 257 * 100, 257 * 200, 65535]
    grey = png(4, 1, 16, 0, b"\0" + struct.pack(">4H", *values))
    assert image.decode(grey).tolist() == [[[v // 257] * 3 for v in values]]
    colour = png(1, 1, 16, 2, b"\0" + struct.pack(">3H", *values[1:]))
    assert image.decode(colour).tolist() == [[[100, 200, 255]]]
    with_alpha = png(2, 1, 16, 6, b"\0" + struct.pack(">8H", *values[1:], 65535, *values[1:], 0))
    assert image.decode(with_alpha).tolist() == [[[100, 200, 255], [255, 255, 255]]]
    transparent = png(2, 1, 16, 0, b"\0" + struct.pack(">2H", 257, 514), (b"tRNS", struct.pack(">H", 514)))
    assert image.decode(transparent).tolist() == [[[1, 1, 1], [255, 255, 255]]]


def test_cmyk_jpeg_is_read_as_pillow_reads_it_with_and_without_adobes_marker() -> None:
    data = saved(scene(mode="CMYK"), format="JPEG", quality=95)
    assert b"Adobe" in data
    red = saved(Image.new("RGB", (16, 16), (220, 30, 40)).convert("CMYK"), format="JPEG", quality=95)
    assert np.abs(image.decode(red)[8, 8].astype(int) - (220, 30, 40)).max() <= 4
    at = data.index(b"\xff\xee")
    plain = data[:at] + data[at + 2 + struct.unpack(">H", data[at + 2 : at + 4])[0] :]
    for variant in (data, plain):
        with Image.open(io.BytesIO(variant)) as oracle:
            assert np.array_equal(image.decode(variant), np.asarray(oracle.convert("RGB")))


def test_grey_jpeg_has_three_equal_channels() -> None:
    found = image.decode(saved(scene(mode="L"), format="JPEG"))
    assert found.shape == (80, 120, 3)
    assert np.array_equal(found[..., 0], found[..., 1])
    assert np.array_equal(found[..., 0], found[..., 2])


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        data = saved(frames[0], format=kind, save_all=True, append_images=frames[1:], lossless=True)
        assert image.decode(data)[4, 4].tolist() == [255, 0, 0]


CUT = {
    **FORMATS,
    "progressive jpeg": {"format": "JPEG", "progressive": True},
    "interlaced png": {"format": "PNG"},
    "lzw tiff": {"format": "TIFF", "compression": "tiff_lzw"},
}


@pytest.mark.parametrize("kind", CUT)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_truncated_picture_raises(kind: str, share: float) -> None:
    rng = np.random.default_rng(3)
    noisy = Image.fromarray(rng.integers(0, 256, (200, 200, 3), dtype=np.uint8))
    data = saved(noisy, **CUT[kind])
    with pytest.raises(image.DecodeError) as caught:
        image.decode(data[: int(len(data) * share)])
    assert caught.value.kind == "decode"


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_truncated_jpeg_with_an_end_marker_raises_too(mode: str, progressive: bool) -> None:
    # Proxies close cut files so; Pillow alone fills the rest with grey and says nothing.
    data = saved(scene(400, 300, mode), format="JPEG", progressive=progressive)
    with pytest.raises(image.DecodeError) as caught:
        image.decode(data[: len(data) // 2] + b"\xff\xd9")
    assert caught.value.kind == "decode"


def test_a_truncated_picture_raises_though_another_library_allowed_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = saved(scene(400, 300), format="PNG")
    with pytest.raises(image.DecodeError, match="truncated"):
        image.decode(data[: len(data) // 2])


def test_stray_bytes_that_cost_no_pixel_are_forgiven() -> None:
    data = saved(scene(), format="JPEG", progressive=True)
    for stray in (data + b"trailing" * 20, data[:-2] + b"abc" + data[-2:]):
        assert np.array_equal(image.decode(stray), image.decode(data))


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "html"),
        (b"  <svg xmlns='http://www.w3.org/2000/svg'/>", "svg"),
        (b'<?xml version="1.0"?>\n<svg/>', "svg"),
        (b'{"error": 1}', "text"),
        (b"%PDF-1.7 ...", "no known image format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "no known image format"),
        (b"\0\0\0\x18ftypisom" + b"\0" * 30, r"video \(mp4\), no image"),
    ],
)
def test_what_is_no_image_is_not_media(data: bytes, detail: str) -> None:
    for read in (image.decode, image.probe):
        with pytest.raises(image.DecodeError, match=detail) as caught:
            read(data)
        assert caught.value.kind == "not_media"


def test_what_is_wrong_with_a_picture_is_said_in_the_same_words_each_time() -> None:
    """Pillow's own words name the place in memory where the bytes lie, and that would stand in `status_detail`."""
    details = set()
    for _ in range(2):
        data = b"\x89PNG\r\n\x1a\n" + bytes(range(200))
        with pytest.raises(image.DecodeError) as caught:
            image.decode(data)
        assert caught.value.kind == "decode"
        details.add(str(caught.value))
    assert details == {"png header: cannot be read"}


def test_bombs_are_refused_by_their_header() -> None:
    bomb = png(30_000, 30_000, 8, 2, b"")
    small = png(100, 100, 8, 2, b"")
    jpeg = bytearray(saved(scene(16, 16), format="JPEG"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 65_000, 65_000)
    for data, limit in ((bomb, None), (small, 9_999), (bytes(jpeg), None)):
        with pytest.raises(image.DecodeError) as caught:
            image.decode(data, max_pixels=limit)
        assert caught.value.kind == "too_many_pixels"


def test_a_jpeg_with_two_frame_headers_cannot_hide_its_size() -> None:
    data = saved(scene(16, 16), format="JPEG")
    at = data.index(b"\xff\xc0")
    header = bytearray(data[at : at + 2 + struct.unpack(">H", data[at + 2 : at + 4])[0]])
    header[5:9] = struct.pack(">HH", 60_000, 60_000)
    for both in (
        data[:at] + header + data[at:],
        data[:at] + data[at : at + len(header)] + header + data[at + len(header) :],
    ):
        with pytest.raises(image.DecodeError):
            image.decode(bytes(both))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), st.data())
def test_damaged_bytes_give_a_picture_or_a_decode_error(kind: str, data: st.DataObject) -> None:
    whole = bytearray(saved(scene(40, 30), **FORMATS[kind]))
    for _ in range(data.draw(st.integers(1, 6))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    error: image.DecodeError | None = None
    try:
        found = image.decode(bytes(whole), max_pixels=10**6)
    except image.DecodeError as caught:  # anything else fails the test
        error = caught
    if error is None:
        assert found.shape[2] == 3
        assert found.dtype == np.uint8
    else:
        assert error.kind in {"not_media", "decode", "too_many_pixels"}


def test_min_side_scales_jpeg_down_but_never_below_nor_up() -> None:
    data = saved(scene(800, 600), format="JPEG")
    # Scales are eighths: 3/8 of 600 = 225 is the least that is >= 224.
    assert image.decode(data, min_side=224).shape == (225, 300, 3)
    assert image.decode(data, min_side=226).shape == (300, 400, 3)
    assert image.decode(data, min_side=5000).shape == (600, 800, 3)
    assert image.decode(saved(scene(800, 600), format="PNG"), min_side=100).shape == (600, 800, 3)


def test_decode_errors_pickle() -> None:
    error = pickle.loads(pickle.dumps(image.DecodeError("decode", "png: cut short")))
    assert (error.kind, str(error)) == ("decode", "png: cut short")


@pytest.mark.parametrize("shape", [(80, 120), (120, 80), (224, 224), (224, 301), (37, 501), (5, 5)])
@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
def test_center_crop_is_torchvisions(shape: tuple[int, int], resample: str) -> None:
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    picture = np.asarray(scene(shape[1], shape[0]))
    oracle = Compose([Resize(224, interpolation=InterpolationMode(resample)), CenterCrop(224)])
    expected = np.asarray(oracle(Image.fromarray(picture)))
    assert np.array_equal(image.transform(picture, 224, "center_crop", resample), expected)


def test_pad_centres_on_a_white_square_first() -> None:
    picture = np.zeros((2, 4, 3), np.uint8)
    # Square of 4: rows 0 and 3 white. Halved by area: each row is the mean of one white and one black row.
    assert image.transform(picture, 2, "pad", "area").tolist() == [[[128] * 3] * 2] * 2
    assert image.transform(picture, 4, "pad")[:, 0, 0].tolist() == [255, 0, 0, 255]


def test_stretch_ignores_the_ratio() -> None:
    picture = np.zeros((2, 4, 3), np.uint8)
    picture[:, 2:] = 100
    assert image.transform(picture, 2, "stretch", "area")[..., 0].tolist() == [[0, 100], [0, 100]]


@pytest.mark.parametrize("fit", ["center_crop", "pad", "stretch"])
def test_strips_do_not_fill_the_memory(fit: str) -> None:
    strip = np.zeros((1, 2_000_000, 3), np.uint8)
    for picture in (strip, strip.swapaxes(0, 1)):
        assert image.transform(np.ascontiguousarray(picture), 224, fit).shape == (224, 224, 3)
    with pytest.raises(image.DecodeError, match="would be scaled") as caught:
        image.resize(strip, 256, "keep_ratio")
    assert caught.value.kind == "too_many_pixels"


# (width, height) of the picture → (width, height) by img2dataset's rules at 256, worked out by hand.
SIZES = [
    ("no", (640, 480), False, (640, 480)),
    ("keep_ratio", (640, 480), False, (341, 256)),  # 640 * 256/480 = 341.33
    ("keep_ratio", (100, 50), False, (512, 256)),
    ("keep_ratio", (100, 50), True, (100, 50)),
    ("keep_ratio", (300, 256), True, (300, 256)),
    ("keep_ratio", (1001, 512), True, (500, 256)),  # 500.5, rounded half to even
    ("keep_ratio", (1003, 512), True, (502, 256)),  # 501.5, rounded half to even
    ("center_crop", (640, 480), False, (256, 256)),
    ("center_crop", (400, 200), True, (400, 200)),  # not bigger: not cropped either
    ("keep_ratio_largest", (640, 480), False, (256, 192)),
    ("keep_ratio_largest", (100, 50), False, (256, 128)),
    ("keep_ratio_largest", (100, 50), True, (100, 50)),
    ("keep_ratio_largest", (4000, 3), False, (256, 1)),  # 0.19 px: img2dataset fails here
    ("border", (640, 480), False, (256, 256)),
    ("border", (100, 50), True, (100, 50)),
]


@pytest.mark.parametrize(("mode", "size", "only_if_bigger", "expected"), SIZES)
def test_resize_modes_give_img2datasets_sizes(
    mode: Any, size: tuple[int, int], only_if_bigger: bool, expected: tuple[int, int]
) -> None:
    found = image.resize(np.asarray(scene(*size)), 256, mode, only_if_bigger)
    assert (found.shape[1], found.shape[0]) == expected


def test_resize_uses_area_down_and_lanczos_up() -> None:
    picture = np.asarray(scene(640, 480))
    expected = cv2.resize(picture, (341, 256), interpolation=cv2.INTER_AREA)
    assert np.array_equal(image.resize(picture, 256, "keep_ratio"), expected)
    assert np.array_equal(image.resize(picture, 256, "center_crop"), expected[:, 42:298])  # (341 - 256) // 2 = 42
    small = np.asarray(scene(64, 32))
    up = cv2.resize(small, (256, 128), interpolation=cv2.INTER_LANCZOS4)
    bordered = image.resize(small, 256, "border")
    assert np.array_equal(bordered[64:192], up)
    assert (bordered[:64] == 255).all()
    assert (bordered[192:] == 255).all()


@pytest.mark.parametrize("quality", [75, 95, 96])
def test_a_jpeg_is_what_pillow_writes_with_the_accurate_dct(quality: int) -> None:
    picture = np.random.default_rng(3).integers(0, 256, (33, 47, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(picture).save(sink, "JPEG", quality=quality, subsampling="4:2:0")
    assert image.encode(picture, "jpg", quality) == sink.getvalue()


def test_a_side_that_no_jpeg_can_have() -> None:
    with pytest.raises(image.DecodeError, match="65501x1 px, a JPEG has at most 65500"):
        image.encode(np.zeros((1, 65_501, 3), np.uint8), "jpg", 95)


def test_encode_round_trips() -> None:
    picture = np.asarray(scene())
    assert np.array_equal(image.decode(image.encode(picture, "png", 6)), picture)
    for kind, name in (("jpg", "jpeg"), ("webp", "webp")):
        data = image.encode(picture, kind, 95)
        assert image.probe(data) == image.ImageInfo(name, 120, 80, 1)
        assert np.abs(image.decode(data).astype(int) - picture).mean() < 3
        assert len(image.encode(picture, kind, 30)) < len(data)


def test_exif_json_names_the_tags() -> None:
    exif = Image.Exif()
    exif[0x010F] = "Acme\0"  # Make
    exif[0x0112] = 6
    exif.get_ifd(0x8769)[0x829A] = IFDRational(1, 250)  # ExposureTime
    exif.get_ifd(0x8769)[0x927C] = b"\x00\x01\x02maker"  # MakerNote: a binary blob
    exif.get_ifd(0x8825)[0x0001] = "N"  # GPSLatitudeRef
    found = json.loads(image.exif_json(saved(scene(), format="JPEG", exif=exif)) or "{}")
    assert found == {"Make": "Acme", "Orientation": 6, "ExposureTime": 0.004, "GPSLatitudeRef": "N"}
    assert image.exif_json(saved(scene(), format="JPEG")) is None
    assert image.exif_json(b"<html>") is None
