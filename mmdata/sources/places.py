"""Files that a dataset adopts where they lie: found by folder, glob or brace pattern, on any fsspec filesystem.

In: what the recipe says. Out: `Place`s with the absolute path or URL that media references will hold, the name relative
to the source, size and a stamp of its last change. SourceError: nothing there, or it cannot be listed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import fsspec

from mmdata.errors import SourceError, nearest
from mmdata.sources.list_files import reading

__all__ = ["Place", "absolute", "find_places", "fingerprint_of", "is_local", "open_place", "place_of"]

_STAMPS = ("mtime", "ETag", "etag", "LastModified", "last_modified", "updated", "created")
_SMALL = 1 << 16  # bytes: a smaller file is known by its content
_SMALL_FILES = 64  # as long as there are not many of them
_REMOTE_BLOCK = 4 << 20
_RANGE = re.compile(r"([^{}]*)\{(\d+)\.\.(\d+)\}(.*)", re.S)
_CHOICE = re.compile(r"([^{}]*)\{([^{}]*,[^{}]*)\}(.*)", re.S)
_MOST_NAMES = 1 << 20


@dataclass(frozen=True)
class Place:
    """One file: `url` as references name it, `name` relative to the source; `stamp` changes when the file does."""

    url: str
    name: str
    size: int | None
    stamp: str = ""


def is_local(url: str) -> bool:
    """Whether it is a plain path of this machine."""
    return (fsspec.core.split_protocol(url)[0] or "file") in ("file", "local")


def absolute(path: str) -> str:
    """The path as references and messages name it: absolute for local files, else the URL without a trailing slash."""
    if is_local(path):
        return os.path.abspath(os.path.expanduser(str(fsspec.core.strip_protocol(path))))
    return path.rstrip("/")


def find_places(path: str, suffixes: tuple[str, ...], what: str) -> list[Place]:
    """The files of `path` that end in one of `suffixes` (lower case), by name: a folder means all below it.

    Globs (`*`, `?`, `[`) and braces (`{00000..00041}`, `{a,b}`) are expanded; a file that is named itself is taken
    whatever it ends in. Names that begin with a dot or `_` are left out of folders. `what` they are, for messages.
    """
    with reading(path):
        if "{" in path:
            return _named(path, what)
        fs, root = fsspec.core.url_to_fs(absolute(path))
        if any(c in root for c in "*?["):
            found = {p: info for p, info in fs.glob(root, detail=True).items() if info["type"] == "file"}
            top = root[: min(root.index(c) for c in "*?[" if c in root)].rpartition("/")[0]
        else:
            info = _info(fs, root)
            if info is None:
                raise SourceError(f"there is nothing at {path}{_near(fs, root)}")
            if info["type"] != "directory":
                return [place_of(fs, root, PurePosixPath(root).name, info)]
            top = root.rstrip("/")
            listed = fs.find(root, detail=True)
            listed = {p: i for p, i in listed.items() if i["type"] == "file"}  # no pipe, which would be waited for
            found = {p: i for p, i in listed.items() if p.lower().endswith(suffixes) and not _is_hidden(p[len(top) :])}
        places = [place_of(fs, p, p.removeprefix(top).lstrip("/"), info) for p, info in found.items()]
    if not places:
        raise SourceError(f"{path} holds no {what}: no file of it ends in {' or '.join(suffixes)}")
    return sorted(places, key=lambda place: place.name)


def _named(pattern: str, what: str) -> list[Place]:
    """The files of a brace pattern, in its order; every one must be there."""
    names = list(_expanded(pattern, [0]))
    if any(c in pattern for c in "*?["):
        return [place for name in names for place in find_places(name, (), what)]
    places = []
    top = absolute(pattern)[: absolute(pattern).index("{")].rpartition("/")[0]
    for name in names:
        fs, root = fsspec.core.url_to_fs(absolute(name))
        info = _info(fs, root)
        if info is None:
            raise SourceError(f"there is no {name}, which {pattern} names")
        places.append(place_of(fs, root, absolute(name).removeprefix(top).lstrip("/"), info))
    return places


def _info(fs: Any, root: str) -> dict[str, Any] | None:
    """What is there: one question, where `exists` or `isdir` over HTTP would fetch the file."""
    try:
        info: dict[str, Any] = fs.info(root)
    except FileNotFoundError:
        return None
    return info


def _expanded(pattern: str, count: list[int]) -> Iterator[str]:
    if (match := _RANGE.fullmatch(pattern)) is not None:
        before, first, last, after = match.groups()
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        step = 1 if int(first) <= int(last) else -1
        middles: Iterable[str] = (f"{n:0{width}d}" for n in range(int(first), int(last) + step, step))
    elif (match := _CHOICE.fullmatch(pattern)) is not None:
        before, choices, after = match.groups()
        middles = choices.split(",")
    else:
        count[0] += 1
        if count[0] > _MOST_NAMES:
            raise SourceError(f"a brace pattern of more than {_MOST_NAMES} names; give a folder or a glob")
        yield pattern
        return
    for middle in middles:
        for rest in _expanded(f"{before}{middle}", count) if "{" in before else [f"{before}{middle}"]:
            for tail in _expanded(after, count):
                yield rest + tail


def place_of(fs: Any, root: str, name: str, info: dict[str, Any]) -> Place:
    """One entry of a listing; `root` is its path in `fs`."""
    stamp = next((str(info[k]) for k in _STAMPS if info.get(k)), "")
    size = info.get("size") if info.get("type") != "directory" else None
    return Place(_url(fs, root), name, None if size is None else int(size), stamp)


def _url(fs: Any, root: str) -> str:
    protocols = [fs.protocol] if isinstance(fs.protocol, str) else list(fs.protocol)
    return root if "file" in protocols or "local" in protocols else str(fs.unstrip_protocol(root))


def _is_hidden(name: str) -> bool:
    return any(part[:1] in (".", "_") for part in name.split("/") if part)


def _near(fs: Any, root: str) -> str:
    folder, _, name = root.rpartition("/")
    try:
        there = [p.rpartition("/")[2] for p in fs.ls(folder or "/", detail=False)]
    except (OSError, ValueError):
        return ""
    close = nearest(name, there)
    return close if "did you mean" in close else ""


def fingerprint_of(places: Iterable[Place], *more: str) -> str:
    """64 hex digits of sha256 over names, sizes and stamps, and `more`; a few small files enter with their content.

    So no terabytes are read; a file that was rewritten is noticed by its time of change or etag.
    """
    whole = hashlib.sha256()
    small = 0
    for place in places:
        stamp = place.stamp
        if place.size is not None and place.size <= _SMALL and small < _SMALL_FILES:
            small += 1
            with reading(place.url), open_place(place.url) as file:
                stamp = hashlib.sha256(file.read()).hexdigest()
        whole.update(f"{place.name}\0{place.size}\0{stamp}\n".encode("utf-8", "surrogateescape"))
    for text in more:
        whole.update(f"{text}\n".encode("utf-8", "surrogateescape"))
    return whole.hexdigest()


@contextlib.contextmanager
def open_place(url: str) -> Iterator[BinaryIO]:
    """Its bytes as they are; what a local file or a remote one raises stays as it is (see `list_files.reading`)."""
    if is_local(url):
        with open(url, "rb") as plain:
            yield plain
        return
    fs, root = fsspec.core.url_to_fs(url)
    with fs.open(root, "rb", block_size=_REMOTE_BLOCK, cache_type="readahead") as remote:
        yield remote
