"""The gate of a worker: near the book, and in a process of its own."""

from __future__ import annotations

import asyncio
import pickle
import threading
import time
from collections.abc import Awaitable, Callable

import pytest

from mmdata import host_gate
from mmdata.errors import RetryableError
from mmdata.host_desk import BookDesk, Message, Reply, rules_of
from mmdata.host_gate import Gate, LinkedGate, LocalGate, own_gate
from mmdata.media.host_rules import HostRules, Limit
from mmdata.settings import FetchOptions

FREE = Limit(None, None)


class Heard:
    """What a gate says, and waiting for it."""

    def __init__(self, gate: Gate) -> None:
        self.grants: list[str] = []
        self.closed: list[tuple[str, float]] = []
        self.gate = gate
        gate.on_grant = self.grants.append
        gate.on_closed = lambda host, for_s: self.closed.append((host, for_s))

    async def until(self, done: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not done():
                await asyncio.sleep(0.002)


def linked(desk: BookDesk, client: str = "a") -> tuple[LinkedGate, list[list[Message]]]:
    """A gate with a desk at the other end, and all it has said."""
    said: list[list[Message]] = []

    def exchange(messages: list[Message]) -> list[Reply]:
        said.append(messages)
        return desk.answer(client, messages)

    return LinkedGate(exchange, desk.rules), said


def local(desk: BookDesk, client: str = "a") -> tuple[LocalGate, list[list[Message]]]:
    return LocalGate(desk, client), []


either = pytest.mark.parametrize("make", [local, linked])
Make = Callable[..., tuple[Gate, list[list[Message]]]]


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 20))  # type: ignore[arg-type]


def test_rules_come_from_the_recipe() -> None:
    fetch = FetchOptions.model_validate(
        {
            "per_host": 2,
            "per_host_rate": None,
            "host_limits": {" Big.Example. ": {"connections": None, "per_s": None}, "slow.example": {"per_s": 0.5}},
            "host_failures": 7,
            "host_cooldown_s": 5,
        }
    )
    rules = rules_of(fetch)
    assert rules.of("any.example") == Limit(2, None)
    assert rules.of("big.example") == FREE
    assert rules.is_unbounded("big.example")
    assert rules.of("slow.example") == Limit(4, 0.5)
    assert (rules.failures, rules.cooldown_s) == (7, 5.0)


@either
def test_starts_are_granted_as_connections_come_free(make: Make) -> None:
    async def work() -> None:
        gate, _ = make(BookDesk(HostRules(Limit(2, None))))
        heard = Heard(gate)
        async with gate:
            for _ in range(5):
                gate.want("x")
            await heard.until(lambda: len(heard.grants) == 2)
            await asyncio.sleep(0.05)
            assert len(heard.grants) == 2
            gate.leave("x", "ok", None)
            await heard.until(lambda: len(heard.grants) == 3)
            gate.give_up("x", 1)
            gate.leave("x", "cancelled", None)
            gate.leave("x", "http_4xx", None)
            await heard.until(lambda: len(heard.grants) == 4)
            await asyncio.sleep(0.05)
            assert len(heard.grants) == 4

    run(work)


@either
def test_starts_keep_their_distance_and_their_pace(make: Make) -> None:
    """11 starts at 50 per second: ten gaps of at least 20 ms by the desk's clock, none of which is doubled."""

    async def work() -> None:
        desk, times = BookDesk(HostRules(Limit(4, 50.0))), []
        gate, _ = make(desk)
        heard = Heard(gate)

        def on_grant(host: str) -> None:
            times.append(time.monotonic())
            heard.grants.append(host)
            asyncio.get_running_loop().call_soon(gate.leave, host, "ok", None)

        gate.on_grant = on_grant
        async with gate:
            for _ in range(11):
                gate.want("x")
            await heard.until(lambda: len(heard.grants) == 11)
        assert times[-1] - times[0] >= 0.2 - 0.002

    run(work)


