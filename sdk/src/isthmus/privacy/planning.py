"""From a job's privacy section to the mechanisms at one dataset, what each release of them costs, and what is claimed.

The service plans when a dataset is asked and charges by the same functions; the worker computes every cost again. Both
get the same whole numbers, because everything below is the standard library's arithmetic on public values.

Everything that leaves is a release of one round: statistics (round 0), an update with what was measured beside it
(rounds 1 to R), an evaluation (round R + 1). Results that stay at the site are no release and cost nothing.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Final

from isthmus.privacy.calibration import HIGHEST, LOWEST, smallest_noise_multiplier
from isthmus.privacy.cost import MAX_EPSILON, Cost, Limit
from isthmus.privacy.events import (
    DistributedGaussianRelease,
    Event,
    GaussianRelease,
    PoissonGaussianRelease,
    Repeated,
    Together,
)
from isthmus.privacy.sensitivity import most_secured_noise, secured_steps
from isthmus.wire.base import digest_of
from isthmus.wire.jobs import EvaluationRelease, JobSpec
from isthmus.wire.privacy import NoisePlace, PrivacyPlan, PrivacyUnit
from isthmus.wire.rounds import TaskKind, evaluates_in_round, kind_of_round

SHARE: Final = 0.1
"""Of a job's target, for its statistics and for its noised evaluations, each if it has them."""
EVALUATION_COUNTS: Final = 2
"""Numbers in a noised evaluation: held-out records, and right answers among them."""


LARGEST_STEPS: Final = 10_000_000


class PlanImpossible(ValueError):
    """No noise reaches the job's target at this dataset. The message says what would."""


def plan_of(spec: JobSpec, rows: int, elements: int) -> PrivacyPlan | None:
    """What the job's privacy section becomes at a dataset.

    Args:
        spec: the job.
        rows: the dataset's declared number of records: public, and frozen with the participation.
        elements: parameters of the model that rounds average; they are noised each.

    Returns:
        The plan; None for a job without a privacy unit.

    Raises:
        PlanImpossible: no noise reaches the target.

    Guarantees:
        the job's whole cost by this plan has an epsilon of at most `spec.privacy.epsilon`, where that is given.

    A search of some tenths of a second, cached over jobs that differ in nothing that counts: not for an event loop.
    """
    if spec.privacy.unit is PrivacyUnit.NONE:
        return None
    return _planned(digest_of(_essence(spec)), _Hidden(spec), rows, elements)


def noise_shares(spec: JobSpec) -> int:
    """How many organizations' noise is surely in a round's sum under `where: distributed`, and unknown to others.

    At least `cohort.min_updates` are in the sum; `secure_aggregation.max_colluding` of them may tell the service what
    they added. It is also how many honest organizations the claim needs.
    """
    assert spec.secure_aggregation is not None, "shares of noise go with secure aggregation: checked by the spec"
    return spec.cohort.min_updates - spec.secure_aggregation.max_colluding


def secured_noise(spec: JobSpec, plan: PrivacyPlan | None) -> tuple[float, int, int]:
    """What each member of a secured round adds to its update: noise multiplier (0: nothing), apart and shares.

    As `isthmus.privacy.sensitivity.secured_steps` takes them. Under `where: local` each member's own noise hides it,
    and neighbours are twice the bound apart; under `where: distributed` the noise of all honest members does.
    """
    if plan is None or plan.unit is not PrivacyUnit.ORGANIZATION:
        return 0.0, 1, 1
    return plan.noise_multiplier, *_apart_in_shares(spec)


def _apart_in_shares(spec: JobSpec) -> tuple[int, int]:
    return (1, noise_shares(spec)) if spec.privacy.where is NoisePlace.DISTRIBUTED else (2, 1)


