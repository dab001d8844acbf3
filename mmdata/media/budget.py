"""A bound on the bytes of all bodies that are in memory at once, without a deadlock."""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType

__all__ = ["ByteBudget", "Hold"]


class ByteBudget:
    """`total` bytes to be held by many bodies, and one place above it for a body of unknown length that outgrows it.

    A body waits before its first byte (`Hold.reserve`) and, when it turns out longer than reserved and the budget is
    spent, for the one place above it (`Hold.grow`). Who has that place waits for nobody, and who holds bytes waits
    for that place only: so somebody always gets on. Memory is bounded by `total` plus the largest body allowed.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.free = total
        self.above = asyncio.Lock()
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    def try_take(self, size: int) -> bool:
        """Take `size` bytes if they are free and nobody is in the queue."""
        if self._waiting or size > self.free:
            return False
        self.free -= size
        return True

    async def take(self, size: int) -> None:
        """Take `size` bytes, first come, first served."""
        if self.try_take(size):
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (size, turn)
        self._waiting.append(entry)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # served just before
                self.give(size)
            elif entry in self._waiting:
                self._waiting.remove(entry)
                self._serve()
            raise

    def give(self, size: int) -> None:
        """Give `size` bytes back."""
        self.free += size
        self._serve()

    def _serve(self) -> None:
        while self._waiting and self._waiting[0][0] <= self.free:
            size, turn = self._waiting.popleft()
            self.free -= size
            if turn.cancelled():
                self.free += size
            else:
                turn.set_result(None)


class Hold:
    """What one body holds of the budget; given back at the end of the `with`."""

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self._above = False
        self.size = 0

    @property
    def is_above(self) -> bool:
        """Whether it has the one place above the budget, and so as many bytes as it takes."""
        return self._above

    def try_reserve(self, size: int) -> bool:
        """Have `size` bytes in all, if that needs no wait."""
        if self._above:
            return True
        more = max(0, min(size, self._budget.total) - self.size)
        if not self._budget.try_take(more):
            return False
        self.size += more
        return True

    async def reserve(self, size: int) -> None:
        """Have `size` bytes (at most the whole budget), held from the start; waits while others have them."""
        wanted = min(size, self._budget.total)
        await self._budget.take(wanted)
        self.size += wanted

    async def grow(self) -> None:
        """Have as many bytes as it takes, by the one place above the budget; waits for it."""
        if not self._above:
            await self._budget.above.acquire()
            self._above = True

    def release(self) -> None:
        """Give all back; the hold may be used again."""
        if self.size:
            self._budget.give(self.size)
            self.size = 0
        if self._above:
            self._budget.above.release()
            self._above = False

    def __enter__(self) -> Hold:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
