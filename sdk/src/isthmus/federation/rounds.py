"""What a job's rounds are, whom they ask, how updates count and how results are pooled.

The service decides with these functions and a simulation with the same ones, so both train the same model.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from isthmus.federation.cohort import Cohort, draw_cohort
from isthmus.federation.metrics import pooled_mean
from isthmus.federation.statistics import Moments, merge_all, variance
from isthmus.wire.data import DataSpec, FeatureStatistics
from isthmus.wire.jobs import CohortSpec, JobSpec
from isthmus.wire.rounds import METRICS_PREFIX, STATISTICS_PREFIX, TaskKind
from isthmus.wire.strategies import StrategySpec, Weighting


def number_after(spec: JobSpec, last: int | None) -> int | None:
    """The number of the round after `last` (None: nothing was done yet); None if the job is done.

    Round 0 gathers statistics, if the job standardizes over the federation; rounds 1 to `rounds` train; one more
    evaluates the final model, if something was held out.
    """
    if last is None:
        return 0 if spec.measures_statistics else 1
    if last < spec.rounds:
        return last + 1
    return last + 1 if last == spec.rounds and spec.evaluation.holdout > 0 else None


def cohort_seed(job_seed: str, number: int) -> str:
    """The recorded seed of a round's cohort, derived from the job's: 64 hexadecimal digits."""
    return hashlib.sha256(b"isthmus/cohort/v1" + bytes.fromhex(job_seed) + number.to_bytes(8, "big")).hexdigest()


def draw_round(spec: CohortSpec, kind: TaskKind, participations: Sequence[tuple[str, str]], seed: str) -> Cohort:
    """The cohort of a round: drawn for training; everybody for statistics and for the evaluation of the final model.

    Args:
        spec: the job's cohort section.
        kind: what the round does.
        participations: (organization name, dataset name) of all that may be asked, in any order.
        seed: see `cohort_seed`.

    Raises:
        TooFewParticipations: fewer may be asked than the round needs; an evaluation needs one.
    """
    if kind is TaskKind.TRAIN:
        return draw_cohort(
            participations,
            seed=bytes.fromhex(seed),
            fraction=spec.fraction,
            over_selection=spec.over_selection,
            target=spec.target_updates,
            min_updates=spec.min_updates,
        )
    least = spec.min_updates if kind is TaskKind.STATISTICS else 1
    return draw_cohort(participations, seed=bytes.fromhex(seed), min_updates=least)


def weight_of(strategy: StrategySpec, declared_rows: int) -> float:
    """How much an update counts in the mean: by the rows that its dataset declared, or like any other."""
    return float(declared_rows) if strategy.weights is Weighting.DECLARED else 1.0


def merge_statistics(data: DataSpec, released: Sequence[Mapping[str, Any]]) -> FeatureStatistics:
    """The federation's statistics from the sites'.

    Args:
        data: the job's data section.
        released: what each site's statistics task gave (`statistics/count`, ...), in canonical order; at least one.

    Raises:
        ValueError: there are no sites, or what they gave is no statistics: see `Moments`.
    """

    def of_site(site: Mapping[str, Any]) -> Moments:
        return Moments(
            *(np.asarray(site[f"{STATISTICS_PREFIX}{name}"], np.float64) for name in ("count", "mean", "m2"))
        )

    merged = merge_all([of_site(site) for site in released])
    return FeatureStatistics(
        names=[feature.name for feature in data.numbers()],
        count=merged.count.tolist(),
        mean=merged.mean.tolist(),
        variance=variance(merged).tolist(),
        rows=sum(float(site[f"{STATISTICS_PREFIX}rows"]) for site in released),
        sites=len(released),
    )


def site_metrics(released: Mapping[str, Any]) -> dict[str, float]:
    """The metrics in what a site released, without their prefix."""
    return {
        name.removeprefix(METRICS_PREFIX): float(value)
        for name, value in sorted(released.items())
        if name.startswith(METRICS_PREFIX)
    }


def pool_metrics(sites: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Metrics over all sites: `examples` are added up, the others are means weighted by the examples behind them.

    A site that left a metric out (AUC, where one class is missing) does not count for it. The pooled AUC is therefore
    the mean of the sites' own, not the AUC over all records, which no site could compute.

    Args:
        sites: what each site measured (see `site_metrics`), in canonical order.

    Returns:
        `holdout/loss`, `holdout/accuracy`, ... as far as any site has them.
    """
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
