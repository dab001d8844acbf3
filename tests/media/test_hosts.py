"""Allowances of hosts, simulated with a clock of their own."""
# long because: each rule has its case by hand, and all of them one simulation

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdata.media import hosts
from mmdata.media.host_rules import Closed, Grant, HostRules, Limit
from mmdata.media.hosts import HostBook


class NoJitter(random.Random):
    def uniform(self, a: float, b: float) -> float:
        return a


def book(connections: int | None = 4, per_s: float | None = None, **rules: float) -> HostBook:
    return HostBook(HostRules(Limit(connections, per_s), **rules), NoJitter())  # type: ignore[arg-type]


def granted(book: HostBook, client: str, now: float) -> int:
    told = book.take(client, now)
    assert all(isinstance(each, Grant) for each in told), told
    return len(told)


def test_no_more_connections_than_allowed_over_all_workers() -> None:
    b = book(3)
    b.want("a", "x", 0, 5)
    b.want("b", "x", 0, 5)
    assert granted(b, "a", 0) + granted(b, "b", 0) == 3
    b.leave("a", "x", "ok", None, 1)
    assert granted(b, "a", 1) + granted(b, "b", 1) == 1


def test_starts_are_as_far_apart_as_the_rate_says() -> None:
    """By hand: 4 starts at 10 per second take place at 0, 0.1, 0.2 and 0.3 s; next_change names these times."""
    b, times, now = book(4, 10.0), [], 100.0
    b.want("a", "x", now, 4)
    for _ in range(4):
        later = b.next_change("a", now)
        assert later is not None
        now = later
        times += [now] * granted(b, "a", now)
        b.leave("a", "x", "ok", None, now)
    assert times == pytest.approx([100.0, 100.1, 100.2, 100.3])
    assert b.next_change("a", now) is None


def test_a_late_start_moves_the_next_one() -> None:
    """No burst: what a worker did not use is gone."""
    b = book(4, 10.0)
    b.want("a", "x", 0.0, 3)
    assert granted(b, "a", 5.0) == 1
    assert granted(b, "a", 5.09) == 0
    assert granted(b, "a", 5.1) == 1


def test_workers_take_turns_whoever_wants_more() -> None:
    b, got, now = book(4, 10.0), Counter[str](), 0.0
    b.want("greedy", "x", now, 1000)
    b.want("modest", "x", now, 50)
    for _ in range(100):
        for client in ("greedy", "modest"):
            for _ in range(granted(b, client, now)):
                got[client] += 1
                b.leave(client, "x", "ok", None, now)
        now += 0.1
    assert abs(got["greedy"] - got["modest"]) <= 2  # one was alone at first
    assert got.total() >= 99


def test_a_turn_nobody_takes_passes_on() -> None:
    b = book(1)
    b.want("stuck", "x", 0.0)
    b.want("a", "x", 0.0)
    assert granted(b, "a", 0.1) == 0
    later = b.next_change("a", 0.1)
    assert later is not None
    assert later <= hosts.PATIENCE_S
    assert granted(b, "a", later) == 1
    b.leave("a", "x", "ok", None, 1.0)
    assert granted(b, "stuck", 1.0) == 1


def test_a_worker_that_died_blocks_nobody() -> None:
    b = book(2)
    b.want("dead", "x", 0.0, 9)
    assert granted(b, "dead", 0.0) == 2
    b.want("a", "x", 0.0, 2)
    b.forget("dead", 1.0)
    assert granted(b, "a", 1.0) == 2


def test_wants_given_up_are_not_granted() -> None:
    b = book(2)
    b.want("a", "x", 0.0, 5)
    b.give_up("a", "x", 4, 0.0)
    assert granted(b, "a", 0.0) == 1
    b.leave("a", "x", "ok", None, 0.0)
    assert granted(b, "a", 9.0) == 0


def test_others_have_their_own_allowance() -> None:
    b = HostBook(HostRules(Limit(4, 10.0), {"big.example": Limit(None, None), "small.example": Limit(1, None)}))
    b.want("a", "big.example", 0.0, 500)
    b.want("a", "small.example", 0.0, 5)
    b.want("a", "other.example", 0.0, 5)
    told = Counter(each.host for each in b.take("a", 0.0))
    assert told == {"big.example": 500, "small.example": 1, "other.example": 1}


# Breakers and pauses


