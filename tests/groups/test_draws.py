"""Draws of rows: the hashes that they are said to be, by the hashes' own libraries."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pytest
import xxhash

from mmdata.groups.draws import row_words, text_word, uniform


def test_a_row_is_its_uid_by_xxh64_and_any_other_text_by_blake2b():
    uids = ["0123456789abcdef" * 2, "short", None, "f" * 32, "é" * 16, ""]
    rows = pa.table({"uid": uids, "row_id": pa.array(range(70, 76), pa.int64())})
    expected = [
        xxhash.xxh64_intdigest(uids[0].encode()),
        int.from_bytes(blake2b(b"short", digest_size=8).digest(), "little"),
        int.from_bytes(blake2b(b"72", digest_size=8).digest(), "little"),
        xxhash.xxh64_intdigest(b"f" * 32),
        xxhash.xxh64_intdigest(("é" * 16).encode()),
        int.from_bytes(blake2b(b"", digest_size=8).digest(), "little"),
    ]
    assert row_words(rows).tolist() == expected
    chunked = pa.concat_tables([rows.slice(i, 1) for i in range(6)])
    assert row_words(chunked).tolist() == expected
    assert row_words(rows.slice(3)).tolist() == expected[3:]
    assert row_words(rows.slice(0, 0)).tolist() == []


def test_a_number_is_the_hash_of_row_and_concept():
    words = [np.array([1, 2**63 + 5], np.uint64), np.full(2, text_word("dog"), np.uint64)]
    found = uniform(9, *words)
    for row, number in zip(zip(*words, strict=True), found.tolist(), strict=True):
        data = b"".join(int(w).to_bytes(8, "little") for w in row)
        assert number == ((xxhash.xxh64_intdigest(data, seed=9) >> 12) + 0.5) / 2**52


def test_no_hash_gives_0_or_1(monkeypatch: pytest.MonkeyPatch):
    """At 1 a row of the smallest chance would never be taken, and one of chance 1 would not be kept."""
    largest = np.array([0, 2**64 - 1], np.uint64)
    monkeypatch.setitem(uniform.__globals__, "xxh64", lambda words, seed: largest)
    least, most = uniform(0, largest)
    assert 0 < least < 2**-52
    assert 1 - 2**-52 < most < 1


def test_numbers_fill_the_interval_evenly():
    """A thousand bins of a million numbers: Pearson's statistic within ten standard deviations of its mean."""
    counts = np.bincount((uniform(3, np.arange(1_000_000, dtype=np.uint64)) * 1000).astype(int), minlength=1000)
    statistic = ((counts - 1000) ** 2 / 1000).sum()
    assert abs(statistic - 999) < 10 * (2 * 999) ** 0.5
