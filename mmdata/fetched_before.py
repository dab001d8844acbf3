"""What other datasets hold already (`fetch.skip_existing`): rows with their URL or their bytes are not stored again.

In: dataset folders. Out: for URLs and for the sha256 of a body, None or a few words that name the dataset, which become
the `status_detail` of a row with the status `filtered`. A URL counts as written, and where its row there is `ok`; so do
bytes. What counts is what the folders held when the run began. `EarlierFiles` is what is sent to workers: names only.
The first process of a node that needs them builds two indexes on disk, 32 bytes a row each, and all processes of the
node map the same files; memory stays bounded however long the lists are. RecipeError for a folder that is no dataset,
or is the dataset itself; StoreError for a torn file, or where there is no room.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mmdata.errors import RecipeError, StoreError
from mmdata.joins.keys import IndexBuilder, JoinColumn, KeyIndex, keys_of
from mmdata.scratch import scratch_root
from mmdata.store import Store

__all__ = ["EarlierFiles", "FetchedBefore", "earlier_files"]

_KINDS: tuple[JoinColumn, ...] = ("url", "sha256")
_DONE = "index.json"  # written last
_PREFIX = "earlier-"


@dataclass(frozen=True)
class EarlierFiles:
    """The datasets as the recipe names them, where they are, and their rows files when the run began; pickles."""

    names: tuple[str, ...]
    urls: tuple[str, ...]
    files: tuple[tuple[str, ...], ...]

    @property
    def fingerprint(self) -> str:
        """32 hex digits over the files; rows files are written once, so that the names say it all."""
        text = json.dumps([self.names, self.urls, self.files])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def load(self) -> FetchedBefore:
        """The indexes, opened once per process and built once per node."""
        if self not in _loaded:
            _loaded.clear()
            _loaded[self] = FetchedBefore(self)
        return _loaded[self]


_loaded: dict[EarlierFiles, FetchedBefore] = {}


def earlier_files(folders: Sequence[str], here: Store) -> EarlierFiles | None:
    """What `fetch.skip_existing` names, looked at; None when it names nothing."""
    found = []
    for name in folders:
        store = Store(name)
        if store.url == here.url:
            raise RecipeError(
                f"fetch.skip_existing names {name!r}, this dataset itself; its rows are never fetched twice"
            )
        if not store.exists("dataset.json"):
            raise RecipeError(f"fetch.skip_existing: there is no dataset at {store.url}; name dataset folders")
        found.append((name, store.url, tuple(store.row_files().values())))
    return EarlierFiles(*(tuple(column) for column in zip(*found, strict=True))) if found else None


class FetchedBefore:
    """The indexes of one node, removed when the last process has let go of them. Thread-safe."""

    def __init__(self, earlier: EarlierFiles) -> None:
        self._names = earlier.names
        folder = scratch_root() / f"{_PREFIX}{earlier.fingerprint}"
        lock = _shared(folder)  # held as long as this lives, so that nobody removes the folder
        weakref.finalize(self, _let_go, lock)  # also at the end of the process
        if not (folder / _DONE).exists():
            with _alone(folder), _explained(folder):
                if not (folder / _DONE).exists():
                    _build(earlier, folder)
        self._ends = np.array(json.loads((folder / _DONE).read_bytes())["ends"], np.int64)
        self._indexes = {kind: _open(folder / kind) for kind in _KINDS}

    def urls(self, urls: Sequence[str | None]) -> list[str | None]:
        """For each URL, the words when it was fetched ok before; one call for many is much quicker than many calls."""
        rows = self._find("url", urls)
        return [None if row < 0 else f"this URL is in {self._dataset(row)}" for row in rows]

    def body(self, sha256: str | None) -> str | None:
        """The words when bytes of this sha256 are stored already."""
        [row] = self._find("sha256", [sha256])
        return None if row < 0 else f"these bytes are in {self._dataset(row)}"

    def _find(self, kind: JoinColumn, texts: Sequence[str | None]) -> list[int]:
        return list(self._indexes[kind].find(*keys_of(kind, pa.array(texts, pa.string()))).tolist())

    def _dataset(self, row: int) -> str:
        return self._names[int(np.searchsorted(self._ends, row, "right"))]


def _build(earlier: EarlierFiles, folder: Path) -> None:
    """Index every ok row of the datasets; rows count on from one dataset to the next, `ends` say where each ends."""
    for kind in _KINDS:
        shutil.rmtree(folder / kind, ignore_errors=True)
        (folder / kind).mkdir()
    builders = {kind: IndexBuilder(folder / kind) for kind in _KINDS}
    ends: list[int] = []
    for url, files in zip(earlier.urls, earlier.files, strict=True):
        store = Store(url)
        for name in files:
            table = store.read_table(name, ["status", *_KINDS])
            table = table.filter(pc.equal(table.column("status"), "ok"))
            for kind, builder in builders.items():
                builder.add(*keys_of(kind, table.column(kind)))
        ends.append(builders["url"].rows)
    for kind, builder in builders.items():
        made = builder.finish()
        parts = {"mixed": made.mixed, "keys": made.keys, "rows": made.rows}
        for name, values in parts.items():
            if not (folder / kind / name).exists():  # it stayed in memory
                values.tofile(folder / kind / name)
    (folder / _DONE).write_text(json.dumps({"ends": ends}))


def _open(folder: Path) -> KeyIndex:
    size = (folder / "mixed").stat().st_size // 8

    def mapped(name: str, kind: Any, *shape: int) -> npt.NDArray[Any]:
        return np.memmap(folder / name, kind, "r", shape=shape) if size else np.empty(shape, kind)

    return KeyIndex(
        mapped("mixed", np.uint64, size), mapped("keys", np.uint64, size, 2), mapped("rows", np.int64, size), 0, -1
    )


# A node's indexes: who uses them holds `used` shared; who builds them holds `built`; who removes them, `used` alone.


def _shared(folder: Path) -> int:
    while True:
        _sweep(folder)
        folder.mkdir(mode=0o700, exist_ok=True)
        held = -1
        with contextlib.suppress(FileNotFoundError):  # somebody removed it before we held the lock
            held = os.open(folder / "used", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(held, fcntl.LOCK_SH)
            if os.fstat(held).st_ino == (folder / "used").stat().st_ino:
                return held
        if held >= 0:
            os.close(held)


def _let_go(lock: int) -> None:
    os.close(lock)
    _sweep()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with (folder / "built").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sweep(but: Path | None = None) -> None:
    """Remove the indexes that no process of this node uses."""
    for folder in scratch_root().glob(f"{_PREFIX}*"):
        if folder == but:
            continue
        try:
            held = os.open(folder / "used", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(held)


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"cannot write the index of fetch.skip_existing at {folder}: {error.strerror}; free some space, or point "
            "MMDATA_SCRATCH to a larger disk, then the same command goes on"
        ) from error
