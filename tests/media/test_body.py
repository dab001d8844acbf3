"""Bodies of any coding, cut anywhere, gathered in bounded memory."""

from __future__ import annotations

import gzip
import itertools
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmdata.media.body import Body, BodyRefused

CODINGS = {
    None: bytes,
    "identity": bytes,
    "gzip": gzip.compress,
    "X-GZip": gzip.compress,
    "deflate": zlib.compress,
    "Deflate ": lambda data: zlib.compress(data, wbits=-15),
}
DATA = st.binary(max_size=3000) | st.integers(0, 200_000).map(bytes)


def gather(packed: bytes, coding: str | None, limit: int, cuts: list[int], keep_cut: bool = False) -> bytes:
    """As a transfer does it, with room for 1,000 bytes more each time."""
    body = Body(limit, coding, keep_cut)
    edges = [0, *sorted({c % (len(packed) + 1) for c in cuts}), len(packed)]
    for start, end in itertools.pairwise(edges):
        body.feed(packed[start:end])
        while body.is_short:
            assert body.held <= body.room + (end - start)
            body.room += 1000
            body.proceed()
    return body.finish()


@given(DATA, st.sampled_from(sorted(CODINGS, key=str)), st.lists(st.integers(0), max_size=5))
def test_a_body_is_what_was_sent(data: bytes, coding: str | None, cuts: list[int]) -> None:
    packed = CODINGS[coding](data)
    most = max(len(data), len(packed))
    assert gather(packed, coding, most, cuts) == data
    assert gather(packed, coding, most + 1, cuts) == data


@given(st.integers(1, 100_000), st.sampled_from(sorted(CODINGS, key=str)), st.lists(st.integers(0), max_size=3))
def test_the_limit_is_exact(size: int, coding: str | None, cuts: list[int]) -> None:
    data = bytes(n % 251 for n in range(size))
    packed = CODINGS[coding](data)
    with pytest.raises(BodyRefused) as refused:
        gather(packed, coding, size - 1, cuts)
    outcome = refused.value.outcome
    assert (outcome.status, outcome.detail, outcome.data) == ("too_large", f"more than {size - 1} bytes", None)
    with pytest.raises(BodyRefused) as refused:
        gather(packed, coding, size - 1, cuts, keep_cut=True)
    assert refused.value.outcome.data == data[: size - 1]


@given(st.binary(min_size=1, max_size=2000), st.sampled_from(["gzip", "deflate"]), st.integers(0, 10_000))
def test_what_is_cut_or_broken_is_told(data: bytes, coding: str, place: int) -> None:
    packed = CODINGS[coding](data)
    with pytest.raises(BodyRefused) as refused:
        gather(packed[: 1 + place % (len(packed) - 1)], coding, 10_000, [])
    assert (refused.value.outcome.status, refused.value.outcome.is_transient) == ("connect", True)


def test_what_nobody_asked_for() -> None:
    for coding in ("br", "zstd", "gzip, gzip", "compress", "\x1b[31m" * 99):
        with pytest.raises(BodyRefused) as refused:
            Body(100, coding)
        assert refused.value.outcome.status == "not_media"
        assert (refused.value.outcome.detail or "").isprintable()
        assert len(refused.value.outcome.detail or "") <= 200
    with pytest.raises(BodyRefused) as refused:
        gather(b"no gzip at all", "gzip", 100, [])
    assert refused.value.outcome.status == "decode"


def test_what_follows_the_end_is_not_hoarded() -> None:
    body = Body(1 << 20, "gzip")
    body.room = 1 << 20
    body.feed(gzip.compress(b"whole"))
    for _ in range(15):
        body.feed(bytes(65_536))
    assert body.finish() == b"whole"
    assert body._decoder is not None
    assert len(getattr(body._decoder, "unused_data", b"")) <= 65_536
    with pytest.raises(BodyRefused):
        body.feed(bytes(65_536))


def test_no_body_is_an_empty_one() -> None:
    for coding in CODINGS:
        assert Body(10, coding).finish() == b""
