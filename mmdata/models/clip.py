"""CLIP models through open_clip: what a model wants to see, its weights, and its two encoders.

What a plan must know is read from open_clip's configuration files, without open_clip or torch. Checkpoints are loaded
as plain tensors, never unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mmdata.batch import pad_rows
from mmdata.errors import MissingExtra, RecipeError
from mmdata.stage import Pixels, Weights

__all__ = [
    "LOCAL_FOLDER",
    "ClipModel",
    "Precision",
    "bring_weights",
    "embedding_size",
    "image_size",
    "prompt_embeddings",
    "weights_of",
]

Floats = npt.NDArray[np.float32]
Pictures = Sequence[npt.NDArray[np.uint8]] | npt.NDArray[np.uint8]
Precision = Literal["fp32", "fp16", "bf16"]

LOCAL_FOLDER = "local-dir:"  # open_clip's own prefix for a folder that holds open_clip_config.json and a checkpoint
_CONFIG = "open_clip_config.json"
_CHECKPOINTS = (".safetensors", ".bin", ".pth")  # what open_clip looks for in a folder
_FITS = {"shortest": "center_crop", "squash": "stretch"}
_CONTEXT = 77  # tokens
_LOOKED_AT = 40  # characters of a text for each token of the context; what is beyond them is not tokenized
_WORDS = 500_000  # kept by a tokenizer, some 100 MB
_INSTALL = "pip install 'mmdata[clip]'"


def image_size(model: str) -> int | None:
    """Side in px of the square the model sees; None when open_clip is not installed here.

    RecipeError for an architecture that open_clip does not have, or that sees oblong pictures.
    """
    config = _model_config(model)
    if config is None:
        return None
    size = config.get("vision_cfg", {}).get("image_size", 224)
    sides = set(size) if isinstance(size, list) else {size}
    if len(sides) != 1:
        raise RecipeError(f"CLIP: model {model} sees pictures of {size} px, and only square ones are supported")
    return int(sides.pop())


def embedding_size(model: str) -> int | None:
    """Numbers in an embedding of the model; None when open_clip is not installed here, RecipeError as `image_size`."""
    config = _model_config(model)
    return None if config is None else int(config["embed_dim"])


def _model_config(model: str) -> dict[str, Any] | None:
    if model.startswith(LOCAL_FOLDER):
        path = Path(model.removeprefix(LOCAL_FOLDER)) / _CONFIG
        return dict(_read_config(path, f"CLIP: model {model} needs the file {path}").get("model_cfg", {}))
    # Finding the package runs none of its code; its configurations are files beside it.
    found = find_spec("open_clip")
    if found is None or found.origin is None:
        return None
    folder = Path(found.origin).parent / "model_configs"
    path = folder / f"{model.replace('/', '-')}.json"
    known = sorted(p.stem for p in folder.glob("*.json"))
    if path.stem not in known:
        raise RecipeError(
            f"CLIP: open_clip has no model {model!r}; {_near(path.stem, known)}; a model of your own is a folder "
            f"with {_CONFIG} and a checkpoint, written {LOCAL_FOLDER}PATH"
        )
    return _read_config(path, f"CLIP: {path.name} of open_clip")


def _near(word: str, known: Sequence[str]) -> str:
    from difflib import get_close_matches

    close = get_close_matches(word, known, n=3, cutoff=0.5) or ["ViT-B-32", "ViT-L-14"]
    return f"near: {', '.join(close)}"


def _read_config(path: Path, what: str) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{what}, which cannot be read ({error})") from None
    if not isinstance(config, dict):
        raise RecipeError(f"{what}, which holds no JSON object")
    return config


def weights_of(model: str, pretrained: str) -> tuple[Weights, ...]:
    """The files that decide the model's numbers: the checkpoint, and the configuration of a local folder.

    Local files are told by path, for the planner to fingerprint; a tag's checkpoint is fingerprinted by
    `bring_weights`. RecipeError when a file is not there, or a local folder has no checkpoint or more than one.
    """
    if model.startswith(LOCAL_FOLDER):
        folder = Path(model.removeprefix(LOCAL_FOLDER))
        found = [p for p in sorted(folder.iterdir()) if p.suffix in _CHECKPOINTS]
        if len(found) != 1:
            names = ", ".join(p.name for p in found) or "none"
            raise RecipeError(f"CLIP: {folder} must hold exactly one checkpoint, but holds {names}")
        return _local("config", folder / _CONFIG), _local("clip", found[0])
    if _is_path(pretrained):
        return (_local("clip", Path(pretrained)),)
    return (Weights("clip"),)


def _is_path(pretrained: str) -> bool:
    """A tag has neither a slash nor an extension."""
    return "/" in pretrained or Path(pretrained).suffix in (*_CHECKPOINTS, ".pt", ".npz")


def _local(name: str, path: Path) -> Weights:
    if not path.is_file():
        raise RecipeError(f"CLIP: there is no file {path}; give an open_clip tag or the path of a checkpoint")
    return Weights(name, path=str(path), size_bytes=path.stat().st_size)


def bring_weights(model: str, pretrained: str) -> dict[str, str]:
    """Download what a tag names, unless open_clip's cache has it; weights name → sha256. Empty for local files.

    RecipeError for a tag the model does not have; MissingExtra when it cannot be downloaded.
    """
    if model.startswith(LOCAL_FOLDER) or _is_path(pretrained):
        return {}
    with open(_checkpoint(model, pretrained), "rb") as file:
        return {"clip": f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"}


def _checkpoint(model: str, pretrained: str) -> str:
    """Path of the checkpoint of a tag or path, downloaded when it is not there yet."""
    if _is_path(pretrained):
        return pretrained
    import open_clip

    name = model.replace("/", "-")
    config = open_clip.get_pretrained_cfg(name, pretrained)
    if not config:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise RecipeError(f"CLIP: model {model} has no weights called {pretrained!r}; open_clip knows: {tags}")
    _require_same_activation(name, pretrained, config)
    try:
        return str(open_clip.download_pretrained(config))
    except Exception as error:  # noqa: BLE001  hub clients raise anything; it becomes one sentence
        command = f"python -c \"import open_clip; open_clip.create_model('{name}', pretrained='{pretrained}')\""
        detail = " ".join(str(error).split())[:200]
        raise MissingExtra(
            f"CLIP: the weights {pretrained} of {model} are not here and cannot be downloaded ({detail}); where "
            f"there is a network, type: {command}, or give the path of a checkpoint as `pretrained`"
        ) from None


def _require_same_activation(model: str, pretrained: str, config: dict[str, Any]) -> None:
    """RecipeError when weights trained with QuickGELU meet the form of the architecture without it.

    open_clip lists such pairs and only warns, and every score is then a little wrong.
    """
    import open_clip

    has = (open_clip.get_model_config(model) or {}).get("quick_gelu", False)
    other = f"{model}-quickgelu"
    if config.get("quick_gelu", False) and not has and other in open_clip.list_models():
        raise RecipeError(
            f"CLIP: the weights {pretrained} were trained with QuickGELU, which {model} does not have; "
            f"set model: {other}"
        )


class ClipModel:
    """Both encoders of one checkpoint. `rows` pictures or texts go through at a time, padded to that number.

    RecipeError when the checkpoint was trained on pictures prepared in another way than `pixels`.
    """

    def __init__(
        self, model: str, pretrained: str, pixels: Pixels, precision: Precision, device: str, rows: int
    ) -> None:
        import open_clip
        import torch

        self._rows, self._device = rows, device
        self._model = _load(model, pretrained, precision, device).eval()
        self._tokenizer = open_clip.get_tokenizer(model)
        self._first_words = dict(getattr(self._tokenizer, "cache", {}))
        self._longest = _LOOKED_AT * int(getattr(self._tokenizer, "context_length", None) or _CONTEXT)
        preprocess = open_clip.get_model_preprocess_cfg(self._model)
        _require_same_pictures(model, preprocess, pixels)
        # float32 as torchvision's ToTensor and Normalize compute: x / 255, then (x - mean) / std.
        shape = (1, 3, 1, 1)
        self._mean = torch.tensor(preprocess["mean"], device=device).reshape(shape)
        self._std = torch.tensor(preprocess["std"], device=device).reshape(shape)
        self._dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
        self._is_far = device != "cpu"
        if self._is_far:
            self._model = self._model.to(memory_format=torch.channels_last)
        side = pixels.size or 0
        # A batch as bytes, a quarter of what it is as floats; from pinned memory it crosses to the device while this
        # process goes on to the texts.
        self._buffer = torch.zeros((rows, side, side, 3), dtype=torch.uint8, pin_memory=self._is_far)
        if precision == "fp32":
            # The short cut of newer GPUs keeps 10 bits of a float's 23.
            torch.backends.cudnn.allow_tf32 = False
            torch.backends.cuda.matmul.allow_tf32 = False

    def both(self, pictures: Pictures, texts: Sequence[str]) -> tuple[Floats, Floats]:
        """What `images` and `texts` give; texts are tokenised while the device works on the pictures."""
        images = self._launch_images(pictures)
        words = self._launch_texts(texts)
        return _gathered(images), _gathered(words)

    def images(self, pictures: Pictures) -> Floats:
        """N pictures, (S, S, 3) uint8 RGB each → (N, D) float32 of length 1."""
        return _gathered(self._launch_images(pictures))

    def texts(self, texts: Sequence[str]) -> Floats:
        """(N, D) float32 of length 1; a text is cut at the context, and before that at 40 characters for each token."""
        return _gathered(self._launch_texts(texts))

    def warm_up(self) -> None:
        """One full batch through each encoder: what does not fit in memory fails here."""
        self.both(np.zeros(self._buffer.shape, np.uint8), [""] * self._rows)

    def _launch_images(self, pictures: Pictures) -> list[Any]:
        """Unit vectors on the device, a tensor a batch; it may still be at work on them."""
        import torch

        found = []
        held = self._buffer.numpy()
        for first in range(0, len(pictures), self._rows):
            some = pictures[first : first + self._rows]
            if first and self._is_far:
                torch.cuda.synchronize()  # the buffer may not have left yet
            np.stack(list(some), out=held[: len(some)])
            held[len(some) :] = 0
            with torch.inference_mode():
                planes = self._buffer.to(self._device, non_blocking=True).permute(0, 3, 1, 2)
                # On a device channels stay last, as its convolutions want them.
                planes = planes.float() if self._is_far else planes.contiguous().float()
                normalised = ((planes / 255 - self._mean) / self._std).to(self._dtype)
                found.append(_unit(self._model.encode_image(normalised))[: len(some)])
        return found

    def _launch_texts(self, texts: Sequence[str]) -> list[Any]:
        import torch

        found = []
        for first in range(0, len(texts), self._rows):
            some = [text[: self._longest] for text in texts[first : first + self._rows]]
            tokens = torch.from_numpy(pad_rows(self._tokenizer(some).numpy(), self._rows))
            self._forget_words()
            with torch.inference_mode():
                found.append(_unit(self._model.encode_text(tokens.to(self._device)))[: len(some)])
        return found

    def _forget_words(self) -> None:
        """open_clip's tokenizer remembers every word it has met, and captions have no end of them."""
        if len(getattr(self._tokenizer, "cache", ())) > _WORDS:
            self._tokenizer.cache = dict(self._first_words)