def round_event(spec: JobSpec, plan: PrivacyPlan, number: int, elements: int, *, ledger: bool = False) -> Event | None:
    """What is released in round `number`, as one event; None if nothing of it is (results stay at the site).

    Args:
        elements: parameters of the model that rounds average.
        ledger: as a dataset's ledger counts it. Ledgers are of records: they count what one record more or less may
            change. Under `where: central` and `distributed` that is up to twice the clip, where the claim is of an
            organization that takes part or not, which is once the clip. Elsewhere the two are the same.

    Raises:
        ValueError: shares of so much noise do not fit into what is summed under masks.
    """
    kind = kind_of_round(number, spec.rounds)
    parts: list[Event] = []
    if kind is TaskKind.STATISTICS:
        if plan.statistics_noise_multiplier is not None:
            parts.append(GaussianRelease(plan.statistics_noise_multiplier))
    elif kind is TaskKind.TRAIN:
        parts.append(_training_event(spec, plan, elements, ledger=ledger))
    measured = kind is TaskKind.EVALUATE or (kind is TaskKind.TRAIN and evaluates_in_round(spec, number))
    if measured and plan.evaluation_noise_multiplier is not None:
        parts.append(GaussianRelease(plan.evaluation_noise_multiplier))
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else Together(tuple(parts))


def round_cost(spec: JobSpec, plan: PrivacyPlan, number: int, elements: int, *, ledger: bool = False) -> Cost:
    """What the release of round `number` costs; zero if nothing is released. `ledger`: see `round_event`."""
    event = round_event(spec, plan, number, elements, ledger=ledger)
    return Cost.zero() if event is None else Cost.of(event, _draws(spec, plan, number, elements))


def grant_event(spec: JobSpec, plan: PrivacyPlan, elements: int, rounds: int, *, ledger: bool = False) -> Event:
    """Everything that a grant of `rounds` training rounds may release, with statistics and the final evaluation.

    Where rounds differ and the grant is for fewer than the job has, the dearest are counted.
    """
    counted = [number for number, _ in _grouped(spec, plan, rounds)]
    events = {number: round_event(spec, plan, number, elements, ledger=ledger) for number in counted}
    parts = [Repeated(event, times) for number, times in _grouped(spec, plan, rounds) if (event := events[number])]
    return Together(tuple(parts))


def grant_cost(spec: JobSpec, plan: PrivacyPlan, elements: int, rounds: int, *, ledger: bool = False) -> Cost:
    """What a grant of `rounds` training rounds can cost at most: the sum of the costs of its rounds, to the unit."""
    total = Cost.zero()
    for number, times in _grouped(spec, plan, rounds):
        total = total + round_cost(spec, plan, number, elements, ledger=ledger) * times
    return total


def costs_by_round(spec: JobSpec, plan: PrivacyPlan, elements: int) -> Iterator[tuple[int, Cost]]:
    """(round, what everything up to and with that round costs), for every round of the job in order."""
    total = Cost.zero()
    last = spec.rounds + (1 if spec.evaluation.holdout > 0 else 0)
    for number in range(0 if spec.measures_statistics else 1, last + 1):
        total = total + round_cost(spec, plan, number, elements)
        yield number, total


def _grouped(spec: JobSpec, plan: PrivacyPlan, rounds: int) -> list[tuple[int, int]]:
    """(a round's number, how many cost what it costs) of all that a grant of `rounds` training rounds may release."""
    with_evaluation = _evaluated_rounds(spec) if plan.evaluation_noise_multiplier is not None else 0
    dear = min(rounds, with_evaluation)
    plain = rounds - dear
    groups = [(0, 1)] if spec.measures_statistics else []
    if dear:
        groups.append((1, dear))
    if plain:
        groups.append((_plain_round(spec, with_evaluation), plain))
    if spec.evaluation.holdout > 0:
        groups.append((spec.rounds + 1, 1))
    return groups


