"""The HTTP client against a server that misbehaves: every URL costs one value, bounded in time and bytes."""

from __future__ import annotations

import asyncio
import email.utils
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from server import JPEG, BadServer

from mmdata.errors import RetryableError
from mmdata.media import addresses, resolver
from mmdata.media.http import Client, Fetched, HttpLimits

LIMITS = HttpLimits(user_agent="mmdata/test (+https://example.org/crawl)", timeout_s=5, allow_private=True)


@pytest.fixture(scope="module")
def server() -> Iterator[BadServer]:
    with BadServer() as running:
        yield running


def fetch_all(urls: list[str | None], **changes: Any) -> list[Fetched]:
    async def run() -> list[Fetched]:
        async def one(url: str | None) -> Fetched:
            async with client.fetching(url) as fetched:
                return fetched

        async with Client(replace(LIMITS, **changes)) as client:
            return list(await asyncio.gather(*map(one, urls)))

    return asyncio.run(run())


def fetch(url: str | None, **changes: Any) -> Fetched:
    return fetch_all([url], **changes)[0]


def test_a_picture_and_what_is_sent_for_it(server: BadServer) -> None:
    found = fetch(server.url("/ok"))
    assert (found.status, found.data, found.http_status, found.attempts) == ("ok", JPEG, 200, 1)
    assert (found.content_type, found.final_url, found.detail) == ("image/jpeg", None, None)
    assert found.fetch_ms is not None
    assert found.fetch_ms > 0
    assert server.headers["User-Agent"] == LIMITS.user_agent
    assert server.headers["Accept-Encoding"] == "identity"
    assert not {"Cookie", "Referer", "Authorization"} & server.headers.keys()


ANSWERS = [
    ("/status/404", "http_4xx", "HTTP 404", 404),
    ("/status/410", "http_4xx", "HTTP 410", 410),
    ("/status/304", "http_4xx", "HTTP 304", 304),
    ("/status/429", "http_429", "HTTP 429", 429),
    ("/status/500", "http_5xx", "HTTP 500", 500),
    ("/status/503", "http_5xx", "HTTP 503", 503),
    ("/hop/6", "too_many_redirects", "more than 5", 301),
    ("/to//nowhere", "http_4xx", "HTTP 404", 404),
    ("/reset", "connect", None, None),
    ("/short", "connect", None, 200),
    ("/raw", "connect", None, None),
    ("/huge", "too_large", "more than 1000000 bytes", 200),
    ("/endless", "too_large", "more than 1000000 bytes", 200),
    ("/gzip/100000000", "too_large", "more than 1000000 bytes", 200),
    ("/to/file:///etc/passwd", "bad_url", "redirect: scheme 'file' is not http or https", 302),
    ("/to/ftp://a.test/", "bad_url", "redirect: scheme 'ftp' is not http or https", 302),
    ("/to/http://[", "bad_url", None, 302),
]


@pytest.mark.parametrize(("path", "status", "detail", "code"), ANSWERS)
def test_what_a_server_does_becomes_a_status(
    server: BadServer, path: str, status: str, detail: str | None, code: int | None
) -> None:
    found = fetch(server.url(path), max_bytes=1_000_000)
    assert (found.status, found.http_status, found.data, found.attempts) == (status, code, None, 1)
    assert found.detail == detail or (detail is None and found.detail)
    assert len(found.detail or "") <= 200


@pytest.mark.parametrize(
    "url", [None, "", "nonsense", "ftp://127.0.0.1/", "file:///etc/passwd", "data:,x", "http://\ufffd/"]
)
def test_bad_urls_send_nothing(url: str | None) -> None:
    found = fetch(url)
    assert (found.status, found.attempts, found.fetch_ms, found.http_status) == ("bad_url", 0, None, None)
    assert found.detail


def test_redirects_are_followed_and_told(server: BadServer) -> None:
    found = fetch(server.url("/hop/5"))
    assert (found.status, found.final_url, found.attempts) == ("ok", server.url("/hop/0"), 1)
    away = fetch(server.url("/to/" + server.url("/ok", host="me:secret@127.0.0.1")))
    assert (away.status, away.final_url) == ("ok", server.url("/ok"))
    assert fetch(server.url("/hop/1"), max_redirects=0).status == "too_many_redirects"


def test_unicode_paths_arrive_percent_encoded(server: BadServer) -> None:
    assert fetch(server.url("/ok/☃ ü,%2F?q=é")).status == "ok"
    assert server.hits["/ok/%E2%98%83%20%C3%BC,%2F?q=%C3%A9"] == 1


def test_gzip_that_nobody_asked_for_is_undone(server: BadServer) -> None:
    assert fetch(server.url("/gzip/")).data == JPEG


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "0177.0.0.1", "127.1", "[::ffff:127.0.0.1]"]
)
def test_loopback_is_refused_in_every_spelling(server: BadServer, host: str) -> None:
    before = sum(server.hits.values())
    found = fetch(server.url("/ok", host=host), allow_private=False)
    assert (found.status, found.http_status, found.data) == ("refused_address", None, None)
    assert sum(server.hits.values()) == before


