"""One list through the real img2dataset 1.47.0 and through mmdata: what is the same, what differs, by how much.

Ours is what `mmdata download` makes of the very options that img2dataset is given, and an export of it.
docs/peers.md tells users what is asserted here; its table of pixel differences is compared with what is measured.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import img2dataset_peer as peer
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import mmdata
from mmdata.dataset import Dataset
from mmdata.download import planned

SHARD_ROWS = 50
# resize mode → output format of both; our export is the webdataset layout throughout
MODES = {"keep_ratio": "webdataset", "border": "files", "center_crop": "parquet", "no": "webdataset"}
PEERS_PAGE = peer.ROOT / "docs" / "peers.md"
STATS = {  # img2dataset 1.47.0, logger.py, write_stats
    "count": int,
    "successes": int,
    "failed_to_download": int,
    "failed_to_resize": int,
    "duration": float,
    "start_time": float,
    "end_time": float,
    "status_dict": dict,
}


@dataclass
class Both:
    """One list through both tools, with the same options: img2dataset's folder, our dataset and its export.

    The dataset's folder has img2dataset's layout, too.
    """

    served: peer.Served
    theirs: Path
    ds: Dataset
    export: Path

    @property
    def keys(self) -> list[str]:
        """img2dataset's key of every row of the list: 10^ceil(log10(50)) * shard + index, 5 + 2 digits."""
        return [f"{100 * (i // SHARD_ROWS) + i % SHARD_ROWS:07d}" for i in range(len(self.served.rows))]


def _ours(listing: Path, folder: Path, mode: str, options: dict[str, Any]) -> Both:
    given = {**peer.options(listing, folder / f"ours-{mode}"), **options}
    given |= {"decode": "exact", "allow_private": True, "per_host": 64, "per_host_rate": None}
    recipe = planned(given).recipe | {"name": f"golden_{mode}"}
    recipe["export"] = {"path": str(folder / f"export-{mode}"), "columns": ["licence"], "json_nulls": True}
    ds = mmdata.run(recipe, runner="inline")
    return Both(None, folder / f"theirs-{mode}", ds, folder / f"export-{mode}")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Both]]:
    """Resize mode → both. keep_ratio has the whole list, the other modes every fourth row."""
    folder = tmp_path_factory.mktemp("golden")
    with peer.serve(folder / "all") as all_rows, peer.serve(folder / "some", slice(None, None, 4)) as some_rows:
        served = {mode: all_rows if mode == "keep_ratio" else some_rows for mode in MODES}
        usual: dict[str, Any] = {"image_size": 256, "encode_quality": 95, "number_sample_per_shard": SHARD_ROWS}
        options = {m: {**usual, "resize_mode": m, "output_format": f} for m, f in MODES.items()}
        with ThreadPoolExecutor(len(MODES)) as pool:  # most of a run of img2dataset is waiting for its logger
            started = [
                pool.submit(peer.img2dataset, served[m].path, folder / f"theirs-{m}", **options[m]) for m in MODES
            ]
            found = {m: _ours(served[m].path, folder, m, options[m]) for m in MODES}
            for run in started:
                run.result()
        for mode in MODES:
            found[mode].served = served[mode]
        yield found


def _rows(folder: Path) -> dict[str, dict[str, Any]]:
    """Key → row, of all Parquet files of an img2dataset folder."""
    return {r["key"]: r for path in sorted(folder.glob("*.parquet")) for r in pq.read_table(path).to_pylist()}


def _members(folder: Path) -> dict[str, bytes]:
    """Name → bytes of every member of every tar; of every file, or of the Parquet's cells, where there are no tars."""
    found = {p.name: p.read_bytes() for p in folder.glob("*/*.*") if p.parent.name.isdigit()}
    if not found and not list(folder.glob("*.tar")):
        found = {f"{k}.jpg": r["jpg"] for k, r in _rows(folder).items() if r["jpg"] is not None}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                assert member.name not in found
                found[member.name] = file.read()
    return found


