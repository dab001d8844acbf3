"""A file system of fsspec in which every media reference of a dataset is a file: `mmdata-media://…`.

So a library that opens pictures by path reads them where they are, out of a tar or a table, with nothing copied. The
package registers it with fsspec, also for processes that have not imported mmdata. Reads only. FileNotFoundError: no
such name; StoreError: the media is gone.
"""

from __future__ import annotations

import io
import os
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from fsspec.spec import AbstractFileSystem

if TYPE_CHECKING:
    from mmdata.dataset import Dataset

__all__ = ["PROTOCOL", "MediaFileSystem", "media_url"]

PROTOCOL = "mmdata-media"


def media_url(dataset_url: str, path: str, offset: int | None, size: int | None, name: str) -> str:
    """The URL of one media reference; `name` is what a reader shows, with the extension that tells the format."""
    place = f"{quote(dataset_url, safe='')}/{quote(path, safe='')}"
    return (
        f"{PROTOCOL}://{place}/{-1 if offset is None else offset}/{-1 if size is None else size}/{quote(name, safe='')}"
    )


@lru_cache(8)
def _dataset(url: str, process: int) -> Dataset:
    from mmdata.dataset import Dataset

    return Dataset(url)


class _Bytes(io.BytesIO):
    """Bytes as a file whose methods others may replace, as Hugging Face datasets does."""


class MediaFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """See the top of this file; names are what `media_url` makes."""

    protocol = PROTOCOL
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(path).removeprefix(f"{PROTOCOL}://")

    def _open(self, path: str, mode: str = "rb", **_: Any) -> _Bytes:
        """The bytes of a reference as a file."""
        if mode != "rb":
            raise OSError(f"{PROTOCOL}:// is for reading")
        dataset, reference, offset, size = _parsed(path)
        return _Bytes(_dataset(dataset, os.getpid()).read_media(reference, offset, size))

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Size of a reference; it is not looked at whether the media is there."""
        size = _parsed(self._strip_protocol(path))[3]
        return {"name": path, "size": size, "type": "file"}


def _parsed(path: str) -> tuple[str, str, int, int]:
    parts = path.removeprefix(f"{PROTOCOL}://").split("/")
    if len(parts) != 5 or not all(p.removeprefix("-").isdecimal() for p in parts[2:4]):
        raise FileNotFoundError(path)
    return unquote(parts[0]), unquote(parts[1]), int(parts[2]), int(parts[3])
