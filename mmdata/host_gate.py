"""The gate between a worker that fetches and the book of what hosts allow, near or in another process.

In: the hosts at which a worker wants to start, and what became of its starts. Out: calls of `on_grant`, `on_closed`.
A worker in the process that keeps the book has a `LocalGate`; another has a `LinkedGate`, which exchanges batches of
plain tuples with the `BookDesk` over whatever the pool has: a pipe, or an actor. A host that allows everything is not
asked about, until it fails. A LinkedGate whose other side is gone, or silent for 30 s, raises RetryableError out of its
`async with`.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import queue
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Any, Protocol

from mmdata.errors import RetryableError
from mmdata.host_desk import BookDesk, Message, Reply, rules_of
from mmdata.media.host_rules import FAILURES, NEUTRAL, Grant, HostRules
from mmdata.settings import FetchOptions

__all__ = ["Gate", "LinkedGate", "LocalGate", "own_gate"]

SILENCE_S = 30.0
GOODBYE_S = 5.0
_LEAST_PACE_S, _MOST_PACE_S = 0.01, 0.1


class Gate(Protocol):
    """What a fetcher asks, in one event loop, within `async with`. Hosts are names in lower case, without port.

    `on_grant` and `on_closed` are set by the fetcher and called in the loop's thread; also from inside `want`.
    """

    on_grant: Callable[[str], None]  # one start at this host may begin now
    on_closed: Callable[[str, float], None]  # what was wanted at this host is dropped; ask again in so many seconds

    def want(self, host: str) -> None:
        """One more start is wanted."""

    def give_up(self, host: str, count: int) -> None:
        """So many wants that were not granted are taken back."""

    def leave(self, host: str, outcome: str, pause_s: float | None) -> None:
        """A granted start is over: a row's status, `redirect`, or `cancelled`; `pause_s` is what Retry-After says."""

    def slow(self, host: str, interval_s: float) -> None:
        """The host's robots.txt asks for so much time between two requests."""

    async def __aenter__(self) -> Gate: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def _unset(*_: Any) -> None:
    raise AssertionError("a gate's on_grant and on_closed are set before anything is wanted")


class _Doubts:
    """Which hosts need not be asked about: those that allow everything, while nothing speaks against them.

    A failure does, until a success; a pause does, until it is over; a Crawl-delay does for good.
    """

    def __init__(self, rules: HostRules) -> None:
        self._rules = rules
        self._any = rules.default == (None, None) or any(map(rules.is_unbounded, rules.others))
        self._until: dict[str, float] = {}

    def is_free(self, host: str) -> bool:
        """Whether a start there needs no grant."""
        return self._any and host not in self._until and self._rules.is_unbounded(host)

    def raise_(self, host: str, until: float) -> None:
        """Something speaks against the host, at least until then."""
        if self._any and self._rules.is_unbounded(host):
            self._until[host] = max(until, self._until.get(host, until))

    def is_told(self, host: str, outcome: str, pause_s: float | None, now: float) -> bool:
        """Note what became of a start; whether the book must hear of it."""
        if outcome in FAILURES or pause_s:
            self.raise_(host, now + (pause_s or 0.0))
        elif self.is_free(host):
            return False
        elif outcome not in NEUTRAL and self._until.get(host, now + 1) <= now:
            del self._until[host]
        return True


