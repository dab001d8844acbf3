"""The S-curve by hand and by datasketch, and clusters against a walk over the definition."""

from __future__ import annotations

import numpy as np
import pytest
from datasketch.lsh import _optimal_param
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdata.groups import lsh
from mmdata.groups.lsh import choose_bands, collision, component_clusters, runs_of, star_clusters


def test_the_curve_by_hand():
    # Mining of Massive Datasets, figure 3.8: 20 bands of 5 rows
    expected = {0.2: 0.006, 0.3: 0.047, 0.4: 0.186, 0.5: 0.470, 0.6: 0.802, 0.7: 0.975, 0.8: 0.9996}
    for similarity, probability in expected.items():
        assert collision(similarity, 20, 5) == pytest.approx(probability, abs=6e-4)
    # two bands of one row at one half: all but the quarter in which neither agrees
    assert collision(0.5, 2, 1) == 0.75


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9])
@pytest.mark.parametrize("weight", [0.5, 0.9])
def test_the_choice_is_datasketchs(threshold: float, weight: float):
    assert choose_bands(threshold, 64, weight) == _optimal_param(threshold, 64, 1 - weight, weight)


def test_runs_by_hand():
    runs = runs_of(np.array([7, 3, 7, 9, 3, 7], np.uint64))
    assert runs.order.tolist() == [1, 4, 0, 2, 5]
    assert runs.end.tolist() == [2, 2, 5, 5, 5]
    assert runs.places(np.array([0, 3, 4])).tolist() == [2, 1]
    fewer = runs.only(np.array([True, True, True, True, False, True]))
    assert (fewer.order.tolist(), fewer.end.tolist()) == ([0, 2, 5], [3, 3, 3])
    assert not len(runs_of(np.array([1, 2, 3], np.uint64)).order)
    assert not len(runs_of(np.empty(0, np.uint64)).order)


@st.composite
def banded(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Keys of some bands, and a similarity of every pair."""
    texts, bands = draw(st.integers(0, 25)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    keys = rng.integers(0, max(1, texts // draw(st.integers(1, 4))), (bands, texts)).astype(np.uint64)
    similar = rng.random((texts, texts)).round(1)
    return keys, np.maximum(similar, similar.T)


@settings(max_examples=300, deadline=None)
@given(case=banded(), pairs=st.sampled_from([1, 7, 1 << 22]))
def test_clusters_follow_the_definition(case: tuple[np.ndarray, np.ndarray], pairs: int):
    keys, similar = case
    texts = keys.shape[1]
    close = (keys[:, :, None] == keys[:, None, :]).any(axis=0) & (similar >= 0.6)
    star, link = np.full(texts, -1), np.arange(texts)
    for i in range(texts):
        if star[i] < 0:
            star[i] = i
            star[[j for j in range(i + 1, texts) if star[j] < 0 and close[i, j]]] = i
    for _ in range(texts):
        link = np.array([min([link[i], *link[close[i]]]) for i in range(texts)], int)
    bands = [runs_of(k) for k in keys]
    before = lsh._PAIRS
    lsh._PAIRS = pairs
    try:
        found, alike = star_clusters(bands, texts, lambda a, b: similar[a, b], 0.6)
        components = component_clusters(bands, texts, lambda a, b: similar[a, b], 0.6)
    finally:
        lsh._PAIRS = before
    assert found.tolist() == star.tolist()
    expected = [1.0 if i == c else similar[i, c] for i, c in enumerate(star)]
    assert alike.tolist() == np.array(expected, np.float32).tolist()
    assert components.tolist() == link.tolist()


def test_a_family_in_one_bucket_is_no_square():
    # 200,000 texts in one run of each of three bands, all alike: the first takes them, no pair is looked at twice
    asked = 0

    def similarity(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        nonlocal asked
        asked += len(left)
        return np.ones(len(left))

    bands = [runs_of(np.zeros(200_000, np.uint64))] * 3
    found, _ = star_clusters(bands, 200_000, similarity, 0.8)
    assert set(found.tolist()) == {0}
    assert asked < 20 * 200_000
    assert set(component_clusters(bands, 200_000, similarity, 0.8).tolist()) == {0}
