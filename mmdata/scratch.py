"""Local scratch folders, named after the process that made them, so that a dead process's are known and removed.

They lie under `MMDATA_SCRATCH`, or under `mmdata-<uid>` in the system's temporary folder.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mmdata.errors import StoreError
from mmdata.lease import ProcessId

__all__ = ["scratch_folder", "scratch_root", "stale_scratch"]

_swept: set[tuple[int, str]] = set()  # (pid, scratch root): each process sweeps once


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A fresh folder of this process, removed at the end of the `with`; the first call sweeps what dead ones left."""
    root = scratch_root()
    if (os.getpid(), str(root)) not in _swept:
        _swept.add((os.getpid(), str(root)))
        for folder in stale_scratch():
            shutil.rmtree(folder, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{ProcessId.current().token()}.", dir=root))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def stale_scratch() -> list[Path]:
    """Scratch folders on this host whose process is dead."""
    found = []
    for folder in sorted(scratch_root().iterdir()):
        owner = ProcessId.from_token(folder.name.rpartition(".")[0])
        if owner is not None and owner.is_dead():
            found.append(folder)
    return found


def scratch_root() -> Path:
    """This user's folder for scratch on this node, made where it is not there; StoreError when it cannot be used."""
    given = os.environ.get("MMDATA_SCRATCH")
    root = Path(given) if given else Path(tempfile.gettempdir()) / f"mmdata-{os.geteuid()}"
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = root.lstat()
    except OSError as error:
        raise StoreError(f"no scratch folder at {root}: {error.strerror}; set MMDATA_SCRATCH to a folder") from error
    # The shared temporary folder's name can be guessed: somebody else may have made it first.
    if not given and (not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid()):
        raise StoreError(f"{root} belongs to another user; set MMDATA_SCRATCH to a folder of your own")
    return root
