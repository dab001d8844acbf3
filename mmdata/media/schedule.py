"""Which exchange may start next: hosts in turn, retries when they are due, and what is given up at the end.

In: jobs, each with the host it asks next; grants and closures of hosts from a gate. Out: jobs that may start now, in an
order that goes round the hosts; at the end those that a host in trouble has kept waiting too long. Waiting is data in
queues here, never a coroutine, and spends nothing of a URL's deadline. No clock and no network of its own.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from yarl import URL

__all__ = ["Asking", "Concurrency", "Job", "Schedule"]

TROUBLE = 3  # failures in a row after which a host no longer holds a shard up
_WANTS_PER_HOST = 8  # starts asked for at once at a host that does not grant them at once
_FRESH_S = 0.25  # so long a want counts as about to be granted
_FAILURES = frozenset(["timeout", "connect", "dns", "tls", "http_5xx", "http_429"])


class Asking(Protocol):
    """What a schedule needs of a gate."""

    def want(self, host: str) -> None:
        """One more start is wanted at this host; granted at once or later, by a call of `Schedule.granted`."""

    def give_up(self, host: str, count: int) -> None:
        """So many wants that were not granted are taken back."""

    def leave(self, host: str, outcome: str, pause_s: float | None) -> None:
        """A granted start is over."""


@dataclass(slots=True, eq=False)
class Job:
    """A URL on its way. `url` is asked next; `first` is where an attempt begins; `index` names the row.

    `spent_s` is what it has spent of its deadline, `status` what its last attempt came to (None = none ended yet).
    """

    index: int
    first: URL
    url: URL
    host: str
    attempts: int = 0
    hops: int = 0
    spent_s: float = 0.0
    status: str | None = None
    detail: str | None = None
    http_status: int | None = None
    final_url: str | None = None
    content_type: str | None = None
    is_robots: bool = False


@dataclass(slots=True, eq=False)
class _Host:
    name: str
    queue: deque[Job] = field(default_factory=deque)
    wanted: int = 0  # asked for, neither granted nor taken back
    jobs: int = 0  # queued, delayed, ready and active
    failures: int = 0  # in a row
    is_closed: bool = False
    in_turn: bool = False

    @property
    def in_trouble(self) -> bool:
        return self.is_closed or self.failures >= TROUBLE


class Schedule:
    """The jobs of one shard. `add` and `ended` tell it what happens, `pump` and `pop` say what may start.

    `patience_s`: so long a shard waits once all that is left belongs to hosts in trouble (closed by the gate, asking
    for a pause, or with three failures in a row). `defer_after_s`: so long it waits once there is room for more than
    hosts allow to start; None = as long as it takes.
    """

    def __init__(self, gate: Asking, patience_s: float, defer_after_s: float | None = None) -> None:
        self._gate = gate
        self._patience_s, self._defer_after_s = patience_s, defer_after_s
        self._hosts: dict[str, _Host] = {}
        self._turn: deque[_Host] = deque()
        self._delayed: list[tuple[float, int, Job]] = []
        self._closed: list[tuple[float, int, _Host]] = []
        self._ready: deque[Job] = deque()
        self._fresh: deque[float] = deque()  # when each want stops counting as about to be granted
        self._count = itertools.count()
        self._healthy = 0  # jobs of hosts that are not in trouble
        self._troubled_since: float | None = None
        self._spare_since: float | None = None
        self.active = 0
        self.jobs = 0

    def add(self, job: Job, now: float, delay_s: float = 0.0, first: bool = False) -> None:
        """Have `job` start at its host, in `delay_s` at the earliest; `first`: before what waits there already."""
        host = self._hosts.get(job.host)
        if host is None:
            host = self._hosts[job.host] = _Host(job.host)
        self.jobs += 1
        host.jobs += 1
        self._healthy += not host.in_trouble
        if delay_s > 0:
            heapq.heappush(self._delayed, (now + delay_s, next(self._count), job))
        else:
            self._enqueue(host, job, first)

    def _enqueue(self, host: _Host, job: Job, first: bool) -> None:
        if first:
            host.queue.appendleft(job)
        else:
            host.queue.append(job)
        self._offer(host)

    def _offer(self, host: _Host) -> None:
        may_ask = not host.is_closed and host.wanted < min(len(host.queue), _WANTS_PER_HOST)
        if may_ask and not host.in_turn:
            host.in_turn = True
            self._turn.append(host)

    # What the gate says

    def granted(self, name: str) -> None:
        """The gate lets one job start at this host."""
        host = self._hosts.get(name)
        if host is None or not host.queue:
            if host is not None and host.wanted:
                host.wanted -= 1
            self._gate.leave(name, "cancelled", None)
            return
        host.wanted = max(0, host.wanted - 1)
        self._ready.append(host.queue.popleft())
        self._offer(host)

    def closed(self, name: str, now: float, for_s: float) -> None:
        """The gate lets nobody start at this host for so long; what was wanted there is wanted no more."""
        host = self._hosts.get(name)
        if host is None:
            return
        host.wanted = 0
        if not host.is_closed:
            self._healthy -= 0 if host.in_trouble else host.jobs
            host.is_closed = True
        heapq.heappush(self._closed, (now + for_s, next(self._count), host))

    # What may start

    def pump(self, now: float, limit: int) -> None:
        """Bring on what is due, and ask hosts in turn for as many starts as `limit` jobs at once can use soon."""
        while self._delayed and self._delayed[0][0] <= now:
            job = heapq.heappop(self._delayed)[2]
            self._enqueue(self._hosts[job.host], job, first=True)
        while self._closed and self._closed[0][0] <= now:
            self._reopen(heapq.heappop(self._closed)[2])
        while self._fresh and self._fresh[0] <= now:
            self._fresh.popleft()
        budget = 2 * limit - self.active - len(self._ready) - len(self._fresh)
        while budget > 0 and self._turn:
            host = self._turn.popleft()
            host.in_turn = False
            if host.is_closed or host.wanted >= len(host.queue):
                continue
            host.wanted += 1
            before = len(self._ready)
            self._gate.want(host.name)
            if len(self._ready) == before:
                self._fresh.append(now + _FRESH_S)
            budget -= 1
            self._offer(host)

    def _reopen(self, host: _Host) -> None:
        host.is_closed = any(other is host for _, _, other in self._closed)
        if not host.is_closed:
            self._healthy += 0 if host.in_trouble else host.jobs
            self._offer(host)

    def pop(self) -> Job | None:
        """A job that may start now; it is active until `ended`."""
        if not self._ready:
            return None
        self.active += 1
        return self._ready.popleft()

    def ended(self, job: Job, outcome: str, pause_s: float | None = None) -> None:
        """The job's exchange is over (`cancelled`: it tells nothing of the host); it is gone, until added again."""
        self._gate.leave(job.host, outcome, pause_s)
        self.active -= 1
        host = self._hosts[job.host]
        if outcome != "cancelled":
            before = host.in_trouble
            # Who asks for a pause is in trouble at once.
            worse = TROUBLE if pause_s else host.failures + 1
            host.failures = max(worse, host.failures + 1) if outcome in _FAILURES else 0
            if host.in_trouble != before:
                self._healthy += host.jobs if before else -host.jobs
        self._remove(job)

    def _remove(self, job: Job) -> None:
        host = self._hosts[job.host]
        self.jobs -= 1
        host.jobs -= 1
        self._healthy -= not host.in_trouble
        if not host.jobs and not host.wanted and not host.is_closed and not host.failures:
            del self._hosts[job.host]
            host.in_turn = False

    # The end

    def note_room(self, now: float, has_room: bool) -> None:
        """Whether, after everything that may start has started, there is room for more."""
        if not has_room or not self.jobs:
            self._spare_since = None
        elif self._spare_since is None:
            self._spare_since = now

    def spare_s(self, now: float) -> float:
        """For how long there has been room for more than hosts allow."""
        return 0.0 if self._spare_since is None else now - self._spare_since

    @property
    def only_trouble(self) -> bool:
        """Whether all that is left belongs to hosts in trouble, as `overdue` saw it last."""
        return self._troubled_since is not None

    def overdue(self, now: float) -> list[Job]:
        """Jobs that wait for their host and shall wait no longer; they are gone from here. Active ones go on."""
        if not self.jobs or self._healthy:
            self._troubled_since = None
        elif self._troubled_since is None:
            self._troubled_since = now
        troubled = self._troubled_since is not None and now - self._troubled_since >= self._patience_s
        slow = self._defer_after_s is not None and self._spare_since is not None
        if not troubled and not (slow and self.spare_s(now) >= (self._defer_after_s or 0)):
            return []
        return self._withdraw()

    def _withdraw(self) -> list[Job]:
        for job in self._ready:
            self._gate.leave(job.host, "cancelled", None)
        waiting = [*self._ready, *(job for _, _, job in sorted(self._delayed, key=lambda d: d[1]))]
        self._ready.clear()
        self._delayed.clear()
        for host in list(self._hosts.values()):
            waiting += host.queue
            host.queue.clear()
            if host.wanted:
                self._gate.give_up(host.name, host.wanted)
                host.wanted = 0
        for job in waiting:
            self._remove(job)
        return waiting

    def wake_at(self, now: float) -> float | None:
        """When the next thing is due by the clock alone; None = nothing is."""
        times = [heap[0][0] for heap in (self._delayed, self._closed) if heap]
        if self._troubled_since is not None:
            times.append(max(now, self._troubled_since + self._patience_s))
        if self._spare_since is not None and self._defer_after_s is not None:
            times.append(max(now, self._spare_since + self._defer_after_s))
        if self._fresh and self._turn:
            times.append(self._fresh[0])
        return min(times) if times else None


