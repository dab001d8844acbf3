"""Fetches the URLs of a shard: every job is delivered exactly once, whatever servers do.

In: jobs (a row's number and its URL), what the recipe says of fetching, and a gate that says when a host may be asked.
Out: one call of `deliver` per job, in the order in which they end. Each HTTP exchange, be it a first request, a retry,
a redirect's next hop or a robots.txt, is a start of its host that the schedule and the gate allow. A deadline is spent
by exchanges alone; what its host keeps waiting too long is `deferred`, or keeps what its last attempt came to.

Raises RetryableError when there is no network at all, and whatever `deliver` raises.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from multidict import CIMultiDictProxy
from yarl import URL

from mmdata import __version__
from mmdata.errors import RetryableError
from mmdata.host_gate import Gate
from mmdata.media import opt_out, robots
from mmdata.media.addresses import BadUrl, parse_url
from mmdata.media.budget import Hold
from mmdata.media.http import Client, Exchange, Fetched, HttpLimits
from mmdata.media.schedule import Concurrency, Job, Schedule
from mmdata.settings import FetchOptions

__all__ = ["Deliver", "ToFetch", "Watch", "fetch_all", "user_agent"]

Deliver = Callable[[int, Fetched], Awaitable[None]]

_HOSTS_PROVING_OUTAGE = 20
_MAX_BACKOFF_S = 30.0
_ROBOTS_BYTES = 500 << 10  # RFC 9309, 2.5: at least so much must be read
_ADDED_AT_ONCE = 500
_TAIL_S = 1.0
_TAIL_SHARE = 0.25  # of the rows; where more wait, another shard would wait for the same hosts
_robots = robots.RobotsCache()  # one per process, shared by all shards


@dataclass(frozen=True)
class ToFetch:
    """A row's number and its URL, as the list gives it."""

    index: int
    url: str | None


class Watch(Protocol):
    """Who wants to know how a shard gets on."""

    def rows(self, count: int) -> None:
        """So many more rows are done."""

    def tail(self) -> None:
        """Few rows are left, or none but of hosts in trouble, and for a second nothing more could start."""


def user_agent(fetch: FetchOptions) -> str:
    """The User-Agent header: who asks, and where to reach them."""
    contact = f" (+{fetch.contact})" if fetch.contact else ""
    return fetch.user_agent or f"mmdata/{__version__}{contact}"


async def fetch_all(
    jobs: Sequence[ToFetch],
    fetch: FetchOptions,
    gate: Gate,
    deliver: Deliver,
    *,
    deliveries: int = 8,
    blocked: Callable[[str], str | None] | None = None,
    watch: Watch | None = None,
) -> None:
    """Fetch every job's URL and `deliver` what became of it; the body counts as held in memory until that returns.

    While more than `deliveries` bodies wait for `deliver` to return, more fetching at once would gain nothing.
    `blocked` is asked before every request, also where a redirect leads: the words it gives become the detail of the
    status `blocked`, and nothing is sent there.
    """
    async with Client(_limits(fetch)) as client, gate:
        await _Fetching(client, fetch, gate, deliver, deliveries, blocked, watch).run(jobs)


def _limits(fetch: FetchOptions) -> HttpLimits:
    return HttpLimits(
        user_agent=user_agent(fetch),
        max_bytes=fetch.max_bytes,
        allow_private=fetch.allow_private,
        bytes_in_flight=fetch.bytes_in_flight,
        min_bytes_per_s=fetch.min_bytes_per_s,
        max_header_bytes=fetch.max_header_bytes,
        resolve=fetch.resolve,
    )


