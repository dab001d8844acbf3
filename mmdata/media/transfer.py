# L to E: see the IMPORTANT note in /tmp/brief/NOTES3.md first (back to aiohttp; this file goes).
"""One exchange under way: reads what its connection brings, within its deadline, its rate and its memory.

In: a URL's limits and the calls of `wire.Reader`. Out: `outcome`, an `Exchange`, once `is_over`. All is done in the
loop's callbacks; only a wait for memory needs the coroutine that started it (`go_on`).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from mmdata.media.body import Body, BodyRefused
from mmdata.media.budget import Hold
from mmdata.media.exchange import Exchange, explain, printable, redirected, retry_after_s
from mmdata.media.wire import Connection, Headers

__all__ = ["Judge", "Transfer"]

Judge = Callable[[CIMultiDictProxy[str]], str | None]

_REDIRECTS = (301, 302, 303, 307, 308)
_UNKNOWN_LENGTH = 256 << 10  # reserved for a body that does not say how long it is
_DECODED_AT_ONCE = 4 << 20  # bytes of one body before other bodies get their turn
_RATE_SPAN_S = 5


class Transfer:
    """`start` it on a connection, then `await go_on()`; `stop` it whatever happens.

    Where the connection was found dead before it answered, `is_stale`, and it may be started on another.
    """

    def __init__(
        self,
        url: URL,
        hold: Hold,
        *,
        timeout_s: float,
        max_bytes: int,
        keep_cut: bool,
        least_per_s: int,
        judge: Judge | None,
    ) -> None:
        self.outcome: Exchange | None = None
        self.is_stale = False
        self.waited_s = 0.0  # for memory and sockets, not for the server
        self.status: int | None = None
        self.content_type: str | None = None
        self._url = url
        self._hold = hold
        self._timeout_s = timeout_s
        self._max_bytes = max_bytes
        self._keep_cut = keep_cut
        self._least_per_s = least_per_s
        self._judge = judge
        self._loop = asyncio.get_running_loop()
        self._started = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._sizes: deque[int] | None = None  # of the body, each second
        self._connection: Connection | None = None  # while it is at work
        self._turn: asyncio.Future[None] | None = None
        self._body: Body | None = None
        self._needs: int | None = None  # bytes to wait for; 0 = the place above the budget; None = nothing

    @property
    def left_s(self) -> float:
        """Seconds until the deadline."""
        return self._timeout_s - self.spent_s

    @property
    def spent_s(self) -> float:
        """Seconds since this was made, without waits for memory and sockets."""
        return self._loop.time() - self._started - self.waited_s

    def start(self, connection: Connection, request: bytes) -> None:
        """Send the request."""
        self.outcome, self.is_stale = None, False
        self._connection = connection
        self._turn = self._loop.create_future()
        connection.ask(request, self)
        self._tick()

    async def go_on(self) -> None:
        """Until there is an outcome."""
        while True:
            assert self._turn is not None
            await self._turn
            if self._needs is None:
                return
            self._turn = self._loop.create_future()
            await self._wait_for_memory(self._needs)

    def stop(self) -> None:
        """End it, if it has not ended."""
        self._stop_clock()
        if self._connection is not None:
            self._connection.abort()
            self._connection = None

    def late(self) -> Exchange:
        """The outcome when the deadline has passed."""
        return Exchange("timeout", f"{self._timeout_s:.3g} s passed", is_transient=True)

    # What the connection calls.

    def head(self, status: int, headers: Headers) -> bool:
        """Judge an answer by its headers."""
        try:
            named = CIMultiDict([(n.decode("latin-1"), v.decode("utf-8", "surrogateescape")) for n, v in headers])
            self.status = status
            self.content_type = printable(named.get("Content-Type"))
            self.outcome = self._judged(status, CIMultiDictProxy(named))
        except BodyRefused as refused:
            self.outcome = refused.outcome
        except Exception as error:  # noqa: BLE001  one URL costs one value, whatever the server or a parser does
            self.outcome = explain(error)
        return self.outcome is None

    def body(self, chunk: bytes) -> bool:
        """Take a piece of the body."""
        assert self._body is not None
        try:
            self._body.feed(chunk)
            if self._needs is None:
                self._make_room()
        except BodyRefused as refused:
            self.outcome = refused.outcome
        return self.outcome is None

    def end(self, error: Exception | None) -> None:
        """Nothing follows."""
        connection, self._connection = self._connection, None
        if self.outcome is None and error is not None:
            self.is_stale = isinstance(error, ConnectionError) and connection is not None and not connection.got_bytes
            self.outcome = explain(error)
        if self.outcome is not None:
            self._wake()
        elif self._needs is None:
            self._finish()

    # Inside.

    def _judged(self, status: int, headers: CIMultiDictProxy[str]) -> Exchange | None:
        if 200 <= status < 300:
            if self._judge is not None and (words := self._judge(headers)) is not None:
                return Exchange("opted_out", words)
            self._expect(headers)
            return None
        if status in _REDIRECTS and (location := headers.get("Location")):
            to = redirected(self._url, location)
            return Exchange("bad_url", to) if isinstance(to, str) else Exchange("redirect", location=to)
        detail = f"HTTP {status}"
        if status == 429 or status >= 500:
            kind = "http_429" if status == 429 else "http_5xx"
            return Exchange(kind, detail, is_transient=True, pause_s=retry_after_s(headers.get("Retry-After")))
        return Exchange("http_4xx", detail)

    def _expect(self, headers: CIMultiDictProxy[str]) -> None:
        length, coding = headers.get("Content-Length", ""), headers.get("Content-Encoding")
        is_known = length.isascii() and length.isdecimal() and "Transfer-Encoding" not in headers
        announced = int(length[:20]) if is_known else None
        if announced is not None and announced > self._max_bytes and not self._keep_cut:
            raise BodyRefused(Exchange("too_large", f"more than {self._max_bytes} bytes"))
        self._body = Body(self._max_bytes, coding, self._keep_cut)
        self._sizes = deque(maxlen=_RATE_SPAN_S)
        first = _UNKNOWN_LENGTH if announced is None or coding else announced
        first = max(1, min(first, self._max_bytes))
        if self._hold.try_reserve(first):
            self._body.room = self._hold.size
        else:
            self._ask_for_memory(first)

    def _make_room(self) -> None:
        """Room for what has come, where that needs no wait and no long decoding."""
        body, hold = self._body, self._hold
        assert body is not None
        while body.is_short:
            if (body.is_coded and body.held >= _DECODED_AT_ONCE) or not self._has_grown(body):
                self._ask_for_memory(0)
                return
            body.room = self._max_bytes if hold.is_above else hold.size
            body.proceed()

    def _has_grown(self, body: Body) -> bool:
        hold = self._hold
        return hold.is_above or (hold.try_reserve(max(body.held, 2 * hold.size)) and hold.size > body.room)

    def _ask_for_memory(self, size: int) -> None:
        self._needs = size
        if self._connection is not None and self._connection.transport is not None:
            self._connection.transport.pause_reading()
        self._wake()

    async def _wait_for_memory(self, size: int) -> None:
        self._stop_clock()
        body = self._body
        assert body is not None
        if size:
            await self._waiting(self._hold.reserve(size))
        try:
            while self.outcome is None:  # else the connection broke meanwhile
                if not size and self._hold.size <= body.room and not self._has_grown(body):
                    await self._waiting(self._hold.grow())
                size = 0
                body.room = self._max_bytes if self._hold.is_above else self._hold.size
                if body.is_coded:
                    body.room = min(body.room, body.held + _DECODED_AT_ONCE)
                body.proceed()
                if not body.is_short:
                    break
                await asyncio.sleep(0)  # a bomb takes a while: others get their turn in between
        except BodyRefused as refused:
            self._give_up(refused.outcome)
        self._needs = None
        if self.outcome is not None:
            return
        if self._connection is None:
            self._finish()
            return
        if self._connection.transport is not None:
            self._connection.transport.resume_reading()
        if self._sizes is not None:
            self._sizes.clear()
        self._tick()

    async def _waiting(self, wait: Coroutine[Any, Any, None]) -> None:
        started = self._loop.time()
        await wait
        self.waited_s += self._loop.time() - started

    def _finish(self) -> None:
        try:
            self.outcome = Exchange("ok", data=self._body.finish() if self._body is not None else b"")
        except BodyRefused as refused:
            self.outcome = refused.outcome
        self._wake()

    def _tick(self) -> None:
        """Look at the deadline and the body's size, now and every second."""
        left = self.left_s
        if left <= 0.0005:
            self._give_up(self.late())
            return
        if self._sizes is not None and self._body is not None:
            span = _RATE_SPAN_S
            if len(self._sizes) == span and self._body.size - self._sizes[0] < self._least_per_s * span:
                words = f"less than {self._least_per_s} bytes/s over {span} s"
                self._give_up(Exchange("timeout", words, is_transient=True))
                return
            self._sizes.append(self._body.size)
        self._timer = self._loop.call_later(min(1.0, left), self._tick)

    def _give_up(self, outcome: Exchange) -> None:
        self.outcome = outcome
        self.stop()
        self._wake()

    def _wake(self) -> None:
        if self.outcome is not None:
            self._stop_clock()
        if self._turn is not None and not self._turn.done():
            self._turn.set_result(None)

    def _stop_clock(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
