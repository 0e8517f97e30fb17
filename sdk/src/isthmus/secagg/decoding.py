"""Finds a polynomial through shares of which some are wrong (Gao's decoding of Reed-Solomon codes).

With `spare` shares more than the threshold, up to `spare` // 2 wrong ones do no harm, however they were chosen.

Source:
    Gao 2003, "A new algorithm for decoding Reed-Solomon codes". https://doi.org/10.1007/978-1-4757-3789-9_5
"""

from collections.abc import Mapping

from isthmus.secagg.shamir import PRIME

Polynomial = list[int]
"""Coefficients of 1, x, x^2, ...; the last one is not 0; empty: 0."""


def decode(shares: Mapping[int, int], threshold: int, prime: int = PRIME) -> Polynomial | None:
    """The polynomial of fewer than `threshold` coefficients' degree that most shares lie on.

    Args:
        shares: the value by its place; places are different modulo the prime, and not 0.
        threshold: as many coefficients as the polynomial has at most.
        prime: modulo what.

    Returns:
        The one polynomial that differs from at most (`len(shares)` - `threshold`) // 2 shares; None: there is none.
    """
    whole, through = [1], Polynomial()
    for x, value in shares.items():  # Newton: `through` meets what was seen, `whole` is 0 there
        step = (value - _value(through, x, prime)) * pow(_value(whole, x, prime), -1, prime)
        through = _minus(through, [-step * coefficient for coefficient in whole], prime)
        whole = _minus([0, *whole], [x * coefficient for coefficient in whole], prime)
    # Euclid's algorithm, until the remainder has the degree that polynomial times error locator must have.
    before, now = whole, through
    factor_before, factor = Polynomial(), [1]
    while 2 * (len(now) - 1) >= len(shares) + threshold:
        quotient, rest = _divided(before, now, prime)
        before, now = now, rest
        factor_before, factor = factor, _minus(factor_before, _times(quotient, factor, prime), prime)
    # Shares can be off only where the factor is 0, which is in no more places than may be wrong: its degree is so low.
    found, rest = _divided(now, factor, prime)
    return None if rest or len(found) > threshold else found


def _value(polynomial: Polynomial, x: int, prime: int) -> int:
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * x + coefficient) % prime
    return value


def _minus(one: Polynomial, other: Polynomial, prime: int) -> Polynomial:
    width = max(len(one), len(other))
    padded = (polynomial + [0] * (width - len(polynomial)) for polynomial in (one, other))
    found = [(a - b) % prime for a, b in zip(*padded, strict=True)]
    while found and not found[-1]:
        found.pop()
    return found


def _times(one: Polynomial, other: Polynomial, prime: int) -> Polynomial:
    found = [0] * (len(one) + len(other) - 1) if one and other else []
    for place, a in enumerate(one):
        for offset, b in enumerate(other):
            found[place + offset] += a * b
    return [coefficient % prime for coefficient in found]


def _divided(dividend: Polynomial, divisor: Polynomial, prime: int) -> tuple[Polynomial, Polynomial]:
    """Quotient and remainder."""
    rest = list(dividend)
    leading = pow(divisor[-1], -1, prime)
    quotient = [0] * max(0, len(rest) - len(divisor) + 1)
    for place in reversed(range(len(quotient))):
        quotient[place] = rest[place + len(divisor) - 1] * leading % prime
        for offset, coefficient in enumerate(divisor):
            rest[place + offset] = (rest[place + offset] - quotient[place] * coefficient) % prime
    return quotient, _minus(rest, [], prime)