def fail(b: HostBook, count: int, now: float, outcome: str = "timeout") -> None:
    for _ in range(count):
        b.want("a", "x", now)
        assert granted(b, "a", now) == 1
        b.leave("a", "x", outcome, None, now)


def test_a_breaker_opens_after_failures_in_a_row_and_one_probe_is_let_through() -> None:
    b = book(4, None, failures=3, cooldown_s=60)
    fail(b, 2, 0.0)
    fail(b, 1, 0.0, "http_4xx")  # an answer
    fail(b, 3, 0.0, "http_5xx")
    b.want("b", "x", 10.0, 8)
    assert b.take("b", 10.0) == [Closed("x", 50.0)]
    b.want("a", "x", 60.0, 2)
    b.want("b", "x", 60.0, 2)
    assert [granted(b, "a", 60.0), granted(b, "b", 60.0)] == [1, 0]
    b.leave("a", "x", "ok", None, 61.0)
    assert [granted(b, "a", 61.0), granted(b, "b", 61.0)] == [1, 2]


def test_a_breaker_stays_open_for_twice_as_long_each_time_up_to_an_hour() -> None:
    """By hand: 60 s, 120, 240, 480, 960, 1920, then 3600."""
    b, now, closed = book(4, None, failures=10, cooldown_s=60), 0.0, []
    fail(b, 9, now)
    for _ in range(8):
        fail(b, 1, now, "connect")
        b.want("a", "x", now)
        [told] = b.take("a", now)
        assert isinstance(told, Closed)
        closed.append(told.for_s)
        now += told.for_s
    assert closed == pytest.approx([60, 120, 240, 480, 960, 1920, 3600, 3600])


def test_failures_of_what_was_under_way_do_not_double_the_cool_down() -> None:
    b = book(4, None, failures=1, cooldown_s=60)
    b.want("a", "x", 0.0, 4)
    assert granted(b, "a", 0.0) == 4
    for _ in range(4):
        b.leave("a", "x", "timeout", None, 0.0)
    b.want("a", "x", 0.0)
    assert b.take("a", 0.0) == [Closed("x", 60.0)]


@pytest.mark.parametrize("outcome", ["cancelled", "refused_address", "blocked", "bad_url"])
def test_what_says_nothing_of_the_host_does_not_count(outcome: str) -> None:
    b = book(4, None, failures=2)
    fail(b, 1, 0.0)
    fail(b, 5, 0.0, outcome)
    fail(b, 1, 0.0)
    b.want("a", "x", 0.0)
    assert b.take("a", 0.0) == [Closed("x", 60.0)]


@pytest.mark.parametrize("outcome", ["ok", "http_4xx", "opted_out", "redirect", "not_media", "too_large"])
def test_answers_count_as_answers(outcome: str) -> None:
    b = book(4, None, failures=2)
    for _ in range(3):
        fail(b, 1, 0.0)
        fail(b, 1, 0.0, outcome)
    b.want("a", "x", 0.0)
    assert granted(b, "a", 0.0) == 1


def test_a_cancelled_probe_is_made_again() -> None:
    b = book(4, None, failures=1)
    fail(b, 1, 0.0)
    fail(b, 1, 60.0, "cancelled")
    fail(b, 1, 60.0, "ok")
    b.want("a", "x", 60.0, 4)
    assert granted(b, "a", 60.0) == 4


def test_the_probe_of_a_dead_worker_is_made_by_another() -> None:
    b = book(4, None, failures=1)
    fail(b, 1, 0.0)
    b.want("dead", "x", 60.0)
    assert granted(b, "dead", 60.0) == 1
    b.want("a", "x", 60.0)
    assert granted(b, "a", 60.0) == 0
    b.forget("dead", 61.0)
    assert granted(b, "a", 61.0) == 1


def test_retry_after_pauses_the_host_for_all_workers_and_at_most_an_hour() -> None:
    b = book(1)
    b.want("a", "x", 0.0)
    b.want("b", "x", 0.0, 3)
    assert granted(b, "a", 0.0) == 1
    b.leave("a", "x", "http_429", 2.0, 1.0)
    assert b.take("b", 1.5) == [Closed("x", 1.5)]
    b.want("a", "x", 3.0)
    assert granted(b, "a", 3.0) == 1
    b.leave("a", "x", "http_5xx", 1e9, 4.0)
    b.want("a", "x", 4.0)
    assert b.take("a", 4.0) == [Closed("x", 3600.0)]


