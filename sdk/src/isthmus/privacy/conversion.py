"""From Rényi curves to (epsilon, delta), and back."""

import math

from isthmus.privacy.rdp import ORDERS, Curve


def epsilon_of(curve: Curve, delta: float) -> tuple[float, int]:
    """The epsilon that a curve promises at `delta`, and the order that promises it.

    Args:
        curve: a bound on the Rényi divergence at each of `rdp.ORDERS`, in nats; >= 0.
        delta: above 0 and below 1.

    Returns:
        The least of r + log(1 - 1/a) - log(delta a) / (a - 1) over all orders a, but at least 0, and its order.
        Infinite, at order 2, where the curve promises nothing.

    Raises:
        ValueError: `delta` is outside of its range.

    Edge cases:
        delta^2 > 1 - e^-r at some order -> 0: there the total variation itself is within delta.

    Source:
        Canonne, Kamath and Steinke 2020, https://arxiv.org/abs/2004.00010, Proposition 12; the edge case is the
        inequality of Bretagnolle and Huber. The same conversion as `compute_epsilon` of dp-accounting.
    """
    check_delta(delta)
    best, chosen = math.inf, ORDERS[0]
    for order, value, given in zip(ORDERS, curve, _offsets(delta), strict=True):
        epsilon = 0.0 if delta**2 + math.expm1(-value) > 0 else value + given
        if epsilon < best:
            best, chosen = epsilon, order
    return max(0.0, best), chosen


def limit_of(epsilon: float, delta: float) -> Curve:
    """How large a curve may be at each order, for that order alone to promise (epsilon, delta): `epsilon_of`'s inverse.

    Args:
        epsilon: finite, >= 0.
        delta: above 0 and below 1.

    Returns:
        epsilon - log(1 - 1/a) + log(delta a) / (a - 1) at every order a. Negative at orders that cannot promise so
        little. What is at or below it at *some* order keeps the budget.

    Raises:
        ValueError: an argument outside of its range.
    """
    check_delta(delta)
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise ValueError(f"epsilon is {epsilon}; it must be finite and not negative")
    return tuple(epsilon - given for given in _offsets(delta))


def check_delta(delta: float) -> None:
    """Whether delta can be one.

    Raises:
        ValueError: it is not above 0 and below 1.
    """
    if not 0 < delta < 1:
        raise ValueError(
            f"delta is {delta}; it must be above 0 and below 1, and far below 1 in one's number of records"
        )


def _offsets(delta: float) -> Curve:
    """What epsilon is above the divergence, at each order."""
    return tuple(math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1) for order in ORDERS)
