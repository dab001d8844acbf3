"""An HTTP client for lists of foreign URLs: whatever a server does, one request costs one value, never an exception.

In: a URL taken apart by `addresses.parse_url`. Out: an `Exchange`, redirects among them: nothing is followed here. http
and https only; addresses checked and pinned (see `addresses`, `resolver`); a deadline and a least rate; headers, what
surrounds a body, and bodies bounded in size (see `connector`, `body`), all bodies together in memory (see `budget`). No
cookies, no proxies, no content coding asked for, TLS always verified. A user and password in the URL are sent to its
host as Basic authentication and stored nowhere.
"""

from __future__ import annotations

import asyncio
import functools
import resource
import socket
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from multidict import CIMultiDictProxy
from yarl import URL

from mmdata.media.addresses import check_literal
from mmdata.media.body import BodyRefused
from mmdata.media.budget import ByteBudget, Hold
from mmdata.media.connector import BoundedConnector, was_never_heard
from mmdata.media.exchange import Exchange, explain, is_short_of_sockets, printable, redirected, retry_after_s
from mmdata.media.resolver import Resolver
from mmdata.media.transfer import Transfer

__all__ = ["Client", "Exchange", "Fetched", "HttpLimits", "Judge"]

Judge = Callable[[CIMultiDictProxy[str]], str | None]

_REDIRECTS = (301, 302, 303, 307, 308)
_LONGEST_LINE = 8190  # bytes of one header
_MOST_HEADERS = 128
_KEEP_ALIVE_S = 5.0  # many hosts are many idle sockets
_MOST_FILES = 65_536
_SOCKET_PAUSES_S = (0.05,) * 20 + (0.5,) * 60  # while descriptors or ports are short


@dataclass(frozen=True)
class HttpLimits:
    """What an exchange may cost.

    `max_bytes` bounds one body, also once its content coding is undone; `bytes_in_flight` all bodies held at once;
    `max_header_bytes` an answer's headers. A body that brings less than `min_bytes_per_s` over 5 s is given up.
    `resolve`: host name, or `*.suffix`, → IP address, instead of DNS.
    """

    user_agent: str
    max_bytes: int = 64 << 20
    allow_private: bool = False
    bytes_in_flight: int = 64 << 20
    min_bytes_per_s: int = 1000
    max_header_bytes: int = 64 << 10
    resolve: Mapping[str, str] = field(default_factory=dict)


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


@functools.cache
def _tls() -> ssl.SSLContext:
    """One per process: making it reads every certificate of the system, 19 ms each time."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


@functools.cache
def _raise_file_limit() -> None:
    """Many hosts are many sockets: use what the hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


