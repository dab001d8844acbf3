"""Arrays that lie in scratch: what they hold, that they are a file's, that they leave nothing, and a full disk."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mmdata.errors import StoreError
from mmdata.groups import equal_hashes
from mmdata.groups.equal_hashes import collapse
from mmdata.groups.mapped import IN_MEMORY, Mapped, count_up, gathered, stretches

LONG = 5_000_000  # of 8 bytes


def memory_mb(kind: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(re.findall(rf"{kind}:\s+(\d+) kB", status)[0]) / 1024


def test_a_long_array_is_a_files(tmp_path: Path):
    before = memory_mb("RssAnon"), memory_mb("RssFile")
    array = count_up(Mapped(tmp_path).array(np.int64, LONG))
    assert memory_mb("RssAnon") - before[0] < 10
    assert memory_mb("RssFile") - before[1] > 35
    assert int(array.sum()) == LONG * (LONG - 1) // 2
    assert list(tmp_path.iterdir()) == []  # it has no name


@pytest.mark.parametrize("rows", [0, 1, 2_500_000])
def test_what_grows_holds_what_was_added(tmp_path: Path, rows: int):
    expected = np.random.default_rng(rows).integers(0, 2**63, rows)
    for mapped in (IN_MEMORY, Mapped(tmp_path)):
        with mapped.growing(np.int64) as found:
            for some in stretches(rows):
                found.append(expected[some])
            array = found.array()
        assert np.array_equal(array, expected)
        array.sort()
        assert np.array_equal(gathered(mapped, array, np.argsort(np.argsort(expected))), expected)


def test_what_is_lent_is_lent_again(tmp_path: Path):
    mapped = Mapped(tmp_path)
    with mapped.lent(np.uint64, LONG) as one, mapped.lent(np.uint64, LONG) as other:
        one[:], other[:] = 1, 2
        assert (int(one[-1]), int(other[-1])) == (1, 2)
    with mapped.lent(np.uint64, LONG - 5) as again:
        assert len(again) == LONG - 5
        assert int(again[0]) in (1, 2)


@pytest.fixture
def _no_large_files() -> Iterator[None]:
    """What a full disk is to a write: an error of the system's."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 << 20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("_no_large_files")
def test_a_full_disk_is_told(tmp_path: Path):
    with pytest.raises(StoreError, match=r"cannot write scratch in .*; make room there, or set MMDATA_SCRATCH"):
        Mapped(tmp_path).array(np.int64, LONG)
    with Mapped(tmp_path).growing(np.int64) as found, pytest.raises(StoreError, match="cannot write scratch"):
        found.append(np.zeros(LONG, np.int64))


@pytest.mark.parametrize("bucket", [1 << 20, 100, 7])
def test_equal_hashes_are_one(tmp_path: Path, bucket: int, monkeypatch: pytest.MonkeyPatch):
    """Against a dictionary; 300 of 1,000 rows have one hash, some have none."""
    monkeypatch.setattr(equal_hashes, "_BUCKET", bucket)
    rng = np.random.default_rng(bucket)
    hashes = rng.integers(0, 2**64, 400, np.uint64)[rng.integers(0, 400, 1000)]
    hashes[rng.permutation(1000)[:300]] = 5
    there = rng.random(1000) < 0.9
    numbers: dict[int, int] = {}
    which = [
        numbers.setdefault(value, len(numbers)) if is_there else -1
        for value, is_there in zip(hashes.tolist(), there.tolist(), strict=True)
    ]
    found = collapse(hashes, there, Mapped(tmp_path))
    assert found.which.tolist() == which
    assert found.hashes.tolist() == list(numbers)
    assert found.where.tolist() == [which.index(n) for n in range(len(numbers))]
