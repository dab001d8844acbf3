"""An HTTP client for lists of foreign URLs: whatever a server does, one URL costs one value, never an exception.

http and https only; addresses checked (see `addresses`), redirects followed by hand with a check at every hop; one
deadline per URL over all attempts and the body; bodies bounded in size each and in memory together (see `budget`). No
cookies, no proxies, no content coding asked for, TLS always verified.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import errno
import functools
import random
import socket
import ssl
import time
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import urljoin

import aiohttp
from yarl import URL

from mmdata.errors import RetryableError
from mmdata.media.addresses import AddressRefused, BadUrl, PublicResolver, check_literal, parse_url
from mmdata.media.budget import ByteBudget, Hold

__all__ = ["Client", "Fetched", "HttpLimits"]

_REDIRECTS = (301, 302, 303, 307, 308)
_UNKNOWN_LENGTH = 256 << 10  # reserved for a body that does not say how long it is
_HOSTS_PROVING_OUTAGE = 20
_MAX_PAUSE_S = 30.0


@dataclass(frozen=True)
class HttpLimits:
    """What a URL may cost. `timeout_s` is the deadline of one URL: all attempts, pauses, redirects and the body.

    `max_bytes` bounds one body, also once its content coding is undone; `bytes_in_flight` all bodies held at once;
    `per_host` the URLs of one host asked at once (waiting for a turn is not charged to the deadline).
    """

    user_agent: str
    timeout_s: float = 20.0
    retries: int = 0
    max_bytes: int = 64 << 20
    max_redirects: int = 5
    allow_private: bool = False
    bytes_in_flight: int = 512 << 20
    per_host: int = 16


@dataclass(frozen=True)
class Fetched:
    """What became of one URL. `status` is one of mmdata.columns.STATUSES; `data` is the body when it is `ok`.

    `detail`: a few words on a status other than ok, without the URL. `final_url`: after redirects, without user and
    password; None = as given. `attempts`: 0 = nothing was sent. `fetch_ms`: wall time; None = nothing was sent.
    """

    status: str
    detail: str | None = None
    data: bytes | None = None
    http_status: int | None = None
    final_url: str | None = None
    content_type: str | None = None
    attempts: int = 0
    fetch_ms: float | None = None


@dataclass
class _Trail:
    """What is known of a URL so far; survives the deadline."""

    http_status: int | None = None
    final_url: str | None = None
    content_type: str | None = None
    attempts: int = 0


@dataclass
class _Outcome:
    status: str
    detail: str | None = None
    data: bytes | None = None
    transient: bool = False  # another attempt may end otherwise
    pause_s: float | None = None  # what the server asked for
    outage: bool = False  # as it would be without any network


@functools.cache
def _tls() -> ssl.SSLContext:
    """One per process: making it reads every certificate of the system, 19 ms each time."""
    return ssl.create_default_context()


class _Body(Exception):
    """Ends the reading of a body: its outcome."""

    def __init__(self, outcome: _Outcome) -> None:
        super().__init__(outcome.status)
        self.outcome = outcome


class Client:
    """Fetches URLs in one event loop: `async with Client(limits) as client`, then `client.fetching(url)`.

    `blocked` is asked before every request, also where a redirect leads: the words it gives become the detail of the
    status `blocked`, and nothing is sent there. The connector belongs to the client; the TLS context and the DNS cache
    are shared by all clients of the process.
    """

    def __init__(self, limits: HttpLimits, blocked: Callable[[str], str | None] | None = None) -> None:
        self.limits = limits
        self._blocked = blocked
        self._budget = ByteBudget(limits.bytes_in_flight)
        self._hosts: dict[str, list[Any]] = {}  # host → [semaphore, users]
        self._dead_hosts: set[str] | None = set()  # None once the network has answered

    async def __aenter__(self) -> Client:
        self._resolver = PublicResolver(self.limits.allow_private)
        connector = aiohttp.TCPConnector(resolver=self._resolver, use_dns_cache=False, ssl=_tls(), limit=0)
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None, sock_read=None),
            headers={
                "User-Agent": self.limits.user_agent,
                "Accept": "image/*, */*;q=0.5",
                "Accept-Encoding": "identity",
            },
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()
        await self._resolver.close()

    @contextlib.asynccontextmanager
    async def fetching(self, url: str | None) -> AsyncIterator[Fetched]:
        """Fetch `url`; its body counts as held in memory until the block ends.

        RetryableError when there is no network at all: the first 20 distinct hosts neither resolve nor have a route.
        """
        with Hold(self._budget) as hold:
            yield await self._fetch(url, hold)

    async def _fetch(self, text: str | None, hold: Hold) -> Fetched:
        try:
            url = parse_url(text)
        except BadUrl as error:
            return Fetched("bad_url", str(error))
        trail = _Trail()
        async with self._turn(str(url.raw_host)):
            started = time.perf_counter()
            outcome = await self._before_deadline(url, hold, trail)
            elapsed = (time.perf_counter() - started) * 1000
        self._watch_for_outage(str(url.raw_host), outcome)
        if outcome.data is None:
            hold.release()
        return Fetched(
            status=outcome.status,
            detail=outcome.detail,
            data=outcome.data,
            http_status=trail.http_status,
            final_url=trail.final_url,
            content_type=trail.content_type,
            attempts=trail.attempts,
            fetch_ms=elapsed if trail.attempts else None,
        )

    @contextlib.asynccontextmanager
    async def _turn(self, host: str) -> AsyncIterator[None]:
        slot = self._hosts.setdefault(host, [asyncio.Semaphore(self.limits.per_host), 0])
        slot[1] += 1
        try:
            async with slot[0]:
                yield
        finally:
            slot[1] -= 1
            if not slot[1]:
                del self._hosts[host]

    async def _before_deadline(self, url: URL, hold: Hold, trail: _Trail) -> _Outcome:
        try:
            async with asyncio.timeout(self.limits.timeout_s) as deadline:
                return await self._attempts(url, hold, trail, deadline)
        except TimeoutError:
            return _Outcome("timeout", f"{self.limits.timeout_s:g} s passed")

    async def _attempts(self, url: URL, hold: Hold, trail: _Trail, deadline: asyncio.Timeout) -> _Outcome:
        for attempt in range(self.limits.retries + 1):
            outcome = await self._attempt(url, hold, trail, deadline)
            if not outcome.transient or attempt == self.limits.retries:
                break
            hold.release()
            backoff = min(0.5 * 2**attempt, _MAX_PAUSE_S) * random.uniform(0.5, 1.0)
            pause = outcome.pause_s if outcome.pause_s is not None else backoff
            if asyncio.get_running_loop().time() + pause >= (deadline.when() or 0):
                break
            await asyncio.sleep(pause)
        return outcome

    async def _attempt(self, url: URL, hold: Hold, trail: _Trail, deadline: asyncio.Timeout) -> _Outcome:
        try:
            return await self._follow(url, hold, trail, deadline)
        except _Body as end:
            return end.outcome
        except TimeoutError as error:
            # Of the operating system (ETIMEDOUT); our own deadline cancels instead.
            return _Outcome("timeout", _say(error), transient=True)
        except Exception as error:  # noqa: BLE001  one URL costs one value, whatever the server or a parser does
            return _explain(error)

    async def _follow(self, url: URL, hold: Hold, trail: _Trail, deadline: asyncio.Timeout) -> _Outcome:
        for hop in range(self.limits.max_redirects + 1):
            if self._blocked is not None and (list_words := self._blocked(str(url))) is not None:
                trail.final_url = str(url.with_user(None)) if hop else None
                return _Outcome("blocked", list_words)
            if not self.limits.allow_private:
                check_literal(str(url.raw_host))
            if hop == 0:
                trail.attempts += 1
            else:
                trail.final_url = str(url.with_user(None))
            async with self._session.get(url, allow_redirects=False) as answer:
                trail.http_status = answer.status
                trail.content_type = _printable(answer.headers.get("Content-Type"))
                location = answer.headers.get("Location")
                if answer.status not in _REDIRECTS or not location:
                    return await self._answer(answer, hold, deadline)
            try:
                url = parse_url(urljoin(str(url), _escaped(location)))
            except ValueError as error:
                return _Outcome("bad_url", f"redirect: {error}"[:200])
        return _Outcome("too_many_redirects", f"more than {self.limits.max_redirects}")

    async def _answer(self, answer: aiohttp.ClientResponse, hold: Hold, deadline: asyncio.Timeout) -> _Outcome:
        code = answer.status
        if 200 <= code < 300:
            return _Outcome("ok", data=await self._body(answer, hold, deadline))
        detail = f"HTTP {code}"
        if code == 429 or code >= 500:
            status = "http_429" if code == 429 else "http_5xx"
            return _Outcome(status, detail, transient=True, pause_s=_retry_after(answer.headers.get("Retry-After")))
        return _Outcome("http_4xx", detail)

    async def _body(self, answer: aiohttp.ClientResponse, hold: Hold, deadline: asyncio.Timeout) -> bytes:
        limit = self.limits.max_bytes
        too_large = _Body(_Outcome("too_large", f"more than {limit} bytes"))
        announced = answer.content_length
        if announced is not None and announced > limit:
            raise too_large
        first = min(_UNKNOWN_LENGTH if announced is None else announced, limit)
        if not hold.try_reserve(first):
            await _unhurried(hold.reserve(first), deadline)
        chunks, size = [], 0
        async for chunk in answer.content.iter_any():
            size += len(chunk)
            if size > limit:
                raise too_large
            if size > hold.size and not hold.try_reserve(max(size, 2 * hold.size)):
                await _unhurried(hold.grow(), deadline)
            chunks.append(chunk)
        data = b"".join(chunks)
        coding = answer.headers.get("Content-Encoding", "").strip().lower()
        if coding in ("", "identity", "none") or not data:
            return data
        if coding not in ("gzip", "x-gzip", "deflate"):
            raise _Body(_Outcome("not_media", f"content coding {_printable(coding)} was not asked for"))
        if not hold.try_reserve(min(4 * size, limit)):
            await _unhurried(hold.grow(), deadline)
        return _inflated(data, limit, too_large)

    def _watch_for_outage(self, host: str, outcome: _Outcome) -> None:
        if self._dead_hosts is None or outcome.status in ("refused_address", "blocked"):
            return
        if not outcome.outage:
            self._dead_hosts = None
            return
        self._dead_hosts.add(host)
        if len(self._dead_hosts) >= _HOSTS_PROVING_OUTAGE:
            raise RetryableError(
                f"no DNS or no route to the network: none of the first {_HOSTS_PROVING_OUTAGE} hosts could be reached "
                f"(last: {host}, {outcome.detail}); mend the network, then the same command goes on"
            )


async def _unhurried(wait: Coroutine[Any, Any, None], deadline: asyncio.Timeout) -> None:
    """Wait for memory, not for the server: the deadline moves by as long."""
    when, started = deadline.when(), asyncio.get_running_loop().time()
    deadline.reschedule(None)
    await wait
    if when is not None:
        deadline.reschedule(when + asyncio.get_running_loop().time() - started)


def _inflated(data: bytes, limit: int, too_large: _Body) -> bytes:
    """Gzip or zlib undone, at most `limit` bytes of it."""
    inflater = zlib.decompressobj(wbits=47)
    try:
        plain = inflater.decompress(data, limit + 1)
    except zlib.error as error:
        raise _Body(_Outcome("decode", f"content coding: {error}"[:200])) from None
    if len(plain) > limit:
        raise too_large
    if not inflater.eof:
        raise _Body(_Outcome("connect", "content coding cut short", transient=True))
    return plain


def _explain(error: Exception) -> _Outcome:
    """Status and detail of what a failed attempt raised."""
    cause = getattr(error, "os_error", None) or error
    if isinstance(cause, AddressRefused):
        return _Outcome("refused_address", _say(cause))
    if isinstance(cause, socket.gaierror):
        again = cause.errno == socket.EAI_AGAIN
        return _Outcome("dns", _say(cause), transient=again, outage=again)
    if isinstance(error, aiohttp.ClientSSLError | ssl.SSLError) or isinstance(cause, ssl.SSLError):
        return _Outcome("tls", _say(getattr(error, "certificate_error", None) or cause))
    if isinstance(error, aiohttp.InvalidURL):
        return _Outcome("bad_url", "malformed")
    if isinstance(error, aiohttp.ClientResponseError):
        return _Outcome("connect", f"malformed answer: {_say(error.message)}"[:200])
    unreachable = isinstance(cause, OSError) and cause.errno == errno.ENETUNREACH
    return _Outcome("connect", _say(cause), transient=True, outage=unreachable)


def _say(error: object) -> str:
    """The words of an error, short and printable; its class when it has none."""
    return (_printable(str(error)) or type(error).__name__)[:200]


def _printable(text: str | None) -> str | None:
    if text is None:
        return None
    return "".join(c if c.isprintable() else " " for c in text.encode("utf-8", "replace").decode())[:200].strip()


def _escaped(location: str) -> str:
    """A Location header with its non-ASCII bytes percent-encoded, whatever encoding they are in."""
    raw = location.encode("utf-8", "surrogateescape")
    return "".join(chr(b) if b < 0x80 else f"%{b:02X}" for b in raw)


def _retry_after(value: str | None) -> float | None:
    """Seconds from a Retry-After header (a number or an HTTP date); None where there is none to be understood."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