def test_every_row_has_the_status_that_both_tools_document(runs: dict[str, Both]) -> None:
    """The list has ≥ 100 rows; img2dataset's three statuses against ours, row by row, with one key on both sides."""
    both = runs["keep_ratio"]
    assert len(both.served.rows) >= 100
    theirs = _rows(both.theirs)
    ours = {k: (s, u, c) for k, s, u, c in both.ds.sql("SELECT key, status, url, caption FROM rows").fetchall()}
    assert list(ours) == sorted(theirs) == both.keys
    for key, entry in zip(both.keys, both.served.rows, strict=True):
        found = (theirs[key]["status"], ours[key][0])
        assert found == (entry.theirs, entry.ours), (entry.group, entry.path, theirs[key]["error_message"])
        assert (theirs[key]["url"], theirs[key]["caption"]) == ours[key][1:]
    failed = {e.group for e in both.served.rows if e.theirs != "success"}
    assert {"missing", "broken server", "reset", "not media", "cut"} <= failed


def test_the_parquet_has_the_same_columns_types_and_values(runs: dict[str, Both]) -> None:
    """Ours holds kept samples only and has `uid` too; the order of columns and the form of `exif` differ, no more."""
    both = runs["keep_ratio"]
    theirs = pq.read_schema(both.theirs / "00000.parquet")
    ours = pq.read_schema(both.export / "00000.parquet")
    assert {f.name: f.type for f in theirs}.items() <= {f.name: f.type for f in ours}.items()
    assert set(ours.names) == set(theirs.names)
    assert ours.field("width").type == pa.int32()
    successes = {k: r for k, r in _rows(both.theirs).items() if r["status"] == "success"}
    exported = _rows(both.export)
    assert list(exported) == sorted(successes)
    turned = _keys_of(both, lambda e: e.group == "turned")
    sides = {"width", "height", "original_width", "original_height"}
    for key, row in successes.items():
        same = set(row) - {"exif"} - (sides if key in turned else set())
        assert {n: row[n] for n in same} == {n: exported[key][n] for n in same}
    assert {exported[k]["exif"] for k in exported.keys() - turned} == {None}
    assert {successes[k]["exif"] for k in exported.keys() - turned} == {"{}"}
    for key in turned:
        assert json.loads(successes[key]["exif"])["Image Make"] == "a maker"
        assert json.loads(exported[key]["exif"])["Make"] == "a maker"


def _keys_of(both: Both, which: Any) -> set[str]:
    return {k for k, e in zip(both.keys, both.served.rows, strict=True) if which(e) and e.theirs == "success"}


def test_the_tars_have_the_same_members(runs: dict[str, Both]) -> None:
    for mode in ("keep_ratio", "border", "no"):
        theirs, ours = _members(runs[mode].theirs), _members(runs[mode].export)
        assert set(theirs) == set(ours)
        for name in [n for n in theirs if n.endswith(".txt")]:
            assert theirs[name] == ours[name]
        for name in [n for n in theirs if n.endswith(".json")]:
            left, right = json.loads(theirs[name]), json.loads(ours[name])
            assert set(left) == set(right)
            known = {"key", "url", "caption", "licence", "status", "error_message", "sha256"}
            assert {n: left[n] for n in known} == {n: right[n] for n in known}


def test_the_statistics_have_the_same_fields(runs: dict[str, Both]) -> None:
    both = runs["keep_ratio"]
    theirs = [json.loads(p.read_text()) for p in sorted(both.theirs.glob("*_stats.json"))]
    ours = [json.loads(p.read_text()) for p in sorted(both.export.glob("*_stats.json"))]
    for stats in [*theirs, *ours]:
        assert {name: type(value) for name, value in stats.items()} == STATS
    assert sum(s["successes"] for s in ours) == sum(s["successes"] for s in theirs)
    assert sum(s["count"] for s in theirs) == both.ds.sql("SELECT count(*) FROM rows").fetchall()[0][0]
    statuses = dict(both.ds.sql("SELECT status, count(*) FROM rows GROUP BY ALL").fetchall())
    to_resize = sum(n for status, n in statuses.items() if status in ("not_media", "decode"))
    assert sum(s["failed_to_resize"] for s in theirs) == to_resize
    assert sum(s["failed_to_download"] for s in theirs) == sum(statuses.values()) - statuses["ok"] - to_resize


