"""Signatures against rensa's own reading of the same shingles, and their estimate against exact Jaccard."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xxhash
from batches import make_batch
from glosses import glosses, planted
from rensa import RMinHash

from mmdata.stages.hash_text import HashText, HashTextOptions


def signatures(captions: list[str | None], **options: Any) -> list[list[int] | None]:
    stage = HashText(HashTextOptions.model_validate(options))
    columns = stage.compute(make_batch(None, caption=captions))
    assert columns["minhash"].type == stage.contract(stage.options).writes.field("minhash").type
    return columns["minhash"].to_pylist()


def shingles(text: str, size: int = 5) -> set[str]:
    return {text[i : i + size] for i in range(max(1, len(text) - size + 1))}


@pytest.mark.parametrize(("permutations", "seed"), [(128, 1), (64, 7), (100, 2**40)])
def test_equals_rensa_over_shingles_hashed_one_by_one(permutations: int, seed: int):
    captions = ["a red bicycle leans against a wall", "two dogs", "x", "自転車に乗る人 と 犬"]
    hashed = [[xxhash.xxh64_intdigest(s.encode("utf-32-le")) for s in shingles(c)] for c in captions]
    expected = RMinHash.digest_matrix_from_token_hash_sets(hashed, permutations, seed).to_rows()
    assert signatures(captions, permutations=permutations, seed=seed) == expected


def test_the_estimate_has_no_bias_and_the_spread_of_theory():
    captions, _ = planted(glosses(3000, first=20_000), copies=3000, seed=3)
    found = np.array(signatures(captions, normalise=[]), np.uint32)
    estimate = (found[:3000] == found[3000:]).mean(axis=1)
    sets = [shingles(c) for c in captions]
    true = np.array([len(a & b) / len(a | b) for a, b in zip(sets[:3000], sets[3000:], strict=True)])
    off, spread = estimate - true, np.sqrt(true * (1 - true) / 128)
    assert ((true > 0.2) & (true < 0.95)).sum() > 1500
    assert abs(off.mean()) < 0.004
    assert (off[true == 1] == 0).all()
    for low in (0.2, 0.4, 0.6, 0.8):
        some = (true >= low) & (true < low + 0.15)
        assert some.sum() > 50
        assert off[some].std() < 1.1 * spread[some].max()
        assert abs(off[some].mean()) < 4 * spread[some].max() / np.sqrt(some.sum())


def test_what_says_the_same_has_the_same_signature():
    a, b, c = signatures(["A  man, riding!", "a man riding", "a man walking"])
    assert a == b != c
    plain = signatures(["A man", "a man"], normalise=["whitespace"])
    assert plain[0] != plain[1]
    assert (
        signatures(["one two", "two one one"], unit="words", size=1)[0]
        == signatures(["two one"], unit="words", size=1)[0]
    )


def test_nothing_has_no_signature():
    assert [s is None for s in signatures([None, "", " \n\t", "?!", "x"])] == [True, True, True, True, False]
    assert signatures(["?!"], normalise=[])[0] is not None


def test_ten_megabytes_are_one_caption():
    long = "word after word " * 655_360
    [found, start] = signatures([long, long[:10_000]])
    assert found == start


def test_the_order_of_normalise_is_no_question():
    one, two = (
        HashTextOptions.model_validate({"normalise": n}) for n in (["lower", "nfkc"], ["nfkc", "lower", "lower"])
    )
    assert one == two
