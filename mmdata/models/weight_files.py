"""A weights file by path, or by URL with its checksum: fetched once a machine, and proved before every use.

In: a path or an http(s) URL, and the sha256 that the file must have (required for a URL). Out: the path of a file with
that content. Fetched files lie in `$MMDATA_CACHE/weights`, else `$XDG_CACHE_HOME/mmdata/weights`, else
`~/.cache/mmdata/weights`, named by their sha256; a file appears there whole or not at all, and is never written again.
Fails: RecipeError for a URL without a checksum, for no checksum at all, and for content that has another;
MissingExtra when the file is not there and cannot be fetched.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import sys
import time
from contextlib import closing
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from mmdata.errors import MissingExtra, RecipeError
from mmdata.stage import Weights

__all__ = ["bring_file", "cache_folder", "file_weights"]

_URL = re.compile(r"https?://", re.IGNORECASE)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TIMEOUT_S = 60.0  # without a byte
_PIECE = 1 << 20
_TELL_EVERY_S = 5.0


def cache_folder() -> Path:
    """Where fetched weights lie."""
    own, shared = os.environ.get("MMDATA_CACHE"), os.environ.get("XDG_CACHE_HOME")
    root = Path(own) if own else Path(shared) / "mmdata" if shared else Path.home() / ".cache" / "mmdata"
    return root / "weights"


def file_weights(where: str, name: str, location: str, sha256: str | None) -> Weights:
    """What a contract says of the file: its path, or the checksum of a URL's; nothing is fetched.

    `where` is the operator, for messages. RecipeError as the module says, and for a path where there is no file.
    """
    if sha256 is not None and not _SHA256.fullmatch(sha256):
        raise RecipeError(f"{where}: sha256 {sha256!r} is no checksum; expected 64 lower-case hex digits")
    if _URL.match(location):
        if sha256 is None:
            raise RecipeError(
                f"{where}: the weights {location} need `sha256`, so that what is fetched can be proved; download the "
                f"file once from a source you trust and type: sha256sum FILE"
            )
        return Weights(name, fingerprint=f"sha256:{sha256}")
    if _SCHEME.match(location):
        raise RecipeError(f"{where}: weights are a local path or an http(s) URL, not {location}")
    path = Path(location)
    if not path.is_file():
        raise RecipeError(f"{where}: there is no weights file {location}; check the path")
    return Weights(name, path=location, size_bytes=path.stat().st_size)


def bring_file(where: str, location: str, sha256: str | None) -> Path:
    """The file, fetched if it is a URL and not in the cache; its sha256 is proved each time where one is given."""
    if not _URL.match(location):
        if sha256 is not None:
            _require(where, location, _sha256_of(where, Path(location)), sha256)
        return Path(location)
    file_weights(where, "weights", location, sha256)
    assert sha256 is not None
    try:
        return _cached(where, location, sha256)
    except OSError as error:
        detail = error.strerror or " ".join(str(error).split())[:200]
        raise MissingExtra(
            f"{where}: cannot keep the weights {location} in {cache_folder()} ({detail}); make room, set MMDATA_CACHE "
            f"to another folder, or give the path of the file instead of its URL"
        ) from None


def _cached(where: str, url: str, sha256: str) -> Path:
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^A-Za-z0-9._-]", "_", Path(urlsplit(url).path).name)[-80:] or "weights"
    target = folder / f"{sha256}-{name}"
    with open(folder / f"{sha256}.lock", "w") as lock:
        # Workers of one machine start together: one fetches, the others wait and find the file.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            if _sha256_of(where, target) == sha256:
                return target
            target.unlink()  # damaged since it was fetched
        part = folder / f"{sha256}.part"
        try:
            _require(where, url, _fetch(where, url, part), sha256)
            os.link(part, target)
        finally:
            part.unlink(missing_ok=True)
    return target


def _fetch(where: str, url: str, part: Path) -> str:
    """Write the URL's content to `part`; its sha256. MissingExtra when it cannot be had in full."""
    digest, done, told = hashlib.sha256(), 0, time.monotonic()
    try:
        with closing(urlopen(Request(url, headers={"User-Agent": "mmdata"}), timeout=_TIMEOUT_S)) as answer:
            size = int(answer.headers.get("Content-Length") or 0)
            _tell(f"fetching the weights {url} ({size / 1e6:.1f} MB)" if size else f"fetching the weights {url}")
            with open(part, "wb") as file:
                while piece := answer.read(_PIECE):
                    file.write(piece)
                    digest.update(piece)
                    done += len(piece)
                    if time.monotonic() - told > _TELL_EVERY_S:
                        told = time.monotonic()
                        share = f" of {size / 1e6:.1f}" if size else ""
                        _tell(f"{done / 1e6:.1f}{share} MB of {url}")
                file.flush()
                os.fsync(file.fileno())
            if size and done < size:
                raise HTTPException(f"{done} of {size} bytes came")
    except (OSError, HTTPException, ValueError) as error:  # URLError is an OSError; ValueError is no URL
        detail = " ".join(str(error).split())[:200]
        raise MissingExtra(
            f"{where}: the weights {url} are not in {cache_folder()} and cannot be fetched ({detail}); fetch the file "
            f"where there is a network and give its path instead of the URL"
        ) from None
    return digest.hexdigest()


def _tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _require(where: str, location: str, found: str, wanted: str) -> None:
    if found != wanted:
        raise RecipeError(
            f"{where}: the weights {location} have the sha256 {found}, and not {wanted} as the recipe says; "
            f"they are not used: check the file and the checksum"
        )


def _sha256_of(where: str, path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise MissingExtra(f"{where}: cannot read the weights {path} ({error.strerror}); check the path") from None