# What `mmdata download` writes, beside what img2dataset does


@pytest.mark.parametrize("mode", MODES)
def test_a_download_has_the_files_and_columns_of_img2dataset(mode: str, runs: dict[str, Both]) -> None:
    both = runs[mode]
    ours = Path(both.ds.store.root)
    named = {p.relative_to(both.theirs).as_posix() for p in both.theirs.rglob("*")}
    mine = {p.relative_to(ours).as_posix() for p in ours.rglob("*") if p.relative_to(ours).parts[0][:1].isdigit()}
    assert mine == named
    for path in both.theirs.glob("*.parquet"):
        theirs, finer = pq.read_schema(path), pq.read_schema(ours / path.name)
        assert [(f.name, f.type) for f in theirs] == [(f.name, f.type) for f in finer][: len(theirs)]
    for path in both.theirs.glob("*_stats.json"):
        left, right = json.loads(path.read_text()), json.loads((ours / path.name).read_text())
        assert {name: type(value) for name, value in right.items()} == STATS
        counts = ("count", "successes", "failed_to_download", "failed_to_resize")
        assert [left[n] for n in counts] == [right[n] for n in counts]
        assert right["status_dict"]["success"] == left["status_dict"]["success"]
        assert sum(right["status_dict"].values()) == right["count"]


@pytest.mark.parametrize("mode", MODES)
def test_a_download_has_the_rows_of_img2dataset(mode: str, runs: dict[str, Both]) -> None:
    """Every row, failures too; the names of EXIF tags apart, the shape of pictures we turn, and some words."""
    both = runs[mode]
    theirs, ours = _rows(both.theirs), _rows(Path(both.ds.store.root))
    assert list(ours) == both.keys
    assert set(theirs) == set(ours)
    other = _keys_of(both, lambda e: not e.like_ours)
    words = 0
    for key, row in theirs.items():
        sides = {"width", "height", "original_width", "original_height"} if key in other else set()
        same = set(row) - {"exif", "error_message", "jpg"} - sides
        assert {n: row[n] for n in same} == {n: ours[key][n] for n in same}
        assert (row["exif"] is None) == (ours[key]["exif"] is None)
        if row["error_message"] is None or row["error_message"].startswith("HTTP Error"):
            assert row["error_message"] == ours[key]["error_message"]
            words += row["error_message"] is not None
        assert key in other or row["exif"] == ours[key]["exif"]
    assert words == sum(entry.ours.startswith("http_") for entry in both.served.rows)
    statuses = dict(both.ds.sql("SELECT key, status FROM rows").fetchall())
    assert {k: r["mmdata_status"] for k, r in ours.items()} == statuses


@pytest.mark.parametrize("mode", MODES)
def test_a_download_has_the_samples_of_img2dataset(mode: str, runs: dict[str, Both]) -> None:
    """Pictures in colour byte for byte, captions, and every field of the `.json`."""
    both = runs[mode]
    theirs, ours = _members(both.theirs), _members(Path(both.ds.store.root))
    assert set(theirs) == set(ours)
    colour = _keys_of(both, lambda e: e.like_ours and e.group != "grey")
    assert len(colour) >= 19
    compared = 0
    for name, data in theirs.items():
        key, _, extension = name.partition(".")
        if key not in colour:
            continue
        if extension == "json":
            assert list(json.loads(data).items()) == list(json.loads(ours[name]).items())
        else:
            assert data == ours[name], name
        compared += 1
    assert compared == len(colour) * (1 if mode == "center_crop" else 3)


