"""Whole numbers under masks: as fine as 32 bits allow, never finer, and the same whatever the cohort."""

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.privacy.scales import secured_lattice
from isthmus.privacy.sensitivity import SECURED_SCALE, most_secured_noise, secured_steps, share_of_variance
from isthmus.wire.secured import LARGEST_COHORT

RING = 1 << 31


def fits(sensitivity: int, deviation: float) -> bool:
    """The design's condition, in plain floats."""
    return LARGEST_COHORT * sensitivity + 10 * deviation * math.sqrt(LARGEST_COHORT) < RING


@settings(max_examples=200, deadline=None)
@given(
    elements=st.integers(1, 10**9),
    noise=st.one_of(st.just(0.0), st.floats(0.01, 1e4)),
    apart=st.sampled_from([1, 2]),
    shares=st.integers(1, LARGEST_COHORT),
)
def test_the_largest_cohorts_sum_stays_within_32_bits_and_a_scale_twice_as_fine_would_not(
    elements: int, noise: float, apart: int, shares: int
) -> None:
    half_root = math.ceil(math.sqrt(elements) / 2)
    try:
        scale, sensitivity, variance = secured_steps(elements, noise_multiplier=noise, apart=apart, shares=shares)
    except ValueError:
        least = 2 + half_root
        assert not fits(least, noise * apart * least / math.sqrt(shares) * 1.000001)
        return
    assert scale & (scale - 1) == 0
    assert abs(sensitivity - scale - half_root) <= 1
    assert fits(sensitivity, math.sqrt(variance) * 0.999999)
    finer = 2 * scale + half_root
    assert scale == SECURED_SCALE or not fits(finer, noise * apart * finer / math.sqrt(shares) * 1.000001)


@settings(max_examples=200, deadline=None)
@given(st.floats(0.01, 1e4), st.integers(1, 1 << 26), st.integers(1, LARGEST_COHORT))
def test_shares_add_up_to_the_noise_and_waste_less_than_a_step_each(
    noise: float, sensitivity: int, shares: int
) -> None:
    share = share_of_variance(noise, sensitivity, shares)
    whole = (Fraction(noise) * sensitivity) ** 2
    assert shares * (share - 1) < whole <= shares * share


def test_a_million_parameters_keep_a_millionth_of_the_clip_in_every_mode() -> None:
    """The design's table: S = 2^20 in all of these."""
    for elements, noise, shares, local in (
        (10**6, 11.63, 20, 2_726_536),
        (10**6, 16.45, 100, 1_724_413),
        (10**7, 6.96, 200, 515_837),
        (10**5, 2.85, 10, 946_368),
    ):
        scale, _, variance = secured_steps(elements, noise_multiplier=noise, shares=shares)
        assert scale == SECURED_SCALE
        assert math.sqrt(variance) == pytest.approx(local, rel=4e-3)  # the noise is rounded to 4 digits there
    assert secured_steps(10**6)[0] == SECURED_SCALE
    lattice, variance = secured_lattice(2.0, 10**6)
    assert (lattice.step, variance) == (2.0 / SECURED_SCALE, 0)


@pytest.mark.parametrize(("apart", "shares"), [(1, 1), (1, 40), (2, 1)])
@pytest.mark.parametrize("elements", [1, 10**4, 10**8])
def test_the_most_noise_fits_and_hardly_more_does(elements: int, apart: int, shares: int) -> None:
    most = most_secured_noise(elements, apart=apart, shares=shares)
    secured_steps(elements, noise_multiplier=most, apart=apart, shares=shares)
    with pytest.raises(ValueError, match="does not fit into 32 bits"):
        secured_steps(elements, noise_multiplier=1.02 * most, apart=apart, shares=shares)


def test_a_model_for_which_nothing_fits_is_refused_and_never_an_endless_search() -> None:
    assert most_secured_noise(10**14) == 0.0
    with pytest.raises(ValueError, match="does not fit"):
        secured_steps(10**14)
    with pytest.raises(ValueError, match="one element"):
        secured_steps(0)
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="noise_multiplier"):
            secured_steps(10, noise_multiplier=wrong)
    for noise, sensitivity, shares in ((0.0, 1, 1), (1.0, 0, 1), (1.0, 1, 0)):
        with pytest.raises(ValueError, match="none at all"):
            share_of_variance(noise, sensitivity, shares)