def test_what_is_wanted_before_a_closing_is_told_is_dropped_with_it() -> None:
    """Told by number of starts, a worker could not know which wants a closing means."""
    b = book(1)
    b.want("a", "x", 0.0, 3)
    assert granted(b, "a", 0.0) == 1
    b.leave("a", "x", "http_429", 1.0, 0.0)
    b.want("a", "x", 2.0, 2)
    assert b.take("a", 2.0) == [Closed("x", 0.0)]
    assert b.next_change("a", 2.0) is None
    assert b.take("a", 9.0) == []


def test_a_turn_on_offer_is_taken_back_when_the_host_closes() -> None:
    b = book(2)
    b.want("a", "x", 0.0)
    assert granted(b, "a", 0.0) == 1
    b.want("b", "x", 0.0)
    b.leave("a", "x", "http_429", 5.0, 0.0)
    assert b.take("b", 0.0) == [Closed("x", 5.0)]
    b.want("b", "x", 5.0, 9)
    assert granted(b, "b", 5.0) == 2


def test_crawl_delay_slows_a_host_and_never_hastens_it() -> None:
    b = book(4, 10.0)
    fail(b, 1, 0.0, "ok")
    b.slow("x", 5.0, 0.0)
    b.slow("x", 0.01, 0.0)
    b.want("a", "x", 0.0, 2)
    assert b.next_change("a", 0.0) == pytest.approx(5.0)
    assert granted(b, "a", 4.99) == 0
    assert granted(b, "a", 5.0) == 1
    assert granted(b, "a", 9.99) == 0
    assert granted(b, "a", 10.0) == 1


# Over restarts


def test_breakers_and_long_pauses_survive_by_the_clock_on_the_wall() -> None:
    b = book(4, None, failures=2, cooldown_s=60)
    for host in ("down", "worse"):
        for _ in range(2):
            b.leave("a", host, "dns", None, 0.0)
    b.leave("a", "worse", "ok", None, 0.0)
    b.leave("a", "later", "http_429", 600.0, 0.0)
    b.leave("a", "soon", "http_429", 2.0, 0.0)
    saved = b.save(10.0, 1_000_000.0)
    hosts_saved = {"down": [1, 1_000_050.0], "later": [0, 1_000_590.0]}
    assert saved == {"format": 1, "saved": 1_000_000.0, "hosts": hosts_saved}

    again = book(4, None, failures=2, cooldown_s=60)
    again.load(saved, 5.0, 1_000_020.0)
    assert again.save(5.0, 1_000_020.0) == {**saved, "saved": 1_000_020.0}
    for host in ("down", "later", "worse", "soon"):
        again.want("b", host, 5.0)
    assert again.take("b", 5.0) == [Closed("down", 30.0), Closed("later", 570.0), Grant("worse"), Grant("soon")]
    again.want("b", "down", 35.0, 3)
    assert again.take("b", 35.0) == [Grant("down")]  # the probe
    again.leave("b", "down", "dns", None, 35.0)
    assert again.take("b", 35.0) == [Closed("down", 120.0)]


def test_a_clock_that_was_wrong_closes_no_host_for_longer_than_an_hour() -> None:
    b = book()
    b.load({"format": 1, "hosts": {"x": [1, 9e9]}}, 0.0, 1_000_000.0)
    b.want("a", "x", 0.0)
    assert b.take("a", 0.0) == [Closed("x", 3600.0)]


def test_what_is_no_saved_book_is_refused() -> None:
    for saved in ({}, {"format": 2, "hosts": {}}, {"format": 1, "hosts": {"x": ["1", 2]}}):
        with pytest.raises((ValueError, TypeError)):
            book().load(saved, 0.0, 0.0)


def test_hosts_without_history_are_forgotten_and_those_with_one_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "HOSTS_REMEMBERED", 100)
    b = book(4, 10.0)
    for n in range(5000):
        host = f"h{n}.example"
        b.want("a", host, n * 0.001)
        assert granted(b, "a", n * 0.001) == 1
        b.leave("a", host, "timeout" if n % 10 == 0 else "ok", None, n * 0.001)
    assert len(b) <= 100 + 0.1 / 0.001 + 2  # the last tenth of a second's hosts are not due yet


