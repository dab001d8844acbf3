"""The HTTP client against servers that misbehave: every request costs one value, bounded in time and bytes."""

# long because: one client, and much that servers do to it

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import misbehaving_media as media
import pytest
from misbehaving import Misbehaving
from misbehaving_answers import ZEROS
from misbehaving_cases import CASES, Case
from multidict import CIMultiDictProxy
from server import JPEG, BadServer

from mmdata.media import addresses, connector, http, resolver, transfer
from mmdata.media.addresses import parse_url
from mmdata.media.body import Body
from mmdata.media.budget import ByteBudget, Hold
from mmdata.media.http import Client, Exchange, HttpLimits

LIMITS = HttpLimits(
    user_agent="mmdata/test (+https://example.org/crawl)",
    allow_private=True,
    resolve={"*.test": "127.0.0.1", "inside.test": "127.0.0.2"},
)


@pytest.fixture(scope="module")
def server() -> Iterator[BadServer]:
    with BadServer() as running:
        yield running


@pytest.fixture(scope="module")
def hostile() -> Iterator[Misbehaving]:
    with Misbehaving() as running:
        yield running


async def ask(client: Client, url: str, timeout_s: float = 5.0, **more: Any) -> Exchange:
    with Hold(client.budget) as hold:
        return await client.exchange(parse_url(url), timeout_s, hold, **more)


def exchange_all(urls: Sequence[str], timeout_s: float = 5.0, **changes: Any) -> list[Exchange]:
    """All at once."""

    async def run() -> list[Exchange]:
        async with Client(replace(LIMITS, **changes)) as client:
            return list(await asyncio.gather(*(ask(client, url, timeout_s) for url in urls)))

    return asyncio.run(run())


def exchange(url: str, timeout_s: float = 5.0, **changes: Any) -> Exchange:
    return exchange_all([url], timeout_s, **changes)[0]


def sockets(client: Client) -> int:
    """The open connections, in use or idle."""
    return len(client._connector._acquired) + client._connector.idle_count


