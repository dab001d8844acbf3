"""The body of one answer under way: read within its deadline, its least rate and its memory.

In: an answer whose headers have arrived. Out: the body as bytes. Fails with `BodyRefused`, with TimeoutError when the
deadline has passed or the body comes too slowly (`late` says which), and with what aiohttp raises.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine
from typing import Any

import aiohttp

from mmdata.media.body import Body, BodyRefused
from mmdata.media.budget import Hold
from mmdata.media.exchange import Exchange

__all__ = ["Transfer"]

_UNKNOWN_LENGTH = 256 << 10  # reserved for a body that does not say how long it is
_DECODED_AT_ONCE = 1 << 20  # of a coded body, before others get their turn
_RATE_SPAN_S = 5


class Transfer:
    """One exchange's clock and memory; `deadline` is that of the `asyncio.timeout` around it. `stop` it at the end."""

    deadline: asyncio.Timeout | None = None

    def __init__(self, hold: Hold, timeout_s: float, *, max_bytes: int, keep_cut: bool, least_per_s: int) -> None:
        self.status: int | None = None
        self.content_type: str | None = None
        self._hold, self._timeout_s = hold, timeout_s
        self._max_bytes, self._keep_cut, self._least_per_s = max_bytes, keep_cut, least_per_s
        self._loop = asyncio.get_running_loop()
        self._started = self._loop.time()
        self._waited_s = 0.0  # for memory and sockets, not for the server
        self._timer: asyncio.TimerHandle | None = None
        self._sizes: deque[int] = deque(maxlen=_RATE_SPAN_S)  # of the body, each second
        self._is_too_slow = False

    @property
    def spent_s(self) -> float:
        """Seconds since this was made, without waits for memory and sockets."""
        return self._loop.time() - self._started - self._waited_s

    def stop(self) -> None:
        """No longer look at the body's rate."""
        if self._timer is not None:
            self._timer.cancel()

    def late(self) -> Exchange:
        """The outcome when the deadline has passed, or was brought forward."""
        words = f"{self._timeout_s:.3g} s passed"
        if self._is_too_slow:
            words = f"less than {self._least_per_s} bytes/s over {_RATE_SPAN_S} s"
        return Exchange("timeout", words, is_transient=True)

    async def unhurried(self, wait: Coroutine[Any, Any, None]) -> None:
        """Wait for memory or sockets, not for the server: the deadline moves by as long, the rate is taken anew."""
        assert self.deadline is not None
        when, started = self.deadline.when(), self._loop.time()
        self.deadline.reschedule(None)
        try:
            await wait
        finally:
            waited = self._loop.time() - started
            self._waited_s += waited
            self._sizes.clear()
        if when is not None:
            self.deadline.reschedule(when + waited)

    async def body(self, answer: aiohttp.ClientResponse) -> bytes:
        """The whole body, its content coding undone."""
        announced, coding = answer.content_length, answer.headers.get("Content-Encoding")
        if announced is not None and announced > self._max_bytes and not self._keep_cut:
            raise BodyRefused(Exchange("too_large", f"more than {self._max_bytes} bytes"))
        body = Body(self._max_bytes, coding, self._keep_cut)
        first = _UNKNOWN_LENGTH if announced is None or coding else announced
        first = max(1, min(first, self._max_bytes))
        if not self._hold.try_reserve(first):
            await self.unhurried(self._hold.reserve(first))
        body.room = self._hold.size
        self._look_at(body)
        async for chunk in answer.content.iter_any():
            body.feed(chunk)
            while body.is_short:
                await self._make_room(body)
        return body.finish()

    async def _make_room(self, body: Body) -> None:
        hold = self._hold
        if body.held >= body.room and not hold.is_above:
            grown = hold.try_reserve(max(body.held, 2 * hold.size)) and hold.size > body.room
            if not grown and hold.size <= body.room:
                await self.unhurried(hold.grow())
        body.room = self._max_bytes if hold.is_above else hold.size
        if body.is_coded:
            body.room = min(body.room, body.held + _DECODED_AT_ONCE)
            await asyncio.sleep(0)  # a bomb takes a while: others get their turn in between
        body.proceed()

    def _look_at(self, body: Body) -> None:
        """Look at the body's size now and every second."""
        if self.deadline is None or self.deadline.expired():  # in this very turn of the loop: it ends anyhow
            return
        span = self._sizes.maxlen or 1
        if len(self._sizes) == span and body.size - self._sizes[0] < self._least_per_s * span:
            self._is_too_slow = True
            if self.deadline.when() is not None:
                self.deadline.reschedule(self._loop.time())
            return
        self._sizes.append(body.size)
        if self._least_per_s:
            self._timer = self._loop.call_later(1.0, self._look_at, body)
