"""What the sites measured, over all of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from isthmus.federation.metrics import pooled_mean
from isthmus.wire.rounds import METRICS_PREFIX


def site_metrics(released: Mapping[str, Any]) -> dict[str, float]:
    """The metrics in what a site released, without their prefix."""
    return {
        name.removeprefix(METRICS_PREFIX): float(value)
        for name, value in sorted(released.items())
        if name.startswith(METRICS_PREFIX)
    }


def pool_metrics(released: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Metrics over all sites: `examples` are added up, the others are means weighted by the examples behind them.

    A site that left a metric out (AUC, where one class is missing) does not count for it. The pooled AUC is therefore
    the mean of the sites' own, not the AUC over all records, which no site could compute.

    Args:
        released: what each site released, in canonical order.

    Returns:
        `holdout/loss`, `holdout/accuracy`, ... as far as any site released them.
    """
    sites = [site_metrics(site) for site in released]
    names = sorted({name for site in sites for name in site})
    pooled: dict[str, float] = {}
    for name in names:
        group, _, measure = name.rpartition("/")
        having = [site for site in sites if name in site]
        examples = [site.get(f"{group}/examples", 0.0) for site in having]
        if measure == "examples":
            pooled[name] = float(sum(examples))
            continue
        mean = pooled_mean([site[name] for site in having], examples)
        if mean is not None:
            pooled[name] = mean
    return pooled