def _unit(features: Any) -> Any:
    import torch

    return torch.nn.functional.normalize(features.float(), dim=-1)


def _gathered(launched: Sequence[Any]) -> Floats:
    return np.concatenate([t.cpu().numpy() for t in launched]) if launched else np.empty((0, 1), np.float32)


def prompt_embeddings(model: str, pretrained: str, prompts: Sequence[str]) -> Floats:
    """(N, D) float32 of length 1, in float32 on the CPU: for few prompts, compared with embeddings made before.

    Only the text encoder is run, and the model is let go afterwards.
    """
    import open_clip
    import torch

    loaded = _load(model, pretrained, "fp32", "cpu").eval()
    del loaded.visual
    tokens = open_clip.get_tokenizer(model)(list(prompts))
    with torch.inference_mode():
        found: Floats = torch.nn.functional.normalize(loaded.encode_text(tokens).float(), dim=-1).numpy()
    return found


def _load(model: str, pretrained: str, precision: Precision, device: str) -> Any:
    import open_clip
    import torch

    # A tag is given as the tag, for it also says how pictures are prepared.
    given = {} if model.startswith(LOCAL_FOLDER) else {"pretrained": pretrained}
    if given:
        _checkpoint(model, pretrained)
    try:
        return open_clip.create_model(
            model, **given, precision=precision, device=device, weights_only=True, require_pretrained=True
        )
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, KeyError, ValueError, OSError, UnpicklingError) as error:
        detail = " ".join(str(error).split())[:300]
        raise RecipeError(
            f"CLIP: the checkpoint {pretrained if given else model} is not one of tensors for this architecture "
            f"({detail}); check `model` and `pretrained`"
        ) from None


def _require_same_pictures(model: str, preprocess: dict[str, Any], pixels: Pixels) -> None:
    size = preprocess["size"]
    side = size[0] if isinstance(size, tuple | list) else size
    fit = _FITS.get(preprocess["resize_mode"])
    if fit is None:
        raise RecipeError(
            f"CLIP: model {model} was trained on pictures resized by {preprocess['resize_mode']!r}, which is not "
            f"supported; choose another model"
        )
    wanted = Pixels(side, fit, preprocess["interpolation"])  # type: ignore[arg-type]
    if wanted != replace(pixels, flipped=False, masked=None):
        raise RecipeError(
            f"CLIP: model {model} was trained on other pictures than the options say; set image_size: {side}, "
            f"fit: {fit}, resample: {wanted.resample}"
        )
