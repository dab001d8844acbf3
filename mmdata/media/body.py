"""The body of an answer on its way into memory: bounded in bytes before and after its content coding is undone.

In: chunks as they arrive. Out: the whole as `bytes`, held once. Fails with `BodyRefused`, whose words say why; memory
is then at most `limit` bytes and one chunk, whatever was sent.
"""

from __future__ import annotations

import io
import zlib
from typing import Protocol

from mmdata.media.exchange import Exchange, printable

__all__ = ["Body", "BodyRefused"]

_STEP = 256 << 10  # bytes that one call of a decoder may give


class BodyRefused(Exception):
    """Ends the reading of a body; `outcome` says with what."""

    def __init__(self, outcome: Exchange) -> None:
        super().__init__(outcome.status)
        self.outcome = outcome


class _Decoder(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unconsumed_tail(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = 0, /) -> bytes: ...


class Body:
    """Gathers one body. `limit`: most bytes of it, both as sent and decoded; `coding`: its Content-Encoding header.

    `room` is how many bytes of it may be in memory; whoever feeds it sets that and looks at `is_short` after each
    `feed`: then it wants more room, and `proceed` afterwards. `feed` and `proceed` raise BodyRefused with `too_large`
    (its data are the first `limit` bytes when `keep_cut`) and `decode` for a broken coding, the constructor `not_media`
    for a coding that is not gzip or deflate: none was asked for.
    """

    def __init__(self, limit: int, coding: str | None = None, keep_cut: bool = False) -> None:
        self.room = 0
        self.size = 0  # bytes as sent
        self.held = 0  # bytes in memory
        self._limit = limit
        self._keep_cut = keep_cut
        self._first: bytes | None = None
        self._rest: io.BytesIO | None = None  # its getvalue() is the buffer itself, no copy of it
        self._pending = b""  # not decoded yet
        self._has_more = False  # that the decoder could give at once
        self._decoder: _Decoder | None = None
        name = (coding or "").strip().lower()
        self.is_coded = name in ("gzip", "x-gzip", "deflate")
        if name in ("gzip", "x-gzip"):
            self._decoder = zlib.decompressobj(wbits=31)
        elif not self.is_coded and name not in ("", "identity", "none"):
            raise BodyRefused(Exchange("not_media", f"content coding {printable(name)} was not asked for"[:200]))

    @property
    def is_short(self) -> bool:
        """Whether it needs more room to go on."""
        return self._has_more or self.held > self.room

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes as they were sent."""
        self.size += len(chunk)
        if not self.is_coded:
            self._keep(chunk)
            return
        if self.size > self._limit and not self._keep_cut:
            raise self._too_large()
        self._pending += chunk
        self.proceed()

    def proceed(self) -> None:
        """Decode what there is room for."""
        if self._decoder is None:
            if not self.is_coded or len(self._pending) < 2:
                return
            # Some servers send `deflate` without the zlib header that RFC 9110 (8.4.1.2) asks for.
            first, second = self._pending[:2]
            is_zlib = first & 15 == 8 and (first << 8 | second) % 31 == 0
            self._decoder = zlib.decompressobj(wbits=15 if is_zlib else -15)
        while self._pending or self._has_more:
            if self._decoder.eof:  # what follows the end is not read: a decoder would hoard it
                self._pending, self._has_more = b"", False
                return
            # At the limit one byte more is asked for, so as to know whether there is one.
            left = self.room - self.held if self.room < self._limit else self._limit - self.held + 1
            most = min(_STEP, left)
            if most <= 0:
                self._has_more = True
                return
            try:
                plain = self._decoder.decompress(self._pending, most)
            except zlib.error as error:
                raise BodyRefused(Exchange("decode", f"content coding: {error}"[:200])) from None
            self._pending = self._decoder.unconsumed_tail
            self._has_more = len(plain) == most
            self._keep(plain)

    def finish(self) -> bytes:
        """The whole body, decoded."""
        if self.is_coded and self.size and (self._decoder is None or not self._decoder.eof):
            raise BodyRefused(Exchange("connect", "content coding cut short", is_transient=True))
        return self._value()

    def _keep(self, chunk: bytes) -> None:
        room = self._limit - self.held
        if len(chunk) > room:
            if self._keep_cut:
                self._append(chunk[:room])
            raise self._too_large()
        self._append(chunk)

    def _append(self, chunk: bytes) -> None:
        self.held += len(chunk)
        if self._first is None:
            self._first = chunk
            return
        if self._rest is None:
            self._rest = io.BytesIO()
            self._rest.write(self._first)
        self._rest.write(chunk)

    def _value(self) -> bytes:
        return self._rest.getvalue() if self._rest is not None else self._first or b""

    def _too_large(self) -> BodyRefused:
        data = self._value() if self._keep_cut else None
        return BodyRefused(Exchange("too_large", f"more than {self._limit} bytes", data))
