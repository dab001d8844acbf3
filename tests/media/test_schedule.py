"""The schedule of a shard's exchanges: order, waiting, giving up. The gate is a few lines, the clock a number."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from mmdata.media.schedule import Concurrency, Job, Schedule


def job(index: int, host: str) -> Job:
    url = URL(f"http://{host}/{index}")
    return Job(index, url, url, host)


class OpenGate:
    """Grants everything at once."""

    schedule: Schedule

    def __init__(self) -> None:
        self.left: list[tuple[str, str]] = []

    def want(self, host: str) -> None:
        self.schedule.granted(host)

    def give_up(self, host: str, count: int) -> None:
        raise AssertionError("nothing is ever pending here")

    def leave(self, host: str, outcome: str, pause_s: float | None) -> None:
        self.left.append((host, outcome))


class SlowGate(OpenGate):
    """Notes wants; the test grants."""

    def __init__(self) -> None:
        super().__init__()
        self.wanted: Counter[str] = Counter()

    def want(self, host: str) -> None:
        self.wanted[host] += 1

    def give_up(self, host: str, count: int) -> None:
        self.wanted[host] -= count

    def grant(self, host: str) -> None:
        assert self.wanted[host] > 0
        self.wanted[host] -= 1
        self.schedule.granted(host)


def made(gate: OpenGate, patience_s: float = 5.0, defer_after_s: float | None = None) -> Schedule:
    gate.schedule = Schedule(gate, patience_s, defer_after_s)
    return gate.schedule


def popped(schedule: Schedule, now: float, limit: int, count: int) -> list[Job]:
    found = []
    while len(found) < count:
        schedule.pump(now, limit)
        if (one := schedule.pop()) is None:
            break
        found.append(one)
    return found


def test_hosts_take_turns() -> None:
    schedule = made(OpenGate())
    for index in range(6):
        schedule.add(job(index, "a"), 0)
    for index in range(6, 8):
        schedule.add(job(index, "b"), 0)
    schedule.add(job(8, "c"), 0)
    order = [(j.host, j.index) for j in popped(schedule, 0, 100, 9)]
    # Three hosts in turn until the short ones are used up; within a host the order of the list.
    assert order == [("a", 0), ("b", 6), ("c", 8), ("a", 1), ("b", 7), ("a", 2), ("a", 3), ("a", 4), ("a", 5)]


def test_no_more_is_asked_than_can_be_used_soon() -> None:
    gate = SlowGate()
    schedule = made(gate)
    for index in range(100):
        schedule.add(job(index, f"h{index}"), 0)
    schedule.pump(0, 10)
    assert gate.wanted.total() == 20
    schedule.pump(0.1, 10)
    assert gate.wanted.total() == 20
    schedule.pump(1, 10)  # those twenty hosts are slow to grant: others are asked too
    assert gate.wanted.total() == 40


def test_a_delayed_job_comes_when_it_is_due_and_before_the_others() -> None:
    schedule = made(OpenGate())
    schedule.add(job(0, "a"), 0, delay_s=3)
    assert popped(schedule, 2.9, 4, 1) == []
    assert schedule.wake_at(2.9) == 3
    schedule.add(job(1, "b"), 2.9)
    assert [j.index for j in popped(schedule, 3, 4, 2)] == [1, 0]


def test_a_closed_host_waits_and_comes_back() -> None:
    gate = SlowGate()
    schedule = made(gate)
    schedule.add(job(0, "a"), 0)
    schedule.pump(0, 4)
    gate.wanted.clear()  # a gate that closes a host drops what was wanted there
    schedule.closed("a", 0, 2)
    assert popped(schedule, 1, 4, 1) == []
    assert gate.wanted["a"] == 0
    assert schedule.wake_at(1) == 2
    schedule.pump(2, 4)
    assert gate.wanted["a"] == 1
    gate.grant("a")
    assert [j.index for j in popped(schedule, 2, 4, 1)] == [0]


def test_hosts_in_trouble_are_waited_for_one_patience_and_no_longer() -> None:
    gate = SlowGate()
    schedule = made(gate, patience_s=5)
    for index in range(5):
        schedule.add(job(index, "bad"), 0)
    schedule.add(job(9, "good"), 0)
    schedule.pump(0, 50)
    for _ in range(3):
        gate.grant("bad")
    gate.grant("good")
    running = popped(schedule, 0, 50, 4)
    bad = [j for j in running if j.host == "bad"]
    for each in bad:
        schedule.ended(each, "timeout")
    assert schedule.overdue(4) == []  # the good host still has one
    schedule.ended(next(j for j in running if j.host == "good"), "ok")
    assert schedule.overdue(10) == []  # from now on only the bad one is left
    assert schedule.wake_at(10) == 15
    assert schedule.overdue(14.9) == []
    assert sorted(j.index for j in schedule.overdue(15)) == [3, 4]
    assert schedule.jobs == 0
    assert gate.wanted["bad"] == 0


def test_a_host_that_recovers_is_waited_for() -> None:
    gate = SlowGate()
    schedule = made(gate, patience_s=5)
    for index in range(5):
        schedule.add(job(index, "a"), 0)
    schedule.pump(0, 50)
    for outcome in ("timeout", "timeout", "timeout"):
        gate.grant("a")
        [one] = popped(schedule, 0, 50, 1)
        schedule.ended(one, outcome)
    assert schedule.overdue(0) == []
    gate.grant("a")
    [one] = popped(schedule, 3, 50, 1)
    schedule.ended(one, "http_4xx")  # an answer
    assert schedule.overdue(6) == []
    assert schedule.jobs == 1


def test_a_host_that_only_allows_little_is_waited_for_unless_told_otherwise() -> None:
    for defer_after_s, left in ((None, []), (7.0, [0, 1])):
        gate = SlowGate()
        schedule = made(gate, 5, defer_after_s)
        for index in range(2):
            schedule.add(job(index, "a"), 0)
        schedule.pump(0, 50)
        schedule.note_room(0, True)
        assert schedule.overdue(6.9) == []
        assert schedule.spare_s(6.9) == 6.9
        assert [j.index for j in schedule.overdue(7)] == left


def test_a_grant_that_nobody_can_use_is_given_back() -> None:
    gate = SlowGate()
    schedule = made(gate)
    schedule.granted("nobody")
    assert gate.left == [("nobody", "cancelled")]


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from(["ok", "timeout", "http_429"])), max_size=60))
def test_every_job_starts_once_or_is_given_up_once(rows: list[tuple[str, str]]) -> None:
    gate = OpenGate()
    schedule = made(gate, patience_s=1)
    for index, (host, _) in enumerate(rows):
        schedule.add(job(index, host), 0, delay_s=index % 3)
    seen: list[int] = []
    now = 0.0
    while schedule.jobs:
        for one in popped(schedule, now, 3, 3):
            seen.append(one.index)
            schedule.ended(one, rows[one.index][1])
        seen += [j.index for j in schedule.overdue(now)]
        now += 0.5
        assert now < 100
    assert sorted(seen) == list(range(len(rows)))
    assert schedule.active == 0


def test_concurrency_grows_while_it_is_used_and_shrinks_when_hosts_choke() -> None:
    flow = Concurrency(256)
    assert flow.limit == 32
    for _ in range(50):
        flow.note("a", "ok", is_short=False)
    assert flow.limit == 32
    for _ in range(1000):
        flow.note("a", "ok", is_short=True)
    assert flow.limit == 256
    for index in range(256 + 256):  # one in four timeouts, of a host that has answered
        flow.note("a", "timeout" if index % 4 == 0 else "ok", is_short=True)
    assert flow.limit < 256 * 0.7 + 2
    for _ in range(300):
        flow.note("a", "ok", is_short=False)  # the window that was begun ends
    before = flow.limit
    for _ in range(before):
        flow.note("a", "ok", is_short=True)
    assert before < flow.limit <= before + 2  # by one per round trip from now on


def test_dead_hosts_do_not_slow_the_others_down() -> None:
    flow = Concurrency(64)
    for index in range(1000):
        flow.note(f"dead{index}", "timeout", is_short=True)
        flow.note("alive", "ok", is_short=True)
    assert flow.limit == 64
