"""The curves against other people's numbers, against dp-accounting, and against divergences summed term by term."""

import math
import subprocess
import sys
from typing import Any

import mpmath
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.rdp import RdpAccountant
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.special import ive

from isthmus.privacy.rdp import (
    ORDERS,
    distributed_gaussian_rdp,
    gaussian_rdp,
    poisson_gaussian_rdp,
    skellam_rdp,
)


def test_the_grid_of_orders_is_the_one_that_stored_ledgers_refer_to() -> None:
    assert len(ORDERS) == 76
    assert ORDERS[:63] == tuple(range(2, 65))
    assert ORDERS[63:] == (72, 80, 96, 112, 128, 160, 192, 224, 256, 384, 512, 768, 1024)


def test_the_accounting_needs_no_numpy_and_no_dp_accounting() -> None:
    """The worker's agent keeps its ledger with these modules, in a process without arrays."""
    modules = ", ".join(f"isthmus.privacy.{name}" for name in ("rdp", "events", "conversion", "cost", "calibration"))
    program = f"import sys, {modules}; print(*sorted({{'numpy', 'dp_accounting', 'mpmath'}} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


def test_a_gaussian_costs_half_the_order_over_the_squared_multiplier() -> None:
    assert gaussian_rdp(4.0) == tuple(order / 32 for order in ORDERS)


@pytest.mark.parametrize(("order", "expected"), [(2, 0.01), (8, 0.04)])
def test_the_discrete_gaussian_shifted_by_an_integer_diverges_like_the_continuous_one(
    order: int, expected: float
) -> None:
    """Canonne, Kamath and Steinke 2020, Theorem 14, for sigma^2 = 100."""
    divergence = renyi(discrete_gaussian(100), shifted(discrete_gaussian(100), 1), order)
    assert divergence == pytest.approx(expected, rel=1e-12)
    assert gaussian_rdp(10.0)[ORDERS.index(order)] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("order", [2, 3, 8, 64])
@pytest.mark.parametrize("variance", [1, 4, 9])
@pytest.mark.parametrize("probability", [0.01, 0.3])
def test_sampling_amplifies_the_discrete_gaussian_exactly_as_the_continuous_one(
    order: int, variance: int, probability: float
) -> None:
    """The argument in the module's docstring, summed over the lattice in both directions, with many digits."""
    plain = discrete_gaussian(variance)
    moved = shifted(plain, 1)
    mixture = {x: (1 - probability) * plain.get(x, 0) + probability * moved.get(x, 0) for x in {*plain, *moved}}
    claimed = poisson_gaussian_rdp(probability, math.sqrt(variance))[ORDERS.index(order)]
    assert renyi(mixture, plain, order) == pytest.approx(claimed, rel=1e-9)
    assert renyi(plain, mixture, order) <= claimed * (1 + 1e-9)


@settings(deadline=None, max_examples=60)
@given(
    st.floats(1e-6, 1.0) | st.sampled_from([1e-8, 1e-4, 0.5, 0.999999, 1.0]),
    st.floats(0.2, 50.0) | st.sampled_from([0.2, 1.0, 1000.0]),
)
@example(0.01, 1.0)
def test_the_sampled_curve_is_dp_accountings(probability: float, noise_multiplier: float) -> None:
    accountant = RdpAccountant(list(ORDERS))
    accountant.compose(PoissonSampledDpEvent(probability, GaussianDpEvent(noise_multiplier)))
    ours = poisson_gaussian_rdp(probability, noise_multiplier)
    # Near zero dp-accounting takes the logarithm of 1 + something tiny, and loses digits that ours keeps.
    assert ours == pytest.approx([float(value) for value in accountant._rdp], rel=1e-9, abs=3e-14)


@pytest.mark.parametrize(("probability", "noise_multiplier"), [(1e-6, 20.0), (1e-4, 50.0), (0.01, 1.0), (0.7, 0.3)])
def test_the_sampled_curve_keeps_its_digits_near_zero(probability: float, noise_multiplier: float) -> None:
    for order in (2, 17, 64, 256):
        with mpmath.workdps(60):
            q, z = mpmath.mpf(probability), mpmath.mpf(noise_multiplier)
            terms = (
                mpmath.binomial(order, k) * (1 - q) ** (order - k) * q**k * mpmath.exp((k * k - k) / (2 * z * z))
                for k in range(order + 1)
            )
            exact = float(mpmath.log(mpmath.fsum(terms)) / (order - 1))
        assert poisson_gaussian_rdp(probability, noise_multiplier)[ORDERS.index(order)] == pytest.approx(
            exact, rel=1e-11
        )


def test_without_sampling_and_without_anyone_the_curve_is_plain() -> None:
    assert poisson_gaussian_rdp(1.0, 1.5) == gaussian_rdp(1.5)
    assert set(poisson_gaussian_rdp(0.0, 1.5)) == {0.0}


def test_almost_no_noise_promises_nothing_instead_of_overflowing() -> None:
    assert poisson_gaussian_rdp(0.5, 1e-200) == (math.inf,) * len(ORDERS)
    assert gaussian_rdp(1e-200) == (math.inf,) * len(ORDERS)
    assert all(0 < value < math.inf for value in poisson_gaussian_rdp(0.5, 0.01))


