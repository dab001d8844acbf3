"""Given files of every kind, read by row: against pandas-free arithmetic, and against what hostile files try."""

from __future__ import annotations

import io
import json
import pickle
import re
import tempfile
from pathlib import Path
from typing import Any

import duckdb
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdata import registry
from mmdata.errors import MmdataError, RecipeError, SourceError
from mmdata.joins.attach import Attach, AttachOptions
from mmdata.joins.keep_list import KeepList, KeepListOptions
from mmdata.recipe import OperatorStep, parse

UIDS = [f"{n:032x}" for n in range(100, 106)]


def looked_up(folder: Path, asked: list[str | None], **options: Any) -> list[dict[str, Any]]:
    attach = Attach(AttachOptions.model_validate(options))
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    attach.open(scratch)
    found = attach.compute(pa.chunked_array([asked], pa.string()))
    assert found.schema.names == [*Attach.contract(attach.options).writes.names, "reason"]
    rows: list[dict[str, Any]] = found.to_pylist()
    return rows


@pytest.fixture
def metadata(tmp_path: Path) -> Path:
    """As DataComp publishes it: uids and scores in Parquet, embeddings row by row in the .npz of the same name."""
    folder = tmp_path / "metadata"
    folder.mkdir()
    for number, uids in enumerate([UIDS[:4], UIDS[4:]]):
        scores = pa.array([n / 8 for n in range(len(uids))], pa.float32())
        pq.write_table(pa.table({"uid": uids, "clip_l14_similarity_score": scores}), folder / f"{number}.parquet")
        images = np.arange(len(uids) * 3, dtype=np.float16).reshape(-1, 3) + 100 * number
        save = np.savez if number == 0 else np.savez_compressed
        save(folder / f"{number}.npz", l14_img=images, b32_txt=-images.astype(np.float32))
    return folder


def test_datacomps_metadata_is_one_table(metadata: Path, tmp_path: Path) -> None:
    columns = {"score": "clip_l14_similarity_score", "image": "l14_img", "text": "b32_txt"}
    options = {"path": str(metadata), "columns": columns}
    rows = looked_up(tmp_path, [UIDS[5], UIDS[1].upper(), "0" * 32, None], **options)
    assert rows == [
        {"image": [103.0, 104.0, 105.0], "score": 0.125, "text": [-103.0, -104.0, -105.0], "reason": None},
        {"image": [3.0, 4.0, 5.0], "score": 0.125, "text": [-3.0, -4.0, -5.0], "reason": None},
        {"image": None, "score": None, "text": None, "reason": "unmatched"},
        {"image": None, "score": None, "text": None, "reason": "no_key"},
    ]
    contract = Attach.contract(AttachOptions.model_validate(options))
    assert [str(f.type) for f in contract.writes] == [
        "fixed_size_list<item: halffloat>[3]",
        "float",
        "fixed_size_list<item: float>[3]",
    ]
    assert Attach.summary(AttachOptions.model_validate(options)).endswith("metadata: 6 rows")


@pytest.mark.parametrize("kind", ["npz beside", "npz with keys", "npy with text", "npy with npy", "npy with parquet"])
def test_arrays_and_their_keys(kind: str, tmp_path: Path) -> None:
    values = np.arange(12, dtype=">f8").reshape(6, 2)
    options: dict[str, Any] = {"path": str(tmp_path / "v.npy"), "columns": ["v"]}
    np.save(tmp_path / "v.npy", np.asfortranarray(values))
    if kind == "npz beside":
        np.savez(tmp_path / "v.npz", v=values)
        pq.write_table(pa.table({"uid": UIDS}), tmp_path / "v.parquet")
        options["path"] = str(tmp_path / "v.npz")
    elif kind == "npz with keys":
        np.savez(tmp_path / "v.npz", v=values, ids=np.array(UIDS))
        options |= {"path": str(tmp_path / "v.npz"), "key_column": "ids"}
    elif kind == "npy with text":
        (tmp_path / "ids.txt").write_text("\n".join(UIDS) + "\n")
        options["ids"] = str(tmp_path / "ids.txt")
    elif kind == "npy with npy":
        np.save(tmp_path / "ids.npy", np.array([(int(u[:16], 16), int(u[16:], 16)) for u in UIDS], dtype="u8,u8"))
        options["ids"] = str(tmp_path / "ids.npy")
    else:
        pq.write_table(pa.table({"name": UIDS}), tmp_path / "ids.parquet")
        options |= {"ids": str(tmp_path / "ids.parquet"), "key_column": "name"}
    rows = looked_up(tmp_path, [UIDS[4], UIDS[0]], **options)
    assert rows == [{"v": [8.0, 9.0], "reason": None}, {"v": [0.0, 1.0], "reason": None}]


