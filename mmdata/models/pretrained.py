"""Models of transformers by a folder or a hub's name: what a plan must know of them, and the folder to load them from.

In: a folder that `save_pretrained` (or sentence-transformers' `save`) wrote, or a hub name with the commit. A hub's
branch moves and a commit does not, so the commit is the fingerprint, and a download is the same on every machine.
What a plan must know is read from the JSON files beside the weights, without transformers or torch. Code that lies
beside weights is never run, and weights are read as plain tensors. Fails: RecipeError for what is no model of the
wanted kind; MissingExtra when a hub's model is not here and cannot be downloaded.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from mmdata.errors import MissingExtra, RecipeError
from mmdata.stage import Weights

__all__ = [
    "Precision",
    "bring_folder",
    "folder_here",
    "labels_of",
    "load_part",
    "load_weights",
    "pretrained_weights",
    "read_json",
]

Precision = Literal["fp32", "fp16", "bf16"]

_HUB_NAME = re.compile(r"[A-Za-z0-9_.-]+(?:/[A-Za-z0-9_.-]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SMALL = ("*.json", "*.txt", "*.model", "*.jinja")
_LARGE = ("*.safetensors", "*.bin")
_ELSEWHERE = ("onnx/*", "openvino/*", "coreml/*", "original/*")


def pretrained_weights(where: str, model: str, revision: str | None) -> tuple[Weights, ...]:
    """What a contract says of the model: every file of a folder, or the commit of a hub's. Nothing is downloaded.

    RecipeError when there is no such folder, it holds no configuration or no weights, or a hub name has no commit.
    """
    folder = Path(model)
    if folder.is_dir():
        if revision is not None:
            raise RecipeError(f"{where}: {model} is a folder, which has no `revision`; leave it out")
        return _folder_weights(where, folder)
    if not _HUB_NAME.fullmatch(model):
        raise RecipeError(f"{where}: there is no folder {model}; give a folder with config.json, or a hub's org/name")
    if revision is None or not _COMMIT.fullmatch(revision):
        raise RecipeError(
            f"{where}: there is no folder {model} here, and as a name on the hub it needs `revision`, the 40 hex "
            f"digits of a commit (a branch moves; its page lists the commits)"
        )
    return (Weights("model", fingerprint=f"commit:{revision}"),)


def _folder_weights(where: str, folder: Path) -> tuple[Weights, ...]:
    if not (folder / "config.json").is_file():
        raise RecipeError(f"{where}: {folder} holds no config.json; expected a folder that save_pretrained wrote")
    files = [p for pattern in (*_SMALL, *_LARGE) for p in (*folder.glob(pattern), *folder.glob(f"*/{pattern}"))]
    names = {p.relative_to(folder).as_posix(): p for p in files if p.is_file()}
    safe = [n for n in names if n.endswith(".safetensors")]
    if not safe and not any(n.endswith(".bin") for n in names):
        raise RecipeError(f"{where}: {folder} holds no weights (*.safetensors or *.bin)")
    kept = {n: p for n, p in names.items() if not (safe and n.endswith(".bin"))}
    return tuple(Weights(n, path=str(p), size_bytes=p.stat().st_size) for n, p in sorted(kept.items()))


def folder_here(model: str, revision: str | None) -> Path | None:
    """The folder of a model that is on this machine, as it is or in the hub's cache; None when it is to be fetched."""
    if Path(model).is_dir():
        return Path(model)
    cache = os.environ.get("HF_HUB_CACHE")
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    root = Path(cache) if cache else Path(home) / "hub"
    folder = root / f"models--{model.replace('/', '--')}" / "snapshots" / str(revision)
    return folder if folder.is_dir() else None


def read_json(where: str, folder: Path, name: str) -> Any:
    """What a JSON file of the folder holds, None when it has no such file; RecipeError when it cannot be read."""
    path = folder / name
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{where}: {path} cannot be read ({error})") from None


