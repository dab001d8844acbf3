"""The samples of a WebDataset tar: members that follow one another with the same key, as the webdataset library groups.

The key of `a/b.left.jpg` is `a/b`, its extension `left.jpg`: the first dot of the base name divides them. Members
without an extension, `__meta__` ones and links are no part of a sample. A member that comes twice under one key begins
another sample of that key: nothing is lost. Leading `./` and `/` and `..` parts are taken off a key.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from mmdata.errors import SourceError
from mmdata.media.tar_index import Member, TarDamage, walk_tar
from mmdata.sources.adopted import HEAD_BYTES, Row, missing_media, pictured

__all__ = ["IMAGE_EXTENSIONS", "Sample", "TarSamples", "split_name"]

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2")
_META = re.compile(r"__[^/]*__($|/)")
_MAX_TEXT = 8 << 20  # bytes of a caption or a .json; a longer one is not read


@dataclass
class Sample:
    """One sample: `image` is its picture's row columns (reference and size, or why not), `texts` extension → bytes."""

    key: str
    image: Row | None = None
    image_name: str | None = None
    texts: dict[str, bytes] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    _rank: int = 1 << 30


class TarSamples:
    """The samples of one open tar; after the walk, `damage` says where it could not be followed further.

    `wanted`: extensions of the picture in order of preference, None = whatever is an image. `texts`: extensions whose
    bytes are kept. `probe`: look at the pictures' headers.
    """

    def __init__(
        self,
        file: BinaryIO,
        url: str,
        size: int | None,
        wanted: tuple[str, ...] | None = None,
        texts: tuple[str, ...] = (),
        probe: bool = True,
    ) -> None:
        self.damage: TarDamage | None = None
        self._url, self._wanted, self._texts, self._probe = url, wanted, texts, probe
        self._walk = walk_tar(file, size)

    def __iter__(self) -> Iterator[Sample]:
        current: Sample | None = None
        members = 0
        try:
            for member in self._walk:
                members += 1
                key, extension = split_name(member.name)
                if not key:
                    continue
                if current is None or current.key != key or extension in current.seen:
                    if current is not None:
                        yield current
                    current = Sample(key)
                current.seen.add(extension)
                self._take(current, member, extension)
        except TarDamage as damage:
            if not members and not damage.cut:
                raise SourceError(f"{self._url} is no tar: {damage}") from None
            self.damage = damage
            if not damage.cut:
                raise SourceError(
                    f"{self._url} is damaged: {damage}; bring the file again, or leave it out of the source"
                ) from None
        if current is not None:
            yield current
        if self.damage is not None:
            yield from self._lost(self.damage, current)

    def _lost(self, damage: TarDamage, last: Sample | None) -> Iterator[Sample]:
        """The sample in which the file ends, so that the ledger tells of the cut."""
        key = split_name(damage.name)[0] if damage.name else ""
        if last is not None and key == last.key and last.image is not None:
            return
        if last is not None and key == last.key:
            last.image = missing_media(f"the tar is cut short: {damage}")
            return
        stem = self._url.rpartition("/")[2].partition(".")[0]
        yield Sample(key or f"{stem}_cut", missing_media(f"the tar is cut short: {damage}"))

    def _take(self, sample: Sample, member: Member, extension: str) -> None:
        if extension in self._texts and member.size <= _MAX_TEXT and not member.sparse:
            sample.texts[extension] = self._walk.head(member.size)
            return
        rank = self._rank(extension)
        if rank is None or rank >= sample._rank:
            return
        sample._rank, sample.image_name = rank, member.name
        if member.sparse:
            sample.image = missing_media("a sparse member, whose bytes do not lie in the tar as they are")
            return
        reference = {
            "image_path": self._url,
            "image_offset": member.offset,
            "image_size": member.size,
            "image_ext": extension.rpartition(".")[2],
        }
        if not self._probe:
            sample.image = reference
            return
        head = self._walk.head(HEAD_BYTES)
        sample.image = pictured(reference, head, self._walk.head)

    def _rank(self, extension: str) -> int | None:
        if self._wanted is not None:
            return self._wanted.index(extension) if extension in self._wanted else None
        return 0 if extension.rpartition(".")[2] in IMAGE_EXTENSIONS else None


def split_name(name: str) -> tuple[str, str]:
    """Key and lower-case extension of a member; the key is empty where it has no part in a sample."""
    parts = [p for p in name.split("/") if p not in ("", ".", "..")]
    if not parts or _META.match("/".join(parts)):
        return "", ""
    base, dot, extension = parts[-1].partition(".")
    if not base or not dot or not extension:
        return "", ""
    return "/".join([*parts[:-1], base]), extension.lower()