@pytest.mark.parametrize("mode", MODES)
def test_a_download_adopted_is_what_it_was(mode: str, runs: dict[str, Both], adopt: Any) -> None:
    """`source: {kind: img2dataset}` over the folder of a download: the same rows, with our own statuses.

    Hash and size of what was refused are not in that layout.
    """
    ds = runs[mode].ds
    again = adopt("img2dataset", Path(ds.store.root))
    columns = "status, status_detail, http_status, attempts, url, caption, licence"
    assert _adopted(ds, columns) == _adopted(again, columns)
    left, right = (_adopted(d, f"status, {FACTS}") for d in (ds, again))
    stored = {key for key, row in left.items() if row[0] == "ok"}
    assert {k: left[k] for k in stored} == {k: right[k] for k in stored}
    assert _bytes(again) == _bytes(ds)


def _differences(both: Both) -> list[float]:
    """Mean absolute difference, in levels of 255, of each picture that both tools mean to store alike."""
    theirs, ours = _members(both.theirs), _members(both.export)
    differ = _keys_of(both, lambda e: not e.like_ours)
    found = []
    for name in sorted(n for n in theirs if n.endswith(".jpg") and n.partition(".")[0] not in differ):
        left, right = peer.pixels(theirs[name]), peer.pixels(ours[name])
        assert left.shape == right.shape, name
        found.append(float(np.abs(left.astype(np.int16) - right).mean()))
    return found


@pytest.mark.parametrize("mode", MODES)
def test_pixels_differ_by_what_the_page_says(mode: str, runs: dict[str, Both]) -> None:
    """The mean over pictures; the page's figures are this test's own, so a change of either is noticed."""
    found = _differences(runs[mode])
    assert len(found) >= (80 if mode == "keep_ratio" else 19)
    mean, worst = float(np.mean(found)), max(found)
    print(f"{mode}: {len(found)} pictures, mean absolute difference {mean:.4f}, worst picture {worst:.4f}")
    row = re.search(rf"^\| `{mode}` \| ([\d.]+) \| ([\d.]+) \|$", PEERS_PAGE.read_text(encoding="utf-8"), re.M)
    assert row is not None
    assert mean == pytest.approx(float(row[1]), abs=0.005)
    assert worst == pytest.approx(float(row[2]), abs=0.005)
    assert worst < 0.01  # the stated bound


def test_pictures_in_colour_are_the_same_bytes(runs: dict[str, Both]) -> None:
    """Grey pictures apart, which img2dataset stores with one channel: same pixels, other bytes."""
    both = runs["keep_ratio"]
    theirs, ours = _members(both.theirs), _members(both.export)
    colour = _keys_of(both, lambda e: e.like_ours and e.group != "grey")
    assert len(colour) >= 78
    assert all(theirs[f"{k}.jpg"] == ours[f"{k}.jpg"] for k in colour)


def test_what_img2dataset_turns_white_keeps_its_tones(runs: dict[str, Both]) -> None:
    """A 16-bit ramp from black to white: its mean is 127.5 of 255."""
    both = runs["keep_ratio"]
    [key] = _keys_of(both, lambda e: e.group == "sixteen bits")
    theirs, ours = (peer.pixels(_members(folder)[f"{key}.jpg"]).mean() for folder in (both.theirs, both.export))
    assert ours == pytest.approx(127.5, abs=1.5)
    assert theirs > 240


