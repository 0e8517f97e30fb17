"""The ledger's arithmetic, the conversion to epsilon and the search for noise, against published figures."""

import itertools
import math
from fractions import Fraction

import pytest
from dp_accounting.rdp import compute_epsilon
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.privacy.calibration import smallest_noise_multiplier
from isthmus.privacy.conversion import epsilon_of, limit_of
from isthmus.privacy.cost import CAP, MAX_DRAWS, MAX_EPSILON, Cost, Limit, fits, times_within
from isthmus.privacy.events import Event, GaussianRelease, PoissonGaussianRelease, Repeated, rdp_of
from isthmus.privacy.rdp import ORDERS

DELTAS = st.floats(1e-12, 0.5) | st.sampled_from([1e-6, 1e-5])
EPSILONS = st.floats(1e-3, MAX_EPSILON)
MULTIPLIERS = st.floats(0.1, 300.0)


def dp_sgd(probability: float, noise_multiplier: float, steps: int) -> Event:
    return Repeated(PoissonGaussianRelease(probability, noise_multiplier), steps)


@pytest.mark.parametrize(
    ("event", "delta", "published"),
    [
        # TensorFlow Privacy, compute_dp_sgd_privacy_test.
        (dp_sgd(150 / 60_000, 1.3, 6000), 1e-5, 0.7242234026),
        (dp_sgd(1e-3, 1.0, 30_000), 1e-7, 1.4154988495),
        # Opacus, accountants_test.
        (dp_sgd(0.04, 1.5, 2250), 1e-5, 7.32911117143),
        # dp-accounting 0.6.0 and Opacus, MNIST with batches of 256.
        (dp_sgd(256 / 60_000, 1.1, 60 * 60_000 // 256), 1e-5, 2.5966),
        (dp_sgd(256 / 60_000, 1.3, 15 * 60_000 // 256), 1e-5, 0.9544),
        (dp_sgd(256 / 60_000, 0.7, 45 * 60_000 // 256), 1e-5, 6.3195),
    ],
)
def test_whole_orders_give_the_published_epsilons_or_slightly_more(
    event: Event, delta: float, published: float
) -> None:
    found, order = epsilon_of(rdp_of(event), delta)
    assert published * (1 - 2e-5) <= found <= published * 1.02
    assert order in ORDERS


@settings(deadline=None, max_examples=200)
@given(MULTIPLIERS, DELTAS)
def test_the_conversion_is_dp_accountings(noise_multiplier: float, delta: float) -> None:
    curve = rdp_of(GaussianRelease(noise_multiplier))
    epsilon, order = epsilon_of(curve, delta)
    theirs, their_order = compute_epsilon(ORDERS, curve, delta)
    assert epsilon == pytest.approx(float(theirs), rel=1e-12, abs=1e-12)
    assert order == their_order or epsilon == pytest.approx(0.0)


def test_a_divergence_far_below_delta_squared_is_epsilon_zero() -> None:
    assert epsilon_of(rdp_of(GaussianRelease(1e6)), 0.01)[0] == 0.0


def test_a_curve_that_promises_nothing_has_no_finite_epsilon() -> None:
    assert epsilon_of((math.inf,) * len(ORDERS), 1e-5) == (math.inf, 2)


@settings(deadline=None, max_examples=200)
@given(EPSILONS, DELTAS, MULTIPLIERS)
def test_the_limit_is_the_inverse_of_the_conversion(epsilon: float, delta: float, noise_multiplier: float) -> None:
    limit = limit_of(epsilon, delta)
    at_limit = [epsilon_of(tuple(math.inf if i != k else v for i in range(len(ORDERS))), delta)[0]
                for k, v in enumerate(limit) if v > 0]  # fmt: skip
    assert all(found == 0 or found == pytest.approx(epsilon, rel=1e-9, abs=1e-9) for found in at_limit)
    curve = rdp_of(GaussianRelease(noise_multiplier))
    if any(value <= allowed for value, allowed in zip(curve, limit, strict=True)):
        assert epsilon_of(curve, delta)[0] <= epsilon * (1 + 1e-12) + 1e-12


@pytest.mark.parametrize("wrong", [0.0, 1.0, -1e-5, 2.0, math.nan])
def test_a_delta_of_one_or_none_is_refused(wrong: float) -> None:
    for call in (
        lambda: epsilon_of(rdp_of(GaussianRelease(1.0)), wrong),
        lambda: limit_of(1.0, wrong),
        lambda: Limit.of(1.0, wrong),
        lambda: Cost.zero().epsilon(wrong),
    ):
        with pytest.raises(ValueError, match="above 0 and below 1"):
            call()


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf, 1e9])
def test_a_budget_whose_epsilon_promises_nothing_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match=r"at most 100"):
        Limit.of(wrong, 1e-5)


def test_the_eighth_release_of_multiplier_four_overdraws_a_budget_of_three() -> None:
    """Dp-accounting says 2.964 after seven releases and 3.190 after eight."""
    release, limit = Cost.of(GaussianRelease(4.0), 1_000_000), Limit.of(3.0, 1e-5)
    assert fits(release * 7, limit)
    assert not fits(release * 8, limit)
    assert times_within(release, limit) == 7
    curve = rdp_of(GaussianRelease(4.0))
    assert epsilon_of(tuple(7 * value for value in curve), 1e-5)[0] == pytest.approx(2.964, abs=1e-3)
    assert epsilon_of(tuple(8 * value for value in curve), 1e-5)[0] == pytest.approx(3.190, abs=1e-3)
    # What is reported keeps a hundredth of delta for the sampler.
    assert (release * 7).epsilon(1e-5) == pytest.approx(2.9655, abs=1e-3)


@settings(deadline=None, max_examples=200)
@given(st.floats(0, 1) | st.just(1e-7), st.floats(0.05, 1e5))
def test_a_cost_is_rounded_up_by_a_billionth_or_so_and_never_down(probability: float, noise_multiplier: float) -> None:
    event = PoissonGaussianRelease(probability, noise_multiplier)
    for value, nano in zip(rdp_of(event), Cost.of(event, 0).nano, strict=True):
        if value == 0:
            assert nano == 0
        elif value * 1e9 < CAP:
            exact = Fraction(value) * 10**9
            assert exact <= nano <= exact * (1 + Fraction(1, 10**12)) + 2 or nano == CAP
        else:
            assert nano == CAP


@settings(deadline=None, max_examples=200)
@given(EPSILONS, DELTAS)
def test_a_limit_is_rounded_down_and_keeps_a_hundredth_of_delta(epsilon: float, delta: float) -> None:
    limit = Limit.of(epsilon, delta)
    for value, nano in zip(limit_of(epsilon, 0.99 * delta), limit.nano, strict=True):
        exact = Fraction(value) * 10**9
        assert exact - abs(exact) * Fraction(1, 10**12) - 2 <= nano <= exact
    assert limit.draws * 2.0**-63 <= 0.01 * delta
    assert (limit.draws + 2) * 2.0**-63 >= 0.01 * delta * (1 - 1e-12) or limit.draws == 1 << 62


@settings(deadline=None, max_examples=100)
@given(EPSILONS, DELTAS, MULTIPLIERS, st.integers(1, 1000))
def test_what_fits_a_budget_is_reported_as_at_most_its_epsilon(
    epsilon: float, delta: float, noise_multiplier: float, times: int
) -> None:
    cost, limit = Cost.of(GaussianRelease(noise_multiplier), 1) * times, Limit.of(epsilon, delta)
    if fits(cost, limit):
        assert cost.epsilon(delta) <= epsilon
    else:
        assert cost.draws > limit.draws or cost.epsilon(delta) == 0 or cost.epsilon(delta) > epsilon * (1 - 1e-6) - 1e-6


@settings(deadline=None)
@given(st.lists(st.tuples(MULTIPLIERS, st.integers(0, 10**6)), min_size=1, max_size=6), st.permutations(range(6)))
def test_sums_do_not_depend_on_their_order(parts: list[tuple[float, int]], order: list[int]) -> None:
    costs = [Cost.of(GaussianRelease(multiplier), draws) for multiplier, draws in parts]
    shuffled = [costs[place] for place in order if place < len(costs)]
    assert sum(costs, Cost.zero()) == sum(shuffled, Cost.zero())


def test_a_grant_spent_round_by_round_ends_at_what_was_reserved() -> None:
    slice_ = Cost.of(dp_sgd(0.013, 1.17, 77), 77 * 1234)
    spent = list(itertools.accumulate([slice_] * 20))[-1]
    assert spent == slice_ * 20 == 20 * slice_


def test_a_million_rounds_of_the_largest_slice_fit_into_a_signed_64_bit_column() -> None:
    largest = Cost.of(GaussianRelease(1e-9), MAX_DRAWS) * 10**6
    assert max(*largest.nano, largest.draws) < 1 << 63
    with pytest.raises(ValueError, match="at most"):
        Cost.of(GaussianRelease(1.0), MAX_DRAWS + 1)


def test_no_limit_reaches_the_cap() -> None:
    highest = Limit.of(MAX_EPSILON, 1 - 1e-12)
    assert max(highest.nano) < CAP
    assert not fits(Cost.of(GaussianRelease(1e-9), 0), highest)
    assert Cost.of(GaussianRelease(1e-9), 0).epsilon(0.5) == math.inf


def test_too_many_draws_overdraw_a_budget_by_themselves() -> None:
    limit = Limit.of(100.0, 1e-6)
    assert limit.draws == math.floor(1e-8 * 2.0**63)
    wide = GaussianRelease(1000.0)
    assert fits(Cost.of(wide, limit.draws), limit)
    assert not fits(Cost.of(wide, limit.draws + 1), limit)
    assert Cost.of(wide, limit.draws + 1).epsilon(1e-6) == math.inf
    assert times_within(Cost.of(wide, limit.draws // 3), limit) == 3


@settings(deadline=None, max_examples=100)
@given(EPSILONS, MULTIPLIERS, MULTIPLIERS, st.integers(0, 3))
def test_so_many_more_fit_and_one_more_does_not(epsilon: float, each: float, before: float, times: int) -> None:
    limit = Limit.of(epsilon, 1e-5)
    cost, already = Cost.of(GaussianRelease(each), 100), Cost.of(GaussianRelease(before), 10**9) * times
    found = times_within(cost, limit, already=already)
    assert not fits(already + cost * (found + 1), limit)
    assert found == 0 or fits(already + cost * found, limit)


def test_what_costs_nothing_is_not_counted() -> None:
    with pytest.raises(ValueError, match="for ever"):
        times_within(Cost.zero(), Limit.of(1.0, 1e-5))


@pytest.mark.parametrize("nano", [(), (0,) * (len(ORDERS) - 1), (-1,) * len(ORDERS)])
def test_a_stored_cost_of_another_grid_or_below_zero_is_refused(nano: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"components|negative"):
        Cost(nano, 0)


@pytest.mark.parametrize(("steps", "published"), [(2250, 1.4160), (2000, 1.3562)])
def test_the_noise_found_for_epsilon_eight_is_opacus_or_slightly_more(steps: int, published: float) -> None:
    """Opacus, accountants_test, get_noise_multiplier for 90 epochs and for 2000 steps."""
    found = smallest_noise_multiplier(lambda z: Cost.of(dp_sgd(0.04, z, steps), 0), Limit.of(8.0, 1e-5 / 0.99))
    assert published <= found <= published * 1.01


@settings(deadline=None, max_examples=25)
@given(st.floats(0.01, 100), DELTAS, st.floats(1e-4, 1.0), st.integers(1, 10_000))
def test_the_noise_found_fits_and_a_thousandth_less_does_not(
    epsilon: float, delta: float, probability: float, steps: int
) -> None:
    limit = Limit.of(epsilon, delta)

    def cost_of(multiplier: float) -> Cost:
        return Cost.of(dp_sgd(probability, multiplier, steps), steps)

    try:
        found = smallest_noise_multiplier(cost_of, limit)
    except ValueError:
        assert not fits(cost_of(1e5), limit)
        return
    assert fits(cost_of(found), limit)
    assert not fits(cost_of(0.999 * found), limit)
    assert float(f"{found:.3e}") == found  # four digits, the same everywhere


def test_noise_is_sought_for_what_the_budget_holds_already_too() -> None:
    limit, already = Limit.of(3.0, 1e-5), Cost.of(GaussianRelease(4.0), 1) * 6
    found = smallest_noise_multiplier(lambda z: already + Cost.of(GaussianRelease(z), 1), limit)
    assert fits(already + Cost.of(GaussianRelease(found), 1), limit)
    assert found > smallest_noise_multiplier(lambda z: Cost.of(GaussianRelease(z), 1), limit)


def test_a_budget_that_others_used_up_is_said_to_be() -> None:
    already = Cost.of(GaussianRelease(4.0), 1) * 8
    with pytest.raises(ValueError, match="No noise is enough"):
        smallest_noise_multiplier(lambda z: already + Cost.of(GaussianRelease(z), 1), Limit.of(3.0, 1e-5))


def test_a_search_stays_within_its_range() -> None:
    limit = Limit.of(100.0, 1e-5)
    assert smallest_noise_multiplier(lambda z: Cost.of(GaussianRelease(z), 1), limit, low=1.23456) == 1.235
    for low, high in [(0.0, 1.0), (2.0, 1.0), (1.0, math.inf), (math.nan, 1.0)]:
        with pytest.raises(ValueError, match="no range"):
            smallest_noise_multiplier(lambda z: Cost.of(GaussianRelease(z), 1), limit, low=low, high=high)
