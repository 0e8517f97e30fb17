"""Clipping against its guarantee, also where float32 has no digits left."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from isthmus.privacy.clipping import NonFiniteUpdate, clip_by_global_norm, global_norm, norm_bound

F32 = np.finfo(np.float32)
FINITE_32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
UPDATES = st.dictionaries(
    st.sampled_from(["a", "b", "c"]),
    hnp.arrays("<f4", hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6), elements=FINITE_32),
    max_size=3,
)
BOUNDS = st.floats(min_value=5e-324, allow_infinity=False) | st.sampled_from([1e-46, 1e-44, 1e-30, 1.0, 1e30, 1e308])


def exact_square(update: dict[str, NDArray[Any]]) -> Fraction:
    return sum((Fraction(float(x)) ** 2 for array in update.values() for x in array.reshape(-1)), Fraction(0))


def within(update: dict[str, NDArray[Any]], clip_norm: float) -> bool:
    return exact_square(update) <= (Fraction(clip_norm) * (1 + Fraction(1, 10**6))) ** 2


@settings(deadline=None, max_examples=300)
@given(UPDATES, BOUNDS)
def test_the_norm_is_bounded_for_any_finite_update(update: dict[str, NDArray[Any]], clip_norm: float) -> None:
    before = {name: array.copy() for name, array in update.items()}
    clipped = clip_by_global_norm(update, clip_norm)
    assert within(clipped, clip_norm)
    for name, array in update.items():
        assert array.tobytes() == before[name].tobytes()
        assert (clipped[name].dtype, clipped[name].shape) == (array.dtype, array.shape)
        assert (np.abs(clipped[name]) <= np.abs(array)).all()  # never amplifies
    if exact_square(update) <= (Fraction(clip_norm) * (1 - Fraction(1, 10**9))) ** 2:
        assert all(clipped[name].tobytes() == array.tobytes() for name, array in update.items())


@settings(deadline=None)
@given(hnp.arrays("<f8", st.integers(0, 8), elements=st.floats(allow_nan=False, allow_infinity=False)), BOUNDS)
def test_the_norm_of_doubles_is_bounded_too(array: NDArray[Any], clip_norm: float) -> None:
    clipped = clip_by_global_norm({"a": array}, clip_norm)
    assert clipped["a"].dtype == np.float64
    assert within(clipped, clip_norm)


CASES = {
    "huge": np.full(1000, F32.max),
    "tiny": np.full(1000, F32.tiny),
    "denormal": np.full(1000, F32.smallest_subnormal),
    "one-hot": np.eye(1, 1000, 17, dtype="<f4")[0] * F32.max,
    "all equal": np.full(100_003, 0.1, "<f4"),
    "mixed": np.array([F32.max, 1, F32.smallest_subnormal, -F32.max], "<f4"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("clip_norm", [1e-45, 1e-42, 1e-38, 1e-3, 1.0, 1e30, 1e38])
def test_the_norm_is_bounded_at_the_ends_of_float32(case: str, clip_norm: float) -> None:
    update = {"a": CASES[case].astype("<f4")}
    clipped = clip_by_global_norm(update, clip_norm)
    assert global_norm(clipped) <= clip_norm * (1 + 1e-6)
    if global_norm(update) > clip_norm >= 1e-3:
        assert global_norm(clipped) >= clip_norm * (1 - 1e-6)


def test_all_tensors_are_scaled_by_one_factor() -> None:
    update = {"a": np.array([3.0], "<f4"), "b": np.array([[4.0]], "<f4")}
    clipped = clip_by_global_norm(update, 2.5)
    assert clipped["a"] == pytest.approx(np.array([1.5]), rel=1e-6)
    assert clipped["b"] == pytest.approx(np.array([[2.0]]), rel=1e-6)


def test_zeros_and_no_tensors_come_back_as_they_are() -> None:
    assert clip_by_global_norm({}, 1.0) == {}
    assert global_norm({}) == 0.0
    zeros = {"a": np.zeros((2, 2), "<f4"), "empty": np.zeros(0, "<f4")}
    assert clip_by_global_norm(zeros, 1e-300)["a"].tolist() == [[0, 0], [0, 0]]


def test_the_norm_of_huge_and_tiny_doubles_is_right() -> None:
    assert global_norm({"a": np.full(4, 1e300)}) == pytest.approx(2e300)
    assert global_norm({"a": np.full(4, 1e-300)}) == pytest.approx(2e-300)
    assert global_norm({"a": np.array([3.0], "<f4"), "b": np.array(4.0, "<f2")}) == 5.0
    assert global_norm({"a": np.ones(300_000, "<f4")}) == pytest.approx(math.sqrt(300_000))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 70_000])
def test_what_is_not_finite_is_refused(bad: float, at: int) -> None:
    array = np.ones(100_000, "<f4")
    array[at] = bad
    update = {"good": np.ones(2, "<f4"), "layer.weight": array}
    with pytest.raises(NonFiniteUpdate, match=r"layer\.weight"):
        clip_by_global_norm(update, 1.0)
    with pytest.raises(NonFiniteUpdate):
        global_norm(update)


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, math.nan, math.inf])
def test_a_bound_that_is_none_is_refused(clip_norm: float) -> None:
    with pytest.raises(ValueError, match="clip_norm"):
        clip_by_global_norm({}, clip_norm)
    with pytest.raises(ValueError, match="clip_norm"):
        norm_bound(clip_norm, 1.0, 10)


@pytest.mark.parametrize("dtype", ["<i4", "?", "<f2", "<c8"])
def test_only_floats_of_32_and_64_bits_are_clipped(dtype: str) -> None:
    with pytest.raises(ValueError, match="tensor 'a'"):
        clip_by_global_norm({"a": np.ones(2, dtype)}, 1.0)


def test_an_honest_update_lies_within_the_bound_and_a_dishonest_one_beyond_it() -> None:
    random = np.random.default_rng(5)
    for elements in (1, 10, 10_000):
        bound = norm_bound(2.0, 0.5, elements)
        for _ in range(50):
            honest = random.normal(size=elements) * 0.5 * 2.0
            honest[0] += 2.0
            assert np.linalg.norm(honest) <= bound
        assert bound == pytest.approx(2.0 + 1.0 * (math.sqrt(elements) + 10), rel=1e-5)


def test_without_noise_the_bound_is_the_clipping_bound() -> None:
    assert 1.0 + 1e-6 < norm_bound(1.0, 0.0, 10**9) < 1.0 + 3e-6


@pytest.mark.parametrize("noise_multiplier", [-1.0, math.nan, math.inf])
def test_a_noise_multiplier_that_is_none_is_refused(noise_multiplier: float) -> None:
    with pytest.raises(ValueError, match="noise_multiplier"):
        norm_bound(1.0, noise_multiplier, 10)
