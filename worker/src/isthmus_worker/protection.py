"""What happens to an update before anything of it is written down: clip, then noise. Never anywhere else."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.privacy.clipping import NonFiniteUpdate, clip_by_global_norm
from isthmus.privacy.keystream import Keystream
from isthmus.privacy.lattice import UPDATE_SCALE
from isthmus.privacy.scales import noised_lattice
from isthmus.wire.privacy import NoisePlace, PrivacyPlan, PrivacySpec, PrivacyUnit


def protect(
    update: Mapping[str, NDArray[Any]], privacy: PrivacySpec, plan: PrivacyPlan | None
) -> dict[str, NDArray[Any]]:
    """The update as it may leave. The one that is given is not modified.

    * unit record: as it is. Its steps were noised one by one, and it is nothing but their sum.
    * unit organization, local: clipped as one vector on the lattice of whole numbers, then noised there. Another
      organization's data could have given any other clipped update: neighbours are twice the bound apart.
    * unit organization, central: clipped. The service clips again, on its lattice, and adds the noise to the sum.
    * unit none: clipped, if the job has a bound.

    Raises:
        NonFiniteUpdate: some element is NaN or infinite, also where nothing is clipped.
    """
    if plan is not None and plan.where is NoisePlace.LOCAL:
        return _noised(update, plan)
    if privacy.unit is PrivacyUnit.RECORD or privacy.clip_norm is None:
        require_finite(update)
        return dict(update)
    return clip_by_global_norm(update, privacy.clip_norm)


def _noised(update: Mapping[str, NDArray[Any]], plan: PrivacyPlan) -> dict[str, NDArray[Any]]:
    elements = sum(array.size for array in update.values())
    lattice, variance = noised_lattice(plan.clip_norm, plan.noise_multiplier, elements, finest=UPDATE_SCALE, apart=2)
    noised = lattice.noised(update, variance, Keystream())
    return {name: array.astype(update[name].dtype, copy=False) for name, array in noised.items()}


def require_finite(update: Mapping[str, NDArray[Any]]) -> None:
    """Goes on with an update that is finite.

    Raises:
        NonFiniteUpdate: some element is NaN or infinite.
    """
    for name, array in update.items():
        with np.errstate(over="ignore", invalid="ignore"):
            total = array.sum()  # finite only if all elements are; one pass, and no room for a mask
        if not np.isfinite(total) and not np.isfinite(array).all():
            raise NonFiniteUpdate(name)
