"""Sentence encoders of transformers and sentence-transformers: texts in, vectors of length 1 out.

In: a folder that either library saved. What sentence-transformers adds is read from its JSON files, and its code is
not run: `modules.json` names the parts, `1_Pooling/config.json` how token vectors become one,
`sentence_bert_config.json` the longest text, `config_sentence_transformers.json` a prompt. Fails: RecipeError for
parts and poolings that are not supported.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mmdata.errors import RecipeError
from mmdata.models.pretrained import Precision, load_part, load_weights, read_json
from mmdata.models.token_batches import TokenBatches, longest_of

__all__ = ["SentenceModel", "sentence_width"]

_POOLINGS = ("mean", "cls")
Floats = npt.NDArray[np.float32]


def sentence_width(where: str, folder: Path) -> int:
    """Numbers in an embedding; RecipeError when the folder's configuration does not say."""
    _pooling(where, folder)
    config = read_json(where, folder, _transformer(where, folder) + "config.json") or {}
    width = config.get("hidden_size", config.get("dim", config.get("d_model")))
    if not isinstance(width, int) or width < 1:
        raise RecipeError(f"{where}: config.json in {folder} does not say how wide its vectors are (hidden_size)")
    return width


def _modules(where: str, folder: Path) -> list[dict[str, str]]:
    """The parts of a sentence-transformers model; empty for a folder that transformers saved."""
    found = read_json(where, folder, "modules.json") or []
    if not isinstance(found, list) or not all(isinstance(m, dict) and {"path", "type"} <= m.keys() for m in found):
        raise RecipeError(f"{where}: modules.json in {folder} is no list of parts")
    # Files further down are not looked at where the folder's content becomes part of the identity.
    if any(Path(str(m["path"])).is_absolute() or Path(str(m["path"])).parts[1:] or m["path"] == ".." for m in found):
        raise RecipeError(f"{where}: modules.json in {folder} names a part outside of it, or in a folder of a folder")
    return [{"path": str(m["path"]), "kind": str(m["type"]).rpartition(".")[2]} for m in found]


def _transformer(where: str, folder: Path) -> str:
    """Folder of the network within the model's, empty or ending in a slash."""
    paths = [m["path"] for m in _modules(where, folder) if m["kind"] == "Transformer"]
    return f"{paths[0]}/" if paths and paths[0] else ""


def _pooling(where: str, folder: Path) -> str:
    """How token vectors become one: `mean`, which plain transformers get as well, or `cls`, the first token's."""
    modules = _modules(where, folder)
    kinds = [m["kind"] for m in modules]
    if not modules:
        return "mean"
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise RecipeError(
            f"{where}: the model in {folder} is made of {', '.join(kinds)}; supported are Transformer, Pooling and "
            f"Normalize, in that order"
        )
    said = read_json(where, folder, f"{modules[1]['path']}/config.json") or {}
    mode = said.get("pooling_mode") or [
        name.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
        for name, on in said.items()
        if name.startswith("pooling_mode_") and on is True
    ]
    modes = [mode] if isinstance(mode, str) else list(mode)
    if len(modes) != 1 or modes[0] not in _POOLINGS or said.get("include_prompt", True) is not True:
        raise RecipeError(
            f"{where}: the model in {folder} pools its tokens by {' and '.join(map(str, modes)) or 'nothing'}; "
            f"supported are {' and '.join(_POOLINGS)}, prompt included"
        )
    return str(modes[0])


class SentenceModel:
    """One sentence encoder. `prompt` stands before every text, None = the folder's own default, if it has one."""

    def __init__(
        self,
        where: str,
        folder: Path,
        precision: Precision,
        device: str,
        rows: int,
        max_tokens: int | None = None,
        prompt: str | None = None,
    ) -> None:
        from transformers import AutoModel, AutoTokenizer

        inner = folder / _transformer(where, folder)
        said = read_json(where, folder, _transformer(where, folder) + "sentence_bert_config.json") or {}
        self._pooling, self.width, self._device = _pooling(where, folder), sentence_width(where, folder), device
        self._lower = bool(said.get("do_lower_case", False))
        self._prompt = _own_prompt(where, folder) if prompt is None else prompt
        tokenizer = load_part(where, AutoTokenizer.from_pretrained, inner)
        self._network = load_weights(where, AutoModel.from_pretrained, inner, precision, device)
        longest = longest_of(where, tokenizer, self._network.config, max_tokens or said.get("max_seq_length"))
        self._batches = TokenBatches(where, tokenizer, longest, rows)

    def embeddings(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.int64], Floats]:
        """Indexes of the texts that have a token at all, and their vectors, (N, width) float32 of length 1."""
        given = [self._prompt + text for text in texts]
        return self._batches.run([t.lower() for t in given] if self._lower else given, self._encode)

    def warm_up(self) -> None:
        """One full batch of the longest texts: what does not fit in memory fails here."""
        self._batches.warm_up(self._encode)

    def _encode(self, inputs: Any) -> Floats:
        import torch

        with torch.inference_mode():
            given = {name: torch.from_numpy(array).to(self._device) for name, array in inputs.items()}
            hidden = self._network(**given).last_hidden_state.float()
            if self._pooling == "cls":
                pooled = hidden[:, 0]
            else:
                weights = given["attention_mask"].unsqueeze(-1).float()
                pooled = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
            found: Floats = torch.nn.functional.normalize(pooled, dim=1).cpu().numpy()
        return found


def _own_prompt(where: str, folder: Path) -> str:
    said = read_json(where, folder, "config_sentence_transformers.json") or {}
    name = said.get("default_prompt_name")
    prompts = said.get("prompts") or {}
    return str(prompts.get(name, "")) if name is not None else ""
