"""Gaussian noise on an update.

What this module does not do: it supports no claim of an epsilon. Its numbers are floats drawn from a statistical
generator (PCG64), not from a cryptographic one, and floating-point Gaussians have gaps through which more can be read
than the theory of real numbers says (Mironov 2012, https://doi.org/10.1145/2382196.2382264). It blurs what an update
says; it proves nothing about it.
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.privacy.clipping import NonFiniteUpdate, Tensors, check_clip_norm, check_noise_multiplier

_SEED_BYTES = 32
_BLOCK = 1 << 16


def gaussian_noise(
    update: Tensors, noise_multiplier: float, clip_norm: float, *, entropy: Callable[[int], bytes] = os.urandom
) -> dict[str, NDArray[np.floating[Any]]]:
    """Add independent N(0, (noise_multiplier * clip_norm)^2) to every element of `update`.

    Args:
        update: tensor name -> array of floats; clipped to `clip_norm` before. Not modified.
        noise_multiplier: sigma, the standard deviation in units of the clipping bound; finite, >= 0.
        clip_norm: the clipping bound C; finite, > 0.
        entropy: where the generator's seed comes from: the operating system, anew in every call. It is a parameter
            for tests only. Noise that others can compute protects nothing, so it is never seeded from a job.

    Returns:
        The same names, shapes and element types.

    Raises:
        ValueError: an argument outside of its range.
        NonFiniteUpdate: the sum does not fit its element type, or some element was not finite.

    Guarantees:
        Two calls share no generator. The sum is taken in float64 and rounded once. No epsilon: see the module.

    Edge cases:
        noise_multiplier 0 -> returned as it is, and no randomness is drawn.
    """
    check_clip_norm(clip_norm)
    check_noise_multiplier(noise_multiplier)
    if noise_multiplier == 0:
        return dict(update)
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(entropy(_SEED_BYTES), "big")))
    deviation = noise_multiplier * clip_norm
    return {name: _noised(name, update[name], deviation, generator) for name in sorted(update)}


def _noised(
    name: str, array: NDArray[np.floating[Any]], deviation: float, generator: np.random.Generator
) -> NDArray[np.floating[Any]]:
    flat = array.reshape(-1)
    result = np.empty(flat.size, array.dtype)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        for start in range(0, flat.size, _BLOCK):
            part = flat[start : start + _BLOCK]
            result[start : start + part.size] = part + deviation * generator.standard_normal(part.size)
    if not np.isfinite(result).all():
        raise NonFiniteUpdate(name)
    return result.reshape(array.shape)
