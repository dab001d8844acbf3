"""Adopting folders of pictures; HF's imagefolder is read by `datasets` as the independent witness."""

from __future__ import annotations

import csv
import gc
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import adopted, media_of, picture, rows_of

from mmdata.errors import RecipeError, SourceError
from mmdata.ingest import uid_of


def put(folder: Path, name: str, data: bytes | str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def test_captions_beside_the_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    put(folder, "b.png", picture(1, "PNG"))
    put(folder, "a.b.jpg", picture(2))
    put(folder, "a.b.txt", "\ufeffein Bild ü\n")
    put(folder, "deep/er/c.webp", picture(3, "WEBP"))
    put(folder, "deep/er/c.txt", "tief")
    put(folder, "notes.md", "no picture")
    put(folder, ".hidden/x.jpg", picture(4))
    ds = adopted(tmp_path / "ds", {"kind": "images", "path": str(folder)}, fetch={"shard_rows": 2})
    rows = rows_of(ds)
    assert [(r["path"], r["caption"]) for r in rows] == [
        ("a.b.jpg", "ein Bild ü"),
        ("b.png", None),
        ("deep/er/c.webp", "tief"),
    ]
    assert [r["uid"] for r in rows] == [uid_of("path", r["path"], r["caption"]) for r in rows]
    assert [r["key"] for r in rows] == ["000000", "000001", "000010"]
    assert [(r["width_px"], r["height_px"], r["image_ext"]) for r in rows] == [
        (42, 30, "jpg"),
        (41, 30, "png"),
        (43, 30, "webp"),
    ]
    assert media_of(ds) == [picture(2), picture(1, "PNG"), picture(3, "WEBP")]
    assert {r["status"] for r in rows} == {"ok"}


# The library leaves its file open: it is collected here, so that no other test is charged with it.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_the_same_as_hf_imagefolder(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "in"
    names = ["x.jpg", "sub/y.jpg", "sub/z.png"]
    for number, name in enumerate(names):
        put(folder, name, picture(number, "PNG" if name.endswith("png") else "JPEG"))
    lines = [{"file_name": n, "text": f"caption {i}, ü", "stars": i} for i, n in enumerate(names)]
    write_table(folder / f"metadata.{form}", lines)
    source = {"kind": "images", "path": str(folder), "columns": ["stars"]}
    ours = rows_of(ds := adopted(tmp_path / "ds", source))
    theirs = datasets.load_dataset(
        "imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "cache")
    )
    theirs = theirs.cast_column("image", datasets.Image(decode=False))
    expected = {Path(r["image"]["path"]).name: (r["text"], r["stars"]) for r in theirs}
    assert {Path(r["path"]).name: (r["caption"], r["stars"]) for r in ours} == expected
    assert media_of(ds) == [Path(folder / r["path"]).read_bytes() for r in ours]
    del theirs
    gc.collect()


def write_table(path: Path, lines: list[dict[str, object]]) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(lines), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(lines[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(lines)


def test_one_table_for_all_with_lines_and_pictures_that_have_no_partner(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for number, name in enumerate(["a.jpg", "d/b.jpg", "d/c.jpg"]):
        put(folder, name, picture(number))
    put(folder, "d/c.txt", "from the file")
    put(tmp_path, "outside.jpg", picture(9))
    lines: list[dict[str, object]] = [
        {"image": "d/b.jpg", "alt": "first", "rights": "cc"},
        {"image": "gone.jpg", "alt": "nobody", "rights": "by"},
        {"image": "d/b.jpg", "alt": "second", "rights": None},
        {"image": "../outside.jpg", "alt": "out", "rights": None},
        {"image": str(tmp_path / "outside.jpg"), "alt": "absolute", "rights": None},
        {"image": "a.jpg", "alt": None, "rights": "cc"},
    ]
    write_table(tmp_path / "table.tsv", lines)
    source = {
        "kind": "images",
        "path": str(folder),
        "metadata": str(tmp_path / "table.tsv"),
        "file_name": "image",
        "caption": "alt",
        "columns": ["rights"],
    }
    rows = rows_of(adopted(tmp_path / "ds", source))
    assert [(r["path"], r["caption"], r["rights"], r["status"]) for r in rows] == [
        ("a.jpg", None, "cc", "ok"),
        ("d/b.jpg", "first", "cc", "ok"),
        ("d/b.jpg", "second", None, "ok"),
        ("d/c.jpg", "from the file", None, "ok"),
        ("gone.jpg", "nobody", "by", "missing_media"),
        ("../outside.jpg", "out", None, "missing_media"),
        (str(tmp_path / "outside.jpg"), "absolute", None, "missing_media"),
    ]
    assert rows[4]["status_detail"] == "table.tsv names it, and it is not there"
    assert all(r["image_path"] is None for r in rows[4:])


def test_links_are_followed_inside_only(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    put(folder, "real/a.jpg", picture(1))
    put(tmp_path, "secret.jpg", picture(2))
    (folder / "inside.jpg").symlink_to(folder / "real" / "a.jpg")
    (folder / "outside.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder / "loop").symlink_to(folder)
    rows = rows_of(adopted(tmp_path / "ds", {"kind": "images", "path": str(folder)}))
    assert [(r["path"], r["status"]) for r in rows] == [
        ("inside.jpg", "ok"),
        ("loop", "missing_media"),  # a linked folder is told of, so that nobody wonders where its pictures went
        ("outside.jpg", "missing_media"),
        ("real/a.jpg", "ok"),
    ]
    assert rows[1]["status_detail"] == "a link to a folder, which is not followed"
    assert rows[2]["status_detail"] == "a link that leads out of the folder"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"path": "nowhere"}, SourceError, "there is no folder"),
        ({"columns": ["license"]}, SourceError, "no metadata.csv"),
        ({"captions": "metadata"}, SourceError, "no metadata.csv"),
        ({"metadata": "nothing.csv"}, SourceError, "there is no table"),
        ({"columns": ["key"], "metadata": "x.csv"}, SourceError, "uses itself"),
        ({"captoin": "x"}, RecipeError, "did you mean 'caption'"),
        ({"kind": "image"}, RecipeError, "did you mean 'images'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(
    tmp_path: Path, changes: dict[str, object], error: type[Exception], message: str
) -> None:
    put(tmp_path, "in/a.jpg", picture(1))
    with pytest.raises(error, match=message):
        adopted(tmp_path / "ds", {"kind": "images", "path": str(tmp_path / "in"), **changes})
    assert not (tmp_path / "ds").exists()


def test_fetch_options_have_no_effect_and_plan_says_so(tmp_path: Path) -> None:
    from mmdata.preflight import prove
    from mmdata.recipe import parse

    put(tmp_path, "in/a.jpg", picture(1))
    recipe = {"name": "x", "dataset": str(tmp_path / "ds"), "source": {"kind": "images", "path": str(tmp_path / "in")}}
    assert prove(parse({**recipe, "fetch": {"shard_rows": 7}})).plan.warnings == ()
    [warning] = prove(parse({**recipe, "fetch": {"timeout_s": 7, "shard_rows": 7}})).plan.warnings
    assert "fetch.timeout_s has no effect" in warning


def test_a_folder_behind_a_url(tmp_path: Path) -> None:
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.pipe_file("/pics/a.jpg", picture(1))
    fs.pipe_file("/pics/d/b.jpg", picture(2))
    fs.pipe_file("/pics/d/b.txt", b"far")
    try:
        ds = adopted(tmp_path / "ds", {"kind": "images", "path": "memory://pics"})
        assert [(r["path"], r["caption"]) for r in rows_of(ds)] == [("a.jpg", None), ("d/b.jpg", "far")]
        assert media_of(ds) == [picture(1), picture(2)]
    finally:
        fs.rm("/pics", recursive=True)
