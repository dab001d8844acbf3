"""The lease that keeps two runs off one dataset, and how a process is told from another with the same pid.

Safety never rests on the lease: commits are conditional. It saves the work that two runs would do twice. `lease.json`
names run, host, boot, pid and the pid's start time, and a heartbeat. It is free when it was released, when the
heartbeat is a minute old, or at once when that process is known to be dead. Readers never take it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mmdata.columns import FORMAT_VERSION
from mmdata.errors import StoreError

if TYPE_CHECKING:
    from mmdata.store import Store

__all__ = ["HEARTBEAT_S", "STALE_S", "Holder", "Lease", "ProcessId", "lease_holder"]

HEARTBEAT_S = 10.0
STALE_S = 60.0
NAME = "lease.json"


@dataclass(frozen=True)
class ProcessId:
    """One process for good: host, boot (with its pid namespace), pid, and the pid's start in clock ticks since boot."""

    host: str
    boot: str
    pid: int
    start: int

    @classmethod
    def current(cls) -> ProcessId:
        """This process."""
        return cls(socket.gethostname(), _boot(), os.getpid(), _own_start(os.getpid()))

    def is_dead(self) -> bool:
        """True only when that is certain: this host, and an earlier boot, no such pid, or a pid that was given anew."""
        if self.host != socket.gethostname():
            return False
        boot, _, namespace = self.boot.partition("/")
        here, _, own_namespace = _boot().partition("/")
        if boot != here:
            return True
        # Two containers may share a host name and a boot; a pid of one means nothing in the other.
        if namespace != own_namespace:
            return False
        start = _start_time(self.pid)
        return not _exists(self.pid) if start is None else start != self.start

    def token(self) -> str:
        """All four, as part of a file name."""
        return f"{self.host}~{self.boot.replace('/', '+')}~{self.pid}~{self.start}"

    @classmethod
    def from_token(cls, token: str) -> ProcessId | None:
        """Back from `token`; None when it is not one."""
        parts = token.split("~")
        if len(parts) != 4 or not parts[2].isdecimal() or not parts[3].isdecimal():
            return None
        return cls(parts[0], parts[1].replace("+", "/"), int(parts[2]), int(parts[3]))


@lru_cache(1)
def _boot() -> str:
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"


@lru_cache(4)  # per pid, because a forked child has the parent's cache
def _own_start(pid: int) -> int:
    start = _start_time(pid)
    assert start is not None, "this process is alive"
    return start


def _start_time(pid: int) -> int | None:
    """Clock ticks since boot at which `pid` started (field 22 of its stat file); -1 for a zombie, None if not seen."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()  # the name before it may hold spaces and brackets
    return -1 if fields[0] in "ZXx" else int(fields[19])


def _exists(pid: int) -> bool:
    """For processes that /proc hides from other users."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@dataclass(frozen=True)
class Holder:
    """What `lease.json` says: who holds the dataset, since when, and its last heartbeat (UTC, ISO 8601)."""

    run: str
    process: ProcessId
    since: str
    heartbeat: str
    released: bool = False

    def is_live(self, now: float) -> bool:
        """Whether it still holds the dataset at `now`, in seconds since the epoch."""
        age_s = now - datetime.fromisoformat(self.heartbeat).timestamp()
        # A heartbeat far in the future is a clock that was wrong, not a run that is alive.
        return not self.released and abs(age_s) < STALE_S and not self.process.is_dead()

    def to_bytes(self) -> bytes:
        """The text of `lease.json`."""
        return json.dumps({"format": FORMAT_VERSION, **asdict(self)}, indent=1, sort_keys=True).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Holder:
        """Back from `to_bytes`; StoreError, naming `where`, when it is something else."""
        try:
            found: dict[str, Any] = json.loads(data)
            process = ProcessId(**found["process"])
            holder = cls(found["run"], process, found["since"], found["heartbeat"], found["released"])
            if not (isinstance(process.pid, int) and isinstance(process.start, int) and process.pid > 0):
                raise ValueError("pid and start are numbers above 0")
            if datetime.fromisoformat(holder.heartbeat).tzinfo is None:
                raise ValueError("the heartbeat has no time zone")
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{where} does not read as a lease ({error}); remove it if no run uses it") from error
        return holder


