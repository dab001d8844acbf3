"""near_duplicates over rows in files: its anonymous memory does not grow with them.

Peaks are of a process that does nothing else, which looks at so few rows together that a value per row would show.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

_RUN = """
import re, sys, tempfile, threading
from pathlib import Path
import numpy as np
import pyarrow.parquet as pq
from mmdata.groups import equal_hashes, hamming, mapped, near_pairs
from mmdata.groups.near_duplicates import NearDuplicates, NearDuplicatesOptions

equal_hashes._BUCKET = near_pairs._ROWS = hamming._TOGETHER = 1 << 13
mapped._SHORT_BYTES, mapped._STRETCH = 1 << 14, 1 << 12

class Files:
    def __init__(self, folder, older=None):
        self.paths, self.older = sorted(Path(folder).glob("*.parquet")), older
    def __len__(self):
        return sum(pq.ParquetFile(p).metadata.num_rows for p in self.paths)
    def parts(self, columns):
        return (pq.read_table(p, columns=["row_id", *columns]) for p in self.paths)
    def visit_order_in(self, scratch):
        order = mapped.Mapped(scratch).array(np.int64, len(self))  # the last comes first
        for some in mapped.stretches(len(self)):
            order[some] = len(self) - 1 - np.arange(some.start, some.stop)
        return order

peak, done = 0, threading.Event()

def anonymous():
    with open("/proc/self/status") as status:
        return int(re.search(r"RssAnon:\\s+(\\d+)", status.read())[1])

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())

_, folder, few, link = sys.argv
with tempfile.TemporaryDirectory() as scratch:
    for path in (few, folder):  # once before, so that libraries have taken what they take
        group = NearDuplicates(NearDuplicatesOptions(link=link))
        if path == folder:
            before, thread = anonymous(), threading.Thread(target=watch)
            thread.start()
        answer = group.compute_streamed(Files(path), Path(scratch))
done.set()
thread.join()
counts = answer["near_duplicates_count"]
print((peak - before) / 1024, len(counts), int(counts.max()))
"""


def make(folder: Path, rows: int, part_rows: int) -> Path:
    """Hashes of which a tenth are near the one before and a hundredth are one and the same."""
    folder.mkdir()
    rng = np.random.default_rng(rows)
    for number, first in enumerate(range(0, rows, part_rows)):
        hashes = rng.integers(0, 2**64, part_rows, np.uint64)
        hashes[1::10] = hashes[::10] ^ np.uint64(0b1011)
        hashes[::100] = 12345
        ids = np.arange(first, first + part_rows)
        columns = {"row_id": ids, "key": [f"{i:09d}" for i in ids.tolist()], "phash": hashes}
        pq.write_table(pa.table(columns), folder / f"{number:04d}.parquet")
    return folder


# Allocators keep little for later: what else they keep, more on a busy machine, would hide what is looked for.
_SPARING = {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "0"}


@pytest.mark.parametrize("link", ["star", pytest.param("component", marks=pytest.mark.long)])
def test_seven_times_the_rows(tmp_path: Path, link: str):
    few = make(tmp_path / "few", 100_000, 5_000)
    many = make(tmp_path / "many", 700_000, 5_000)
    peaks = {}
    for folder in (few, many):
        command = [sys.executable, "-c", _RUN, str(folder), str(few), link]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **_SPARING})
        assert done.returncode == 0, done.stderr
        peaks[folder.name], rows, largest = map(float, done.stdout.split())
        assert largest == rows // 100
    print(f"{link}: {peaks['few']} MiB for 100,000 rows, {peaks['many']} MiB for 700,000")
    assert peaks["many"] - peaks["few"] < 2.8  # 8 bytes for each of 600,000 more are 4.6 MiB
