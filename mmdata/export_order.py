"""In what order an export takes the kept rows: that of the dataset, or shuffled by a hash of seed and row_id.

In: tables of rows, one a shard, with the column `row_id`. Out: the same rows as a stream of tables in the order asked
for, which is a function of the seed and the row_ids alone. Memory: 16 shards for `buffer`; for `full` a part of
`_BUCKET_BYTES` or so, the rest lies in a scratch folder. Fails only where the disk does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = ["NEIGHBOURS", "chosen", "hashes", "ordered", "splitmix64"]

NEIGHBOURS = 16  # shards that a buffer holds
_BUCKET_BYTES = 64 << 20
_MOST_BUCKETS = 256  # files open at once

Words = npt.NDArray[np.uint64]


def splitmix64(state: Words | int) -> Words:
    """Uint64 of the same shape: SplitMix64's output for each state (Steele, Lea and Flood 2014, figure 16)."""
    with np.errstate(over="ignore"):
        z = np.atleast_1d(np.asarray(state, np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(z ^ (z >> np.uint64(31)), np.uint64)


def hashes(values: npt.NDArray[np.int64], *seeds: int) -> Words:
    """A hash for each of `values` (int64), keyed by all of `seeds` in their order."""
    key = np.zeros(1, np.uint64)
    for seed in seeds:
        key = splitmix64(key ^ np.uint64(seed))
    return splitmix64(values.astype(np.int64).view(np.uint64) ^ key)


def chosen(row_ids: npt.NDArray[np.int64], count: int, *seeds: int) -> npt.NDArray[np.bool_]:
    """A mask of exactly `count` of the rows: those with the smallest hashes, ties by position."""
    keys = hashes(row_ids, *seeds)
    mask = np.zeros(len(keys), bool)
    if count:
        last = np.partition(keys, count - 1)[count - 1]
        mask = keys < last
        ties = np.flatnonzero(keys == last)
        mask[ties[: count - int(mask.sum())]] = True
    return mask


def ordered(
    shards: Sequence[int],
    read: Callable[[int], pa.Table],
    shuffle: Literal["none", "buffer", "full"],
    seeds: Sequence[int],
    scratch: Path,
    total_bytes: int,
) -> Iterator[pa.Table]:
    """All rows of `read(shard)` for each of `shards`, in order; `total_bytes` is about what they take in memory.

    `buffer` puts the shards into an order of their own, and the rows of each `NEIGHBOURS` of them by their hashes;
    `full` puts all rows by their hashes. Ties go by row_id. `scratch` must be empty and is left empty.
    """
    if shuffle == "none":
        yield from map(read, shards)
    elif shuffle == "buffer":
        numbers = np.asarray(shards, np.int64)
        numbers = numbers[np.lexsort((numbers, hashes(numbers, *seeds)))]
        for start in range(0, len(numbers), NEIGHBOURS):
            group = [read(int(shard)) for shard in numbers[start : start + NEIGHBOURS]]
            yield _by_hash(pa.concat_tables(group), seeds)
    else:
        yield from _all_by_hash(shards, read, seeds, scratch, total_bytes)


def _row_ids(table: pa.Table) -> npt.NDArray[np.int64]:
    return np.asarray(table.column("row_id").to_numpy(), np.int64)


def _by_hash(table: pa.Table, seeds: Sequence[int]) -> pa.Table:
    ids = _row_ids(table)
    return table.take(pa.array(np.lexsort((ids, hashes(ids, *seeds)))))


def _all_by_hash(
    shards: Sequence[int],
    read: Callable[[int], pa.Table],
    seeds: Sequence[int],
    scratch: Path,
    total_bytes: int,
) -> Iterator[pa.Table]:
    """A sort by hash in two passes: rows go to files by the first bits of their hashes, then each file is sorted."""
    bits = min(max(total_bytes // _BUCKET_BYTES, 0).bit_length(), _MOST_BUCKETS.bit_length() - 1)
    if not bits:
        tables = [read(shard) for shard in shards]
        if tables:
            yield _by_hash(pa.concat_tables(tables), seeds)
        return
    paths = [scratch / f"bucket-{n}.arrow" for n in range(1 << bits)]
    _scatter(shards, read, seeds, paths, bits)
    for path in paths:
        if path.exists():
            with pa.OSFile(str(path)) as file:
                table = pa.ipc.open_stream(file).read_all()
            path.unlink()
            yield _by_hash(table, seeds)


def _scatter(
    shards: Sequence[int], read: Callable[[int], pa.Table], seeds: Sequence[int], paths: Sequence[Path], bits: int
) -> None:
    writers: dict[int, pa.RecordBatchStreamWriter] = {}
    try:
        waiting: list[pa.Table] = []
        for number, shard in enumerate(shards):
            waiting.append(read(shard))
            if number + 1 < len(shards) and sum(t.nbytes for t in waiting) < _BUCKET_BYTES:
                continue
            table, waiting = pa.concat_tables(waiting), []
            buckets = hashes(_row_ids(table), *seeds) >> np.uint64(64 - bits)
            order = np.argsort(buckets, kind="stable")
            ends = np.searchsorted(buckets[order], np.arange(len(paths), dtype=np.uint64), side="right")
            table = table.take(pa.array(order)).combine_chunks()
            start = 0
            for bucket, end in enumerate(ends.tolist()):
                if end > start:
                    if bucket not in writers:
                        writers[bucket] = pa.ipc.new_stream(str(paths[bucket]), table.schema)
                    writers[bucket].write_table(table.slice(start, end - start))
                start = end
    finally:
        for writer in writers.values():
            writer.close()
