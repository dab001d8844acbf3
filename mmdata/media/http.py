"""An HTTP client for lists of foreign URLs: whatever a server does, one request costs one value, never an exception.

In: a URL taken apart by `addresses.parse_url`. Out: an `Exchange`, redirects among them: nothing is followed here. http
and https only; addresses checked and pinned (see `addresses`); a deadline and a least rate; headers and body bounded in
size, all bodies together in memory (see `budget`). No cookies, no proxies, no content coding asked for, TLS always
verified. A user and password in the URL are sent to its host as Basic authentication and stored nowhere.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from urllib.parse import unquote

from yarl import URL

from mmdata.media.addresses import check_literal
from mmdata.media.budget import ByteBudget, Hold
from mmdata.media.connections import Connections, Key
from mmdata.media.exchange import Exchange, explain, is_short_of_sockets
from mmdata.media.resolver import Resolver
from mmdata.media.transfer import Judge, Transfer
from mmdata.media.wire import Connection

__all__ = ["Client", "Exchange", "Fetched", "HttpLimits", "Judge"]

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


class Client:
    """Asks for URLs in one event loop: `async with Client(limits) as client`, then `client.exchange(url, …)`.

    Its connections are its own; the TLS context and the DNS cache are shared by all clients of the process.
    """

    def __init__(self, limits: HttpLimits) -> None:
        self.limits = limits
        self.budget = ByteBudget(limits.bytes_in_flight)
        self._headers = (
            f"User-Agent: {limits.user_agent}\r\nAccept: image/*, */*;q=0.5\r\nAccept-Encoding: identity\r\n"
        )

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