def _evaluated_rounds(spec: JobSpec) -> int:
    """How many training rounds also measure: 1, 1 + every, 1 + 2 every, ..."""
    return -(-spec.rounds // spec.evaluation.every) if evaluates_in_round(spec, 1) else 0


def _plain_round(spec: JobSpec, with_evaluation: int) -> int:
    """A training round that costs what those without an evaluation cost."""
    if with_evaluation == 0:
        return 1
    return 2 if spec.evaluation.every > 1 else 1  # rounds beyond the job's own cost as much as the dearest


def _training_event(spec: JobSpec, plan: PrivacyPlan, elements: int, *, ledger: bool) -> Event:
    if plan.unit is PrivacyUnit.RECORD:
        step = PoissonGaussianRelease(plan.sampling_probability, plan.noise_multiplier)
        return Repeated(step, plan.steps_per_round)
    apart = 2 if ledger and plan.where is not NoisePlace.LOCAL else 1
    if plan.where is NoisePlace.DISTRIBUTED:
        noise, _, shares = secured_noise(spec, plan)
        _, sensitivity, variance = secured_steps(elements, noise_multiplier=noise, shares=shares)
        return DistributedGaussianRelease(apart * sensitivity, variance, shares, elements)
    return GaussianRelease(plan.noise_multiplier, sensitivity=float(apart))


def _draws(spec: JobSpec, plan: PrivacyPlan, number: int, elements: int) -> int:
    kind = kind_of_round(number, spec.rounds)
    if kind is TaskKind.STATISTICS:
        return 3 * len(spec.data.numbers()) + 1
    shares = noise_shares(spec) if plan.where is NoisePlace.DISTRIBUTED else 1  # an element's noise is drawn in shares
    draws = elements * plan.steps_per_round * shares if kind is TaskKind.TRAIN else 0
    measured = kind is TaskKind.EVALUATE or evaluates_in_round(spec, number)
    return draws + (EVALUATION_COUNTS if measured and plan.evaluation_noise_multiplier is not None else 0)


def _drawn(spec: JobSpec, plan: PrivacyPlan, elements: int) -> int:
    """Integers of noise that the whole job draws."""
    groups = _grouped(spec, plan, spec.rounds)
    return sum(_draws(spec, plan, number, elements) * times for number, times in groups)


def _draws_too_much(spec: JobSpec, plan: PrivacyPlan, elements: int) -> bool:
    """Whether the noise's draws alone use up what is kept of delta for them."""
    return _drawn(spec, plan, elements) > Limit.of(MAX_EPSILON, plan.delta).draws


def training_rows(spec: JobSpec, rows: int) -> int:
    """Records that are trained on, as everybody may know it: the declared rows without the held-out share."""
    return max(1, round(rows * (1.0 - spec.evaluation.holdout)))


def _shape_of_steps(spec: JobSpec, rows: int) -> tuple[float, float, int]:
    """Sampling probability, expected batch and steps a round of DP-SGD over `rows` declared records."""
    trained = training_rows(spec, rows)
    size = trained if spec.training.batch_size == "all" else min(trained, spec.training.batch_size)
    steps = spec.training.epochs * max(1, round(trained / size))
    return size / trained, float(size), steps


class _Hidden:
    """A job spec that a cache carries along but does not compare: the digest beside it stands for what counts."""

    def __init__(self, spec: JobSpec) -> None:
        self.spec = spec

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hidden)


def _essence(spec: JobSpec) -> dict[str, object]:
    """What a plan depends on."""
    return {
        "privacy": spec.privacy.model_dump(mode="json"),
        "rounds": spec.rounds,
        "batch": spec.training.batch_size,
        "epochs": spec.training.epochs,
        "evaluation": spec.evaluation.model_dump(mode="json"),
        "release": spec.evaluation_release.value,
        "numbers": len(spec.data.numbers()) if spec.measures_statistics else 0,
        "secured": spec.secure_aggregation is not None,
        "shares": noise_shares(spec) if spec.privacy.where is NoisePlace.DISTRIBUTED else 0,
    }


