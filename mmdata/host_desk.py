"""The desk at which the workers of a run ask what hosts allow: a book of hosts with a clock, a lock and its messages.

In: batches of messages of one worker. Out: replies. Plain tuples, so that any transport carries them. ValueError for a
message that is none.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from mmdata.media.host_rules import Grant, HostRules, Limit
from mmdata.media.hosts import HostBook
from mmdata.settings import FetchOptions

__all__ = ["BookDesk", "Desk", "Message", "Reply", "rules_of"]

# ("hello",), ("want", host, count), ("give_up", host, count), ("leave", host, outcome, pause_s), ("slow", host, s),
# ("bye",)
Message = tuple[Any, ...]
# ("grant", host), ("closed", host, for_s), ("again", in_s): ask again then; ("gone",): this worker was forgotten
Reply = tuple[Any, ...]


class Desk(Protocol):
    """Where a book is kept: here (`BookDesk`), or elsewhere behind the same methods."""

    def answer(self, client: str, messages: Sequence[Message]) -> list[Reply]:
        """Take what a worker says, and tell it what it may do."""

    def forget(self, client: str) -> None:
        """The worker is gone."""

    def changed(self) -> dict[str, Any] | None:
        """What `HostBook.save` says, if that changed since the last call; None = it did not."""


def rules_of(fetch: FetchOptions) -> HostRules:
    """What a recipe says of hosts."""
    others = {
        name.strip().lower().rstrip("."): Limit(limit.connections, limit.per_s)
        for name, limit in fetch.host_limits.items()
    }
    default = Limit(fetch.per_host, fetch.per_host_rate)
    return HostRules(default, others, fetch.host_failures, fetch.host_cooldown_s)


class BookDesk:
    """A book with its clock and a lock: the one place of a run where hosts' allowances are kept. Thread-safe.

    It pickles as its rules and what `save` says, for another process that shall keep it from then on.
    """

    def __init__(self, rules: HostRules, saved: Mapping[str, Any] | None = None) -> None:
        self.rules = rules
        self.clock: Callable[[], float] = time.monotonic
        self.lock = threading.Lock()
        self.book = HostBook(rules)
        if saved is not None:
            self.book.load(saved, self.clock(), time.time())
        self._told = self.book.changes
        self.listeners: dict[str, Callable[[], object]] = {}  # worker → called when it has something to take
        self._known: set[str] = set()
        self._holder: Desk | None = None

    def __reduce__(self) -> tuple[type[BookDesk], tuple[HostRules, dict[str, Any]]]:
        with self.lock:
            return BookDesk, (self.rules, self.book.save(self.clock(), time.time()))

    def answer(self, client: str, messages: Sequence[Message]) -> list[Reply]:
        """Take what a worker says, in order, and tell it what it may do."""
        if self._holder is not None:
            return self._holder.answer(client, messages)
        with self.lock:
            now, book = self.clock(), self.book
            for message in messages:
                kind = message[0]
                if kind == "hello":
                    self._known.add(client)
                elif client not in self._known:
                    return [("gone",)]  # late words of a worker that was forgotten must not take connections
                elif kind == "bye":
                    self._known.discard(client)
                    book.forget(client, now)
                    self.tell(client)
                    return []
                elif kind == "want":
                    book.want(client, message[1], now, message[2])
                elif kind == "leave":
                    book.leave(client, message[1], message[2], message[3], now)
                elif kind == "give_up":
                    book.give_up(client, message[1], message[2], now)
                elif kind == "slow":
                    book.slow(message[1], message[2], now)
                else:
                    raise ValueError(f"a gate said {kind!r}")
            if client not in self._known:
                return [("gone",)]
            replies: list[Reply] = [
                ("grant", told.host) if isinstance(told, Grant) else ("closed", told.host, told.for_s)
                for told in book.take(client, now)
            ]
            later = book.next_change(client, now)
            if later is not None:
                replies.append(("again", later - now))
            self.tell(client)
            return replies

    def forget(self, client: str) -> None:
        """The worker is gone: what it had and wanted is free."""
        if self._holder is not None:
            self._holder.forget(client)
            return
        with self.lock:
            self._known.discard(client)
            self.book.forget(client, self.clock())
            self.tell(client)

    def changed(self) -> dict[str, Any] | None:
        """What is to be saved, if that changed since the last call; None = it did not."""
        if self._holder is not None:
            return self._holder.changed()
        with self.lock:
            if self.book.changes == self._told:
                return None
            self._told = self.book.changes
            return self.book.save(self.clock(), time.time())

    def tell(self, by: str) -> None:
        """Call the listeners of whoever has something to take after what was done `by` another; `lock` is held."""
        news, self.book.news = self.book.news, set()
        for client in news:
            if client != by and client in self.listeners:
                self.listeners[client]()

    def lend(self, holder: Desk) -> None:
        """From now on `holder`, made of this desk's pickle, keeps the book; whoever asks here is asked on."""
        self._holder = holder

    def take_back(self) -> None:
        """Keep the book again, with what the holder has learnt; where it is gone, with what was known before."""
        holder, self._holder = self._holder, None
        if holder is None:
            return
        with contextlib.suppress(OSError, EOFError):
            saved = holder.changed()
            if saved is not None:
                with self.lock:
                    self.book, self._told = HostBook(self.rules), -1
                    self.book.load(saved, self.clock(), time.time())
