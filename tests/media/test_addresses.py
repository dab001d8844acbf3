"""What a URL means and which addresses are refused."""

from __future__ import annotations

import ipaddress
import re
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmdata.media import addresses
from mmdata.media.addresses import AddressRefused, BadUrl, check_literal, parse_url, why_refused

URLS = {
    "http://a.test/x.jpg": "http://a.test/x.jpg",
    "  HTTPS://A.Test:8443/x#fragment ": "https://a.test:8443/x",
    "http://a.test": "http://a.test/",
    "http://a.test/ü b/☃.jpg?q=é&x=a b": "http://a.test/%C3%BC%20b/%E2%98%83.jpg?q=%C3%A9&x=a%20b",
    "http://a.test/%7Ex%2Fy?s=%2B+1": "http://a.test/%7Ex%2Fy?s=%2B+1",
    "http://a.test/a,b;c=d'(e)": "http://a.test/a,b;c=d'(e)",
    'http://a.test/"<x>"': "http://a.test/%22%3Cx%3E%22",
    "http://bücher.example/": "http://xn--bcher-kva.example/",
    "http://my_bucket.s3.example/": "http://my_bucket.s3.example/",
    "http://2130706433/": "http://127.0.0.1/",
    "http://0x7f.1/": "http://127.0.0.1/",
    "http://0177.0.0.01/": "http://127.0.0.1/",
    "http://１２７.0.0.1/": "http://127.0.0.1/",
    "http://127.1/": "http://127.0.0.1/",
    "http://[::1]:8080/x": "http://[::1]:8080/x",
    "http://user:p%40ss@a.test/": "http://user:p%40ss@a.test/",
    "http://a.test\\@127.0.0.1/": None,
    "//a.test/x.jpg": None,
    "a.test/x.jpg": None,
    "ftp://a.test/x": None,
    "file:///etc/passwd": None,
    "data:image/png;base64,AAAA": None,
    "javascript:alert(1)": None,
    "http://": None,
    "http:///x": None,
    "http://a b/": None,
    "http://a..test/": None,
    "http://a.test:99999/": None,
    "http://a.test:0/": None,
    "http://a.test:x/": None,
    "http://256.1.1.1/": None,
    "http://1.2.3.4.5/": None,
    "http://a.0x7f/": None,
    "http://0999.0.0.1/": None,
    "http://[::1/": None,
    "http://[fe80::1%25eth0]/": None,
    "http://a.test/\ufffd.jpg": None,
    "http://a.test/\x00": None,
    "http://a.test/x\r\nHost: b": None,
    "http://a.test/" + "x" * 70_000: None,
    "": None,
    "   ": None,
    None: None,
}


@pytest.mark.parametrize("text", URLS, ids=lambda t: str(t)[:40])
def test_urls_as_they_go_on_the_wire(text: str | None) -> None:
    expected = URLS[text]
    if expected is None:
        with pytest.raises(BadUrl):
            parse_url(text)
    else:
        assert str(parse_url(text)) == expected


@given(st.text(max_size=60))
def test_any_text_is_a_url_or_a_bad_one(text: str) -> None:
    for candidate in (text, f"http://{text}", f"http://a.test/{text}"):
        try:
            url = parse_url(candidate)
        except BadUrl:
            continue
        assert url.scheme in ("http", "https")
        assert str(url).isascii()
        assert str(parse_url(str(url))) == str(url)


REFUSED = (
    "127.0.0.1 127.255.255.254 10.0.0.1 172.16.0.1 192.168.1.1 169.254.169.254 169.254.0.1 0.0.0.0 "
    "100.64.0.1 100.100.100.200 192.0.0.192 168.63.129.16 192.0.2.1 198.18.0.1 224.0.0.1 240.0.0.1 "
    "255.255.255.255 ::1 :: fe80::1 fc00::1 fd00:ec2::254 fec0::1 ff02::1 2001:db8::1 ::ffff:127.0.0.1 "
    "::ffff:10.0.0.1 64:ff9b::7f00:1 64:ff9b::a00:1 2002:7f00:1:: ::7f00:1 3fff::1 "
).split()
PUBLIC = [
    "8.8.8.8",
    "93.184.216.34",
    "172.15.0.1",
    "172.32.0.1",
    "2606:4700::1111",
    "::ffff:8.8.8.8",
    "64:ff9b::808:808",
]


