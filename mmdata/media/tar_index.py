"""Where the members of somebody else's tar lie: headers are walked, bodies skipped, nothing is ever extracted.

In: an open binary file (seekable, or a plain stream). Out: `Member`s in file order: name, first byte and length of the
payload. POSIX ustar and pax, GNU long names and base-256 numbers are known; links, folders and devices are left out; a
sparse member is told as one whose bytes do not lie in the file as they are.
Fails with `TarDamage`, which says at which byte: a bad checksum, a size beyond the end of the file, a cut. Everything
yielded before it is sound. A file that just ends, without the mark of two empty blocks, is a cut as well.

Source: POSIX.1-2001, pax interchange format; GNU tar manual, "Basic Tar Format".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

__all__ = ["Member", "TarDamage", "TarWalk", "walk_tar"]

_BLOCK = 512
_MAX_EXTRA = 1 << 20  # bytes of a pax header or a long name: above is damage, or malice
_SEEK_FROM = 1 << 16  # a shorter body is read and thrown away: a seek would throw a buffer away
_FILES = (b"0", b"\0", b"7")


class TarDamage(Exception):
    """The archive cannot be followed beyond byte `offset`; `cut`: it just ends, inside member `name` where known."""

    def __init__(self, offset: int, detail: str, cut: bool = False, name: str | None = None) -> None:
        super().__init__(offset, detail, cut, name)
        self.offset, self.detail, self.cut, self.name = offset, detail, cut, name

    def __str__(self) -> str:
        """In a few words, with the place."""
        return f"{self.detail} at byte {self.offset}"


@dataclass(frozen=True)
class Member:
    """One regular file: its payload is `size` bytes from `offset`. `sparse`: they are not the file's bytes as such."""

    name: str
    offset: int
    size: int
    sparse: bool = False


class _Cursor:
    """Forward reading that knows where it is; seeks only where the file can and where it pays."""

    def __init__(self, file: BinaryIO, size: int | None) -> None:
        self._file = file
        self._size = size
        self._seeks = bool(getattr(file, "seekable", lambda: False)()) and size is not None
        self.at = 0

    def read(self, count: int) -> bytes:
        """Up to `count` bytes; fewer only at the end of the file."""
        parts, missing = [], count
        while missing:
            part = self._file.read(missing)
            if not part:
                break
            parts.append(part)
            missing -= len(part)
        self.at += count - missing
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def go(self, offset: int) -> bool:
        """Forward to `offset`; False when the file ends before it."""
        if self._size is not None and offset > self._size:
            return False
        if self._seeks and offset - self.at > _SEEK_FROM:
            self._file.seek(offset)
            self.at = offset
        while self.at < offset:
            if not self.read(min(offset - self.at, 1 << 20)):
                return False
        return True


