"""Rényi differential privacy of the mechanisms, as curves over one fixed grid of orders.

A curve bounds, for every order a, the Rényi divergence of order a between what a mechanism answers on two neighbouring
data sets. Curves add up when mechanisms follow each other, and that is why ledgers keep curves and not epsilons.

All orders are integers. There the divergence of the *discrete* Gaussian equals the continuous one's, also under Poisson
sampling. With x on the lattice Z^d, an integer shift v and integer k,

    E_{x ~ P0}[(P1(x) / P0(x))^k] = exp((k^2 - k) |v|^2 / (2 sigma^2)) * S(k v) / S(0)

with S(c) = sum_x exp(-|x - c|^2 / (2 sigma^2)), and S(k v) = S(0) because k v is a lattice point itself. The binomial
expansion of E_{P0}[((1 - q) + q P1 / P0)^a] at an integer a has no other terms, so it is the continuous mechanism's to
the letter. The other direction, D(P0 || mixture), is the smaller one wherever an involution swaps P0 and P1 (Mironov,
Talwar and Zhang 2019, Theorem 5); x -> v - x does so on the lattice, because v is integer.

Plain Python: the worker's agent, which imports no NumPy, keeps its ledger with this.
"""

import math
from functools import lru_cache
from operator import add
from typing import Final

Curve = tuple[float, ...]
"""One value for each of `ORDERS`, in nats; infinite where nothing is promised."""

ORDERS: Final[tuple[int, ...]] = (*range(2, 65), 72, 80, 96, 112, 128, 160, 192, 224, 256, 384, 512, 768, 1024)
"""The orders at which ledgers count. They never change under this version's name: stored curves refer to it."""
ORDERS_VERSION: Final = "orders-v1"

ZERO: Final[Curve] = (0.0,) * len(ORDERS)

# Beyond these a curve would vanish in floats. It is charged as at them, which is more: curves fall in z and grow in q.
_MOST_NOISE: Final = 1e9
_LEAST_PROBABILITY: Final = 1e-12
_LEAST_SHARE: Final = 0.25  # sigma^2 from which the bound for sums of discrete Gaussians is proved


def gaussian_rdp(noise_multiplier: float) -> Curve:
    """The curve of one release with Gaussian noise, continuous or discrete.

    Args:
        noise_multiplier: z, the noise's standard deviation divided by the L2 sensitivity; finite, > 0.

    Returns:
        a / (2 z^2) at every order a.

    Raises:
        ValueError: `noise_multiplier` is not a finite number above zero.

    Guarantees:
        Exact for the continuous Gaussian, and for the discrete Gaussian with parameter sigma^2 = (z D)^2 on integer
        vectors whose difference has norm at most D.

    Source:
        Mironov 2017, https://arxiv.org/abs/1702.07476, Proposition 7; Canonne, Kamath and Steinke 2020, "The Discrete
        Gaussian for Differential Privacy", https://arxiv.org/abs/2004.00010, Theorem 14.
    """
    noise_multiplier = _checked(noise_multiplier)
    return tuple(order / 2 / noise_multiplier / noise_multiplier for order in ORDERS)  # z * z could vanish


@lru_cache(maxsize=4096)
def poisson_gaussian_rdp(sampling_probability: float, noise_multiplier: float) -> Curve:
    """The curve of Gaussian noise on a sum over records that were drawn by independent coins, one for each record.

    Args:
        sampling_probability: q, with which each record takes part; 0 to 1. The coins are nobody's to see.
        noise_multiplier: z, the noise's standard deviation divided by the largest norm of one record's part; > 0.

    Returns:
        log(A(a)) / (a - 1) at every order a, with A(a) = sum_k C(a, k) (1 - q)^(a - k) q^k exp((k^2 - k) / (2 z^2)).

    Raises:
        ValueError: an argument outside of its range.

    Guarantees:
        For the neighbouring relation "one record more or less", in both directions, and for the discrete Gaussian as
        well (see the module). Relative error below 1e-9, also where the curve is near zero: A - 1 is summed by itself,
        from terms that are all positive, as those of k = 0 and 1 cancel against 1.

    Edge cases:
        q = 1 -> `gaussian_rdp`; q = 0 -> zeros; q below 1e-12 or z above 1e9 -> as at those.

    Source:
        Mironov, Talwar and Zhang 2019, "Rényi Differential Privacy of the Sampled Gaussian Mechanism",
        https://arxiv.org/abs/1908.10530, section 3.3 and Theorem 5.
    """
    noise_multiplier = _checked(noise_multiplier)
    if not 0 <= sampling_probability <= 1:
        raise ValueError(f"sampling_probability is {sampling_probability}; it must be between 0 and 1")
    if sampling_probability == 0:
        return ZERO
    if sampling_probability == 1:
        return gaussian_rdp(noise_multiplier)
    sampling_probability = max(sampling_probability, _LEAST_PROBABILITY)
    log_kept = math.log1p(-sampling_probability)
    log_odds = math.log(sampling_probability) - log_kept
    weights = [
        k * log_odds + _log_expm1((k * k - k) / 2 / noise_multiplier / noise_multiplier)
        for k in range(2, ORDERS[-1] + 1)
    ]
    return tuple(_sampled(order, log_kept, weights) for order in ORDERS)


