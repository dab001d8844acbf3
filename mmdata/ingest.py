"""Source rows of one shard → stored media and base rows: fetch, check, resize, append to a tar, commit.

Every input row gives one base row, in input order, whatever becomes of it. The tar is in completion order, so that a
slow URL holds nobody up; the rows file is the commit point and names the tar of its own attempt.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from mmdata import __version__
from mmdata.block_lists import BlockLists
from mmdata.columns import base_schema, row_id
from mmdata.errors import StoreError
from mmdata.ingest_journal import IngestJournal
from mmdata.media import image
from mmdata.media.http import Client, Fetched, HttpLimits
from mmdata.media.tar import TarAppender
from mmdata.settings import FetchOptions
from mmdata.store import Store, shard_name, write_parquet

__all__ = ["FetchOptions", "IngestCounts", "Prepared", "counts_of", "ingest_shard", "key_of", "prepare", "uid_of"]

_EXTENSIONS = {"jpeg": "jpg", "jpeg2000": "jp2"}  # else the format's own name
_BIG_PX = 1 << 24
_one_big_picture = threading.Lock()  # above 16 Mpx pictures are decoded one at a time, or the memory would not do


@dataclass(frozen=True)
class IngestCounts:
    """What became of a shard's rows. `by_status` sums to `rows`; bytes as stored and as fetched; wall seconds."""

    rows: int
    by_status: dict[str, int] = field(default_factory=dict)
    bytes_stored: int = 0
    bytes_fetched: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Prepared:
    """A fetched body after all checks: with status ok, `data` is what is stored, `ext` and the sizes describe it.

    `original_*` are those of the body, upright, None when its header did not parse; `sha256` is of the body.
    """

    status: str
    detail: str | None = None
    data: bytes | None = None
    ext: str | None = None
    width_px: int | None = None
    height_px: int | None = None
    original_width_px: int | None = None
    original_height_px: int | None = None
    exif: str | None = None
    sha256: str | None = None
    size_bytes: int | None = None


def uid_of(kind: str, location: str | None, caption: str | None) -> str:
    """First 32 hex digits of sha256 of UTF-8 kind, location and caption with a zero byte between; None = empty."""
    text = f"{kind}\0{location or ''}\0{caption or ''}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def key_of(shard: int, index: int, shard_rows: int) -> str:
    """img2dataset's key: 10^k * shard + index with k = ceil(log10(shard_rows)), zero-padded to 5 + k digits."""
    digits = len(str(shard_rows - 1)) if shard_rows > 1 else 0
    return f"{10**digits * shard + index:0{5 + digits}d}"


def ingest_shard(
    store: Store,
    shard: int,
    table: pa.Table,
    source_kind: str,
    fetch: FetchOptions,
    attempt: str,
    tick: Callable[[int], None] | None = None,
    journal: IngestJournal | None = None,
    blocks: BlockLists | None = None,
) -> IngestCounts:
    """Fetch and store the rows of one shard; commits `media/<shard>-<attempt>.tar`, then `rows/<shard>.g0.parquet`.

    `table` has `url` and `caption` and the source's extra columns, and optionally `uid`, the source's own name of each
    row. `attempt` is unique to this call. `tick` is told how many more rows are done, from this thread. With a
    `journal`, a picture that killed its worker twice has status `decode` and the detail `worker_died`. What is on one
    of `blocks` is not asked for, or not stored. When the rows file exists (another attempt won, or this shard was done
    before), its counts are returned and nothing is fetched or changed. Raises StoreError (disk, folder) and
    RetryableError (no network at all); a bad row never raises.
    """
    started = time.perf_counter()
    rows_name = f"rows/{shard_name(shard)}.g0.parquet"
    if store.exists(rows_name):
        return counts_of(store.read_table(rows_name), started)
    tar_name = f"media/{shard_name(shard)}-{attempt}.tar"
    urls = table.column("url").to_pylist()
    with store.scratch() as folder:
        with journal or nullcontext():
            work = _ShardWork(shard, urls, fetch, folder / "media.tar", tick or (lambda _: None), journal, blocks)
            _run(work.fetch_all())
        rows = _base_rows(shard, table, source_kind, fetch, work.found, tar_name)
        if any(found.offset is not None for found in work.found) and not store.commit(tar_name, work.tar_path):
            raise StoreError(f"{tar_name} exists in {store.url} already: attempt {attempt!r} was used twice")
        write_parquet(rows, folder / "rows.parquet")
        if not store.commit(rows_name, folder / "rows.parquet"):
            rows = store.read_table(rows_name)
    if journal is not None:
        journal.forget()
    return counts_of(rows, started)


@dataclass
class _Found:
    """What became of one row: what was fetched (without its body), what was made of it, where it lies."""

    fetched: Fetched
    prepared: Prepared
    offset: int | None = None
    size: int | None = None


