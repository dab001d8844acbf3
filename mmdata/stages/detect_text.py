"""Text in pictures: where it stands, what it says, and how much of it the caption repeats."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from mmdata.batch import Batch
from mmdata.media.boxes import BOXES, area_ratio, cells
from mmdata.models.ocr import TextFound, TextReader, lines_of
from mmdata.models.offline import package_weights
from mmdata.stage import Columns, Contract, Needs, Options, Pixels, Stage, TextColumn

__all__ = ["DetectText", "DetectTextOptions", "found_in"]

_THREADS = 1  # two cost twice the processor time and save little: workers are what is added
_LONGEST = 100_000  # code points of a caption that are looked at
_SHORTEST = 4  # characters of a word that may stand inside a longer one
# Han, kana and Thai are written without spaces: a character is a word.
_ALONE = r"\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_ALONE}]|[^\W_{_ALONE}]+")

_PLACES = pa.schema([("ocr_boxes", BOXES), ("ocr_scores", pa.list_(pa.float32())), ("ocr_count", pa.int64())])
_AREA = pa.field("ocr_area_ratio", pa.float32())
_READ = pa.schema(
    [
        ("ocr_texts", pa.list_(pa.string())),
        ("ocr_text", pa.string()),
        ("ocr_caption_ratio", pa.float32()),
        ("ocr_in_caption_ratio", pa.float32()),
    ]
)


class DetectTextOptions(Options):
    """Whether text is read or only found, how sure the model must be, and at what size it looks."""

    read: bool = Field(True, description="also read what is written; false only finds the boxes, which costs less")
    column: TextColumn = Field("caption", description="text column that what is read is compared with")
    min_confidence: float = Field(
        0.5, ge=0, le=1, description="confidence below which a box is dropped: of the reading, else of the detection"
    )
    max_side_px: int = Field(
        1280, ge=64, le=4096, description="a larger picture is shrunk to this longest side before it is looked at"
    )
    min_side_px: int = Field(
        512,
        ge=32,
        le=4096,
        description="a smaller picture is enlarged to this shortest side, as far as the longest may",
    )
    min_characters: int = Field(
        2, ge=1, description="drop readings of fewer letters and digits: a lone one is mostly a shape taken for 0 or 8"
    )


class DetectText(Stage[DetectTextOptions]):
    """Boxes and words of the text in a picture (OCR), and its overlap with the caption.

    Reads image (as stored) and, where `read`, the caption (or `column`). Writes, with the boxes in reading order
    (lines from the top down, each from left to right):

    - `ocr_boxes`: list of structs left, top, right, bottom, float32 in px of the stored upright picture, right and
      bottom exclusive: the upright box that encloses a line, also where the line leans. `export.blur` and the
      `masked` pictures of `score_clip` take them as they are;
    - `ocr_scores`: as many confidences in [0, 1], float32; `ocr_count`: how many boxes;
    - `ocr_area_ratio` in [0, 1]: area of the union of the boxes / area of the picture;

    and, unless `read` is false,

    - `ocr_texts`: what is written in each box; `ocr_text`: all of it, a space between boxes of one line, a line feed
      between lines;
    - `ocr_caption_ratio` in [0, 1]: share of the caption's distinct words that are found in the picture;
    - `ocr_in_caption_ratio` in [0, 1]: share of the picture's distinct words that are found in the caption.

    Words are runs of letters and digits, each Han, kana or Thai character alone, after NFKC and case folding. A word
    is found where it is one of the other's words, or has at least 4 characters and stands in the other's letters
    written without spaces, because readers run words together. A caption is looked at up to 100,000 code points.
    A picture without text has empty lists, `''`, 0 boxes and area 0: values, not NULL. NULL without a reason: the
    ratios, where the caption is NULL, and where there is no word to divide by (`ocr_caption_ratio`: the caption has
    none; `ocr_in_caption_ratio`: the picture has none). NULL with a reason: the picture is missing or does not decode.

    The models are PP-OCRv6 small (Chinese, Latin letters and digits; others are found but not read) inside the package
    rapidocr; nothing is downloaded. 512 px is what T-MARS' detector was given; more finds smaller letters, and more
    shapes in photographs that are none (scikit-image's astronaut has a false `80` at 736).
    Source: Liao et al. 2020 (arXiv 1911.08947, detection), Du et al. 2020 (arXiv 2009.09941, PP-OCR). T-MARS (Maini
    et al. 2023, arXiv 2307.03132) drops pictures whose score comes from such text: about 40 % of LAION's show words of
    their caption. How T-MARS matched words could not be verified; the rule above is ours.
    """

    name = "detect_text"
    version = 1
    label = "ocr"

    @classmethod
    def contract(cls, options: DetectTextOptions) -> Contract:
        """The caption is read, and text columns are written, only where text is read."""
        read = options.read
        return Contract(
            writes=pa.schema([*_PLACES, _AREA, *(_READ if read else ())]),
            reads=("image", options.column) if read else ("image",),
            pixels=(Pixels(),),
            weights=(package_weights("rapidocr"),),
            needs=Needs(modules=("onnxruntime", "rapidocr"), extra="ocr", threads=_THREADS),
            tolerance=1e-3,
        )

    def open(self, device: str) -> None:
        """Load the models and look at the largest picture there can be."""
        options = self.options
        self._reader = TextReader(options.max_side_px, options.min_side_px, options.read, _THREADS)
        self._reader.warm_up()

    def compute(self, batch: Batch) -> Columns:
        """What is found in every picture."""
        captions = batch[self.options.column] if self.options.read else [None] * len(batch)
        rows = [self._row(p, c) for p, c in zip(batch.pixels(), captions, strict=True)]
        schema = self.contract(self.options).writes
        return {field.name: pa.array([row[field.name] for row in rows], field.type) for field in schema}

    def _row(self, picture: Any, caption: str | None) -> dict[str, Any]:
        height, width = picture.shape[:2]
        found = self._sure(self._reader.find(picture))
        row = {
            "ocr_boxes": cells(found.boxes),
            "ocr_scores": found.scores,
            "ocr_count": len(found.boxes),
            "ocr_area_ratio": area_ratio(found.boxes, width, height),
        }
        if self.options.read:
            lines = [" ".join(str(found.texts[i]) for i in line) for line in lines_of(found.boxes)]
            text = "\n".join(lines)
            shares = (None, None) if caption is None else (found_in(caption, text), found_in(text, caption))
            row |= {"ocr_texts": found.texts, "ocr_text": text}
            row |= dict(zip(("ocr_caption_ratio", "ocr_in_caption_ratio"), shares, strict=True))
        return row

    def _sure(self, found: TextFound) -> TextFound:
        """Without the boxes that the options drop."""
        kept = found.scores >= self.options.min_confidence
        if self.options.read:
            long = [sum(map(str.isalnum, text or "")) >= self.options.min_characters for text in found.texts]
            kept &= np.array(long, bool)
        chosen = np.flatnonzero(kept)
        return TextFound(found.boxes[chosen], [found.texts[i] for i in chosen], found.scores[chosen])


def found_in(text: str, other: str) -> float | None:
    """Share of the distinct words of one text that are found in the other; None when it has no word."""
    words, others = _words(text), _words(other)
    if not words:
        return None
    known, joined = set(others), "".join(others)
    return sum(w in known or (len(w) >= _SHORTEST and w in joined) for w in words) / len(words)


def _words(text: str) -> list[str]:
    """Distinct words in the order of their first place."""
    shown = unicodedata.normalize("NFKC", text[:_LONGEST]).casefold()
    return list(dict.fromkeys(_WORD.findall(shown)))