@either
def test_a_host_that_allows_everything_is_not_asked_about(make: Make) -> None:
    async def work() -> None:
        desk = BookDesk(HostRules(others={"x": FREE}))
        gate, said = make(desk)
        heard = Heard(gate)
        async with gate:
            for n in range(1000):
                gate.want("x")
                assert len(heard.grants) == n + 1
                gate.leave("x", "ok", None)
            await asyncio.sleep(0.05)
        assert said == []
        assert len(desk.book) == 0

    run(work)


@either
def test_a_host_that_allows_everything_and_fails_is_left_alone(make: Make) -> None:
    """Its failures count in the book, where other workers see them too; so does the answer that ends its trouble."""

    async def work() -> None:
        desk = BookDesk(HostRules(others={"x": FREE}, failures=3, cooldown_s=0.2))
        gate, _ = make(desk)
        heard = Heard(gate)
        async with gate:
            for n in range(1, 4):
                gate.want("x")
                await heard.until(lambda n=n: len(heard.grants) == n)  # type: ignore[misc]
                gate.leave("x", "connect", None)
            gate.want("x")
            await heard.until(lambda: len(heard.closed) == 1)
            [(host, for_s)] = heard.closed
            assert host == "x"
            assert 0.1 < for_s <= 0.24
            other, _ = make(desk, "b")
            b = Heard(other)
            async with other:
                other.want("x")
                other.leave("x", "connect", None)  # it did not know, and asks from now on
                other.want("x")
                await b.until(lambda: len(b.closed) == 1)
            await asyncio.sleep(for_s)
            for _ in range(9):
                gate.want("x")
            await heard.until(lambda: len(heard.grants) == 4)
            await asyncio.sleep(0.03)
            assert len(heard.grants) == 4  # the probe
            gate.leave("x", "ok", None)
            await heard.until(lambda: len(heard.grants) == 12)

    run(work)


@either
def test_pauses_and_crawl_delays_hold_for_a_host_that_allows_everything(make: Make) -> None:
    async def work() -> None:
        desk = BookDesk(HostRules(others={"x": FREE, "y": FREE}))
        gate, _ = make(desk)
        heard = Heard(gate)
        async with gate:
            gate.want("x")
            gate.want("x")
            gate.leave("x", "http_429", 0.3)
            gate.leave("x", "ok", None)  # under way before the pause
            gate.want("x")
            await heard.until(lambda: len(heard.closed) == 1)
            assert heard.closed[0][0] == "x"
            gate.slow("y", 0.15)
            gate.want("y")
            gate.want("y")
            await heard.until(lambda: heard.grants.count("y") == 1)
            began = time.monotonic()
            await heard.until(lambda: heard.grants.count("y") == 2)
            assert time.monotonic() - began > 0.1

    run(work)


def test_nothing_is_said_while_nothing_is_waited_for_and_little_otherwise() -> None:
    async def work() -> None:
        desk = BookDesk(HostRules(Limit(1, None)))
        gate, said = linked(desk)
        heard = Heard(gate)
        async with gate:
            await asyncio.sleep(0.1)
            assert said == []
            gate.want("x")
            await heard.until(lambda: len(heard.grants) == 1)
            count = len(said)
            await asyncio.sleep(0.3)  # the start goes on, and no other is wanted
            assert len(said) == count
            gate.want("x")
            await asyncio.sleep(0.5)  # waits for the connection: at first 10 ms apart, then up to 100 ms
            assert 4 <= len(said) - count <= 16
        assert said[0][0] == ("hello",)
        assert said[-1][-1] == ("bye",)

    run(work)


def test_what_a_worker_has_is_free_when_its_gate_closes() -> None:
    async def work() -> None:
        desk = BookDesk(HostRules(Limit(1, None)))
        for make in (linked, local):
            for client in ("a", "b"):
                gate, _ = make(desk, client)
                heard = Heard(gate)
                async with gate:
                    gate.want("x")
                    await heard.until(lambda heard=heard: len(heard.grants) == 1)  # type: ignore[misc]

    run(work)


