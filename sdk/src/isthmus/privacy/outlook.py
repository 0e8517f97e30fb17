"""What a job would cost and what its noise would do, before anybody is asked: the numbers, and advice in sentences."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from isthmus.privacy.cost import Limit, times_within
from isthmus.privacy.planning import PlanImpossible, costs_by_round, grant_cost, noise_shares, plan_of
from isthmus.wire.datasets import Budget
from isthmus.wire.jobs import JobSpec
from isthmus.wire.privacy import NoisePlace, PrivacyPlan, PrivacyUnit
from isthmus.wire.secured import SMALLEST_COHORT

FEW_ORGANIZATIONS: Final = 50
"""Below so many, noise that hides a whole organization drowns what the others say."""
LOUD: Final = 0.5
"""Noise on one coordinate of a mean, in units of the clip, above which little is learned."""
WEAK_EPSILON: Final = 10.0
MOST_POINTS: Final = 1000


@dataclass(frozen=True)
class DatasetOutlook:
    """What the job would be at one dataset.

    Attributes:
        name: `organization/dataset`, or a number of rows.
        rows: declared records.
        plan: the mechanisms; None for a job without a privacy unit, or where `obstacle` says why there is none.
        obstacle: why no noise reaches the target here.
        epsilon_by_round: (round, epsilon of everything until then), for every round or some of them.
        step_noise: standard deviation of the noise on one coordinate of one mean that this site computes, in units of
            the clip: of a step's mean gradient for records, of its update for local noise. None where only the mean
            has noise enough.
        jobs_in_budget: how many jobs of this kind a fresh budget allows; None without a budget.
    """

    name: str
    rows: int
    plan: PrivacyPlan | None
    obstacle: str | None
    epsilon_by_round: tuple[tuple[int, float], ...]
    step_noise: float | None
    jobs_in_budget: int | None


@dataclass(frozen=True)
class Outlook:
    """What a job would be.

    Attributes:
        datasets: one outlook each.
        organizations: datasets that a round would have; the noise of their mean falls with it.
        mean_noise: standard deviation of the noise on one coordinate of a round's mean, in units of the clip; for
            records of one step's mean gradient over all sites. None without noise.
        advice: what to change, most important first.
    """

    datasets: tuple[DatasetOutlook, ...]
    organizations: int
    mean_noise: float | None
    advice: tuple[str, ...]


def outlook_of(spec: JobSpec, sites: Sequence[tuple[str, int, Budget | None]], elements: int) -> Outlook:
    """What `spec` would cost at each of `sites`, and what its noise would do to what is learned.

    Args:
        spec: the job.
        sites: (name, declared rows, budget if it is known) of the datasets; at least one.
        elements: parameters of the model.

    Returns:
        The numbers and the advice. Nothing is asked of any service, and nothing is reserved.

    Raises:
        ValueError: there are no sites.
    """
    if not sites:
        raise ValueError("an outlook needs at least one dataset")
    datasets = tuple(_of_site(spec, name, rows, budget, elements) for name, rows, budget in sites)
    noises = [one.step_noise for one in datasets if one.step_noise is not None]
    plans = [one.plan for one in datasets if one.plan is not None]
    mean_noise = None
    if noises:
        mean_noise = math.sqrt(sum(noise * noise for noise in noises)) / len(datasets)
    elif plans:
        mean_noise = plans[0].noise_multiplier * _too_much(spec, len(datasets)) / len(datasets)
    return Outlook(datasets, len(datasets), mean_noise, tuple(_advice(spec, datasets, mean_noise)))


def _of_site(spec: JobSpec, name: str, rows: int, budget: Budget | None, elements: int) -> DatasetOutlook:
    try:
        plan = plan_of(spec, rows, elements)
    except PlanImpossible as error:
        return DatasetOutlook(name, rows, None, str(error), (), None, None)
    if plan is None:
        return DatasetOutlook(name, rows, None, None, (), None, None)
    every = max(1, spec.rounds // MOST_POINTS)
    curve = tuple(
        (number, cost.epsilon(plan.delta))
        for number, cost in costs_by_round(spec, plan, elements)
        if number % every == 0 or number >= spec.rounds
    )
    jobs = None
    if budget is not None:
        whole = grant_cost(spec, plan, elements, spec.rounds, ledger=True)
        jobs = times_within(whole, Limit.of(budget.epsilon, budget.delta))
    return DatasetOutlook(name, rows, plan, None, curve, _step_noise(plan), jobs)


def _too_much(spec: JobSpec, members: int) -> float:
    """The noise of a sum, in units of what its claim needs: shares are sized for fewer members than add them."""
    return math.sqrt(members / noise_shares(spec)) if spec.privacy.where is NoisePlace.DISTRIBUTED else 1.0


def _step_noise(plan: PrivacyPlan) -> float | None:
    if plan.unit is PrivacyUnit.RECORD:
        return plan.noise_multiplier / plan.expected_batch
    return 2.0 * plan.noise_multiplier if plan.where is NoisePlace.LOCAL else None


def _advice_on_masks(spec: JobSpec, datasets: int) -> list[str]:
    """What to change of a job under secure aggregation."""
    secured, found = spec.secure_aggregation, []
    if secured is None:
        return []
    if 1 < datasets < spec.cohort.min_updates:  # a single one is asked about by itself
        found.append(
            f"A round is summed with cohort.min_updates {spec.cohort.min_updates} or more updates, and there are "
            f"{datasets} datasets: it cannot take place with these."
        )
    if spec.privacy.where is NoisePlace.DISTRIBUTED and secured.max_colluding == 0:
        found.append(
            "Against another organization of the round the claim does not hold: it knows its own share of the noise. "
            "Write secure_aggregation: {max_colluding: 1}, or as many as may put their shares together; fewer than a "
            "third of cohort.min_updates."
        )
    return found


def _advice(spec: JobSpec, datasets: Sequence[DatasetOutlook], mean_noise: float | None) -> list[str]:
    privacy, found = spec.privacy, []
    if privacy.unit is PrivacyUnit.NONE:
        return [
            "No privacy is claimed: whoever sees an update or the model may learn single records. "
            "Write unit: record with an epsilon, unless the records are public."
        ]
    for one in datasets:
        if one.obstacle is not None:
            found.append(f"{one.name}: {one.obstacle}.")
    if privacy.unit is PrivacyUnit.ORGANIZATION and len(datasets) < FEW_ORGANIZATIONS and mean_noise is not None:
        hidden = " with secure_aggregation" if len(datasets) >= SMALLEST_COHORT else ""
        found.append(
            f"With {len(datasets)} organizations use unit: record{hidden}: hiding a whole organization among so few "
            f"takes noise of {mean_noise:.2g} times the clip on every coordinate of the mean."
        )
    elif mean_noise is not None and mean_noise > LOUD:
        found.append(
            f"The noise on a step's mean is {mean_noise:.2g} times the clip on every coordinate, and little will be "
            "learned: use larger batches, fewer rounds or epochs, a larger epsilon, or more records."
        )
    found += _advice_on_masks(spec, len(datasets))
    tight = [one for one in datasets if one.jobs_in_budget == 0]
    if tight:
        names = ", ".join(one.name for one in tight[:3])
        found.append(f"The whole budget of {names} does not allow this job even once: ask for less epsilon.")
    claimed = max((one.plan.epsilon for one in datasets if one.plan is not None), default=0.0)
    if claimed > WEAK_EPSILON:
        found.append(
            f"Epsilon {claimed:.3g} promises little: an observer's odds about a record may change by e^{claimed:.3g}."
        )
    largest = max(one.rows for one in datasets)
    if privacy.unit is PrivacyUnit.RECORD and privacy.claimed_delta > 1 / (10 * largest):
        found.append(
            f"Delta {privacy.claimed_delta:g} is large for {largest:,} records; {1 / (10 * largest):.1g} or less is "
            "usual, so that no record is published outright."
        )
    if privacy.max_orgs_per_person > 1:
        found.append(
            f"A person with records in {privacy.max_orgs_per_person} organizations is promised no more than epsilon "
            f"{claimed * privacy.max_orgs_per_person:.3g}."
        )
    return found
