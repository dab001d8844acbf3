# L to E: see the IMPORTANT note in /tmp/brief/NOTES3.md first (back to aiohttp; this file goes).
"""The open connections of one client: made to checked addresses only, kept alive for a while, bounded in number.

In: scheme, host, port. Out: a `Connection` that was opened for exactly these, so that no later name can reach an
address through one that was refused to it. Fails with what the operating system, TLS or DNS raises.
"""

from __future__ import annotations

import asyncio
import functools
import resource
import socket
import ssl
from collections import OrderedDict

import aiohappyeyeballs
from aiohappyeyeballs import AddrInfoType

from mmdata.media.exchange import LostConnection
from mmdata.media.resolver import Resolver
from mmdata.media.wire import BUFFER_BYTES, Connection

__all__ = ["Connections", "Key"]

Key = tuple[str, str, int]  # scheme, host as the URL has it (IPv6 without brackets), port

_KEEP_ALIVE_S = 15.0
_SWEEP_S = 3.0
_MOST_IDLE = 512
_EYEBALLS_DELAY_S = 0.25  # RFC 8305, 8
_MOST_FILES = 65_536


@functools.cache
def _tls() -> ssl.SSLContext:
    """One per process: making it reads every certificate of the system, 19 ms each time."""
    return ssl.create_default_context()


@functools.cache
def _raise_file_limit() -> None:
    """Many hosts are many sockets: use what the hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


class Connections:
    """`take` or `open` one, `give` it back when its answer is whole; `close` all at the end."""

    def __init__(self, resolver: Resolver, max_header_bytes: int) -> None:
        _raise_file_limit()
        self._resolver = resolver
        self._max_header_bytes = max_header_bytes
        self._loop = asyncio.get_running_loop()
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._open: set[Connection] = set()
        self._idle: dict[Key, list[Connection]] = {}
        self._by_age: OrderedDict[Connection, Key] = OrderedDict()  # the idle ones, oldest first
        self._sweep: asyncio.TimerHandle | None = None

    def take(self, key: Key) -> Connection | None:
        """A connection that is open already, the one last used."""
        while (idle := self._idle.get(key)) is not None:
            connection = idle.pop()
            if not idle:
                del self._idle[key]
            del self._by_age[connection]
            if connection.is_reusable:
                return connection
        return None

    async def open(self, key: Key) -> Connection:
        """A new connection, also of a host that has others."""
        scheme, host, port = key
        sock = await aiohappyeyeballs.start_connection(
            [_address_info(address, port) for address in await self._resolver.addresses(host)],
            happy_eyeballs_delay=_EYEBALLS_DELAY_S,
            interleave=1,
            loop=self._loop,
        )
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _, connection = await self._loop.create_connection(
                functools.partial(Connection, self._buffer, self._max_header_bytes, self._lost),
                sock=sock,
                ssl=_tls() if scheme == "https" else None,
                server_hostname=host.rstrip(".") if scheme == "https" else None,
            )
        except BaseException:
            sock.close()
            raise
        if connection.transport is None:
            raise LostConnection("the connection was closed")
        self._open.add(connection)
        return connection

    def give(self, key: Key, connection: Connection) -> None:
        """Keep it for the next request, where that may be."""
        if not connection.is_reusable:
            connection.abort()
            return
        connection.idle_since = self._loop.time()
        self._idle.setdefault(key, []).append(connection)
        self._by_age[connection] = key
        if len(self._by_age) > _MOST_IDLE:
            self._drop_oldest()
        if self._sweep is None:
            self._sweep = self._loop.call_later(_SWEEP_S, self._drop_old)

    def drop_idle(self) -> None:
        """Free every socket that is not in use."""
        while self._by_age:
            self._drop_oldest()

    async def close(self) -> None:
        """Close all and wait until they are."""
        if self._sweep is not None:
            self._sweep.cancel()
        for connection in list(self._open):
            connection.abort()
        for _ in range(100):  # the loop closes them in its next turns
            if not self._open:
                break
            await asyncio.sleep(0)

    def _drop_oldest(self) -> None:
        connection = next(iter(self._by_age))
        self._forget_idle(connection)
        connection.abort()

    def _drop_old(self) -> None:
        oldest = self._loop.time() - _KEEP_ALIVE_S
        while self._by_age and next(iter(self._by_age)).idle_since < oldest:
            self._drop_oldest()
        self._sweep = self._loop.call_later(_SWEEP_S, self._drop_old) if self._by_age else None

    def _lost(self, connection: Connection) -> None:
        self._open.discard(connection)
        if connection in self._by_age:
            self._forget_idle(connection)

    def _forget_idle(self, connection: Connection) -> None:
        key = self._by_age.pop(connection)
        idle = self._idle[key]
        idle.remove(connection)
        if not idle:
            del self._idle[key]


def _address_info(address: str, port: int) -> AddrInfoType:
    if ":" in address:
        return socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port, 0, 0)
    return socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port)
