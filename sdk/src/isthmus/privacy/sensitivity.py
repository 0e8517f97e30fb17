"""Sensitivities and variances in whole steps of a lattice: public numbers, the same for everybody who asks.

Plain Python: plans are made and checked with it where no NumPy is. `isthmus.privacy.lattice` has the arrays.
"""

import math
from fractions import Fraction
from typing import Final

from isthmus.wire.secured import LARGEST_COHORT

SECURED_SCALE: Final = 1 << 20
"""Steps in the bound of an update that is masked, where there is room for them."""
RING_BITS: Final = 32
"""Masked numbers, and their sums, are whole numbers modulo 2^32."""
WRAP_SIGMAS: Final = 10
"""A sum of noise goes so many standard deviations with a chance below 2 e^-50 = 2^-71 for each coordinate."""


def rounding_reach(dimension: int) -> int:
    """ceil(sqrt(dimension) / 2), in whole numbers: how far rounding to the nearest moves so many elements at most."""
    return math.isqrt((dimension - 1) // 4) + 1  # the least m with 4 m^2 >= dimension


def check_noise_multiplier(noise_multiplier: float) -> None:
    """Whether sigma is a finite number from zero.

    Raises:
        ValueError: it is not.
    """
    if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0):
        raise ValueError(f"noise_multiplier is {noise_multiplier}; it must be finite and not negative")


def share_of_variance(noise_multiplier: float, sensitivity: int, shares: int) -> int:
    """sigma^2 of each of so many shares of noise that add up to `noise_multiplier` times the sensitivity, at least.

    Args:
        noise_multiplier: z, of the sum; finite, > 0.
        sensitivity: D, in steps; from 1.
        shares: from 1.

    Returns:
        ceil((z D)^2 / shares), exactly.

    Raises:
        ValueError: an argument outside of its range.
    """
    check_noise_multiplier(noise_multiplier)
    if noise_multiplier == 0 or sensitivity < 1 or shares < 1:
        raise ValueError(
            f"noise {noise_multiplier} times a sensitivity of {sensitivity} in {shares} shares is none at all"
        )
    return math.ceil((Fraction(noise_multiplier) * sensitivity) ** 2 / shares)


def secured_steps(
    elements: int, *, noise_multiplier: float = 0.0, apart: int = 1, shares: int = 1
) -> tuple[int, int, int]:
    """The finest lattice on which the largest cohort's sum stays within 32 bits, and each member's noise there.

    It does not depend on how many members a round has: prices are computed before anybody is asked.

    Args:
        elements: of a vector; from 1.
        noise_multiplier: z, the noise's standard deviation in units of how far neighbours lie apart; 0 for none.
        apart: how many times the lattice's sensitivity two neighbours differ by: 2 where a unit is replaced.
        shares: so many members' noise together is z; 1 where each adds all of it.

    Returns:
        Scale S, a power of two up to `SECURED_SCALE`; sensitivity D = S + ceil(sqrt(elements) / 2); and each member's
        sigma^2 = ceil((z apart D)^2 / shares), 0 without noise.

    Raises:
        ValueError: there is no such lattice (so much noise does not fit into 32 bits), or an argument outside of its
            range.

    Guarantees:
        A sum of up to `LARGEST_COHORT` members never leaves 32 bits by what they sum, and by their noise with a chance
        below 2^-71 for each element.
    """
    if elements < 1:
        raise ValueError(f"a vector has one element at least, not {elements}")
    check_noise_multiplier(noise_multiplier)
    scale = SECURED_SCALE
    while scale:
        sensitivity = scale + rounding_reach(elements)
        variance = share_of_variance(noise_multiplier, apart * sensitivity, shares) if noise_multiplier else 0
        if _stays_within(sensitivity, variance):
            return scale, sensitivity, variance
        scale >>= 1
    raise ValueError(
        f"a noise_multiplier of {noise_multiplier:g} on {elements} elements does not fit into {RING_BITS} bits, in "
        "which masked numbers are summed: less noise, or more organizations to share it"
    )


def most_secured_noise(elements: int, *, apart: int = 1, shares: int = 1) -> float:
    """A noise multiplier that `secured_steps` still has a lattice for; 0 if it has none. More hardly fits.

    Args:
        elements, apart, shares: as for `secured_steps`.
    """
    sensitivity = 1 + rounding_reach(elements)
    room = (1 << RING_BITS - 1) - LARGEST_COHORT * sensitivity
    if room <= 0:
        return 0.0
    return 0.99 * room / WRAP_SIGMAS * math.sqrt(shares / LARGEST_COHORT) / (apart * sensitivity)


def _stays_within(sensitivity: int, variance: int) -> bool:
    """Whether N D + 10 sigma sqrt(N) < 2^31 for N = `LARGEST_COHORT`; in whole numbers, so nobody sees it otherwise."""
    room = (1 << RING_BITS - 1) - LARGEST_COHORT * sensitivity
    return room > 0 and WRAP_SIGMAS**2 * LARGEST_COHORT * variance < room**2
