"""robots.txt (RFC 9309): what a host lets our agent ask for, and a cache of that by origin.

In: the answer to a request for robots.txt, then URLs of that origin. Out: words on why a URL is not to be asked for, or
None. Nothing that a server sends raises, and hostile files cost little: the groups are chosen here, so that many agents
times many rules are never multiplied out [protego 0.7.0 alone: 5 s and 90 MB for 47 KB of 1,500 agents and as many
rules], and the group that speaks to us is given to protego, which matches without regular expressions.
"""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from protego import Protego

__all__ = ["MAX_ROBOTS_BYTES", "RobotsCache", "Rules"]

MAX_ROBOTS_BYTES = 500 << 10  # RFC 9309, section 2.5: at least so much is read
TTL_S = 24 * 3600.0  # RFC 9309, section 2.4: not longer
_MAX_RULES = 10_000  # of one group; each may be walked through for every URL, at 0.2 µs
_RULE_BYTES = 400  # in memory, beside its text
_MAX_WILDCARDS = 2_000  # at 0.5 µs and more
_MAX_CRAWL_DELAY_S = 3600.0
# The lines that matter, in the spellings that protego knows too; no line is read twice, whatever stands in it.
_LINE = re.compile(
    r"^[ \t]*(?:(user[- ]?agent)|((?:dis|diss)?allow|dissalow|disalow|diasllow|disallaw|crawl[- ]delay))"
    r"[ \t]*(?::|[ \t])([^\n#]*)",
    re.I | re.M,
)
_AGENT = re.compile(r"[^\s/*;(),]+")


@dataclass(frozen=True)
class _Group:
    """The rules for one agent, none = everything is allowed; `refused`: nothing is, and why. `size` in bytes, about."""

    rules: Protego | None = None
    refused: str | None = None
    size: int = 0


class Rules:
    """What one robots.txt says, see `parse`."""

    def __init__(self, text: str, agent: str | None = None, refused: str | None = None) -> None:
        self._refused = refused
        self._groups: dict[str, _Group] = {}
        self._text: str | None = text
        if agent is not None:
            self._group(agent)
            self._text = None

    @classmethod
    def parse(cls, http_status: int, body: bytes, agent: str | None = None) -> Rules:
        """The rules of an answer: `body` (its first 500 KiB count) of a 2xx; 3xx and 4xx = everything is allowed.

        429 and 5xx = nothing is (RFC 9309, section 2.3.1.4); a fetcher gives rows that failure and does not ask here.
        With `agent` (a product token) only what is said to it is kept, and only it may be asked for: a cache holds
        hundreds of times more of these.
        """
        if 200 <= http_status < 300:
            return cls(body[:MAX_ROBOTS_BYTES].decode("utf-8-sig", "replace").replace("\0", ""), agent)
        if http_status == 429 or http_status >= 500:
            return cls("", agent, f"robots.txt: HTTP {http_status}")
        return cls("", agent)

    @property
    def size(self) -> int:
        """Bytes that these rules hold, about, and may come to hold."""
        if self._text is None:
            return 500 + sum(group.size for group in self._groups.values())
        return 500 + 2 * len(self._text) + _RULE_BYTES * min(1 + self._text.count("\n"), _MAX_RULES)

    def refusal(self, url: str, agent: str) -> str | None:
        """Why `agent` (a product token) is not to ask for `url` (as it goes on the wire); None = it may."""
        group = self._group(agent)
        if group.refused is not None:
            return group.refused
        if group.rules is None or group.rules.can_fetch(url, agent):
            return None
        return f"robots.txt disallows it for {agent}"

    def crawl_delay_s(self, agent: str) -> float | None:
        """Seconds between two requests that the group of `agent` asks for, at most an hour; None = none asked."""
        rules = self._group(agent).rules
        if rules is None or not (delay := rules.crawl_delay(agent)):
            return None
        return min(delay, _MAX_CRAWL_DELAY_S)

    def _group(self, agent: str) -> _Group:
        agent = agent.lower()
        found = self._groups.get(agent)
        if found is None:
            if self._text is None:
                raise ValueError(f"these rules were kept for {', '.join(self._groups)} alone, not for {agent}")
            found = self._groups[agent] = self._grouped(self._text, agent)
        return found

    def _grouped(self, text: str, agent: str) -> _Group:
        if self._refused is not None:
            return _Group(refused=self._refused)
        lines = _lines_for(text, agent)
        if not lines:
            return _Group()
        if len(lines) > _MAX_RULES or sum(line.count("*") + line.count("$") for line in lines) > _MAX_WILDCARDS:
            return _Group(refused=f"robots.txt has too many rules to be followed: {len(lines)}")
        size = 2000 + sum(_RULE_BYTES + 2 * len(line) for line in lines)
        return _Group(Protego.parse("\n".join(["User-agent: *", *lines])), size=size)


def _lines_for(text: str, agent: str) -> list[str]:
    """The lines of all groups that name `agent`, else of all for `*` (RFC 9309, section 2.2.1).

    Names are compared whole and without a version. A group ends where agents follow rules; lines of other kinds
    (sitemaps and the like) end nothing.
    """
    ours: list[str] | None = None
    everybodys: list[str] = []
    reading: list[list[str]] = []  # what the rules that follow belong to
    among_agents = False
    for line in _LINE.finditer(text.replace("\r", "\n")):
        is_agent, field, value = line.groups()
        if is_agent:
            if not among_agents:
                reading, among_agents = [], True
            name = _AGENT.search(value)
            if name is not None and name[0].lower() == agent:
                ours = [] if ours is None else ours
                if not any(ours is group for group in reading):
                    reading.append(ours)
            elif value.strip().startswith("*") and not any(everybodys is group for group in reading):
                reading.append(everybodys)
        else:
            among_agents = False
            for group in reading:
                group.append(f"{field}:{value}")
    return everybodys if ours is None else ours


class RobotsCache:
    """Rules by origin (`scheme://host:port`), one per process: kept for 24 h, the oldest asked for given up first.

    `max_bytes` bounds what all rules hold together. May be used by several threads.
    """

    def __init__(self, max_bytes: int = 32 << 20, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes = max_bytes
        self._clock = clock
        self._held = 0
        self._kept: OrderedDict[str, tuple[float, Rules]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, origin: str) -> Rules | None:
        """The rules of `origin`; None = not known, or too old."""
        with self._lock:
            found = self._kept.get(origin)
            if found is None:
                return None
            if self._clock() - found[0] >= TTL_S:
                self._drop(origin)
                return None
            self._kept.move_to_end(origin)
            return found[1]

    def put(self, origin: str, rules: Rules) -> None:
        """Keep the rules of `origin` from now on."""
        with self._lock:
            if origin in self._kept:
                self._drop(origin)
            self._kept[origin] = (self._clock(), rules)
            self._held += rules.size + len(origin)
            while self._held > self._max_bytes and len(self._kept) > 1:
                self._drop(next(iter(self._kept)))

    def _drop(self, origin: str) -> None:
        _, rules = self._kept.pop(origin)
        self._held -= rules.size + len(origin)