class Concurrency:
    """How many URLs may be in flight: additive increase, multiplicative decrease (Chiu and Jain 1989).

    It grows by one per result until the first congestion, then by one per `limit` results; it shrinks to 0.7 of itself
    after a window of results of which more than a tenth were congested: 429, or a timeout of a host that has answered
    before (a host that never did is dead, and says nothing about us). Between 8 and `most`.
    """

    LEAST = 8
    FIRST = 32

    def __init__(self, most: int) -> None:
        self._most = most
        self._least = min(self.LEAST, most)
        self._exact = float(min(self.FIRST, most))
        self._is_starting = True
        self._results = self._congested = 0
        self._answered: set[str] = set()

    @property
    def limit(self) -> int:
        """URLs in flight at most, now."""
        return int(self._exact)

    def note(self, host: str, outcome: str, is_short: bool) -> None:
        """An exchange with `host` came to `outcome`; `is_short`: more URLs in flight would have been of use."""
        congested = outcome == "http_429" or (outcome == "timeout" and host in self._answered)
        if outcome in ("ok", "redirect", "http_4xx", "not_media") and len(self._answered) < 100_000:
            self._answered.add(host)
        self._results += 1
        self._congested += congested
        if is_short and not congested:
            self._exact = min(self._most, self._exact + (1.0 if self._is_starting else 1.0 / self._exact))
        if self._results >= max(20, self.limit):
            if self._congested > self._results / 10:
                self._exact = max(self._least, self._exact * 0.7)
                self._is_starting = False
            self._results = self._congested = 0
