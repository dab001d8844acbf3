"""Processes that a reader's user forks, as DataLoader does: what the parent had left to collect is not theirs to end.

Python's collector goes over everything that was there at the fork. To end a DuckDB connection or an ONNX session in the
child, where their threads are not, crashes or hangs it: at a time that nobody chooses, and the garbage may be anyone's.
"""

from __future__ import annotations

import gc
import os
from functools import cache

__all__ = ["leave_garbage_to_parents"]


@cache
def leave_garbage_to_parents() -> None:
    """From here on, processes forked from this one never collect what was there before the fork.

    They end with it all the same, and pages that the collector does not write stay shared with the parent.
    """
    os.register_at_fork(after_in_child=gc.freeze)