def labels_of(where: str, config: Any) -> list[str]:
    """A classifier's labels in the order of its outputs, from its config.json; RecipeError when it has none."""
    named = config.get("id2label") if isinstance(config, dict) else None
    if named is None and isinstance(config, dict):  # as transformers reads it: two labels unless it says otherwise
        count = config.get("num_labels", 2)
        named = {str(i): f"LABEL_{i}" for i in range(count if isinstance(count, int) else 0)}
    named = {str(i): n for i, n in named.items()} if isinstance(named, dict) else {}
    if not named or sorted(named) != sorted(map(str, range(len(named)))):
        raise RecipeError(f"{where}: the config.json of the model names no labels (id2label); is it a classifier?")
    return [str(named[str(i)]) for i in range(len(named))]


def bring_folder(where: str, model: str, revision: str | None) -> Path:
    """The folder to load from, downloaded when it is a hub's; MissingExtra when it cannot be."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        small = (*_SMALL, _LARGE[0])
        folder = snapshot_download(model, revision=revision, allow_patterns=list(small), ignore_patterns=[*_ELSEWHERE])
        if not list(Path(folder).glob(_LARGE[0])):
            bins = [*_SMALL, _LARGE[1]]
            folder = snapshot_download(model, revision=revision, allow_patterns=bins, ignore_patterns=[*_ELSEWHERE])
    except Exception as error:  # noqa: BLE001  hub clients raise anything; it becomes one sentence
        detail = " ".join(str(error).split())[:200]
        raise MissingExtra(
            f"{where}: the model {model} is not here and cannot be downloaded ({detail}); where there is a network, "
            f"type: hf download {model} --revision {revision}, or give a folder as `model`"
        ) from None
    _folder_weights(where, Path(folder))
    return Path(folder)


def load_part(where: str, make: Callable[..., Any], folder: Path, **given: Any) -> Any:
    """A tokenizer or processor by a class's `from_pretrained`; RecipeError when the folder has none."""
    try:
        return make(str(folder), local_files_only=True, trust_remote_code=False, **given)
    except Exception as error:  # noqa: BLE001  whatever a stranger's configuration makes the library raise
        raise _not_loaded(where, folder, error) from None


def load_weights(where: str, make: Callable[..., Any], folder: Path, precision: Precision, device: str) -> Any:
    """A network by an auto class's `from_pretrained`, ready to run. RecipeError when tensors of it are not in the file.

    Such tensors would be random, and so would the scores.
    """
    import torch
    from transformers.utils import logging

    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # one line per worker otherwise
    try:
        # Where nothing is said, transformers asks at the terminal whether code beside the weights may run.
        network, info = make(
            str(folder), local_files_only=True, trust_remote_code=False, dtype=dtype, output_loading_info=True
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001  whatever a stranger's file makes the libraries raise
        raise _not_loaded(where, folder, error) from None
    _require_all(where, folder, [*info["missing_keys"], *(k[0] for k in info["mismatched_keys"])])
    if precision == "fp32":
        # The short cut of newer GPUs keeps 10 bits of a float's 23.
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
    return network.eval().to(device)


def _require_all(where: str, folder: Path, lacking: Sequence[str]) -> None:
    # Poolers that some architectures have and sentence encoders do not use are left out of many files.
    needed = sorted(k for k in lacking if not k.startswith("pooler."))
    if needed:
        more = f" and {len(needed) - 3} more" if len(needed) > 3 else ""
        raise RecipeError(
            f"{where}: the weights in {folder} lack {', '.join(needed[:3])}{more}, which would be random; "
            f"the model was not trained for this task, or the file is not whole"
        )


def _not_loaded(where: str, folder: Path, error: Exception) -> RecipeError:
    detail = " ".join(str(error).split())[:300]
    return RecipeError(
        f"{where}: {folder} is no model of transformers for this task that needs no code of its own ({detail}); "
        f"check `model`"
    )
