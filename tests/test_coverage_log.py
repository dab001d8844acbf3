"""The coverage log saves opening files and is never needed: what it lacks, or has otherwise, footers say.

Rows hold number 0 … 29 in three shards of ten.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import synthetic

import mmdata
from mmdata import coverage_log
from mmdata.column_files import ColumnFooter, publish_columns
from mmdata.coverage_log import CoverageLog
from mmdata.coverage_segments import FOLDER, read_segments
from mmdata.dataset import Dataset
from mmdata.errors import StoreError
from mmdata.store import Store

STEPS = ["make_sevens", {"filter": {"low": "number < 20"}}, {"add_constant": {"column": "sevens_value"}}]


@pytest.fixture(autouse=True)
def _operators() -> None:
    synthetic.register_all()
    synthetic.COMPUTED.clear()


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Any]:
    return {**synthetic.make_dataset(tmp_path, list(range(30))), "steps": STEPS}


def run(base: dict[str, Any]) -> Dataset:
    return mmdata.run(base, runner="inline")


@contextmanager
def opened() -> Iterator[list[str]]:
    """The Parquet files of shards that are opened meanwhile, relative to the dataset."""
    found: list[str] = []
    inner = pq.ParquetFile.__init__

    def counted(self: Any, source: Any, *args: Any, **kwargs: Any) -> None:
        name = str(source)
        if "/dataset/" in name and "/state/" not in name:
            found.append(name.partition("/dataset/")[2])
        inner(self, source, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pq.ParquetFile, "__init__", counted)
        yield found


def seen(ds: Dataset) -> list[Any]:
    return ds.sql("SELECT * FROM samples ORDER BY row_id").fetchall()


def segments(base: dict[str, Any]) -> list[str]:
    return Store(base["dataset"]).list(FOLDER)


def test_a_run_with_nothing_to_do_opens_no_file_of_a_shard(base: dict[str, Any]) -> None:
    first = run(base)
    logged = segments(base)
    with opened() as names:
        again = run(base)
    assert names == []
    assert again.report is not None
    assert not again.report.changed
    assert segments(base) == logged
    # It counts what it did not look at.
    assert first.report is not None
    counts = {n: (w.rows_in, w.failed) for n, w in first.report.work.items()}
    assert counts == {"make_sevens": (30, 3), "low": (27, 0), "add_constant": (18, 0)}
    assert {n: (w.rows_in, w.failed) for n, w in again.report.work.items()} == counts


def test_without_the_log_footers_say_the_same(base: dict[str, Any]) -> None:
    first = seen(run(base))
    shutil.rmtree(Path(base["dataset"]) / FOLDER)
    synthetic.COMPUTED.clear()
    with opened() as names:
        assert seen(run(base)) == first
    assert {name.split("/")[0] for name in names} == {"rows", "columns", "verdicts"}
    assert not synthetic.COMPUTED
    with opened() as names:
        run(base)
    assert names == []


def test_only_the_shard_that_changed_is_looked_into(base: dict[str, Any]) -> None:
    first = seen(run(base))
    [path] = Path(base["dataset"]).glob("columns/make_sevens-*/00001.c0.parquet")
    os.utime(path, (1, 1))  # as a file from a backup
    with opened() as names:
        assert seen(run(base)) == first
    assert names
    assert {name.split("/")[-1][:5] for name in names} == {"00001"}
    with opened() as names:
        run(base)
    assert names == []


def test_a_file_that_another_wrote_meanwhile_wins(base: dict[str, Any]) -> None:
    """A row that the log calls failed for a passing reason was computed by somebody who finished late."""
    run(base)
    store = Store(base["dataset"])
    [name] = [n for n in store.column_sets() if n.startswith("add_constant")]
    # Rows 20 … 29 were dropped before the step; now the third shard is covered.
    footer = ColumnFooter.of(store.footer(f"columns/{name}/00002.c0.parquet")["mmdata.identity"])
    rows = store.read_table(f"columns/{name}/00002.c0.parquet")
    values = {
        "row_id": rows["row_id"],
        "plus_value": pa.array([5.0] * 10, pa.float32()),
        "reason": pa.nulls(10, pa.string()),
    }
    newest = publish_columns(store, name, 2, pa.table(values), footer)
    assert newest.number == 1
    log = CoverageLog(store, "late", {})
    assert log.read_set(name)[2] == newest
    assert log.read_set(name)[1].number == 0
    synthetic.COMPUTED.clear()
    wide = run({**base, "steps": ["make_sevens", {"add_constant": {"column": "sevens_value"}}]})
    assert not synthetic.COMPUTED
    assert wide.sql("SELECT count(*) FROM samples WHERE plus_value = 5 AND number >= 20").fetchall()[0][0] >= 9


def test_a_column_file_that_is_gone_is_computed_anew(base: dict[str, Any]) -> None:
    first = seen(run(base))
    [path] = Path(base["dataset"]).glob("columns/make_sevens-*/00001.c0.parquet")
    path.unlink()
    synthetic.COMPUTED.clear()
    assert seen(run(base)) == first
    assert {row >> 24 for operator, _, row in synthetic.COMPUTED if operator == "make_sevens"} == {1}


def test_a_verdict_file_that_is_gone_is_written_anew(base: dict[str, Any]) -> None:
    first = seen(run(base))
    [path] = Path(base["dataset"]).glob("verdicts/*/00002.parquet")
    path.unlink()
    with opened() as names:
        assert seen(run(base)) == first
    assert {name.split("/")[-1][:5] for name in names} == {"00002"}


def test_many_segments_become_one(base: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage_log, "SEGMENTS", 2)
    for bound in (5, 10, 15):
        steps = ["make_sevens", {"filter": {"low": f"number < {bound}"}}]
        ds = mmdata.run({**base, "steps": steps}, runner="inline")
    assert len(segments(base)) <= 3
    with opened() as names:
        assert mmdata.run({**base, "steps": steps}, runner="inline").funnel().kept == ds.funnel().kept
    assert names == []
    # Of the recipe's earlier thresholds nothing is kept in a merged segment.
    entries = read_segments(ds.store).entries
    chains = {
        key
        for kind, key in zip(entries["kind"].to_pylist(), entries["key"].to_pylist(), strict=True)
        if kind == "verdict"
    }
    assert ds.current is not None
    assert ds.current.chain in chains
    assert len(chains) <= 2


def test_a_merge_that_was_cut_short_counts_nothing_twice(base: dict[str, Any]) -> None:
    ds = run(base)
    folder = Path(base["dataset"]) / FOLDER
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    log = CoverageLog(ds.store, "merging", {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coverage_log, "SEGMENTS", 0)
        assert ds.current is not None
        log.merge(ds.current.log_keys)
    [merged] = [p.name for p in folder.iterdir()]
    alone = read_segments(ds.store)
    for name, data in before.items():  # the merge was killed before it removed what it replaces
        (folder / name).write_bytes(data)
    both = read_segments(ds.store)
    assert both.names == alone.names == [f"{FOLDER}/{merged}"]
    assert both.entries.equals(alone.entries)
    freed = {name for name, _ in mmdata.clean.clean(ds.store, grace_s=0)}
    assert freed == {f"{FOLDER}/{name}" for name in before}


def test_a_torn_segment_is_named(base: dict[str, Any]) -> None:
    run(base)
    [name] = segments(base)[:1]
    (Path(base["dataset"]) / FOLDER / name).write_bytes(b"PAR1 torn")
    with pytest.raises(StoreError, match=f"{FOLDER}/{name} .* is not a whole Parquet file.*; remove it and run again"):
        run(base)


def test_memory_of_the_log_is_a_few_hundred_bytes_a_shard(tmp_path: Path) -> None:
    """Six sets of 2,000 shards, whatever their rows; counted by Python's own allocator and numpy's, which it traces."""
    import tracemalloc

    from mmdata.numbered_files import NumberedFiles
    from mmdata.set_files import SetFiles

    shards = np.arange(2000, dtype=np.int64)
    tracemalloc.start()
    held = []
    for number in range(6):
        files = NumberedFiles(f"columns/x-{number}", "c", shards.copy(), shards * 0, shards * 0, shards * 0)
        held.append(SetFiles(files, shards * 0 + 10_000, shards * 0 + 10_000, np.zeros(2000, "V32")))
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held[3][1999].name == "columns/x-3/01999.c0.parquet"
    assert size / 2000 < 600
