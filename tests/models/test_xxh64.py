"""Bit for bit what the xxhash package gives."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash

from mmdata.models.xxh64 import xxh64


@pytest.mark.parametrize("kind", [np.uint32, np.uint64])
@pytest.mark.parametrize("width", range(1, 20))
@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
def test_equals_the_xxhash_package(kind: type, width: int, seed: int):
    rows = np.random.default_rng(width).integers(0, np.iinfo(kind).max, (20, width), kind, endpoint=True)
    rows[0], rows[1] = 0, np.iinfo(kind).max
    expected = [xxhash.xxh64_intdigest(row.astype(row.dtype.newbyteorder("<")).tobytes(), seed) for row in rows]
    assert xxh64(list(rows.T), seed).tolist() == expected


def test_no_records():
    assert xxh64([np.empty(0, np.uint64)] * 5).tolist() == []


def test_other_numbers_are_refused():
    with pytest.raises(ValueError, match="int64"):
        xxh64([np.zeros(2, np.int64)])
    with pytest.raises(ValueError, match="uint32"):
        xxh64([np.zeros(2, np.uint32), np.zeros(2, np.uint64)])
