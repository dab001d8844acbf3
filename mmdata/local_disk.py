"""Writing to a local filesystem so that a crash leaves the old or the new file, whole; `mmdata.store` is its caller."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from mmdata.errors import StoreError

__all__ = ["LOCK", "TEMPORARY", "entries", "link", "locked", "publish", "publish_folder", "put", "what_to_do"]

LOCK = ".lock"
TEMPORARY = ".tmp-"


def publish(local_file: Path, path: str) -> bool:
    """Move a local file to `path` if that is free: a hard link either stands for the whole file or not at all."""
    folder = os.path.dirname(path)
    _make_folder(folder)
    if os.path.lexists(path):
        return False
    temporary = _temporary(path)
    with _standing(folder), _removed_on_error(temporary):
        try:
            os.rename(local_file, temporary)  # same filesystem: no copy, and no second name that could be written to
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            shutil.copyfile(local_file, temporary)
            local_file.unlink()
        _fsync(temporary)
        try:
            os.link(temporary, path)
            published = True
        except FileExistsError:
            published = False
        except OSError as error:
            if error.errno in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                raise StoreError(f"{folder}: its filesystem has no hard links; choose a folder elsewhere") from error
            raise
    with _standing(folder):
        os.unlink(temporary)
        _fsync(folder)
    return published


def link(existing: str, path: str) -> bool:
    """Give a published file the further name `path` if that is free."""
    try:
        os.link(existing, path)
    except FileExistsError:
        return False
    _fsync(os.path.dirname(path))
    return True


def publish_folder(files: Iterable[tuple[str, bytes]], path: str) -> bool:
    """Make the folder `path` of (name, bytes), all on disk or nothing, if nothing is there but an empty folder."""
    temporary = _temporary(path)
    os.mkdir(temporary)
    try:
        for name, data in files:
            with open(f"{temporary}/{name}", "xb") as file:
                file.write(data)
        _sync_all(temporary)
        try:
            os.rename(temporary, path)  # over an empty folder at most
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            shutil.rmtree(temporary)
            return False
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _fsync(os.path.dirname(path))
    return True


def _sync_all(folder: str) -> None:
    """Have all files of a new folder on disk: one call for its filesystem, where each of 10,000 would be waited for."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _syncfs is None:
            os.sync()
        elif _syncfs(descriptor) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    finally:
        os.close(descriptor)


_syncfs = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)  # Linux; Python has no name for it


def put(data: bytes, path: str) -> None:
    """Write `path`, over what is there, by an atomic rename; on disk when it returns."""
    temporary = _temporary(path)
    with _standing(os.path.dirname(path)):
        with _removed_on_error(temporary):
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        _fsync(os.path.dirname(path))


@contextlib.contextmanager
def _standing(folder: str) -> Iterator[None]:
    """Says what happened where a folder goes away while a file is on its way into it."""
    try:
        yield
    except FileNotFoundError as error:
        raise StoreError(
            f"{folder} was removed while it was written to; bring it back, or begin anew with the same command"
        ) from error


@contextlib.contextmanager
def locked(folder: str) -> Iterator[None]:
    """Keep other processes and threads out of `folder`'s lock; the kernel lets it go when its holder dies."""
    _make_folder(folder)
    descriptor = os.open(f"{folder}/{LOCK}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def entries(folder: str) -> list[tuple[str, int | None]]:
    """(name, size in bytes) of all that lies directly in a folder, sorted; size None = a folder; FileNotFoundError."""
    with os.scandir(folder) as found:
        return sorted((entry.name, None if entry.is_dir() else _size(entry)) for entry in found)


def _size(entry: os.DirEntry[str]) -> int:
    """0 for a file that went away between listing and looking."""
    with contextlib.suppress(FileNotFoundError):
        return entry.stat(follow_symlinks=False).st_size
    return 0


def _temporary(path: str) -> str:
    """A fresh hidden name beside `path`; `mmdata clean` removes what a crash leaves there."""
    return f"{os.path.dirname(path)}/{TEMPORARY}{os.getpid()}-{secrets.token_hex(6)}"


@contextlib.contextmanager
def _removed_on_error(path: str) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise


def _make_folder(folder: str) -> None:
    """Make a folder and its parents, each name on disk before anything is put below it."""
    if os.path.isdir(folder):
        return
    parent = os.path.dirname(folder)
    _make_folder(parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder)
    _fsync(parent)


def _fsync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def what_to_do(error: OSError, size: int, root: str) -> str:
    """What happened and what the operator does about it, for the end of a message; `size` bytes were to be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        limit = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
        reached = limit.get(error.errno or 0, "the file-size limit of this process (ulimit -f) is reached")
        return f"{reached} ({size} bytes to write); make room and run the same command: no finished work is lost"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{error.strerror}; give this user write access to {root}, or choose another folder"
    return f"{error.strerror or error}; mend that and run the same command again"
