"""Whether the headers of an answer say that its body is not to be used: X-Robots-Tag and TDM-Reservation.

In: the header values as received, who asks, which directives count. Out: a few words on why not, or None. Nothing
raises: what cannot be understood does not count.
"""

from __future__ import annotations

import email.utils
import re
from collections.abc import Collection, Iterator, Sequence
from datetime import UTC, datetime

__all__ = ["opted_out", "product_token"]

# The directives in use, so that a name before a colon is told from an agent; those with a value have one after a colon.
_VALUED = frozenset(["max-snippet", "max-image-preview", "max-video-preview", "unavailable_after"])
_DIRECTIVES = _VALUED | frozenset(
    "all none noindex nofollow noarchive nocache nosnippet notranslate noimageindex noodp noydir noai noimageai noml "
    "indexifembedded nositelinkssearchbox nopagereadaloud noaccess".split()
)
_NAMED = re.compile(r"([^\s:,]+)\s*:\s*(.*)", re.S)
_WEEKDAY = re.compile(r"(mon|tue|wed|thu|fri|sat|sun)[a-z]*", re.I)
_MEANS = {"none": ("none", "noindex", "nofollow")}
_TOKEN = re.compile(r"[^\s/();,]+")
_COMPATIBLE = re.compile(r"\(compatible;\s*([^\s/();,]+)", re.I)


def product_token(user_agent: str | None) -> str:
    """The name by which robots.txt and X-Robots-Tag speak to us, in lower case: `mmdata` of `mmdata/0.1 (+https://…)`.

    Of a User-Agent that begins with Mozilla it is the name after `(compatible;`, where there is one, as crawlers write
    it. None or nothing legible = `mmdata`.
    """
    text = user_agent or ""
    found = _TOKEN.search(text)
    if found is not None and found[0].lower() == "mozilla" and (named := _COMPATIBLE.search(text)) is not None:
        return named[1].lower()
    return found[0].lower() if found is not None else "mmdata"


def opted_out(
    robots_tags: Sequence[str],
    tdm: str | None,
    agent: str,
    directives: Collection[str],
    respect_tdm: bool,
    now: datetime,
) -> str | None:
    """Why the body of an answer with these headers is not to be used, in words for `status_detail`; None = it may be.

    `robots_tags`: the value of every X-Robots-Tag header; `tdm`: of tdm-reservation, None = not sent; `agent`: our
    product token; `directives`: those that refuse, in any case; `now`: with a time zone. A directive counts when it is
    for everybody, or for `agent`, also within a list that proxies joined of several headers. `none` is noindex and
    nofollow. An `unavailable_after` that has passed counts as noindex; one that cannot be read does not count.

    Sources: Google Search Central, "Robots meta tag, data-nosnippet, and X-Robots-Tag specifications" (grammar, dates,
    `none`); DeviantArt's noai and noimageai; W3C TDM Reservation Protocol, final report of 2024-02-10, section 5
    (1 = rights are reserved). Otherwise than img2dataset 1.47.0, which takes all before the first colon of a header for
    an agent: its `noai, max-image-preview:large` refuses nobody.
    """
    if respect_tdm and tdm is not None and "1" in (part.strip() for part in tdm.split(",")):
        return "tdm-reservation: 1"
    wanted = {d.strip().lower() for d in directives}
    if not wanted:
        return None
    for value in robots_tags:
        for who, name, argument in _directives(value):
            if who is not None and who not in ("*", agent.lower()):
                continue
            if wanted.intersection(_MEANS.get(name, (name,))) and name != "unavailable_after":
                return f"X-Robots-Tag: {name}" + (f" for {who}" if who else "")
            if name == "unavailable_after" and not wanted.isdisjoint(("noindex", name)) and _passed(argument, now):
                return "X-Robots-Tag: unavailable_after, which has passed"
    return None


def _directives(value: str) -> Iterator[tuple[str | None, str, str]]:
    """(agent or None for all, directive, its value or empty), in lower case but for values."""
    agent: str | None = None
    items = value.split(",")
    for number, item in enumerate(items):
        text = item.strip()
        while (named := _NAMED.fullmatch(text)) is not None:
            name, rest = named[1].lower(), named[2].strip()
            if name in _DIRECTIVES or name.startswith("max-"):
                if name == "unavailable_after" and _WEEKDAY.fullmatch(rest):
                    rest += ", " + items[number + 1] if number + 1 < len(items) else ""
                yield agent, name, rest
                text = ""
                break
            if re.split(r"[\s:]", rest, maxsplit=1)[0].lower() not in _DIRECTIVES:
                text = ""  # an unknown directive with a value: no agent, for nothing that it could be told stands there
                break
            agent, text = name.partition("/")[0], rest
        if text:
            yield agent, text.lower(), ""


def _passed(text: str, now: datetime) -> bool:
    """Whether a date (RFC 822, RFC 850 or ISO 8601; UTC where no zone is said) lies before `now`."""
    try:
        when = datetime.fromisoformat(text.strip())
    except ValueError:
        try:
            when = email.utils.parsedate_to_datetime(text)
        except (ValueError, TypeError, IndexError, OverflowError):
            return False
    try:
        return (when if when.tzinfo is not None else when.replace(tzinfo=UTC)) < now
    except OverflowError:
        return False