def test_text_tables_say_which_cells_are_wrong(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("key,score,note\n00001,0.5,a\n00002,,b\n00003,-1e3,\n")
    rows = looked_up(
        tmp_path, ["00001", "00002", "00003", "1"], path=str(tmp_path / "s.csv"), on="key", columns=["score"]
    )
    assert [(r["score"], r["reason"]) for r in rows] == [
        (0.5, None),
        (None, None),
        (-1000.0, None),
        (None, "unmatched"),
    ]
    lines = [json.dumps({"key": str(n), "score": n / 2}) for n in range(10_000)] + [
        json.dumps({"key": "x", "score": "?"})
    ]
    (tmp_path / "s.jsonl").write_text("\n".join(lines))
    rows = looked_up(tmp_path, ["x", "9999"], path=str(tmp_path / "s.jsonl"), on="key", columns=["score"])
    assert rows == [{"score": None, "reason": "bad_value"}, {"score": 4999.5, "reason": None}]


def test_what_is_not_finite_is_no_value(tmp_path: Path) -> None:
    vectors = pa.FixedSizeListArray.from_arrays(pa.array([0.0, 1, 2, np.inf, 4, 5, 6, 7]), 2)
    values = [float("nan"), 0.5, None, 1.0]
    table = pa.table({"uid": UIDS[:4], "score": pa.array(values), "v": vectors})
    pq.write_table(table, tmp_path / "s.parquet")
    rows = looked_up(tmp_path, UIDS[:4], path=str(tmp_path / "s.parquet"), columns=["score", "v"])
    assert rows == [
        {"score": None, "v": None, "reason": "not_finite"},
        {"score": None, "v": None, "reason": "not_finite"},
        {"score": None, "v": [4.0, 5.0], "reason": None},
        {"score": 1.0, "v": [6.0, 7.0], "reason": None},
    ]


def test_duplicates_are_refused_with_the_key_or_the_first_row_counts(tmp_path: Path) -> None:
    table = pa.table({"uid": [UIDS[0], UIDS[1], UIDS[0].upper(), None, None], "n": range(5)})
    pq.write_table(table, tmp_path / "s.parquet")
    options = {"path": str(tmp_path / "s.parquet"), "columns": ["n"]}
    with pytest.raises(
        SourceError, match=rf"1 values of uid stand in more than one row, for example '{UIDS[0]}'.*first"
    ):
        looked_up(tmp_path, UIDS, **options)
    rows = looked_up(tmp_path, [UIDS[0], UIDS[0], UIDS[1]], **options, duplicates="first")
    assert [r["n"] for r in rows] == [0, 0, 1]


def test_the_identity_is_the_content_and_not_the_place(metadata: Path, tmp_path: Path) -> None:
    def prints(path: Path) -> Any:
        return Attach.contract(AttachOptions(path=str(path), columns=["l14_img"])).weights[0].fingerprint

    before = prints(metadata)
    moved = metadata.rename(tmp_path / "elsewhere")
    for file in sorted(moved.iterdir()):
        file.rename(moved / f"part-{file.name}")
    assert prints(moved) == before
    np.savez(moved / "part-0.npz", l14_img=np.ones((4, 3), np.float16))
    assert prints(moved) != before


class Evil:
    """Runs when it is unpickled."""

    def __reduce__(self) -> Any:
        return (Path("/nowhere/else").mkdir, ())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: np.save(p, np.array([Evil()], object), allow_pickle=True), "Python objects"),
        (lambda p: p.write_bytes(pickle.dumps(Evil())), "is no .npy array"),
        (lambda p: np.save(p, np.zeros((2, 2, 2))), "one number a row"),
        (lambda p: p.write_bytes(b"\x93NUMPY\x01\x00" + b"\xff" * 80), "is no .npy array|cannot read"),
        (lambda p: _short(p), "cut short"),
        (lambda p: np.save(p, np.zeros((5, 2))), "has 5 rows, but its keys are 6"),
        (lambda p: np.save(p, np.zeros((6, 2), complex)), "one number a row"),
    ],
)
def test_hostile_arrays_are_one_sentence(make: Any, message: str, tmp_path: Path) -> None:
    make(tmp_path / "v.npy")
    (tmp_path / "ids.txt").write_text("\n".join(UIDS))
    with pytest.raises(SourceError, match=message):
        looked_up(tmp_path, UIDS, path=str(tmp_path / "v.npy"), ids=str(tmp_path / "ids.txt"), columns=["v"])


