"""Column files: what one stage computed for one shard, beside the media; also the one way mmdata writes Parquet.

A column file has `row_id`, the stage's own columns and `reason`, one row per base row, in base order. `reason` is NULL
where the row was computed, `uncovered` where nobody asked for it, `!<kind>` for a transient error, else a permanent
error kind. A row is *covered* when it was computed or failed for good. Coverage only grows: a larger one is the next
c-file, which holds every earlier covered row unchanged, and the highest number wins.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmdata import local_disk
from mmdata.columns import FORMAT_VERSION
from mmdata.errors import StoreError

if TYPE_CHECKING:
    from mmdata.store import Store

__all__ = [
    "PARQUET",
    "UNCOVERED",
    "ColumnFile",
    "ColumnFooter",
    "canonical_json",
    "covered_digest",
    "covered_mask",
    "newest_numbered",
    "open_parquet",
    "publish_columns",
    "read_footer",
    "shard_name",
    "write_column_file",
    "write_parquet",
]

UNCOVERED = "uncovered"

# Every Parquet file of mmdata is written with these, so that equal tables make equal bytes under one lock file.
PARQUET: dict[str, Any] = {
    "version": "2.6",
    "compression": "zstd",
    "compression_level": 3,
    "use_dictionary": True,
    "write_statistics": True,
    "store_schema": True,
    "data_page_version": "1.0",
}


@dataclass(frozen=True)
class ColumnFile:
    """The newest column file of one shard: its `name` in the dataset, c-number, and what its footer says."""

    name: str
    number: int
    rows: int
    covered: int
    digest: str  # covered_digest of the covered row_ids
    hash: str = ""  # the stage's full identity hash


@dataclass(frozen=True)
class ColumnFooter:
    """What a column file says of itself: `identity` is canonical JSON, `hash` its sha256, the rest its rows."""

    identity: str
    hash: str
    rows: int = 0
    covered: int = 0
    digest: str = ""
    format: int = FORMAT_VERSION

    @classmethod
    def of(cls, identity: str) -> ColumnFooter:
        """A footer still without rows, for a stage's canonical identity JSON."""
        return cls(identity, hashlib.sha256(identity.encode()).hexdigest())

    def describe(self, table: pa.Table) -> ColumnFooter:
        """This identity with the rows, covered count and digest of `table`."""
        covered = covered_mask(table)
        ids = table.column("row_id").to_numpy()[covered]
        return replace(self, rows=len(table), covered=int(covered.sum()), digest=covered_digest(ids))

    def to_metadata(self) -> dict[str, str]:
        """Parquet key-value metadata."""
        return {
            "mmdata.format": str(self.format),
            "mmdata.identity": self.identity,
            "mmdata.hash": self.hash,
            "mmdata.rows": str(self.rows),
            "mmdata.covered": str(self.covered),
            "mmdata.covered_sha256": self.digest,
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], where: str) -> ColumnFooter:
        """Back from key-value metadata (with `num_rows`, as `Store.footer` gives it).

        Raises StoreError, naming `where`, when the file is not a column file of this format or its counts disagree.
        """
        try:
            footer = cls(
                identity=metadata["mmdata.identity"],
                hash=metadata["mmdata.hash"],
                rows=int(metadata["mmdata.rows"]),
                covered=int(metadata["mmdata.covered"]),
                digest=metadata["mmdata.covered_sha256"],
                format=int(metadata["mmdata.format"]),
            )
        except (KeyError, ValueError) as error:
            raise StoreError(
                f"{where} is not a column file of mmdata (its footer lacks {error}); move it out of the dataset"
            ) from error
        if footer.format != FORMAT_VERSION:
            raise StoreError(
                f"{where} has format {footer.format}, this mmdata reads {FORMAT_VERSION}; use the mmdata that wrote it"
            )
        if str(footer.rows) != metadata["num_rows"]:
            raise StoreError(
                f"{where} holds {metadata['num_rows']} rows, its footer says {footer.rows}; remove it and run again"
            )
        return footer