@pytest.mark.parametrize("steps", range(8))
def test_a_gate_closes_at_whatever_moment_an_answer_comes(steps: int) -> None:
    async def work() -> None:
        gate, said = linked(BookDesk(HostRules(Limit(1, None))))
        Heard(gate)
        async with gate:
            gate.want("x")
            while not said:
                await asyncio.sleep(0)
            time.sleep(0.02)  # the answer is there, and this loop has not seen it
            for _ in range(steps):
                await asyncio.sleep(0)

    run(work)


def test_late_words_of_a_forgotten_worker_take_nothing() -> None:
    desk = BookDesk(HostRules(Limit(1, None)))
    assert desk.answer("a", [("hello",), ("want", "x", 1)]) == [("grant", "x")]
    desk.forget("a")
    assert desk.answer("a", [("want", "x", 1)]) == [("gone",)]
    assert desk.answer("b", [("hello",), ("want", "x", 1)]) == [("grant", "x")]


def test_a_worker_that_was_given_up_stops() -> None:
    async def work() -> None:
        desk = BookDesk(HostRules(Limit(1, None)))
        gate, _ = linked(desk)
        heard = Heard(gate)
        async with gate:
            gate.want("x")
            await heard.until(lambda: len(heard.grants) == 1)
            desk.forget("a")
            gate.want("x")
            await asyncio.sleep(10)

    with pytest.raises(RetryableError, match="given this worker up"):
        run(work)


def test_a_desk_that_is_gone_or_silent_stops_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_gate, "SILENCE_S", 0.1)
    release = threading.Event()

    def gone(messages: list[Message]) -> list[Reply]:
        raise BrokenPipeError("the other end is closed")

    def silent(messages: list[Message]) -> list[Reply]:
        release.wait(10)
        return []

    async def use(exchange: Callable[[list[Message]], list[Reply]]) -> None:
        gate = LinkedGate(exchange, HostRules())
        Heard(gate)
        async with gate:
            gate.want("x")
            await asyncio.sleep(10)

    async def work() -> None:
        with pytest.raises(RetryableError, match="is gone"):
            await use(gone)
        await asyncio.sleep(0)  # the cancellation is spent
        with pytest.raises(RetryableError, match=r"said nothing for 0\.1 s"):
            await use(silent)
        await asyncio.sleep(0)
        release.set()

    run(work)


def test_what_the_worker_itself_raises_goes_through() -> None:
    async def work(make: Make) -> None:
        gate, _ = make(BookDesk(HostRules(Limit(1, None))))
        Heard(gate)
        async with gate:
            gate.want("x")
            raise KeyError("its own")

    for make in (linked, local):
        with pytest.raises(KeyError):
            run(lambda make=make: work(make))  # type: ignore[misc]


def test_gates_of_one_call_share_a_book() -> None:
    async def work() -> None:
        make = own_gate(FetchOptions(per_host=1))
        one, two = make(), make()
        first, second = Heard(one), Heard(two)
        async with one, two:
            one.want("x")
            two.want("x")
            await asyncio.sleep(0.15)
            assert (first.grants, second.grants) == (["x"], [])
            one.leave("x", "ok", None)
            await second.until(lambda: second.grants == ["x"])

    run(work)


def test_a_desk_lent_out_comes_back_with_what_was_learnt() -> None:
    desk = BookDesk(HostRules(failures=1))
    elsewhere = pickle.loads(pickle.dumps(desk))  # as it goes to an actor
    desk.lend(elsewhere)
    desk.answer("a", [("hello",), ("leave", "down.example", "dns", None)])
    assert desk.book.save(0, 0)["hosts"] == {}
    desk.take_back()
    saved = desk.changed()
    assert saved is not None
    assert list(saved["hosts"]) == ["down.example"]
    assert desk.changed() is None
