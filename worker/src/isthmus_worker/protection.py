"""What happens to an update before anything of it is written down: clip, then noise. Never anywhere else."""

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from isthmus.privacy.clipping import clip_by_global_norm, global_norm
from isthmus.privacy.noise import gaussian_noise
from isthmus.wire.jobs import PrivacySpec


def protect(update: Mapping[str, NDArray[Any]], privacy: PrivacySpec) -> dict[str, NDArray[Any]]:
    """The update as it may leave: clipped as one vector over all its tensors, then noised with fresh randomness.

    Raises:
        NonFiniteUpdate: some element is NaN or infinite, also where the job does not clip.
    """
    if privacy.clip_norm is None:
        global_norm(update)  # raises where an element is not finite
        return dict(update)
    clipped = clip_by_global_norm(update, privacy.clip_norm)
    return gaussian_noise(clipped, privacy.noise_multiplier, privacy.clip_norm)
