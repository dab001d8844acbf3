"""Who may ask which host when: connections at once, starts per second, pauses and breakers, over all workers of a run.

In: what workers want and what became of what they started, each with the time. Out: for each worker the starts that
it may make now, and the hosts that are closed for a while. No clock, no thread, no network. Starts of one host are at
least 1/`per_s` apart (GCRA without a burst: ITU-T I.371, tau = 0), and workers that want the same host take turns.

Nothing here fails. A worker that says nothing more must be forgotten by whoever knows that it is gone (`forget`); until
then it keeps its connections, but its turn passes on after a quarter of a second.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from mmdata.media.host_rules import FAILURES, NEUTRAL, Closed, Grant, HostRules, Limit

__all__ = ["HostBook"]

MAX_PAUSE_S = 3600.0
HOSTS_REMEMBERED = 100_000  # idle hosts with a history; the longest idle are forgotten first
PATIENCE_S = 0.25  # so long a turn waits for its worker when others want it
_NOTEWORTHY_PAUSE_S = 5.0  # shorter pauses are over before a stopped run is started again
_SAVED_S = 86_400.0  # a breaker that could have been tried so long ago is forgotten
_JITTER = 0.2
_EVER = math.inf


class _Host:
    """One host: its allowance, who waits for it, how it fares. Times are those of the book."""

    __slots__ = (
        "breaker_until",
        "busy",
        "connections",
        "due",
        "failures",
        "interval",
        "line",
        "name",
        "offered",
        "openings",
        "pause_until",
        "prober",
        "slowed",
        "wake",
    )

    def __init__(self, name: str, limit: Limit) -> None:
        self.name = name
        self.connections = _EVER if limit.connections is None else limit.connections
        self.interval = 0.0 if limit.per_s is None else 1.0 / limit.per_s
        self.busy = 0  # starts granted and not over, and those on offer
        self.due = -_EVER  # when the next start may begin
        self.line: dict[str, int] = {}  # worker → starts it waits for; whose turn is next comes first
        self.offered: dict[str, float] = {}  # worker → since when it has a turn that it has not taken
        self.failures = 0  # in a row
        self.openings = 0  # of the breaker, since the last success; above 0: one start at a time, as a probe
        self.breaker_until = -_EVER
        self.pause_until = -_EVER
        self.prober: str | None = None  # who makes the probe
        self.slowed = False
        self.wake = _EVER  # its earliest entry among the book's events

    @property
    def closed_until(self) -> float:
        return max(self.breaker_until, self.pause_until)


class _Worker:
    """What one worker has, and what waits to be told to it."""

    __slots__ = ("closed", "held", "lines", "offers")

    def __init__(self) -> None:
        self.held: dict[str, int] = {}  # host → connections
        self.lines: set[str] = set()  # hosts it waits for
        self.offers: dict[str, int] = {}  # host → turns it may take
        self.closed: dict[str, float] = {}  # host → until when: closings it has not been told


class HostBook:
    """The allowances of all hosts in one run. `now`: seconds on any clock that never goes back.

    Memory: some 600 bytes for each host that is wanted, busy or among the 100,000 last ones with a history (failures,
    a pause, a breaker, a Crawl-delay). Every call costs O(log hosts), and those of `forget` and `save` what they touch.
    """

    def __init__(self, rules: HostRules, rng: random.Random | None = None) -> None:
        self.rules = rules
        self.changes = 0  # grows with everything that `save` would tell
        self.news: set[str] = set()  # workers for whom `take` has something
        self._random = rng or random.Random()
        self._hosts: dict[str, _Host] = {}
        self._workers: dict[str, _Worker] = {}
        self._events: list[tuple[float, int, _Host]] = []
        self._count = itertools.count()
        self._resting: OrderedDict[str, _Host] = OrderedDict()  # nobody wants them; perhaps not due yet
        self._remembered: OrderedDict[str, _Host] = OrderedDict()  # nor these, but they have a history
        self._troubled: dict[str, _Host] = {}  # breakers and pauses

    def __len__(self) -> int:
        """Hosts in memory."""
        return len(self._hosts)

    # What workers say

    def want(self, client: str, host: str, now: float, count: int = 1) -> None:
        """One more start (or `count`) is wanted by this worker."""
        worker, entry = self._worker(client), self._host(host)
        if entry.closed_until > now or host in worker.closed:
            worker.closed[host] = entry.closed_until
            self.news.add(client)
            self._rest(entry, now)
            return
        worker.lines.add(host)
        entry.line[client] = entry.line.get(client, 0) + count
        self._serve(entry, now)

    def give_up(self, client: str, host: str, count: int, now: float) -> None:
        """Takes back wants that were not granted; turns that were not taken are among them."""
        worker, entry = self._worker(client), self._hosts.get(host)
        if entry is None or not (entry.line or entry.busy):
            return
        waiting = entry.line.pop(client, 0)
        if waiting > count:
            entry.line[client] = waiting - count
        else:
            worker.lines.discard(host)
            self._revoke(entry, client, min(count - waiting, worker.offers.get(host, 0)))
        self._serve(entry, now)

    def leave(self, client: str, host: str, outcome: str, pause_s: float | None, now: float) -> None:
        """A start is over: frees its connection, if it was granted here, and counts for or against the host.

        `outcome` is a status of a row, or `redirect`; those in `NEUTRAL` say nothing of the host. `pause_s` is what it
        asked for by Retry-After.
        """
        worker, entry = self._worker(client), self._host(host)
        held = worker.held.get(host, 0)
        if held:
            entry.busy -= 1
            if held == 1:
                del worker.held[host]
            else:
                worker.held[host] = held - 1
        was_probe = entry.prober == client
        if was_probe:
            entry.prober = None
        self._judge(entry, outcome, was_probe, now)
        if pause_s is not None and pause_s > 0:
            self._pause(entry, min(pause_s, MAX_PAUSE_S), now)
        self._serve(entry, now)

    def slow(self, host: str, interval_s: float, now: float) -> None:
        """The host asks for so much time between two starts, at most an hour; more than its allowance has counts."""
        entry = self._host(host)
        interval_s = min(interval_s, MAX_PAUSE_S)
        if interval_s > entry.interval:
            entry.due += interval_s - entry.interval
            entry.interval = interval_s
            entry.slowed = True
            for client in list(entry.offered):
                self._return_turns(entry, client)
        self._serve(entry, now)

    def forget(self, client: str, now: float) -> None:
        """The worker is gone: what it had and wanted is free."""
        worker = self._workers.pop(client, None)
        self.news.discard(client)
        if worker is None:
            return
        for host in worker.lines:
            self._hosts[host].line.pop(client, None)
        touched = worker.lines | worker.offers.keys() | worker.held.keys()
        for host in touched:
            entry = self._hosts[host]
            entry.offered.pop(client, None)
            entry.busy -= worker.offers.get(host, 0) + worker.held.get(host, 0)
            if entry.prober == client:
                entry.prober = None
        for host in touched:
            self._serve(self._hosts[host], now)

    # What workers are told

    def take(self, client: str, now: float) -> list[Grant | Closed]:
        """What the worker may start now, and the hosts that closed under what it wanted."""
        self._advance(now)
        self.news.discard(client)
        worker = self._worker(client)
        told: list[Grant | Closed] = []
        if worker.closed:
            told += [Closed(host, max(0.0, until - now)) for host, until in worker.closed.items()]
            worker.closed = {}
        if worker.offers:
            offers, worker.offers = worker.offers, {}
            for host, count in offers.items():
                entry = self._hosts[host]
                entry.offered.pop(client, None)
                entry.due = now + entry.interval
                if entry.openings:
                    entry.prober = client
                worker.held[host] = worker.held.get(host, 0) + count
                told += [Grant(host)] * count
                if entry.line:
                    self._serve(entry, now)
        return told

    def next_change(self, client: str, now: float) -> float | None:
        """When `take` may have something for this worker though nobody says a word; None = never."""
        worker = self._workers.get(client)
        if worker is None:
            return None
        if worker.offers or worker.closed:
            return now
        while self._events and self._events[0][0] != self._events[0][2].wake:
            heapq.heappop(self._events)  # something earlier came in between
        return max(now, self._events[0][0]) if worker.lines and self._events else None

    # How hosts fare

    def _judge(self, entry: _Host, outcome: str, was_probe: bool, now: float) -> None:
        if outcome in NEUTRAL:
            return
        if outcome not in FAILURES:
            if entry.openings:
                self.changes += 1
                entry.openings, entry.breaker_until = 0, -_EVER
            entry.failures = 0
            return
        entry.failures += 1
        # While it is open, and before its probe is back, what was under way before says nothing new.
        if was_probe or (not entry.openings and entry.failures >= self.rules.failures):
            pause = self.rules.cooldown_s * 2.0 ** min(entry.openings, 30) * self._random.uniform(1, 1 + _JITTER)
            entry.breaker_until = now + min(pause, MAX_PAUSE_S)
            entry.openings += 1
            self.changes += 1
            self._close(entry)

    def _pause(self, entry: _Host, pause_s: float, now: float) -> None:
        if now + pause_s > entry.pause_until:
            self.changes += pause_s >= _NOTEWORTHY_PAUSE_S
            entry.pause_until = now + pause_s
            self._close(entry)

    def _close(self, entry: _Host) -> None:
        """Nobody waits for it any longer, and no turn stands."""
        self._troubled[entry.name] = entry
        clients = entry.line.keys() | entry.offered.keys()
        for client in clients:
            worker = self._workers[client]
            worker.lines.discard(entry.name)
            worker.closed[entry.name] = entry.closed_until
            self._revoke(entry, client, worker.offers.get(entry.name, 0))
        entry.line.clear()
        self.news |= clients

    # Turns

    def _serve(self, entry: _Host, now: float) -> None:
        """Offer turns to who is next in line, as far as the host allows now; note when it will allow more."""
        line = entry.line
        while line:
            if entry.busy >= entry.connections or (entry.openings and (entry.prober or entry.offered)):
                break  # the end of a start comes here again
            if entry.due > now:
                self._wake_at(entry, entry.due)
                break
            if entry.interval and entry.offered:
                break  # the next turn is counted from the moment this one is taken
            self._offer(entry, now)
        if line and entry.offered and (len(line) > 1 or next(iter(line)) not in entry.offered):
            self._wake_at(entry, min(entry.offered.values()) + PATIENCE_S)
        if not line and not entry.busy:
            self._rest(entry, now)

    def _offer(self, entry: _Host, now: float) -> None:
        client = next(iter(entry.line))
        worker, waiting = self._workers[client], entry.line.pop(client) - 1
        if waiting:
            entry.line[client] = waiting
        else:
            worker.lines.discard(entry.name)
        entry.busy += 1
        entry.offered.setdefault(client, now)
        worker.offers[entry.name] = worker.offers.get(entry.name, 0) + 1
        self.news.add(client)

    def _revoke(self, entry: _Host, client: str, count: int) -> None:
        if count <= 0:
            return
        entry.busy -= count
        offers = self._workers[client].offers
        offers[entry.name] -= count
        if not offers[entry.name]:
            del offers[entry.name]
            entry.offered.pop(client, None)

    def _pass_on(self, entry: _Host, now: float) -> None:
        """Turns that were not taken in time go to the end of the line, if there is one."""
        for client, since in list(entry.offered.items()):
            if entry.line and since + PATIENCE_S <= now:
                self._return_turns(entry, client)

    def _return_turns(self, entry: _Host, client: str) -> None:
        """To the end of the line."""
        worker = self._workers[client]
        count = worker.offers[entry.name]
        self._revoke(entry, client, count)
        entry.line[client] = entry.line.pop(client, 0) + count
        worker.lines.add(entry.name)

    def _wake_at(self, entry: _Host, at: float) -> None:
        if at < entry.wake:
            entry.wake = at
            heapq.heappush(self._events, (at, next(self._count), entry))

    def _advance(self, now: float) -> None:
        events = self._events
        while events and events[0][0] <= now:
            at, _, entry = heapq.heappop(events)
            if at == entry.wake:
                entry.wake = _EVER
                if entry.offered:
                    self._pass_on(entry, now)
                if entry.line:
                    self._serve(entry, now)

    # Who is known

    def _worker(self, client: str) -> _Worker:
        worker = self._workers.get(client)
        if worker is None:
            worker = self._workers[client] = _Worker()
        return worker

    def _host(self, name: str) -> _Host:
        entry = self._hosts.get(name)
        if entry is None:
            entry = self._hosts[name] = _Host(name, self.rules.of(name))
        elif not entry.busy and not entry.line:
            self._resting.pop(name, None)
            self._remembered.pop(name, None)
        return entry

    def _rest(self, entry: _Host, now: float) -> None:
        """Nobody wants it now. The two that have rested longest are forgotten, or remembered for their history."""
        if not entry.busy and not entry.line:
            self._resting[entry.name] = entry
        for name, oldest in list(itertools.islice(self._resting.items(), 2)):
            if oldest.failures or oldest.openings or oldest.slowed or oldest.pause_until > now:
                self._remembered[name] = self._resting.pop(name)
                if len(self._remembered) > HOSTS_REMEMBERED:
                    self._drop(self._remembered.popitem(last=False)[0])
            elif oldest.due <= now or len(self._resting) > HOSTS_REMEMBERED:
                self._drop(name)

    def _drop(self, name: str) -> None:
        for known in (self._hosts, self._resting, self._troubled):
            known.pop(name, None)

    # Over restarts

    def save(self, now: float, wall: float) -> dict[str, Any]:
        """Breakers and long pauses, for `load`: host → [openings of the breaker, until when it is closed].

        `wall` and the times told are in seconds since 1970; `now` is the same moment on the book's clock.
        """
        hosts: dict[str, list[float]] = {}
        for name, entry in list(self._troubled.items()):
            if entry.openings or entry.pause_until > now:
                until = entry.closed_until
                if entry.openings or until > now + _NOTEWORTHY_PAUSE_S:
                    hosts[name] = [entry.openings, round(wall + until - now, 3)]
            else:
                del self._troubled[name]
        return {"format": 1, "saved": round(wall, 3), "hosts": hosts}

    def load(self, saved: Mapping[str, Any], now: float, wall: float) -> None:
        """Take up what an earlier run saved. ValueError when it is not of that form."""
        hosts = saved.get("hosts")
        if saved.get("format") != 1 or not isinstance(hosts, dict):
            raise ValueError("expected format 1 and hosts")
        for name, (openings, until) in hosts.items():
            left = min(float(until) - wall, MAX_PAUSE_S)
            if not isinstance(name, str) or not isinstance(openings, int) or not math.isfinite(left) or openings < 0:
                raise ValueError(f"{name!r}: expected a host with a count and a time")
            if left <= 0 and (not openings or left < -_SAVED_S):
                continue
            entry = self._host(name)
            entry.openings, entry.failures = openings, self.rules.failures if openings else 0
            entry.breaker_until, entry.pause_until = (now + left, -_EVER) if openings else (-_EVER, now + left)
            self._troubled[name] = entry
            self._rest(entry, now)
