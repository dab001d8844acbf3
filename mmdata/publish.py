"""The folder an export goes to: one writer at a time, whole or absent, never somebody else's files.

Everything is written into `<path>.attempt-<id>`, with its plan in `<path>.plan-<id>`, and renamed at the end; the id is
the beginning of the export's identity. While an export runs it holds a lock on `<path>.lock`, which the kernel lets go
when the process dies: an attempt found under the lock is therefore dead, and the next export of the same identity goes
on with it; any other removes it.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mmdata.errors import RecipeError, StoreError

__all__ = ["FORMAT", "MANIFEST", "Attempt", "Finished", "Target", "size_on_disk"]

MANIFEST = "_mmdata_export.json"  # the underscore hides it from readers that scan a folder
FORMAT = 2  # of what an export holds; a change makes every earlier one stale
_CARD = "README.md"


@dataclass
class Attempt:
    """An export being written: `folder` becomes the export, `plan` goes. An error leaves both when `keep` is set."""

    folder: Path
    plan: Path
    keep: bool = False

    def restart(self) -> None:
        """Empty both folders."""
        for folder in (self.folder, self.plan):
            shutil.rmtree(folder)
            folder.mkdir()


@dataclass(frozen=True)
class Finished:
    """A whole export: data files with their sizes in bytes (a name with a slash at its end: all in that folder)."""

    files: dict[str, int]
    shards: int


class Target:
    """Where an export goes. `path` is absolute, links resolved.

    RecipeError when it is no local folder, or lies in or around the dataset.
    """

    def __init__(self, path: str, store: Any) -> None:
        if "://" in path and not path.startswith("file://"):
            raise RecipeError(f"export.path {path!r} is not a local folder; export to a local folder and copy it there")
        self.path = Path(os.path.realpath(path.removeprefix("file://")))
        self._given = path
        self.require_apart(store)
        self._manifest: dict[str, Any] | None = None

    def require_apart(self, store: Any) -> None:
        """RecipeError when the path lies in or around the folder of a dataset."""
        if store.is_local:
            root = Path(os.path.realpath(store.root))
            if root == self.path or root in self.path.parents or self.path in root.parents:
                raise RecipeError(
                    f"export.path {self._given!r} lies in or around the dataset folder; choose one beside it"
                )

    def require_apart_from(self, source: str) -> None:
        """RecipeError when the path is that of an adopted source, or around it: the export would replace its media."""
        if "://" in source and not source.startswith("file://"):
            return
        plain = re.split(r"[*?\[{]", os.path.expanduser(source.removeprefix("file://")))[0]
        root = Path(os.path.realpath(plain))
        if self.path == root or self.path in root.parents:
            raise RecipeError(
                f"export.path {self._given!r} holds the source {source!r}, whose media the dataset refers to; choose "
                "another folder"
            )

    def require_no_media(self, paths: pa.ChunkedArray) -> None:
        """RecipeError when the media that rows refer to (`image_path`) lies in the path."""
        for folder in {str(self.path), os.path.abspath(self._given.removeprefix("file://"))}:
            if pc.any(pc.starts_with(paths, f"{folder}/")).as_py():
                raise RecipeError(
                    f"export.path {self._given!r} holds media that the dataset adopted; choose another folder"
                )

    def require_free(self) -> None:
        """RecipeError when something stands at the path that an export would refuse to replace; writes nothing."""
        if self.path.exists():
            self._read_manifest()

    @contextmanager
    def sole_writer(self) -> Iterator[None]:
        """Hold the target; StoreError when another export does, RecipeError when something else stands there."""
        lock = self.path.with_name(f"{self.path.name}.lock")
        with _disk_errors(self.path, opening=True):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            held = _lock(lock)
        if held is None:
            raise StoreError(f"another export is writing to {self.path}; wait for it, or stop it")
        try:
            with _disk_errors(self.path):
                self._put_back()
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
            own = {*manifest["all"], *(n.partition("/")[0] for n in manifest["files"])}
        except (OSError, ValueError, KeyError, TypeError):
            raise RecipeError(
                f"export.path {self.path} is not empty and no export of mmdata (it holds {names[0]!r}); choose another"
            ) from None
        foreign = [n for n in names if n not in own]
        for name, count in manifest.get("folders", {}).items():  # a folder of ours with more in it than we wrote
            if (self.path / name).is_dir() and sum(1 for _ in _walk(self.path / name)) > count:
                foreign.append(f"a file in {name}")
        manifest["foreign"] = foreign[0] if foreign else None
        return dict(manifest)

    def _left(self, kinds: str) -> Iterator[tuple[Path, str]]:
        """What dead exports left beside the target, and its kind."""
        ours = re.compile(re.escape(self.path.name) + rf"\.({kinds})-[0-9a-f]{{12}}")
        for left in sorted(self.path.parent.iterdir()):
            if found := ours.fullmatch(left.name):
                yield left, found[1]

    def _put_back(self) -> None:
        """Put back an earlier export that a dead one had moved aside; remove it when the new one stands already."""
        for left, _ in self._left("old"):
            if self.path.exists():
                shutil.rmtree(left)
            else:
                left.rename(self.path)

    def _sweep(self, keep: str | None = None) -> None:
        """Remove attempts and plans of dead exports, but those of the identity `keep`."""
        for left, kind in self._left("attempt|plan"):
            if keep is not None and left.name.endswith(f".{kind}-{keep[:12]}"):
                continue
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()

    def finished(self, identity: str) -> Finished | None:
        """The whole export of this identity, None when there is none; sweeps the attempts of others."""
        manifest = self._manifest
        if manifest is None or manifest.get("identity") != identity:
            self._sweep(keep=identity)
            return None
        files: dict[str, int] = manifest["files"]
        if any(size_on_disk(self.path / name) != size for name, size in files.items()):
            self._sweep(keep=identity)
            return None
        self._sweep()
        return Finished(files, manifest["shards"])

    def refresh(self, card: str) -> None:
        """Replace the card of a finished export, when it differs."""
        there = self.path / _CARD
        if there.exists() and there.read_bytes() == card.encode():
            return
        new = self.path.with_name(f"{self.path.name}.attempt-{secrets.token_hex(6)}")
        _write_synced(new, card)
        os.replace(new, there)

    @contextmanager
    def attempt(self, identity: str, media_bytes: int) -> Iterator[Attempt]:
        """Give the folders of an attempt: a dead one's of the same identity, or fresh ones.

        They are removed when the `with` ends, unless `publish` took them or an error ends it and `keep` is set.
        StoreError when space is short.
        """
        foreign = (self._manifest or {}).get("foreign")
        if foreign is not None:
            raise RecipeError(
                f"export.path {self.path} holds an earlier export and {foreign!r}, which mmdata did not write; "
                "move that file away, or choose another folder"
            )
        folder, plan = (self.path.with_name(f"{self.path.name}.{what}-{identity[:12]}") for what in ("attempt", "plan"))
        attempt = Attempt(folder, plan)
        there = size_on_disk(attempt.folder) or 0
        free = shutil.disk_usage(self.path.parent).free
        if free + there < media_bytes:
            raise StoreError(f"{self.path} needs {media_bytes:,} bytes and the disk has {free:,} left; make room")
        attempt.plan.mkdir(exist_ok=True)
        attempt.folder.mkdir(exist_ok=True)
        try:
            yield attempt
        except BaseException:
            if not attempt.keep:
                self._discard(attempt)
            raise
        self._discard(attempt)

    def _discard(self, attempt: Attempt) -> None:
        shutil.rmtree(attempt.folder, ignore_errors=True)
        shutil.rmtree(attempt.plan, ignore_errors=True)

    def publish(self, attempt: Attempt, card: str, identity: str, finished: Finished) -> None:
        """Make the attempt the export: the card and the manifest go in last, then one rename."""
        folder = attempt.folder
        _write_synced(folder / _CARD, card)
        names = sorted({MANIFEST, *(p.name for p in folder.iterdir())})
        counts = {p.name: sum(1 for _ in _walk(p)) for p in folder.iterdir() if p.is_dir()}
        manifest = {"format": FORMAT, "identity": identity, "shards": finished.shards, "files": finished.files}
        _write_synced(folder / MANIFEST, json.dumps({**manifest, "all": names, "folders": counts}, indent=1) + "\n")
        _sync_folder(folder)
        old = self.path.with_name(f"{self.path.name}.old-{secrets.token_hex(6)}")
        with suppress(FileNotFoundError):
            self.path.rename(old)
        folder.rename(self.path)
        _sync_folder(self.path.parent)
        shutil.rmtree(old, ignore_errors=True)


def size_on_disk(path: Path) -> int | None:
    """Bytes of a file, or of all files in a folder; None when there is neither."""
    try:
        return sum(entry.stat().st_size for entry in _walk(path)) if path.is_dir() else path.stat().st_size
    except FileNotFoundError:
        return None


def _walk(folder: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(Path(entry.path))
            else:
                yield entry


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


_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
# Under a file, in /proc, too long: nothing can be made there.
_IMPOSSIBLE = (*_FORBIDDEN, errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG)


@contextmanager
def _disk_errors(path: Path, opening: bool = False) -> Iterator[None]:
    """What the system says about a target, as ours; `opening`: nothing but its folder and lock have been touched."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StoreError(
                f"{path} cannot be written, the disk or a quota is full ({error.strerror}); make room and give the "
                "same command again"
            ) from error
        about_us = str(error.filename or "").startswith(str(path.parent))
        if (about_us and error.errno in _FORBIDDEN) or (opening and error.errno in _IMPOSSIBLE):
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
