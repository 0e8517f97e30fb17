"""Shamir's secret sharing: a secret as the value at 0 of a random polynomial, of which each member gets one value.

Any `threshold` values give the polynomial and with it the secret; fewer tell nothing at all about it. One secret of 32
bytes is one number modulo `PRIME`, so that a share is one number too.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Final

PRIME: Final = 2**256 + 297
"""The first prime above every 32-byte number."""
SECRET_BYTES: Final = 32
SHARE_BYTES: Final = 33


def values_at(polynomial: Sequence[int], xs: Iterable[int], prime: int = PRIME) -> list[int]:
    """The polynomial's values: the shares.

    Args:
        polynomial: the secret, then the coefficients of x, x^2, ...; as many as shares rebuild it.
        xs: where; different and not 0 modulo the prime, as the value at 0 is the secret.
        prime: modulo what.
    """
    found = []
    for x in xs:
        value = 0
        for coefficient in reversed(polynomial):
            value = (value * x + coefficient) % prime
        found.append(value)
    return found


@lru_cache(maxsize=64)
def weights_at_zero(xs: tuple[int, ...], prime: int = PRIME) -> tuple[int, ...]:
    """What the values at `xs` have to be multiplied with for their sum to be the value at 0 (Lagrange).

    The same holders tell their shares of many secrets, so that these are computed once and remembered.

    Raises:
        ValueError: an x comes twice or is 0.
    """
    if len({x % prime for x in xs} | {0}) != len(xs) + 1:
        raise ValueError("shares are values at different places, none of them 0")
    found = []
    for x in xs:
        above = below = 1
        for other in xs:
            if other != x:
                above = above * other % prime
                below = below * (other - x) % prime
        found.append(above * pow(below, -1, prime) % prime)
    return tuple(found)


def secret_from(xs: Sequence[int], shares: Sequence[int], prime: int = PRIME) -> int:
    """The secret behind as many shares as the threshold. Wrong shares give a wrong secret: check it against something.

    Raises:
        ValueError: an x comes twice or is 0, or there are not as many shares as places.
    """
    weights = weights_at_zero(tuple(xs), prime)
    return sum(weight * share for weight, share in zip(weights, shares, strict=True)) % prime