class _ShardWork:
    """The fetching of one shard in one event loop: `concurrency` workers take rows in input order."""

    def __init__(
        self,
        shard: int,
        urls: list[str | None],
        fetch: FetchOptions,
        tar_path: Path,
        tick: Callable[[int], None],
        journal: IngestJournal | None,
        blocks: BlockLists | None,
    ) -> None:
        self.tar_path = tar_path
        self._urls = urls
        self._fetch = fetch
        self._shard = shard
        self._tick = tick
        self._journal = journal
        self._blocks = blocks
        self._found: list[_Found | None] = [None] * len(urls)

    @property
    def found(self) -> list[_Found]:
        """One per row, in input order."""
        return [f for f in self._found if f is not None]

    async def fetch_all(self) -> None:
        threads = self._fetch.decode_threads or len(os.sched_getaffinity(0))
        pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        try:
            with TarAppender(self.tar_path) as tar:
                blocked = self._blocks.url if self._blocks is not None else None
                async with Client(_limits(self._fetch), blocked) as client:
                    # Pictures that were in a decoder when a worker died go first, one at a time.
                    alone = self._journal.suspects if self._journal is not None else []
                    await self._worker(((index, self._urls[index]) for index in alone), client, pool, tar)
                    todo = ((index, url) for index, url in enumerate(self._urls) if self._found[index] is None)
                    workers = min(self._fetch.concurrency, len(self._urls))
                    await _together([self._worker(todo, client, pool, tar) for _ in range(workers)])
                with self._explained():
                    tar.close()
        finally:
            pool.shutdown(cancel_futures=True)

    async def _worker(
        self, todo: Iterator[tuple[int, str | None]], client: Client, pool: ThreadPoolExecutor, tar: TarAppender
    ) -> None:
        for index, url in todo:
            async with client.fetching(url) as fetched:
                self._found[index] = await self._store(index, fetched, pool, tar)
            self._tick(1)

    async def _store(self, index: int, fetched: Fetched, pool: ThreadPoolExecutor, tar: TarAppender) -> _Found:
        if fetched.data is None:
            return _Found(fetched, Prepared(fetched.status, fetched.detail))
        loop = asyncio.get_running_loop()
        prepared = await loop.run_in_executor(pool, self._prepare, index, fetched.data)
        found = _Found(_without_data(fetched), _without_data(prepared))
        if prepared.data is not None:
            key = key_of(self._shard, index, self._fetch.shard_rows)
            with self._explained():
                found.offset, found.size = tar.append(f"{key}.{prepared.ext}", prepared.data)
        return found

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"cannot write scratch file {self.tar_path}: {error.strerror}; free some space, or point TMPDIR to "
                "a larger disk, then the same command goes on"
            ) from error

    def _prepare(self, index: int, data: bytes) -> Prepared:
        """`prepare`, with the journal kept: what a decoder does to the process is then known to be this row's."""
        if self._journal is None:
            return prepare(data, self._fetch, self._blocks)
        if index in self._journal.given_up:
            return Prepared("decode", "worker_died", sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
        with self._journal.decoding(index):
            return prepare(data, self._fetch, self._blocks)


def prepare(data: bytes, fetch: FetchOptions, blocks: BlockLists | None = None) -> Prepared:
    """Check, decode, resize and encode one body; never raises: what decoders and encoders raise becomes a status."""
    known: dict[str, Any] = {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
    if blocks is not None and (list_words := blocks.body(known["sha256"])) is not None:
        return Prepared("blocked", list_words, **known)
    try:
        info = image.probe(data)
        known |= {"original_width_px": info.width, "original_height_px": info.height}
        if fetch.extract_exif:
            known["exif"] = image.exif_json(data)
        refused = _filtered(info, fetch)
        if refused:
            return Prepared("filtered", refused, **known)
        with _one_big_picture if info.width * info.height > _BIG_PX else nullcontext():
            return _stored(data, info, fetch, known, blocks)
    except image.DecodeError as error:
        return Prepared(error.kind, error.detail, **known)
    except Exception as error:  # noqa: BLE001  row isolation: whatever a picture does to a library, it costs this row
        return Prepared("decode", f"{type(error).__name__}: {error}"[:200], **known)


def _filtered(info: image.ImageInfo, fetch: FetchOptions) -> str | None:
    short, long = sorted((info.width, info.height))
    if short < fetch.min_image_size:
        return f"short side {short} px, at least {fetch.min_image_size} asked"
    if fetch.max_image_area is not None and short * long > fetch.max_image_area:
        return f"area {short * long} px, at most {fetch.max_image_area:g} allowed"
    if fetch.max_aspect_ratio is not None and long > fetch.max_aspect_ratio * short:
        return f"aspect ratio {long / short:.2f}, at most {fetch.max_aspect_ratio:g} allowed"
    return None


def _stored(
    data: bytes, info: image.ImageInfo, fetch: FetchOptions, known: dict[str, Any], blocks: BlockLists | None
) -> Prepared:
    looks = blocks is not None and blocks.looks
    if fetch.disable_all_reencoding:
        # A reduced scale reads every coefficient, so that a cut picture is found out all the same.
        least = 1 if fetch.decode == "fast" and not looks else None
    else:
        least = _least_side(info, fetch)
    picture = image.decode(data, least, fetch.max_pixels)
    if blocks is not None and (list_words := blocks.picture(picture)) is not None:
        return Prepared("blocked", list_words, **{**known, "exif": None})
    if fetch.disable_all_reencoding:
        return _as_fetched(data, info, known)
    resized = image.resize(
        picture,
        fetch.image_size,
        fetch.resize_mode,
        fetch.resize_only_if_bigger,
        fetch.upscale_interpolation,
        fetch.downscale_interpolation,
    )
    ext = _EXTENSIONS.get(info.format, info.format)
    same = resized.shape == picture.shape == (info.height, info.width, 3)
    if fetch.skip_reencode and same and ext == fetch.encode_format and info.is_plain:
        return _as_fetched(data, info, known)
    encoded = image.encode(resized, fetch.encode_format, fetch.encode_quality)
    height, width = resized.shape[:2]
    return Prepared("ok", None, encoded, fetch.encode_format, width, height, **known)


def _as_fetched(data: bytes, info: image.ImageInfo, known: dict[str, Any]) -> Prepared:
    ext = _EXTENSIONS.get(info.format, info.format)
    return Prepared("ok", None, data, ext, info.width, info.height, **known)


def _least_side(info: image.ImageInfo, fetch: FetchOptions) -> int | None:
    """Short side in px that a DCT-scaled decode keeps: at least 1.5 times what the resize makes of it; None = in full.

    Only halves, quarters and eighths: libjpeg-turbo has no quick code for the scales between, which gain nothing.
    """
    if fetch.decode == "exact" or fetch.resize_mode == "no":
        return None
    short, long = sorted((info.width, info.height))
    by_short = fetch.resize_mode in ("keep_ratio", "center_crop")
    target = fetch.image_size if by_short else fetch.image_size * short / long
    for factor in (8, 4, 2):
        if short >= factor * 1.5 * target:
            return -(-short // factor)
    return None


def _limits(fetch: FetchOptions) -> HttpLimits:
    return HttpLimits(
        user_agent=fetch.user_agent or f"mmdata/{__version__}",
        timeout_s=fetch.timeout_s,
        retries=fetch.retries,
        max_bytes=fetch.max_bytes,
        max_redirects=fetch.max_redirects,
        allow_private=fetch.allow_private,
        bytes_in_flight=fetch.bytes_in_flight,
        per_host=fetch.per_host,
    )


async def _together(workers: list[Coroutine[Any, Any, None]]) -> None:
    """Run all; the first error cancels the others and is raised as it is."""
    tasks = [asyncio.create_task(worker) for worker in workers]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _run(work: Coroutine[Any, Any, None]) -> None:
    """`asyncio.run`, also from inside a running loop (a notebook), then in a thread of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
        return
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, work).result()


def _without_data(value: Any) -> Any:
    return type(value)(**{**vars(value), "data": None})


def _base_rows(
    shard: int, table: pa.Table, source_kind: str, fetch: FetchOptions, found: list[_Found], tar_name: str
) -> pa.Table:
    urls, captions = table.column("url").to_pylist(), table.column("caption").to_pylist()
    given = table.column("uid").to_pylist() if "uid" in table.column_names else [None] * len(table)
    kind = "url" if source_kind in ("urls", "url") else "path"
    made: dict[str, Any] = {
        "row_id": [row_id(shard, i) for i in range(len(table))],
        "key": [key_of(shard, i, fetch.shard_rows) for i in range(len(table))],
        "uid": [own or uid_of(kind, u, c) for own, u, c in zip(given, urls, captions, strict=True)],
        "image_path": [tar_name if f.offset is not None else None for f in found],
        "image_offset": [f.offset for f in found],
        "image_size": [f.size for f in found],
        "image_ext": [f.prepared.ext for f in found],
        "status": [f.prepared.status for f in found],
        "status_detail": [f.prepared.detail for f in found],
    }
    for name in ("http_status", "final_url", "content_type", "attempts", "fetch_ms"):
        made[name] = [getattr(f.fetched, name) for f in found]
    for name in ("size_bytes", "sha256", "exif", "original_width_px", "original_height_px", "width_px", "height_px"):
        made[name] = [getattr(f.prepared, name) for f in found]
    extra = pa.schema([f for f in table.schema if f.name not in ("url", "caption", "uid")])
    schema = base_schema(extra)
    columns = [
        table.column(f.name) if f.name in table.column_names and f.name not in made else pa.array(made[f.name], f.type)
        for f in schema
    ]
    return pa.table(columns, schema=schema)


def counts_of(rows: pa.Table, started: float) -> IngestCounts:
    """What became of these base rows; `started` is when the work on them began, by `time.perf_counter`."""
    return IngestCounts(
        rows=len(rows),
        by_status=dict(sorted(Counter(rows.column("status").to_pylist()).items())),
        bytes_stored=sum(rows.column("image_size").drop_null().to_pylist()),
        bytes_fetched=sum(rows.column("size_bytes").drop_null().to_pylist()),
        seconds=time.perf_counter() - started,
    )
