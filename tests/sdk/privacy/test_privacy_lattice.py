"""The lattice against its one guarantee, that no encoded update is longer than the sensitivity, in whole numbers."""

import math
import tracemalloc
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from isthmus.privacy import lattice as lattice_module
from isthmus.privacy.clipping import NonFiniteUpdate, global_norm
from isthmus.privacy.discrete_gaussian import MAX_VARIANCE, Noise
from isthmus.privacy.keystream import Keystream
from isthmus.privacy.lattice import (
    MAX_SENSITIVITY,
    SAMPLE_SCALE,
    UPDATE_SCALE,
    Lattice,
    sum_of_squares,
    to_lattice,
    variance_of,
)
from isthmus.privacy.sensitivity import rounding_reach

F32 = np.finfo(np.float32)
F64 = np.finfo(np.float64)
KEY = bytes(range(32))
FINITE = {
    "<f4": st.floats(width=32, allow_nan=False, allow_infinity=False),
    "<f8": st.floats(allow_nan=False, allow_infinity=False),
}


def arrays(dtype: str) -> st.SearchStrategy[NDArray[Any]]:
    shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6)
    return hnp.arrays(dtype, shapes, elements=FINITE[dtype])


UPDATES = st.dictionaries(st.sampled_from(["a", "b", "c"]), arrays("<f4") | arrays("<f8"), min_size=1, max_size=3)
BOUNDS = st.floats(1e-290, 1e300) | st.sampled_from([1e-46, 1e-38, 1e-3, 1.0, 1e30])
SCALES = st.sampled_from([1, 2, 3, 255, 1 << 12, UPDATE_SCALE, SAMPLE_SCALE])

ADVERSARIAL = {
    "huge": np.full(4096, F32.max),
    "huge doubles": np.full(4096, F64.max),
    "tiny": np.full(4096, F32.tiny),
    "denormal": np.full(4096, F32.smallest_subnormal),
    "denormal doubles": np.full(4096, F64.smallest_subnormal),
    "one hot": np.eye(1, 4096, 17, dtype=np.float32)[0],
    "one huge among denormals": np.where(np.arange(4096) == 5, F32.max, F32.smallest_subnormal),
    "all equal": np.full(4096, 0.1, np.float32),
    "all at half a step": np.full(4096, 1.5 / UPDATE_SCALE),
    "just inside": np.full(4096, 1 / 64),
    "just outside": np.full(4096, np.nextafter(1 / 64, 1)),
    "dense signs": np.where(np.arange(4096) % 2, 1.0, -1.0).astype(np.float32),
    "zeros": np.zeros(4096, np.float32),
}


def squares(integers: NDArray[np.int64]) -> int:
    return sum(int(value) ** 2 for value in integers.tolist())


def elements(update: dict[str, NDArray[Any]]) -> int:
    return sum(array.size for array in update.values())


@settings(deadline=None, max_examples=300)
@given(UPDATES.filter(elements), BOUNDS, SCALES)
def test_no_encoded_update_is_longer_than_the_sensitivity(
    update: dict[str, NDArray[Any]], clip_norm: float, scale: int
) -> None:
    lattice = Lattice(clip_norm, scale, elements(update))
    before = {name: array.tobytes() for name, array in update.items()}
    integers = lattice.encode(update)
    assert (integers.dtype, integers.shape) == (np.int64, (lattice.dimension,))
    assert squares(integers) <= lattice.sensitivity**2
    assert {name: array.tobytes() for name, array in update.items()} == before


@settings(deadline=None, max_examples=200)
@given(arrays("<f8").filter(lambda array: array.size), st.sampled_from([1e-3, 1.0, 1e30]), SCALES)
def test_an_update_within_the_bound_is_rounded_and_nothing_else(
    array: NDArray[Any], clip_norm: float, scale: int
) -> None:
    norm = global_norm({"a": array})
    if norm > clip_norm:
        array = array / norm * (clip_norm * (1 - 1e-9)) if math.isfinite(norm) else np.zeros_like(array)
    integers = Lattice(clip_norm, scale, array.size).encode({"a": array})
    for value, integer in zip(array.reshape(-1), integers, strict=True):
        assert abs(Fraction(float(value)) * scale / Fraction(clip_norm) - int(integer)) <= Fraction(1, 2) + Fraction(
            1, 10**6
        )


