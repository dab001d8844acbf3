"""Exposed and covered body parts by NudeNet's detector, whose weights the package nudenet carries. No network.

In: (H, W, 3) uint8 RGB of any size. Out: boxes, classes and scores. Fails: nothing of its own. The picture is seen as
the package sees a file: padded with black on the right and below to a square, resized to 320, and its channels in the
order blue, green, red. Licence: the package says MIT in its metadata and carries a copy of the AGPL-3.0 besides.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from mmdata.media.boxes import Boxes, inside
from mmdata.media.picture import Picture

__all__ = ["CLASSES", "BodyParts", "BodyPartsFound"]

# In the order of the model's outputs (nudenet/nudenet.py).
CLASSES = (
    "FEMALE_GENITALIA_COVERED",
    "FACE_FEMALE",
    "BUTTOCKS_EXPOSED",
    "FEMALE_BREAST_EXPOSED",
    "FEMALE_GENITALIA_EXPOSED",
    "MALE_BREAST_EXPOSED",
    "ANUS_EXPOSED",
    "FEET_EXPOSED",
    "BELLY_COVERED",
    "FEET_COVERED",
    "ARMPITS_COVERED",
    "ARMPITS_EXPOSED",
    "FACE_MALE",
    "BELLY_EXPOSED",
    "MALE_GENITALIA_EXPOSED",
    "ANUS_COVERED",
    "FEMALE_BREAST_COVERED",
    "BUTTOCKS_COVERED",
)
_SIDE = 320
_CANDIDATE = 0.2  # the package's own threshold before boxes are merged
_OVERLAP = 0.45  # intersection over union above which the weaker of two boxes goes, whatever their classes


class BodyPartsFound(NamedTuple):
    """Boxes (N, 4), N class names, N scores in [0, 1], the highest first."""

    boxes: Boxes
    labels: list[str]
    scores: npt.NDArray[np.float32]


class BodyParts:
    """YOLOv8n at 320 px over 18 classes (NudeNet 3.4)."""

    def __init__(self, threads: int) -> None:
        import onnxruntime

        found = find_spec("nudenet")  # not imported: it would read the model twice
        assert found is not None
        assert found.origin is not None
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        path = Path(found.origin).with_name("320n.onnx")
        self._session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        [self._input] = [i.name for i in self._session.get_inputs()]

    def find(self, picture: Picture, min_confidence: float) -> BodyPartsFound:
        """What is seen in one picture, boxes in its own px."""
        height, width = picture.shape[:2]
        side = max(height, width)
        # A padded copy of a very thin picture would be its longer side squared, so it is shrunk before it is padded.
        sides = [max(1, round(s * min(1.0, 2 * _SIDE / side))) for s in (width, height)] if side > 16 * _SIDE else None
        shown = picture if sides is None else cv2.resize(picture, (sides[0], sides[1]), interpolation=cv2.INTER_AREA)
        square = max(shown.shape[:2])
        padded = cv2.copyMakeBorder(
            shown, 0, square - shown.shape[0], 0, square - shown.shape[1], cv2.BORDER_CONSTANT, value=(0, 0, 0)
        )
        blob = cv2.dnn.blobFromImage(padded, 1 / 255, (_SIDE, _SIDE), (0, 0, 0), swapRB=True, crop=False)
        [output] = self._session.run(None, {self._input: blob})
        return _decoded(output[0].T, width, height, min_confidence)


def _decoded(output: npt.NDArray[np.float32], width: int, height: int, min_confidence: float) -> BodyPartsFound:
    """(N, 4 + 18): middle, size and class scores, in px of the 320 square."""
    scores = output[:, 4:].max(axis=1)
    output, scores = output[scores >= _CANDIDATE], scores[scores >= _CANDIDATE]
    labels = output[:, 4:].argmax(axis=1)
    middles, sizes = output[:, :2].astype(np.float64), output[:, 2:4].astype(np.float64)
    corners = np.concatenate([middles - sizes / 2, middles + sizes / 2], axis=1) * (max(width, height) / _SIDE)
    boxes, kept = inside(corners, width, height)
    scores, labels = scores[kept], labels[kept]
    frames = [[left, top, right - left, bottom - top] for left, top, right, bottom in boxes.tolist()]
    chosen = cv2.dnn.NMSBoxes(frames, scores.tolist(), max(min_confidence, _CANDIDATE), _OVERLAP) if frames else ()
    order = np.asarray(chosen, np.int64).ravel()
    return BodyPartsFound(boxes[order], [CLASSES[i] for i in labels[order]], scores[order].astype(np.float32))
