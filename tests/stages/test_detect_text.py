"""Text found in pictures whose text is known, because the test writes it; nothing is asked of the network."""

from __future__ import annotations

import io
import socket
from typing import Any

import numpy as np
import pytest
import skimage
from batches import make_batch
from PIL import Image, ImageDraw, ImageFont

from mmdata.media.image import decode
from mmdata.models.ocr import TextReader, lines_of
from mmdata.stages.detect_text import DetectText, DetectTextOptions, found_in


def written(*lines: tuple[str, int, int], size: tuple[int, int] = (480, 240), letters: int = 36, **more: Any):
    """White, with black text at (x, y); `turn` degrees against the clock."""
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for text, x, y in lines:
        draw.text((x, y), text, fill="black", font=ImageFont.load_default(letters))
    return np.asarray(picture.rotate(more.get("turn", 0), fillcolor="white", resample=Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def stage() -> DetectText:
    opened = DetectText(DetectTextOptions(max_side_px=640, min_side_px=320))
    opened.open("cpu")
    return opened


def detect(stage: DetectText, *pictures: Any, captions: list[str | None] | None = None) -> list[dict[str, Any]]:
    found = stage.compute(make_batch(list(pictures), caption=captions or [None] * len(pictures)))
    cells = {name: column.to_pylist() for name, column in found.items()}
    return [{name.removeprefix("ocr_"): values[i] for name, values in cells.items()} for i in range(len(pictures))]


def test_reads_what_is_written(stage: DetectText):
    picture = written(("SALE 20% OFF", 40, 40), ("today only", 40, 140))
    [found] = detect(stage, picture, captions=["Sale today: bicycles"])
    assert found["text"] == "SALE 20% OFF\ntoday only"
    assert found["texts"] == ["SALE 20% OFF", "today only"]
    assert min(found["scores"]) > 0.9
    assert found["count"] == 2
    assert found["caption_ratio"] == pytest.approx(2 / 3)  # sale, today; not bicycles
    assert found["in_caption_ratio"] == pytest.approx(2 / 5)  # of sale, 20, off, today, only


def test_boxes_enclose_the_ink(stage: DetectText):
    picture = written(("HELLO", 60, 50), ("WORLD", 280, 150))
    [found] = detect(stage, picture)
    ink = picture.min(axis=2) < 128
    total = 0.0
    for box, columns in zip(found["boxes"], (slice(0, 240), slice(240, 480)), strict=True):
        rows = np.flatnonzero(ink[:, columns].any(axis=1))
        across = np.flatnonzero(ink[:, columns].any(axis=0)) + columns.start
        expected = (across[0], rows[0], across[-1] + 1, rows[-1] + 1)
        assert [box[n] for n in ("left", "top", "right", "bottom")] == pytest.approx(expected, abs=14)
        total += (box["right"] - box["left"]) * (box["bottom"] - box["top"])
    assert found["area_ratio"] == pytest.approx(total / ink.size, abs=1e-6)  # they do not overlap


def test_a_leaning_line_gets_the_upright_box_around_it(stage: DetectText):
    picture = written(("LEANING WORDS", 90, 220), size=(480, 480), turn=20)
    [found] = detect(stage, picture)
    assert found["text"].replace(" ", "") == "LEANINGWORDS"
    ink = picture.min(axis=2) < 128
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    [box] = found["boxes"]
    expected = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    assert [box[n] for n in ("left", "top", "right", "bottom")] == pytest.approx(expected, abs=16)


def test_reading_order():
    page = np.array([[200, 52, 300, 72], [10, 50, 90, 70], [10, 10, 300, 30], [100, 47, 190, 68]], np.float32)
    assert lines_of(page) == [[2], [1, 3, 0]]
    assert lines_of(np.empty((0, 4), np.float32)) == []


def test_the_options_drop_boxes(stage: DetectText):
    picture = written(("7", 60, 40), ("BICYCLE", 60, 140))
    [found] = detect(stage, picture)
    assert found["texts"] == ["BICYCLE"]
    assert found["count"] == len(found["boxes"]) == len(found["scores"]) == 1
    strict = DetectText(DetectTextOptions(max_side_px=640, min_side_px=320, min_confidence=1, min_characters=1))
    strict._reader = stage._reader
    sure = [score for score in detect(strict, picture)[0]["scores"] if score < 1]
    assert sure == []
    loose = DetectText(DetectTextOptions(max_side_px=640, min_side_px=320, min_characters=1))
    loose._reader = stage._reader
    assert detect(loose, picture)[0]["texts"] == ["7", "BICYCLE"]


def test_boxes_alone_where_nothing_is_read():
    stage = DetectText(DetectTextOptions(read=False, max_side_px=640, min_side_px=320))
    assert stage.contract(stage.options).reads == ("image",)
    stage.open("cpu")
    [found] = [{k: v.to_pylist()[0] for k, v in stage.compute(make_batch([written(("BICYCLE", 60, 100))])).items()}]
    assert sorted(found) == ["ocr_area_ratio", "ocr_boxes", "ocr_count", "ocr_scores"]
    assert found["ocr_count"] == 1
    [box] = found["ocr_boxes"]
    assert (box["left"], box["top"]) == pytest.approx((62, 108), abs=14)


def stored(picture: np.ndarray, mode: str, form: str) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(picture).convert(mode).save(sink, form, quality=90)
    return sink.getvalue()


def test_grey_and_cmyk(stage: DetectText):
    picture = written(("BICYCLE", 60, 100))
    for data in (stored(picture, "L", "JPEG"), stored(picture, "CMYK", "JPEG"), stored(picture, "1", "PNG")):
        assert detect(stage, data)[0]["text"] == "BICYCLE"


@pytest.mark.parametrize("shape", [(1, 1), (20, 20_000), (20_000, 20), (3, 700), (4000, 4000)])
def test_pictures_without_text_of_any_shape(stage: DetectText, shape: tuple[int, int]):
    [found] = detect(stage, np.full((*shape, 3), 200, np.uint8), captions=["a caption"])
    assert found == {
        "boxes": [],
        "scores": [],
        "texts": [],
        "text": "",
        "count": 0,
        "area_ratio": 0,
        "caption_ratio": 0,
        "in_caption_ratio": None,
    }


def test_text_in_a_banner(stage: DetectText):
    banner = written(("FREE SHIPPING TODAY", 400, 8), size=(1600, 60))
    assert detect(stage, banner)[0]["text"].replace(" ", "") == "FREESHIPPINGTODAY"


@pytest.mark.parametrize(
    ("text", "other", "share"),
    [
        ("", "x", None),
        (" ... ", "x", None),
        ("x", "", 0),
        ("Stop the BIKE, stop", "stop bike", 2 / 3),
        ("twenty percent", "TWENTYPERCENTOFF", 1),  # run together by the reader
        ("the cat", "other cathedral", 0),  # too short to stand inside another word
        ("ＳＡＬＥ", "sale", 1),
        ("自転車 shop", "自転 SHOP", 3 / 4),
        ("straße", "STRASSE", 1),
        ("قهوة", "قهوة", 1),
    ],
)
def test_share_of_words(text: str, other: str, share: float | None):
    assert found_in(text, other) == (None if share is None else pytest.approx(share))


def test_a_caption_of_ten_megabytes(stage: DetectText):
    captions = ["stop " * 2_000_000, "x" * 10_000_000]
    found = detect(stage, *[written(("STOP", 60, 60))] * 2, captions=captions)
    assert [f["caption_ratio"] for f in found] == [1, 0]


def test_equals_rapidocr_where_nothing_is_scaled():
    """The package's own settings, over a picture whose sides both want: read the same, boxes within two px."""
    from rapidocr import RapidOCR

    picture = written(("A red bicycle", 80, 200), ("leans on 3 walls", 80, 400), size=(736, 736))
    theirs: Any = RapidOCR(params={"Global.log_level": "critical"})(picture[:, :, ::-1].copy())
    ours = TextReader(736, 736, True, 2).find(picture)
    assert ours.texts == list(theirs.txts) == ["A red bicycle", "leans on 3 walls"]
    assert ours.scores == pytest.approx(np.array(theirs.scores), abs=1e-3)
    upright = np.concatenate([theirs.boxes.min(axis=1), theirs.boxes.max(axis=1)], axis=1)
    assert ours.boxes == pytest.approx(upright, abs=2)


def test_nothing_is_asked_of_the_network(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def refuse(*arguments: Any, **more: Any) -> None:
        asked.append(arguments)
        raise OSError("no network")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    reader = TextReader(320, 320, True, 1)
    assert reader.find(written(("STOP", 60, 60))).texts == ["STOP"]
    assert reader.find(skimage.data.camera()[:, :, None].repeat(3, axis=2)).boxes.shape[1] == 4
    assert asked == []


def test_a_picture_from_a_file_keeps_its_px(stage: DetectText):
    """Boxes are in px of the stored picture, also where it was shrunk before it was looked at."""
    picture = written(("BICYCLE", 60, 100))
    large = np.asarray(Image.fromarray(picture).resize((2400, 1200)))
    small, big = detect(stage, picture, decode(stored(large, "RGB", "PNG")))
    for side in ("left", "top", "right", "bottom"):
        assert big["boxes"][0][side] / 5 == pytest.approx(small["boxes"][0][side], abs=6)
    assert big["area_ratio"] == pytest.approx(small["area_ratio"], rel=0.25)
