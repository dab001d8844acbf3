"""What hosts allow, which outcomes of a request speak against one, and what a worker is told. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["FAILURES", "NEUTRAL", "Closed", "Grant", "HostRules", "Limit"]

FAILURES = frozenset(["timeout", "connect", "dns", "tls", "http_5xx", "http_429"])  # the host's own
NEUTRAL = frozenset(["cancelled", "bad_url", "refused_address", "blocked"])  # it was not asked


class Limit(NamedTuple):
    """`connections` at once and starts `per_s`; None = no bound."""

    connections: int | None
    per_s: float | None


_DEFAULT = Limit(4, 10.0)


@dataclass(frozen=True)
class HostRules:
    """What hosts allow. `default` holds for all but the `others`; names are lower case, without port.

    `failures` in a row open a host's breaker for `cooldown_s`, doubled each time until a success, at most an hour.
    """

    default: Limit = _DEFAULT
    others: Mapping[str, Limit] = field(default_factory=dict)
    failures: int = 10
    cooldown_s: float = 60.0

    def of(self, host: str) -> Limit:
        """What this host allows."""
        return self.others.get(host, self.default) if self.others else self.default

    def is_unbounded(self, host: str) -> bool:
        """Whether it allows everything."""
        return self.of(host) == (None, None)


class Grant(NamedTuple):
    """One start at `host` may begin now."""

    host: str


class Closed(NamedTuple):
    """What the worker wanted at `host` is dropped; to be asked for again in `for_s`."""

    host: str
    for_s: float
