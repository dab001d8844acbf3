"""Exposed and covered body parts in pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from mmdata.batch import Batch
from mmdata.media.boxes import BOXES, cells
from mmdata.models.nudity import CLASSES, BodyParts
from mmdata.models.offline import package_weights
from mmdata.stage import Columns, Contract, Needs, Options, Pixels, Stage

__all__ = ["DetectNudity", "DetectNudityOptions"]

_THREADS = 1  # two cost twice the processor time and save little: workers are what is added
_WRITES = pa.schema(
    [
        ("nudity_boxes", BOXES),
        ("nudity_labels", pa.list_(pa.string())),
        ("nudity_scores", pa.list_(pa.float32())),
        ("nudity_score", pa.float32()),
    ]
)
_EXPLICIT = (
    "ANUS_EXPOSED",
    "BUTTOCKS_EXPOSED",
    "FEMALE_BREAST_EXPOSED",
    "FEMALE_GENITALIA_EXPOSED",
    "MALE_GENITALIA_EXPOSED",
)


class DetectNudityOptions(Options):
    """How sure the detector must be, and what counts."""

    min_confidence: float = Field(0.25, ge=0.2, le=1, description="score below which a box is dropped")
    classes: tuple[str, ...] = Field(_EXPLICIT, description="classes whose best score is nudity_score")

    @field_validator("classes")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        unknown = sorted(set(value) - set(CLASSES))
        if unknown or not value:
            which = f"{', '.join(unknown)} is none of NudeNet's" if unknown else "there is none"
            raise ValueError(f"{which}; expected some of {', '.join(sorted(CLASSES))}")
        return tuple(sorted(set(value)))


class DetectNudity(Stage[DetectNudityOptions]):
    """Body parts in a picture, exposed and covered, and the best score of an exposed one.

    Reads image (as stored). Writes, the surest box first, `nudity_boxes` (list of structs left, top, right, bottom,
    float32 in px of the stored upright picture, right and bottom exclusive), `nudity_labels` (NudeNet's classes:
    FEMALE_BREAST, FEMALE_GENITALIA, BUTTOCKS, ANUS, BELLY, FEET and ARMPITS, each _EXPOSED or _COVERED;
    MALE_BREAST_EXPOSED, MALE_GENITALIA_EXPOSED; FACE_FEMALE, FACE_MALE), `nudity_scores` (float32 in [0.2, 1], not
    calibrated) and `nudity_score` (float32 in [0, 1]: the best score among `classes`, by default bare anus, buttocks,
    female breast and genitals; 0 where none of them is found). A picture without a body has empty lists and 0: values,
    not NULL. NULL only with a reason, when the picture is missing or does not decode.

    A detector of 320 px: small figures are missed, and smooth round shapes are sometimes taken for skin (the moon for a
    belly). The boxes can be blurred by `export.blur`.
    Source: NudeNet 3.4 (P. Bedapudi), YOLOv8n; weights inside the package nudenet, nothing is downloaded. Boxes are
    not rounded to whole px, where the package does so.
    """

    name = "detect_nudity"
    version = 1
    label = "nudity"

    @classmethod
    def contract(cls, options: DetectNudityOptions) -> Contract:
        """The weights are the package's."""
        return Contract(
            writes=_WRITES,
            reads=("image",),
            pixels=(Pixels(),),
            weights=(package_weights("nudenet"),),
            needs=Needs(modules=("nudenet", "onnxruntime"), extra="nudity", threads=_THREADS),
            tolerance=1e-3,
        )

    def open(self, device: str) -> None:
        """Load the model and look at one picture."""
        self._model = BodyParts(_THREADS)
        self._model.find(np.zeros((8, 8, 3), np.uint8), self.options.min_confidence)

    def compute(self, batch: Batch) -> Columns:
        """What is found in every picture."""
        rows: list[dict[str, Any]] = []
        for picture in batch.pixels():
            found = self._model.find(picture, self.options.min_confidence)
            counted = [s for s, name in zip(found.scores.tolist(), found.labels, strict=True) if self._counts(name)]
            values = (cells(found.boxes), found.labels, found.scores, max(counted, default=0.0))
            rows.append(dict(zip(_WRITES.names, values, strict=True)))
        return {field.name: pa.array([row[field.name] for row in rows], field.type) for field in _WRITES}

    def _counts(self, label: str) -> bool:
        return label in self.options.classes