@pytest.mark.parametrize("scale", [1, 63, UPDATE_SCALE, SAMPLE_SCALE])
@pytest.mark.parametrize("clip_norm", [1e-3, 1.0, 77.0])
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_updates_keep_the_bound(name: str, clip_norm: float, scale: int) -> None:
    lattice = Lattice(clip_norm, scale, 4096)
    assert lattice.sensitivity == scale + 32
    assert squares(lattice.encode({"w": ADVERSARIAL[name]})) <= lattice.sensitivity**2


@pytest.mark.parametrize("name", ["huge", "dense signs", "all equal", "one hot", "just outside"])
def test_a_long_update_keeps_its_direction_and_comes_to_the_bound(name: str) -> None:
    update = ADVERSARIAL[name].astype(np.float64)
    integers = Lattice(0.5, UPDATE_SCALE, 4096).encode({"w": update})
    expected = update / global_norm({"w": update}) * UPDATE_SCALE
    assert np.abs(integers - expected).max() <= 0.5 + 1e-6
    assert math.isqrt(squares(integers)) == pytest.approx(UPDATE_SCALE, rel=1e-4)


def test_the_bound_holds_even_if_the_norm_was_computed_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guarantee rests on the check in whole numbers, not on the arithmetic before it."""
    monkeypatch.setattr(lattice_module, "global_norm", lambda update: global_norm(update) * 0.99)
    lattice = Lattice(1.0, UPDATE_SCALE, 4096)
    assert squares(lattice.encode({"w": ADVERSARIAL["dense signs"]})) <= lattice.sensitivity**2


def test_tensors_stand_in_the_order_of_their_names_and_are_clipped_as_one() -> None:
    update = {"b": np.array([[3.0], [0.0]], np.float32), "a": np.array(4.0)}
    integers = Lattice(1.0, 1000, 3).encode(update)
    assert integers.tolist() == [800, 600, 0]


def test_an_array_that_is_not_contiguous_is_read_in_its_own_order() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)[:, ::2].T
    assert Lattice(1000.0, 1000, 6).encode({"a": array}).tolist() == array.reshape(-1).tolist()


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_by_name(wrong: float) -> None:
    update = {"a": np.zeros(3, np.float32), "bad": np.array([0.0, wrong], np.float32)}
    lattice = Lattice(1.0, UPDATE_SCALE, 5)
    with pytest.raises(NonFiniteUpdate, match="bad"):
        lattice.encode(update)
    with pytest.raises(NonFiniteUpdate, match="bad"):
        lattice.noised(update, 100, Keystream())
    with pytest.raises(ValueError, match="outside of the lattice"):
        to_lattice(update["bad"], 1.0)


def test_an_update_of_another_size_or_kind_is_refused() -> None:
    lattice = Lattice(1.0, UPDATE_SCALE, 3)
    with pytest.raises(ValueError, match="4 elements, the lattice 3"):
        lattice.encode({"a": np.zeros(4, np.float32)})
    with pytest.raises(ValueError, match="not floats"):
        lattice.encode({"a": np.zeros(3, np.int64)})
    with pytest.raises(ValueError, match="3 elements"):
        lattice.decode(np.zeros(3, np.int64), {"a": (2, 2)})


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf, 5e-324])
def test_a_clip_norm_that_is_none_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="clip_norm"):
        Lattice(wrong, UPDATE_SCALE, 10)


@pytest.mark.parametrize(("scale", "dimension"), [(0, 1), (1, 0), (MAX_SENSITIVITY, 1)])
def test_a_lattice_that_is_none_is_refused(scale: int, dimension: int) -> None:
    with pytest.raises(ValueError, match=r"lattice|sensitivity"):
        Lattice(1.0, scale, dimension)


@pytest.mark.parametrize("dimension", [1, 3, 4, 5, 15, 16, 17, 10**6, 10**6 + 1, 10**12 + 1, (1 << 60) - 1])
def test_the_sensitivity_is_the_scale_and_half_the_root_rounded_up(dimension: int) -> None:
    extra = Lattice(1.0, 1, dimension).sensitivity - 1 if dimension < 1 << 50 else rounding_reach(dimension)
    assert 4 * extra**2 >= dimension > 4 * (extra - 1) ** 2


@settings(deadline=None, max_examples=200)
@given(hnp.arrays(np.int64, st.integers(0, 50), elements=st.integers(-(1 << 26), 1 << 26)))
def test_squares_are_summed_exactly_below_2_to_the_53(integers: NDArray[np.int64]) -> None:
    exact = squares(integers)
    found = sum_of_squares(integers)
    assert found == exact if exact < 1 << 53 else found >= 1 << 53


def test_a_sum_of_squares_that_floats_would_round_down_is_never_below_the_bound() -> None:
    lattice = Lattice(1.0, MAX_SENSITIVITY - 1, 1)
    assert lattice.sensitivity == MAX_SENSITIVITY
    within = np.array([MAX_SENSITIVITY, 0])
    beyond = np.array([MAX_SENSITIVITY, 1])
    assert lattice.bound_holds(sum_of_squares(within))
    assert not lattice.bound_holds(sum_of_squares(beyond))
    assert not lattice.bound_holds(sum_of_squares(np.full(100_000, 1 << 52)))


@settings(deadline=None)
@given(st.floats(1e-3, 32.0), st.integers(1, MAX_SENSITIVITY))
def test_the_variance_is_the_next_whole_number(noise_multiplier: float, sensitivity: int) -> None:
    variance = variance_of(noise_multiplier, sensitivity)
    exact = (Fraction(noise_multiplier) * sensitivity) ** 2
    assert variance - 1 < exact <= variance


def test_noise_that_is_none_or_too_wide_has_no_variance() -> None:
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="noise"):
            variance_of(wrong, 1 << 20)
    with pytest.raises(ValueError, match="none at all"):
        variance_of(1.0, 0)
    assert variance_of(2.0**7, 1 << 24) == MAX_VARIANCE
    with pytest.raises(ValueError, match="more than can be sampled"):
        variance_of(2.0**7 + 1e-6, 1 << 24)


def test_what_leaves_is_the_integers_with_exact_noise_in_the_units_of_the_parameters() -> None:
    generator = np.random.default_rng(7)
    update = {
        "b": generator.standard_normal((100, 300), dtype=np.float32),
        "a": generator.standard_normal(20_000),
        "c": np.float32(1.0).reshape(()),
        "empty": np.empty((0, 3), np.float32),
    }
    lattice = Lattice(2.0, UPDATE_SCALE, 50_001)
    noised = lattice.noised(update, 10**10, Keystream(KEY))
    integers = lattice.encode(update)
    Noise(10**10, Keystream(KEY)).add_to(integers)
    expected = lattice.decode(integers, {name: array.shape for name, array in update.items()})
    assert list(noised) == sorted(update)
    for name, array in noised.items():
        assert (array.dtype, array.shape) == (np.float32, update[name].shape)
        assert array.tobytes() == expected[name].tobytes()
    again = (np.concatenate([array.reshape(-1) for array in noised.values()]) / lattice.step).round().astype(np.int64)
    assert np.abs(again - integers).max() == 0  # float32 holds every integer below 2^24: nothing was lost


def test_decoding_undoes_encoding_but_for_half_a_step() -> None:
    update = {"a": np.linspace(-0.01, 0.01, 1000, dtype=np.float32)}
    lattice = Lattice(1.0, UPDATE_SCALE, 1000)
    back = lattice.decode(lattice.encode(update), {"a": (1000,)})["a"]
    assert np.abs(back - update["a"]).max() <= lattice.step / 2 * (1 + 1e-3)


def test_noise_beyond_float32_is_refused_whatever_the_update_holds() -> None:
    with pytest.raises(ValueError, match="too large for float32"):
        Lattice(1e38, UPDATE_SCALE, 3).noised({"a": np.zeros(3, np.float32)}, variance_of(1.0, 1 << 20), Keystream())


def test_noising_needs_its_result_and_little_more() -> None:
    update = {"a": np.ones((1000, 2000), np.float32), "b": np.ones(1_000_000, np.float32)}
    lattice = Lattice(1.0, UPDATE_SCALE, 3_000_000)
    lattice.noised(update, 10**12, Keystream())
    tracemalloc.start()
    lattice.noised(update, 10**12, Keystream())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12_000_000 + 4_000_000
