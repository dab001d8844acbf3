"""Texts to fixed batches of tokens: a text's numbers depend on the text, and not on its neighbours.

In: texts and a tokenizer of transformers. Out: what a network answers, one row a text. A text is cut at `longest`
tokens and padded to the smallest of few lengths that holds it; `rows` texts of one length go through at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mmdata.errors import RecipeError

__all__ = ["LOOKED_AT", "TokenBatches", "longest_of"]

LOOKED_AT = 40  # characters of a text for each token it may have; what is beyond them is not tokenized
_SHORTEST = 16
_UNLIMITED = 1_000_000  # tokenizers that know no limit say a number far above
# Their first positions stand for padding: RoBERTa and what is made like it.
_POSITIONS_AFTER_PADDING = frozenset(
    "roberta xlm-roberta xlm-roberta-xl roberta-prelayernorm camembert mpnet longformer data2vec-text ibert".split()
)

Floats = npt.NDArray[np.float32]
# A network's inputs, name → (rows, length) int64, to its answer, (rows, width) float32.
Encode = Callable[[Mapping[str, npt.NDArray[np.int64]]], Floats]


def longest_of(where: str, tokenizer: Any, config: Any, asked: int | None) -> int:
    """Tokens a text may have: what is asked, within what the tokenizer and the model's positions allow.

    RecipeError when more is asked than the model has positions, or nobody knows a limit.
    """
    positions = getattr(config, "max_position_embeddings", None) or _UNLIMITED
    if config.model_type in _POSITIONS_AFTER_PADDING:
        positions -= (config.pad_token_id or 0) + 1
    if asked is not None and asked > positions:
        raise RecipeError(f"{where}: the model has room for {positions} tokens; max_tokens is {asked}")
    longest = asked or min(tokenizer.model_max_length, positions)
    taken = tokenizer.num_special_tokens_to_add()
    if longest <= taken:
        raise RecipeError(f"{where}: max_tokens is {longest}, of which the tokenizer takes {taken} for its own marks")
    if longest >= _UNLIMITED:
        raise RecipeError(f"{where}: the model does not say how many tokens a text may have; set max_tokens")
    return int(longest)


class TokenBatches:
    """One tokenizer, and the fixed shapes its texts go through a network in.

    Padding follows the text, also where the tokenizer would put it first: there it moves the positions of most models,
    and their numbers with it. XLNet, which counts from the end, wants it first (`on_left`). RecipeError for a tokenizer
    without a padding token: its model cannot see several texts at once.
    """

    def __init__(self, where: str, tokenizer: Any, longest: int, rows: int, on_left: bool = False) -> None:
        if tokenizer.pad_token_id is None:
            raise RecipeError(f"{where}: the model's tokenizer has no padding token; choose another model")
        self._tokenizer, self._rows, self._longest = tokenizer, rows, longest
        self._on_left = on_left
        self._has_types = "token_type_ids" in tokenizer.model_input_names
        lengths = [_SHORTEST]
        while lengths[-1] < longest:
            lengths.append(lengths[-1] * 2)
        self._lengths = [*lengths[:-1], longest]

    def run(self, texts: Sequence[str], encode: Encode) -> tuple[npt.NDArray[np.int64], Floats]:
        """Indexes of the texts that have a token at all, and their answers in that order, (N, width) float32."""
        found = self._tokenize(texts)
        sizes = np.array([len(ids) for ids in found["input_ids"]], np.int64)
        there = np.flatnonzero(sizes)
        answers: dict[int, npt.NDArray[np.float32]] = {}
        bucket = np.searchsorted(self._lengths, sizes)
        for index in np.unique(bucket[there]):
            members = there[bucket[there] == index]
            for first in range(0, len(members), self._rows):
                some = members[first : first + self._rows]
                answer = encode(self._padded({n: [v[i] for i in some] for n, v in found.items()}, int(index)))
                answers.update(zip(some.tolist(), answer, strict=False))
        return there, np.stack([answers[i] for i in there.tolist()]) if len(there) else np.empty((0, 1), np.float32)

    def warm_up(self, encode: Encode) -> None:
        """One full batch of the longest texts: what does not fit in memory fails here."""
        names = ["input_ids", *(["token_type_ids"] if self._has_types else [])]
        encode(self._padded({n: [[0] * self._longest] * self._rows for n in names}, len(self._lengths) - 1))

    def _tokenize(self, texts: Sequence[str]) -> dict[str, list[list[int]]]:
        seen = [text[: LOOKED_AT * self._longest] for text in texts]
        if not seen:
            return {"input_ids": []}
        found = self._tokenizer(seen, truncation=True, max_length=self._longest, padding=False)
        return {n: found[n] for n in ("input_ids", "token_type_ids") if n in found}

    def _padded(self, found: Mapping[str, list[list[int]]], index: int) -> dict[str, npt.NDArray[np.int64]]:
        shape = (self._rows, self._lengths[index])
        fill = {"input_ids": self._tokenizer.pad_token_id, "token_type_ids": self._tokenizer.pad_token_type_id}
        arrays = {name: np.full(shape, fill[name], np.int64) for name in found}
        mask = np.zeros(shape, np.int64)
        mask[:, -1 if self._on_left else 0] = 1  # a padded row attends to something, or its softmax is NaN
        for row, ids in enumerate(found["input_ids"]):
            place = slice(shape[1] - len(ids), None) if self._on_left else slice(len(ids))
            mask[row, place] = 1
            for name, array in arrays.items():
                array[row, place] = found[name][row]
        return {**arrays, "attention_mask": mask}