def _short(path: Path) -> None:
    np.save(path, np.zeros((6, 2)))
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"path": "nowhere.parquet"}, SourceError, "there is no list at"),
        ({"columns": ["scor"]}, SourceError, "has no column.*'scor'; did you mean 'score'"),
        ({"on": "url"}, SourceError, "no column 'url' to join on.*key_column"),
        ({"key_column": "number"}, SourceError, "is int64, but keys are text"),
        ({"ids": "x.txt"}, RecipeError, "is a table, which has its own"),
        ({"path": "v.npy"}, RecipeError, "say with `ids`"),
        ({"columns": ["lengths"], "path": "v.npz"}, SourceError, "no column, and .*no array 'lengths'"),
    ],
)
def test_what_does_not_fit_is_told_at_plan(
    options: dict[str, Any], error: type[MmdataError], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table({"uid": UIDS, "score": range(6), "number": range(6)}), "v.parquet")
    np.save("v.npy", np.zeros((6, 2)))
    np.savez("v.npz", length=np.zeros(6))
    chosen = {"path": "v.parquet", "columns": ["score"], **options}
    with pytest.raises(error, match=message):
        Attach.contract(AttachOptions.model_validate(chosen))


@pytest.mark.parametrize("columns", [["reason"], ["Row_Id"], ["a b"], ["x", "x"], []])
def test_names_that_no_column_can_have(columns: list[str]) -> None:
    with pytest.raises(ValueError, match=r"column|item"):
        AttachOptions.model_validate({"path": "x.parquet", "columns": columns})


@pytest.mark.parametrize("kind", ["u8", "txt", "npy", "parquet", "csv"])
def test_lists_of_every_kind_say_the_same(kind: str, tmp_path: Path) -> None:
    listed = [UIDS[3], UIDS[0], UIDS[0]]
    path, options = tmp_path / f"list.{kind}", {}
    if kind == "u8":
        path = tmp_path / "list.npy"
        np.save(path, np.sort(np.array([(int(u[:16], 16), int(u[16:], 16)) for u in listed], dtype="u8,u8")))
    elif kind == "txt":
        path.write_text("\n".join(u.upper() for u in listed))
    elif kind == "npy":
        np.save(path, np.array(listed).astype("S32"))
    elif kind == "parquet":
        pq.write_table(pa.table({"uid": listed, "other": [1, 2, 3]}), path)
    else:
        path.write_text("id,x\n" + "".join(f"{u},1\n" for u in listed))
        options = {"column": "id"}
    keep = KeepList(KeepListOptions.model_validate({"path": str(path), **options}))
    (tmp_path / "scratch").mkdir()
    keep.open(tmp_path / "scratch")
    found = keep.compute(pa.chunked_array([[UIDS[0], UIDS[1], None, UIDS[3]]])).to_pydict()
    assert found == {"is_listed": [True, False, None, True], "reason": [None, None, "no_key", None]}


