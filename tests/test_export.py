"""Export: what lands in the folder, where shards are cut, and that a folder is whole, absent, or somebody else's."""

# long because: one small dataset feeds every case, and the cases are read together

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kept_rows
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from pydantic import ValidationError

from mmdata.errors import RecipeError, StoreError
from mmdata.export import ExportOptions, export
from mmdata.settings import parse_size

RECIPE = "name: pets\nsteps: [probe_image]\n"
MANIFEST = "_mmdata_export.json"


@pytest.fixture
def rows(tmp_path: Path) -> kept_rows.KeptRows:
    return kept_rows.dataset(tmp_path / "dataset")


def run(rows: Any, path: Path, **options: Any) -> Any:
    return export(rows, ExportOptions(path=str(path), **options), RECIPE)


def members(tar: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(tar) as file:
        for member in file:
            yield member.name, file.extractfile(member).read()  # type: ignore[union-attr]


def contents(folder: Path) -> dict[str, str]:
    """Name → sha256 of every file, but for the statistics, which hold times."""
    found = sorted(p for p in folder.iterdir() if not p.name.endswith("_stats.json"))
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def beside(path: Path) -> list[str]:
    return sorted(p.name for p in path.parent.iterdir())


def test_webdataset_layout(rows: kept_rows.KeptRows, tmp_path: Path) -> None:
    """32 kept rows (two thirds of 48), ten to a shard: 10, 10, 10 and 2."""
    result = run(rows, tmp_path / "out", shard_rows=10)
    assert (result.rows, result.shards, result.written) == (32, 4, True)
    names = [f"{s:05d}{end}" for s in range(4) for end in (".parquet", ".tar", "_stats.json")]
    assert sorted(p.name for p in result.path.iterdir()) == sorted([*names, "README.md", MANIFEST])
    assert result.data_bytes == sum(p.stat().st_size for p in result.path.glob("0*.[tp]a*"))
    expected = [n for n in range(48) if n % 3]
    seen: list[str] = []
    for shard, count in enumerate((10, 10, 10, 2)):
        found = dict(members(result.path / f"{shard:05d}.tar"))
        keys = list(dict.fromkeys(name.partition(".")[0] for name in found))
        assert list(found) == [f"{k}.{ext}" for k in keys for ext in ("jpg", "txt", "json")]
        assert len(keys) == count
        assert pq.read_table(result.path / f"{shard:05d}.parquet").column("key").to_pylist() == keys
        stats = json.loads((result.path / f"{shard:05d}_stats.json").read_text())
        assert {k: stats[k] for k in ("count", "successes", "failed_to_download", "failed_to_resize")} == {
            "count": count, "successes": count, "failed_to_download": 0, "failed_to_resize": 0,
        }  # fmt: skip
        assert stats["status_dict"] == {"success": count}
        assert stats["end_time"] - stats["start_time"] == pytest.approx(stats["duration"])
        for key in keys:
            assert found[f"{key}.jpg"] == kept_rows.picture(int(key))
            assert found[f"{key}.txt"].decode() == (kept_rows.caption(int(key)) or "")
        seen += keys
    assert seen == [f"{n:07d}" for n in expected]


def test_json_holds_what_is_never_null_and_parquet_holds_all(rows: kept_rows.KeptRows, tmp_path: Path) -> None:
    out = run(rows, tmp_path / "out").path
    samples = [json.loads(data) for name, data in members(out / "00000.tar") if name.endswith(".json")]
    # caption is NULL in every fifth row, rare in the first seven, exif and error_message in all; phash is uint64
    names = ["key", "url", "status", "width", "height", "original_width", "original_height", "sha256", "uid"]
    names += ["license", "source_Width", "clip_score", "labels"]
    assert {tuple(s) for s in samples} == {tuple(names)}
    assert samples[0] == {
        "key": "0000001", "url": "http://pictures.test/1.jpg?a=1,2", "status": "success", "width": 49, "height": 40,
        "original_width": 196, "original_height": 160, "sha256": f"{1:064x}", "uid": f"{1:032x}", "license": "CC0",
        "source_Width": 7, "clip_score": pytest.approx(-0.24), "labels": ["cat", "ü"],
    }  # fmt: skip
    table = pq.read_table(out / "00000.parquet")
    assert table.column_names == [
        *("key", "url", "caption", "status", "error_message", "width", "height", "original_width", "original_height"),
        *("exif", "sha256", "uid", "license", "source_Width", "clip_score", "rare", "phash", "labels"),
    ]
    assert table.column("rare").to_pylist()[:9] == [None] * 7 + [11 / 3, 13 / 3]
    assert table.column("phash").to_pylist()[2] == 4 * 0x9E3779B97F4A7C15 % 2**64
    assert table.schema.field("phash").type == pa.uint64()
    assert set(table.column("error_message").to_pylist()) == {None}


def test_json_nulls_writes_img2datasets_form(rows: kept_rows.KeptRows, tmp_path: Path) -> None:
    out = run(rows, tmp_path / "out", json_nulls=True, columns=("rare",)).path
    first = next(json.loads(data) for name, data in members(out / "00000.tar") if name.endswith(".json"))
    assert first["error_message"] is None
    assert first["exif"] is None
    assert first["rare"] is None
    assert first["caption"] == kept_rows.caption(1)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"labels": lambda n: [] if n == 47 else ["x"]}, "labels"),
        ({"clip_score": lambda n: float("inf") if n == 47 else 1.0}, "clip_score"),
        ({"license": lambda n: None if n == 47 else "CC0"}, "license"),
        ({"labels": lambda n: [None] if n == 47 else ["x"]}, "labels"),
    ],
)
def test_one_odd_value_in_the_last_row_keeps_a_column_out_of_every_json(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    out = run(kept_rows.dataset(tmp_path / "dataset", **change), tmp_path / "out").path
    for name, data in members(out / "00000.tar"):
        assert not name.endswith(".json") or named not in json.loads(data)
    assert named in pq.read_schema(out / "00000.parquet").names


def test_chosen_columns_follow_img2datasets_own(rows: kept_rows.KeptRows, tmp_path: Path) -> None:
    out = run(rows, tmp_path / "out", columns=("caption", "clip_score", "width_px", "fetch_ms", "key")).path
    assert pq.read_schema(out / "00000.parquet").names[-3:] == ["sha256", "clip_score", "fetch_ms"]
    assert rows.asked[1:] == [["clip_score"]] * 4  # the first, of all columns, is for the schema


def test_card(rows: kept_rows.KeptRows, tmp_path: Path) -> None:
    recipe = "name: '</x> | pets'\n# ``` closes a block\n"
    out = export(rows, ExportOptions(path=str(tmp_path / "out"), shard_rows=10), recipe).path
    card = (out / "README.md").read_text()
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["configs"] == [{"config_name": "default", "data_files": [{"split": "train", "path": "*.tar"}]}]
    assert header["size_categories"] == ["n<1K"]
    assert "# &lt;/x&gt; \\| pets\n" in card
    assert f"````yaml\n{recipe.rstrip()}\n````\n" in card
    assert rows.funnel().markdown() in card
    assert 'load_dataset("webdataset", data_files={"train": "*.tar"})' in card
    assert "chain: `c0ffee`" in card
    assert "| clip\\_score | float |  | json, parquet | made by step aligned |" in card
    assert "| rare | double |  | parquet | as given in the source |" in card
    assert "| original\\_width | int32 | px | json, parquet | as fetched, upright; NULL = not decoded |" in card
    assert str(tmp_path) not in card
    for column in pq.read_schema(out / "00000.parquet").names:
        assert f"| {column} |".replace("_", "\\_") in card


def test_a_column_that_is_not_there_is_named(rows: kept_rows.KeptRows, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no column 'clip_scor'; did you mean 'clip_score'"):
        run(rows, tmp_path / "out", columns=("clip_scor",))
    assert not (tmp_path / "out").exists()


def test_no_captions_no_txt(tmp_path: Path) -> None:
    out = run(kept_rows.dataset(tmp_path / "dataset", caption=lambda n: None), tmp_path / "out").path
    assert {name.partition(".")[2] for name, _ in members(out / "00000.tar")} == {"jpg", "json"}


def test_mixed_formats_share_one_extension(tmp_path: Path) -> None:
    rows = kept_rows.dataset(tmp_path / "dataset", image_ext=lambda n: "png" if n % 2 else "jpeg")
    out = run(rows, tmp_path / "out").path
    assert {name.partition(".")[2] for name, _ in members(out / "00000.tar")} == {"jpg", "txt", "json"}
    assert "16 jpg, 16 png" in (out / "README.md").read_text()
    same = run(kept_rows.dataset(tmp_path / "dataset", image_ext=lambda n: "png"), tmp_path / "png").path
    assert {name.partition(".")[2] for name, _ in members(same / "00000.tar")} == {"png", "txt", "json"}


def test_rows_without_an_image_are_refused_in_tars_and_null_in_parquet(tmp_path: Path) -> None:
    none = {f"image_{part}": (lambda n: None) for part in ("path", "offset", "size", "ext")}
    rows = kept_rows.dataset(tmp_path / "dataset")
    bare = kept_rows.dataset(tmp_path / "dataset", **none).tables[1]
    rows.tables[1] = bare
    with pytest.raises(RecipeError, match="16 kept rows have no image"):
        run(rows, tmp_path / "out")
    out = run(rows, tmp_path / "out", format="parquet").path
    images = pq.read_table(out / "00000.parquet").column("image").to_pylist()
    assert [i is None for i in images] == [False] * 16 + [True] * 16


def _tar_bytes(rows: kept_rows.KeptRows, samples: list[tuple[str, bytes]]) -> int:
    """512 of header and the payload in whole blocks of 512 for each member, 1024 at the end."""
    return sum(512 + (len(data) + 511) // 512 * 512 for _, data in samples) + 1024


def test_shards_are_cut_by_bytes_of_the_tar(rows: kept_rows.KeptRows, tmp_path: Path) -> None:
    limit = 20_000
    out = run(rows, tmp_path / "out", shard_size=limit).path
    tars = [list(members(p)) for p in sorted(out.glob("*.tar"))]
    assert len(tars) > 3
    for tar, following, path in zip(tars, tars[1:], sorted(out.glob("*.tar")), strict=False):
        assert path.stat().st_size == _tar_bytes(rows, tar) <= limit
        assert _tar_bytes(rows, tar + following[:3]) > limit  # the next sample would not have fitted
    whole = run(rows, tmp_path / "one").path / "00000.tar"
    assert [n for tar in tars for n, _ in tar] == [n for n, _ in members(whole)]


def test_a_sample_larger_than_the_limit_has_its_own_shard(rows: kept_rows.KeptRows, tmp_path: Path) -> None:
    assert run(rows, tmp_path / "out", shard_size="1KB").shards == 32


def test_rows_and_bytes_both_bound(rows: kept_rows.KeptRows, tmp_path: Path) -> None:
    out = run(rows, tmp_path / "out", shard_size="20KB", shard_rows=3).path
    counts = [len(pq.read_table(p)) for p in sorted(out.glob("*.parquet"))]
    assert max(counts) == 3
    assert sum(counts) == 32


def test_parquet_row_groups_are_bounded_by_bytes(rows: kept_rows.KeptRows, tmp_path: Path) -> None:
    out = run(rows, tmp_path / "out", format="parquet", shard_rows=20, row_group_bytes="6KB").path
    sizes = []
    for path in sorted(out.glob("*.parquet")):
        file = pq.ParquetFile(path)
        groups = [file.read_row_group(i).column("image").to_pylist() for i in range(file.num_row_groups)]
        sizes.append([sum(len(i["bytes"]) for i in group) for group in groups])
        images = [image for group in groups for image in group]
        keys = file.read().column("key").to_pylist()
        assert [i["path"] for i in images] == [f"{k}.jpg" for k in keys]
        assert [i["bytes"] for i in images] == [rows.pictures[k] for k in keys]
        file.close()
    assert len(sizes) == 2
    assert len(sizes[0]) > 2
    assert max(map(max, sizes)) <= 6000
    plain = run(rows, tmp_path / "plain", format="parquet", include_media=False).path
    assert "image" not in pq.read_schema(plain / "00000.parquet").names


def test_nothing_kept_is_an_export_with_a_card(rows: kept_rows.KeptRows, tmp_path: Path) -> None:
    rows.tables = [t.slice(0, 0) for t in rows.tables]
    result = run(rows, tmp_path / "out")
    assert (result.rows, result.shards) == (0, 0)
    assert "0 samples in 0 shards" in (result.path / "README.md").read_text()
    assert run(rows, tmp_path / "out").written is False


@pytest.mark.parametrize("format", ["webdataset", "parquet"])
def test_bytes_depend_on_content_alone(tmp_path: Path, format: str) -> None:
    """Other folders, another time, other chunks and NULL bitmaps, media at other offsets, shards of other sizes."""
    first = run(kept_rows.dataset(tmp_path / "a"), tmp_path / "out1", format=format, shard_rows=7).path
    time.sleep(1.1)  # a clock in the bytes would show: tar counts seconds
    again = kept_rows.dataset(tmp_path / "b", shards=4, rows=12)
    again.tables = [pa.concat_tables([t.slice(0, 3), t.slice(3)]) for t in again.tables]
    again.media = bytes(1000) + again.media
    again.tables = [
        t.set_column(i, "image_offset", pa.array([o + 1000 for o in t.column("image_offset").to_pylist()]))
        for t in again.tables
        for i in [t.schema.get_field_index("image_offset")]
    ]
    # row_id differs, as it would after another ingest, and is not exported
    second = run(again, tmp_path / "elsewhere" / "out2", format=format, shard_rows=7).path
    one, two = contents(first), contents(second)
    assert {n: h for n, h in one.items() if n != MANIFEST} == {n: h for n, h in two.items() if n != MANIFEST}


def test_same_content_is_left_alone(rows: kept_rows.KeptRows, tmp_path: Path) -> None:
    out = run(rows, tmp_path / "out").path
    before, inode, reads = contents(out), (out / "00000.tar").stat().st_ino, rows.reads
    assert run(rows, out).written is False
    assert (contents(out), (out / "00000.tar").stat().st_ino, rows.reads) == (before, inode, reads)


def test_another_recipe_over_the_same_rows_changes_only_the_card(rows: kept_rows.KeptRows, tmp_path: Path) -> None:
    out = run(rows, tmp_path / "out").path
    before = contents(out)
    assert export(rows, ExportOptions(path=str(out)), "name: dogs\n").written is False
    changed = {n for n, h in contents(out).items() if before[n] != h}
    assert changed == {"README.md"}
    assert "# dogs" in (out / "README.md").read_text()
    assert beside(out) == ["out"]


@pytest.mark.parametrize("damage", ["00000.tar", "00000.parquet"])
def test_a_damaged_export_is_written_anew(rows: kept_rows.KeptRows, tmp_path: Path, damage: str) -> None:
    out = run(rows, tmp_path / "out").path
    before = contents(out)
    with (out / damage).open("ab") as file:
        file.write(b"x")
    assert run(rows, out).written is True
    assert contents(out) == before
    (out / damage).unlink()
    assert run(rows, out).written is True
    assert contents(out) == before


def test_other_content_replaces_an_earlier_export_whole(rows: kept_rows.KeptRows, tmp_path: Path) -> None:
    out = run(rows, tmp_path / "out", shard_rows=5).path
    rows.tables[1] = rows.tables[1].slice(0, 4)
    assert run(rows, out, shard_rows=5).written is True
    assert sorted(p.name for p in out.glob("*.tar")) == [f"{s:05d}.tar" for s in range(4)]
    fresh = run(rows, tmp_path / "fresh", shard_rows=5).path
    assert contents(out) == contents(fresh)
    assert beside(out) == ["fresh", "out"]


def test_foreign_files_are_never_touched(rows: kept_rows.KeptRows, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(RecipeError, match=r"no export of mmdata \(it holds 'thesis.txt'\)"):
        run(rows, mine)
    out = run(rows, tmp_path / "out").path
    (out / "notes.txt").write_text("mine")
    assert run(rows, out).written is False  # nothing to write, so nobody is disturbed
    with pytest.raises(RecipeError, match=r"'notes.txt', which mmdata did not write"):
        run(rows, out, shard_rows=3)
    (mine / MANIFEST).write_text("{not json")
    with pytest.raises(RecipeError, match="no export of mmdata"):
        run(rows, mine)
    assert (mine / "thesis.txt").read_text() == "years of work"
    assert (out / "notes.txt").read_text() == "mine"
    (tmp_path / "file").write_text("x")
    with pytest.raises(RecipeError, match="is a file"):
        run(rows, tmp_path / "file")
    assert beside(out) == ["file", "mine", "out"]


def test_an_empty_folder_is_taken(rows: kept_rows.KeptRows, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert run(rows, tmp_path / "out").written is True


@pytest.mark.parametrize("where", ["dataset", "dataset/export", "."])
def test_never_in_or_around_the_dataset(rows: kept_rows.KeptRows, tmp_path: Path, where: str) -> None:
    (tmp_path / "dataset").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "dataset")
    for path in (tmp_path / where, tmp_path / "link" / "export"):
        with pytest.raises(RecipeError, match="in or around the dataset"):
            run(rows, path)
    assert beside(tmp_path / "dataset") == ["dataset", "link"]


def test_only_local_folders(rows: kept_rows.KeptRows) -> None:
    with pytest.raises(RecipeError, match="is not a local folder"):
        export(rows, ExportOptions(path="s3://bucket/out"), RECIPE)


def test_a_ledger_that_disagrees_stops_the_export(rows: kept_rows.KeptRows, tmp_path: Path) -> None:
    whole = rows.funnel()
    rows.tables[0] = rows.tables[0].slice(1)
    rows.funnel = lambda: whole  # type: ignore[method-assign]
    with pytest.raises(StoreError, match="ledger counts 32 kept rows, the shards hold 31"):
        run(rows, tmp_path / "out")


def test_media_cut_short_stops_the_export_and_leaves_nothing(rows: kept_rows.KeptRows, tmp_path: Path) -> None:
    rows.media = rows.media[:-30_000]
    with pytest.raises(StoreError, match=r"media/blob.tar is cut short"):
        run(rows, tmp_path / "out")
    assert beside(tmp_path / "out") == []


@pytest.mark.parametrize("key", ["a.b", "/a", "../a", "a/.b/c", "a/", "", "x" * 91, "a b"])
def test_keys_that_cannot_name_a_member_are_refused(tmp_path: Path, key: str) -> None:
    rows = kept_rows.dataset(tmp_path / "dataset", key=lambda n: key if n == 1 else f"{n:07d}")
    with pytest.raises(RecipeError, match="cannot name a file in a tar"):
        run(rows, tmp_path / "out")
    assert run(rows, tmp_path / "out", format="parquet").rows == 32


def test_equal_keys_in_a_shard_are_refused(tmp_path: Path) -> None:
    rows = kept_rows.dataset(tmp_path / "dataset", key=lambda n: "same" if n < 3 else f"{n:07d}")
    with pytest.raises(RecipeError, match="two samples with the same key"):
        run(rows, tmp_path / "out")


def test_two_exports_to_one_folder_keep_apart(rows: kept_rows.KeptRows, tmp_path: Path) -> None:
    other = kept_rows.dataset(tmp_path / "dataset")

    def read_while_another_starts(path: str, offset: int, size: int) -> bytes:
        with pytest.raises(StoreError, match="another export is writing"):
            run(other, tmp_path / "out")
        return rows.media[offset : offset + size]

    rows.read_media = read_while_another_starts  # type: ignore[method-assign]
    assert run(rows, tmp_path / "out").written is True
    assert beside(tmp_path / "out") == ["out"]


def test_ticks_count_every_sample(rows: kept_rows.KeptRows, tmp_path: Path) -> None:
    ticks: list[int] = []
    export(rows, ExportOptions(path=str(tmp_path / "out")), None, tick=ticks.append)
    assert sum(ticks) == 32


def test_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: it needs no root, and the kernel refuses the write."""
    code = (
        "import resource, sys, kept_rows; from pathlib import Path; from mmdata.export import *\n"
        "rows = kept_rows.dataset(Path(sys.argv[1], 'dataset'))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "export(rows, ExportOptions(path=sys.argv[1] + '/out'), None)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=_environment(), check=False, capture_output=True, text=True
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("mmdata.errors.StoreError: "), done.stderr
    assert "the disk or a quota is full" in last
    assert list(tmp_path.iterdir()) == []


def _environment() -> dict[str, str]:
    fixtures = Path(kept_rows.__file__).parent
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(fixtures.parents[1]), str(fixtures)])}


def _export_in_a_process(tmp_path: Path, format: str, event: str, count: int) -> int:
    script = Path(kept_rows.__file__)
    arguments = [str(tmp_path / "dataset"), str(tmp_path / "out"), format, event, str(count)]
    return subprocess.run([sys.executable, str(script), *arguments], env=_environment(), check=False).returncode


@pytest.mark.parametrize(
    ("format", "event", "count"),
    [
        ("webdataset", "media", 1),
        ("webdataset", "media", 17),
        ("webdataset", "fsync", 2),
        ("webdataset", "fsync", 12),
        ("webdataset", "commit", 1),
        ("webdataset", "commit", 5),
        ("webdataset", "rename", 1),
        ("webdataset", "rename", 2),
        ("parquet", "media", 25),
        ("parquet", "rename", 1),
    ],
)
def test_killed_and_run_again_equals_an_uninterrupted_export(
    tmp_path: Path, format: str, event: str, count: int
) -> None:
    assert _export_in_a_process(tmp_path, format, event, count) == -signal.SIGKILL
    out = tmp_path / "out"
    assert not out.exists()
    assert any(name.startswith("out.attempt-") for name in beside(out))
    rows = kept_rows.dataset(tmp_path / "dataset")
    options = {"format": format, "shard_rows": 10}
    assert export(rows, ExportOptions(path=str(out), **options), "name: pets\n").written is True
    assert beside(out) == ["out"]
    whole = export(rows, ExportOptions(path=str(tmp_path / "whole"), **options), "name: pets\n").path
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("count", [1, 2])
def test_killed_while_replacing_loses_nothing_for_good(tmp_path: Path, count: int) -> None:
    """The first rename moves the old export aside, the second moves the new one in; a kill may fall before either."""
    rows = kept_rows.dataset(tmp_path / "dataset")
    out = export(rows, ExportOptions(path=str(tmp_path / "out"), shard_rows=3), "name: pets\n").path
    old = contents(out)
    assert _export_in_a_process(tmp_path, "webdataset", "rename", count) == -signal.SIGKILL
    if count == 2:
        assert not out.exists()
        with pytest.raises(RecipeError, match="no column"):
            run(rows, out, columns=("nonsense",))
    assert contents(out) == old  # the next export puts it back, even one that fails
    assert export(rows, ExportOptions(path=str(out), shard_rows=10), "name: pets\n").written is True
    assert beside(out) == ["out"]
    whole = export(rows, ExportOptions(path=str(tmp_path / "whole"), shard_rows=10), "name: pets\n").path
    assert contents(out) == contents(whole)


@pytest.mark.parametrize(
    ("text", "size"),
    [("1GB", 10**9), ("512 MiB", 512 * 2**20), ("1.5kb", 1500), (4096, 4096), ("7", 7), ("2TB", 2 * 10**12), ("3B", 3)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "1 parsec", "-1GB", "0", "1e9", "0.1B", "1GB/s"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValidationError, match="shard_size"):
        ExportOptions(path="out", shard_size=text)
    with pytest.raises(ValidationError, match="row_group_bytes"):
        ExportOptions(path="out", row_group_bytes=text)


def test_misspelt_options_are_refused() -> None:
    with pytest.raises(ValidationError, match="shard_sise"):
        ExportOptions(path="out", shard_sise="1GB")  # type: ignore[call-arg]


def test_every_option_is_described() -> None:
    assert [n for n, f in ExportOptions.model_fields.items() if not f.description] == []