def test_a_redirect_to_a_private_address_is_refused(server: BadServer, monkeypatch: pytest.MonkeyPatch) -> None:
    # Stand-in for a public server: this one test says that 127.0.0.1 is public; every other address is judged as it is.
    real = addresses.why_refused
    monkeypatch.setattr(addresses, "why_refused", lambda a: None if a == "127.0.0.1" else real(a))
    for target in ("http://127.0.0.2/", "http://169.254.169.254/latest/", "http://10.0.0.1/", "http://[::1]/"):
        found = fetch(server.url(f"/to/{target}"), allow_private=False)
        assert (found.status, found.http_status) == ("refused_address", 302)
    assert fetch(server.url("/to//ok"), allow_private=False).status == "ok"


def test_only_what_may_pass_is_tried_again(server: BadServer) -> None:
    found = fetch_all(
        [server.url(p) for p in ("/flaky/500/1", "/flaky/404/1", "/status/503", "/reset/again")], retries=2
    )
    assert [(f.status, f.attempts) for f in found] == [("ok", 2), ("http_4xx", 1), ("http_5xx", 3), ("connect", 3)]
    assert server.hits["/status/503"] == 3 + 1  # one of another test
    assert server.hits["/flaky/404/1"] == 1


def test_retry_after_is_kept_and_not_waited_for_beyond_the_deadline(server: BadServer) -> None:
    started = time.monotonic()
    assert (fetch(server.url("/busy/1"), retries=1).status, fetch(server.url("/busy/999"), retries=1).status) == (
        "ok",
        "http_429",
    )
    assert 1 <= time.monotonic() - started < 4
    later = email.utils.format_datetime(email.utils.localtime())
    assert fetch(server.url(f"/busy/{later}"), retries=1).attempts == 2


@pytest.mark.parametrize("path", ["/slow/30", "/drip", "/flaky/500/99"])
def test_one_deadline_holds_over_attempts_pauses_and_the_body(server: BadServer, path: str) -> None:
    started = time.monotonic()
    found = fetch(server.url(path), timeout_s=0.8, retries=20)
    assert time.monotonic() - started < 3
    assert found.status == ("http_5xx" if "flaky" in path else "timeout")
    if found.status == "timeout":
        assert found.detail == "0.8 s passed"


def test_the_turn_of_a_host_is_not_charged_to_the_deadline(server: BadServer) -> None:
    server.most_at_once = 0
    found = fetch_all([server.url(f"/slow/0.4?{n}") for n in range(12)], per_host=3, timeout_s=1)
    assert {f.status for f in found} == {"ok"}
    assert server.most_at_once == 3


def test_bodies_of_unknown_length_share_little_memory_without_deadlock(server: BadServer) -> None:
    sizes = [n for n in (400_000, 900_000, 10_000) for _ in range(8)]
    urls: list[str | None] = [server.url(f"/chunked/{size}?{n}") for n, size in enumerate(sizes)]
    found = fetch_all(urls, bytes_in_flight=600_000, timeout_s=20)
    assert [(f.status, len(f.data or b"")) for f in found] == [("ok", size) for size in sizes]


def test_an_endless_body_costs_little_memory() -> None:
    # In a process of its own, so that the peak is this fetch's.
    code = f"""
import asyncio, sys
sys.path[:0] = {[str(Path(__file__).parents[1] / "fixtures")]!r}
from server import BadServer
from mmdata.media.http import Client, HttpLimits
async def run(urls):
    async with Client(HttpLimits("t", timeout_s=20, allow_private=True, max_bytes=4 << 20)) as client:
        async def one(url):
            async with client.fetching(url) as found:
                return found.status
        return set(await asyncio.gather(*map(one, urls)))
with BadServer() as server:
    asyncio.run(run([server.url("/ok")]))
    # Not ru_maxrss, which a child has from the process that started it.
    peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])
    before = peak()
    print(asyncio.run(run([server.url("/endless"), server.url("/huge"), server.url("/gzip/300000000")])))
    print((peak() - before) // 1024 < 120)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    assert done.stdout.split("\n")[:2] == ["{'too_large'}", "True"]


def test_refused_connections_and_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert fetch(f"http://127.0.0.1:{port}/").status == "connect"
    monkeypatch.setattr(resolver, "_cache", {})
    unknown = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: (_ for _ in ()).throw(unknown))
    found = fetch("http://nowhere.test/", retries=3)
    assert (found.status, found.attempts) == ("dns", 1)
    assert "not known" in str(found.detail)


def test_without_any_dns_the_run_stops_at_once(server: BadServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "_cache", {})
    down = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: (_ for _ in ()).throw(down))
    urls: list[str | None] = [f"http://host{n}.test/" for n in range(40)]
    with pytest.raises(RetryableError, match="no DNS"):
        fetch_all(urls)
    assert {f.status for f in fetch_all(urls[:19] * 3)} == {"dns"}
    found = fetch_all([server.url("/ok"), *["http://one.test/"] * 50])
    assert [f.status for f in found] == ["ok"] + ["dns"] * 50


def test_tls_is_verified(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        [
            *"openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost".split(),
            "-keyout",
            key,
            "-out",
            certificate,
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with BadServer(tls=context) as server:
        found = fetch(server.url("/ok", host="localhost"))
        assert server.hits == {}
        plain = fetch(server.url("/ok").replace("https", "http"))
    assert (found.status, found.attempts) == ("tls", 1)
    assert "certificate" in str(found.detail).lower()
    assert plain.status == "connect"