def test_a_picture_and_what_is_sent_for_it(hostile: Misbehaving, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{hostile.ports['refused']}")
    found = exchange(hostile.url("good/a%2Fb?c=d&e", "sent.test"))
    assert (found.status, found.http_status, found.content_type) == ("ok", 200, "image/jpeg")
    assert (found.detail, found.location, found.pause_s, found.sent) == (None, None, None, True)
    assert 0 < found.seconds < 5
    asked = [a for a in hostile.asked if a.host == "sent.test"]
    assert [a.path for a in asked] == ["/good/a%2Fb?c=d&e"]
    assert asked[0].headers == {
        "host": f"sent.test:{hostile.ports['http']}",
        "user-agent": LIMITS.user_agent,
        "accept": "image/*, */*;q=0.5",
        "accept-encoding": "identity",
    }


# What the body is, and how often is asked, is judged elsewhere (tests/test_misbehaving.py).
_GROUPS = ("Names and connections", "TLS", "Time", "Headers", "Lengths and chunks", "Content codings nobody asked for")
_ELSEWHERE = {"unknown_name", "slow_name", "answers_unasked"}
TABLE = [c for c in CASES if c.group in _GROUPS and c.name not in _ELSEWHERE]
TIMEOUT_S = 3.0


@pytest.fixture(scope="module")
def outcomes(hostile: Misbehaving) -> dict[str, Exchange]:
    """Of the whole table at once."""
    media.gzip_bomb()  # takes the server a second, once
    asked = [(c, str(url)) for c in TABLE for url in c.locations(hostile)[:1]]
    with pytest.MonkeyPatch.context() as patch:
        context = ssl.create_default_context(cafile=str(hostile.authority))
        patch.setattr(http, "_tls", lambda: context)
        started = time.monotonic()
        found = exchange_all([url for _, url in asked], TIMEOUT_S, max_bytes=4 << 20)
        assert time.monotonic() - started < TIMEOUT_S + 2
    return {case.name: each for (case, _), each in zip(asked, found, strict=True)}


@pytest.mark.parametrize("case", TABLE, ids=lambda c: c.name)
def test_what_a_server_does_becomes_a_status(case: Case, outcomes: dict[str, Exchange]) -> None:
    found = outcomes[case.name]
    assert found.status in case.statuses[0].split("|"), found.detail
    assert (found.status == "ok") == (found.data is not None) == (found.detail is None)
    assert len(found.detail or "") <= 200
    assert "://" not in (found.detail or "")
    assert found.seconds <= TIMEOUT_S + 0.5


def test_redirects_are_told_and_not_followed(hostile: Misbehaving) -> None:
    hops = {
        "hop/1": hostile.url("hop/0", "x.test"),
        "to_relative": hostile.url("good?a=b", "x.test"),
        "to_scheme_relative": hostile.url("good", "elsewhere.test"),
        "to_unicode": hostile.url("good/b%C3%BCcher/%E2%98%83.jpg", "x.test"),
        "to_latin_1": hostile.url("good/b%FCcher.jpg", "x.test"),
        "redirect_endless": hostile.url("good", "x.test"),
        "to_inside": "http://127.0.0.2:{}/good".format(hostile.ports["http"]),
    }
    found = exchange_all([hostile.url(name, "x.test") for name in hops])
    assert [(f.status, str(f.location)) for f in found] == [("redirect", url) for url in hops.values()]
    assert {f.http_status for f in found} <= {301, 302}
    refused = exchange_all([hostile.url(name, "y.test") for name in ("to_file", "to_ftp", "to_data", "to_nowhere")])
    assert {(f.status, f.location) for f in refused} == {("bad_url", None)}
    assert refused[0].detail == "redirect: scheme 'file' is not http or https"
    assert "/good" not in {a.path for a in hostile.asked if a.host in ("x.test", "y.test")}


def test_user_and_password_are_sent_and_told_nobody(hostile: Misbehaving) -> None:
    host = f"user.test:{hostile.ports['http']}"
    found = exchange_all(
        [f"http://me:s%40crt@{host}/{name}" for name in ("good", "broken", "cut_in_body", "drip")], 0.5
    )
    assert [f.status for f in found] == ["ok", "http_5xx", "connect", "timeout"]
    sent = {a.headers.get("authorization") for a in hostile.asked if a.host == "user.test"}
    assert sent == {"Basic bWU6c0BjcnQ="}  # printf 'me:s@crt' | base64
    assert not any("crt" in repr(f) for f in found)
    inside, outside = exchange_all([f"http://me:s%40crt@{host}/{name}" for name in ("to_relative", "to_other_host")])
    assert (inside.location or parse_url("http://x.test")).raw_user == "me"  # the same host
    assert (outside.location or parse_url("http://me@x.test")).raw_user is None


def test_answers_are_judged_by_their_headers_before_the_body_is_read(hostile: Misbehaving) -> None:
    judged: list[str | None] = []

    def judge(headers: CIMultiDictProxy[str]) -> str | None:
        judged.append(headers.get("x-robots-tag"))
        return "said no" if headers.get("X-Robots-Tag") else None

    def fails(headers: CIMultiDictProxy[str]) -> str | None:
        raise KeyError("a secret")

    async def run() -> list[Exchange]:
        async with Client(LIMITS) as client:
            names = ("tag_endless", "good", "not_found", "hop/1")
            found = [await ask(client, hostile.url(name), judge=judge) for name in names]
            return [*found, await ask(client, hostile.url("good"), judge=fails)]

    found = asyncio.run(run())
    assert [f.status for f in found] == ["opted_out", "ok", "http_4xx", "redirect", "connect"]
    assert (found[0].detail, found[0].data, found[0].http_status) == ("said no", None, 200)
    assert judged == ["noai", None]
    assert found[4].detail == "KeyError"


def test_a_bound_of_its_own_keeps_the_first_bytes(hostile: Misbehaving) -> None:
    async def run() -> list[Exchange]:
        async with Client(LIMITS) as client:
            return [
                await ask(client, hostile.url(n), max_bytes=5000) for n in ("good", "endless_body", "gzip", "empty")
            ]

    whole = exchange(hostile.url("good")).data
    assert whole is not None
    found = asyncio.run(run())
    assert [(f.status, f.data) for f in found] == [
        ("too_large", whole[:5000]),
        ("too_large", ZEROS[:5000]),
        ("too_large", whole[:5000]),
        ("ok", b""),
    ]
    assert [len(f.data or b"") for f in found] == [5000, 5000, 5000, 0]


def test_pauses_that_servers_ask_for(server: BadServer, hostile: Misbehaving) -> None:
    asked = [server.url(f"/busy/{value}") for value in ("7", "soon", "-1", "1" * 400)]
    found = exchange_all([*asked, hostile.url("busy_date", "later.test")])
    assert {(f.status, f.is_transient, f.http_status) for f in found} == {("http_429", True, 429)}
    assert [f.pause_s for f in found[:3]] == [7, None, None]
    assert (found[3].pause_s or 0) > 1e9
    assert 0 <= (found[4].pause_s or -1) <= 5


def test_one_connection_serves_many_requests_and_one_that_died_idle_costs_nothing(hostile: Misbehaving) -> None:
    async def run() -> None:
        async with Client(LIMITS) as client:
            for n in range(5):
                assert (await ask(client, hostile.url(f"good?{n}", "kept.test"))).status == "ok"
            assert sockets(client) == 1
            for n in range(4):
                assert (await ask(client, hostile.url(f"closes_after?{n}", "kept.test"))).status == "ok"
                await asyncio.sleep(0.002 * 8**n)  # before, while and after it is closed
            # What lies behind an answer is not taken for the next one.
            forged = await ask(client, hostile.url("answers_unasked", "kept.test"))
            own = await ask(client, hostile.url("other", "kept.test"))
            assert forged.data != own.data
            assert own.data == (await ask(client, hostile.url("other", "x.test"))).data

    asyncio.run(run())
    paths = [a.path for a in hostile.asked if a.host == "kept.test"]
    assert len(paths) == len(set(paths)) == 5 + 4 + 2


def test_a_request_that_fails_is_sent_once(server: BadServer) -> None:
    found = exchange_all([server.url("/reset/once"), server.url("/status/503?once"), server.url("/short?once")])
    assert [f.status for f in found] == ["connect", "http_5xx", "connect"]
    assert all(f.is_transient for f in found)
    assert [server.hits[p] for p in ("/reset/once", "/status/503?once", "/short?once")] == [1, 1, 1]


def test_idle_connections_are_bounded_and_end(server: BadServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_KEEP_ALIVE_S", 0.2)
    monkeypatch.setattr(connector, "_TRIMMED_EVERY", 4)
    monkeypatch.setattr(connector, "_MOST_IDLE", 3)

    async def run() -> None:
        async with Client(LIMITS) as client:
            urls = [server.url("/ok", host=f"host{n}.test") for n in range(12)]
            assert {(await ask(client, url)).status for url in urls} == {"ok"}
            assert {key.host for key in client._connector._conns} == {"host9.test", "host10.test", "host11.test"}
            await asyncio.sleep(1.2)
            assert sockets(client) == 0

    asyncio.run(run())


def test_what_was_received_for_one_request_allows_nothing_for_the_next(hostile: Misbehaving) -> None:
    async def run() -> list[Exchange]:
        async with Client(LIMITS) as client:
            names = ["good_chunks"] * 3 + ["interim_endless", "good_chunks", "chunk_trailers_endless"]
            return [await ask(client, hostile.url(name, "same.test")) for name in names]

    found = asyncio.run(run())
    assert [f.status for f in found] == ["ok"] * 3 + ["connect", "ok", "connect"]
    assert found[3].detail == f"malformed answer: more than {LIMITS.max_header_bytes} bytes of headers"


def test_chunks_of_a_few_bytes_are_refused_and_small_ones_not() -> None:
    def chunks(size: int) -> bytes:
        return f"{size:x}\r\n".encode() + bytes(size) + b"\r\n"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        size = int((await reader.readuntil(b"\r\n\r\n")).split()[1][1:])
        head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        writer.write(head + chunks(size) * (400_000 // size) + b"0\r\n\r\n")
        await writer.drain()
        writer.close()

    async def run() -> list[Exchange]:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server, Client(LIMITS) as client:
            port = server.sockets[0].getsockname()[1]
            return [await ask(client, f"http://127.0.0.1:{port}/{size}") for size in (1, 8, 100)]

    found = asyncio.run(run())
    assert [(f.status, len(f.data or b"")) for f in found] == [("connect", 0), ("ok", 400_000), ("ok", 400_000)]
    assert found[0].detail == "malformed answer: chunks of a few bytes each"


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "0177.0.0.1", "127.1", "[::ffff:127.0.0.1]", "a.test"]
)
def test_loopback_is_refused_in_every_spelling(server: BadServer, host: str) -> None:
    before = sum(server.hits.values())
    found = exchange(server.url("/ok", host=host), allow_private=False)
    assert (found.status, found.http_status, found.data) == ("refused_address", None, None)
    assert found.sent == host.endswith(("host", "test"))  # of a name the address had to be looked up
    assert sum(server.hits.values()) == before


def test_a_name_that_changes_between_look_ups_reaches_checked_addresses_only(
    hostile: Misbehaving, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Stand-in for a public server: here 127.0.0.1 is public; every other address is judged as it is.
    real = addresses.why_refused
    monkeypatch.setattr(addresses, "why_refused", lambda a: None if a == "127.0.0.1" else real(a))
    monkeypatch.setattr(resolver, "_cache", {})
    monkeypatch.setattr(resolver, "_TTL_S", {"found": 0.0, "unknown": 0.0})
    answers = ["127.0.0.1", "127.0.0.2", "127.0.0.1", "127.0.0.2"]

    def look_up(host: str, *_: Any, **__: Any) -> Any:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (answers.pop(0), 0))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)

    async def run() -> list[str]:
        url, limits = hostile.url("good", "rebound.example"), replace(LIMITS, allow_private=False, resolve={})
        found = []
        for requests in (2, 1, 1, 1):  # over the connections of one client each
            async with Client(limits) as client:
                found += [(await ask(client, url)).status for _ in range(requests)]
        return found

    # The second request goes over the connection that was checked; each later one is a look-up of its own.
    assert asyncio.run(run()) == ["ok", "ok", "refused_address", "ok", "refused_address"]
    assert {a.address for a in hostile.asked if a.host == "rebound.example"} == {"127.0.0.1"}


def test_a_dead_address_costs_little_where_another_answers(server: BadServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "_cache", {"two.test": (time.monotonic() + 60, ["127.0.0.9", "127.0.0.1"])})
    with socket.socket() as deaf:  # listens, and its queue is full: a connection is never made
        deaf.bind(("127.0.0.9", server.port))
        deaf.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(deaf.getsockname())
        found = exchange(server.url("/ok", host="two.test"), resolve={})
        for filler in fillers:
            filler.close()
    assert found.status == "ok"
    assert found.seconds < 2


@pytest.mark.parametrize("path", ["/slow/30", "/drip", "/huge"])
def test_the_deadline_holds(server: BadServer, path: str) -> None:
    started = time.monotonic()
    found = exchange(server.url(path), timeout_s=0.6, max_bytes=1 << 41)
    assert 0.5 < time.monotonic() - started < 2
    assert (found.status, found.detail, found.is_transient) == ("timeout", "0.6 s passed", True)
    assert found.http_status == (None if "slow" in path else 200)


def test_a_body_that_comes_too_slowly_is_given_up(server: BadServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_RATE_SPAN_S", 1)
    urls = [server.url("/drip?rate"), server.url("/slow/1.5?rate")]  # 20 bytes/s; a head that is late
    slow, late = exchange_all(urls, timeout_s=20, min_bytes_per_s=100)
    assert (slow.status, slow.detail, late.status) == ("timeout", "less than 100 bytes/s over 1 s", "ok")
    assert 1 <= slow.seconds < 5
    assert exchange(urls[0], timeout_s=2.1, min_bytes_per_s=5).detail == "2.1 s passed"


def test_a_look_at_the_rate_that_comes_after_the_deadline_changes_nothing() -> None:
    async def run() -> Exchange:
        transfer_ = transfer.Transfer(Hold(ByteBudget(10)), 0.0, max_bytes=10, keep_cut=False, least_per_s=1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0) as transfer_.deadline:
                await asyncio.sleep(1)
        transfer_._sizes.extend([0] * 5)  # nothing has come for 5 s
        transfer_._look_at(Body(10))
        return transfer_.late()

    assert asyncio.run(run()).detail == "0 s passed"


def test_waiting_for_memory_is_not_charged(server: BadServer) -> None:
    async def run() -> Exchange:
        async with Client(replace(LIMITS, bytes_in_flight=len(JPEG))) as client:
            with Hold(client.budget) as first:
                assert (await client.exchange(parse_url(server.url("/ok")), 5, first)).data == JPEG
                second = asyncio.create_task(ask(client, server.url("/ok"), timeout_s=0.5))
                await asyncio.sleep(1)
                assert not second.done()
            return await second

    found = asyncio.run(run())
    assert (found.status, found.data) == ("ok", JPEG)
    assert found.seconds < 0.5


def test_bodies_of_unknown_length_share_little_memory_without_deadlock(server: BadServer) -> None:
    sizes = [n for n in (400_000, 900_000, 10_000) for _ in range(8)]
    urls = [server.url(f"/chunked/{size}?{n}") for n, size in enumerate(sizes)]
    found = exchange_all(urls, 20, bytes_in_flight=600_000)
    assert [(f.status, len(f.data or b"")) for f in found] == [("ok", size) for size in sizes]


def test_bodies_cost_no_more_memory_than_allowed() -> None:
    # In a process of its own, so that the peak is this client's. 12 bodies at once, of 24 MiB each once they are
    # decoded: without a bound 288 MiB; allowed are 16 MiB and one body, which may double while it grows.
    code = f"""
import asyncio, sys
sys.path[:0] = {[str(Path(__file__).parents[1] / "fixtures")]!r}
from server import BadServer
from mmdata.media.addresses import parse_url
from mmdata.media.body import Body
from mmdata.media.budget import ByteBudget, Hold
from mmdata.media.http import Client, HttpLimits
async def run(urls):
    async with Client(HttpLimits("t", allow_private=True, max_bytes=32 << 20, bytes_in_flight=16 << 20)) as client:
        async def one(url):
            with Hold(client.budget) as hold:
                found = await client.exchange(parse_url(url), 60, hold)
                await asyncio.sleep(0)
                return found.status
        return sorted(set(await asyncio.gather(*map(one, urls))))
with BadServer() as server:
    size = 24 << 20
    print(asyncio.run(run([server.url("/ok")])))
    urls = [server.url(f"/gzip/{{size}}?{{n}}") for n in range(12)]
    print(asyncio.run(run(urls[:1])))  # the server packs it once
    # Not ru_maxrss, which a child has from the process that started it.
    peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])
    before = peak()
    urls += [server.url(f"/endless?{{n}}") for n in range(4)] + [server.url("/huge"), server.url("/gzip/100000000")]
    print(asyncio.run(run(urls)))
    print((peak() - before) // 1024 < 120, (peak() - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout.split("\n")[:3] == ["['ok']", "['ok']", "['ok', 'too_large']"], done.stderr
    assert done.stdout.split("\n")[3].startswith("True"), done.stdout


def test_one_that_is_cancelled_leaves_nothing_behind(server: BadServer) -> None:
    async def run() -> None:
        async with Client(LIMITS) as client:
            for path in ("/slow/30", "/drip", "/endless"):
                task = asyncio.create_task(ask(client, server.url(path)))
                while not sockets(client):
                    await asyncio.sleep(0.001)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                await asyncio.sleep(0)
                assert sockets(client) == 0
                assert client.budget.free == client.budget.total

    asyncio.run(run())


def test_few_file_descriptors_cost_no_row() -> None:
    # 60 bodies at once, each held open for 0.3 s, and descriptors for about 25.
    code = f"""
import asyncio, resource, sys
sys.path[:0] = {[str(Path(__file__).parents[1] / "fixtures")]!r}
from mmdata.media.addresses import parse_url
from mmdata.media.body import Body
from mmdata.media.budget import ByteBudget, Hold
from mmdata.media.http import Client, HttpLimits
resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
async def run(urls):
    async with Client(HttpLimits("t", allow_private=True)) as client:
        async def one(url):
            with Hold(client.budget) as hold:
                return (await client.exchange(parse_url(url), 2, hold)).status
        return sorted(await asyncio.gather(*map(one, urls)))
print(asyncio.run(run(sys.argv[1:])).count("ok"))
"""
    with BadServer() as server:
        urls = [server.url(f"/slow/0.3?{n}") for n in range(60)]
        command = [sys.executable, "-c", code, *urls]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        assert done.stdout == "60\n"
        assert server.most_at_once < 32


def test_refused_connections_and_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        found = exchange(f"http://127.0.0.1:{free.getsockname()[1]}/")
    assert (found.status, found.is_transient, found.is_outage, found.sent) == ("connect", True, False, True)
    monkeypatch.setattr(resolver, "_cache", {})
    for code, is_transient in ((socket.EAI_AGAIN, True), (socket.EAI_NONAME, False)):
        error = socket.gaierror(code, "Name or service not known")
        monkeypatch.setattr(socket, "getaddrinfo", lambda *a, e=error, **k: (_ for _ in ()).throw(e))
        found = exchange("http://nowhere.example/", resolve={})
        assert (found.status, found.is_transient, found.is_outage) == ("dns", is_transient, is_transient)
        assert "not known" in str(found.detail)