class _Checked(AbstractResolver):
    """Our resolver as aiohttp's connector asks it: it connects to the addresses it is given, and looks up nothing."""

    def __init__(self, resolver: Resolver) -> None:
        self._resolver = resolver

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Checked addresses of `host`."""
        return [_result(host, address, port) for address in await self._resolver.addresses(host)]

    async def close(self) -> None:
        """Whoever made the resolver closes it."""


def _result(host: str, address: str, port: int) -> ResolveResult:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    return ResolveResult(hostname=host, host=address, port=port, family=family, proto=0, flags=flags)


class Client:
    """Asks for URLs in one event loop: `async with Client(limits) as client`, then `client.exchange(url, …)`.

    Its connections are its own; the TLS context and the DNS cache are shared by all clients of the process.
    """

    def __init__(self, limits: HttpLimits) -> None:
        self.limits = limits
        self.budget = ByteBudget(limits.bytes_in_flight)

    async def __aenter__(self) -> Client:
        _raise_file_limit()
        self._resolver = Resolver(self.limits.allow_private, self.limits.resolve)
        self._connector = BoundedConnector(
            self.limits.max_header_bytes,
            resolver=_Checked(self._resolver),
            use_dns_cache=False,
            ssl=_tls(),
            limit=0,
            keepalive_timeout=_KEEP_ALIVE_S,
        )
        line = min(_LONGEST_LINE, self.limits.max_header_bytes)
        self._session = aiohttp.ClientSession(
            connector=self._connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None, connect=None, sock_connect=None, sock_read=None),
            max_line_size=line,
            max_field_size=line,
            max_headers=_MOST_HEADERS,
            headers={
                "User-Agent": self.limits.user_agent,
                "Accept": "image/*, */*;q=0.5",
                "Accept-Encoding": "identity",
            },
        )
        # It would send a request again wherever a connection is lost; `_ask` does where a kept one was dead already.
        self._session._retry_connection = False
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()
        await self._resolver.close()

    async def exchange(
        self,
        url: URL,
        timeout_s: float,
        hold: Hold,
        *,
        judge: Judge | None = None,
        max_bytes: int | None = None,
    ) -> Exchange:
        """Ask for `url` (of `parse_url` or an Exchange's `location`) once; never raises but when cancelled.

        `timeout_s` is the deadline of this exchange, waits for memory excluded. The body counts as held by `hold`
        (of `self.budget`) until that is released, by the caller where there is `data`. `judge` is given the headers of
        an answer of 200 to 299 before its body is read; words from it make the status `opted_out`. With `max_bytes`
        that is the body's bound, and `data` of `too_large` are its first bytes up to there.
        """
        transfer = Transfer(
            hold,
            timeout_s,
            max_bytes=self.limits.max_bytes if max_bytes is None else max_bytes,
            keep_cut=max_bytes is not None,
            least_per_s=self.limits.min_bytes_per_s,
        )
        sent = False
        try:
            if not self.limits.allow_private:
                check_literal(url.raw_host or "")
            sent = True
            async with asyncio.timeout(timeout_s) as deadline:
                transfer.deadline = deadline
                outcome = await self._ask(url, transfer, judge)
        except BodyRefused as refused:
            outcome = refused.outcome
        except TimeoutError as error:
            outcome = explain(error) if error.errno is not None else transfer.late()
        except Exception as error:  # noqa: BLE001  one URL costs one value, whatever the network or a server does
            outcome = explain(error)
        finally:
            transfer.stop()
        if outcome.data is None:
            hold.release()
        outcome.http_status, outcome.content_type = transfer.status, transfer.content_type
        outcome.sent, outcome.seconds = sent, transfer.spent_s
        return outcome

    async def _ask(self, url: URL, transfer: Transfer, judge: Judge | None) -> Exchange:
        pauses = iter(_SOCKET_PAUSES_S)
        while True:
            try:
                async with self._session.get(url, allow_redirects=False) as answer:
                    return await self._answer(url, answer, transfer, judge)
            except aiohttp.ClientConnectionError as error:
                if was_never_heard(error):
                    continue
                pause_s = next(pauses, None) if is_short_of_sockets(error) else None
                if pause_s is None:
                    raise
            self._connector.drop_idle()
            await transfer.unhurried(asyncio.sleep(pause_s))  # no host is at fault: not charged to this one

    async def _answer(
        self, url: URL, answer: aiohttp.ClientResponse, transfer: Transfer, judge: Judge | None
    ) -> Exchange:
        code, headers = answer.status, answer.headers
        transfer.status = code
        transfer.content_type = printable(headers.get("Content-Type"))
        most = self.limits.max_header_bytes
        if sum(len(name) + len(value) for name, value in answer.raw_headers) > most:
            return Exchange("connect", f"malformed answer: more than {most} bytes of headers")
        if 200 <= code < 300:
            if judge is not None and (words := judge(headers)) is not None:
                return Exchange("opted_out", words)
            return Exchange("ok", data=await transfer.body(answer))
        if code in _REDIRECTS and (location := headers.get("Location")):
            to = redirected(url, location)
            return Exchange("bad_url", to) if isinstance(to, str) else Exchange("redirect", location=to)
        detail = f"HTTP {code}"
        if code == 429 or code >= 500:
            kind = "http_429" if code == 429 else "http_5xx"
            return Exchange(kind, detail, is_transient=True, pause_s=retry_after_s(headers.get("Retry-After")))
        return Exchange("http_4xx", detail)
