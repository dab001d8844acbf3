"""Block lists: URLs, domains, hashes and pictures that must never get into a dataset.

In: the files a recipe names under `block`, as txt (a value a line), Parquet, CSV or `.npy`. Out: for a URL, a body or a
decoded picture, None, or a few words on the list it is on, which become the row's `status_detail`. `BlockFiles` is what
is sent to workers: where the lists are and what they held at the start; each worker process reads them once, as sorted
arrays of 24 bytes an entry (8 for pictures). SourceError for a list that is not there, holds nothing of its kind, or
was changed meanwhile.

A URL is compared without its scheme, user, default port and fragment, as it goes on the wire; a domain covers its
subdomains and is compared in ASCII (IDNA) and lower case. Hashes of pictures are `hash_image`'s.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, model_validator

from mmdata.errors import SourceError
from mmdata.joins.hash_lists import phashes
from mmdata.joins.keys import IndexBuilder, KeyIndex, keys_of
from mmdata.joins.lists import KeyList, open_list
from mmdata.media.addresses import BadUrl, parse_url
from mmdata.stage import Options
from mmdata.stages.hash_image import phash

__all__ = ["BlockFiles", "BlockLists", "BlockOptions", "PictureList", "block_files"]

_DEFAULT_PORTS = {"http": 80, "https": 443}
# What parse_url would not change, which is what a list made by a program holds: read without taking it apart.
_PLAIN_URL = re.compile(r"https?://((?:[a-z0-9_-]+\.)+[a-z]+(?:/[A-Za-z0-9/_.\-~%!$&'()*+,:;=@\[\]|?]*)?)")
_NAMED = 5  # wrong values that a message names


class PictureList(Options):
    """Hashes of pictures, and how near is too near."""

    path: str = Field(
        min_length=1, description="phash, 16 hex digits a line, a column of whole numbers, or .npy of uint64"
    )
    max_distance: int = Field(4, ge=0, le=32, description="bits in which a blocked picture may differ, of 64")


class BlockOptions(Options):
    """Lists of what is never stored: rows on one have the status `blocked`, and the detail says which."""

    urls: str | None = Field(None, min_length=1, description="list of URLs; those a redirect leads to count too")
    domains: str | None = Field(None, min_length=1, description="list of domains, each with its subdomains")
    sha256: str | None = Field(None, min_length=1, description="list of the sha256 of media as fetched")
    phash: PictureList | None = Field(None, description="list of hash_image's phash, and the distance that blocks")

    @model_validator(mode="before")
    @classmethod
    def _plain_path(cls, given: Any) -> Any:
        """`phash: file` is `phash: {path: file}`."""
        if isinstance(given, dict) and isinstance(given.get("phash"), str):
            return {**given, "phash": {"path": given["phash"]}}
        return given

    @property
    def paths(self) -> dict[str, str]:
        """Kind of list → its path, for the lists there are."""
        found = {"urls": self.urls, "domains": self.domains, "sha256": self.sha256}
        return {k: v for k, v in found.items() if v} | ({"phash": self.phash.path} if self.phash else {})


@dataclass(frozen=True)
class BlockFiles:
    """The lists of a recipe with the fingerprint of each; pickles."""

    options: BlockOptions
    prints: tuple[tuple[str, str], ...]

    def described(self) -> dict[str, Any]:
        """As `dataset.json` keeps it: kind of list → fingerprint, and the distance of pictures."""
        found: dict[str, Any] = dict(self.prints)
        return found | ({"max_distance": self.options.phash.max_distance} if self.options.phash else {})

    def load(self) -> BlockLists:
        """The lists, read once per process; SourceError when one of them is no longer what it was."""
        if self not in _loaded:
            now = block_files(self.options)
            if now.prints != self.prints:
                changed = [k for k, v in self.prints if dict(now.prints).get(k) != v]
                raise SourceError(f"block.{changed[0]} was changed while the run went on; run it again")
            _loaded.clear()
            _loaded[self] = BlockLists(self.options)
        return _loaded[self]


_loaded: dict[BlockFiles, BlockLists] = {}


def block_files(options: BlockOptions) -> BlockFiles:
    """Look at the lists; SourceError when one is not there or holds no such values."""
    found = tuple((kind, _opened(kind, path).fingerprint()) for kind, path in options.paths.items())
    return BlockFiles(options, found)


_COLUMNS = {"urls": "url", "domains": "domain", "sha256": "sha256", "phash": "phash"}


def _opened(kind: str, path: str) -> KeyList:
    try:
        return open_list(path, _COLUMNS[kind], is_text=kind != "phash")
    except SourceError as error:
        raise SourceError(f"block.{kind}: {error}") from None


class BlockLists:
    """The lists in memory. Each question gives None, or the words for `status_detail`; thread-safe."""

    def __init__(self, options: BlockOptions) -> None:
        self._sets: dict[str, KeyIndex] = {}
        self._hashes: npt.NDArray[np.uint64] | None = None
        self._radius = options.phash.max_distance if options.phash else 0
        with TemporaryDirectory() as folder:  # for remote .npy lists, while they are read
            for kind, path in options.paths.items():
                if kind == "phash":
                    found = [h for h, _ in phashes(_opened(kind, path), Path(folder), "block.phash")]
                    self._hashes = np.unique(np.concatenate([np.empty(0, np.uint64), *found]))
                else:
                    self._sets[kind] = _key_set(kind, _opened(kind, path), Path(folder))
                held = self._sets.get(kind, self._hashes)
                if held is None or not len(held):
                    raise SourceError(f"block.{kind}: {path} is empty, so it blocks nothing: fill it, or leave it out")

    def _has(self, kind: str, texts: list[str]) -> npt.NDArray[np.bool_]:
        found = self._sets[kind].find(*keys_of("sha256" if kind == "sha256" else "url", pa.array(texts, pa.string())))
        return np.asarray(found >= 0)

    def url(self, text: str | None) -> str | None:
        """Whether a URL, or the domain it leads to, is on a list; what is no URL is on none."""
        if "urls" not in self._sets and "domains" not in self._sets:
            return None
        try:
            url = parse_url(text)
        except BadUrl:
            return None
        host = str(url.raw_host or "").rstrip(".")
        if "urls" in self._sets and self._has("urls", [_wire_form(str(text))])[0]:
            return "urls"
        if "domains" in self._sets:
            labels = host.split(".")
            # An address has no domains above it.
            above = 1 if labels[-1].isdecimal() or ":" in host else len(labels)
            domains = [".".join(labels[i:]) for i in range(above)]
            hit = np.flatnonzero(self._has("domains", domains))
            return f"domains ({domains[hit[0]]})" if len(hit) else None
        return None

    def body(self, sha256: str | None) -> str | None:
        """Whether bytes of this sha256 are on a list."""
        return "sha256" if sha256 and "sha256" in self._sets and self._has("sha256", [sha256])[0] else None

    @property
    def looks(self) -> bool:
        """Whether pictures must be shown to `picture`."""
        return self._hashes is not None

    def picture(self, pixels: npt.NDArray[np.uint8]) -> str | None:
        """Whether a decoded picture, (H, W, 3) RGB, is as near as blocks to one on a list."""
        if self._hashes is None or not len(self._hashes):
            return None
        [found] = phash([pixels])
        nearest = int(np.bitwise_count(self._hashes ^ found).min())
        return f"phash (distance {nearest})" if nearest <= self._radius else None


def _key_set(kind: str, given: KeyList, folder: Path) -> KeyIndex:
    """The list as sorted keys; which row they stood in does not matter."""
    builder = IndexBuilder(None)
    wrong: list[str] = []
    for texts in given.texts(folder):
        forms = [_form(kind, text) for text in texts.to_pylist() if text and text.strip()]
        wrong += [text for form, text in forms if form is None][: _NAMED - len(wrong)]
        on: Any = "sha256" if kind == "sha256" else "url"
        builder.add(*keys_of(on, pa.array([form for form, _ in forms if form is not None], pa.string())))
    if wrong:
        what = {"urls": "http or https URLs", "domains": "domains", "sha256": "64 hex digits"}[kind]
        named = ", ".join(repr(w[:80]) for w in wrong)
        raise SourceError(f"block.{kind}: {given.path} holds values that are no {what} ({named}): mend or remove them")
    made = builder.finish()
    return replace(made, rows=np.broadcast_to(np.int64(0), len(made)))


def _form(kind: str, text: str) -> tuple[str | None, str]:
    """A value in the form in which it is compared, None where it is none; and as written."""
    text = text.strip()
    try:
        if kind == "urls":
            return _wire_form(text), text
        if kind == "sha256":
            return (text if re.fullmatch("[0-9a-fA-F]{64}", text) else None), text
        bare = text.removeprefix("*").removeprefix(".")
        url = parse_url(bare if "://" in bare else f"http://{bare}/")
        return str(url.raw_host).rstrip("."), text
    except BadUrl:
        return None, text


def _wire_form(text: str) -> str:
    """A URL as it is compared; BadUrl when it is none."""
    plain = _PLAIN_URL.fullmatch(text)
    if plain is not None:
        return plain[1] if "/" in plain[1] else f"{plain[1]}/"
    url = parse_url(text)
    port = "" if url.port in (None, _DEFAULT_PORTS[url.scheme]) else f":{url.port}"
    return f"{str(url.raw_host).rstrip('.')}{port}{url.raw_path_qs}"
