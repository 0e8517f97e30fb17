"""Second opinions on an epsilon, by other accountants. They are reported beside the ledger's figure, never enforced.

dp-accounting is imported within the functions: it takes most of a second and brings SciPy.
"""

import math
from typing import TYPE_CHECKING, Final

from isthmus.privacy.conversion import check_delta
from isthmus.privacy.events import DistributedGaussianRelease, Event, GaussianRelease, PoissonGaussianRelease, Repeated

if TYPE_CHECKING:
    from dp_accounting import DpEvent


_WIDE_SHARE: Final = 64
"""sigma^2 of a share, from which a sum of shares differs from a Gaussian by less than 10^-260: see `rdp`'s tau."""


class NoReference(ValueError):
    """The other accountants know no such mechanism."""


def pld_epsilon(event: Event, delta: float) -> float:
    """Epsilon by privacy loss distributions: nearly exact for continuous Gaussian noise, and below the Rényi figure.

    The noise that is drawn is discrete; on a fine lattice the two differ by less than is shown. The figure is an
    estimate for that reason, and the ledger's stays the promise.

    Args:
        event: what was released. Seconds for many steps: not for an event loop.
        delta: above 0 and below 1.

    Raises:
        NoReference: the event holds noise in shares so narrow that their sum is no Gaussian.
        ValueError: `delta` is outside of its range.
    """
    from dp_accounting.pld import PLDAccountant  # noqa: PLC0415  # see the module

    check_delta(delta)
    accountant = PLDAccountant()
    accountant.compose(_foreign(event))
    return float(accountant.get_epsilon(delta))


def rdp_epsilon_reference(event: Event, delta: float) -> float:
    """Epsilon by dp-accounting's Rényi accountant with its own orders, fractional ones too.

    Raises:
        NoReference: the event holds noise in shares so narrow that their sum is no Gaussian.
        ValueError: `delta` is outside of its range.
    """
    from dp_accounting.rdp import RdpAccountant  # noqa: PLC0415  # see the module

    check_delta(delta)
    accountant = RdpAccountant()
    accountant.compose(_foreign(event))
    return float(accountant.get_epsilon(delta))


def analytic_gaussian_epsilon(noise_multiplier: float, delta: float) -> float:
    """The exact epsilon of one release with continuous Gaussian noise, in closed form.

    So many releases of multiplier z over the same units are one of z / sqrt(times).

    Args:
        noise_multiplier: z, the noise's standard deviation divided by the sensitivity; finite, > 0.
        delta: above 0 and below 1.

    Raises:
        ValueError: an argument outside of its range.

    Source:
        Balle and Wang 2018, "Improving the Gaussian Mechanism for Differential Privacy",
        https://arxiv.org/abs/1805.06530, Theorem 8.
    """
    from dp_accounting import get_epsilon_gaussian  # noqa: PLC0415  # see the module

    check_delta(delta)
    if not (math.isfinite(noise_multiplier) and noise_multiplier > 0):
        raise ValueError(f"noise_multiplier is {noise_multiplier}; it must be finite and above zero")
    return float(get_epsilon_gaussian(noise_multiplier, delta))


def _foreign(event: Event) -> "DpEvent":
    """The same event in dp-accounting's words."""
    import dp_accounting  # noqa: PLC0415  # see the module

    match event:
        case GaussianRelease():
            return dp_accounting.GaussianDpEvent(event.noise_multiplier / event.sensitivity)
        case PoissonGaussianRelease():
            gaussian = dp_accounting.GaussianDpEvent(event.noise_multiplier)
            return dp_accounting.PoissonSampledDpEvent(event.sampling_probability, gaussian)
        case Repeated():
            return dp_accounting.SelfComposedDpEvent(_foreign(event.event), event.times)
        case DistributedGaussianRelease():
            if event.local_variance < _WIDE_SHARE:
                raise NoReference(
                    "dp-accounting knows no noise in such narrow shares; the ledger's figure stands alone"
                )
            deviation = math.sqrt(event.shares * event.local_variance)
            return dp_accounting.GaussianDpEvent(deviation / event.sensitivity)
        case _:
            return dp_accounting.ComposedDpEvent([_foreign(part) for part in event.events])
