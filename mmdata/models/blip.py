"""BLIP's image-text matching head through transformers: how likely a text is this picture's, a pair at a time.

In: pictures as bytes, (S, S, 3) RGB, and texts. Out: the softmax probability of "match". What a plan must know is read
from the model's JSON files, without transformers or torch. Fails: RecipeError for a folder that holds no such model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mmdata.batch import pad_rows
from mmdata.errors import RecipeError
from mmdata.models.pretrained import Precision, load_part, load_weights, read_json

__all__ = ["PICTURE_SIZE", "ItmModel", "picture_size"]

PICTURE_SIZE = 384  # px, of every ITM checkpoint its authors published
_LOOKED_AT = 40  # characters of a text for each token it may have; what is beyond them is not tokenized
# Of BLIP and of CLIP, where a folder has no preprocessor_config.json.
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_MATCH = 1  # the head's second output

Floats = npt.NDArray[np.float32]


def picture_size(where: str, folder: Path | None) -> int:
    """Side in px of the square the model sees; the published checkpoints' when it is not here yet."""
    config = read_json(where, folder, "config.json") if folder is not None else None
    if config is None:
        return PICTURE_SIZE
    if not isinstance(config, dict) or config.get("model_type") != "blip":
        raise RecipeError(f"{where}: the config.json in {folder} is not a BLIP model's; expected a BLIP ITM checkpoint")
    size = (config.get("vision_config") or {}).get("image_size", PICTURE_SIZE)
    if not isinstance(size, int) or size < 1:
        raise RecipeError(f"{where}: the config.json in {folder} says that pictures are of {size!r} px")
    return size


class ItmModel:
    """One checkpoint; `rows` pairs go through at a time, padded to that number and to `max_tokens`.

    RecipeError for weights without the matching head, and for more tokens than the model has positions.
    """

    def __init__(self, where: str, folder: Path, precision: Precision, device: str, rows: int, max_tokens: int) -> None:
        import torch
        from transformers import AutoTokenizer, BlipForImageTextRetrieval

        self._rows, self._device, self._max_tokens = rows, device, max_tokens
        self._tokenizer = load_part(where, AutoTokenizer.from_pretrained, folder)
        self._network = load_weights(where, BlipForImageTextRetrieval.from_pretrained, folder, precision, device)
        self._side = picture_size(where, folder)
        positions = self._network.config.text_config.max_position_embeddings
        if max_tokens > positions:
            raise RecipeError(f"{where}: the model has room for {positions} tokens; max_tokens is {max_tokens}")
        prepared = read_json(where, folder, "preprocessor_config.json") or {}
        shape = (1, 3, 1, 1)
        self._mean = torch.tensor(prepared.get("image_mean") or _MEAN, device=device).reshape(shape)
        self._std = torch.tensor(prepared.get("image_std") or _STD, device=device).reshape(shape)

    def matches(self, pictures: Sequence[npt.NDArray[np.uint8]], texts: Sequence[str]) -> Floats:
        """(S, S, 3) pictures and as many texts → (N,) float32 in [0, 1]."""
        found = [np.empty(0, np.float32)]
        for first in range(0, len(texts), self._rows):
            some = np.stack(pictures[first : first + self._rows])
            found.append(self._batch(some, list(texts[first : first + self._rows])))
        return np.concatenate(found)

    def warm_up(self) -> None:
        """One full batch: what does not fit in memory fails here."""
        self._batch(np.zeros((self._rows, self._side, self._side, 3), np.uint8), [""] * self._rows)

    def _batch(self, pictures: npt.NDArray[np.uint8], texts: list[str]) -> Floats:
        import torch

        given: Any = self._tokenizer(
            [t[: _LOOKED_AT * self._max_tokens] for t in texts] + [""] * (self._rows - len(texts)),
            padding="max_length",
            truncation=True,
            max_length=self._max_tokens,
            return_tensors="pt",
        )
        with torch.inference_mode():
            planes = torch.from_numpy(pad_rows(pictures, self._rows)).to(self._device).permute(0, 3, 1, 2)
            normalised = (planes.float() / 255 - self._mean) / self._std
            answer = self._network(
                input_ids=given["input_ids"].to(self._device),
                attention_mask=given["attention_mask"].to(self._device),
                pixel_values=normalised.to(self._network.dtype),
                use_itm_head=True,
            )
            chances = answer.itm_score.float().softmax(dim=-1)[:, _MATCH]
        found: Floats = chances.cpu().numpy()[: len(texts)]
        return found
