"""How finely what is noised is counted: as finely as the noise can be drawn."""

from collections.abc import Callable

from isthmus.privacy.lattice import Lattice, variance_of
from isthmus.privacy.sensitivity import secured_steps


def finest_scale(noise_multiplier: float, sensitivity_of: Callable[[int], int], finest: int) -> tuple[int, int]:
    """The largest scale whose noise can be drawn, and the noise's variance there.

    Args:
        noise_multiplier: z, the noise's standard deviation in units of the sensitivity; above 0.
        sensitivity_of: the sensitivity in steps, where so many steps stand for 1; grows with it.
        finest: the largest scale to take, a power of two.

    Returns:
        A power of two of steps, and sigma^2 = ceil((z sensitivity)^2) in squared steps.

    Raises:
        ValueError: the noise is too large for any scale.
    """
    scale = finest
    while True:
        try:
            return scale, variance_of(noise_multiplier, sensitivity_of(scale))
        except ValueError:
            if scale <= 1:
                raise
            scale >>= 1


def noised_lattice(
    clip_norm: float, noise_multiplier: float, elements: int, *, finest: int, apart: int = 1
) -> tuple[Lattice, int]:
    """The finest lattice for vectors of norm `clip_norm` on which their noise can be drawn, and its variance there.

    Public, and the same for everybody who asks with the same numbers: who adds the noise, and who judges its length.

    Args:
        clip_norm: C; finite, > 0.
        noise_multiplier: z, the noise's standard deviation in units of how far neighbours lie apart; > 0.
        elements: of a vector; from 1.
        finest: the largest scale to take, a power of two: `lattice.UPDATE_SCALE` or `lattice.SAMPLE_SCALE`.
        apart: how many times the lattice's sensitivity two neighbours differ by: 2 where a unit is replaced.

    Returns:
        The lattice, and sigma^2 = ceil((z apart D)^2) in squared steps.

    Raises:
        ValueError: no lattice takes so much noise.
    """
    scale, variance = finest_scale(
        noise_multiplier, lambda steps: apart * Lattice(clip_norm, steps, elements).sensitivity, finest
    )
    return Lattice(clip_norm, scale, elements), variance


def secured_lattice(
    clip_norm: float, elements: int, *, noise_multiplier: float = 0.0, apart: int = 1, shares: int = 1
) -> tuple[Lattice, int]:
    """The lattice of a job under secure aggregation, and the variance of each member's noise there: 0 without noise.

    Public, and the same for everybody who asks with the same numbers: members, who judges the sum, and who prices it.
    It does not depend on how many take part.

    Args:
        clip_norm: C; finite, > 0.
        elements, noise_multiplier, apart, shares: as for `sensitivity.secured_steps`, whose guarantees these are.

    Raises:
        ValueError: an argument outside of its range, or so much noise that it does not fit into 32 bits.
    """
    scale, _, variance = secured_steps(elements, noise_multiplier=noise_multiplier, apart=apart, shares=shares)
    return Lattice(clip_norm, scale, elements), variance
