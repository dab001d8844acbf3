"""What matches what, by hand; lists in every format; lists that are wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from held_rows import HeldRows
from pydantic import ValidationError

from mmdata.errors import RecipeError, SourceError
from mmdata.joins.decontaminate import Decontaminate, DecontaminateOptions
from mmdata.models import shingles

NOTHING = (False, None, None, None, None)
A, B = 0x0F0F_0F0F_0F0F_0F0F, 0xFFFF_0000_FFFF_0000


class Older:
    """Kept rows of an evaluation set that is a dataset."""

    def __init__(self, **columns: pa.Array) -> None:
        rows = len(next(iter(columns.values())))
        self.table = pa.table({**columns, "place": pa.array(range(rows), pa.int64())})

    def parts(self) -> Iterator[pa.Table]:
        for first in range(0, len(self.table), 2):
            yield self.table.slice(first, 2)

    def look_up(self, places: npt.NDArray[np.int64]) -> pa.Table:
        assert np.all(np.diff(places) > 0)
        found = {"row_id": places, "key": [f"o{p}" for p in places], "dataset": ["flickr"] * len(places)}
        return pa.table(found, pa.schema([("row_id", pa.int64()), ("key", pa.string()), ("dataset", pa.string())]))


def matches(options: dict[str, Any], older: Older | None = None, part_rows: int = 2, **columns: pa.Array) -> list[Any]:
    rows = len(next(iter(columns.values())))
    table = pa.table({"row_id": pa.array(range(rows), pa.int64()), **columns})
    group = Decontaminate(DecontaminateOptions.model_validate(options))
    Decontaminate.check_types(group.options, table.schema)
    answer = group.compute_streamed(HeldRows(table, part_rows, older), Path("/nonexistent"))
    lists = [answer[f"decontaminate_{c}"].to_pylist() for c in ("is_match", "by", "set", "of", "distance")]
    return list(zip(*lists, strict=True))


def hashes(*values: int | None) -> pa.Array:
    return pa.array(values, pa.uint64())


def test_pictures_within_the_radius_name_the_nearest_item(tmp_path: Path):
    one, two = tmp_path / "one.txt", tmp_path / "two.parquet"
    one.write_text(f"{A:016x}\n{B:016X}\n")
    pq.write_table(pa.table({"phash": pa.array([None, B ^ 1], pa.uint64()), "other": ["x", "y"]}), two)
    options = {"hash_lists": {"one": str(one), "two": str(two)}, "phash": "phash", "max_distance": 2}
    found = matches(options, phash=hashes(A, A ^ 3, A ^ 7, None, B ^ 3, B ^ 2, B ^ 1))
    assert found == [
        (True, "image", "one", "1", 0.0),
        (True, "image", "one", "1", 2.0),
        NOTHING,
        (None, None, None, None, None),
        (True, "image", "two", "2", 1.0),  # one bit from B ^ 1, two from B
        (True, "image", "one", "2", 1.0),
        (True, "image", "two", "2", 0.0),
    ]


def test_captions_that_share_words_in_a_row(tmp_path: Path):
    coco = tmp_path / "coco.txt"
    coco.write_text("A man rides a brown horse.\n\nTwo dogs\n")
    options = {"text_lists": {"coco": str(coco)}, "caption": "caption", "ngram": 4}
    captions = [
        "stock photo: a MAN rides a brown horse, sunset",  # 6 n-grams, of which the set has 3
        "man rides a brown bear",
        "a man rides the brown horse",
        "two dogs",
        None,
        "",
    ]
    found = matches(options, caption=pa.array(captions))
    assert [f[0] for f in found] == [True, True, False, False, None, False]
    assert found[0][1:4] == ("caption", "coco", "1")
    assert found[0][4] == pytest.approx(3 / 6)
    assert found[1][4] == pytest.approx(1 / 2)
    found = matches({**options, "short_texts": True}, caption=pa.array(captions))
    assert [f[0] for f in found] == [True, True, False, True, None, False]
    assert found[3] == (True, "caption", "coco", "2", 0.0)  # the empty line is none


def test_long_texts_are_cut_in_pieces_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each caption and each text of the set its own piece: places in both must still be those of the whole."""
    monkeypatch.setattr(shingles, "_HELD", 10)
    (tmp_path / "texts.txt").write_text("one two three\nred green blue\nsun moon stars\n")
    options = {"text_lists": {"set": str(tmp_path / "texts.txt")}, "caption": "caption", "ngram": 3}
    captions = pa.array(["the sun moon stars", None, "nothing of that", "red green blue", "one two three"])
    found = matches(options, caption=captions, part_rows=4)
    assert [f[3] for f in found] == ["3", None, None, "2", "1"]
    assert [f[0] for f in found] == [True, None, False, True, True]


