"""The view `hosts`: what became of the rows of each host, however its name is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest
import synthetic
from typer.testing import CliRunner

import mmdata
from mmdata.cli import app
from mmdata.host_summary import HOSTS_SQL


def hosts_of(rows: list[tuple[Any, ...]]) -> dict[str, dict[str, Any]]:
    """`rows`: (url, status, fetch_ms, size_bytes)."""
    names = ("url", "status", "fetch_ms", "size_bytes")
    kinds = (pa.string(), pa.string(), pa.float32(), pa.int64())
    columns = zip(*rows, strict=True)
    table = pa.table([pa.array(c, k) for c, k in zip(columns, kinds, strict=True)], names=names)
    connection = duckdb.connect()
    connection.register("rows", table)
    found = connection.sql(HOSTS_SQL).to_arrow_table().to_pylist()
    return {row.pop("host"): row for row in found}


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://a.test/x", "a.test"),
        ("HTTPS://A.Test:8443/x?y=http://b.test/", "a.test"),
        ("http://me:pass@a.test/", "a.test"),
        ("http://me@b.test@a.test:80/", "a.test"),
        ("http://a.test.:80", "a.test"),
        ("http://a.test?x", "a.test"),
        ("http://a.test#x", "a.test"),
        ("http://[2001:DB8::1]:80/x", "[2001:db8::1]"),
        ("http://[2001:db8::1]/x", "[2001:db8::1]"),
        ("http://192.0.2.7:80/", "192.0.2.7"),
        ("http://bücher.test/", "bücher.test"),
        ("http:///x", None),
        ("a.test/x", None),
        ("", None),
        (None, None),
    ],
)
def test_a_host_is_known_however_it_is_written(url: str | None, host: str | None) -> None:
    found = hosts_of([(url, "ok", 1.0, 1), ("http://other.test/", "ok", 1.0, 1)])
    assert set(found) == {"other.test"} | ({host} if host else set())


def test_counts_times_and_bytes() -> None:
    """Median of 10, 20, 30, 40 is 25; the 95th percentile lies 0.85 of the way from 30 to 40: 38.5."""
    rows = [
        ("http://a.test/1", "ok", 10.0, 100),
        ("http://A.test:80/2", "ok", 20.0, 200),
        ("http://a.test/3", "timeout", 30.0, None),
        ("http://a.test/4", "http_5xx", 40.0, None),
        ("http://a.test/5", "timeout", None, None),
        ("http://a.test/6", "opted_out", None, None),
        ("http://a.test/7", "deferred", None, None),
        ("http://a.test/8", "filtered", None, 7),
        ("http://b.test/1", "blocked", None, None),
    ]
    found = hosts_of(rows)
    assert found["a.test"] == {
        "rows": 8,
        "ok": 2,
        "failed": 3,
        "opted_out": 1,
        "deferred": 1,
        "statuses": [("timeout", 2), ("deferred", 1), ("filtered", 1), ("http_5xx", 1), ("opted_out", 1)],
        "median_ms": 25.0,
        "p95_ms": 38.5,
        "bytes": 307,
    }
    assert found["b.test"] | {"statuses": None} == {
        "rows": 1,
        "ok": 0,
        "failed": 0,
        "opted_out": 0,
        "deferred": 0,
        "statuses": None,
        "median_ms": None,
        "p95_ms": None,
        "bytes": 0,
    }


def test_show_prints_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMDATA_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setenv("COLUMNS", "120")
    synthetic.register_all()
    recipe = synthetic.make_dataset(
        tmp_path / "a", list(range(1, 13)), status=lambda n: "timeout" if n % 4 == 0 else "ok"
    )
    ds = mmdata.run(recipe, runner="inline")
    hosts = ds.sql("SELECT host, rows, ok, failed FROM hosts").fetchall()
    [(host, *counts)] = hosts
    assert counts == [12, 9, 3]
    shown = CliRunner().invoke(app, ["show", str(ds.store.url)])
    assert "hosts that lost most" in shown.output
    alone = CliRunner().invoke(app, ["show", str(ds.store.url), "--hosts"])
    [line] = [line for line in alone.output.splitlines() if host in line]
    assert line.split()[:4] == [host, "12", "9", "3"]
    assert "timeout 3" in line
