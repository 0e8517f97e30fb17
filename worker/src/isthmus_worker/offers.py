"""Whether an offer agrees with itself. The service is not trusted: what it says is computed again from the spec."""

import math
from collections.abc import Collection
from typing import Final

from isthmus.privacy.planning import plan_contradictions
from isthmus.wire.base import digest_of
from isthmus.wire.privacy import PrivacyUnit
from isthmus.wire.rounds import TaskKind, TaskOffer, kind_of_round, task_manifest
from isthmus.wire.secured import LARGEST_COHORT, SMALLEST_COHORT

LEAST_VARIANCE: Final = 1e-24
"""Of a column that is not constant, beside the square of its mean (or 1, if that is larger)."""

MOST_RECORDS: Final = 1e12
"""Of any dataset, as `AnnounceDataset.rows`."""


def contradictions(offer: TaskOffer, *, organization: str, datasets: Collection[str]) -> list[str]:
    """What in `offer` does not fit together, one sentence each; empty if all does.

    `organization` is ours, `datasets` are those that this worker serves.
    """
    spec, found = offer.spec, []
    if offer.organization != organization or offer.dataset not in datasets:
        found.append(f"The task is for {offer.organization}/{offer.dataset}, which this worker does not serve.")
    if digest_of(spec) != offer.spec_digest:
        found.append("The job's spec does not have the digest that the offer names.")
    if (
        not 0 <= offer.round_number <= spec.rounds + 1
        or kind_of_round(offer.round_number, spec.rounds) is not offer.kind
    ):
        found.append(f"Round {offer.round_number} of {spec.rounds} is not one of kind {offer.kind.value!r}.")
    if offer.kind is TaskKind.STATISTICS and not spec.measures_statistics:
        found.append("The job asks for no statistics.")
    if spec.model.layers is not None and offer.model_manifest != spec.model.plan(spec.data.input_shape).manifest:
        found.append("The model's manifest is not that of the job's layers.")
    if offer.upload_manifest != task_manifest(offer.kind, spec, offer.round_number, offer.model_manifest):
        found.append("The upload's manifest is not what the job's spec makes of this task.")
    found += _odd_secured(offer)
    found += plan_contradictions(spec, offer.plan, offer.model_manifest.averaged_elements) or _odd_steps(offer)
    if needs_statistics(offer):
        statistics = offer.statistics
        names = [feature.name for feature in spec.data.numbers()]
        if statistics is None or not len(statistics.mean) == len(statistics.variance) == len(names) == len(
            statistics.names
        ):
            found.append("The federation's statistics are missing, or not those of the job's number columns.")
        elif statistics.names != names:
            found.append("The federation's statistics are not those of the job's number columns.")
        elif not all(map(_plausible, statistics.mean, statistics.variance)):
            found.append("The federation's statistics hold a mean or a variance that no records have.")
    return found


def _odd_secured(offer: TaskOffer) -> list[str]:
    """Whether a training round is secured as the job says: neither openly nor among fewer than it promises."""
    promised = offer.spec.secure_aggregation is not None and offer.kind is TaskKind.TRAIN
    if offer.secured is None:
        return ["The job is under secure aggregation, and the task is not."] if promised else []
    if not promised:
        return ["The task is under secure aggregation, which the job does not ask for here."]
    members, least, found = offer.secured.members, offer.spec.cohort.min_updates, []
    if members < least:
        found.append(f"The round has {members} members; the job sums no fewer than {least} updates.")
    if offer.secured.index >= members:
        found.append(f"This worker's place {offer.secured.index} is not among the {members} of the round.")
    # Beside the job's attempts, there is one for each time that the roster shrank to those who sent keys.
    most = offer.spec.cohort.attempts + LARGEST_COHORT - SMALLEST_COHORT
    if not 1 <= offer.attempt <= most:
        found.append(f"{offer.attempt} is no number of an attempt: a round of this job has {most} at most.")
    return found


def _odd_steps(offer: TaskOffer) -> list[str]:
    """Whether the plan samples records as the job's training section says, for whatever number of records.

    Other steps could cost what the plan says, and still not be the training that the organization has agreed to.
    """
    plan, training = offer.plan, offer.spec.training
    if plan is None or plan.unit is not PrivacyUnit.RECORD:
        return []
    if 1 <= plan.expected_batch / plan.sampling_probability <= MOST_RECORDS:
        records = round(plan.expected_batch / plan.sampling_probability)
        batch = records if training.batch_size == "all" else min(records, training.batch_size)
        steps = training.epochs * max(1, round(records / batch))
        if (plan.expected_batch, plan.sampling_probability, plan.steps_per_round) == (batch, batch / records, steps):
            return []
    return [
        f"The task's privacy plan samples each record with probability {plan.sampling_probability:g} in "
        f"{plan.steps_per_round} steps of {plan.expected_batch:g}, which the job's batch_size and epochs never give."
    ]


def _plausible(mean: float, variance: float) -> bool:
    """A variance so small beside its mean is no variance of float64 values: it would blow up single records."""
    if not (math.isfinite(mean) and math.isfinite(variance)):
        return False
    return variance == 0 or variance >= LEAST_VARIANCE * max(1.0, abs(mean)) * max(1.0, abs(mean))


def needs_model(offer: TaskOffer) -> bool:
    """Whether the task starts from the round's model."""
    return offer.kind is not TaskKind.STATISTICS


def needs_statistics(offer: TaskOffer) -> bool:
    """Whether the task standardizes with what the federation found."""
    return offer.kind is not TaskKind.STATISTICS and offer.spec.data.standardize == "federated"
