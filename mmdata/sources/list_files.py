"""The files of a list (file, folder or glob, wherever fsspec reaches): their order, format and fingerprint."""

from __future__ import annotations

import contextlib
import hashlib
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa

from mmdata.errors import SourceError, nearest

__all__ = ["FORMATS", "ListFile", "find_files", "fingerprint", "reading"]

FORMATS = {
    "txt": "txt",
    "csv": "csv",
    "tsv": "tsv",
    "json": "json",
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "parquet": "parquet",
    "pq": "parquet",
}
_COMPRESSIONS = ("gz", "bz2", "xz", "lzma", "zst", "lz4", "snappy", "zip")
_BLOCK = 4 << 20
# Whose exceptions come through fsspec's filesystems as they are.
_FILESYSTEMS = ("aiohttp", "aiobotocore", "azure", "botocore", "fsspec", "gcsfs", "google", "huggingface_hub")


@dataclass(frozen=True)
class ListFile:
    """One file: `path` in `fs`, `name` relative to the list's folder, `format` one of FORMATS' values."""

    fs: Any
    path: str
    name: str
    format: str

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Its bytes, decompressed as the name says (Parquet as it is); SourceError for what cannot be read."""
        compression = None if self.format == "parquet" else "infer"
        with reading(self.path), self.fs.open(self.path, "rb", compression=compression) as file:
            yield file


@contextlib.contextmanager
def reading(where: str) -> Iterator[None]:
    """What reading raises becomes a SourceError that names the file."""
    try:
        yield
    except EOFError:
        raise SourceError(f"{where} is cut short: bring it again") from None
    except Exception as error:
        known = isinstance(error, OSError | ValueError | zlib.error | lzma.LZMAError | pa.ArrowException)
        if not known and type(error).__module__.partition(".")[0] not in _FILESYSTEMS:
            raise
        raise SourceError(f"cannot read {where}: {' '.join(str(error).split())[:300]}") from error


def find_files(path: str, format: str) -> list[ListFile]:
    """Files of `path` in the order of their relative names, all of one format (`auto`: told by their extension).

    A folder means all files below it that have the format's extension; hidden ones and those that start with `_` are
    left out. Raises SourceError: nothing there, more than one format, no known extension.
    """
    with reading(path):
        fs, root = fsspec.core.url_to_fs(path)
        if fs.isfile(root):
            return [ListFile(fs, root, PurePosixPath(root).name, _format(root, format, path))]
        if fs.isdir(root):
            top = root.rstrip("/")
            found = [p for p in fs.find(root) if not _is_hidden(p.removeprefix(top))]
        elif any(c in root for c in "*?["):
            found = [p for p in fs.glob(root) if fs.isfile(p)]
            top = root[: min(root.index(c) for c in "*?[" if c in root)].rpartition("/")[0]
        else:
            raise SourceError(f"there is no list at {path}{_nearest_file(fs, root)}")
    names = {p: p.removeprefix(top).lstrip("/") for p in found}
    kinds = {p: _extension(p) for p in found}
    chosen = [p for p in found if kinds[p] and format in ("auto", kinds[p])]
    if not chosen:
        wanted = f".{format}" if format != "auto" else ", ".join(f".{e}" for e in FORMATS)
        raise SourceError(f"{path} holds no list: no file of it ends in {wanted} (.gz and the like may follow)")
    if len({kinds[p] for p in chosen}) > 1:
        several = ", ".join(sorted({str(kinds[p]) for p in chosen}))
        raise SourceError(f"{path} holds lists of several formats ({several}): say which with source.format")
    return [ListFile(fs, p, names[p], str(kinds[p])) for p in sorted(chosen, key=names.__getitem__)]


def _is_hidden(name: str) -> bool:
    return any(part[:1] in (".", "_") for part in name.split("/") if part)


def _extension(path: str) -> str | None:
    parts = PurePosixPath(path).name.lower().split(".")
    if len(parts) > 2 and parts[-1] in _COMPRESSIONS:
        parts.pop()
    return FORMATS.get(parts[-1]) if len(parts) > 1 else None


def _format(path: str, format: str, where: str) -> str:
    found = _extension(path) if format == "auto" else format
    if found is None:
        known = ", ".join(sorted(set(FORMATS.values())))
        raise SourceError(f"cannot tell the format of {where} by its name: set source.format to one of {known}")
    return found


def _nearest_file(fs: Any, root: str) -> str:
    folder, _, name = root.rpartition("/")
    try:
        there = [p.rpartition("/")[2] for p in fs.ls(folder or "/", detail=False)]
    except (OSError, ValueError):
        return ""
    close = nearest(name, there)
    return close if "did you mean" in close else ""


# (filesystem, path, size, stamp) → sha256; a list is read once per process for its fingerprint
_digests: dict[tuple[str, str, int, str], str] = {}


def fingerprint(files: list[ListFile]) -> str:
    """64 hex digits of sha256 over the content of the files and, where there are several, their relative names.

    Read once per process as long as size and time of change stay. SourceError for what cannot be read.
    """
    if len(files) == 1:
        return _digest(files[0])
    whole = hashlib.sha256()
    for file in files:
        whole.update(f"{file.name}\0{_digest(file)}\n".encode("utf-8", "surrogateescape"))
    return whole.hexdigest()


def _digest(file: ListFile) -> str:
    with reading(file.path):
        info = file.fs.info(file.path)
        stamp = next((info[k] for k in ("mtime", "ETag", "etag", "LastModified", "updated") if info.get(k)), None)
        key = (str(file.fs.protocol), file.path, int(info.get("size") or 0), str(stamp))
        if stamp is not None and key in _digests:
            return _digests[key]
        found = hashlib.sha256()
        with file.fs.open(file.path, "rb") as opened:
            while block := opened.read(_BLOCK):
                found.update(block)
        _digests[key] = found.hexdigest()
        return _digests[key]
