"""A picture that kills the process that decodes it costs its row: not its shard, not its neighbours, not the run."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import faulty
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from server import JPEG, BadServer

import mmdata
from mmdata.errors import RetryableError
from mmdata.ingest_journal import IngestJournal
from mmdata.ledger import dataset_document
from mmdata.pool import Finished, Item
from mmdata.repeats import Repeats
from mmdata.store import Store
from mmdata.work import journal_folder

FIXTURES = Path(__file__).parent / "fixtures"
DEADLY = JPEG + faulty.KILLER


def test_pictures_that_kill_the_process_are_given_up_and_all_others_are_there(tmp_path: Path) -> None:
    killers = {3: "/k/3", 4: "/k/4", 17: "/k/17"}
    with BadServer({path: ("image/jpeg", DEADLY) for path in killers.values()}) as server:
        urls = [server.url(killers.get(n, f"/ok/{n}")) for n in range(24)]
        pq.write_table(pa.table({"url": urls}), tmp_path / "list.parquet")
        document = {
            "name": "deadly",
            "dataset": str(tmp_path / "dataset"),
            "source": {"kind": "urls", "path": str(tmp_path / "list.parquet")},
            "fetch": {"allow_private": True, "shard_rows": 12, "image_size": 32, "decode_threads": 2},
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(document))
        environment = {
            **os.environ,
            "PYTHONPATH": str(FIXTURES / "deadly"),
            "MMDATA_TEST_DEADLY": "1",
            "MMDATA_SCRATCH": str(tmp_path / "scratch"),
        }
        command = [sys.executable, str(FIXTURES / "faulty.py"), "--again", "run", str(tmp_path / "recipe.yaml")]
        run = subprocess.run(
            [*command, "--runner", "inline"], env=environment, capture_output=True, text=True, timeout=200, check=False
        )
        codes = [int(line) for line in run.stdout.splitlines() if line.lstrip("-").isdecimal()]
    assert codes[-1] == 0
    assert set(codes[:-1]) == {-signal.SIGABRT}
    assert len(codes) <= 3 * 3 + 1  # among others, and twice alone
    ds = mmdata.open(document["dataset"])
    columns = "status, status_detail, sha256, verdict, step, reason"
    found = ds.sql(f"SELECT {columns} FROM samples ORDER BY row_id").fetchall()
    digest = hashlib.sha256(DEADLY).hexdigest()
    assert [n for n, row in enumerate(found) if row != ("ok", None, row[2], "kept", None, None)] == sorted(killers)
    assert {found[n] for n in killers} == {("decode", "worker_died", digest, "failed", 0, "decode")}
    funnel = ds.funnel()
    assert (funnel.rows_in, funnel.kept, funnel.failed) == (24, 21, 3)
    # A killer is tried again before anything else is fetched again, but for its companion in the other decoder.
    often = [path for path, count in server.hits.items() if path.startswith("/ok/") and count > 3]
    assert len(often) <= len(killers)
    assert not [p for p in (tmp_path / "scratch" / "journal").rglob("*") if p.is_file()]


# The journal itself: hand-written accounts of how attempts ended


def _look(path: Path, text: str, run: str = "") -> IngestJournal:
    path.write_text(text)
    with IngestJournal(path, run) as journal:
        return journal


@pytest.mark.parametrize(
    ("text", "suspects", "given_up"),
    [
        ("s \n+1\n-1\ne\n", [], []),  # ended in order
        ("s \n+1\n+2\n-1\n+3\n", [2, 3], []),  # died with two pictures in decoders: neither is charged yet
        ("s \n+1\n+2\ns \n+1\n-1\n+2\n", [1, 2], []),  # 1 survived alone, 2 died alone once
        ("s \n+1\n+2\ns \n+1\n-1\n+2\ns \n+1\n-1\n+2\n", [1], [2]),  # and once more
        ("s \n+2\ns \n+2\n-2\ne\ns \n+7\n", [2, 7], []),  # one death each; they go one at a time
        ("s \n+12\n+1", [1, 12], []),  # the last line has no end: it tells of 1 or of a longer number, and costs little
    ],
)
def test_what_earlier_attempts_died_of(tmp_path: Path, text: str, suspects: list[int], given_up: list[int]) -> None:
    journal = _look(tmp_path / "journal", text)
    assert sorted(journal.suspects) == suspects
    assert journal.given_up == frozenset(given_up)


def test_workers_of_a_run_that_is_over_charge_nobody(tmp_path: Path) -> None:
    text = "s run-a\n+5\ns run-a\n+5\n"
    assert _look(tmp_path / "journal", text, "run-b").given_up == frozenset()
    assert _look(tmp_path / "journal", text, "run-a").given_up == {5}


def test_deaths_that_no_picture_explains_stop_the_run(tmp_path: Path) -> None:
    two = "s run\n+1\n-1\n" * 2
    assert _look(tmp_path / "journal", two, "run").suspects == []
    with pytest.raises(RetryableError, match="3 workers died one after the other"):
        _look(tmp_path / "journal", two + "s run\n", "run")
    assert _look(tmp_path / "journal", "s \n" * 5).suspects == []  # killed by its user, five times


def test_a_decoder_that_dies_of_every_picture_stops_the_run(tmp_path: Path) -> None:
    text = "".join(f"s run\n+{n}\n" for n in range(20))
    with pytest.raises(RetryableError, match="20 workers died"):
        _look(tmp_path / "journal", text, "run")


def test_the_shard_of_a_dead_worker_is_fetched_again_under_another_attempt(tmp_path: Path) -> None:
    item = Item("ingest", "ingest", 3, attempt="run-1234")
    again = Repeats(Store(str(tmp_path)), {}, []).again(Finished(item, died="WorkerCrashedError"))
    assert again is not None
    assert again.attempt != item.attempt
    assert (again.kind, again.shard) == ("ingest", 3)


def test_notes_of_shards_that_are_there_go_when_the_sources_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that is stopped after its shard's commit leaves its note, and no later run works on that shard."""
    monkeypatch.setenv("MMDATA_SCRATCH", str(tmp_path / "scratch"))
    sources = []
    for name in ("a", "b"):
        pq.write_table(pa.table({"text": [name]}), tmp_path / f"{name}.parquet")
        sources.append({"kind": "parquet", "media": "none", "path": str(tmp_path / f"{name}.parquet")})
    document = {"name": "grows", "dataset": str(tmp_path / "dataset")}
    mmdata.run({**document, "source": sources[:1]}, runner="inline")
    found = dataset_document(Store(document["dataset"]))
    assert found is not None
    note = journal_folder(found.id) / "ingest-00000"
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text("s one-that-was-stopped\n+0\n")
    ds = mmdata.run({**document, "source": sources}, runner="inline")
    assert ds.sql("SELECT caption FROM samples ORDER BY row_id").fetchall() == [("a",), ("b",)]
    assert not note.exists()
