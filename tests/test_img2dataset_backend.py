"""`fetch: {backend: img2dataset}`: img2dataset itself fetches, and its output becomes rows and media of a dataset.

It runs where both packages are, in the environment of the peers.
"""

from __future__ import annotations

import ast
import json
import subprocess
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import img2dataset_peer as peer
import pyarrow.parquet as pq
import pytest

import mmdata
from mmdata import img2dataset_backend
from mmdata.errors import MissingExtra, RecipeError
from mmdata.settings import FetchOptions

SHARD_ROWS = 20
GIVEN_UP: dict[str, Any] = {"backend": "img2dataset", "allow_private": True, "robots": "ignore", "tdm": "ignore"}
_RUN = """
import json, sys
import mmdata
mmdata.run(json.loads(sys.argv[1]), runner="inline")
"""


def _tar(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]


@pytest.mark.long  # three runs of img2dataset, each of which waits for its logger
def test_a_dataset_holds_what_img2dataset_makes(tmp_path: Path) -> None:
    """Two shards: the same tar members byte for byte, the same rows; ours in the order of the list, with our words."""
    recipe = {
        "name": "reproduced",
        "dataset": str(tmp_path / "ours"),
        "fetch": {**GIVEN_UP, "shard_rows": SHARD_ROWS, "timeout_s": 10, "concurrency": 16, "layout": "webdataset"},
    }
    with peer.serve(tmp_path, slice(1, None, 3)) as served, ThreadPoolExecutor(1) as pool:
        given = {"resize_mode": "keep_ratio", "number_sample_per_shard": SHARD_ROWS}
        theirs = pool.submit(peer.img2dataset, served.path, tmp_path / "theirs", **given)
        recipe["source"] = {"kind": "urls", "path": str(served.path), "caption": "caption", "columns": ["licence"]}
        command = [str(peer.PEERS / "bin" / "python"), "-c", _RUN, json.dumps(recipe)]
        with peer.environment() as env:
            done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        out, rows = theirs.result(), served.rows
    ds = mmdata.open(tmp_path / "ours")
    found = ds.sql("SELECT key, status, url, caption, licence, sha256, width_px, image_offset, image_size FROM rows")
    ours = {row[0]: row[1:] for row in found.fetchall()}
    listed = [f"{100 * (i // SHARD_ROWS) + i % SHARD_ROWS:07d}" for i in range(len(rows))]
    assert list(ours) == listed
    assert len(rows) > SHARD_ROWS
    assert {r.theirs for r in rows} == {"success", "failed_to_download", "failed_to_resize"}
    assert [ours[k][0] for k in listed] == [r.adopted or r.ours for r in rows]
    table = [r for path in sorted(out.glob("*.parquet")) for r in pq.read_table(path).to_pylist()]
    names = ("url", "caption", "licence", "sha256", "width")
    assert {r["key"]: tuple(r[n] for n in names) for r in table} == {k: v[1:6] for k, v in ours.items()}
    for path in sorted(out.glob("*.tar")):
        members = _tar(path)
        assert members == _tar(tmp_path / "ours" / path.name)
        for name in [n for n in members if n.endswith(".jpg")]:
            _, _, _, _, _, _, offset, size = ours[name.partition(".")[0]]
            [media] = (tmp_path / "ours" / "media").glob(f"{path.stem}-*.tar")
            assert ds.read_media(f"media/{media.name}", offset, size) == members[name]


_ONE_SHARD = """
import json, sys
import pyarrow as pa
import pyarrow.parquet as pq
from mmdata.img2dataset_backend import fetch_by_img2dataset
from mmdata.settings import FetchOptions
from mmdata.store import Store
store, table, fetch = Store(sys.argv[1]), pq.read_table(sys.argv[2]), FetchOptions(**json.loads(sys.argv[3]))
extra = pa.schema([("licence", pa.string())])
print([fetch_by_img2dataset(store, 1, table, fetch, a, extra, True).by_status for a in ("once", "again")])
"""


def test_a_shard_in_the_middle_of_a_list(tmp_path: Path) -> None:
    """Its second shard: numbers, keys and members are that shard's; done again it fetches nothing."""
    fetch = {**GIVEN_UP, "shard_rows": SHARD_ROWS, "timeout_s": 10, "concurrency": 16}
    with peer.serve(tmp_path, slice(2, None, 8)) as served:
        python, store = str(peer.PEERS / "bin" / "python"), tmp_path / "store"
        command = [python, "-c", _ONE_SHARD, str(store), str(served.path), json.dumps(fetch)]
        with peer.environment() as env:
            done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        hits = sum(served.server.hits.values())
    rows = pq.read_table(store / "rows" / "00001.g0.parquet").to_pylist()
    assert [r["key"] for r in rows] == [f"{100 + i:07d}" for i in range(len(served.rows))]
    assert [r["status"] for r in rows] == [e.adopted or e.ours for e in served.rows]
    assert {"ok", "http_4xx"} <= {r["status"] for r in rows}
    first, second = ast.literal_eval(done.stdout.splitlines()[-1])
    assert first == second
    assert sum(first.values()) == len(rows)
    assert hits <= len(rows)
    [tar] = (store / "media").iterdir()
    data, members = tar.read_bytes(), _tar(tar)
    stored = [r for r in rows if r["status"] == "ok"]
    assert len(members) == 3 * len(stored)
    for row in stored:
        assert row["image_path"] == f"media/{tar.name}"
        assert data[row["image_offset"] :][: row["image_size"]] == members[f"{row['key']}.jpg"]
        assert json.loads(members[f"{row['key']}.json"])["licence"] == row["licence"]


@pytest.mark.parametrize("name", ["allow_private", "robots", "tdm"])
def test_what_it_has_not_must_be_given_up_by_name(name: str) -> None:
    with pytest.raises(RecipeError, match=rf"has no {name}: say fetch\.{name}: "):
        img2dataset_backend.require(FetchOptions(**{k: v for k, v in GIVEN_UP.items() if k != name}))


@pytest.mark.parametrize(
    "option",
    [
        {"per_host_rate": 2.0},
        {"store": "original"},
        {"max_bytes": 1000},
        {"skip_existing": ("other",)},
        {"media": "any"},
    ],
)
def test_what_it_cannot_honour_is_refused(option: dict[str, Any]) -> None:
    [name] = option
    with pytest.raises(RecipeError, match=rf"has no {name}: leave fetch\.{name} out"):
        img2dataset_backend.require(FetchOptions(**GIVEN_UP, **option))


def test_without_the_package_there_is_a_command() -> None:
    """The tests' own environment does not have it."""
    with pytest.raises(MissingExtra, match=r"pip install 'mmdata\[img2dataset\]'"):
        img2dataset_backend.require(FetchOptions(**GIVEN_UP))
    img2dataset_backend.require(FetchOptions())
