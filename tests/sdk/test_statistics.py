"""Moments of many sites against NumPy on all rows together."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from isthmus.federation.statistics import Moments, merge, merge_all, moments, variance

RANDOM = np.random.default_rng(11)


def split(rows: Any, at: list[int]) -> list[Moments]:
    return [moments(part) for part in np.split(rows, at)]


@pytest.mark.parametrize("offset", [0.0, 1e3, -1e9, 1e12])
def test_a_large_offset_costs_no_digits(offset: float) -> None:
    noise = np.round(RANDOM.normal(size=(1000, 3)) * 64) / 64  # exact when the offset is added
    for found in (moments(noise + offset), merge_all(split(noise + offset, [10, 11, 500, 990]))):
        assert found.mean - offset == pytest.approx(noise.mean(axis=0), abs=1e-15 * max(abs(offset), 1))
        assert variance(found) == pytest.approx(noise.var(axis=0), rel=1e-9 if abs(offset) <= 1e9 else 1e-5)
        assert found.count.tolist() == [1000] * 3


def test_missing_values_do_not_count() -> None:
    rows = RANDOM.normal(size=(200, 4)) * [1, 10, 100, 1000]
    rows[RANDOM.random(rows.shape) < 0.3] = np.nan
    merged = merge_all(split(rows, [50, 51, 120]))
    assert merged.count.tolist() == (~np.isnan(rows)).sum(axis=0).tolist()
    assert merged.mean == pytest.approx(np.nanmean(rows, axis=0), rel=1e-12)
    assert variance(merged) == pytest.approx(np.nanvar(rows, axis=0), rel=1e-12)


def test_a_constant_column_has_no_variance_at_all() -> None:
    sites = [moments(np.full((n, 1), 0.1)) for n in (3, 7, 1000)]
    assert all(site.m2[0] == 0 and site.mean[0] == 0.1 for site in sites)
    assert merge_all(sites).m2[0] == 0
    assert merge_all(sites).mean[0] == 0.1


def test_a_site_without_values_changes_nothing() -> None:
    some = moments(RANDOM.normal(size=(20, 2)) + 1e9)
    none = moments(np.full((5, 2), np.nan))
    assert (none.count.tolist(), none.mean.tolist(), none.m2.tolist()) == ([0, 0], [0, 0], [0, 0])
    for merged in (merge(some, none), merge(none, some), merge(moments(np.zeros((0, 2))), some)):
        assert merged.mean.tobytes() == some.mean.tobytes()
        assert merged.m2.tobytes() == some.m2.tobytes()
    assert variance(merge(none, none)).tolist() == [0, 0]


def test_what_a_site_claims_of_columns_without_values_is_not_believed() -> None:
    liar = Moments(np.array([0.0]), np.array([1e300]), np.array([5.0]))
    merged = merge(moments([[1.0], [3.0]]), liar)
    assert (merged.mean[0], merged.m2[0]) == (2.0, 2.0)


@settings(deadline=None)
@given(
    hnp.arrays("<f8", st.tuples(st.integers(0, 30), st.just(2)), elements=st.floats(-1e6, 1e6) | st.just(np.nan)),
    st.lists(st.integers(0, 30), max_size=4),
)
def test_merging_parts_is_taking_all(rows: Any, cuts: list[int]) -> None:
    whole, merged = moments(rows), merge_all(split(rows, sorted(cuts)))
    assert merged.count.tolist() == whole.count.tolist()
    scale = np.nanmax(np.abs(rows), initial=1.0)
    assert merged.mean == pytest.approx(whole.mean, rel=1e-9, abs=1e-12 * scale)
    assert merged.m2 == pytest.approx(whole.m2, rel=1e-9, abs=1e-12 * scale**2)


@pytest.mark.parametrize("rows", [[1.0, 2.0], [[np.inf]], [[1e200], [-1e200]], [[1.7e308], [-1.7e308]]])
def test_rows_without_moments_are_refused(rows: Any) -> None:
    with pytest.raises(ValueError, match=r"dimensions|infinite|too large"):
        moments(rows)


@pytest.mark.parametrize(
    ("count", "mean", "m2"),
    [([-1], [0], [0]), ([1.5], [0], [0]), ([np.nan], [0], [0]), ([1], [np.inf], [0]), ([1], [0], [-1e-9]),
     ([1], [0], [np.nan]), ([1, 2], [0], [0]), ([[1]], [[0]], [[0]])],
)  # fmt: skip
def test_moments_that_no_rows_can_have_are_refused(count: Any, mean: Any, m2: Any) -> None:
    with pytest.raises(ValueError, match=r"count|mean|m2"):
        Moments(np.array(count, float), np.array(mean, float), np.array(m2, float))


def test_sites_with_different_columns_do_not_merge() -> None:
    with pytest.raises(ValueError, match="columns"):
        merge(moments([[1.0]]), moments([[1.0, 2.0]]))
    with pytest.raises(ValueError, match="no sites"):
        merge_all([])


def test_hostile_moments_that_overflow_are_refused() -> None:
    a = Moments(np.array([10.0]), np.array([1e300]), np.array([0.0]))
    b = Moments(np.array([10.0]), np.array([-1e300]), np.array([0.0]))
    with pytest.raises(ValueError, match="m2"):
        merge(a, b)
