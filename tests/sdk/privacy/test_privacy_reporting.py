"""The figures of other accountants that are shown beside ours, against their published values."""

import math

import pytest
from dp_accounting import get_sigma_gaussian

from isthmus.privacy.conversion import epsilon_of
from isthmus.privacy.events import (
    DistributedGaussianRelease,
    Event,
    GaussianRelease,
    PoissonGaussianRelease,
    Repeated,
    Together,
    rdp_of,
)
from isthmus.privacy.planning import plan_of
from isthmus.privacy.reporting import NoReference, analytic_gaussian_epsilon, pld_epsilon, rdp_epsilon_reference
from isthmus.testing import sample_spec

MNIST = 256 / 60_000


def test_the_closed_form_is_balle_and_wangs() -> None:
    """Balle and Wang 2018."""
    assert analytic_gaussian_epsilon(1.0, 1e-5) == pytest.approx(4.377178, abs=1e-6)
    for epsilon, sigma in [(1, 4.2246789), (3, 1.5438614), (10, 0.5410868)]:
        assert analytic_gaussian_epsilon(sigma, 1e-6) == pytest.approx(epsilon, abs=1e-6)
        assert get_sigma_gaussian(epsilon, 1e-6) == pytest.approx(sigma, abs=1e-7)
    for epsilon, sigma in [(1, 3.7306316), (3, 1.3905935), (10, 0.4998886)]:
        assert analytic_gaussian_epsilon(sigma, 1e-5) == pytest.approx(epsilon, abs=1e-6)


def test_the_classical_formula_is_not_enough_where_epsilon_is_above_one_and_ours_is() -> None:
    """sqrt(2 ln(1.25 / delta)) / epsilon is proved for epsilon below 1 (Dwork and Roth 2014, appendix A)."""
    epsilon, delta, needed = 10.0, 1e-5, 0.4998886
    classical = math.sqrt(2 * math.log(1.25 / delta)) / epsilon
    assert classical == pytest.approx(0.4845, abs=1e-4)
    assert analytic_gaussian_epsilon(classical, delta) == pytest.approx(10.4, abs=0.1)
    assert classical < needed

    privacy = {"unit": "organization", "where": "local", "epsilon": epsilon, "delta": delta, "clip_norm": 1.0}
    plan = plan_of(sample_spec(privacy=privacy, strategy={"fedavg": {"weights": "uniform"}}, rounds=1), 300, 6)

    assert plan is not None
    assert plan.noise_multiplier >= needed
    assert analytic_gaussian_epsilon(plan.noise_multiplier, delta) <= epsilon


def test_loss_distributions_agree_with_the_closed_form_where_it_is_exact() -> None:
    assert pld_epsilon(GaussianRelease(1.0), 1e-5) == pytest.approx(4.37717810, abs=1e-6)
    assert pld_epsilon(GaussianRelease(2.0, sensitivity=2.0), 1e-5) == pytest.approx(4.37717810, abs=1e-6)
    repeated = Repeated(GaussianRelease(8.0), 16)
    assert pld_epsilon(repeated, 1e-5) == pytest.approx(analytic_gaussian_epsilon(2.0, 1e-5), rel=1e-3)


@pytest.mark.parametrize(
    ("noise_multiplier", "epochs", "rdp", "pld"),
    [(1.1, 60, 2.5966, 2.3817), (1.3, 15, 0.9544, 0.8645), (0.7, 45, 6.3195, 5.6394)],
)
def test_dp_sgd_on_mnist_has_the_published_epsilons(
    noise_multiplier: float, epochs: int, rdp: float, pld: float
) -> None:
    """TensorFlow's tutorial said about 3.0, 1.19 and 7.1 with the older conversion."""
    event = Repeated(PoissonGaussianRelease(MNIST, noise_multiplier), epochs * 60_000 // 256)
    assert rdp_epsilon_reference(event, 1e-5) == pytest.approx(rdp, abs=1e-3)
    assert pld_epsilon(event, 1e-5) == pytest.approx(pld, abs=2e-3)


@pytest.mark.parametrize(
    "event",
    [
        GaussianRelease(1.5),
        Repeated(PoissonGaussianRelease(0.02, 1.0), 500),
        Together((GaussianRelease(5.0), Repeated(PoissonGaussianRelease(0.1, 2.0), 20))),
    ],
)
def test_ours_is_the_largest_of_the_figures(event: Event) -> None:
    ours = epsilon_of(rdp_of(event), 1e-5)[0]
    reference = rdp_epsilon_reference(event, 1e-5)
    assert reference <= ours * (1 + 1e-12)
    assert ours <= reference * 1.02
    assert pld_epsilon(event, 1e-5) < reference


def test_noise_in_narrow_shares_has_no_second_opinion_and_in_wide_ones_that_of_their_sum() -> None:
    for call in (pld_epsilon, rdp_epsilon_reference):
        with pytest.raises(NoReference, match="shares"):
            call(Repeated(DistributedGaussianRelease(8, 63, 5, 100), 3), 1e-5)
        shares = DistributedGaussianRelease(1 << 20, 16 << 38, 4, 10**6)  # together 4 times the sensitivity
        assert call(Repeated(shares, 3), 1e-5) == call(Repeated(GaussianRelease(4.0), 3), 1e-5)


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf])
def test_a_closed_form_of_no_noise_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="noise_multiplier"):
        analytic_gaussian_epsilon(wrong, 1e-5)