class LocalGate:
    """The gate of a worker in the process that keeps the book: no messages, 2 to 15 µs a start."""

    def __init__(self, desk: BookDesk, client: str) -> None:
        self.on_grant: Callable[[str], None] = _unset
        self.on_closed: Callable[[str, float], None] = _unset
        self._desk, self._book, self._client = desk, desk.book, client
        self._doubts = _Doubts(desk.rules)
        self._timer: asyncio.Handle | None = None
        self._timer_at = 0.0
        self._is_open = True

    async def __aenter__(self) -> LocalGate:
        self._loop = asyncio.get_running_loop()
        self._desk.listeners[self._client] = partial(self._loop.call_soon_threadsafe, self._on_news)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_open = False
        with self._desk.lock:
            self._desk.listeners.pop(self._client, None)
        if self._timer is not None:
            self._timer.cancel()
        self._desk.forget(self._client)

    def want(self, host: str) -> None:
        """One more start is wanted; granted from in here where that is possible."""
        if self._doubts.is_free(host):
            self.on_grant(host)
            return
        with self._desk.lock:
            self._book.want(self._client, host, self._desk.clock())
        self._poll()

    def give_up(self, host: str, count: int) -> None:
        """So many wants that were not granted are taken back."""
        with self._desk.lock:
            self._book.give_up(self._client, host, count, self._desk.clock())
            self._desk.tell(self._client)

    def leave(self, host: str, outcome: str, pause_s: float | None) -> None:
        """A granted start is over."""
        now = self._desk.clock()
        if self._doubts.is_told(host, outcome, pause_s, now):
            with self._desk.lock:
                self._book.leave(self._client, host, outcome, pause_s, now)
                later = self._book.next_change(self._client, now)
                self._desk.tell(self._client)
            self._poll_in(later, now)

    def slow(self, host: str, interval_s: float) -> None:
        """The host's robots.txt asks for so much time between two requests."""
        self._doubts.raise_(host, math.inf)
        with self._desk.lock:
            self._book.slow(host, interval_s, self._desk.clock())

    def _poll(self) -> None:
        with self._desk.lock:
            now = self._desk.clock()
            told = self._book.take(self._client, now)
            later = self._book.next_change(self._client, now)
            self._desk.tell(self._client)
        self._poll_in(later, now)
        for each in told:
            if isinstance(each, Grant):
                self.on_grant(each.host)
            else:
                self._doubts.raise_(each.host, now + each.for_s)
                self.on_closed(each.host, each.for_s)

    def _poll_in(self, later: float | None, now: float) -> None:
        """Look again at that time, unless an earlier look is due already."""
        if later is None or (self._timer is not None and self._timer_at <= later):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = later
        delay = later - now
        self._timer = self._loop.call_soon(self._on_time) if delay <= 0 else self._loop.call_later(delay, self._on_time)

    def _on_time(self) -> None:
        self._timer = None
        self._poll()

    def _on_news(self) -> None:
        if self._is_open:
            self._poll()


def own_gate(fetch: FetchOptions) -> Callable[[], Gate]:
    """A maker of gates for a call of its own, without a run: they share one book, in this process."""
    desk, numbers = BookDesk(rules_of(fetch)), itertools.count()
    return lambda: LocalGate(desk, f"own-{next(numbers)}")


