"""Many embeddings at a time: rows of length 1, and which of many others is closest to each.

In: a fixed-size list column of floats, or arrays of them. Out: numpy. The numbers are the same for any number of
threads: products are computed in tiles whose shapes depend on the input alone, each by one thread; cosines that are
handed out are sums in float64 of one row at a time, so that equal rows have equal cosines wherever they stand. Fails:
nothing but what `require_embedding` refuses before.

A vector that holds NaN or an infinity, or whose numbers are all 0, has no direction and counts as missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = [
    "Rows",
    "Vectors",
    "cosines_of",
    "in_threads",
    "nearest",
    "spans",
    "take_better",
    "unit_rows_of",
    "vectors_of",
]

Rows = npt.NDArray[np.float32]
Vectors = npt.NDArray[np.floating[Any]]
_TILE = 1024  # rows and columns of one product


def vectors_of(column: pa.ChunkedArray) -> Vectors:
    """(N, D) in the column's own float type, without a copy where the column is one chunk; NaN where it is NULL."""
    width = column.type.list_size
    found = []
    for chunk in column.chunks:
        values = chunk.values.slice(chunk.offset * width, len(chunk) * width).to_numpy(zero_copy_only=False)
        rows: Vectors = values.reshape(len(chunk), width)
        if chunk.null_count:
            rows = rows.copy()
            rows[chunk.is_null().to_numpy(zero_copy_only=False)] = np.nan
        found.append(rows)
    if len(found) == 1:
        return found[0]
    whole: Vectors = np.concatenate([np.zeros((0, width), column.type.value_type.to_pandas_dtype()), *found])
    return whole


def unit_rows_of(vectors: Vectors) -> tuple[Rows, npt.NDArray[np.bool_]]:
    """(N, D) float32 of length 1, zeros for rows without a direction; and (N,) whether they have one."""
    found, there = np.empty(vectors.shape, np.float32), np.empty(len(vectors), bool)
    for start, stop in spans(len(vectors), _TILE):
        wide = vectors[start:stop].astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            length = np.sqrt((wide * wide).sum(axis=1))
        usable = np.isfinite(length) & (length > 0)
        wide[~usable] = 0
        wide /= np.where(usable, length, 1)[:, None]
        found[start:stop], there[start:stop] = wide, usable
    return found, there


def cosines_of(left: Rows, right: Rows) -> Rows:
    """(N,) float32 in [-1, 1]: cosine of row i and row i, 0 where one has length 0; 1 for equal rows."""
    found = np.zeros(len(left), np.float32)
    for start, stop in spans(len(left), _TILE):
        one, other = left[start:stop].astype(np.float64), right[start:stop].astype(np.float64)
        length = np.sqrt((one * one).sum(axis=1) * (other * other).sum(axis=1))
        cosine = (one * other).sum(axis=1) / np.where(length > 0, length, 1)
        found[start:stop] = np.clip(cosine, -1, 1)
    return found


def nearest(rows: Rows, others: Rows, threads: int) -> npt.NDArray[np.int64]:
    """(N,) index of the other row with the largest inner product, the first of several; `others` has one at least."""
    found = np.empty(len(rows), np.int64)

    def look(span: tuple[int, int]) -> None:
        start, stop = span
        best = np.full(stop - start, -np.inf, np.float32)
        for first, last in spans(len(others), _TILE):
            take_better(rows[start:stop] @ others[first:last].T, first, best, found[start:stop])

    in_threads(look, spans(len(rows), _TILE), threads)
    return found


def take_better(products: Rows, first: int, best: npt.NDArray[np.float32], which: npt.NDArray[np.int64]) -> None:
    """Where a row of `products` (columns `first`, …) has a larger one than `best`, note it and its column."""
    column = products.argmax(axis=1)
    value = products[np.arange(len(products)), column]
    better = value > best
    best[better], which[better] = value[better], first + column[better]


def spans(rows: int, size: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of `size` rows each, the last one shorter."""
    return ((start, min(start + size, rows)) for start in range(0, rows, size))


def in_threads(work: Callable[[Any], None], items: Iterable[Any], threads: int) -> None:
    """Do every item, `threads` at a time, each product within one thread."""
    with _one_thread_products(), ThreadPoolExecutor(max(1, threads)) as pool:
        for done in pool.map(work, items):
            assert done is None


@contextmanager
def _one_thread_products() -> Iterator[None]:
    with _libraries().limit(limits=1, user_api="blas"):
        yield


@cache
def _libraries() -> Any:
    """The BLAS libraries of this process; numpy's is there from the start."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
