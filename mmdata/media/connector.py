"""The open connections of one client: to checked addresses only, bounded in number, each bounded in what it may bring.

aiohttp keeps a connection for the host, scheme and port that it was opened for, so that no later name can reach an
address through one that was refused to it. What aiohttp bounds: one header line, the number of headers, what is read
ahead of a body's reader. What it does not is bounded here: all that is received and is no body (headers, interim (1xx)
answers, chunk sizes and extensions, trailers), and the idle connections of all hosts together. A little of this
overrides what aiohttp calls private; tests/media/test_http.py knows when that changes.
"""

from __future__ import annotations

import asyncio
import functools
import heapq
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.http_exceptions import BadHttpMessage

__all__ = ["BoundedConnector", "was_never_heard"]

_MOST_IDLE = 512
_TRIMMED_EVERY = 64


def was_never_heard(error: Exception) -> bool:
    """Whether a kept connection turned out to be closed: the server has not seen the request (RFC 9112, 9.3.1)."""
    return bool(getattr(error, "_mmdata_never_heard", False))


class _BoundedHandler(ResponseHandler):
    """One connection. Received for each request are at most `most` bytes beyond twice its body.

    Twice, so that chunks of 8 bytes and more may come in any number; each costs the loop as much as a large one.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, most: int) -> None:
        super().__init__(loop)
        self._most = most
        self._requests = 0
        self._received = 0
        self._last: object = None  # the body of the answer before

    def set_response_params(self, **params: Any) -> None:
        """A request is about to be sent."""
        self._requests += 1
        self._received, self._last = 0, self._payload
        super().set_response_params(**params)

    def data_received(self, data: bytes) -> None:
        """Parse, and see how much of it was a body."""
        self._received += len(data)
        super().data_received(data)
        if self.transport is None:  # all is there, and the connection closed
            return
        body = 0 if self._payload is None or self._payload is self._last else self._payload.total_bytes
        if self._received - body > self._most + body:
            words = "chunks of a few bytes each" if body else f"more than {self._most} bytes of headers"
            self._refuse(BadHttpMessage(words))

    def set_exception(self, exc: BaseException, *more: Any) -> None:
        """Tell who waits; and note whether a word has come."""
        if self._requests > 1 and not self._received and isinstance(exc, aiohttp.ClientConnectionError):
            exc._mmdata_never_heard = True  # type: ignore[attr-defined]
        super().set_exception(exc, *more)

    def _refuse(self, error: Exception) -> None:
        if self._payload is not None:
            self._payload.set_exception(error)
        self.set_exception(error)
        if self.transport is not None:
            self.transport.abort()


class BoundedConnector(aiohttp.TCPConnector):
    """`most` is the bytes of one answer that are no body."""

    def __init__(self, most: int, **options: Any) -> None:
        super().__init__(**options)
        handler: Any = functools.partial(_BoundedHandler, loop=self._loop, most=most)
        self._factory = handler
        self._releases = 0

    @property
    def idle_count(self) -> int:
        """Connections that are open and not in use."""
        return sum(map(len, self._conns.values()))

    def drop_idle(self, keep: int = 0) -> None:
        """Close all connections that are not in use, but for the `keep` last used."""
        surplus = self.idle_count - keep
        if surplus <= 0:
            return
        for _, _, key, entry in heapq.nsmallest(
            surplus, ((e[1], id(e), key, e) for key, entries in self._conns.items() for e in entries)
        ):
            self._conns[key].remove(entry)
            entry[0].abort()
            if not self._conns[key]:
                del self._conns[key]

    def _release(self, *what: Any, **more: Any) -> None:
        super()._release(*what, **more)
        self._releases += 1
        if self._releases % _TRIMMED_EVERY == 0:
            self.drop_idle(_MOST_IDLE)