# All of it at once


class Run:
    """A book under workers that do as they please, and what a bystander sees of it."""

    def __init__(self, connections: int, per_s: float | None) -> None:
        self.book = book(connections, per_s, failures=3, cooldown_s=7)
        self.connections, self.interval = connections, 1 / per_s if per_s else 0.0
        self.now = 1000.0
        self.wanted: Counter[tuple[str, str]] = Counter()
        self.held: Counter[tuple[str, str]] = Counter()
        self.started: dict[str, float] = {}

    def take(self, client: str) -> None:
        for told in self.book.take(client, self.now):
            at = client, told.host
            assert self.wanted[at] > 0, "granted or closed, and nobody had asked"
            if isinstance(told, Closed):
                self.wanted[at] = 0
                continue
            self.wanted[at] -= 1
            self.held[at] += 1
            assert sum(n for (_, host), n in self.held.items() if host == told.host) <= self.connections
            if self.interval and told.host in self.started:
                assert self.now - self.started[told.host] >= self.interval - 1e-9
            self.started[told.host] = self.now

    def leave(self, client: str, host: str, outcome: str, pause_s: float | None) -> None:
        if self.held[client, host]:
            self.held[client, host] -= 1
            self.book.leave(client, host, outcome, pause_s, self.now)

    def forget(self, client: str) -> None:
        self.book.forget(client, self.now)
        for counter in (self.wanted, self.held):
            for at in [at for at in counter if at[0] == client]:
                del counter[at]

    def drain(self) -> None:
        """Everything wanted is granted or closed in the end, by `next_change` alone."""
        for _ in range(10_000):
            for client in "abc":
                self.take(client)
            for client, host in list(self.held.elements()):
                self.leave(client, host, "ok", None)
            if not self.wanted.total():
                return
            changes = [c for c in (self.book.next_change(client, self.now) for client in "abc") if c is not None]
            assert changes, f"lost: {+self.wanted}"
            self.now = max(self.now, min(changes))
        pytest.fail(f"never granted: {+self.wanted}")

    def has_its_connections_back(self) -> None:
        """None leaked: once all is over, a newcomer gets as many as the host allows."""
        self.now += 2 * hosts.MAX_PAUSE_S
        for host in "xyz" if not self.interval else "":
            assert self.granted_one(host), "even after its breaker's longest pause"
            self.book.leave("new", host, "ok", None, self.now)
            self.book.want("new", host, self.now, 9)
            assert granted(self.book, "new", self.now) == self.connections
            self.book.give_up("new", host, 9, self.now)

    def granted_one(self, host: str) -> bool:
        self.book.want("new", host, self.now)
        return granted(self.book, "new", self.now) == 1


_client, _host = st.sampled_from("abc"), st.sampled_from("xyz")
_outcome = st.sampled_from(["ok", "ok", "http_4xx", "timeout", "http_5xx", "cancelled"])
_pause = st.sampled_from([None, None, None, 0.5, 9.0])
_step = st.one_of(
    st.tuples(st.just("want"), _client, _host, st.integers(1, 6)),
    st.tuples(st.just("take"), _client),
    st.tuples(st.just("take"), _client),
    st.tuples(st.just("leave"), _client, _host, _outcome, _pause),
    st.tuples(st.just("leave"), _client, _host, _outcome, _pause),
    st.tuples(st.just("give_up"), _client, _host, st.integers(1, 4)),
    st.tuples(st.just("pass"), st.floats(0, 3)),
    st.tuples(st.just("forget"), _client),
)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 4), st.sampled_from([None, 1.0, 10.0]), st.lists(_step, max_size=60))
def test_whatever_workers_do_nobody_gets_more_and_nobody_is_lost(
    connections: int, per_s: float | None, steps: list[tuple[object, ...]]
) -> None:
    run = Run(connections, per_s)
    for kind, *given_ in steps:
        if kind == "want":
            client, host, count = given_
            run.wanted[client, host] += count
            run.book.want(client, host, run.now, count)
        elif kind == "give_up":
            client, host, count = given_
            run.book.give_up(client, host, count, run.now)
            run.wanted[client, host] -= min(count, run.wanted[client, host])
        elif kind == "pass":
            run.now += given_[0]
        else:
            getattr(run, str(kind))(*given_)
    run.drain()
    run.has_its_connections_back()
