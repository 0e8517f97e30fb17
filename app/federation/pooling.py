"""What the sites measured, over all of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from isthmus.federation import rounds
from isthmus.federation.rounds import site_metrics


def pool_metrics(released: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Metrics over all sites, see `isthmus.federation.rounds.pool_metrics`.

    Args:
        released: what each site released, in canonical order.
    """
    return rounds.pool_metrics([site_metrics(site) for site in released])


__all__ = ["pool_metrics", "site_metrics"]
