"""Which URL means which host, and whether that host may be asked: what stands between a list and our own network.

A URL is taken apart once and put together again from its parts, so that what is checked is what is connected to.
Every address is checked, also those a name resolves to (see `resolver`); the connection goes to a checked address,
never to a second look-up of the name.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from urllib.parse import quote, unquote, urlsplit

import idna
from yarl import URL

__all__ = ["AddressRefused", "BadUrl", "check_literal", "parse_url", "why_refused"]

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_MAX_URL = 65_536
# What most URLs look like: nothing in them to be quoted, lowered or reckoned out.
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_PLAIN = re.compile(
    rf"(https?://(?:(?=.{{1,253}}(?:[/:?#]|\Z))(?:[a-z0-9](?:[a-z0-9-]{{0,62}})?\.)+[a-z]{{2,63}}|{_BYTE}(?:\.{_BYTE}){{3}})"
    r"(?::(?:[1-9][0-9]{0,3}|[1-5][0-9]{4}))?)"
    r"(/[A-Za-z0-9_.~/%!$&'()*+,:;=@\[\]|-]*)?(\?[A-Za-z0-9_.~/%!$&'()*+,:;=@\[\]|?-]+)?(?:#[ -~]*)?"
)
_CONTROL = re.compile("[\x00-\x1f\x7f]")
_BROKEN = re.compile("[\ufffd\ud800-\udfff]")
_HOST_NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?")
_NUMBER = re.compile(r"0x[0-9a-f]*|[0-9]+")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# Cloud metadata services; the second stands on an address that is otherwise public.
_METADATA = frozenset(ipaddress.ip_address(a) for a in ("169.254.169.254", "168.63.129.16", "192.0.0.192"))
# Set aside by IANA, not known to the ipaddress module of every Python: protocol use, 6to4 relays, documentation.
_SET_ASIDE = tuple(ipaddress.ip_network(n) for n in ("192.0.0.0/24", "192.88.99.0/24", "100.64.0.0/10", "3fff::/20"))


class BadUrl(ValueError):
    """Not a URL that can be fetched; str() says why, without the URL."""


class AddressRefused(OSError):
    """Every address of the host is private, loopback, link-local, multicast, reserved or a metadata service."""


def parse_url(text: str | None) -> URL:
    """The URL as it goes on the wire: http or https, host in ASCII, path and query percent-encoded, no fragment.

    Escapes that are there stay as they are. IPv4 in decimal, octal, hexadecimal or short form becomes dotted, as in
    browsers (WHATWG URL, host parsing). Raises BadUrl.
    """
    if text is None or not (text := text.strip()):
        raise BadUrl("empty")
    if len(text) > _MAX_URL:
        raise BadUrl(f"longer than {_MAX_URL} characters")
    if (plain := _PLAIN.fullmatch(text)) is not None:
        return URL(f"{plain[1]}{plain[2] or '/'}{plain[3] or ''}", encoded=True)
    if _BROKEN.search(text):
        raise BadUrl("broken encoding")
    if _CONTROL.search(text):
        raise BadUrl("control character")
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise BadUrl(f"malformed: {error}"[:100]) from None
    if parts.scheme not in ("http", "https"):
        raise BadUrl(f"scheme {parts.scheme[:20]!r} is not http or https")
    if "\\" in parts.netloc:  # browsers take it for a slash, Python does not
        raise BadUrl("backslash before the path")
    if not host or port == 0:
        raise BadUrl("no host" if not host else "port 0")
    authority = _canonical_host(host) + (f":{port}" if port else "")
    if parts.username is not None:
        user = quote(unquote(parts.username), safe="")
        authority = f"{user}:{quote(unquote(parts.password or ''), safe='')}@{authority}"
    path = quote(parts.path, safe="/%!$&'()*+,:;=@[]|~") or "/"
    query = quote(parts.query, safe="/%!$&'()*+,:;=@[]|~?")
    return URL(f"{parts.scheme}://{authority}{path}" + (f"?{query}" if query else ""), encoded=True)


def _canonical_host(host: str) -> str:
    """An ASCII name, a dotted IPv4 address, or an IPv6 address in brackets."""
    if ":" in host:
        try:
            address = ipaddress.IPv6Address(host)
        except ValueError:
            raise BadUrl("malformed IPv6 address") from None
        if address.scope_id is not None:
            raise BadUrl("IPv6 address with a zone")
        return f"[{address}]"
    name = unquote(host)
    if not name.isascii():
        try:
            name = idna.encode(name, uts46=True).decode()
        except (idna.IDNAError, UnicodeError):
            raise BadUrl("host name is no international domain name") from None
    name = name.lower()
    if not _HOST_NAME.fullmatch(name) or len(name) > 254:
        raise BadUrl("malformed host name")
    last = name.rstrip(".").rsplit(".", 1)[-1]
    return _dotted(name.rstrip(".")) if _NUMBER.fullmatch(last) else name


def _dotted(name: str) -> str:
    """IPv4 of one to four decimal, octal or hexadecimal numbers, the last filling what is left (as inet_aton does)."""
    numbers = []
    for part in name.split("."):
        if not _NUMBER.fullmatch(part):
            raise BadUrl("malformed IPv4 address")
        base = 16 if part.startswith("0x") else 8 if part.startswith("0") and part != "0" else 10
        try:
            numbers.append(int(part[2:] or "0", 16) if base == 16 else int(part, base))
        except ValueError:
            raise BadUrl("malformed IPv4 address") from None
    last = numbers.pop()
    if len(numbers) > 3 or any(n > 255 for n in numbers) or last >= 256 ** (4 - len(numbers)):
        raise BadUrl("malformed IPv4 address")
    value = sum(n << 8 * (3 - place) for place, n in enumerate(numbers)) + last
    return str(ipaddress.IPv4Address(value))


@functools.lru_cache(4096)
def why_refused(address: str) -> str | None:
    """Why a connection to this IP address is refused: `loopback`, `private` … ; None when it is public.

    IPv4 inside IPv6 (mapped, 6to4, NAT64) is judged as that IPv4 address.
    """
    found: IPAddress = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour
        if inner is None and found in _NAT64:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None:
            return why_refused(str(inner))
        if found.is_site_local:
            return "private"
    if found in _METADATA:
        return "metadata service"
    if any(found in network for network in _SET_ASIDE):
        return "reserved"
    for kind in ("loopback", "link_local", "multicast", "unspecified", "reserved", "private"):
        if getattr(found, f"is_{kind}"):
            return kind.replace("_", "-")
    return None if found.is_global else "not public"


def check_literal(host: str) -> None:
    """Raise AddressRefused when `host` (as `parse_url` gives it, brackets or not) is an address that is refused."""
    host = host.strip("[]")
    if ":" not in host and not host[-1:].isdigit():
        return
    try:
        why = why_refused(host)
    except ValueError:
        return  # a name: its addresses are checked when it is resolved
    if why:
        raise AddressRefused(f"{host} is {why}")
