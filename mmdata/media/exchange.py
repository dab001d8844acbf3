"""What one HTTP exchange came to, and in which words: everything a server or a network does becomes a value here.

In: what was raised, or what an answer's headers say. Out: an `Exchange`. Nothing raises; words are short, printable and
never hold the URL, so that no user name or password of a list gets into a row or a log.
"""

from __future__ import annotations

import email.utils
import errno
import socket
import ssl
import time
from dataclasses import dataclass
from urllib.parse import urljoin

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

from mmdata.media.addresses import AddressRefused, BadUrl, parse_url

__all__ = [
    "Exchange",
    "explain",
    "is_short_of_sockets",
    "printable",
    "redirected",
    "retry_after_s",
    "say",
]

_LONGEST_WORDS = 200
# The process or the machine has no file descriptor, port or memory to spare: nobody's host is at fault.
_SHORT_OF_SOCKETS = frozenset({errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.ENOMEM})


@dataclass(slots=True)
class Exchange:
    """One request and what came of it.

    `status` is one of mmdata.columns.STATUSES, or `redirect`: then `location` says where to (http or https, its address
    not yet checked). `data` is the body when it is `ok`. `detail`: a few words on a status other than ok, without the
    URL. `http_status`, `content_type`: None when no answer's headers arrived. `pause_s`: what Retry-After asks for, not
    negative; None = nothing. `is_transient`: another attempt may end otherwise. `is_outage`: so would it end without
    any network. `sent`: False when not even a look-up was made. `seconds`: wall time, without waits for memory.
    """

    status: str
    detail: str | None = None
    data: bytes | None = None
    http_status: int | None = None
    location: URL | None = None
    content_type: str | None = None
    pause_s: float | None = None
    is_transient: bool = False
    is_outage: bool = False
    sent: bool = True
    seconds: float = 0.0


def explain(error: BaseException) -> Exchange:
    """The Exchange that ended in this exception."""
    cause = _cause(error)
    if isinstance(cause, AddressRefused):
        return Exchange("refused_address", say(cause))
    if isinstance(cause, socket.gaierror):
        again = cause.errno == socket.EAI_AGAIN
        return Exchange("dns", say(cause), is_transient=again, is_outage=again)
    if isinstance(error, aiohttp.ClientSSLError) or isinstance(cause, ssl.SSLError | ssl.CertificateError):
        return Exchange("tls", say(getattr(error, "certificate_error", None) or cause))
    if isinstance(error, aiohttp.ClientResponseError | HttpProcessingError):
        return Exchange("connect", f"malformed answer: {say(error.message)}"[:_LONGEST_WORDS])
    if isinstance(error, TimeoutError):  # of the operating system: ETIMEDOUT
        return Exchange("timeout", say(error), is_transient=True)
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return Exchange("connect", "the connection was closed", is_transient=True)
    if isinstance(error, aiohttp.ClientPayloadError):
        return Exchange("connect", "the answer was cut short", is_transient=True)
    if not isinstance(cause, OSError):  # its words may hold anything
        return Exchange("connect", type(error).__name__)
    return Exchange("connect", say(cause), is_transient=True, is_outage=cause.errno == errno.ENETUNREACH)


def _cause(error: BaseException) -> BaseException:
    """What the operating system, TLS or the resolver said, where aiohttp wraps it."""
    return getattr(error, "os_error", None) or error


def is_short_of_sockets(error: BaseException) -> bool:
    """Whether we, not the host, had nothing left to connect with."""
    cause = _cause(error)
    return isinstance(cause, OSError) and cause.errno in _SHORT_OF_SOCKETS


def redirected(url: URL, location: str) -> URL | str:
    """Where a Location header leads from `url`; words when that is no http or https URL."""
    try:
        return parse_url(urljoin(str(url), _escaped(location)))
    except BadUrl as error:
        return f"redirect: {error}"[:_LONGEST_WORDS]
    except ValueError as error:
        return f"redirect: malformed: {error}"[:_LONGEST_WORDS]


def retry_after_s(value: str | None) -> float | None:
    """Seconds from a Retry-After header (a number or an HTTP date); None where there is none to be understood."""
    if value is None:
        return None
    value = value.strip()
    if value.isascii() and value.isdecimal():
        return float(value[:18])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def say(error: object) -> str:
    """The words of an error, short and printable; its class when it has none."""
    return printable(str(error)) or type(error).__name__


def printable(text: str | None) -> str | None:
    """At most 200 characters of a foreign text, with spaces for what cannot be printed."""
    if text is None:
        return None
    text = text[:_LONGEST_WORDS]
    if not (text.isascii() and text.isprintable()):
        text = text.encode("utf-8", "replace").decode()
        text = "".join(c if c.isprintable() else " " for c in text)
    return text.strip()


def _escaped(location: str) -> str:
    """A Location header with its non-ASCII bytes percent-encoded, whatever encoding they are in."""
    if location.isascii():
        return location
    raw = location.encode("utf-8", "surrogateescape")
    return "".join(chr(b) if b < 0x80 else f"%{b:02X}" for b in raw)
