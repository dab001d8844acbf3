"""What a run has learnt of hosts in trouble, kept in `state/` so that the next run leaves them alone as long.

In: a store, and the desk of the run. Out: `state/hosts-<run>-<n>.json`, a new file whenever a breaker or a long pause
has changed, at most every 30 s and at the end; older ones are removed after. A file that does not read as such is a
StoreError; a disk that is full costs only the file.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterable
from typing import Any

from mmdata.errors import StoreError
from mmdata.host_desk import BookDesk, rules_of
from mmdata.settings import FetchOptions
from mmdata.store import Store

__all__ = ["HostKeeper", "older_host_files"]

EVERY_S = 30.0
_PREFIX = "hosts-"


class HostKeeper:
    """Keeps one run's book of hosts: `with HostKeeper(store, run, fetch) as hosts:`, and `hosts.desk` is the book's.

    `every_s`: seconds between two looks at what has changed.
    """

    def __init__(self, store: Store, run: str, fetch: FetchOptions, every_s: float = EVERY_S) -> None:
        self._store, self._run, self._every_s = store, run, every_s
        found = _saved(store)
        self._files = [file for _, file, _ in found]
        newest = found[-1] if found else None
        try:
            self.desk = BookDesk(rules_of(fetch), None if newest is None else newest[2])
        except (ValueError, TypeError) as error:
            assert newest is not None
            raise _damaged(store, newest[1], error) from None
        self._written = 0
        self._unsaved: dict[str, Any] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="mmdata-hosts", daemon=True)

    def __enter__(self) -> HostKeeper:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._try_to_save()

    def save(self) -> None:
        """Write what has changed since the last time, if anything has. StoreError when it cannot be written."""
        self._unsaved = saved = self.desk.changed() or self._unsaved
        if saved is None or not self._store.exists("dataset.json"):  # a folder that vanished is not made anew
            return
        written = []
        if saved["hosts"]:
            name = f"state/{_PREFIX}{self._run}-{self._written}.json"
            self._store.create(name, json.dumps(saved, sort_keys=True).encode())
            written, self._written = [name], self._written + 1
        for name in self._files:
            self._store.remove(name)
        self._files, self._unsaved = written, None

    def _keep(self) -> None:
        while not self._stop.wait(self._every_s):
            self._try_to_save()

    def _try_to_save(self) -> None:
        """What a run learns of hosts is worth less than the run."""
        with contextlib.suppress(StoreError, OSError, EOFError):
            self.save()


def older_host_files(store: Store, names: Iterable[str]) -> set[str]:
    """Of the files of a dataset, those of this module that a newer one replaces."""
    return {name for _, name, _ in _saved(store)[:-1]} & set(names)


def _saved(store: Store) -> list[tuple[float, str, dict[str, Any]]]:
    """(when, file, what), the newest last."""
    found = []
    for file in store.list("state"):
        if file.startswith(_PREFIX):
            name = f"state/{file}"
            data = store.read_if_there(name)
            if data is None:
                continue
            try:
                saved = json.loads(data)
                found.append((float(saved["saved"]), name, saved))
            except (ValueError, KeyError, TypeError) as error:
                raise _damaged(store, name, error) from None
    return sorted(found, key=lambda entry: entry[:2])


def _damaged(store: Store, name: str, error: Exception) -> StoreError:
    return StoreError(f"{name} of {store.url} is damaged ({error!r}); remove it: it only says which hosts were down")
