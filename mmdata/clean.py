"""`mmdata clean`: removes from a dataset folder what crashes and newer files left behind, and nothing a file names."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from mmdata.errors import StoreError
from mmdata.lease import Lease, ProcessId, lease_holder
from mmdata.ledger import dataset_document
from mmdata.local_disk import TEMPORARY
from mmdata.scratch import stale_scratch
from mmdata.store import Store
from mmdata.work import journal_folder

__all__ = ["GRACE_S", "clean", "unreferenced"]

# A worker that outlived its driver may still be about to name what it has written.
GRACE_S = 3600.0
_REQUESTS_AT_ONCE = 32


def clean(store: Store, *, dry_run: bool = False, grace_s: float = GRACE_S) -> list[tuple[str, int]]:
    """Remove what `unreferenced` lists, and what dead processes left in this host's scratch; returns (name, bytes).

    Files that were written less than `grace_s` seconds ago, by the store's clock, stay, and so do uploads in parts that
    were begun since. `dry_run` only lists. StoreError, and nothing is removed, while another process holds the dataset.
    """
    if not store.entries(""):
        raise StoreError(f"there is no dataset at {store.url}; check the path")
    with _held(store, dry_run):
        text = store.read_if_there("current.json")
        try:
            current = {} if text is None else json.loads(text)
        except ValueError as error:
            raise StoreError(f"current.json of {store.url} does not read as JSON ({error}); restore it") from error
        until = _now(store, dry_run) - grace_s
        found = _written_before(store, unreferenced(store, current), until)
        uploads = [upload for upload in store.unfinished_uploads() if upload.started <= until]
        left = [*stale_scratch(), *_journals(store)]
        scratch = [(path, sum(f.stat().st_size for f in path.rglob("*") if f.is_file())) for path in left]
        if not dry_run:
            for name, _ in found:
                store.remove(name)
            for upload in uploads:
                store.abort_upload(upload)
            for path, _ in scratch:
                shutil.rmtree(path, ignore_errors=True)
    found += [(f"{upload.path} (unfinished upload)", upload.size) for upload in uploads]
    return found + [(str(path), size) for path, size in scratch]


def _now(store: Store, dry_run: bool) -> float:
    """By the store's clock: the lease has just been written, unless nothing will be removed."""
    beat = None if dry_run else store.modified("lease.json")
    return time.time() if beat is None else beat


def _written_before(store: Store, found: list[tuple[str, int]], until: float) -> list[tuple[str, int]]:
    """Those written by then; one that has gone meanwhile is left out."""
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        written = list(pool.map(lambda entry: store.modified(entry[0]), found))
    return [entry for entry, at in zip(found, written, strict=True) if at is not None and at <= until]


def _journals(store: Store) -> list[Path]:
    """The folder of this dataset's journals on this host, if there is one: whoever kept them is done or dead."""
    document = dataset_document(store)
    folder = None if document is None else journal_folder(document.id)
    return [folder] if folder is not None and folder.is_dir() and any(folder.iterdir()) else []


@contextlib.contextmanager
def _held(store: Store, dry_run: bool) -> Iterator[None]:
    """The lease, unless this process holds it already or nothing will be removed."""
    holder = lease_holder(store)
    if holder is not None and holder.process != ProcessId.current():
        raise StoreError(
            f"dataset {store.url} is held by run {holder.run} (pid {holder.process.pid} on {holder.process.host}); "
            "clean it when that run is over"
        )
    if dry_run or holder is not None:
        yield
        return
    with Lease.acquire(store, "clean"):
        yield


def unreferenced(store: Store, current: Mapping[str, Any]) -> list[tuple[str, int]]:
    """(name, bytes) of every file that nothing names, sorted by name.

    That is: temporary files; tars in `media` that no rows file names; column files below the newest of their shard;
    verdict files. Files and folders that any string in `current` names stay. Whole column sets stay: a later recipe may
    use them again.
    """
    named = set(_strings(current))
    files = dict(_walk(store, ""))
    doubtful = [name for name in files if name.startswith(("media/", "verdicts/"))]
    newest = _newest_column_files(files)
    doubtful += [n for n in files if (shard := _column_shard(n)) is not None and n != newest[shard][1]]
    referred = _media_named_by_rows(store, files)
    loose = [n for n in files if n.rpartition("/")[2].startswith(TEMPORARY)]
    loose += [n for n in doubtful if n not in referred and not (named & set(_and_parents(n)))]
    return [(name, files[name]) for name in sorted(set(loose))]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value.rstrip("/")
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _and_parents(name: str) -> list[str]:
    """`a/b/c` → itself and `a/b`; never the top folder, which would keep all of it."""
    parts = name.split("/")
    return ["/".join(parts[:i]) for i in range(2, len(parts) + 1)]


def _walk(store: Store, folder: str) -> Iterator[tuple[str, int]]:
    for entry, size in store.entries(folder):
        name = f"{folder}/{entry}" if folder else entry
        if size is None:
            yield from _walk(store, name)
        else:
            yield name, size


def _column_shard(name: str) -> tuple[str, int] | None:
    match = re.fullmatch(r"columns/([^/]+)/(\d+)\.c\d+\.parquet", name)
    return (match[1], int(match[2])) if match else None


def _newest_column_files(files: Mapping[str, int]) -> dict[tuple[str, int], tuple[int, str]]:
    newest: dict[tuple[str, int], tuple[int, str]] = {}
    for name in files:
        shard = _column_shard(name)
        if shard is not None:
            number = int(name.rsplit(".c", 1)[1].removesuffix(".parquet"))
            newest[shard] = max(newest.get(shard, (-1, "")), (number, name))
    return newest


def _media_named_by_rows(store: Store, files: Mapping[str, int]) -> set[str]:
    """Every media file that any generation of any rows file names; a torn rows file raises, so nothing is guessed."""
    named: set[str] = set()
    for name in files:
        if re.fullmatch(r"rows/[^./][^/]*\.parquet", name):
            with_paths = [c for c in store.column_names(name) if c.endswith("_path")]
            table = store.read_table(name, with_paths)
            for column in table.columns:
                named.update(v for v in pc.unique(column).to_pylist() if isinstance(v, str))
    return named
