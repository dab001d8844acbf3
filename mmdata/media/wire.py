# L to E: see the IMPORTANT note in /tmp/brief/NOTES3.md first (back to aiohttp; this file goes).
"""One HTTP/1.1 connection: a request goes out, the answer comes in, in bounded memory whatever the other side sends.

In: the bytes of a GET request, and a `Reader` that is told what arrives. Out: calls of that reader, in the loop's
thread: `head` once, `body` for every piece, `end` once and last, with an error where the answer broke off or was none.
Parsed by llhttp (node's parser); what it does not bound is bounded here: the bytes of all headers together, interim
(1xx) answers among them, and those of trailers and chunk extensions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from mmdata.media.exchange import BrokenAnswer, LostConnection

__all__ = ["BUFFER_BYTES", "Connection", "Headers", "Reader"]

BUFFER_BYTES = 128 << 10  # what one read of a socket may bring
# A body in chunks of a few bytes costs a thousand times the work of another: more than so many pieces must bring as
# many bytes each.
_MANY_PIECES = 10_000
_LEAST_PIECE = 16

Headers = list[tuple[bytes, bytes]]


class Reader(Protocol):
    """Who asked. After `end` nothing follows."""

    def head(self, status: int, headers: Headers) -> bool:
        """The final answer's status and headers as sent; whether its body is wanted."""

    def body(self, chunk: bytes) -> bool:
        """A piece of the body; whether more is wanted."""

    def end(self, error: Exception | None) -> None:
        """The answer is whole, or no longer wanted, or `error` ended it."""


class Connection(asyncio.BufferedProtocol):
    """`ask` sends one request; once its reader's `end` was called another may follow where `is_reusable`.

    `buffer` is read into by all connections of a loop in turn: what arrives is copied out of it at once. `lost` is
    called once, when the connection is closed, by whomever.
    """

    def __init__(self, buffer: memoryview, max_header_bytes: int, lost: Callable[[Connection], None]) -> None:
        self.transport: asyncio.Transport | None = None
        self.is_reusable = False
        self.got_bytes = False  # of the present answer
        self.idle_since = 0.0
        self._buffer = buffer
        self._most = max_header_bytes
        self._lost = lost
        self._reader: Reader | None = None
        self._parser: HttpResponseParser | None = None
        self._headers: Headers = []
        self._header_bytes = 0
        self._unused_bytes = 0  # that came since the last byte of a body, or since the request
        self._pieces = self._body_bytes = 0
        self._has_head = self._is_wanted = self._is_whole = False

    def ask(self, request: bytes, reader: Reader) -> None:
        """Send `request`; `reader` is told what comes of it, never before this returns."""
        assert self.transport is not None
        self._reader = reader
        self._headers = []
        self._header_bytes = self._unused_bytes = self._pieces = self._body_bytes = 0
        self._has_head = self._is_whole = False
        self._is_wanted = True
        self.is_reusable = self.got_bytes = False
        self.transport.write(request)

    def abort(self) -> None:
        """Close at once; a reader that still waits is told nothing."""
        self._reader = None
        self.is_reusable = False
        if self.transport is not None:
            self.transport.abort()

    # What the loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it
        self._parser = parser = HttpResponseParser(self)
        # As browsers do: servers that end lines with a bare line feed, or have odd bytes in headers, are many.
        parser.set_dangerous_leniencies(
            lenient_headers=True, lenient_optional_cr_before_lf=True, lenient_spaces_after_chunk_size=True
        )

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the loop reads to."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Parse what was read."""
        if self._reader is None or self._parser is None:  # it speaks without being asked
            self.abort()
            return
        self.got_bytes = True
        self._unused_bytes += nbytes  # until `on_body` says otherwise
        error: Exception | None = None
        try:
            self._parser.feed_data(self._buffer[:nbytes])
        except HttpParserUpgrade:
            error = BrokenAnswer("it changes the protocol")
        except HttpParserError as raised:
            cause = raised.__context__
            error = cause if isinstance(cause, BrokenAnswer) else BrokenAnswer(str(raised) or "no HTTP")
        if self._is_whole:
            self.is_reusable = self.is_reusable and error is None
            self._end(None)
        elif error is not None or not self._is_wanted:
            self._end(error)
        elif self._unused_bytes > self._most:
            self._end(BrokenAnswer(f"more than {self._most} bytes of headers"))
        elif self._pieces > _MANY_PIECES and self._body_bytes < self._pieces * _LEAST_PIECE:
            self._end(BrokenAnswer("chunks of a few bytes each"))

    def eof_received(self) -> None:
        """The other side sends no more."""
        self.is_reusable = False
        names = {name.lower() for name, _ in self._headers} if self._has_head else set()
        ends_by_close = self._has_head and not names & {b"content-length", b"transfer-encoding"}
        self._end(None if ends_by_close else LostConnection("the answer was cut short"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell whoever still waits."""
        self.is_reusable = False
        self._end(exc or LostConnection("the connection was closed"))
        self.transport = self._parser = None  # the parser knows this object: a circle
        self._lost(self)

    def _end(self, error: Exception | None) -> None:
        reader, self._reader = self._reader, None
        if not self.is_reusable and self.transport is not None:
            self.transport.abort()
        if reader is not None:
            reader.end(error)

    # What the parser calls.

    def on_message_begin(self) -> None:
        """An answer; more than one to one request is not what we asked for."""
        if self._is_whole:
            raise BrokenAnswer("a second answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header, or a trailer, which nobody reads."""
        if self._has_head:
            return
        self._header_bytes += len(name) + len(value)
        if self._header_bytes > self._most:
            raise BrokenAnswer(f"more than {self._most} bytes of headers")
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        """All headers of an answer, or of an interim one."""
        assert self._reader is not None
        assert self._parser is not None
        status = self._parser.get_status_code()
        if 100 <= status < 200:
            self._headers = []
            return
        self._has_head = True
        self._is_wanted = self._reader.head(status, self._headers)

    def on_body(self, chunk: bytes) -> None:
        """A piece of the body."""
        self._unused_bytes = 0
        self._pieces += 1
        self._body_bytes += len(chunk)
        if self._is_wanted and self._reader is not None:
            self._is_wanted = self._reader.body(chunk)

    def on_message_complete(self) -> None:
        """The end of an answer, or of an interim one."""
        if self._has_head:
            assert self._parser is not None
            self._is_whole = True
            self.is_reusable = self._parser.should_keep_alive()