class _Fetching:
    """The fetching of one shard in one event loop."""

    def __init__(
        self,
        client: Client,
        fetch: FetchOptions,
        gate: Gate,
        deliver: Deliver,
        deliveries: int,
        blocked: Callable[[str], str | None] | None,
        watch: Watch | None,
    ) -> None:
        self._client, self._fetch, self._gate = client, fetch, gate
        self._deliver, self._blocked, self._watch = deliver, blocked, watch
        self._deliveries, self._delivering = deliveries, 0
        self._agent = opt_out.product_token(user_agent(fetch))
        self._loop = asyncio.get_running_loop()
        self._schedule = Schedule(gate, fetch.timeout_s, fetch.defer_after_s)
        self._concurrency = Concurrency(fetch.concurrency)
        self._tasks: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._parked: dict[str, list[Job]] = {}  # origin → rows that wait for its robots.txt
        self._outage = _OutageWatch()
        self._error: BaseException | None = None
        self._told_tail = False
        self._left = self._tail_rows = 0
        gate.on_grant = self._granted
        gate.on_closed = self._closed

    def _granted(self, host: str) -> None:
        self._schedule.granted(host)
        self._wake.set()

    def _closed(self, host: str, for_s: float) -> None:
        self._schedule.closed(host, self._loop.time(), for_s)
        self._wake.set()

    async def run(self, jobs: Sequence[ToFetch]) -> None:
        """All jobs; the first error cancels the others and is raised as it is."""
        self._left, self._tail_rows = len(jobs), int(_TAIL_SHARE * len(jobs))
        coming = iter(jobs)
        is_coming = True
        try:
            while is_coming or self._schedule.jobs or self._tasks:
                if is_coming:
                    is_coming = await self._take(coming)
                self._start_what_may()
                now = self._loop.time()
                for job in self._schedule.overdue(now):
                    self._spawn(self._put_off(job))
                self._tell_tail(now)
                if is_coming or self._schedule.jobs or self._tasks:
                    await self._sleep(0 if is_coming else self._schedule.wake_at(now))
                if self._error is not None:
                    raise self._error
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _sleep(self, until: float | None) -> None:
        """Until something happens, or that time; at most a second while a tail may have to be told."""
        now = self._loop.time()
        if self._watch is not None and not self._told_tail:
            until = min(until or now + _TAIL_S, now + _TAIL_S)
        if until is not None and until <= now:
            await asyncio.sleep(0)
        elif not self._wake.is_set():
            timer = None if until is None else self._loop.call_at(until, self._wake.set)
            try:
                await self._wake.wait()
            finally:
                if timer is not None:
                    timer.cancel()
        self._wake.clear()

    async def _take(self, coming: Iterator[ToFetch]) -> bool:
        """Take some more rows in; False when there are no more."""
        for _ in range(_ADDED_AT_ONCE):
            row = next(coming, None)
            if row is None:
                return False
            try:
                url = parse_url(row.url)
            except BadUrl as error:
                await self._hand_over(row.index, Fetched("bad_url", str(error)))
                continue
            self._queue(Job(row.index, url, url, _host(url)), front=False)
        return True

    def _start_what_may(self) -> None:
        while True:
            limit = self._concurrency.limit
            self._schedule.pump(self._loop.time(), limit)
            started = False
            while len(self._tasks) < limit and (job := self._schedule.pop()) is not None:
                self._spawn(self._exchange(job))
                started = True
            if not started:
                self._schedule.note_room(self._loop.time(), len(self._tasks) < limit)
                return

    def _spawn(self, work: Awaitable[None]) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None and self._error is None:
            self._error = task.exception()
        self._wake.set()

    def _tell_tail(self, now: float) -> None:
        if self._watch is None or self._told_tail:
            return
        few = self._left <= self._tail_rows or self._schedule.only_trouble
        if few and self._schedule.spare_s(now) >= _TAIL_S:
            self._told_tail = True
            self._watch.tail()

    # One job

    def _queue(self, job: Job, front: bool, delay_s: float = 0.0) -> None:
        """Have the job start at its host, once that host's robots.txt is known and allows it."""
        if self._fetch.robots == "ignore" or job.is_robots:
            self._schedule.add(job, self._loop.time(), delay_s, front)
            return
        origin = str(job.url.origin())
        rules = _robots.get(origin)
        if rules is None:
            self._park(job, origin)
        elif (words := rules.refusal(str(job.url), self._agent)) is not None:
            self._spawn(self._end(job, "opted_out", words))
        else:
            self._schedule.add(job, self._loop.time(), delay_s, front)

    def _park(self, job: Job, origin: str) -> None:
        waiting = self._parked.get(origin)
        if waiting is not None:
            waiting.append(job)
            return
        self._parked[origin] = [job]
        url = URL(origin + "/robots.txt", encoded=True)
        asks = Job(-1, url, url, _host(url), is_robots=True)
        self._schedule.add(asks, self._loop.time(), first=True)

    async def _exchange(self, job: Job) -> None:
        """One HTTP exchange of this job, and what follows from it."""
        left = self._fetch.timeout_s - job.spent_s
        words = self._blocked(str(job.url)) if self._blocked is not None and not job.is_robots else None
        if words is not None:
            self._schedule.ended(job, "cancelled")
            await self._end(job, "blocked", words)
            return
        with Hold(self._client.budget) as hold:
            try:
                judge, most = (None, _ROBOTS_BYTES) if job.is_robots else (self._judge, None)
                found = await self._client.exchange(job.url, left, hold, judge=judge, max_bytes=most)
            except BaseException:
                self._schedule.ended(job, "cancelled")
                raise
            self._outage.note(job.host, found)
            is_short = len(self._tasks) >= self._concurrency.limit and self._delivering <= self._deliveries
            self._concurrency.note(job.host, found.status, is_short)
            self._schedule.ended(job, "cancelled" if found.is_outage else found.status, found.pause_s)
            self._wake.set()
            job.attempts += found.sent and not job.hops
            job.spent_s += found.seconds
            job.http_status = found.http_status
            job.content_type = found.content_type
            await self._follow_up(job, found, hold)

    async def _follow_up(self, job: Job, found: Exchange, hold: Hold) -> None:
        if found.status == "redirect":
            self._redirect(job, found)
            return
        job.status, job.detail = found.status, found.detail
        if found.is_transient and job.attempts <= self._fetch.retries and job.spent_s < self._fetch.timeout_s:
            hold.release()
            backoff = min(0.5 * 2 ** (job.attempts - 1), _MAX_BACKOFF_S) * random.uniform(0.5, 1.0)
            job.url, job.host, job.hops = job.first, _host(job.first), 0
            self._queue(job, True, max(backoff, found.pause_s or 0.0))
            return
        if job.is_robots:
            self._know(job, found)
        else:
            await self._end(job, found.status, found.detail, found.data, hold)

    def _redirect(self, job: Job, found: Exchange) -> None:
        assert found.location is not None
        job.hops += 1
        if job.hops > self._fetch.max_redirects:
            many = Exchange("too_many_redirects", f"more than {self._fetch.max_redirects}")
            self._spawn(self._follow_up(job, many, Hold(self._client.budget)))
            return
        job.url, job.host = found.location, _host(found.location)
        job.final_url = str(job.url.with_user(None))
        self._queue(job, front=True)

    def _judge(self, headers: CIMultiDictProxy[str]) -> str | None:
        fetch = self._fetch
        tags = headers.getall("X-Robots-Tag", ())
        tdm = headers.get("TDM-Reservation")
        if not tags and tdm is None:
            return None
        directives, respects = fetch.disallowed_header_directives, fetch.tdm == "respect"
        return opt_out.opted_out(tags, tdm, self._agent, directives, respects, datetime.now(UTC))

    def _know(self, job: Job, found: Exchange) -> None:
        """A robots.txt has come, or will not: on with the rows that wait for it."""
        origin = str(job.first.origin())
        waiting = self._parked.pop(origin, [])
        # A file that cannot be read, or whose redirects lead nowhere, forbids nothing (RFC 9309, 2.3.1.2 and 2.3.1.3).
        astray = found.status == "bad_url" or (job.hops > 0 and found.status == "refused_address")
        if astray or found.status in ("ok", "http_4xx", "too_many_redirects", "too_large", "decode", "not_media"):
            is_text = found.status in ("ok", "too_large")
            rules = robots.Rules.parse(200 if is_text else 404, found.data or b"")
            _robots.put(origin, rules)
            if (delay := rules.crawl_delay_s(self._agent)) is not None:
                self._gate.slow(job.host, delay)
            for parked in waiting:
                self._queue(parked, front=False)
            return
        for parked in waiting:
            parked.http_status = found.http_status
            self._spawn(self._end(parked, found.status, f"robots.txt: {found.detail or found.status}"))

    async def _put_off(self, job: Job) -> None:
        """The shard shall end, and this job still waits for its host."""
        waiting = self._parked.pop(str(job.first.origin()), []) if job.is_robots else [job]
        for each in waiting:
            why = "its host was slow, paused or in trouble"
            await self._end(each, each.status or "deferred", each.detail if each.status else why)

    async def _end(
        self, job: Job, status: str, detail: str | None, data: bytes | None = None, hold: Hold | None = None
    ) -> None:
        if data is None and hold is not None:
            hold.release()
        fetched = Fetched(
            status,
            detail,
            data,
            job.http_status,
            job.final_url,
            job.content_type,
            job.attempts,
            job.spent_s * 1000 if job.attempts else None,
        )
        await self._hand_over(job.index, fetched)

    async def _hand_over(self, index: int, fetched: Fetched) -> None:
        self._delivering += 1
        await self._deliver(index, fetched)
        self._delivering -= 1
        self._left -= 1
        if self._watch is not None:
            self._watch.rows(1)


def _host(url: URL) -> str:
    return (url.raw_host or "").rstrip(".")


class _OutageWatch:
    """No network at all: the first hosts asked neither resolve nor have a route, and none has ever answered."""

    def __init__(self) -> None:
        self._dead: set[str] | None = set()  # None once the network has answered

    def note(self, host: str, found: Exchange) -> None:
        """Raise RetryableError when so many hosts have proved it."""
        if self._dead is None or found.status in ("refused_address", "blocked"):
            return
        if not found.is_outage:
            self._dead = None
            return
        self._dead.add(host)
        if len(self._dead) >= _HOSTS_PROVING_OUTAGE:
            raise RetryableError(
                f"no DNS or no route to the network: none of the first {_HOSTS_PROVING_OUTAGE} hosts could be reached "
                f"(last: {host}, {found.detail}); mend the network, then the same command goes on"
            )