@pytest.mark.parametrize("address", REFUSED)
def test_addresses_inside_our_network_are_refused(address: str) -> None:
    assert why_refused(address)
    for host in (address, f"[{address}]"):
        with pytest.raises(AddressRefused):
            check_literal(host)


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_not(address: str) -> None:
    assert why_refused(address) is None
    check_literal(address)


def test_names_are_not_literals() -> None:
    check_literal("localhost")  # its addresses are judged when it is resolved


def _number(value: int, base: int) -> str:
    return {8: f"0{value:o}", 10: str(value), 16: f"0x{value:x}"}[base]


@st.composite
def spellings(draw: st.DrawFn) -> str:
    """An IPv4 address in one to four numbers of any base, as the C library reads it."""
    value = draw(st.integers(0, 2**32 - 1) | st.integers(0x7F000000, 0x7FFFFFFF))
    count = draw(st.integers(1, 4))
    numbers = [value >> 8 * (3 - place) & 255 for place in range(count - 1)]
    numbers.append(value & (256 ** (5 - count) - 1))
    return ".".join(_number(n, draw(st.sampled_from((8, 10, 16)))) for n in numbers)


WRITTEN = {
    "as it is": str,
    "capitals": str.upper,
    "trailing dot": lambda text: text + ".",
    "percent-encoded": lambda text: "".join(f"%{ord(c):02x}" for c in text),
    "full width": lambda text: "".join(chr(ord(c) + 0xFEE0) if c.isdigit() else c for c in text),
    "full-width dots": lambda text: text.replace(".", "\u3002"),
}


@given(spellings(), st.sampled_from(sorted(WRITTEN)))
def test_ipv4_is_read_as_the_c_library_reads_it(text: str, form: str) -> None:
    expected = socket.inet_ntoa(socket.inet_aton(text))
    url = parse_url(f"http://{WRITTEN[form](text)}:8080/x")
    assert url.raw_host == expected
    assert _is_refused(url.raw_host) == _is_refused(expected) == bool(why_refused(expected))


@given(st.integers(0, 2**32 - 1) | st.sampled_from([0x7F000001, 0x0A000001, 0xA9FEA9FE, 0xC0A80101, 0x08080808]))
def test_ipv4_inside_ipv6_is_judged_as_itself(value: int) -> None:
    inner = bool(why_refused(str(ipaddress.IPv4Address(value))))
    high, low = value >> 16, value & 0xFFFF
    dotted = ipaddress.IPv4Address(value)
    for text in (f"::ffff:{dotted}", f"::ffff:{high:x}:{low:x}", f"64:ff9b::{dotted}", f"2002:{high:x}:{low:x}::1"):
        host = parse_url(f"http://[{text}]/").raw_host
        assert _is_refused(str(host)) == inner, text
    # Teredo, NAT64 of one's own network, IPv4-compatible: nothing public is to be had there.
    for text in (f"2001:0:4136:e378:8000:63bf:{high:x}:{low:x}", f"64:ff9b:1::{dotted}", f"::{dotted}"):
        assert why_refused(text), text


def _is_refused(host: str) -> bool:
    try:
        check_literal(host)
    except AddressRefused:
        return True
    return False


_PARTS = st.text("abcxyz019-._~%/?&=+:@!$'()*,;[]|#A", max_size=30)


@given(
    st.sampled_from(["http", "https"]),
    st.text("ab0-.x", max_size=12),
    _PARTS,
    st.sampled_from(["", ":80", ":0", ":65536"]),
)
def test_the_quick_way_and_the_long_way_agree(scheme: str, host: str, rest: str, port: str) -> None:
    for text in (f"{scheme}://{host}.test{port}/{rest}", f"{scheme}://{host}{port}{rest}", f"{scheme}://{rest}"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(addresses, "_PLAIN", re.compile("(?!)"))
            expected = _parsed(text)
        assert _parsed(text) == expected


def _parsed(text: str) -> str | None:
    try:
        return str(parse_url(text))
    except BadUrl:
        return None
