"""A simulated round under secure aggregation: the same whole numbers and the same sum, without masks, which cancel."""

from collections import Counter
from collections.abc import Iterable, Sequence

from isthmus.federation.aggregation import MemorySink, MemorySource
from isthmus.federation.cohort import ParticipationKey
from isthmus.federation.secured import sum_bound, sum_tensors, unmask
from isthmus.wire.jobs import JobSpec
from isthmus.wire.manifest import AggregationRule, DType, Manifest, TensorSpec, update_manifest
from isthmus.wire.privacy import PrivacyPlan
from isthmus.wire.secured import LARGEST_COHORT, MASKED
from isthmus_worker.simulation.clients import ClientsRefused


def require_hideable(keys: Iterable[ParticipationKey], slots: int) -> None:
    """Refuse clients of whom a service would not sum up the updates.

    Args:
        keys: of all clients.
        slots: as many take part in a round.

    Raises:
        ClientsRefused: an organization has two datasets, or a round has too many members.
    """
    for organization, datasets in Counter(key.organization for key in keys).items():
        if datasets > 1:
            raise ClientsRefused(
                f"Under secure aggregation an organization takes part with one dataset; {organization} has {datasets}."
            )
    if slots > LARGEST_COHORT:
        raise ClientsRefused(
            f"Under secure aggregation {LARGEST_COHORT} members are the most of a round; this job's has {slots}. "
            "A smaller cohort.fraction helps."
        )


def slot_manifest(spec: JobSpec, model: Manifest) -> Manifest:
    """What a client's update is: arrays, or whole numbers where the job is secured."""
    if spec.secure_aggregation is None:
        return update_manifest(model)
    shape = (model.averaged_elements,)
    return Manifest(tensors={MASKED: TensorSpec(dtype=DType.U32, shape=shape, rule=AggregationRule.KEEP)})


def shares_of(weights: Sequence[float]) -> list[float]:
    """Each weight over the largest, as members count their updates."""
    return [weight / max(weights) for weight in weights]


class SumTooLong(ValueError):
    """A sum is longer than updates within the job's bound, and their noise, can be."""


def sum_of(
    updates: Sequence[MemorySource], spec: JobSpec, plan: PrivacyPlan | None, elements: int, shares: Sequence[float]
) -> MemorySource:
    """The sum of the clients' whole numbers.

    Raises:
        SumTooLong: a service would refuse it. That is a mistake of ours: all clients are honest.
    """
    sink = MemorySink(sum_tensors(elements))
    squares = unmask(updates, (), elements, sink=sink)
    if squares > sum_bound(spec, plan, elements, shares) ** 2:
        raise SumTooLong("their sum is longer than the job's bound allows")
    return MemorySource(sink.arrays)