def distributed_gaussian_rdp(sensitivity: float, local_variance: float, shares: int, dimension: int) -> Curve:
    """The curve of a sum to which several parties each added a discrete Gaussian of their own.

    A sum of discrete Gaussians is not a discrete Gaussian, but close to one; how close is what `tau` below bounds.

    Args:
        sensitivity: the L2 norm that one party's integers can have, in lattice units; >= 1.
        local_variance: sigma^2 of each party's noise, in lattice units; >= 1/4, below which nothing is proved.
        shares: how many parties surely added theirs; >= 1.
        dimension: number of coordinates of the sum; >= 1.

    Returns:
        The least of three bounds, at every order.

    Raises:
        ValueError: an argument outside of its range.

    Source:
        Kairouz, Liu and Steinke 2021, "The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure
        Aggregation", https://arxiv.org/abs/2102.06387, Proposition 14.
    """
    if not (1 <= sensitivity < math.inf and _LEAST_SHARE <= local_variance < math.inf):
        raise ValueError(
            f"sensitivity {sensitivity} and local variance {local_variance} must be finite, from 1 and {_LEAST_SHARE}"
        )
    if shares < 1 or dimension < 1:
        raise ValueError(f"{shares} shares of noise on {dimension} coordinates: there must be one of each at least")
    tau = 10 * math.fsum(math.exp(-2 * math.pi**2 * local_variance * k / (k + 1)) for k in range(1, shares))
    deviation = math.sqrt(shares * local_variance)
    l2 = sensitivity / deviation
    l1 = min(math.sqrt(dimension) * sensitivity, sensitivity**2) / deviation  # integers: |v|_1 <= |v|_2^2
    squared = min(l2**2 + 2 * l1 * tau + tau**2 * dimension, (l2 + math.sqrt(dimension) * tau) ** 2)
    return tuple(min(order / 2 * l2**2 + tau * dimension, order / 2 * squared) for order in ORDERS)


def skellam_rdp(l2_sensitivity: float, l1_sensitivity: float, variance: float) -> Curve:
    """The curve of Skellam noise (the difference of two Poisson variables) on an integer vector.

    Args:
        l2_sensitivity: Euclidean norm by which the vector can differ, in lattice units; > 0.
        l1_sensitivity: the same as a sum of magnitudes; > 0.
        variance: of the noise of one coordinate, over all parties; > 0.

    Returns:
        The bound at every order.

    Raises:
        ValueError: an argument outside of its range.

    Source:
        Agarwal, Kairouz and Liu 2021, "The Skellam Mechanism for Differentially Private Federated Learning",
        https://arxiv.org/abs/2110.04995, Theorem 3.5.
    """
    if not all(math.isfinite(value) and value > 0 for value in (l2_sensitivity, l1_sensitivity, variance)):
        raise ValueError("the sensitivities and the variance of Skellam noise must be finite and above zero")
    squared = l2_sensitivity**2
    return tuple(
        order * squared / (2 * variance)
        + min(((2 * order - 1) * squared + 6 * l1_sensitivity) / (4 * variance**2), 3 * l1_sensitivity / (2 * variance))
        for order in ORDERS
    )


def _checked(noise_multiplier: float) -> float:
    if not (math.isfinite(noise_multiplier) and noise_multiplier > 0):
        raise ValueError(f"noise_multiplier is {noise_multiplier}; it must be finite and above zero")
    return min(noise_multiplier, _MOST_NOISE)


def _sampled(order: int, log_kept: float, weights: list[float]) -> float:
    """log(A) / (a - 1), from A - 1 = (1 - q)^a * the sum over k >= 2 of C(a, k) exp(weights[k - 2])."""
    terms = list(map(add, _log_binomials(order), weights))
    largest = max(terms)
    if largest == math.inf:
        return math.inf
    above_one = order * log_kept + largest + math.log(math.fsum(math.exp(term - largest) for term in terms))
    log_a = above_one + math.log1p(math.exp(-above_one)) if above_one > 0 else math.log1p(math.exp(above_one))
    return log_a / (order - 1)


@lru_cache(maxsize=len(ORDERS))
def _log_binomials(order: int) -> tuple[float, ...]:
    """log C(order, k) for k from 2 to `order`; of exact integers, which `math.lgamma` would blur."""
    return tuple(math.log(math.comb(order, k)) for k in range(2, order + 1))


def _log_expm1(exponent: float) -> float:
    """log(exp(x) - 1) for x > 0, without overflow and without cancellation."""
    if exponent == math.inf:
        return math.inf
    return exponent + math.log(-math.expm1(-exponent))