def test_remote_files_are_read_as_local_ones_are() -> None:
    """A filesystem of fsspec's that nothing can be mapped from, and text whose rows `plan` counts."""
    fs = fsspec.filesystem("memory")
    values = np.arange(12, dtype=np.float32).reshape(6, 2)
    for name, save in (("a/0.npz", lambda f: np.savez(f, v=values)), ("a/1.npy", lambda f: np.save(f, values))):
        buffer = io.BytesIO()
        save(buffer)
        fs.pipe_file(f"/given/{name}", buffer.getvalue())
    fs.pipe_file("/given/a/ids.txt", "\n".join(UIDS).encode())
    with tempfile.TemporaryDirectory() as folder:
        for name in ("0.npz", "1.npy"):
            given = {"path": f"memory://given/a/{name}", "ids": "memory://given/a/ids.txt", "columns": ["v"]}
            assert looked_up(Path(folder), [UIDS[5], None], **given) == [
                {"v": [10.0, 11.0], "reason": None},
                {"v": None, "reason": "no_key"},
            ]
            assert Attach.summary(AttachOptions.model_validate(given)).endswith(f"{name}: 6 rows")
    keep = KeepListOptions(path="memory://given/a/ids.txt")
    assert KeepList.summary(keep) == "memory://given/a/ids.txt: 6 keys"


KEYS = st.lists(
    st.one_of(st.none(), st.sampled_from(["", "a", "b", "B", "ß", "0" * 32, "F" * 32, "f" * 32])), max_size=12
)


@settings(max_examples=60, deadline=None)
@given(left=KEYS, right=KEYS, on=st.sampled_from(["url", "uid"]))
def test_any_join_is_duckdbs(
    left: list[str | None], right: list[str | None], on: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """With repeated keys and without any, on either side; by hand only what a uid means."""
    folder = tmp_path_factory.mktemp("join")
    database = duckdb.connect()
    for name, keys in (("asked", left), ("given", right)):
        numbered = pa.table({"k": pa.array(keys, pa.string()), "n": pa.array(range(len(keys)), pa.int64())})
        pq.write_table(numbered, folder / f"{name}.parquet", row_group_size=3)
        database.register(name, numbered)
    meant = "CASE WHEN regexp_full_match(k, '[0-9a-fA-F]{32}') THEN lower(k) ELSE k END" if on == "uid" else "k"
    expected = database.execute(
        f"SELECT g.n, CASE WHEN m IS NULL OR m = '' THEN 'no_key' WHEN g.n IS NULL THEN 'unmatched' END "
        f"FROM (SELECT {meant} AS m, n FROM asked) AS a LEFT JOIN "
        f"(SELECT {meant} AS m, min(n) AS n FROM given WHERE k <> '' GROUP BY 1) AS g USING (m) ORDER BY a.n"
    ).fetchall()
    options = {"path": str(folder / "given.parquet"), "key_column": "k", "on": on, "columns": ["n"]}
    found = looked_up(folder, left, **options, duplicates="first")
    assert [(row["n"], row["reason"]) for row in found] == expected
    usable = [k.lower() if on == "uid" and len(k) == 32 else k for k in right if k]
    if len(set(usable)) < len(usable):
        with pytest.raises(SourceError, match="stand in more than one row"):
            looked_up(folder, left, **options)


def test_the_recipes_of_the_page_are_recipes() -> None:
    """Every option that docs/attach.md shows exists."""
    text = (Path(__file__).parents[2] / "docs/attach.md").read_text(encoding="utf-8")
    seen: list[Any] = []
    for block in re.findall(r"^```yaml\n(.*?)^```", text, re.S | re.M):
        recipe = parse(f"name: n\ndataset: d\nsource: {{kind: urls, path: l.txt}}\n{block}")
        seen += [recipe.block] if recipe.block is not None else []
        for step in recipe.steps:
            if isinstance(step, OperatorStep):
                seen.append(registry.operator(step.operator).options_type.model_validate(step.options))
    assert [type(s).__name__ for s in seen] == ["AttachOptions"] * 2 + ["KeepListOptions"] * 2 + ["BlockOptions"]
    assert seen[1].on == "url"
