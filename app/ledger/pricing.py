"""What releases cost, and what a dataset's plan is, computed in threads: a search, or a curve, takes its time.

Everything here is a function of a job's spec, a number of records and the model's size, and is kept once it is known.
"""

from dataclasses import dataclass
from typing import Final

import anyio.to_thread

from isthmus.privacy.cost import Cost
from isthmus.privacy.planning import PlanImpossible, grant_cost, grant_event, plan_of, round_cost, round_event
from isthmus.wire.base import canonical_json
from isthmus.wire.jobs import JobSpec
from isthmus.wire.privacy import NoisePlace, PrivacyMode, PrivacyPlan, PrivacyUnit
from isthmus.wire.rounds import TaskKind, evaluates_in_round, kind_of_round

KEPT: Final = 4096


@dataclass(frozen=True, slots=True)
class Price:
    """What one entry of a ledger counts, and why: the mechanism from which the cost can be computed again."""

    mode: PrivacyMode
    cost: Cost
    event: str | None
    """Canonical JSON; None: nothing is claimed, or nothing is released."""


FREE: Final = Price(PrivacyMode.NONE, Cost.zero(), None)
"""Of a job that claims no privacy: it costs nothing because nothing bounds it."""


def noises_the_sum(spec: JobSpec, kind: TaskKind) -> bool:
    """Whether the service itself adds the noise: central noise, on training rounds. What it sums is un-noised."""
    return spec.privacy.where is NoisePlace.CENTRAL and kind is TaskKind.TRAIN


def spends_when_summed(spec: JobSpec, kind: TaskKind) -> bool:
    """Whether updates are spent for when they are summed, and not when they are admitted.

    Noise of the service's own, and noise in shares, protect nothing but the sum: an update that is in none is hidden
    as it was before.
    """
    return noises_the_sum(spec, kind) or (spec.privacy.where is NoisePlace.DISTRIBUTED and kind is TaskKind.TRAIN)


async def plan_for(spec: JobSpec, rows: int, elements: int) -> PrivacyPlan | PlanImpossible | None:
    """What the job's privacy section becomes at a dataset of so many records; None: the job claims no privacy.

    That no noise reaches the job's target is an answer here.
    """
    if spec.privacy.unit is PrivacyUnit.NONE:
        return None
    return await anyio.to_thread.run_sync(_planned, spec, rows, elements)


def _planned(spec: JobSpec, rows: int, elements: int) -> PrivacyPlan | PlanImpossible | None:
    try:
        return plan_of(spec, rows, elements)
    except PlanImpossible as impossible:
        return impossible


async def price_of_round(
    spec: JobSpec, spec_digest: str, plan: PrivacyPlan | None, number: int, elements: int
) -> Price:
    """What a dataset's ledger is charged for its part in round `number`."""
    if plan is None:
        return FREE
    kind = kind_of_round(number, spec.rounds)
    key = (spec_digest, plan, kind, kind is TaskKind.TRAIN and evaluates_in_round(spec, number), elements)
    price = _known.get(key)
    if price is None:
        price = await anyio.to_thread.run_sync(_of_round, spec, plan, number, elements)
        _remember(key, price)
    return price


_Key = tuple[str, PrivacyPlan, TaskKind, bool, int]
_known: dict[_Key, Price] = {}


def _remember(key: _Key, price: Price) -> None:
    """Keep a price; the oldest is forgotten once there are many."""
    if len(_known) >= KEPT:
        _known.pop(next(iter(_known)))
    _known[key] = price


def _of_round(spec: JobSpec, plan: PrivacyPlan, number: int, elements: int) -> Price:
    event = round_event(spec, plan, number, elements, ledger=True)
    return Price(
        spec.privacy.mode,
        round_cost(spec, plan, number, elements, ledger=True),
        None if event is None else canonical_json(event.to_json()).decode(),
    )


async def price_of_grant(spec: JobSpec, plan: PrivacyPlan | None, rounds: int, elements: int) -> Price:
    """What a grant of `rounds` training rounds can cost at most, with statistics and the final evaluation."""
    if plan is None:
        return FREE
    return await anyio.to_thread.run_sync(_of_grant, spec, plan, rounds, elements)


def _of_grant(spec: JobSpec, plan: PrivacyPlan, rounds: int, elements: int) -> Price:
    event = grant_event(spec, plan, elements, rounds, ledger=True)
    return Price(
        spec.privacy.mode,
        grant_cost(spec, plan, elements, rounds, ledger=True),
        canonical_json(event.to_json()).decode(),
    )
