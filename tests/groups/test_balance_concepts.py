"""Balancing of concepts: MetaCLIP's arithmetic by hand, its draws by their probabilities, whatever the shards."""

from __future__ import annotations

from pathlib import Path

import held_rows
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from binomial import within
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import mmdata
from mmdata.errors import RecipeError
from mmdata.groups.balance_concepts import BalanceConcepts, BalanceConceptsOptions

NOWHERE = Path("/nonexistent")


def run(lists, part_rows=100, uids=None, kind=None, **options):
    table = pa.table(
        {
            "row_id": pa.array(range(len(lists)), pa.int64()),
            "uid": pa.array(uids if uids is not None else [f"{i:032x}" for i in range(len(lists))], pa.string()),
            "concepts": pa.array(lists, kind or pa.list_(pa.string())),
        }
    )
    group = BalanceConcepts(BalanceConceptsOptions(**options))
    answer = held_rows.compute(group, table, NOWHERE, part_rows)
    return {n.removeprefix("balance_concepts_"): pa.array(c).to_pylist() if isinstance(c, np.ndarray) else c.to_pylist()
            for n, c in answer.items()}  # fmt: skip


def test_probabilities_by_hand():
    """Counts x 100,000 and y 10,000 at t = 20,000: .2 and 1. Two concepts of .2 and .5: 1 - .8 * .5 = .6."""
    lists = [["x"]] * 100_000 + [["y"]] * 10_000
    found = run(lists, part_rows=30_000)
    assert found["probability"][0] == pytest.approx(0.2)
    assert found["probability"][-1] == 1
    assert (found["rarest"][0], found["rarest_count"][0]) == ("x", 100_000)
    assert all(found["kept"][100_000:])

    found = run([["x", "z"], *[["x"]] * 9, *[["z"]] * 3], t=2)
    assert found["probability"][0] == pytest.approx(0.6)
    assert (found["rarest"][0], found["rarest_count"][0]) == ("z", 4)


@pytest.mark.parametrize("seed", [0, 1, 1 << 62])
def test_rows_are_kept_as_often_as_their_probability_says(seed):
    lists = [["a", "b"]] * 500 + [["a"]] * 500 + [["b", "c"]] * 500 + [["c"]] * 300
    found = run(lists, t=200, seed=seed)
    for start, stop in ((0, 500), (500, 1000), (1000, 1500), (1500, 1800)):
        [p] = set(found["probability"][start:stop])
        assert within(sum(found["kept"][start:stop]), stop - start, p)
    # a: 200 of 1000; b: 200 of 1000; c: 200 of 800
    assert found["probability"][0] == pytest.approx(1 - 0.8 * 0.8)
    assert found["probability"][1000] == pytest.approx(1 - 0.8 * 0.75)


def test_draws_are_independent():
    """Between neighbours, between concepts of a row, and between seeds: as many pairs as chance gives."""
    single = run([["a"]] * 1000, t=500)["kept"]
    assert within(sum(a and b for a, b in zip(single[::2], single[1::2], strict=True)), 500, 0.25)
    other = run([["a"]] * 1000, t=500, seed=1)["kept"]
    assert within(sum(a and b for a, b in zip(single, other, strict=True)), 1000, 0.25)
    another = run([["b"]] * 1000, t=500)["kept"]
    assert within(sum(a and b for a, b in zip(single, another, strict=True)), 1000, 0.25)


@given(st.lists(st.none() | st.lists(st.sampled_from("abcde"), max_size=4), max_size=30), st.integers(1, 5))
def test_shards_change_nothing(lists, t):
    whole = run(lists, part_rows=1000, t=t)
    for rows in (1, 7):
        assert run(lists, part_rows=rows, t=t) == whole


def test_what_is_kept_of_a_row_depends_on_its_uid_and_not_on_its_place():
    lists = [["a"], ["a", "b"], ["b"], ["c"]] * 50
    uids = [f"uid {i}" for i in range(200)]
    order = np.random.default_rng(3).permutation(200)
    found, moved = run(lists, t=20, uids=uids), run([lists[i] for i in order], t=20, uids=[uids[i] for i in order])
    for name in found:
        assert [found[name][i] for i in order] == moved[name]


