"""One connection: an answer is the same however it is cut on its way, and as Python's own client reads it."""

from __future__ import annotations

import http.client
import io
import itertools
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from mmdata.media.exchange import BrokenAnswer, LostConnection
from mmdata.media.wire import BUFFER_BYTES, Connection, Headers

MOST = 4096


class Wire:
    """A transport that keeps what is done to it; what a server says is said by the test."""

    def __init__(self) -> None:
        self.written = b""
        self.is_aborted = False

    def write(self, data: bytes) -> None:
        self.written += data

    def abort(self) -> None:
        self.is_aborted = True


class Listener:
    """A reader that wants everything, or no bodies."""

    def __init__(self, wants_body: bool = True) -> None:
        self.status: int | None = None
        self.headers: Headers = []
        self.data = b""
        self.ends: list[Exception | None] = []
        self._wants_body = wants_body

    def head(self, status: int, headers: Headers) -> bool:
        assert self.status is None
        self.status, self.headers = status, headers
        return self._wants_body

    def body(self, chunk: bytes) -> bool:
        assert not self.ends
        self.data += chunk
        return True

    def end(self, error: Exception | None) -> None:
        self.ends.append(error)


def connected() -> tuple[Connection, Wire]:
    wire = Wire()
    connection = Connection(memoryview(bytearray(BUFFER_BYTES)), MOST, lambda _: None)
    connection.connection_made(cast(Any, wire))
    return connection, wire


def say(connection: Connection, data: bytes) -> None:
    for start in range(0, len(data), BUFFER_BYTES):
        part = data[start : start + BUFFER_BYTES]
        connection.get_buffer(-1)[: len(part)] = part
        connection.buffer_updated(len(part))


def heard(data: bytes, cuts: list[int], closes: bool = False, wants_body: bool = True) -> tuple[Listener, Connection]:
    connection, wire = connected()
    listener = Listener(wants_body)
    connection.ask(b"GET / HTTP/1.1\r\n\r\n", listener)
    assert wire.written == b"GET / HTTP/1.1\r\n\r\n"
    edges = [0, *sorted({c % (len(data) + 1) for c in cuts}), len(data)]
    for start, end in itertools.pairwise(edges):
        if end > start and not listener.ends:
            say(connection, data[start:end])
    if closes and not listener.ends:
        connection.eof_received()
    assert len(listener.ends) <= 1
    assert wire.is_aborted == (bool(listener.ends) and not connection.is_reusable)
    return listener, connection


def chunked(data: bytes, sizes: list[int]) -> bytes:
    said, place = b"", 0
    for size in sizes:
        if piece := data[place : place + size]:
            said += f"{len(piece):x}\r\n".encode() + piece + b"\r\n"
        place += size
    rest = data[place:]
    return said + (f"{len(rest):X};x=y\r\n".encode() + rest + b"\r\n" if rest else b"") + b"0\r\nX-Sum: 1\r\n\r\n"


@st.composite
def answers(draw: st.DrawFn) -> tuple[bytes, bool]:
    """An answer in good order, and whether its end is the connection's."""
    data = draw(st.binary(max_size=300))
    interim = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * draw(st.integers(0, 2))
    status = draw(st.sampled_from([200, 206, 301, 404, 429, 503, 204, 304]))
    version = draw(st.sampled_from(["1.0", "1.1"]))
    lines = draw(st.lists(st.sampled_from([b"X-A: 1", b"x-b:2", b"X-A:  b c ", b"Set-Cookie: a=b"]), max_size=4))
    kind = draw(st.sampled_from(["length", "chunks", "close"])) if status not in (204, 304) else "none"
    if version == "1.0" and kind == "chunks":
        kind = "length"
    if kind == "length":
        lines.append(f"Content-Length: {len(data)}".encode())
    if kind == "chunks":
        lines.append(b"Transfer-Encoding: chunked")
    head = b"\r\n".join([f"HTTP/{version} {status} Some words".encode(), *lines, b"", b""])
    sizes = draw(st.lists(st.integers(1, 50), max_size=5))
    body = {"length": data, "close": data, "chunks": chunked(data, sizes), "none": b""}[kind]
    return interim * (version == "1.1") + head + body, kind == "close"