def shard_name(shard: int) -> str:
    """`5` → `00005`; more digits when there are more shards."""
    return f"{shard:05d}"


def covered_digest(row_ids: npt.NDArray[np.int64]) -> str:
    """The sha256, in hex, of the sorted row_ids as little-endian int64."""
    return hashlib.sha256(np.sort(np.asarray(row_ids, "<i8")).tobytes()).hexdigest()


def covered_mask(table: pa.Table) -> npt.NDArray[np.bool_]:
    """(N,) bool: computed (reason NULL) or failed for good; False for `uncovered` and `!<kind>`."""
    reason = table.column("reason")
    open_rows = pc.or_(pc.equal(reason, UNCOVERED), pc.starts_with(reason, "!"))
    return ~np.asarray(pc.fill_null(open_rows, False).to_numpy(), bool)


def write_parquet(
    table: pa.Table, path: Path, metadata: Mapping[str, str] | None = None, row_group_rows: int | None = None
) -> None:
    """Write `table` to a local file; equal tables and metadata give equal bytes, however the table is chunked.

    `metadata` replaces the schema's own. `row_group_rows`: rows of one row group, None = one group (up to 2^20 rows).
    StoreError when the disk is full or the folder cannot be written.
    """
    plain = table.combine_chunks().replace_schema_metadata(dict(metadata) if metadata else None)
    try:
        pq.write_table(plain, path, row_group_size=row_group_rows or 1 << 20, **{**PARQUET, **_dictionaries(plain)})
    except OSError as error:
        todo = local_disk.what_to_do(error, plain.nbytes, str(path.parent))
        raise StoreError(f"cannot write {path}: {todo}") from error


def _dictionaries(table: pa.Table) -> dict[str, Any]:
    """Numbers of embeddings and signatures hardly repeat: looking for those that do takes longer than writing them."""
    vectors = [f.name for f in table.schema if pa.types.is_fixed_size_list(f.type)]
    return {"use_dictionary": [n for n in table.column_names if n not in vectors]} if vectors else {}


def write_column_file(path: Path, table: pa.Table, footer: ColumnFooter) -> ColumnFooter:
    """Write a column file to a local path; the footer's counts are taken from `table`. Returns the footer written."""
    _check_column_table(table, str(path))
    filled = footer.describe(table)
    write_parquet(table, path, filled.to_metadata())
    return filled


def _check_column_table(table: pa.Table, where: str) -> None:
    names = table.column_names
    if not names or names[0] != "row_id" or names[-1] != "reason" or len(set(names)) != len(names):
        raise StoreError(f"{where}: a column file has row_id, the stage's columns and reason, once each; got {names}")
    types = table.schema.field("row_id").type, table.schema.field("reason").type
    if types != (pa.int64(), pa.string()) or table.column("row_id").null_count:
        raise StoreError(f"{where}: row_id must be int64 without NULL and reason a string; got {types[0]}, {types[1]}")


def read_footer(store: Store, name: str) -> ColumnFile:
    """What the footer of one column file says; StoreError when the file is torn or foreign."""
    match = re.search(r"\.c(\d+)\.parquet$", name)
    if match is None:
        raise StoreError(f"{name} of {store.url} is not named like a column file (00000.c0.parquet)")
    footer = ColumnFooter.from_metadata(store.footer(name), f"{name} of {store.url}")
    return ColumnFile(name, int(match[1]), footer.rows, footer.covered, footer.digest, footer.hash)


