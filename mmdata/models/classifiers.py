"""Classifiers of transformers for pictures and texts: bytes of a folder in, one score per label out.

Pictures are prepared by the model's own processor, one at a time. Scores are what transformers' pipelines give:
softmax over the labels, a sigmoid each where the model says that labels are independent or has only one, the bare
number where it is a regression. Every call has one fixed batch shape, padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mmdata.batch import pad_rows
from mmdata.errors import RecipeError
from mmdata.models.pretrained import Precision, labels_of, load_part, load_weights
from mmdata.models.token_batches import TokenBatches, longest_of

__all__ = ["ImageLabels", "TextLabels"]

_THINNEST = 32  # times as long as wide; of a picture beyond it, as web pages have for rules, the middle is seen

Floats = npt.NDArray[np.float32]


class ImageLabels:
    """A transformers image classifier. `labels` are in the order of its outputs.

    RecipeError for a folder without a processor or a classifier's head, and for a processor whose answers have
    another shape for another picture.
    """

    def __init__(self, where: str, folder: Path, precision: Precision, device: str, rows: int) -> None:
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        self._device, self._rows = device, rows
        self._processor = load_part(where, AutoImageProcessor.from_pretrained, folder)
        make = AutoModelForImageClassification.from_pretrained
        self._network = load_weights(where, make, folder, precision, device)
        self.labels = labels_of(where, self._network.config.to_dict())
        # Such a processor enlarges a row of 20,000 px to gigabytes, of which it keeps the square in the middle.
        self._is_by_short_side = bool((self._processor.to_dict().get("size") or {}).get("shortest_edge"))
        shapes = {self._prepared(np.zeros((*size, 3), np.uint8)).shape for size in ((40, 90), (70, 50))}
        if len(shapes) > 1:
            raise RecipeError(
                f"{where}: the model's processor makes pictures of different shapes ({shapes}); only models that see "
                f"one size are supported"
            )
        [self._shape] = shapes

    def scores(self, pictures: Sequence[npt.NDArray[np.uint8]]) -> Floats:
        """(H, W, 3) uint8 RGB pictures of any sizes → (N, labels) float32."""
        found = [np.empty((0, len(self.labels)), np.float32)]
        for first in range(0, len(pictures), self._rows):
            some = [self._prepared(p) for p in pictures[first : first + self._rows]]
            found.append(self._encode(pad_rows(np.stack(some), self._rows))[: len(some)])
        return np.concatenate(found)

    def warm_up(self) -> None:
        """One full batch: what does not fit in memory fails here."""
        self._encode(np.zeros((self._rows, *self._shape), np.float32))

    def _prepared(self, picture: npt.NDArray[np.uint8]) -> Floats:
        from PIL import Image

        shown = _middle(picture) if self._is_by_short_side else picture
        planes = self._processor(images=Image.fromarray(shown), return_tensors="pt")["pixel_values"]
        return np.asarray(planes[0].numpy(), np.float32)

    def _encode(self, planes: Floats) -> Floats:
        import torch

        with torch.inference_mode():
            given = torch.from_numpy(planes).to(self._device, self._network.dtype)
            return _scores(self._network.config, self._network(pixel_values=given).logits)


def _middle(picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The picture, at most `_THINNEST` times as long as wide."""
    most = _THINNEST * min(picture.shape[:2])
    top, left = (max(0, side - most) // 2 for side in picture.shape[:2])
    return picture[top : top + most, left : left + most]


class TextLabels:
    """A transformers text classifier. `labels` are in the order of its outputs.

    RecipeError for a folder without a tokenizer, a padding token or a classifier's head.
    """

    def __init__(
        self, where: str, folder: Path, precision: Precision, device: str, rows: int, max_tokens: int | None
    ) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self._device = device
        tokenizer = load_part(where, AutoTokenizer.from_pretrained, folder)
        make = AutoModelForSequenceClassification.from_pretrained
        self._network = load_weights(where, make, folder, precision, device)
        config = self._network.config
        self.labels = labels_of(where, config.to_dict())
        if config.pad_token_id is None:  # models that read from left to right ask for it to find a text's end
            config.pad_token_id = tokenizer.pad_token_id
        longest, on_left = longest_of(where, tokenizer, config, max_tokens), config.model_type == "xlnet"
        self._batches = TokenBatches(where, tokenizer, longest, rows, on_left)

    def scores(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.int64], Floats]:
        """Indexes of the texts that have a token at all, and their scores, (N, labels) float32."""
        return self._batches.run(texts, self._encode)

    def warm_up(self) -> None:
        """One full batch of the longest texts: what does not fit in memory fails here."""
        self._batches.warm_up(self._encode)

    def _encode(self, inputs: Any) -> Floats:
        import torch

        with torch.inference_mode():
            given = {name: torch.from_numpy(array).to(self._device) for name, array in inputs.items()}
            return _scores(self._network.config, self._network(**given).logits)


def _scores(config: Any, logits: Any) -> Floats:
    kind, numbers = config.problem_type, logits.float()
    if kind == "multi_label_classification" or (kind != "regression" and config.num_labels == 1):
        numbers = numbers.sigmoid()
    elif kind != "regression":
        numbers = numbers.softmax(dim=-1)
    found: Floats = numbers.cpu().numpy()
    return found