class _Said:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, *_: Any) -> io.BytesIO:
        return io.BytesIO(self._data)


@given(answers(), st.lists(st.integers(0), max_size=6))
def test_an_answer_is_read_as_pythons_own_client_reads_it(answer: tuple[bytes, bool], cuts: list[int]) -> None:
    said, closes = answer
    final = said[said.rindex(b"HTTP/1.") :] if b"HTTP/1.1 103" in said else said  # it knows no 103
    expected = http.client.HTTPResponse(cast(Any, _Said(final)), method="GET")
    expected.begin()
    listener, connection = heard(said, cuts, closes)
    assert listener.ends == [None]
    assert listener.status == expected.status
    ours = [(n.decode().lower(), v.decode().strip()) for n, v in listener.headers]
    assert ours == [(n.lower(), v.strip()) for n, v in expected.getheaders()]
    assert listener.data == expected.read()
    assert connection.is_reusable == (not expected.will_close)


@given(answers(), st.integers(0), st.lists(st.integers(0), max_size=3))
def test_one_cut_short_is_told(answer: tuple[bytes, bool], place: int, cuts: list[int]) -> None:
    said, ends_by_close = answer
    listener, connection = heard(said[: place % len(said)], cuts, closes=True)
    assert not connection.is_reusable
    if listener.status is None or not ends_by_close:
        assert [type(e) for e in listener.ends] == [LostConnection]


@given(st.binary(max_size=400), st.lists(st.integers(0), max_size=3))
def test_any_bytes_end_it_once_and_never_raise(data: bytes, cuts: list[int]) -> None:
    for said in (data, b"HTTP/1.1 200 OK\r\n" + data, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + data):
        listener, _ = heard(said, cuts, closes=True)
        assert len(listener.ends) == 1


def test_headers_are_bounded_together() -> None:
    head = b"HTTP/1.1 200 OK\r\n"
    for said in (
        head + b"X-A: b\r\n" * 2000,
        head + b"X-A: " + b"b" * MOST + b"\r\n\r\n",
        b"HTTP/1.1 200 " + b"b" * 2 * MOST,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 400,
        head + b"Transfer-Encoding: chunked\r\n\r\n5;" + b"x" * 2 * MOST,
        head + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n" + b"X-A: bbbbbbbb\r\n" * 20_000,
    ):
        for cuts in ([], list(range(0, len(said), 20_000))):
            listener, _ = heard(said, cuts)
            assert [(type(e), str(e)) for e in listener.ends] == [
                (BrokenAnswer, f"more than {MOST} bytes of headers")
            ], said[:60]
    fits = head + b"X-A: " + b"b" * (MOST - 60) + b"\r\nContent-Length: 0\r\n\r\n"
    assert heard(fits, [])[0].ends == [None]


def test_chunks_of_a_few_bytes_are_refused_and_a_few_of_them_not() -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    listener, _ = heard(head + b"1\r\nx\r\n" * 50_000, [])
    assert [str(e) for e in listener.ends] == ["chunks of a few bytes each"]
    assert heard(head + b"1\r\nx\r\n" * 5000 + b"0\r\n\r\n", [])[0].ends == [None]


def test_a_body_nobody_wants_is_not_waited_for() -> None:
    head = b"HTTP/1.1 404 Not Found\r\nContent-Length: 9\r\n\r\n"
    listener, connection = heard(head + b"not here!", [], wants_body=False)
    assert (listener.ends, listener.data, connection.is_reusable) == ([None], b"", True)  # it was there already
    listener, connection = heard(head + b"not", [], wants_body=False)
    assert (listener.ends, listener.data, connection.is_reusable) == ([None], b"", False)


def test_what_comes_unasked_ends_the_connection() -> None:
    good = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx"
    listener, connection = heard(good + good, [])
    assert (listener.ends, listener.data, connection.is_reusable) == ([None], b"x", False)
    listener, connection = heard(good, [])
    assert connection.is_reusable
    say(connection, good)
    assert not connection.is_reusable
    assert cast(Any, connection.transport).is_aborted
    assert listener.data == b"x"
