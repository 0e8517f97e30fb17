"""What one record can add to a step's sum: checked in whole numbers, with the function that production uses."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from isthmus.privacy.discrete_gaussian import MAX_VARIANCE
from isthmus.privacy.lattice import SAMPLE_SCALE, Lattice
from isthmus.privacy.scales import noised_lattice
from isthmus_worker.record_clipping import ClippedSum

WIDTHS = (1, 7, 5000, 64)
ELEMENTS = sum(WIDTHS)


def clipped(gradients: list[NDArray[np.floating]], lattice: Lattice) -> NDArray[np.int64]:  # type: ignore[type-arg]
    """The sum over the records."""
    total = ClippedSum(lattice)
    total.add(gradients)
    return total.take()


def parted(rows: NDArray[np.floating]) -> list[NDArray[np.floating]]:  # type: ignore[type-arg]
    """A gradient a row, as tensors of different sizes."""
    return list(np.split(rows, np.cumsum(WIDTHS)[:-1], axis=1))


def squares(integers: NDArray[np.int64]) -> int:
    """Their sum of squares, in Python's own integers."""
    return sum(int(value) ** 2 for value in integers)


def adversaries(seed: int) -> NDArray[np.float32]:
    """Records that try to add more than they may."""
    chance = np.random.default_rng(seed)
    rows = [
        chance.standard_normal(ELEMENTS) * 10.0 ** chance.integers(-30, 30),
        np.full(ELEMENTS, 3e38),
        np.full(ELEMENTS, chance.choice([1e-45, 1e-40, 1e-20])),
        np.where(np.arange(ELEMENTS) == chance.integers(ELEMENTS), 10.0 ** chance.integers(-3, 38), 0.0),
        np.full(ELEMENTS, 1.0 / math.sqrt(ELEMENTS)),  # as long as the bound
        np.full(ELEMENTS, (1.0 + 1e-6) / math.sqrt(ELEMENTS)),
        np.full(ELEMENTS, (chance.integers(1000) + 0.5) / SAMPLE_SCALE),  # every element is rounded by half a step
        np.zeros(ELEMENTS),
    ]
    with np.errstate(over="ignore"):
        return np.array(rows).astype(np.float32)


@given(
    seed=st.integers(0, 10_000),
    clip_norm=st.sampled_from([1e-9, 1e-3, 1.0, 7.3, 1e9]),
    scale=st.sampled_from([1, 64, 1 << 24]),
)
@settings(max_examples=40, deadline=None)
def test_one_record_more_changes_the_sum_by_the_sensitivity_at_most(seed: int, clip_norm: float, scale: int) -> None:
    lattice = Lattice(clip_norm, scale, ELEMENTS)
    chance = np.random.default_rng(seed)
    others = (chance.standard_normal((chance.integers(0, 40), ELEMENTS)) * clip_norm).astype(np.float32)
    without = clipped(parted(others), lattice)
    for record in adversaries(seed) * np.float32(min(1.0, clip_norm)):
        place = int(chance.integers(len(others) + 1))
        among = clipped(parted(np.insert(others, place, record, axis=0)), lattice)
        assert squares(among - without) <= lattice.sensitivity**2


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_record_that_is_not_finite_adds_nothing(broken: float) -> None:
    lattice = Lattice(1.0, SAMPLE_SCALE, ELEMENTS)
    rows = np.random.default_rng(1).standard_normal((3, ELEMENTS)).astype(np.float32)
    rows[1, 4321] = broken
    assert np.array_equal(clipped(parted(rows), lattice), clipped(parted(rows[[0, 2]]), lattice))
    assert not clipped(parted(rows[[1]]), lattice).any()


def test_what_a_record_adds_does_not_hang_on_the_others() -> None:
    lattice = Lattice(1.0, SAMPLE_SCALE, ELEMENTS)
    rows = (np.random.default_rng(2).standard_normal((50, ELEMENTS)) * 0.1).astype(np.float32)
    alone = sum(clipped(parted(row[None]), lattice) for row in rows)
    assert np.array_equal(alone, clipped(parted(rows), lattice))


def test_all_tensors_are_clipped_as_one_vector() -> None:
    """Neither each element by itself nor each tensor by itself, whose norms would be far above the bound."""
    lattice = Lattice(2.0, SAMPLE_SCALE, ELEMENTS)
    found = clipped(parted(np.full((1, ELEMENTS), 5.0, np.float32)), lattice) * lattice.step
    assert np.linalg.norm(found) == pytest.approx(2.0, rel=1e-5)
    within = np.full((1, ELEMENTS), 0.001, np.float32)
    assert clipped(parted(within), lattice) * lattice.step == pytest.approx(within[0], abs=lattice.step / 2)


def test_gradients_of_float64_are_bounded_too_and_none_is_modified() -> None:
    lattice = Lattice(1.0, SAMPLE_SCALE, ELEMENTS)
    rows = np.vstack([np.full(ELEMENTS, 1e200), np.random.default_rng(3).standard_normal(ELEMENTS)])
    before = rows.copy()
    assert squares(clipped(parted(rows), lattice)) <= (2 * lattice.sensitivity) ** 2
    assert squares(clipped(parted(rows[1:]), lattice)) > 0.99 * lattice.scale**2
    assert np.array_equal(rows, before)


@pytest.mark.parametrize(
    ("noise", "elements"), [(0.01, 1), (1.1, 52_138), (60.0, 10**6), (1000.0, 10**8), (10_000.0, 2**31)]
)
def test_the_lattice_is_the_finest_whose_noise_can_be_drawn(noise: float, elements: int) -> None:
    lattice, variance = noised_lattice(1.0, noise, elements, finest=SAMPLE_SCALE)
    assert (noise * lattice.sensitivity) ** 2 * (1 - 1e-12) <= variance <= MAX_VARIANCE
    assert lattice.sensitivity >= lattice.scale + math.sqrt(elements) / 2
    finer = Lattice(1.0, 2 * lattice.scale, elements).sensitivity
    assert lattice.scale == SAMPLE_SCALE or (noise * finer) ** 2 > MAX_VARIANCE


def test_the_bound_is_checked_in_whole_numbers_even_if_the_factor_was_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    lattice = Lattice(1.0, SAMPLE_SCALE, ELEMENTS)

    def not_clipped(_self: ClippedSum, gradients: list[NDArray[np.floating]]) -> NDArray[np.float64]:  # type: ignore[type-arg]
        return np.full(len(gradients[0]), float(lattice.scale))

    monkeypatch.setattr(ClippedSum, "_factors", not_clipped)
    for length in (1.00002, 1.5, 40.0):
        row = np.full((1, ELEMENTS), length / math.sqrt(ELEMENTS), np.float32)
        found = squares(clipped(parted(row), lattice))
        assert 0.99 * lattice.scale**2 < found <= lattice.sensitivity**2