class LinkedGate:
    """The gate of a worker in another process than the book.

    `exchange` sends messages to `BookDesk.answer` and returns its replies; it blocks, and is called in one thread of
    its own, 10 ms after its last call at the earliest, and not at all while there is nothing to say or to wait for.
    """

    def __init__(self, exchange: Callable[[list[Message]], list[Reply]], rules: HostRules) -> None:
        self.on_grant: Callable[[str], None] = _unset
        self.on_closed: Callable[[str, float], None] = _unset
        self._line = _Line(exchange)
        self._doubts = _Doubts(rules)
        self._wants: Counter[str] = Counter()  # not told yet
        self._said: list[Message] = [("hello",)]  # nor these
        self._waiting: Counter[str] = Counter()  # host → wants neither granted, closed nor taken back
        self._error: BaseException | None = None

    async def __aenter__(self) -> LinkedGate:
        self._loop = asyncio.get_running_loop()
        self._owner = asyncio.current_task()
        self._news = asyncio.Event()
        self._line.open()
        self._pump = asyncio.create_task(self._keep_asking())
        self._pump.add_done_callback(self._pump_ended)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pump.cancel()
        await asyncio.gather(self._pump, return_exceptions=True)
        try:
            if self._error is None and self._said[:1] != [("hello",)]:
                await self._line.ask([*self._collect(), ("bye",)], GOODBYE_S)
        except RetryableError:
            pass  # the pool forgets this worker when it ends
        finally:
            self._line.close()
        if self._error is not None:
            if self._owner is not None:
                self._owner.uncancel()
            if kind is None or issubclass(kind, asyncio.CancelledError):
                raise self._error from error

    def want(self, host: str) -> None:
        """One more start is wanted."""
        if self._doubts.is_free(host):
            self.on_grant(host)
            return
        self._wants[host] += 1
        self._waiting[host] += 1
        self._news.set()

    def give_up(self, host: str, count: int) -> None:
        """So many wants that were not granted are taken back."""
        count = min(count, self._waiting[host])
        _less(self._waiting, host, count)
        untold = min(count, self._wants[host])
        _less(self._wants, host, untold)
        if count > untold:
            self._say("give_up", host, count - untold)

    def leave(self, host: str, outcome: str, pause_s: float | None) -> None:
        """A granted start is over."""
        if self._doubts.is_told(host, outcome, pause_s, self._loop.time()):
            self._say("leave", host, outcome, pause_s)

    def slow(self, host: str, interval_s: float) -> None:
        """The host's robots.txt asks for so much time between two requests."""
        self._doubts.raise_(host, math.inf)
        self._say("slow", host, interval_s)

    def _say(self, *message: Any) -> None:
        self._said.append(message)
        self._news.set()

    def _collect(self) -> list[Message]:
        messages = [*self._said, *(("want", host, count) for host, count in self._wants.items())]
        self._said, self._wants = [], Counter()
        return messages

    async def _keep_asking(self) -> None:
        """One exchange after the other, while there is something to say or to wait for."""
        pace, asked_at = _LEAST_PACE_S, -math.inf
        while True:
            await self._until_news(pace)
            await asyncio.sleep(max(0.0, asked_at + _LEAST_PACE_S - self._loop.time()))
            messages, asked_at = self._collect(), self._loop.time()
            replies = await self._line.ask(messages, SILENCE_S)
            again_s = self._heed(replies)
            is_quiet = not messages and all(r[0] == "again" for r in replies)
            pace = min(2 * pace, _MOST_PACE_S) if is_quiet else _LEAST_PACE_S
            pace = min(pace, max(again_s, _LEAST_PACE_S))

    def _pump_ended(self, pump: asyncio.Task[None]) -> None:
        if not pump.cancelled() and self._owner is not None:
            self._error = pump.exception()
            self._owner.cancel()  # becomes the error where the `async with` ends

    async def _until_news(self, pace: float) -> None:
        timer = self._loop.call_later(pace, self._news.set) if self._waiting else None
        await self._news.wait()
        self._news.clear()
        if timer is not None:
            timer.cancel()

    def _heed(self, replies: list[Reply]) -> float:
        """Do as the desk says; returns in how many seconds to ask again."""
        again_s = math.inf
        for reply in replies:
            kind = reply[0]
            if kind == "grant":
                self._granted(reply[1])
            elif kind == "closed":
                host, for_s = reply[1:]
                self._waiting.pop(host, None)
                self._wants.pop(host, None)
                self._doubts.raise_(host, self._loop.time() + for_s)
                self.on_closed(host, for_s)
            elif kind == "again":
                again_s = reply[1]
            else:
                raise RetryableError("the run has given this worker up; the same command goes on")
        return again_s

    def _granted(self, host: str) -> None:
        if self._waiting[host]:
            _less(self._waiting, host, 1)
            self.on_grant(host)
        else:  # it crossed with what took the want back
            self._say("leave", host, "cancelled", None)


def _less(counter: Counter[str], host: str, count: int) -> None:
    """So many fewer; a host with none is not kept."""
    counter[host] -= count
    if counter[host] <= 0:
        del counter[host]


class _Line:
    """Calls `exchange` in a thread, so that neither a slow answer nor none at all stops the loop."""

    def __init__(self, exchange: Callable[[list[Message]], list[Reply]]) -> None:
        self._exchange = exchange
        self._questions: queue.SimpleQueue[tuple[list[Message], Future[list[Reply]]] | None] = queue.SimpleQueue()

    def open(self) -> None:
        """Start the thread; a daemon, for it may hang in a call for ever."""
        threading.Thread(target=self._work, name="gate", daemon=True).start()

    def close(self) -> None:
        """End the thread, once its last call is over."""
        self._questions.put(None)

    async def ask(self, messages: list[Message], within_s: float) -> list[Reply]:
        """The desk's replies. RetryableError when there are none in time, or the desk is gone."""
        answer: Future[list[Reply]] = Future()
        self._questions.put((messages, answer))
        try:
            async with asyncio.timeout(within_s):  # asyncio.wait_for loses a cancellation that meets its result
                return await asyncio.wrap_future(answer)
        except TimeoutError:
            raise RetryableError(
                f"the process that keeps this run's hosts has said nothing for {within_s:g} s; see what holds it up, "
                "then the same command goes on"
            ) from None
        except (EOFError, OSError) as error:
            raise RetryableError(
                f"the process that keeps this run's hosts is gone ({type(error).__name__}: {error}); the same command "
                "goes on"
            ) from error

    def _work(self) -> None:
        while (question := self._questions.get()) is not None:
            messages, answer = question
            if not answer.set_running_or_notify_cancel():
                continue
            try:
                answer.set_result(self._exchange(messages))
            except BaseException as error:  # noqa: BLE001  handed over to the loop, where it is raised
                answer.set_exception(error)
