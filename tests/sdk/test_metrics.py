"""Metrics against brute force."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.federation.metrics import accuracy, auc, pooled_mean

EXAMPLES = st.lists(st.tuples(st.integers(-3, 3).map(float) | st.floats(allow_nan=False), st.booleans()), max_size=30)


def brute_force_auc(scores: list[float], labels: list[bool]) -> float | None:
    positives = [s for s, label in zip(scores, labels, strict=True) if label]
    negatives = [s for s, label in zip(scores, labels, strict=True) if not label]
    if not positives or not negatives:
        return None
    wins = sum((p > n) + 0.5 * (p == n) for p in positives for n in negatives)
    return wins / (len(positives) * len(negatives))


@given(EXAMPLES)
def test_auc_is_the_share_of_pairs_in_order(examples: list[tuple[float, bool]]) -> None:
    scores, labels = [s for s, _ in examples], [label for _, label in examples]
    assert auc(scores, labels) == brute_force_auc(scores, labels)


def test_auc_at_its_ends() -> None:
    assert auc([0.1, 0.2, 0.8], [0, 0, 1]) == 1.0
    assert auc([0.1, 0.2, 0.8], [1, 1, 0]) == 0.0
    assert auc([5, 5, 5, 5], [1, 0, 1, 0]) == 0.5
    assert auc([1, 2], [1, 1]) is None
    assert auc([], []) is None


def test_auc_of_many_examples() -> None:
    n = 200_000
    assert auc(np.arange(2 * n), np.arange(2 * n) >= n) == 1.0


@pytest.mark.parametrize(
    ("scores", "labels"), [([np.nan, 1], [0, 1]), ([1, 2], [0, 2]), ([1], [0, 1]), ([[1]], [[1]]), ([1.0], [np.nan])]
)
def test_auc_of_what_is_no_test_is_refused(scores: Any, labels: Any) -> None:
    with pytest.raises(ValueError, match=r"NaN|label"):
        auc(scores, labels)


def test_accuracy_is_the_share_that_is_right() -> None:
    assert accuracy([0, 1, 2, 1], [0, 1, 1, 1]) == 0.75
    assert accuracy([], []) is None
    with pytest.raises(ValueError, match="one length"):
        accuracy([1], [1, 2])


def test_pooled_means_count_by_examples() -> None:
    assert pooled_mean([0.5, 1.0], [300, 100]) == 0.625
    assert pooled_mean([1.0, 1.0, 1.0], [3, 7, 11]) == 1.0
    assert pooled_mean([float("nan"), 0.5], [0, 4]) == 0.5
    assert pooled_mean([], []) is None
    assert pooled_mean([0.1], [0]) is None


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 10_000)), max_size=10), st.randoms())
def test_pooling_does_not_depend_on_the_order_of_the_sites(sites: list[tuple[float, int]], random: Any) -> None:
    shuffled = random.sample(sites, len(sites))
    pooled = pooled_mean([v for v, _ in sites], [n for _, n in sites])
    assert pooled == pooled_mean([v for v, _ in shuffled], [n for _, n in shuffled])
    every = np.repeat([v for v, _ in sites], [n for _, n in sites]) if sites else np.zeros(0)
    assert (pooled is None) == (every.size == 0)
    if pooled is not None:
        assert pooled == pytest.approx(every.mean(), abs=1e-12)


@pytest.mark.parametrize(
    ("values", "examples"),
    [([0.5], [1, 2]), ([0.5], [-1]), ([0.5], [float("inf")]), ([float("nan")], [1]), ([1e308, 1e308], [10, 10])],
)
def test_what_cannot_be_pooled_is_refused(values: list[float], examples: list[float]) -> None:
    with pytest.raises(ValueError, match=r"value|examples"):
        pooled_mean(values, examples)
