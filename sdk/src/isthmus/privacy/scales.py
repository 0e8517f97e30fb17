"""How finely what is noised is counted: as finely as the noise can be drawn."""

from collections.abc import Callable

from isthmus.privacy.lattice import variance_of


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