class TarWalk:
    """One walk over an archive; between two members the head of the current one may be read."""

    def __init__(self, file: BinaryIO, size: int | None) -> None:
        self._cursor = _Cursor(file, size)
        self._size = size
        self._global: dict[str, str] = {}
        self._next = 0  # where the next header is
        self._current: Member | None = None

    def head(self, count: int) -> bytes:
        """The next bytes of the current member, at most `count`: call it again for more; TarDamage when cut."""
        assert self._current is not None
        left = self._current.offset + self._current.size - self._cursor.at
        wanted = min(count, left)
        data = self._cursor.read(wanted)
        if len(data) < wanted:
            name = self._current.name
            raise TarDamage(self._cursor.at, f"the file ends inside {name!r}", True, name)
        return data

    def __iter__(self) -> Iterator[Member]:
        own: dict[str, str] = {}
        while (header := self._header()) is not None:
            kind, size, start = header[156:157], _number(header[124:136], self._next), self._next
            payload = start + _BLOCK
            if kind in (b"x", b"X", b"g", b"L", b"K"):
                self._take_extra(kind, self._extra(size, start), own, start)
                self._next = _padded(payload + size)
                continue
            found = {**self._global, **own}
            own = {}
            sparse = kind == b"S" or any(k.startswith("GNU.sparse") for k in found)
            size = _decimal(found["size"], start) if "size" in found else size
            if kind not in _FILES and kind != b"S":
                # Links, folders and devices have no payload, whatever their size field says (tarfile reads it so too).
                self._next = payload + (_padded(size) if kind not in b"123456" else 0)
                continue
            if kind == b"S":
                payload = self._after_sparse_maps(header, payload)
            if self._size is not None and payload + size > self._size:
                name = _name(header, found)
                raise TarDamage(start, f"member {name!r} of {size} bytes goes beyond the end", True, name)
            self._next = _padded(payload + size)
            self._current = Member(_name(header, found), payload, size, sparse)
            yield self._current

    def _header(self) -> bytes | None:
        """The next header, None at the end mark."""
        if not self._cursor.go(self._next):
            raise TarDamage(self._next, "the file is cut short", cut=True)
        header = self._cursor.read(_BLOCK)
        if len(header) < _BLOCK:
            raise TarDamage(self._next, "the file ends without an end mark", cut=True)
        if not any(header):
            return None
        if _number(header[148:156], self._next) != sum(header[:148]) + sum(header[156:]) + 8 * 32:
            raise TarDamage(self._next, "there is no tar header (its checksum is wrong)")
        return header

    def _extra(self, size: int, start: int) -> bytes:
        if size > _MAX_EXTRA:
            raise TarDamage(start, f"a header of {size} bytes")
        data = self._cursor.read(size)
        if len(data) < size:
            raise TarDamage(start, "the file ends inside a header", cut=True)
        return data

    def _take_extra(self, kind: bytes, data: bytes, own: dict[str, str], start: int) -> None:
        if kind == b"L":
            own["path"] = _text(data.partition(b"\0")[0])
        elif kind in (b"x", b"X"):
            own |= _pax(data, start)
        elif kind == b"g":
            self._global |= _pax(data, start)

    def _after_sparse_maps(self, header: bytes, payload: int) -> int:
        """GNU's old sparse format puts further maps between header and payload."""
        more = header[482] == 1
        while more:
            block = self._cursor.read(_BLOCK)
            if len(block) < _BLOCK:
                raise TarDamage(payload, "the file ends inside a sparse map", cut=True)
            more, payload = block[504] == 1, payload + _BLOCK
        return payload


def walk_tar(file: BinaryIO, size: int | None) -> TarWalk:
    """Iterate over the members of an open tar of `size` bytes; None = not known, then all is read on the way."""
    return TarWalk(file, size)


def _padded(offset: int) -> int:
    return -(-offset // _BLOCK) * _BLOCK


def _number(field: bytes, at: int) -> int:
    """Octal digits, or GNU's base 256; TarDamage for anything else."""
    if field[0] in (0x80, 0xFF):
        if field[0] == 0xFF:
            raise TarDamage(at, "a negative number in a header")
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip()
    if digits.strip(b"01234567"):
        raise TarDamage(at, f"a header says {field!r} where a number belongs")
    return int(digits or b"0", 8)


def _decimal(text: str, at: int) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 20:
        raise TarDamage(at, f"a pax header says size={text[:40]!r}")
    return int(text)


def _pax(data: bytes, at: int) -> dict[str, str]:
    """Records of length, keyword and value; unlike tarfile, a bad one is damage and not the end of the header."""
    found: dict[str, str] = {}
    while data and data[:1] != b"\0":
        length, space, _ = data[:24].partition(b" ")
        if not space or not length.isdigit() or not len(length) + 3 <= int(length) <= len(data):
            raise TarDamage(at, "a pax header that does not parse")
        keyword, equals, value = data[len(length) + 1 : int(length)].partition(b"=")
        if not equals or not value.endswith(b"\n"):
            raise TarDamage(at, "a pax header that does not parse")
        found[_text(keyword)] = _text(value[:-1])
        data = data[int(length) :]
    return found


def _name(header: bytes, found: dict[str, str]) -> str:
    for given in ("GNU.sparse.name", "path"):
        if given in found:
            return found[given]
    name = _text(header[:100].partition(b"\0")[0])
    prefix = _text(header[345:500].partition(b"\0")[0]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")
