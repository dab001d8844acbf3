"""An appender of plain USTAR members that says where each payload lies; reading is by range, so there is no reader.

The bytes are a function of names and payloads alone: no clock, no user, no group. `tar` and `tarfile` read the result.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from types import TracebackType

__all__ = ["TarAppender"]

_BLOCK = 512
_MODE = 0o444
_MTIME = 946_684_800  # 2000-01-01; GNU tar warns of an 'implausibly old time stamp' when it is 0
_MAX_SIZE = 8**11 - 1  # what eleven octal digits hold
_NAME = re.compile(r"(?:[^/.\0][^/\0]*/)*[^/.\0]+\.[^/\0]+")


class TarAppender:
    """Writes one new tar file on local disk; `close` ends it. A file that was not closed has no end mark."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")
        self._end = 0
        self.members = 0

    def append(self, name: str, data: bytes) -> tuple[int, int]:
        """Add a member; returns [offset, size] of its payload in the file, in bytes.

        `name` is `<key>.<ext>`, at most 100 bytes of UTF-8; a key may begin with folders, but has no dot after them (a
        WebDataset reader takes all up to the first dot of the base name for the key), and no part begins with one.
        ValueError otherwise, and for a payload of 8 GiB or more.
        """
        header = _header(name, len(data))
        offset = self._end + _BLOCK
        padding = -len(data) % _BLOCK
        self._file.write(header)
        self._file.write(data)
        self._file.write(bytes(padding))
        self._end = offset + len(data) + padding
        self.members += 1
        return offset, len(data)

    def close(self) -> None:
        """Write the end mark (two empty blocks) and close; again is a no-op."""
        if not self._file.closed:
            self._file.write(bytes(2 * _BLOCK))
            self._file.close()

    def __enter__(self) -> TarAppender:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        # On a full disk closing fails as writing did; the first error is the one to be told.
        with contextlib.suppress(OSError):
            self._file.close()


def _header(name: str, size: int) -> bytes:
    """The 512 bytes before a payload (POSIX.1-1988, 'ustar Interchange Format')."""
    encoded = name.encode()
    if len(encoded) > 100 or not _NAME.fullmatch(name):
        raise ValueError(f"tar member name {name!r} is not <key>.<ext> of at most 100 bytes")
    if size > _MAX_SIZE:
        raise ValueError(f"tar member {name!r} has {size} bytes, a tar member holds at most {_MAX_SIZE}")
    header = bytearray(_BLOCK)
    header[0 : len(encoded)] = encoded
    header[100:108] = b"%07o\0" % _MODE
    header[108:116] = header[116:124] = b"0000000\0"  # uid and gid
    header[124:136] = b"%011o\0" % size
    header[136:148] = b"%011o\0" % _MTIME
    header[148:156] = b" " * 8  # the checksum counts its own field as spaces
    header[156:157] = b"0"
    header[257:265] = b"ustar\x0000"
    header[329:337] = header[337:345] = b"0000000\0"  # device numbers
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)