def test_noise_without_measure_still_costs_something() -> None:
    for curve in (gaussian_rdp(1e300), poisson_gaussian_rdp(0.5, 1e300), poisson_gaussian_rdp(5e-324, 1e300)):
        assert all(0 < value < 1e-12 for value in curve)


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf])
def test_noise_that_is_no_positive_number_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="noise_multiplier"):
        gaussian_rdp(wrong)
    with pytest.raises(ValueError, match="noise_multiplier"):
        poisson_gaussian_rdp(0.5, wrong)


@pytest.mark.parametrize("wrong", [-0.1, 1.1, math.nan])
def test_a_probability_outside_of_its_range_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        poisson_gaussian_rdp(wrong, 1.0)


@pytest.mark.parametrize("local_variance", [0.25, 0.3, 0.5, 1.0, 2.0, 4.0, 64.0])
@pytest.mark.parametrize("shares", [1, 2, 3, 4])
def test_the_bound_for_noise_in_shares_covers_the_exact_divergence(local_variance: float, shares: int) -> None:
    """By brute force: the convolution of so many discrete Gaussians, its divergence from itself moved by one."""
    total = share = discrete_gaussian(local_variance, reach=280 if local_variance > 4 else 60)
    for _ in range(shares - 1):
        total = convolved(total, share)
    for order in (2, 3, 8, 24):
        exact = renyi(total, shifted(total, 1), order)
        bound = distributed_gaussian_rdp(1, local_variance, shares, 1)[ORDERS.index(order)]
        assert exact <= bound * (1 + 1e-9)
        # Nine coordinates that all move by one: the norm is 3, and divergences of independent coordinates add up.
        assert 9 * exact <= distributed_gaussian_rdp(3, local_variance, shares, 9)[ORDERS.index(order)] * (1 + 1e-9)
        if local_variance >= 4:  # and where the shares are wide, it is tight
            assert bound == pytest.approx(exact, rel=1e-6)


def test_a_sum_of_narrow_shares_is_no_gaussian_and_the_allowance_for_it_is_needed() -> None:
    """Without it the bound would be exceeded: what it covers is real."""
    share = discrete_gaussian(0.25, reach=60)
    total = convolved(share, share)
    exact = renyi(total, shifted(total, 1), 3)
    assert exact > gaussian_rdp(math.sqrt(0.5))[ORDERS.index(3)] * 1.06
    assert exact <= distributed_gaussian_rdp(1, 0.25, 2, 1)[ORDERS.index(3)]


def test_wide_shares_cost_what_their_sum_would() -> None:
    together = distributed_gaussian_rdp(1000, 64_000_000, 16, 10**6)
    assert together == pytest.approx(gaussian_rdp(math.sqrt(16 * 64_000_000) / 1000), rel=1e-9)


def test_a_single_share_has_no_allowance_for_sums() -> None:
    assert distributed_gaussian_rdp(3, 0.5, 1, 1) == pytest.approx(gaussian_rdp(math.sqrt(0.5) / 3), rel=1e-12)


@pytest.mark.parametrize(
    "wrong",
    [(0, 1, 1, 1), (1, 0, 1, 1), (1, 0.24, 2, 1), (1, 1, 0, 1), (1, 1, 1, 0), (math.nan, 1, 1, 1), (1, math.inf, 1, 1)],
)
def test_shares_that_make_no_sense_are_refused(wrong: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be"):
        distributed_gaussian_rdp(*wrong)


def test_the_bound_for_skellam_noise_is_the_published_one_and_covers_the_exact_divergence() -> None:
    """Agarwal, Kairouz and Liu 2021, mu = 100, order 2."""
    bound = skellam_rdp(1, 1, 100)[ORDERS.index(2)]
    assert bound == pytest.approx(0.010225, rel=1e-12)
    pmf = {x: float(ive(abs(x), 100.0)) for x in range(-150, 151)}
    exact = renyi(pmf, shifted(pmf, 1), 2)
    assert exact == pytest.approx(0.0099995919, abs=1e-9)
    assert exact <= bound
    assert (float(ive(0, 1.0)), float(ive(0, 4.0))) == pytest.approx((0.465759607594, 0.207001921224), abs=1e-12)


def discrete_gaussian(variance: float, reach: int = 200) -> dict[int, Any]:
    """Its masses as far out as the highest order tested here looks: order times the shift, and 12 sigma more."""
    with mpmath.workdps(60):
        weights = {x: mpmath.exp(-mpmath.mpf(x * x) / (2 * mpmath.mpf(variance))) for x in range(-reach, reach + 1)}
        total = mpmath.fsum(weights.values())
        return {x: weight / total for x, weight in weights.items()}


def shifted(pmf: dict[int, Any], by: int) -> dict[int, Any]:
    return {x + by: mass for x, mass in pmf.items()}


def convolved(one: dict[int, Any], other: dict[int, Any]) -> dict[int, Any]:
    found: dict[int, Any] = {}
    with mpmath.workdps(60):
        for x, mass in one.items():
            for y, more in other.items():
                found[x + y] = found.get(x + y, 0) + mass * more
    reach = max(one)
    return {x: mass for x, mass in found.items() if abs(x) <= reach}


def renyi(p: dict[int, Any], q: dict[int, Any], order: int) -> float:
    with mpmath.workdps(60):
        terms = (mpmath.mpf(p[x]) ** order * mpmath.mpf(q[x]) ** (1 - order) for x in p if x in q and p[x] and q[x])
        return float(mpmath.log(mpmath.fsum(terms)) / (order - 1))
