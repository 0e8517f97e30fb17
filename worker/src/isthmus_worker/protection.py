"""What happens to an update before anything of it is written down: clip, then noise. Never anywhere else."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.privacy.clipping import NonFiniteUpdate, clip_by_global_norm
from isthmus.privacy.noise import gaussian_noise
from isthmus.wire.jobs import PrivacySpec


def protect(update: Mapping[str, NDArray[Any]], privacy: PrivacySpec) -> dict[str, NDArray[Any]]:
    """The update as it may leave: clipped as one vector over all its tensors, then noised with fresh randomness.

    Raises:
        NonFiniteUpdate: some element is NaN or infinite, also where the job does not clip.
    """
    if privacy.clip_norm is None:
        _require_finite(update)
        return dict(update)
    clipped = clip_by_global_norm(update, privacy.clip_norm)
    return gaussian_noise(clipped, privacy.noise_multiplier, privacy.clip_norm)


def _require_finite(update: Mapping[str, NDArray[Any]]) -> None:
    for name, array in update.items():
        with np.errstate(over="ignore", invalid="ignore"):
            total = array.sum()  # finite only if all elements are; one pass, and no room for a mask
        if not np.isfinite(total) and not np.isfinite(array).all():
            raise NonFiniteUpdate(name)
