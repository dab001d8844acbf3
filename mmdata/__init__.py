"""mmdata builds, curates and inspects multimodal training data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["MmdataError", "__version__", "open", "run", "stage"]
__version__ = "0.1.0"

if TYPE_CHECKING:
    from mmdata.dataset import open, run
    from mmdata.errors import MmdataError
    from mmdata.stage import stage

_LAZY = {
    "MmdataError": ("mmdata.errors", "MmdataError"),
    "open": ("mmdata.dataset", "open"),
    "run": ("mmdata.dataset", "run"),
    "stage": ("mmdata.stage", "stage"),
}


def __getattr__(name: str) -> Any:
    """Public names are loaded on first use, so that `import mmdata` stays quick."""
    if name not in _LAZY:
        raise AttributeError(f"module 'mmdata' has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _LAZY[name]
    return getattr(import_module(module), attribute)
