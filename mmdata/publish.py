"""The folder an export goes to: one writer at a time, whole or absent, never somebody else's files.

Everything is written into `<path>.attempt-<id>` and renamed at the end. While an export runs it holds a lock on
`<path>.lock`, which the kernel lets go when the process dies: attempt folders found under the lock are therefore dead.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mmdata.errors import RecipeError, StoreError

__all__ = ["FORMAT", "MANIFEST", "Target"]

MANIFEST = "_mmdata_export.json"  # the underscore hides it from readers that scan a folder
FORMAT = 1  # of what an export holds; a change makes every earlier one stale
_CARD = "README.md"


class Target:
    """Where an export goes. `path` is absolute, links resolved.

    RecipeError when it is no local folder, or lies in or around the dataset.
    """

    def __init__(self, path: str, store: Any) -> None:
        if "://" in path and not path.startswith("file://"):
            raise RecipeError(f"export.path {path!r} is not a local folder; export to a local folder and copy it there")
        self.path = Path(os.path.realpath(path.removeprefix("file://")))
        if store.is_local:
            root = Path(os.path.realpath(store.root))
            if root == self.path or root in self.path.parents or self.path in root.parents:
                raise RecipeError(f"export.path {path!r} lies in or around the dataset folder; choose one beside it")
        self._manifest: dict[str, Any] | None = None

    def require_free(self) -> None:
        """RecipeError when something stands at the path that an export would refuse to replace; writes nothing."""
        if self.path.exists():
            self._read_manifest()

    @contextmanager
    def sole_writer(self) -> Iterator[None]:
        """Hold the target; StoreError when another export does, RecipeError when something else stands there."""
        lock = self.path.with_name(f"{self.path.name}.lock")
        with _disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            held = _lock(lock)
        if held is None:
            raise StoreError(f"another export is writing to {self.path}; wait for it, or stop it")
        try:
            with _disk_errors(self.path):
                self._sweep()
                self._manifest = self._read_manifest()
                yield
        finally:
            lock.unlink(missing_ok=True)  # while it is held, so that nobody locks a file without a name
            os.close(held)

    def _read_manifest(self) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        if not self.path.is_dir():
            raise RecipeError(f"export.path {self.path} is a file; name a folder")
        if os.path.ismount(self.path):
            raise RecipeError(f"export.path {self.path} is a mount point; name a folder inside it")
        names = sorted(p.name for p in self.path.iterdir())
        if not names:
            return None
        try:
            manifest = json.loads((self.path / MANIFEST).read_bytes())
            own = {*manifest["all"], *manifest["files"]}
        except (OSError, ValueError, KeyError, TypeError):
            raise RecipeError(
                f"export.path {self.path} is not empty and no export of mmdata (it holds {names[0]!r}); choose another"
            ) from None
        foreign = [n for n in names if n not in own]
        manifest["foreign"] = foreign[0] if foreign else None
        return dict(manifest)

    def _sweep(self) -> None:
        """Remove what dead exports left beside the target; put back an earlier export that one had moved aside."""
        ours = re.compile(re.escape(self.path.name) + r"\.(attempt|old)-[0-9a-f]{12}")
        for left in sorted(self.path.parent.iterdir()):
            found = ours.fullmatch(left.name)
            if found is None:
                continue
            if found[1] == "old" and not self.path.exists():
                left.rename(self.path)
            elif left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()

    def finished(self, identity: str) -> dict[str, int] | None:
        """Data files and sizes of a whole export of this identity, None when there is none."""
        manifest = self._manifest
        if manifest is None or manifest.get("identity") != identity:
            return None
        files: dict[str, int] = manifest["files"]
        sizes = {p.name: p.stat().st_size for p in self.path.iterdir()}
        return files if all(sizes.get(n) == size for n, size in files.items()) else None

    def refresh(self, card: str) -> None:
        """Replace the card of a finished export, when it differs."""
        there = self.path / _CARD
        if there.exists() and there.read_bytes() == card.encode():
            return
        new = self.path.with_name(f"{self.path.name}.attempt-{secrets.token_hex(6)}")
        _write_synced(new, card)
        os.replace(new, there)

    @contextmanager
    def attempt(self, media_bytes: int) -> Iterator[Path]:
        """Give a fresh folder beside the target, removed unless `publish` took it; StoreError when space is short."""
        foreign = (self._manifest or {}).get("foreign")
        if foreign is not None:
            raise RecipeError(
                f"export.path {self.path} holds an earlier export and {foreign!r}, which mmdata did not write; "
                "move that file away, or choose another folder"
            )
        free = shutil.disk_usage(self.path.parent).free
        if free < media_bytes:
            raise StoreError(f"{self.path} needs {media_bytes:,} bytes and the disk has {free:,} left; make room")
        folder = self.path.with_name(f"{self.path.name}.attempt-{secrets.token_hex(6)}")
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def publish(self, folder: Path, card: str, identity: str, files: dict[str, int]) -> None:
        """Make `folder` the export: the card and the manifest go in last, then one rename."""
        _write_synced(folder / _CARD, card)
        names = sorted([MANIFEST, *(p.name for p in folder.iterdir())])
        manifest = {"format": FORMAT, "identity": identity, "files": files, "all": names}
        _write_synced(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        _sync_folder(folder)
        old = self.path.with_name(f"{self.path.name}.old-{secrets.token_hex(6)}")
        with suppress(FileNotFoundError):
            self.path.rename(old)
        folder.rename(self.path)
        _sync_folder(self.path.parent)
        shutil.rmtree(old, ignore_errors=True)


def _lock(path: Path) -> int | None:
    """A descriptor that holds the lock on `path`, None when somebody else does."""
    while True:
        held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(held).st_ino == path.stat().st_ino:
                return held
        except BlockingIOError:
            os.close(held)
            return None
        except FileNotFoundError:
            pass
        os.close(held)  # the holder before us unlinked it between our open and our lock


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StoreError(
                f"{path} cannot be written, the disk or a quota is full ({error.strerror}); make room and give the "
                "same command again"
            ) from error
        about_us = str(error.filename or "").startswith(str(path.parent))
        if about_us and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise RecipeError(f"export.path {path} cannot be written ({error.strerror}); choose another") from error
        raise


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    held = os.open(path, os.O_RDONLY)
    try:
        os.fsync(held)
    finally:
        os.close(held)
