"""Lists of URLs in every format, whole, broken and hostile; the lists are written by hand or by pandas and pyarrow."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmdata.errors import SourceError
from mmdata.sources import list_rows
from mmdata.sources.urls import UrlSource

ROWS = [
    {
        "url": "http://a.test/1.jpg",
        "caption": 'a "quoted", comma',
        "width": 640,
        "score": 0.5,
        "safe": True,
        "id": "007",
    },
    {
        "url": "http://a.test/2.jpg?x=1,2",
        "caption": "zwei\nlines",
        "width": 20,
        "score": 3.0,
        "safe": False,
        "id": "010",
    },
    {"url": "http://a.test/☃.jpg", "caption": None, "width": None, "score": None, "safe": None, "id": None},
]
EXTRA = ("width", "score", "safe", "id")


def write(folder: Path, format: str) -> Path:
    path = folder / f"list.{format}"
    frame = pd.DataFrame(ROWS).astype({"width": "Int64", "safe": "boolean"})
    if format in ("csv", "tsv"):
        frame.to_csv(path, index=False, sep="\t" if format == "tsv" else ",")
    elif format == "json":
        path.write_text(json.dumps(ROWS, indent=2, ensure_ascii=False))
    elif format == "jsonl":
        path.write_text("\n".join(json.dumps(r) for r in ROWS))
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    return path


def rows_of(source: UrlSource, size: int = 1000) -> list[dict[str, Any]]:
    return [row for table in source.tables(size) for row in table.to_pylist()]


@pytest.mark.parametrize("format", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_every_format_gives_the_same_rows_and_types(format: str, tmp_path: Path) -> None:
    source = UrlSource(path=str(write(tmp_path, format)), caption="caption", columns=EXTRA)
    types = dict(zip(EXTRA, (pa.int64(), pa.float64(), pa.bool_(), pa.string()), strict=True))
    assert {f.name: f.type for f in source.schema()} == types
    found = list(source.tables(10))
    assert [f.name for f in found[0].schema] == ["url", "caption", *EXTRA]
    assert found[0].to_pylist() == [{k: r[k] for k in ("url", "caption", *EXTRA)} for r in ROWS]


def test_txt_is_a_url_a_line_and_not_csv(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(
        '\ufeffhttp://a.test/x,y.jpg\r\n\n  http://a.test/"q.jpg \nhttp://a.test/\xff'.encode("utf-8")[:-2] + b"\xff"
    )
    found = rows_of(UrlSource(path=str(path)))
    assert [r["url"] for r in found] == ["http://a.test/x,y.jpg", 'http://a.test/"q.jpg', "http://a.test/\ufffd"]
    assert {r["caption"] for r in found} == {None}


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress)])
def test_compressed_lists(suffix: str, pack: Any, tmp_path: Path) -> None:
    path = tmp_path / f"list.csv{suffix}"
    path.write_bytes(pack(write(tmp_path, "csv").read_bytes()))
    assert [r["url"] for r in rows_of(UrlSource(path=str(path)))] == [r["url"] for r in ROWS]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(SourceError, match=r"list\.csv.* is cut short|cannot read"):
        rows_of(UrlSource(path=str(path)))


@pytest.mark.parametrize("size", [1, 7, 10_000, 25_000, 100_000])
@pytest.mark.parametrize("format", ["txt", "parquet"])
def test_tables_have_exactly_the_rows_asked_for(size: int, format: str, tmp_path: Path) -> None:
    if size == 1:
        total = 50
    else:
        total = 30_001
    urls = [f"http://a.test/{n}" for n in range(total)]
    for part, first in enumerate(range(0, total, 12_345)):
        chosen = urls[first : first + 12_345]
        if format == "txt":
            (tmp_path / f"{part}.txt").write_text("\n".join(chosen))
        else:
            pq.write_table(pa.table({"url": chosen}), tmp_path / f"{part}.parquet", row_group_size=5_000)
    tables = list(UrlSource(path=str(tmp_path)).tables(size))
    assert [len(t) for t in tables] == [size] * (total // size) + ([total % size] if total % size else [])
    assert [u for t in tables for u in t.column("url").to_pylist()] == urls
    assert all(t.column("url").num_chunks == 1 for t in tables)


def test_folder_glob_and_fsspec_url_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b.csv", "a.csv", "sub/c.csv", "_SUCCESS.csv", ".hidden.csv", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"url\nhttp://{Path(name).stem}.test/\n")
    assert [r["url"] for r in rows_of(UrlSource(path=str(tmp_path)))] == [f"http://{n}.test/" for n in "abc"]
    assert [r["url"] for r in rows_of(UrlSource(path=f"{tmp_path}/?.csv"))] == ["http://a.test/", "http://b.test/"]
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/lists-of-test/l.txt", b"http://m.test/")
    try:
        assert rows_of(UrlSource(path="memory://lists-of-test/l.txt"))[0]["url"] == "http://m.test/"
    finally:
        memory.rm("/lists-of-test", recursive=True)


def test_fingerprint_is_the_content_and_the_names(tmp_path: Path) -> None:
    one = tmp_path / "one.txt"
    one.write_text("http://a.test/")
    assert UrlSource(path=str(one)).fingerprint() == hashlib.sha256(b"http://a.test/").hexdigest()
    os.utime(one, ns=(1, 1))
    one.write_text("http://b.test/")
    assert UrlSource(path=str(one)).fingerprint() == hashlib.sha256(b"http://b.test/").hexdigest()
    (tmp_path / "two.txt").write_text("http://b.test/")
    both = UrlSource(path=str(tmp_path)).fingerprint()
    (tmp_path / "two.txt").rename(tmp_path / "three.txt")
    assert UrlSource(path=str(tmp_path)).fingerprint() != both


def test_a_broken_row_costs_that_row_only(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    lines = [
        b"url,caption",
        b"http://a.test/1,one",
        b'http://a.test/2,"never closed',
        b"http://a.test/3,thr\xffee",
        b"http://a.test/\xfe4,four",
        b"http://a.test/5",
        b"http://a.test/6,six,extra,cells",
        b"",
        b'"http://a.test/7"x,seven',
        b"http://a.test/8," + b"y" * 200_000,
        b'http://a.test/9,"two\r\nlines"',
    ]
    path.write_bytes(b"\r\n".join(lines))
    found = {
        (r["url"], r["caption"] and r["caption"][:20]) for r in rows_of(UrlSource(path=str(path), caption="caption"))
    }
    assert found == {
        ("http://a.test/1", "one"),
        ("http://a.test/2", "never closed"),
        ("http://a.test/3", "thr\ufffdee"),
        ("http://a.test/\ufffd4", "four"),
        ("http://a.test/5", None),
        ("http://a.test/6", "six"),
        ("http://a.test/7x", "seven"),
        (None, None),  # a cell of 200,000 characters
        ("http://a.test/9", "two\r\nlines"),
    }


def test_broken_lines_of_jsonl_are_rows_without_values(tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    odd = [
        b'{"url": "http://a.test/1"}',
        b'{"url": "http',
        b"[1, 2]",
        b"[" * 50_000,
        b'{"url": ["http://x"]}',
        b'{"url": "\\ud800"}',
    ]
    path.write_bytes(b"\n".join(odd))
    assert [r["url"] for r in rows_of(UrlSource(path=str(path)))] == [
        "http://a.test/1",
        None,
        None,
        None,
        None,
        "\ufffd\ufffd\ufffd",
    ]


def test_json_is_streamed_array_or_objects_in_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(list_rows, "_CHUNK", 7)  # every value is cut by a chunk border somewhere
    path = tmp_path / "list.json"
    rows = [{"url": f"http://a.test/ü{n}", "n": [n]} for n in range(20)]
    for text in (
        json.dumps(rows),
        " \n" + json.dumps(rows, indent=1, ensure_ascii=False),
        "\n".join(map(json.dumps, rows)),
    ):
        path.write_text(text, encoding="utf-8-sig")
        found = rows_of(UrlSource(path=str(path), columns=("n",)))
        assert [(r["url"], r["n"]) for r in found] == [(r["url"], json.dumps(r["n"])) for r in rows]
    path.write_text('[{"url": "http://a.test/1"}, {"url": oops}]')
    with pytest.raises(SourceError, match="is not JSON after character 29"):
        rows_of(UrlSource(path=str(path)))


def test_later_misfits_do_not_stop_the_run(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    numbers = [str(n) for n in range(10_000)] + ["many", "1.5", "7"]
    path.write_text("url,n\n" + "".join(f"http://a.test/,{n}\n" for n in numbers))
    found = [r["n"] for r in rows_of(UrlSource(path=str(path), columns=("n",)))]
    assert found == [*range(10_000), None, None, 7]
    path = tmp_path / "list.jsonl"
    values: list[Any] = ["a"] * 10_000 + [5, {"k": 1}, True]
    path.write_text("".join(json.dumps({"url": "http://a.test/", "t": v}) + "\n" for v in values))
    assert [r["t"] for r in rows_of(UrlSource(path=str(path), columns=("t",)))][10_000:] == ["5", '{"k": 1}', "true"]


def test_parquet_types_and_strings_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "list.parquet"
    raw = pa.array([b"http://a.test/1", b"http://a.test/\xff", None], pa.binary())
    broken = pa.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2], raw.buffers()[0])
    table = pa.table(
        {
            "u": broken,
            "kind": pa.array(["x", "y", None]).dictionary_encode(),
            "big": pa.array(["x", "y", None], pa.large_string()),
            "half": pa.array([1.0, 2.0, None], pa.float16()),
            "tags": pa.array([["a"], [], None]),
            "number": pa.array([1, 2, 3]),
            "id": pa.array(["x1", None, "x3"]),
        }
    )
    pq.write_table(table, path)
    source = UrlSource(path=str(path), url="u", caption="number", uid="id", columns=("kind", "big", "half", "tags"))
    assert [f.type for f in source.schema()] == [pa.string(), pa.string(), pa.float32(), pa.list_(pa.string())]
    (found,) = source.tables(10)
    assert found.column("url").to_pylist() == ["http://a.test/1", "http://a.test/\ufffd", None]
    assert found.column("caption").to_pylist() == ["1", "2", "3"]
    assert found.column("uid").to_pylist() == ["x1", None, "x3"]
    assert found.column("tags").to_pylist() == [["a"], [], None]


def bad_sources(folder: Path) -> Iterator[tuple[UrlSource, str]]:
    table = write(folder, "csv")
    yield UrlSource(path=str(folder / "lits.csv")), r"no list at .*lits\.csv; did you mean 'list\.csv'\?"
    yield UrlSource(path=str(table), url="ulr"), r"has no column 'ulr' \(source\.url\); did you mean 'url'\?"
    yield UrlSource(path=str(table), columns=("widht",)), r"no column 'widht' \(source\.columns\); did you mean 'width'"
    yield UrlSource(path=str(table), columns=("Status",)), "'Status', which mmdata uses itself"
    yield UrlSource(path=str(table), columns=("id", "ID")), "'ID' twice"
    for name, content in {"empty.txt": b"", "blank.txt": b"\n \n", "head.csv": b"url\n", "none.json": b"[]"}.items():
        (folder / name).write_bytes(content)
        yield UrlSource(path=str(folder / name)), "has no rows"
    pq.write_table(pa.table({"url": pa.array([], pa.string())}), folder / "none.parquet")
    yield UrlSource(path=str(folder / "none.parquet")), "has no rows"
    pq.write_table(pa.table({"url": pa.array([1])}), folder / "number.parquet")
    yield UrlSource(path=str(folder / "number.parquet")), "is int64; text was expected"
    (folder / "torn.parquet").write_bytes(b"PAR1 nothing")
    yield UrlSource(path=str(folder / "torn.parquet")), r"cannot read .*torn\.parquet"
    (folder / "wide.csv").write_bytes("url\nhttp://a.test".encode("utf-16"))
    yield UrlSource(path=str(folder / "wide.csv")), "is UTF-16"
    (folder / "list.dat").write_bytes(b"x")
    yield UrlSource(path=str(folder / "list.dat")), "cannot tell the format"
    (folder / "ok.txt").write_bytes(b"http://a.test/")
    yield (
        UrlSource(path=str(folder / "ok.txt"), caption="c", columns=("d",)),
        "leave out source.caption and source.columns",
    )
    (folder / "mixed").mkdir()
    yield UrlSource(path=str(folder / "mixed")), "holds no list"
    for name in ("a.txt", "b.csv"):
        (folder / "mixed" / name).write_bytes(b"url\nhttp://a.test/")
    yield UrlSource(path=str(folder / "mixed")), r"several formats \(csv, txt\)"
    yield UrlSource(path="nosuchprotocol://x/y.csv"), "cannot read nosuchprotocol"


def test_a_list_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    for source, words in bad_sources(tmp_path):
        for act in (source.schema, lambda source=source: next(source.tables(10))):
            with pytest.raises(SourceError, match=words) as caught:
                act()
            assert "\n" not in str(caught.value)
