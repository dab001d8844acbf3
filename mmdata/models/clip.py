"""CLIP models through open_clip: what a model wants to see, its weights, and its two encoders.

What can be known without torch is read from open_clip's configuration files, so that a recipe is proved without it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mmdata.batch import pad_rows
from mmdata.errors import MissingExtra, RecipeError
from mmdata.registry import nearest
from mmdata.stage import Pixels, Weights

__all__ = ["LOCAL_FOLDER", "ClipModel", "Precision", "bring_weights", "image_size", "weights_of"]

Floats = npt.NDArray[np.float32]
Precision = Literal["fp32", "fp16", "bf16"]

LOCAL_FOLDER = "local-dir:"  # open_clip's own prefix for a folder with open_clip_config.json and a checkpoint
_CONFIG = "open_clip_config.json"
_CHECKPOINTS = (".safetensors", ".bin", ".pth", ".pt")
