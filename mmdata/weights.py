"""What a weights file is: its sha256, remembered by path, size and time of change."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from functools import cache

from mmdata.errors import MissingExtra, RecipeError
from mmdata.stage import Contract

__all__ = ["file_fingerprint", "with_fingerprints"]


def with_fingerprints(where: str, contract: Contract) -> Contract:
    """The contract with the fingerprint of every weights file that lies on this disk; MissingExtra when one is not.

    RecipeError where the options do not say yet which file it is.
    """
    for weights in contract.weights:
        if weights.missing is not None:
            raise RecipeError(f"{where}: {weights.missing}")
    return replace(
        contract,
        weights=tuple(
            replace(w, fingerprint=file_fingerprint(where, w.path)) if w.path and w.fingerprint is None else w
            for w in contract.weights
        ),
    )


def file_fingerprint(where: str, path: str) -> str:
    """`sha256:<hex>` of a file; MissingExtra when it cannot be read."""
    try:
        found = os.stat(path)
        return _sha256(os.path.abspath(path), found.st_size, found.st_mtime_ns)
    except OSError as error:
        raise MissingExtra(f"{where}: cannot read the weights {path} ({error.strerror}); check the path") from None


@cache
def _sha256(path: str, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