def test_a_concept_counts_once_a_row_and_a_row_stays_once():
    """MetaCLIP's demonstration appends a pair once for each of its texts; a doubled concept is the same trap."""
    found = run([["a", "a", "a"], ["a"], [None, "b"]], t=1)
    assert found["rarest_count"] == [2, 2, 1]
    assert found["probability"] == pytest.approx([0.5, 0.5, 1])
    assert len(found["kept"]) == 3
    assert found["kept"][2] is True


def test_rows_without_concepts_are_never_kept():
    found = run([None, [], ["a"]])
    assert found == {
        "kept": [None, False, True],
        "probability": [None, 0, 1],
        "rarest": [None, None, "a"],
        "rarest_count": [None, None, 1],
    }
    assert run([]) == {"kept": [], "probability": [], "rarest": [], "rarest_count": []}
    assert run([None]) == {"kept": [None], "probability": [None], "rarest": [None], "rarest_count": [None]}


def test_rows_without_uid_draw_by_their_row_id():
    kept = run([["a"]] * 400, t=200, uids=[None] * 400)["kept"]
    assert within(sum(kept), 400, 0.5)


def test_integers_are_concepts_too():
    found = run([[7, 12], [7], [7]], t=1, kind=pa.list_(pa.int32()))
    assert (found["rarest"], found["rarest_count"]) == (["12", "7", "7"], [1, 3, 3])


def test_columns_that_hold_no_concepts_are_refused():
    for kind in (pa.string(), pa.list_(pa.float32()), pa.int64()):
        with pytest.raises(RecipeError, match="lists of texts or integers"):
            BalanceConcepts.check_types(BalanceConceptsOptions(of="c"), pa.schema([("c", kind)]))
    with pytest.raises(ValidationError):
        BalanceConceptsOptions(t=0)


def test_in_a_dataset_of_one_shard_and_of_seven(tmp_path: Path):
    """Matching and balancing over captions alone: the same rows stay, and each is in the ledger."""
    words = ["dog", "a cat", "goose,", "dog and cat", "ship", "nothing of that kind", None]
    captions = ["dog" if i % 5 == 0 else words[i % 7] for i in range(140)]
    table = pa.table({"url": [f"http://127.0.0.1:1/{i}" for i in range(140)], "text": captions})
    pq.write_table(table, tmp_path / "list.parquet")
    (tmp_path / "entries.txt").write_text("dog\ncat\ngoose\nship\n")
    found = []
    for name, rows in (("one", 1000), ("seven", 20)):
        recipe = {
            "name": name,
            "dataset": str(tmp_path / name),
            "source": {"kind": "parquet", "media": "none", "path": str(tmp_path / "list.parquet")},
            "fetch": {"shard_rows": rows},
            "seed": 5,
            "steps": [
                {"match_concepts": {"entries": str(tmp_path / "entries.txt")}},
                {"balance_concepts": {"t": 15}},
                {"filter": {"balanced": "balance_concepts_kept"}},
            ],
        }
        recipe["source"] |= {"url": "url", "caption": "text"}
        ds = mmdata.run(recipe, runner="inline", quiet=True)
        assert len(ds.shards()) == (1 if name == "one" else 7)
        columns = "caption, concepts, balance_concepts_kept, balance_concepts_probability, balance_concepts_rarest"
        found.append(ds.sql(f"SELECT {columns}, reason FROM samples ORDER BY row_id").fetchall())
    assert found[0] == found[1]
    reasons = {caption: set() for caption in set(captions)}
    for row in found[0]:
        reasons[row[0]].add(row[-1])
    assert reasons[None] == {"balanced:null"}
    assert reasons["nothing of that kind"] == {"balanced"}
    assert reasons["dog"] == {None, "balanced"}
    # 28 + 16 + 16 rows name a dog, 16 + 16 a cat, 16 a goose
    probabilities = {row[0]: row[3] for row in found[0]}
    assert probabilities["dog"] == pytest.approx(15 / 60)
    assert probabilities["dog and cat"] == pytest.approx(1 - 45 / 60 * 17 / 32)
    assert probabilities["goose,"] == pytest.approx(15 / 16)
