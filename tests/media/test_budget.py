"""The byte budget: bounded, first come first served, no deadlock, nothing lost on cancellation."""

from __future__ import annotations

import asyncio
import random

from mmdata.media.budget import ByteBudget, Hold


def test_many_growing_bodies_stay_within_the_budget_and_all_end() -> None:
    rng = random.Random(5)
    held = most = ended = 0

    async def body(budget: ByteBudget, size: int) -> None:
        nonlocal held, most, ended
        with Hold(budget) as hold:
            await hold.reserve(min(size, 10))
            read = 0
            while read < size:
                read += 5
                if read > hold.size and not hold.try_reserve(2 * hold.size):
                    await hold.grow()
                held += 5
                most = max(most, held)
                await asyncio.sleep(0)
            held -= read
        ended += 1

    async def run() -> ByteBudget:
        budget = ByteBudget(100)
        await asyncio.wait_for(asyncio.gather(*(body(budget, rng.randrange(5, 300)) for _ in range(200))), 60)
        return budget

    budget = asyncio.run(run())
    assert ended == 200
    assert budget.free == 100
    assert not budget.above.locked()
    assert most <= 100 + 300 + 5 * 20  # the budget, the one above it, and the last read of each


def test_cancelled_waiters_lose_nothing() -> None:
    async def run() -> None:
        budget = ByteBudget(10)
        first = Hold(budget)
        await first.reserve(10)
        waiting = [asyncio.create_task(budget.take(n)) for n in (10, 4, 4)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        first.release()
        await asyncio.sleep(0)
        waiting[1].cancel()  # served already, or about to be
        done = await asyncio.gather(*waiting, return_exceptions=True)
        taken = 4 * sum(d is None for d in done)
        assert budget.free == 10 - taken

    asyncio.run(run())


def test_a_body_larger_than_the_budget_is_let_through_alone() -> None:
    async def run() -> int:
        with Hold(ByteBudget(10)) as hold:
            await hold.reserve(50)
            return hold.size

    assert asyncio.run(run()) == 10
