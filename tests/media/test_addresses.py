"""What a URL means and which addresses are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
