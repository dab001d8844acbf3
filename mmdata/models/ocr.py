"""Text in pictures by PP-OCR, whose weights the package rapidocr carries. No network.

In: (H, W, 3) uint8 RGB of any size. Out: boxes, what is written in them, and how sure the reader is. Fails: nothing of
its own; what onnxruntime raises. A picture is scaled between two sides and, where it is very thin, continued by its
edges, so that its cost is bounded whatever its shape. Licences: rapidocr and PP-OCR Apache-2.0.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from mmdata.media.boxes import Boxes, inside
from mmdata.media.picture import Picture

__all__ = ["TextFound", "TextReader", "lines_of"]

_MULTIPLE = 32  # what the detector's sides must be a multiple of
_THINNEST = 96  # px; a thinner picture is continued by its edges up to this
_MODELS = {
    "Det": "PP-OCRv6_det_small.onnx",
    "Rec": "PP-OCRv6_rec_small.onnx",
    "Cls": "ch_ppocr_mobile_v2.0_cls_mobile.onnx",
}


class TextFound(NamedTuple):
    """Boxes (N, 4), N texts in reading order (None each where they were not read), N confidences in [0, 1]."""

    boxes: Boxes
    texts: list[str | None]
    scores: npt.NDArray[np.float32]


class TextReader:
    """PP-OCRv6 small: a detector (DBNet; Liao et al. 2020), a turner for upside-down lines, a reader (SVTR, CTC)."""

    def __init__(self, max_side_px: int, min_side_px: int, read: bool, threads: int) -> None:
        from rapidocr import RapidOCR

        folder = files("rapidocr") / "models"
        settings: dict[str, Any] = {
            "Global.log_level": "critical",
            "Global.use_preprocess_img": False,  # scaling is done here, with bounds on both sides
            "Global.use_vertical_padding": False,
            "Global.text_score": 0.0,
            "Det.limit_type": "max",
            "Det.limit_side_len": 2**31,
            "EngineConfig.onnxruntime.intra_op_num_threads": threads,
        }
        # Models by path: with none, rapidocr asks its list of addresses.
        settings |= {f"{part}.model_path": str(folder / name) for part, name in _MODELS.items()}
        self._engine: Any = RapidOCR(params=settings)
        self._read = read
        self._max_side, self._min_side = max_side_px, min_side_px

    def warm_up(self) -> None:
        """The largest picture there can be: what does not fit in memory fails here."""
        self.find(np.full((self._max_side, self._max_side, 3), 255, np.uint8))

    def find(self, picture: Picture) -> TextFound:
        """Text of one picture; boxes in its own px, those of the detector's leaning boxes that enclose them."""
        height, width = picture.shape[:2]
        scaled = self._scaled(picture)
        canvas, (above, beside) = _thick(scaled)
        found = self._engine(canvas[:, :, ::-1].copy(), use_cls=self._read, use_rec=self._read)
        if found.boxes is None or not len(found.boxes):
            return TextFound(np.empty((0, 4), np.float32), [], np.empty(0, np.float32))
        corners = np.asarray(found.boxes, np.float64) - [beside, above]
        corners *= [width / scaled.shape[1], height / scaled.shape[0]]
        boxes, kept = inside(np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1), width, height)
        scores = np.asarray(found.scores, np.float32)[kept]
        texts = [" ".join(found.txts[i].split()) if self._read else None for i in kept]
        order = [i for line in lines_of(boxes) for i in line]
        return TextFound(boxes[order], [texts[i] for i in order], scores[order])

    def _scaled(self, picture: Picture) -> Picture:
        """Short side enlarged to `min_side_px`, long side at most `max_side_px`; sides in steps of 32 px."""
        height, width = picture.shape[:2]
        factor = min(max(1.0, self._min_side / min(height, width)), self._max_side / max(height, width))
        sides = [max(1, round(side * factor)) for side in (width, height)]
        stepped = [max(_MULTIPLE, round(s / _MULTIPLE) * _MULTIPLE) if s >= _MULTIPLE else s for s in sides]
        shrinking = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
        return np.asarray(cv2.resize(picture, (stepped[0], stepped[1]), interpolation=shrinking))


def _thick(picture: Picture) -> tuple[Picture, tuple[int, int]]:
    """The picture continued by its edges to sides the detector takes, and the px added above and on the left."""
    missing = [max(0, _THINNEST - side) for side in picture.shape[:2]]
    (above, below), (left, right) = [(m // 2, m - m // 2) for m in missing]
    if not any(missing):
        return picture, (0, 0)
    return np.asarray(cv2.copyMakeBorder(picture, above, below, left, right, cv2.BORDER_REPLICATE)), (above, left)


def lines_of(boxes: Boxes) -> list[list[int]]:
    """Reading order: lines from the top down, each from left to right, as indexes into `boxes`.

    A box belongs to the line whose topmost box its middle is level with.
    """
    middles = (boxes[:, 1] + boxes[:, 3]) / 2
    lines: list[list[int]] = []
    for i in np.lexsort((boxes[:, 0], middles)).tolist():
        line = next((n for n in reversed(lines) if boxes[n[0], 1] <= middles[i] < boxes[n[0], 3]), None)
        if line is None:
            lines.append([i])
        else:
            line.append(i)
    return [sorted(line, key=lambda i: (float(boxes[i, 0]), i)) for line in lines]