def publish_columns(
    store: Store,
    set_name: str,
    shard: int,
    table: pa.Table,
    footer_base: ColumnFooter,
    after: ColumnFile | Literal["listing"] | None = "listing",
) -> ColumnFile:
    """Publish what was computed for a shard as its next c-file, merged with what is there; returns the newest file.

    `table`: row_id, the stage's own columns, reason; the shard's rows in base order. Rows covered by an earlier file
    keep its values and reason; `table` counts only where the earlier file is not covered. Writes nothing when that
    changes nothing. `after` is the newest file the caller knows of (None: there was none), so that a folder of many
    shards need not be listed for each; what others published since is found by its number. StoreError when the earlier
    file has other rows, another schema or another identity.
    """
    _check_column_table(table, f"columns/{set_name}, shard {shard_name(shard)}")
    newest = store.newest_column_file(set_name, shard) if after == "listing" else after
    while True:
        merged, number = table, 0
        if newest is not None:
            if newest.hash != footer_base.hash:
                raise StoreError(
                    f"{newest.name} of {store.url} was computed under identity {newest.hash[:16]}, this run has "
                    f"{footer_base.hash[:16]}; move the folder of that set away and run again"
                )
            grown = _merge(store.read_table(newest.name), table, f"{newest.name} of {store.url}")
            if grown is None:
                return newest
            merged, number = grown, newest.number + 1
        name = f"columns/{set_name}/{shard_name(shard)}.c{number}.parquet"
        with store.scratch() as folder:
            local = folder / "columns.parquet"
            footer = write_column_file(local, merged, footer_base)
            if store.commit(name, local):
                return ColumnFile(name, number, footer.rows, footer.covered, footer.digest, footer.hash)
        # Another writer published this number first: merge from its file. It made progress, so this loop ends.
        newest = read_footer(store, name)


def _merge(earlier: pa.Table, ours: pa.Table, where: str) -> pa.Table | None:
    """`earlier` with the rows of `ours` that it did not cover; None when nothing changes."""
    if earlier.schema.remove_metadata() != ours.schema.remove_metadata():
        raise StoreError(
            f"{where} has the columns {earlier.schema.names}, types {[str(t) for t in earlier.schema.types]}; this run "
            f"has {ours.schema.names}, {[str(t) for t in ours.schema.types]}; the stage changed its columns without a "
            "new version: raise its version"
        )
    if not earlier.column("row_id").combine_chunks().equals(ours.column("row_id").combine_chunks()):
        raise StoreError(f"{where} has other row_ids than the rows of its shard; remove it and run again")
    # A transient error says more than `uncovered`: a writer that never asked for the row does not erase it.
    ours_says_something = pc.fill_null(pc.not_equal(ours.column("reason"), UNCOVERED), True).to_numpy()
    take = ~covered_mask(earlier) & ours_says_something
    rows = len(earlier)
    choice = np.where(take, np.arange(rows) + rows, np.arange(rows))
    merged = pa.concat_tables([earlier.replace_schema_metadata(None), ours.replace_schema_metadata(None)]).take(choice)
    nothing_new = not (covered_mask(ours) & take).any()
    if nothing_new and merged.column("reason").combine_chunks().equals(earlier.column("reason").combine_chunks()):
        return None
    return merged


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces, as identities are hashed; ValueError on NaN and infinities."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def newest_numbered(names: Iterable[str], folder: str, letter: str, where: str) -> dict[int, tuple[int, str]]:
    """Shard → (number, `<folder>/<name>`) of its newest file, by number; StoreError for a name that is none of ours."""
    pattern = re.compile(rf"(\d{{5,}})\.{letter}(\d+)\.parquet")
    newest: dict[int, tuple[int, str]] = {}
    for name in names:
        match = pattern.fullmatch(name)
        if match is None:
            raise StoreError(
                f"{folder}/{name} of {where} is not a file of mmdata (00000.{letter}0.parquet is); move it away"
            )
        shard, number = int(match[1]), int(match[2])
        if number >= newest.get(shard, (0, ""))[0]:
            newest[shard] = (number, f"{folder}/{name}")
    return dict(sorted(newest.items()))


def open_parquet(source: Any, where: str) -> pq.ParquetFile:
    """A Parquet file by path or as a file object; StoreError, which begins with `where`, when it is torn."""
    try:
        # For ranges of an object the wanted column chunks are asked for together.
        return pq.ParquetFile(source, pre_buffer=isinstance(source, pa.PythonFile))
    except (OSError, pa.ArrowException) as error:
        raise StoreError(f"{where} is not a whole Parquet file: {error}; remove it and run again") from error
