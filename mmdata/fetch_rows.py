"""URLs → media in one tar, and what became of each row: fetching, checking, resizing and storing, all at once.

In: rows with their keys and URLs. Out: a `Found` for each, and a tar that holds what is stored, in completion order, so
that a slow URL holds nobody up. A bad row never raises; StoreError (scratch disk) and RetryableError (no network) do.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmdata.block_lists import BlockLists
from mmdata.decode_queue import DecodeQueue
from mmdata.errors import StoreError
from mmdata.fetched_before import FetchedBefore
from mmdata.fetcher import ToFetch, Watch, fetch_all
from mmdata.host_gate import Gate
from mmdata.ingest_journal import IngestJournal
from mmdata.media.http import Fetched
from mmdata.media.tar import TarAppender
from mmdata.prepare import Prepared, prepare
from mmdata.sample_layout import member_name
from mmdata.settings import FetchOptions

__all__ = ["Beside", "Found", "RowToFetch", "fetch_rows"]


@dataclass(frozen=True)
class RowToFetch:
    """A row of a shard. `expected_hash` and `boxes` are what the list says of its body; `given` its own columns."""

    index: int
    key: str
    url: str | None
    expected_hash: str | None = None
    boxes: Sequence[Sequence[float]] | None = None
    given: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Found:
    """What became of one row: what was fetched and what was made of it (without bytes), where it lies in the tar.

    `place` and `original_place` are [offset, size] in bytes; None = not stored.
    """

    fetched: Fetched
    prepared: Prepared
    place: tuple[int, int] | None = None
    original_place: tuple[int, int] | None = None


Beside = Callable[[RowToFetch, Found], Sequence[tuple[str, bytes]]]  # (extension, bytes) of members beside the media


def fetch_rows(
    rows: Sequence[RowToFetch],
    fetch: FetchOptions,
    tar_path: Path,
    make_gate: Callable[[], Gate],
    *,
    threads: int | None = None,
    watch: Watch | None = None,
    journal: IngestJournal | None = None,
    blocks: BlockLists | None = None,
    earlier: FetchedBefore | None = None,
    beside: Beside | None = None,
) -> dict[int, Found]:
    """What became of every row, by its index; `tar_path` is a new tar with the media of those that are ok.

    `threads` decode and encode (None: `fetch.decode_threads`, or all CPUs of this process). `beside` gives further
    members for a row that is stored, `<key>.<extension>` each.
    """
    work = _Work(fetch, tar_path, journal, blocks, earlier, beside)
    _run(work.fetch_all(rows, make_gate, threads, watch))
    return work.found


class _Work:
    """One call of `fetch_rows`."""

    def __init__(
        self,
        fetch: FetchOptions,
        tar_path: Path,
        journal: IngestJournal | None,
        blocks: BlockLists | None,
        earlier: FetchedBefore | None,
        beside: Beside | None,
    ) -> None:
        self.found: dict[int, Found] = {}
        self._fetch, self._tar_path = fetch, tar_path
        self._journal, self._blocks, self._earlier, self._beside = journal, blocks, earlier, beside

    async def fetch_all(
        self,
        rows: Sequence[RowToFetch],
        make_gate: Callable[[], Gate],
        threads: int | None,
        watch: Watch | None,
    ) -> None:
        count = threads or self._fetch.decode_threads or len(os.sched_getaffinity(0))
        by_index = {row.index: row for row in rows}
        # Pictures that were in a decoder when a worker died go first, one at a time.
        suspects = self._journal.suspects if self._journal is not None else []
        alone = [by_index[index] for index in suspects if index in by_index]
        decoding = DecodeQueue(self._prepare, count)
        try:
            with TarAppender(self._tar_path) as tar:

                async def deliver(index: int, fetched: Fetched) -> None:
                    self.found[index] = await self._store(by_index[index], fetched, decoding, tar)

                blocked = self._blocks.url if self._blocks is not None else None
                singly = self._fetch.model_copy(update={"concurrency": 1})
                rest = [row for row in rows if row.index not in suspects]
                for fetch, part in ((singly, alone), (self._fetch, rest)):
                    if part:
                        jobs = [ToFetch(row.index, row.url) for row in part]
                        await fetch_all(
                            jobs, fetch, make_gate(), deliver, deliveries=2 * count, blocked=blocked, watch=watch
                        )
                with self._explained():
                    tar.close()
        finally:
            decoding.close()

    async def _store(
        self,
        row: RowToFetch,
        fetched: Fetched,
        decoding: DecodeQueue[tuple[RowToFetch, bytes], Prepared],
        tar: TarAppender,
    ) -> Found:
        if fetched.data is None:
            return Found(fetched, Prepared(fetched.status, fetched.detail))
        prepared = await decoding.put((row, fetched.data))
        found = Found(replace(fetched, data=None), replace(prepared, data=None, original=None))
        with self._explained():
            if prepared.data is not None:
                found.place = tar.append(member_name(row.key, str(prepared.ext), self._fetch), prepared.data)
            if prepared.original is not None:
                found.original_place = tar.append(f"{row.key}.original.{prepared.original_ext}", prepared.original)
            if self._beside is not None and found.place is not None:
                for ext, data in self._beside(row, found):
                    tar.append(f"{row.key}.{ext}", data)
        return found

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"cannot write scratch file {self._tar_path}: {error.strerror}; free some space, or point TMPDIR to "
                "a larger disk, then the same command goes on"
            ) from error

    def _prepare(self, fetched: tuple[RowToFetch, bytes]) -> Prepared:
        """`prepare`, with the journal kept: what a decoder does to the process is then known to be this row's."""
        row, data = fetched
        if self._journal is None:
            return self._prepared(row, data)
        if row.index in self._journal.given_up:
            return Prepared("decode", "worker_died", sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
        with self._journal.decoding(row.index):
            return self._prepared(row, data)

    def _prepared(self, row: RowToFetch, data: bytes) -> Prepared:
        return prepare(data, self._fetch, self._blocks, row.expected_hash, row.boxes, self._earlier)


def _run(work: Coroutine[Any, Any, None]) -> None:
    """`asyncio.run`, also from inside a running loop (a notebook), then in a thread of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
        return
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, work).result()