def test_every_kind_of_list_holds_the_same(tmp_path: Path):
    values = np.array([A, B], np.uint64)
    np.save(tmp_path / "a.npy", values)
    np.save(tmp_path / "b.npy", values.view(np.int64))
    pq.write_table(pa.table({"phash": values.view(np.int64)}), tmp_path / "c.parquet")
    pq.write_table(pa.table({"h": [f"{v:016x}" for v in values.tolist()]}), tmp_path / "d.parquet")
    (tmp_path / "e.csv").write_text("name,phash\n" + "".join(f"n,{v:016x}\n" for v in values.tolist()))
    (tmp_path / "f.txt").write_text("".join(f" {v:016x} \n" for v in values.tolist()))
    for name in ("a.npy", "b.npy", "c.parquet", "d.parquet", "e.csv", "f.txt"):
        options = {"hash_lists": {"set": str(tmp_path / name)}, "phash": "phash"}
        assert matches(options, phash=hashes(B, 5)) == [(True, "image", "set", "2", 0.0), NOTHING], name


def test_datasets_come_after_lists_and_images_before_captions(tmp_path: Path):
    (tmp_path / "texts.csv").write_text('caption,split\n"a cat, on a mat",test\n')
    vectors = pa.array([[3, 4], [0, 1], [0, 0]], pa.list_(pa.float16(), 2))
    older = Older(phash=hashes(A, None, B), caption=pa.array(["x y z", "a cat on a mat", None]), vector=vectors)
    options = {
        "against": ["flickr"],
        "text_lists": {"texts": str(tmp_path / "texts.csv")},
        "phash": "phash",
        "caption": "caption",
        "ngram": 3,
        "embedding": "vector",
        "min_cosine": 0.9,
    }
    mine = pa.array([[1, 0], [1, 0], [6, 8], [0, 0], None], pa.list_(pa.float16(), 2))
    captions = pa.array(["a cat on a mat", "see: x, y, z", "dog", None, None])
    found = matches(options, older, phash=hashes(A ^ 1, 7, 8, 9, None), caption=captions, vector=mine)
    assert found[0] == (True, "image", "flickr", "o0", 1.0)
    assert found[1] == (True, "caption", "flickr", "o0", pytest.approx(1 / 2))
    assert found[2][:4] == (True, "embedding", "flickr", "o0")
    assert found[2][4] == pytest.approx(0, abs=1e-6)
    assert found[3:] == [NOTHING, (None, None, None, None, None)]
    found = matches(options, older, phash=hashes(5), caption=captions[:1], vector=mine[:1])
    assert found == [(True, "caption", "texts", "1", 0.0)]


def test_the_nearest_embedding_is_that_of_brute_force():
    rng = np.random.default_rng(4)
    theirs, mine = rng.normal(size=(5000, 8)), rng.normal(size=(6000, 8))
    kind = pa.list_(pa.float32(), 8)
    older = Older(vector=pa.array(list(theirs.astype(np.float32)), kind))
    options = {"against": ["flickr"], "embedding": "vector", "min_cosine": 0.9}
    found = matches(options, older, 5000, vector=pa.array(list(mine.astype(np.float32)), kind))
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (mine, theirs)]
    cosine = unit[0] @ unit[1].T
    assert [f[0] for f in found] == (cosine.max(axis=1) >= 0.9).tolist()
    assert 500 < sum(f[0] for f in found) < 5500
    for f, row in zip(found, cosine, strict=True):
        if f[0]:
            assert (f[3], f[4]) == (f"o{row.argmax()}", pytest.approx(1 - row.max(), abs=1e-5))


def test_equal_embeddings_match_at_a_cosine_of_1():
    rng = np.random.default_rng(0)
    values = pa.array(rng.normal(size=(500, 96)).astype(np.float16).ravel())
    vectors = pa.FixedSizeListArray.from_arrays(values, 96)
    options = {"against": ["flickr"], "embedding": "vector", "min_cosine": 1}
    found = matches(options, Older(vector=vectors), 200, vector=vectors)
    assert found == [(True, "embedding", "flickr", f"o{i}", 0.0) for i in range(500)]


