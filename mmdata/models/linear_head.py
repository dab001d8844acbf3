"""A score that is linear in an embedding: one linear layer, or several with nothing between them.

In: a file of tensors (safetensors, or torch's own, never unpickled) and unit vectors. Out: one number a row. Several
layers without activations are one linear map: they are multiplied out once, in float64, so that a row's score is one
dot product and does not depend on its neighbours. Fails: RecipeError for a file whose tensors are no such chain.
"""

from __future__ import annotations

import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import numpy.typing as npt

from mmdata.errors import RecipeError

__all__ = ["LinearHead"]

_LAYER = re.compile(r"(?:(?P<before>.*?)\.)??(?:(?P<number>\d+)\.)?(?P<kind>weight|bias)")
_MAX_TENSORS = 64
Doubles = npt.NDArray[np.float64]


class LinearHead:
    """A linear map to one number, read from a state dict: `width` numbers in.

    The tensors are `weight` (out, in) and `bias` (out) of one layer, or `<name>.<number>.weight` and `.bias` of
    several, applied in the order of their numbers; gaps between the numbers are layers without parameters, such as
    dropout. A state dict does not say whether there are activations: here there are none.
    """

    def __init__(self, where: str, path: Path) -> None:
        layers = _layers(where, path, _tensors(where, path))
        weight, bias = layers[0]
        for upper, shift in layers[1:]:
            weight, bias = upper @ weight, upper @ bias + shift
        self._weight: Doubles = weight[0]
        self._bias = float(bias[0])
        self.width = len(self._weight)

    def scores(self, vectors: Doubles) -> Doubles:
        """(N, width) → (N,) float64."""
        found: Doubles = (vectors * self._weight).sum(axis=1) + self._bias
        return found


def _tensors(where: str, path: Path) -> dict[str, Doubles]:
    """Every tensor of the file as float64."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
            found = found["state_dict"]
        return {str(name): np.array(tensor.double().numpy()) for name, tensor in found.items()}
    except (
        SafetensorError,
        RuntimeError,
        KeyError,
        ValueError,
        OSError,
        EOFError,
        AttributeError,
        UnpicklingError,
    ) as error:
        raise _refused(where, path, f"it is no file of tensors: {' '.join(str(error).split())[:200]}") from None


def _layers(where: str, path: Path, tensors: dict[str, Doubles]) -> list[tuple[Doubles, Doubles]]:
    if len(tensors) > _MAX_TENSORS:
        raise _refused(where, path, f"it has {len(tensors)} tensors; is it a whole model?")
    kinds: dict[int, dict[str, Doubles]] = {}
    names = set()
    for name, tensor in tensors.items():
        match = _LAYER.fullmatch(name)
        if match is None:
            raise _refused(where, path, f"the tensor {name!r} is neither a weight nor a bias of a linear layer")
        names.add(match["before"] or "")
        number = int(match["number"] or 0)
        if match["kind"] in kinds.setdefault(number, {}):
            raise _refused(where, path, f"there are two layers {number}")
        kinds[number][match["kind"]] = tensor
    if not kinds or len(names) > 1:
        raise _refused(where, path, f"its tensors are of {len(names)} stacks of layers, not of one")
    layers: list[tuple[Doubles, Doubles]] = []
    for number, layer in sorted(kinds.items()):
        weight = layer.get("weight")
        if weight is None or weight.ndim != 2:
            raise _refused(where, path, f"layer {number} has no weight of two dimensions")
        bias = layer.get("bias", np.zeros(len(weight)))
        into = layers[-1][0].shape[0] if layers else weight.shape[1]
        if bias.shape != (len(weight),) or weight.shape[1] != into:
            raise _refused(where, path, f"layer {number} is {weight.shape} with a bias of {bias.shape}, after {into}")
        layers.append((weight, bias))
    if len(layers[-1][0]) != 1:
        raise _refused(where, path, f"its last layer gives {len(layers[-1][0])} numbers, not one")
    return layers


def _refused(where: str, path: Path, why: str) -> RecipeError:
    return RecipeError(f"{where}: {path} is not a score that is linear in an embedding ({why}); check `weights`")
