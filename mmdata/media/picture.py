"""What every part that handles pictures shares: the array, the largest one, and the error of bytes that give none."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

__all__ = ["MAX_PIXELS", "DecodeError", "Picture", "short_text"]

Picture = npt.NDArray[np.uint8]  # (H, W, 3) RGB

MAX_PIXELS = 2**28 // 3  # 256 MiB decoded; the number at which Pillow starts to warn


class DecodeError(Exception):
    """Bytes that give no picture. `kind` is `not_media`, `decode` or `too_many_pixels`; str() is a short detail."""

    def __init__(self, kind: Literal["not_media", "decode", "too_many_pixels"], detail: str) -> None:
        super().__init__(kind, detail)
        self.kind = kind
        self.detail = detail

    def __str__(self) -> str:
        """The detail alone."""
        return self.detail


def short_text(text: str) -> str:
    """A foreign library's words on one line, 160 characters at most."""
    return " ".join(text.split())[:160]