def test_a_dataset_with_columns_of_other_types_is_refused():
    """Base columns go by name; hashes of 32 bits would be read two at a time."""
    two, three = (pa.array([[0.0] * n], pa.list_(pa.float32(), n)) for n in (2, 3))
    for option, mine, theirs in (
        ("phash", hashes(7, 9), pa.array([7, 0], pa.int32())),
        ("caption", pa.array(["a"]), pa.array([1])),
        ("embedding", two, three),
        ("embedding", two, pa.array([[0.0]])),
    ):
        with pytest.raises(RecipeError, match=f"'{option}' is .* in a dataset of `against`, not"):
            matches({"against": ["flickr"], option: option}, Older(**{option: theirs}), **{option: mine})


def test_no_rows_and_no_items(tmp_path: Path):
    older = Older(phash=hashes(None), caption=pa.array([None], pa.string()))
    options = {"against": ["flickr"], "phash": "phash", "caption": "caption"}
    assert matches(options, older, phash=hashes(), caption=pa.array([], pa.string())) == []
    assert matches(options, older, phash=hashes(A), caption=pa.array(["a b"])) == [NOTHING]


def _plan(options: DecontaminateOptions) -> None:
    """What planning a recipe asks of it."""
    Decontaminate.contract(options)
    Decontaminate.check_types(options, pa.schema([("phash", pa.uint64())]))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("h.txt", "0123\n", "hash_lists.set: .*h.txt holds what is no phash .* such as '0123'"),
        ("h.txt", "'; DROP TABLE samples; --\n", "holds what is no phash"),
        ("h.txt", "\n \n", "hash_lists.set: .*h.txt"),
        ("h.csv", "a,b\n1,2\n", "hash_lists.set: .*has no column 'phash'"),
        ("h.parquet", "PAR1 and no more", "hash_lists.set: .*h.parquet"),
        ("h.npy", "\x93NUMPY and no more", "hash_lists.set: .*h.npy"),
        ("missing.txt", None, "hash_lists.set: .*missing.txt"),
    ],
)
def test_a_list_that_is_none_is_refused_in_one_sentence(tmp_path: Path, name: str, text: str | None, said: str):
    if text is not None:
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    options = DecontaminateOptions(hash_lists={"set": str(tmp_path / name)}, phash="phash")
    with pytest.raises(SourceError, match=said) as raised:
        _plan(options)
    assert "\n" not in str(raised.value)


def test_a_pickled_array_is_not_loaded(tmp_path: Path):
    np.save(tmp_path / "h.npy", np.array([object()], object), allow_pickle=True)
    options = DecontaminateOptions(hash_lists={"set": str(tmp_path / "h.npy")}, phash="phash")
    with pytest.raises(SourceError, match=r"h\.npy"):
        Decontaminate.check_types(options, pa.schema([("phash", pa.uint64())]))


def test_an_empty_text_list_is_refused(tmp_path: Path):
    pq.write_table(pa.table({"caption": pa.array([None], pa.string())}), tmp_path / "t.parquet")
    options = DecontaminateOptions(text_lists={"set": str(tmp_path / "t.parquet")}, caption="caption")
    with pytest.raises(SourceError, match=r"text_lists\.set: .*is empty"):
        Decontaminate.check_types(options, pa.schema([("caption", pa.string())]))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "name an evaluation set"),
        ({"hash_lists": {"a": "b"}}, "hash_lists needs phash"),
        ({"text_lists": {"a": "b"}, "phash": "phash"}, "text_lists needs caption"),
        ({"against": ["x"]}, "needs a column to compare"),
        ({"hash_lists": {"a": "b"}, "phash": "phash", "embedding": "e"}, "name them with against"),
    ],
)
def test_options_that_compare_nothing(given: dict[str, Any], said: str):
    with pytest.raises(ValidationError, match=said):
        DecontaminateOptions.model_validate(given)


def test_columns_of_other_types_are_refused():
    schema = pa.schema([("number", pa.float32()), ("caption", pa.string())])
    for option, column, said in (
        ("phash", "caption", "64-bit hashes"),
        ("caption", "number", "not text"),
        ("embedding", "caption", "not embeddings"),
    ):
        options = DecontaminateOptions.model_validate({"against": ["x"], option: column})
        with pytest.raises(RecipeError, match=said):
            Decontaminate.check_types(options, schema)
