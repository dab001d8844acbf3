"""Names to addresses that may be connected to: looked up in threads, checked, kept for a while.

In: a host as `addresses.parse_url` gives it. Out: its addresses that are not refused, in the order of the system's
resolver. Fails with AddressRefused when none is left, and socket.gaierror when the name does not resolve.

The system's resolver, and not c-ares: it reads what the machine is configured with, and its 0.30 ms of CPU a new name
(c-ares: 0.12) are little beside the pictures of a host.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Mapping

from mmdata.media import addresses
from mmdata.media.addresses import AddressRefused

__all__ = ["Resolver"]

_TTL_S = {"found": 300.0, "unknown": 60.0}
_CACHE_SIZE = 100_000
# Look-ups at once. One that takes longer than _QUICK_S counts no more, so that names whose servers are dead, which the
# system's resolver waits for 10 s and longer, do not stand before the others; their threads only sleep.
_AT_ONCE = 32
_QUICK_S = 2.0
_threads = threading.Semaphore(256)  # of the whole process

# host → (monotonic expiry, addresses or the error of the look-up); one per process, shared by all shards.
_cache: dict[str, tuple[float, list[str] | socket.gaierror]] = {}
_cache_lock = threading.Lock()  # of those who write


class Resolver:
    """`await resolver.addresses(host)` in one event loop; `close` it at the end.

    `fixed`: host name, or `*.suffix` for all names below it, → address, instead of a look-up; the longest suffix wins.
    Those are checked as all others are. What a look-up says is good for 5 minutes, that there is no such name for one;
    a temporary failure is not remembered.
    """

    def __init__(self, allow_private: bool = False, fixed: Mapping[str, str] | None = None) -> None:
        self._allow_private = allow_private
        self._fixed = {name.lower().rstrip("."): address for name, address in (fixed or {}).items()}
        self._lane = asyncio.Semaphore(_AT_ONCE)
        self._pending: dict[str, asyncio.Task[list[str]]] = {}

    async def addresses(self, host: str) -> list[str]:
        """Every address of `host` that may be connected to."""
        found = self._known(host)
        if found is None:
            # Shielded: a URL that gives up must not cancel the look-up that others wait for.
            found = await asyncio.shield(self._looking_up(host))
        allowed = found if self._allow_private else [a for a in found if addresses.why_refused(a) is None]
        if not allowed:
            raise AddressRefused(f"{host} is {found[0]} ({addresses.why_refused(found[0])})")
        return allowed

    async def close(self) -> None:
        """Give up what is looked up; a thread ends when its look-up does, and keeps no process alive."""
        tasks = list(self._pending.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _known(self, host: str) -> list[str] | None:
        if ":" in host or host[-1:].isdigit():
            try:
                addresses.why_refused(host)
                return [host]
            except ValueError:
                pass  # a name that ends in a digit
        if self._fixed and (address := self._fixed_address(host)) is not None:
            return [address]
        expiry, known = _cache.get(host, (0.0, []))
        if expiry <= time.monotonic():
            return None
        if isinstance(known, socket.gaierror):
            raise socket.gaierror(*known.args)
        return known

    def _fixed_address(self, host: str) -> str | None:
        name = host.rstrip(".")
        if name in self._fixed:
            return self._fixed[name]
        while "." in name:
            name = name.partition(".")[2]
            if (address := self._fixed.get(f"*.{name}")) is not None:
                return address
        return None

    def _looking_up(self, host: str) -> asyncio.Task[list[str]]:
        task = self._pending.get(host)
        if task is None:
            task = self._pending[host] = asyncio.create_task(self._look_up(host))
            task.add_done_callback(lambda done: (self._pending.pop(host, None), done.cancelled() or done.exception()))
        return task

    async def _look_up(self, host: str) -> list[str]:
        async with self._lane:
            while not _threads.acquire(blocking=False):
                await asyncio.sleep(0.05)
            answer = _in_thread(host)
            await asyncio.wait({answer}, timeout=_QUICK_S)
        return await answer


def _in_thread(host: str) -> asyncio.Future[list[str]]:
    """A look-up in a daemon thread: one that hangs must not hold the process when it ends, as a pool's would."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[list[str]] = loop.create_future()

    def look_up() -> None:
        found: list[str] | Exception
        try:
            found = _ask_system(host)
        except Exception as error:  # noqa: BLE001  handed over to whoever asked
            found = error
        _threads.release()
        try:
            loop.call_soon_threadsafe(tell, found)
        except RuntimeError:  # the loop has ended
            return

    def tell(found: list[str] | Exception) -> None:
        if answer.done():
            return
        if isinstance(found, Exception):
            answer.set_exception(found)
        else:
            answer.set_result(found)

    threading.Thread(target=look_up, name="dns", daemon=True).start()
    return answer


def _ask_system(host: str) -> list[str]:
    found: list[str] | socket.gaierror
    try:
        answers = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        found = list(dict.fromkeys(str(answer[4][0]) for answer in answers))
    except UnicodeError:
        found = socket.gaierror(socket.EAI_NONAME, "malformed host name")
    except socket.gaierror as error:
        if error.errno != socket.EAI_NONAME:
            raise
        found = error
    kind = "unknown" if isinstance(found, socket.gaierror) else "found"
    with _cache_lock:
        while len(_cache) >= _CACHE_SIZE:
            del _cache[next(iter(_cache))]
        _cache[host] = (time.monotonic() + _TTL_S[kind], found)
    if isinstance(found, socket.gaierror):
        raise found
    return found
