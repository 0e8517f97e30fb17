"""What may be told of a model's quality under privacy of records: two counts with noise, and nothing that was measured.

A held-out record adds 1 to the records, and 1 to the right answers or nothing: a vector no longer than sqrt(2). That
holds because each is answered by itself, see `isthmus_worker.evaluation.right_answers`.
"""

import math
from typing import Final

from isthmus.privacy.discrete_gaussian import DiscreteGaussian
from isthmus.privacy.keystream import Keystream
from isthmus.privacy.scales import finest_scale

_FINEST: Final = 1 << 20


def noised_quality(examples: int, right: int, noise_multiplier: float) -> dict[str, float]:
    """`examples` and `accuracy` as they may leave.

    Args:
        examples: held-out records.
        right: how many of them the model answers right.
        noise_multiplier: standard deviation of the noise in units of what one record can change, sqrt(2).

    Returns:
        `examples`, a whole number from 1, and `accuracy`, from 0 to 1: computed from the noised counts alone.

    Guarantees:
        Fresh noise in every call, from the operating system.
    """
    scale, variance = finest_scale(noise_multiplier, sensitivity, _FINEST)
    noise = DiscreteGaussian(variance).sample(2, Keystream())
    counted, answered = (
        (count * scale + int(one)) / scale for count, one in zip((examples, right), noise, strict=True)
    )
    told = max(1.0, float(round(counted)))
    return {"examples": told, "accuracy": min(1.0, max(0.0, answered / told))}


def sensitivity(scale: int) -> int:
    """L2 norm of what one record adds to the two counts, in steps: ceil(scale sqrt(2))."""
    return math.isqrt(2 * scale * scale - 1) + 1