@lru_cache(maxsize=4096)
def _planned(_digest: str, hidden: _Hidden, rows: int, elements: int) -> PrivacyPlan:
    spec = hidden.spec
    privacy, record = spec.privacy, spec.privacy.unit is PrivacyUnit.RECORD
    assert privacy.clip_norm is not None, "checked by the spec"
    probability, batch, steps = _shape_of_steps(spec, rows) if record else (1.0, 0.0, 1)
    limit = None if privacy.epsilon is None else Limit.of(privacy.epsilon, privacy.claimed_delta)
    noised = spec.evaluation_release is EvaluationRelease.NOISED and spec.evaluation.holdout > 0

    def with_noise(training: float) -> PrivacyPlan:
        return PrivacyPlan(
            unit=privacy.unit,
            where=privacy.where,
            epsilon=0.0,
            budget_epsilon=0.0,
            delta=privacy.claimed_delta,
            clip_norm=privacy.clip_norm or 0.0,
            noise_multiplier=training,
            sampling_probability=probability,
            expected_batch=batch,
            steps_per_round=steps,
            statistics_noise_multiplier=statistics,
            evaluation_noise_multiplier=evaluation,
        )

    def whole(training: float) -> Cost:
        return grant_cost(spec, with_noise(training), elements, spec.rounds)

    statistics = evaluation = None  # `with_noise` reads them
    try:
        if spec.measures_statistics:
            statistics = _given_or_share(privacy.statistics_noise_multiplier, 1, limit)
        if noised:
            evaluation = _given_or_share(spec.evaluation.noise_multiplier, _evaluated_rounds(spec) + 1, limit)
        chosen = privacy.noise_multiplier
        if chosen is None:
            assert limit is not None, "the spec has either"
            chosen = smallest_noise_multiplier(whole, limit, high=_most_noise(spec, elements))
        plan = with_noise(chosen)
        _require_room(spec, plan, elements)
        epsilon = whole(chosen).epsilon(plan.delta)
        counted = grant_cost(spec, plan, elements, spec.rounds, ledger=True).epsilon(plan.delta)
    except PlanImpossible:
        raise
    except ValueError:
        raise PlanImpossible(_obstacle(spec, with_noise(1.0), elements)) from None
    if steps > LARGEST_STEPS:
        raise PlanImpossible(
            f"a round would have {steps:,} steps; at most {LARGEST_STEPS:,} are counted: larger batches"
        )
    if math.isinf(epsilon) and _draws_too_much(spec, plan, elements):
        raise PlanImpossible(_obstacle(spec, plan, elements))
    if max(epsilon, counted) > MAX_EPSILON:
        raise PlanImpossible(
            f"with this noise the job costs more than epsilon {MAX_EPSILON:g}, which promises nothing: more noise, or "
            "fewer rounds or epochs"
        )
    return plan.model_copy(update={"epsilon": epsilon, "budget_epsilon": counted})


def _most_noise(spec: JobSpec, elements: int) -> float:
    """The most noise to look for: what fits into the whole numbers that are summed under masks, where they are."""
    if spec.secure_aggregation is None or spec.privacy.unit is not PrivacyUnit.ORGANIZATION:
        return HIGHEST
    apart, shares = _apart_in_shares(spec)
    return max(LOWEST, min(HIGHEST, most_secured_noise(elements, apart=apart, shares=shares)))


def _require_room(spec: JobSpec, plan: PrivacyPlan, elements: int) -> None:
    """Whether the plan's noise fits into the whole numbers that are summed under masks.

    Raises:
        PlanImpossible: it does not.
    """
    if spec.secure_aggregation is not None:
        noise, apart, shares = secured_noise(spec, plan)
        try:
            secured_steps(elements, noise_multiplier=noise, apart=apart, shares=shares)
        except ValueError as error:
            raise PlanImpossible(str(error)) from None


def _obstacle(spec: JobSpec, plan: PrivacyPlan, elements: int) -> str:
    """Why there is no plan, and what would help. `plan`: one with any noise."""
    privacy, steps = spec.privacy, plan.steps_per_round
    given = [
        name
        for name, value in (
            ("privacy.statistics_noise_multiplier", privacy.statistics_noise_multiplier),
            ("evaluation.noise_multiplier", spec.evaluation.noise_multiplier),
        )
        if value is not None
    ]
    target = f"epsilon {privacy.epsilon:g}" if privacy.epsilon is not None else "any epsilon"
    more = f"give {' and '.join(given)} more noise, " if given else ""
    if _draws_too_much(spec, plan, elements):
        return (
            f"no noise reaches {target} at delta {privacy.claimed_delta:g}: {spec.rounds} rounds of {steps} steps over "
            f"{elements} parameters draw {_drawn(spec, plan, elements):.1e} integers of noise, and the hundredth of "
            "delta that is kept for their sampler does not cover so many: raise delta, train a smaller model, or for "
            "fewer rounds or epochs"
        )
    return (
        f"no noise reaches {target} at delta {privacy.claimed_delta:g} with {spec.rounds} rounds of {steps} steps over "
        f"{elements} parameters: {more}raise epsilon or delta, or train for fewer rounds or epochs"
    )


