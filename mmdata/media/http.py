"""An HTTP client for lists of foreign URLs: whatever a server does, one request costs one value, never an exception.

In: a URL taken apart by `addresses.parse_url`. Out: an `Exchange`, redirects among them: nothing is followed here. http
and https only; addresses checked and pinned (see `addresses`); a deadline and a least rate; headers and body bounded in
size, all bodies together in memory (see `budget`). No cookies, no proxies, no content coding asked for, TLS always
verified. A user and password in the URL are sent to its host as Basic authentication and stored nowhere.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any
from urllib.parse import unquote

from yarl import URL

from mmdata.errors import RetryableError
from mmdata.media.addresses import BadUrl, check_literal, parse_url
from mmdata.media.budget import ByteBudget, Hold
from mmdata.media.connections import Connections, Key
from mmdata.media.exchange import Exchange, explain, is_short_of_sockets
from mmdata.media.resolver import Resolver
from mmdata.media.transfer import Judge, Transfer
from mmdata.media.wire import Connection

__all__ = ["Client", "Exchange", "Fetched", "HttpLimits", "Judge"]

_HOSTS_PROVING_OUTAGE = 20
_MAX_PAUSE_S = 30.0
_SOCKET_PAUSES_S = (0.05,) * 20 + (0.5,) * 60  # while descriptors or ports are short


@dataclass(frozen=True)
class HttpLimits:
    """What a URL may cost. `timeout_s` is the deadline of one URL: all attempts, pauses, redirects and the body.

    `max_bytes` bounds one body, also once its content coding is undone; `bytes_in_flight` all bodies held at once;
    `max_header_bytes` an answer's headers; `per_host` the URLs of one host asked at once (waiting for a turn is not
    charged to the deadline). A body that brings less than `min_bytes_per_s` over 5 s is given up. `resolve`: host name,
    or `*.suffix`, → IP address, instead of DNS.
    """

    user_agent: str
    timeout_s: float = 20.0
    retries: int = 0
    max_bytes: int = 64 << 20
    max_redirects: int = 5
    allow_private: bool = False
    bytes_in_flight: int = 512 << 20
    per_host: int = 16
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


class Client:
    """Asks for URLs in one event loop: `async with Client(limits) as client`, then `client.exchange(url, …)`.

    Its connections are its own; the TLS context and the DNS cache are shared by all clients of the process.
    `blocked` is for `fetching` alone: asked before every request, also where a redirect leads; the words it gives
    become the detail of the status `blocked`, and nothing is sent there.
    """

    def __init__(self, limits: HttpLimits, blocked: Callable[[str], str | None] | None = None) -> None:
        self.limits = limits
        self.budget = ByteBudget(limits.bytes_in_flight)
        self._headers = (
            f"User-Agent: {limits.user_agent}\r\nAccept: image/*, */*;q=0.5\r\nAccept-Encoding: identity\r\n"
        )
        self._blocked = blocked
        self._hosts: dict[str, list[Any]] = {}  # host → [semaphore, users]
        self._dead_hosts: set[str] | None = set()  # None once the network has answered

    async def __aenter__(self) -> Client:
        self._resolver = Resolver(self.limits.allow_private, self.limits.resolve)
        self._connections = Connections(self._resolver, self.limits.max_header_bytes)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._connections.close()
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
            url,
            hold,
            timeout_s=timeout_s,
            max_bytes=self.limits.max_bytes if max_bytes is None else max_bytes,
            keep_cut=max_bytes is not None,
            least_per_s=self.limits.min_bytes_per_s,
            judge=judge,
        )
        sent = False
        try:
            host = url.raw_host or ""
            if not self.limits.allow_private:
                check_literal(host)
            sent = True
            outcome = await self._carry((url.scheme, host, url.port or 0), self._request(url), transfer)
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

    async def _carry(self, key: Key, request: bytes, transfer: Transfer) -> Exchange:
        connection = self._connections.take(key)
        is_used = connection is not None
        while True:
            if connection is None:
                connection = await self._connect(key, transfer)
            transfer.start(connection, request)
            await transfer.go_on()
            if transfer.is_stale and is_used:
                # It was closed while it was idle: the server has not seen this request (RFC 9112, 9.3.1).
                connection, is_used = None, False
                continue
            self._connections.give(key, connection)
            assert transfer.outcome is not None
            return transfer.outcome

    async def _connect(self, key: Key, transfer: Transfer) -> Connection:
        for pause_s in (*_SOCKET_PAUSES_S, None):
            try:
                async with asyncio.timeout(transfer.left_s):
                    return await self._connections.open(key)
            except OSError as error:
                if pause_s is None or not is_short_of_sockets(error):
                    raise
            # No host is at fault: not charged to this one.
            self._connections.drop_idle()
            await asyncio.sleep(pause_s)
            transfer.waited_s += pause_s
        raise AssertionError

    def _request(self, url: URL) -> bytes:
        lines = f"GET {url.raw_path_qs} HTTP/1.1\r\nHost: {url.host_port_subcomponent}\r\n{self._headers}"
        if url.raw_user is not None:
            pair = f"{unquote(url.raw_user)}:{unquote(url.raw_password or '')}".encode()
            lines += f"Authorization: Basic {base64.b64encode(pair).decode()}\r\n"
        return f"{lines}\r\n".encode("ascii")

    @contextlib.asynccontextmanager
    async def fetching(self, url: str | None) -> AsyncIterator[Fetched]:
        """Fetch `url` with its redirects and retries; its body counts as held in memory until the block ends.

        RetryableError when there is no network at all: the first 20 distinct hosts neither resolve nor have a route.
        """
        with Hold(self.budget) as hold:
            yield await self._fetch(url, hold)

    async def _fetch(self, text: str | None, hold: Hold) -> Fetched:
        try:
            url = parse_url(text)
        except BadUrl as error:
            return Fetched("bad_url", str(error))
        async with self._turn(str(url.raw_host)):
            found = await self._attempts(url, hold)
        self._watch_for_outage(str(url.raw_host), found[0])
        outcome, final_url, attempts, seconds = found
        return Fetched(
            status=outcome.status,
            detail=outcome.detail,
            data=outcome.data,
            http_status=outcome.http_status,
            final_url=final_url,
            content_type=outcome.content_type,
            attempts=attempts,
            fetch_ms=seconds * 1000 if attempts else None,
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

    async def _attempts(self, url: URL, hold: Hold) -> tuple[Exchange, str | None, int, float]:
        spent, attempts = 0.0, 0
        for attempt in range(self.limits.retries + 1):
            outcome, final_url, seconds = await self._follow(url, hold, self.limits.timeout_s - spent)
            spent += seconds
            attempts += outcome.sent or final_url is not None
            if not outcome.is_transient or attempt == self.limits.retries:
                break
            backoff = min(0.5 * 2**attempt, _MAX_PAUSE_S) * random.uniform(0.5, 1.0)
            pause = outcome.pause_s if outcome.pause_s is not None else backoff
            if spent + pause >= self.limits.timeout_s:
                break
            spent += pause
            await asyncio.sleep(pause)
        return outcome, final_url, attempts, spent

    async def _follow(self, url: URL, hold: Hold, left_s: float) -> tuple[Exchange, str | None, float]:
        spent, final_url, code = 0.0, None, None
        for hop in range(self.limits.max_redirects + 1):
            final_url = str(url.with_user(None)) if hop else None
            if self._blocked is not None and (list_words := self._blocked(str(url))) is not None:
                return Exchange("blocked", list_words, http_status=code, sent=False), final_url, spent
            outcome = await self.exchange(url, left_s - spent, hold)
            spent += outcome.seconds
            if outcome.status == "timeout" and spent >= left_s:
                outcome.detail = f"{self.limits.timeout_s:g} s passed"
            if outcome.location is None:
                outcome.http_status = outcome.http_status or code
                return outcome, final_url, spent
            url, code = outcome.location, outcome.http_status
        return (
            Exchange("too_many_redirects", f"more than {self.limits.max_redirects}", http_status=code),
            final_url,
            spent,
        )

    def _watch_for_outage(self, host: str, outcome: Exchange) -> None:
        if self._dead_hosts is None or outcome.status in ("refused_address", "blocked"):
            return
        if not outcome.is_outage:
            self._dead_hosts = None
            return
        self._dead_hosts.add(host)
        if len(self._dead_hosts) >= _HOSTS_PROVING_OUTAGE:
            raise RetryableError(
                f"no DNS or no route to the network: none of the first {_HOSTS_PROVING_OUTAGE} hosts could be reached "
                f"(last: {host}, {outcome.detail}); mend the network, then the same command goes on"
            )
