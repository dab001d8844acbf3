"""A list of everything a server can do, fetched at once: each row gets its status, and nobody else pays for it."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import misbehaving_run
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from misbehaving import INSIDE, Misbehaving
from misbehaving_answers import ANSWERS, ROBOTS
from misbehaving_cases import CASES, GOOD_ROWS, Case, Row, listing
from misbehaving_media import good
from PIL import Image

import mmdata
from mmdata.columns import STATUSES

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 6
AGENT = "mmdata/test (+https://example.org/crawl)"


@dataclass(frozen=True)
class Outcome:
    """The list's rows, what became of each (in the same order), the finished dataset, and what the run cost."""

    rows: list[Row]
    found: list[dict[str, Any]]
    dataset: mmdata.dataset.Dataset
    cost: dict[str, float]
    server: Misbehaving

    def of(self, case: Case | None) -> list[dict[str, Any]]:
        return [f for r, f in zip(self.rows, self.found, strict=True) if r.case == case]


def run(server: Misbehaving, rows: list[Row], folder: Path, **options: Any) -> Outcome:
    """Fetch in a process of its own, so that what it costs is known."""
    pq.write_table(pa.table({"url": pa.array([r.url for r in rows], pa.string())}), folder / "list.parquet")
    limits = {c.host: {"connections": c.connections, "per_s": None} for c in CASES if c.connections}
    fetch = {
        "timeout_s": TIMEOUT_S,
        "retries": 1,
        "defer_after_s": 3,
        "host_limits": limits,
        "user_agent": AGENT,
        **options,
    }
    command = [sys.executable, misbehaving_run.__file__, folder / "list.parquet", folder / "dataset", json.dumps(fetch)]
    env = {**os.environ, "SSL_CERT_FILE": str(server.authority)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    dataset = mmdata.open(folder / "dataset")
    found = dataset.sql("SELECT * FROM samples ORDER BY row_id").arrow().read_all().to_pylist()
    return Outcome(rows, found, dataset, json.loads(done.stdout.splitlines()[-1]), server)


@pytest.fixture(scope="module")
def server() -> Iterator[Misbehaving]:
    with Misbehaving() as running:
        yield running


@pytest.fixture(scope="module")
def outcome(server: Misbehaving, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    # 8 MiB, so that endless bodies reach their end before their deadline on any machine
    return run(server, listing(server), tmp_path_factory.mktemp("misbehaving"), max_bytes=8 << 20)


def test_every_behaviour_is_a_case_and_every_case_a_known_status() -> None:
    used = {str(u).partition("/")[0].partition("?")[0] for c in CASES for u in c.urls if isinstance(u, str)}
    assert set(ANSWERS) - used == {"good", "hop", "other"} - used
    assert {c.name.replace("_", "-") for c in CASES if c.group == "robots.txt"} == set(ROBOTS)
    assert len({c.name for c in CASES}) == len(CASES)
    assert {s for c in CASES for text in c.statuses for s in text.split("|")} <= set(STATUSES)


def test_no_row_is_lost(outcome: Outcome) -> None:
    assert [f["url"] for f in outcome.found] == [r.url for r in outcome.rows]
    assert len(outcome.of(None)) == GOOD_ROWS
    body = hashlib.sha256(good()).hexdigest()
    assert {(f["status"], f["sha256"], f["attempts"]) for f in outcome.of(None)} == {("ok", body, 1)}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_what_becomes_of(case: Case, outcome: Outcome) -> None:
    found = outcome.of(case)
    ours = [f["status"] if f["status"] in s.split("|") else s for f, s in zip(found, case.statuses, strict=True)]
    assert [f["status"] for f in found] == ours, [f["status_detail"] for f in found]
    for row in found:
        assert (row["image_path"] is not None) == (row["status"] == "ok")
        assert (row["status_detail"] is None) == (row["status"] == "ok")
        assert len(row["status_detail"] or "") <= 250
        if row["status"] == "ok" and (case.size or case.colours):
            data = outcome.dataset.read_media(row["image_path"], row["image_offset"], row["image_size"])
            check_picture(case, data)
    asked = [a.path for a in outcome.server.hits(case.host)]
    assert case.forbidden not in asked
    assert case.forbidden != "*" or asked == []


def check_picture(case: Case, data: bytes) -> None:
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.size == (case.size or picture.size)
        pixels = picture.convert("RGB")
    for x, y, *colour in case.colours:
        seen = pixels.getpixel((int(x * pixels.width), int(y * pixels.height)))
        assert isinstance(seen, tuple)
        assert max(abs(a - b) for a, b in zip(seen, colour, strict=True)) <= 4, (seen, colour)


def test_each_row_gets_its_own_answer(outcome: Outcome) -> None:
    [case] = [c for c in CASES if c.name == "answers_unasked"]
    bodies = [hashlib.sha256(good(seed)).hexdigest() for seed in (0, 7, 7)]
    assert [f["sha256"] for f in outcome.of(case)] == bodies


def test_the_address_that_is_not_public_was_never_asked(outcome: Outcome) -> None:
    assert len([r for r in outcome.rows if r.status == "refused_address"]) > 8
    assert [a for a in outcome.server.asked if a.address == INSIDE] == []


def test_only_what_may_pass_is_tried_again(outcome: Outcome) -> None:
    def times(name: str) -> int:
        return len(outcome.server.hits(name + ".test"))

    once = ["not-found", "gone", "forbidden", "tag-noai", "tag-list", "tdm-1", "html", "jpeg-cut", "silent"]
    assert {n: times(n) for n in once} == dict.fromkeys(once, 1)
    twice = ["broken", "busy", "busy-once", "broken-once", "reset-in-body", "cut-in-body"]
    assert {n: times(n) for n in twice} == dict.fromkeys(twice, 2)


def test_nothing_is_told_that_is_nobodys_business(outcome: Outcome) -> None:
    for asked in outcome.server.asked:
        assert asked.headers["user-agent"] == AGENT
        assert not {"cookie", "referer"} & asked.headers.keys()
    assert len([a for a in outcome.server.asked if a.host == "set-cookie.test" and "set_cookie" in a.path]) == 2
    kept = [{k: v for k, v in f.items() if k != "url"} for f in outcome.found]
    assert "secret" not in json.dumps(kept, default=str)


def test_deadlines_and_memory_hold(outcome: Outcome) -> None:
    slowest = max((f["fetch_ms"] or 0, f["url"]) for f in outcome.found)
    assert slowest[0] <= (TIMEOUT_S + 1) * 1000, slowest
    assert outcome.cost["seconds"] < 10 * TIMEOUT_S  # one after the other it is minutes
    assert outcome.cost["peak_mb"] <= 500


def test_the_table_of_the_docs_is_what_was_measured() -> None:
    spec = importlib.util.spec_from_file_location("bad_servers", ROOT / "tests/bench/bad_servers.py")
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    results = json.loads(bench.RESULTS.read_text())
    page = bench.PAGE.read_text(encoding="utf-8")
    assert bench.page(page, results) == page, "run tests/bench/bad_servers.py --docs"
    measured = {name: [r["status"] for r in rows] for name, rows in results["mmdata"]["cases"].items()}
    assert measured.keys() == {c.name for c in CASES} == results["img2dataset"].keys()
    for case in CASES:
        assert all(m in s.split("|") for m, s in zip(measured[case.name], case.statuses, strict=True)), case.name
    assert results["mmdata"]["peak_mb"] <= 500


@pytest.mark.long
def test_memory_holds_whatever_the_bodies_sizes(server: Misbehaving, tmp_path: Path) -> None:
    """Default limits, every large body four times at once: 60 bodies of 64 MiB would be 4 GiB."""
    names = """huge_announced endless_body endless_chunks endless_small_chunks gzip_bomb zstd_bomb drip headers_endless
    header_line_endless chunk_extension_endless chunk_trailers_endless redirect_endless png_bomb png_words_bomb
    jpeg_scans""".split()
    cases = [c for c in CASES if c.name in names]
    assert len(cases) == len(names)
    rows = [Row(c, server.url(c.name, f"{c.name.replace('_', '-')}-{n}.test"), "") for n in range(4) for c in cases]
    rows += [Row(None, server.url("good", f"good-{n}.test"), "ok") for n in range(GOOD_ROWS)]
    outcome = run(server, rows, tmp_path, timeout_s=30, retries=0)
    for case in cases:
        statuses = {f["status"] for f in outcome.of(case)}
        # what has no end meets one limit or the other, as this machine is quick or slow
        assert statuses <= {*case.statuses[0].split("|"), "timeout"}, case.name
    assert {f["status"] for f in outcome.of(None)} == {"ok"}
    assert max(f["fetch_ms"] for f in outcome.found) <= 31_000
    assert outcome.cost["peak_mb"] <= 500