def lease_holder(store: Store, clock: Callable[[], float] = time.time) -> Holder | None:
    """Who holds the dataset now, this process included; None when it is free."""
    data = store.read_if_there(NAME)
    if data is None:
        return None
    holder = Holder.from_bytes(data, f"{NAME} of {store.url}")
    return holder if holder.is_live(clock()) else None


class Lease:
    """A held lease: `with Lease.acquire(store, run_id) as lease:`. `lost` is set once somebody else may have it."""

    def __init__(self, store: Store, holder: Holder, clock: Callable[[], float]) -> None:
        self.lost = threading.Event()
        self._store = store
        self._holder = holder
        self._written = holder.to_bytes()
        self._clock = clock
        self._stop = threading.Event()
        self._writing = threading.Lock()
        self._thread: threading.Thread | None = None

    @classmethod
    def acquire(
        cls, store: Store, run_id: str, *, clock: Callable[[], float] = time.time, heartbeat_s: float = HEARTBEAT_S
    ) -> Lease:
        """Take the dataset for `run_id` and keep the lease alive until `release`.

        StoreError when a live run holds it, this process's own included. `clock` gives seconds since the epoch.
        """
        while True:
            found = store.read_if_there(NAME)
            holder = None if found is None else Holder.from_bytes(found, f"{NAME} of {store.url}")
            if holder is not None and holder.is_live(clock()):
                raise StoreError(
                    f"dataset {store.url} is held by run {holder.run} (pid {holder.process.pid} on "
                    f"{holder.process.host}, since {holder.since}); wait for it, or stop it"
                )
            now = _utc(clock())
            lease = cls(store, Holder(run_id, ProcessId.current(), now, now), clock)
            if store.replace(NAME, lease._written, found):
                lease._start(heartbeat_s)
                return lease

    def _start(self, heartbeat_s: float) -> None:
        self._thread = threading.Thread(target=self._keep, args=(heartbeat_s,), name="mmdata-lease", daemon=True)
        self._thread.start()

    def _keep(self, heartbeat_s: float) -> None:
        last = time.monotonic()
        while not self._stop.wait(heartbeat_s) and not self.lost.is_set():
            try:
                self.beat()
                last = time.monotonic()
            except (StoreError, OSError):
                # A full disk or a lost mount: try on, but others may take the lease once it is stale.
                if time.monotonic() - last > STALE_S:
                    self.lost.set()

    def beat(self) -> None:
        """Renew the heartbeat now; sets `lost` when the lease is no longer ours."""
        self._put(replace(self._holder, heartbeat=_utc(self._clock())))

    def require(self) -> None:
        """StoreError when `lost`."""
        if self.lost.is_set():
            raise StoreError(
                f"this run has lost its lease on {self._store.url}: another run has taken it over, or the folder was "
                "removed; run the same command again"
            )

    def hold(self) -> None:
        """Beat, then `require`: for a process that may have slept since its last heartbeat."""
        self.beat()
        self.require()

    def release(self) -> None:
        """Stop the heartbeat and mark the lease released, unless it was lost; again: nothing.

        Raises nothing: a lease that cannot be marked goes free with this process, and the run's own error matters more.
        """
        self._stop.set()
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        if not self.lost.is_set():
            with contextlib.suppress(StoreError, OSError):
                self._put(replace(self._holder, heartbeat=_utc(self._clock()), released=True))

    def _put(self, holder: Holder) -> None:
        data = holder.to_bytes()
        with self._writing:
            if self._store.replace(NAME, data, self._written):
                self._written = data
            else:
                self.lost.set()

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