@pytest.fixture(scope="module")
def adopt(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Adopts a folder by kind, with two stages run over its pictures."""
    scratch = tmp_path_factory.mktemp("adopted")

    def adopted(kind: str, folder: Path, **options: Any) -> Dataset:
        name = f"{folder.name}_{kind}".replace("-", "_")
        source = {"kind": kind, "path": str(folder), "columns": ["licence"], **options}
        steps = ["probe_image", "hash_image"]
        recipe = {"name": name, "dataset": str(scratch / name), "source": source, "steps": steps}
        return mmdata.run(recipe, runner="inline")

    return adopted


FACTS = (
    "url, caption, licence, sha256, width_px, height_px, original_width_px, original_height_px, image_size, image_ext"
)
SEEN = "aspect_ratio, phash"  # what the two stages made of the picture


def _adopted(ds: Dataset, columns: str = f"{FACTS}, {SEEN}") -> dict[str, tuple[Any, ...]]:
    found = ds.sql(f"SELECT key, {columns} FROM samples").fetchall()
    assert len({row[0] for row in found}) == len(found)
    return {row[0]: row[1:] for row in found}


def _bytes(ds: Dataset) -> dict[str, bytes]:
    rows = ds.sql("SELECT key, image_path, image_offset, image_size FROM rows WHERE status = 'ok'").fetchall()
    return {f"{key}.jpg": ds.read_media(path, offset, size) for key, path, offset, size in rows}


@pytest.mark.parametrize("mode", MODES)
def test_both_folders_adopted_give_the_same_rows(mode: str, runs: dict[str, Both], adopt: Any) -> None:
    """All of img2dataset's formats. Its failures come along, with our statuses; an export has none."""
    both = runs[mode]
    theirs, ours = adopt("img2dataset", both.theirs), adopt("img2dataset", both.export)
    statuses = {k: v[0] for k, v in _adopted(theirs, "status").items()}
    expected = [e.adopted or e.ours for e in both.served.rows]
    assert statuses == dict(zip(both.keys, expected, strict=True))
    messages = {k: r["error_message"] for k, r in _rows(both.theirs).items()}
    details = {k: v[0] for k, v in _adopted(theirs, "status_detail").items()}
    for key, message in messages.items():
        assert details[key] == message
    left, right = _adopted(theirs), _adopted(ours)
    assert set(right) == {k for k, s in statuses.items() if s == "ok"}
    differ = _keys_of(both, lambda e: not e.like_ours or e.group == "grey")
    assert {k: left[k] for k in right.keys() - differ} == {k: right[k] for k in right.keys() - differ}
    for ds, folder in ((theirs, both.theirs), (ours, both.export)):
        assert _bytes(ds) == {n: d for n, d in _members(folder).items() if n.endswith(".jpg")}


def test_both_folders_adopted_as_plain_webdatasets(runs: dict[str, Both], adopt: Any) -> None:
    """Without the Parquet there is what the tar holds: the successes, their captions ('' for none) and .json."""
    both = runs["keep_ratio"]
    theirs, ours = adopt("webdataset", both.theirs), adopt("webdataset", both.export)
    columns = f"url, caption, licence, width_px, height_px, {SEEN}"
    left, right = _adopted(theirs, columns), _adopted(ours, columns)
    successes = {k: r for k, r in _rows(both.theirs).items() if r["status"] == "success"}
    assert set(left) == set(right) == set(successes)
    same = left.keys() - _keys_of(both, lambda e: not e.like_ours)
    assert {k: left[k] for k in same} == {k: right[k] for k in same}
    for key, row in successes.items():
        assert left[key][:3] == (row["url"], row["caption"] or "", row["licence"])
    # the shape of the original is known to the Parquet alone, what the picture looks like to both
    by_parquet = _adopted(adopt("img2dataset", both.theirs), "phash")
    assert {k: v[-1:] for k, v in left.items()} == {k: by_parquet[k] for k in left}


def test_what_img2dataset_stores_sideways_we_store_upright(runs: dict[str, Both]) -> None:
    """EXIF orientation 3, 6 and 8: turned back, its pictures are ours but for the rounding of another raster."""
    both = runs["keep_ratio"]
    theirs, ours, rows = _members(both.theirs), _members(both.export), _rows(both.theirs)
    turned = {k: e for k, e in zip(both.keys, both.served.rows, strict=True) if e.group == "turned"}
    quarter_turns = {"/turned/3.jpg": 2, "/turned/6.jpg": 3, "/turned/8.jpg": 1}  # counter-clockwise
    assert len(turned) == 3
    for key, entry in turned.items():
        left = np.rot90(peer.pixels(theirs[f"{key}.jpg"]), quarter_turns[str(entry.path)])
        right = peer.pixels(ours[f"{key}.jpg"])
        assert left.shape == right.shape
        assert float(np.abs(left.astype(np.int16) - right).mean()) < 1.5
        assert (rows[key]["original_width"], rows[key]["original_height"]) == (400, 300)