def _given_or_share(given: float | None, times: int, limit: Limit | None) -> float:
    """The noise of `times` plain releases that together take their share of the target, unless it is given."""
    if given is not None:
        return given
    assert limit is not None, "the spec has either"
    alone = smallest_noise_multiplier(lambda noise: Cost.of(GaussianRelease(noise), 0), limit)
    noise: float = alone * (times / SHARE) ** 0.5  # RDP goes with the inverse square
    return round(noise + 5e-5, 4)


def plan_contradictions(  # noqa: PLR0911, PLR0912 - one line a contradiction
    spec: JobSpec, plan: PrivacyPlan | None, elements: int
) -> list[str]:
    """Why `plan` is not one that keeps the promise of `spec`, one sentence each; empty if it is.

    The worker's question. How the service came to the plan does not matter: what matters is that its noise, by our own
    arithmetic, keeps what the job promises.
    """
    privacy = spec.privacy
    if privacy.unit is PrivacyUnit.NONE:
        return [] if plan is None else ["The job claims no privacy, but the task has a privacy plan."]
    if plan is None:
        return ["The job has a privacy unit, but the task has no privacy plan."]
    found = []
    agreed = (plan.unit, plan.where, plan.clip_norm, plan.delta)
    if agreed != (privacy.unit, privacy.where, privacy.clip_norm, privacy.claimed_delta):
        found.append("The task's privacy plan has another unit, place, clip_norm or delta than the job.")
    if not (0.0 < plan.sampling_probability <= 1.0 and 1 <= plan.steps_per_round <= LARGEST_STEPS):
        return [*found, "The task's privacy plan has no possible sampling probability or number of steps."]
    if not all(noise is None or 0.0 < noise < 1e9 for noise in _multipliers(plan)):
        return [*found, "The task's privacy plan has no possible noise."]
    if plan.unit is PrivacyUnit.RECORD and not 0.0 < plan.expected_batch < 1e12:
        found.append("The task's privacy plan has no possible batch.")
    if plan.unit is not PrivacyUnit.RECORD and (plan.sampling_probability, plan.steps_per_round) != (1.0, 1):
        found.append("The task's privacy plan samples records, and the job's unit is the organization.")
    noised = spec.evaluation_release is EvaluationRelease.NOISED and spec.evaluation.holdout > 0
    if (plan.statistics_noise_multiplier is None) == (spec.measures_statistics and plan.unit is PrivacyUnit.RECORD):
        found.append("The task's privacy plan has noise for statistics where there are none, or none where there are.")
    if (plan.evaluation_noise_multiplier is None) == noised:
        found.append("The task's privacy plan has noise for evaluations where there are none, or none where there are.")
    if found:
        return found
    for what, noise, promised in (
        ("noise", plan.noise_multiplier, privacy.noise_multiplier),
        ("statistics' noise", plan.statistics_noise_multiplier, privacy.statistics_noise_multiplier),
        ("evaluations' noise", plan.evaluation_noise_multiplier, spec.evaluation.noise_multiplier),
    ):
        if noise is not None and promised is not None and noise < promised:
            found.append(f"The task's {what} multiplier is {noise:g}; the job's is {promised:g}.")
    try:
        _require_room(spec, plan, elements)
        epsilon = grant_cost(spec, plan, elements, spec.rounds).epsilon(plan.delta)
        counted = grant_cost(spec, plan, elements, spec.rounds, ledger=True).epsilon(plan.delta)
    except PlanImpossible as error:
        return [*found, f"The task's privacy plan cannot be kept: {error}."]
    except ValueError:
        return [*found, "The task's privacy plan has more steps or parameters than can be accounted for."]
    if privacy.epsilon is not None and epsilon > privacy.epsilon:
        found.append(f"By the task's plan the job costs epsilon {epsilon:.4g}; it promises {privacy.epsilon:g}.")
    for cost, told in ((epsilon, plan.epsilon), (counted, plan.budget_epsilon)):
        if cost > told * (1 + 1e-9):
            found.append(f"By the task's plan the job costs epsilon {cost:.4g}, not {told:.4g} as it says.")
            break
    return found


def _multipliers(plan: PrivacyPlan) -> tuple[float | None, ...]:
    return plan.noise_multiplier, plan.statistics_noise_multiplier, plan.evaluation_noise_multiplier
