"""`mmdata clean`: removes from a dataset folder what no selection needs, and says how much of each kind that frees.

In: a store. Out: what goes, as (name, bytes). Needed is what a selection names, what an unfinished run was computing,
the newest file of every shard where a later run goes on from it, and the media that rows name. StoreError, and nothing
is removed, when a file of rows is torn or another process holds the dataset.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.compute as pc

from mmdata.computing import sets_being_computed
from mmdata.coverage_segments import FOLDER, replaced_segments
from mmdata.errors import StoreError
from mmdata.host_state import older_host_files
from mmdata.lease import Lease, ProcessId, lease_holder
from mmdata.ledger import dataset_document
from mmdata.local_disk import TEMPORARY
from mmdata.scratch import stale_scratch
from mmdata.selections import Current, forget, load_selections
from mmdata.store import Store
from mmdata.work import journal_folder

__all__ = ["GRACE_S", "by_kind", "clean", "unreferenced"]

# A worker that outlived its driver may still be about to name what it has written.
GRACE_S = 3600.0
_REQUESTS_AT_ONCE = 32


def clean(
    store: Store, *, dry_run: bool = False, grace_s: float = GRACE_S, forgotten: str | None = None
) -> list[tuple[str, int]]:
    """Remove what `unreferenced` lists, and what dead processes left in this host's scratch; returns (name, bytes).

    Files that were written less than `grace_s` seconds ago, by the store's clock, stay, and so do uploads in parts that
    were begun since. `forgotten` names a selection that is dropped first. `dry_run` only lists. StoreError, and nothing
    is removed, while another process holds the dataset; RecipeError when there is no selection of that name.
    """
    if not store.entries(""):
        raise StoreError(f"there is no dataset at {store.url}; check the path")
    with _held(store, dry_run) as lease:
        selections = load_selections(store)[0]
        if forgotten is not None and (forgotten in selections or not sets_being_computed(store, forgotten)[1]):
            selections = forget(store, forgotten, lease.hold if lease is not None else _nobody_else, dry_run)
        until = _now(store, dry_run) - grace_s
        found = _written_before(store, unreferenced(store, selections, forgotten), until)
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


def by_kind(removed: Iterable[tuple[str, int]]) -> dict[str, tuple[int, int]]:
    """Kind (media, rows, columns, verdicts, state, temporary, scratch) → (files, bytes), the largest first."""
    files: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for name, size in removed:
        kind = "scratch" if name.startswith("/") else name.partition("/")[0]
        kind = "temporary" if any(part.startswith(TEMPORARY) for part in name.split("/")) else kind
        files[kind] += 1
        sizes[kind] += size
    return {kind: (files[kind], sizes[kind]) for kind in sorted(files, key=lambda k: (-sizes[k], k))}


def _nobody_else() -> None:
    """For when this process holds the dataset itself."""


def _journals(store: Store) -> list[Path]:
    """The folder of this dataset's journals on this host, if there is one: whoever kept them is done or dead."""
    document = dataset_document(store)
    folder = None if document is None else journal_folder(document.id)
    return [folder] if folder is not None and folder.is_dir() and any(folder.iterdir()) else []


@contextlib.contextmanager
def _held(store: Store, dry_run: bool) -> Iterator[Lease | None]:
    """The lease, unless this process holds it already or nothing will be removed."""
    holder = lease_holder(store)
    if holder is not None and holder.process != ProcessId.current():
        raise StoreError(
            f"dataset {store.url} is held by run {holder.run} (pid {holder.process.pid} on {holder.process.host}); "
            "clean it when that run is over"
        )
    if dry_run or holder is not None:
        yield None
        return
    with Lease.acquire(store, "clean") as lease:
        yield lease


def unreferenced(
    store: Store, selections: Mapping[str, Current], forgotten: str | None = None
) -> list[tuple[str, int]]:
    """(name, bytes) of every file that nothing needs, sorted by name.

    That is: temporary files; base rows and column files that have a newer one and that no selection names; column sets
    that no selection has and no unfinished run was computing; verdicts that no selection names; media that no rows
    name; superseded files of `state`. Before the first run has finished, whole column sets stay.
    """
    files = dict(_walk(store, ""))
    named = {name for current in selections.values() for name in _names(current)}
    computing, stale = sets_being_computed(store, forgotten)
    sets = computing | {s for current in selections.values() for s in current.set_names}
    loose = {n for n in files if any(part.startswith(TEMPORARY) for part in n.split("/"))} | stale
    newest = set(_newest(files))
    for name in files:
        kind, _, rest = name.partition("/")
        is_whole_set_loose = kind == "columns" and bool(selections) and rest.partition("/")[0] not in sets
        is_old = _NUMBERED.fullmatch(name) is not None and (name not in newest or is_whole_set_loose)
        if name not in named and (is_old or kind == "verdicts" or name.startswith("state/selection-")):
            loose.add(name)
    segments = [n for n in files if n.startswith(f"{FOLDER}/") and n not in loose]
    loose |= replaced_segments(store, segments) | older_host_files(store, files)
    stay = [n for n in files if n.startswith("rows/") and _NUMBERED.fullmatch(n) and n not in loose]
    media = _media_named_by_rows(store, stay)
    loose |= {n for n in files if n.startswith("media/") and n not in media}
    return [(name, files[name]) for name in sorted(loose & set(files))]


def _names(current: Current) -> Iterator[str]:
    """Every file that a selection names, its own list too."""
    yield current.files
    for files in (current.rows, current.verdicts, *current.sets.values()):
        yield from files


def _walk(store: Store, folder: str) -> Iterator[tuple[str, int]]:
    for entry, size in store.entries(folder):
        name = f"{folder}/{entry}" if folder else entry
        if size is None:
            yield from _walk(store, name)
        else:
            yield name, size


_NUMBERED = re.compile(r"(rows|columns/[^/]+)/(\d+)\.[gc](\d+)\.parquet")


def _newest(files: Mapping[str, int]) -> list[str]:
    """The files of rows and columns with the highest number of their shard."""
    newest: dict[tuple[str, int], tuple[int, str]] = {}
    for name in files:
        match = _NUMBERED.fullmatch(name)
        if match is not None:
            key = match[1], int(match[2])
            newest[key] = max(newest.get(key, (-1, "")), (int(match[3]), name))
    return [name for _, name in newest.values()]


def _media_named_by_rows(store: Store, rows_files: Iterable[str]) -> set[str]:
    """Every media file that these rows files name; a torn one raises, so nothing is guessed."""
    named: set[str] = set()
    for name in rows_files:
        with_paths = [c for c in store.column_names(name) if c.endswith("_path")]
        table = store.read_table(name, with_paths)
        for column in table.columns:
            named.update(v for v in pc.unique(column).to_pylist() if isinstance(v, str))
    return named
