"""The fetcher of one shard over a real server with many names: retries, redirects, robots.txt, what is given up."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from aiohttp import web

from mmdata import fetcher
from mmdata.errors import StoreError
from mmdata.fetcher import ToFetch, fetch_all
from mmdata.host_desk import BookDesk, rules_of
from mmdata.host_gate import LocalGate
from mmdata.media.http import Fetched
from mmdata.media.robots import RobotsCache
from mmdata.settings import FetchOptions

Answer = tuple[int, dict[str, str], str]
OPEN = {"connections": None, "per_s": None}


class Site:
    """Every host name on one loopback port. `pages` maps host/path to what is answered, one after the other.

    `asked` has [seconds, host/path] of each request; a path without pages is 404, `/robots.txt` too.
    """

    def __init__(self) -> None:
        self.pages: dict[str, Iterator[Answer]] = {}
        self.asked: list[tuple[float, str]] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Site:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _start(self) -> None:
        app = web.Application()
        app.router.add_get("/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.2)  # some answers would take 30 s
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def _stop(self) -> None:
        await self._runner.cleanup()
        sleeping = asyncio.all_tasks() - {asyncio.current_task()}
        for task in sleeping:
            task.cancel()
        await asyncio.gather(*sleeping, return_exceptions=True)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        name = f"{request.host.partition(':')[0]}{request.path}"
        self.asked.append((time.monotonic(), name))
        status, headers, text = next(self.pages.get(name, iter([])), (404, {}, ""))
        if status == 0:
            await asyncio.sleep(30)
        return web.Response(status=status, headers=headers, text=text)

    def put(self, name: str, *answers: Answer | int | str) -> None:
        """Answers in turn, the last one for ever: a status, a text, or [status, headers, text]; 0 = none in 30 s."""
        made = [a if isinstance(a, tuple) else (a, {}, "") if isinstance(a, int) else (200, {}, a) for a in answers]
        self.pages[name] = itertools.chain(made, itertools.repeat(made[-1]))

    def url(self, name: str) -> str:
        host, _, path = name.partition("/")
        return f"http://{host}:{self.port}/{path}"

    def times(self, name: str) -> list[float]:
        return [at for at, asked in self.asked if asked == name]


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(fetcher, "_robots", RobotsCache())
    with Site() as running:
        yield running


class Watch:
    def __init__(self) -> None:
        self.done = 0
        self.tails = 0

    def rows(self, count: int) -> None:
        self.done += count

    def tail(self) -> None:
        self.tails += 1


def fetched(
    site: Site,
    names: list[str],
    blocked: Callable[[str], str | None] | None = None,
    watch: Watch | None = None,
    **options: Any,
) -> dict[str, Fetched]:
    """What became of each URL; asserts that each was delivered once."""
    usual: dict[str, Any] = {"allow_private": True, "resolve": {"*.test": "127.0.0.1"}, "timeout_s": 3}
    usual["host_limits"] = {name.partition("/")[0]: OPEN for name in names}
    fetch = FetchOptions(**{**usual, **options})
    found: dict[int, list[Fetched]] = defaultdict(list)

    async def deliver(index: int, what: Fetched) -> None:
        found[index].append(what)

    jobs = [ToFetch(index, site.url(name)) for index, name in enumerate(names)]
    gate = LocalGate(BookDesk(rules_of(fetch)), "one")
    asyncio.run(fetch_all(jobs, fetch, gate, deliver, blocked=blocked, watch=watch))
    assert [len(found[index]) for index in range(len(names))] == [1] * len(names)
    return {name: found[index][0] for index, name in enumerate(names)}


def test_a_body_and_what_is_known_of_it(site: Site) -> None:
    site.put("a.test/x", (200, {"Content-Type": "text/x-mine"}, "body"))
    found = fetched(site, ["a.test/x"])["a.test/x"]
    assert (found.status, found.data, found.http_status, found.attempts) == ("ok", b"body", 200, 1)
    assert found.content_type is not None
    assert found.content_type.startswith("text/x-mine")
    assert found.final_url is None
    assert 0 < (found.fetch_ms or 0) < 3000


def test_retries_are_for_what_may_pass_and_wait_a_little(site: Site) -> None:
    site.put("a.test/flaky", 503, 503, "there")
    site.put("a.test/gone", 404, "never")
    site.put("a.test/broken", 500)
    found = fetched(site, ["a.test/flaky", "a.test/gone", "a.test/broken"], retries=2)
    assert {n: (f.status, f.attempts, f.http_status) for n, f in found.items()} == {
        "a.test/flaky": ("ok", 3, 200),
        "a.test/gone": ("http_4xx", 1, 404),
        "a.test/broken": ("http_5xx", 3, 500),
    }
    first, second, third = site.times("a.test/flaky")
    assert second - first >= 0.25  # half to all of 0.5 s, then of 1 s
    assert third - second >= 0.5


def test_waiting_for_a_retry_spends_no_deadline(site: Site) -> None:
    site.put("a.test/x", (429, {"Retry-After": "2"}, ""), "there")
    # The pause is longer than the deadline: only exchanges spend that. A slow allowance keeps the shard from ending.
    slow = [f"b.test/{n}" for n in range(3)]
    for name in slow:
        site.put(name, "there")
    limits = {"a.test": OPEN, "b.test": {"connections": 1, "per_s": 1}}
    found = fetched(site, ["a.test/x", *slow], retries=1, timeout_s=1.5, host_limits=limits, robots="ignore")
    assert [f.status for f in found.values()] == ["ok"] * 4
    first, second = site.times("a.test/x")
    assert second - first >= 2
    assert (found["a.test/x"].fetch_ms or 0) < 1000


def test_redirects_ask_each_host_by_its_own_rules(site: Site) -> None:
    site.put("a.test/x", (302, {"Location": site.url("b.test/y")}, ""))
    site.put("b.test/y", (301, {"Location": "/z"}, ""))
    site.put("b.test/z", "there")
    found = fetched(site, ["a.test/x"])["a.test/x"]
    assert (found.status, found.final_url, found.attempts) == ("ok", site.url("b.test/z"), 1)
    asked = [name for _, name in site.asked]
    assert asked == ["a.test/robots.txt", "a.test/x", "b.test/robots.txt", "b.test/y", "b.test/z"]


def test_redirects_end_at_their_bound(site: Site) -> None:
    site.put("a.test/x", (302, {"Location": "/x"}, ""))
    found = fetched(site, ["a.test/x"], max_redirects=3)["a.test/x"]
    assert (found.status, found.detail, found.attempts) == ("too_many_redirects", "more than 3", 1)
    assert len(site.times("a.test/x")) == 4


def test_what_is_blocked_is_not_asked_for_where_a_redirect_leads_either(site: Site) -> None:
    site.put("a.test/x", (302, {"Location": site.url("b.test/secret")}, ""))
    site.put("a.test/y", "there")

    def blocked(url: str) -> str | None:
        return "on the list" if "secret" in url else None

    found = fetched(site, ["a.test/x", "a.test/y", "b.test/secret"], blocked, robots="ignore")
    assert [f.status for f in found.values()] == ["blocked", "ok", "blocked"]
    assert site.times("b.test/secret") == []


def test_robots_txt_is_asked_once_and_obeyed(site: Site) -> None:
    site.put("a.test/robots.txt", "User-agent: *\nDisallow: /private\n\nUser-agent: mmdata\nDisallow: /ours\n")
    for path in ("private/1", "ours/1", "free/1", "free/2"):
        site.put(f"a.test/{path}", "there")
    names = ["a.test/private/1", "a.test/ours/1", "a.test/free/1", "a.test/free/2"]
    found = fetched(site, names)
    # A group of our own name replaces that for all (RFC 9309, 2.2.1).
    assert [found[n].status for n in names] == ["ok", "opted_out", "ok", "ok"]
    assert found["a.test/ours/1"].attempts == 0
    assert "robots.txt" in (found["a.test/ours/1"].detail or "")
    assert len(site.times("a.test/robots.txt")) == 1
    assert site.times("a.test/ours/1") == []
    again = fetched(site, names)
    assert [f.status for f in again.values()] == ["ok", "opted_out", "ok", "ok"]
    assert len(site.times("a.test/robots.txt")) == 1  # remembered by the process
    ignored = fetched(site, names, robots="ignore")
    assert [f.status for f in ignored.values()] == ["ok"] * 4


def test_a_robots_txt_that_is_not_to_be_had_is_no_permission(site: Site) -> None:
    site.put("a.test/robots.txt", 503)
    site.put("a.test/x", "there")
    found = fetched(site, ["a.test/x"], retries=1)["a.test/x"]
    assert (found.status, found.detail, found.attempts) == ("http_5xx", "robots.txt: HTTP 503", 0)
    assert len(site.times("a.test/robots.txt")) == 2
    assert site.times("a.test/x") == []


def test_a_robots_txt_that_cannot_be_read_forbids_nothing(site: Site) -> None:
    site.put("a.test/robots.txt", (302, {"Location": "/robots.txt"}, ""))
    site.put("b.test/robots.txt", (302, {"Location": "ftp://b.test/robots.txt"}, ""))
    site.put("c.test/robots.txt", (200, {"Content-Encoding": "gzip"}, "User-agent: *"))
    names = [f"{host}.test/x" for host in "abc"]
    for name in names:
        site.put(name, "there")
    assert [f.status for f in fetched(site, names).values()] == ["ok"] * 3


def test_opted_out_by_header_is_neither_stored_nor_asked_again(site: Site) -> None:
    site.put("a.test/x", (200, {"X-Robots-Tag": "noai, max-image-preview:large"}, "there"))
    site.put("a.test/y", (200, {"TDM-Reservation": "1"}, "there"))
    site.put("a.test/z", (200, {"X-Robots-Tag": "otherbot: noai"}, "there"))
    found = fetched(site, ["a.test/x", "a.test/y", "a.test/z"], retries=3)
    assert [(f.status, f.data) for f in found.values()] == [("opted_out", None), ("opted_out", None), ("ok", b"there")]
    assert len(site.times("a.test/x")) == len(site.times("a.test/y")) == 1


def test_a_host_that_says_nothing_leaves_the_rest_of_its_rows_to_a_later_pass(site: Site) -> None:
    for number in range(40):
        site.put(f"dead.test/{number}", 0)
        site.put(f"good.test/{number}", "there")
    names = [f"{host}.test/{n}" for n in range(40) for host in ("dead", "good")]
    limits = {"good.test": OPEN, "dead.test": {"connections": 4, "per_s": None}}
    started = time.monotonic()
    watch = Watch()
    found = fetched(site, names, watch=watch, host_limits=limits, timeout_s=1, host_failures=6)
    took = time.monotonic() - started
    assert all(f.status == "ok" for n, f in found.items() if n.startswith("good"))
    dead = [f.status for n, f in found.items() if n.startswith("dead")]
    assert set(dead) == {"timeout", "deferred"}
    assert 6 <= dead.count("timeout") <= 12  # four at once until six had failed, perhaps a probe
    assert took < 4.5  # the good ones' time and twice the deadline, and a slow machine
    assert watch.done == len(names)
    assert watch.tails == 1


def test_a_slow_allowance_is_waited_for_or_deferred_as_told(site: Site) -> None:
    names = [f"a.test/{n}" for n in range(6)]
    for name in names:
        site.put(name, "there")
    limits = {"a.test": {"connections": 4, "per_s": 5}}
    found = fetched(site, names, host_limits=limits, robots="ignore")
    assert [f.status for f in found.values()] == ["ok"] * 6
    at = [t for t, _ in site.asked]
    assert (
        min(b - a for a, b in itertools.pairwise(at)) > 0.15
    )  # 5 a second are 0.2 s apart, give or take a loop's turn
    deferred = fetched(site, names, host_limits=limits, robots="ignore", defer_after_s=0.5)
    statuses = [f.status for f in deferred.values()]
    assert set(statuses) == {"ok", "deferred"}
    assert 2 <= statuses.count("ok") <= 4


def test_the_first_error_of_a_delivery_ends_it_all(site: Site) -> None:
    for number in range(50):
        site.put(f"a.test/{number}", "there")
    fetch = FetchOptions(allow_private=True, resolve={"a.test": "127.0.0.1"}, host_limits={"a.test": OPEN})

    async def deliver(index: int, what: Fetched) -> None:
        raise StoreError("the disk is full")

    jobs = [ToFetch(n, site.url(f"a.test/{n}")) for n in range(50)]
    with pytest.raises(StoreError, match="the disk is full"):
        asyncio.run(fetch_all(jobs, fetch, LocalGate(BookDesk(rules_of(fetch)), "one"), deliver))


def test_rows_without_a_url_cost_nothing(site: Site) -> None:
    found: dict[int, Fetched] = {}

    async def deliver(index: int, what: Fetched) -> None:
        found[index] = what

    jobs = [ToFetch(0, None), ToFetch(1, "ftp://a.test/x"), ToFetch(2, "http://[::1/x")]
    fetch = FetchOptions()
    asyncio.run(fetch_all(jobs, fetch, LocalGate(BookDesk(rules_of(fetch)), "one"), deliver))
    assert [found[n].status for n in range(3)] == ["bad_url"] * 3
    assert [found[n].attempts for n in range(3)] == [0] * 3


def test_the_user_agent_is_honest_and_says_where_to_write() -> None:
    assert fetcher.user_agent(FetchOptions()).startswith("mmdata/")
    assert fetcher.user_agent(FetchOptions(contact="https://a.test/crawl")).endswith(" (+https://a.test/crawl)")
    assert fetcher.user_agent(FetchOptions(user_agent="mine/1 (+mailto:me@a.test)")) == "mine/1 (+mailto:me@a.test)"
