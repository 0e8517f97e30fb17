"""What a job's privacy section becomes at each simulated client, and what was spent."""

from collections.abc import Iterable, Mapping

from isthmus.federation.cohort import ParticipationKey
from isthmus.privacy.cost import Cost
from isthmus.privacy.planning import PlanImpossible, plan_of, round_cost
from isthmus.wire.jobs import JobSpec
from isthmus.wire.manifest import Manifest
from isthmus.wire.privacy import PrivacyPlan
from isthmus_worker.simulation.clients import ClientsRefused

Plans = Mapping[ParticipationKey, PrivacyPlan | None]


def plans_of(spec: JobSpec, rows: Mapping[ParticipationKey, int], model: Manifest) -> Plans:
    """Each client's plan, as the service computes it from the declared rows; None without a privacy unit.

    Raises:
        ClientsRefused: no noise reaches the job's target at some client.
    """
    found = {}
    for key, held in rows.items():
        try:
            found[key] = plan_of(spec, held, model.averaged_elements)
        except PlanImpossible as impossible:
            raise ClientsRefused(f"{key.organization}/{key.dataset}: {impossible}.") from None
    return found


def spent(
    spec: JobSpec, plans: Plans, rounds: Iterable[tuple[int, Iterable[ParticipationKey]]], model: Manifest
) -> dict[ParticipationKey, float]:
    """Epsilon of everything that each client released, at the job's delta; empty without a privacy unit.

    Args:
        spec: the job.
        plans: of all clients.
        rounds: the number and the cohort of each round that was done.
        model: the model's manifest.
    """
    costs = {key: Cost.zero() for key, plan in plans.items() if plan is not None}
    elements = model.averaged_elements
    for number, cohort in rounds:
        for key in cohort:
            if (plan := plans[key]) is not None:
                costs[key] = costs[key] + round_cost(spec, plan, number, elements)
    return {key: cost.epsilon(spec.privacy.claimed_delta) for key, cost in costs.items()}
