"""What a privacy section becomes at a dataset: it keeps the job's promise, adds up to the unit, and cannot be faked."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.privacy.cost import Cost, Limit, fits
from isthmus.privacy.events import DistributedGaussianRelease
from isthmus.privacy.planning import (
    PlanImpossible,
    costs_by_round,
    grant_cost,
    plan_contradictions,
    plan_of,
    round_cost,
    round_event,
    training_rows,
)
from isthmus.testing import sample_spec
from isthmus.wire.jobs import JobSpec
from isthmus.wire.privacy import PrivacyPlan

RECORD = {"unit": "record", "epsilon": 3.0, "clip_norm": 1.0}
UNIFORM = {"fedavg": {"weights": "uniform"}}
SCALED = {
    "task": "classification",
    "features": [{"name": "age", "range": [20, 90]}, {"name": "bp", "range": [80, 200]}],
    "target": "disease",
    "classes": 2,
    "standardize": "federated",
}


def record_job(**changes: Any) -> JobSpec:
    return sample_spec(**{"privacy": RECORD, "rounds": 20, **changes})


def planned(spec: JobSpec, rows: int = 300, elements: int = 6) -> PrivacyPlan:
    plan = plan_of(spec, rows, elements)
    assert plan is not None
    return plan


def test_a_job_without_a_unit_has_no_plan() -> None:
    assert plan_of(sample_spec(), 300, 6) is None


@settings(max_examples=25, deadline=None)
@given(
    epsilon=st.sampled_from([0.1, 1.0, 3.0, 8.0, 50.0]),
    rows=st.integers(10, 100_000),
    rounds=st.integers(1, 50),
    batch=st.sampled_from([1, 16, 256, "all"]),
    scaled=st.booleans(),
    release=st.sampled_from(["local", "noised"]),
)
def test_the_whole_job_keeps_its_target_and_wastes_little(
    epsilon: float, rows: int, rounds: int, batch: int | str, scaled: bool, release: str
) -> None:
    spec = record_job(
        privacy={**RECORD, "epsilon": epsilon},
        rounds=rounds,
        training={"optimizer": {"sgd": {"lr": 0.1}}, "batch_size": batch},
        evaluation={"release": release, "every": 2},
        **({"data": SCALED} if scaled else {}),
    )
    plan = planned(spec, rows)
    limit = Limit.of(epsilon, 1e-5)
    assert fits(grant_cost(spec, plan, 6, rounds), limit)
    assert 0 < plan.epsilon <= epsilon
    less = plan.model_copy(update={"noise_multiplier": plan.noise_multiplier * 0.998})
    assert plan.noise_multiplier <= 0.0101 or not fits(grant_cost(spec, less, 6, rounds), limit)


@settings(max_examples=40, deadline=None)
@given(
    rounds=st.integers(1, 30),
    every=st.integers(0, 7),
    holdout=st.sampled_from([0.0, 0.2]),
    scaled=st.booleans(),
    release=st.sampled_from(["local", "noised"]),
)
def test_a_grant_of_all_rounds_costs_the_sum_of_its_rounds_to_the_unit(
    rounds: int, every: int, holdout: float, scaled: bool, release: str
) -> None:
    spec = record_job(
        rounds=rounds,
        evaluation={"release": release, "every": every, "holdout": holdout},
        **({"data": SCALED} if scaled else {}),
    )
    plan = planned(spec)
    total = Cost.zero()
    for number in range(rounds + 2):
        if (number == 0 and not scaled) or (number == rounds + 1 and holdout == 0):
            continue  # there is no such round
        total = total + round_cost(spec, plan, number, 6)
    assert grant_cost(spec, plan, 6, rounds) == total
    assert [cost for _, cost in costs_by_round(spec, plan, 6)][-1] == total


def test_a_grant_of_fewer_rounds_counts_the_dearest() -> None:
    spec = record_job(rounds=9, evaluation={"release": "noised", "every": 3})
    plan = planned(spec)
    dear, plain = round_cost(spec, plan, 1, 6), round_cost(spec, plan, 2, 6)
    last = round_cost(spec, plan, 10, 6)
    assert dear != plain
    assert grant_cost(spec, plan, 6, 2) == dear * 2 + last
    assert grant_cost(spec, plan, 6, 5) == dear * 3 + plain * 2 + last


def test_sampling_and_steps_come_from_the_declared_rows_alone() -> None:
    spec = record_job(training={"optimizer": {"sgd": {"lr": 0.1}}, "batch_size": 32, "epochs": 2})
    plan = planned(spec, 400)
    assert training_rows(spec, 400) == 320
    assert (plan.sampling_probability, plan.expected_batch, plan.steps_per_round) == (0.1, 32.0, 20)
    everything = record_job(training={"optimizer": {"sgd": {"lr": 0.1}}, "batch_size": "all"})
    plan = planned(everything, 400)
    assert (plan.sampling_probability, plan.expected_batch, plan.steps_per_round) == (1.0, 320.0, 1)


def test_sampling_of_records_lowers_the_noise_and_sampling_of_organizations_never_does() -> None:
    sampled, whole = record_job(), record_job(training={"optimizer": {"sgd": {"lr": 0.1}}, "batch_size": "all"})
    assert planned(sampled, 10_000).noise_multiplier < planned(whole, 10_000).noise_multiplier
    organizations: dict[str, Any] = {
        "privacy": {"unit": "organization", "where": "local", "epsilon": 3.0, "clip_norm": 1.0},
        "strategy": UNIFORM,
        "rounds": 20,
    }
    few = sample_spec(**organizations, cohort={"fraction": 0.1, "min_updates": 2})
    # Rows mean nothing here; other ones keep the second plan from being the first one, remembered.
    assert planned(few, 301).noise_multiplier == planned(sample_spec(**organizations), 302).noise_multiplier


@pytest.mark.parametrize("where", ["local", "distributed"])
@pytest.mark.parametrize("strength", [{"epsilon": 8.0}, {"noise_multiplier": 4.0}])
def test_members_of_a_secured_round_agree_in_noise_and_bound_whatever_their_rows(
    where: str, strength: dict[str, float]
) -> None:
    """Their lattice follows from it, and the context of their keys has it."""
    spec = sample_spec(
        privacy={"unit": "organization", "where": where, "clip_norm": 1.0, **strength},
        strategy=UNIFORM,
        secure_aggregation=True,
        cohort={"min_updates": 4},
    )
    plans = [planned(spec, rows) for rows in (7, 411, 1_000_003)]
    assert len({(plan.where, plan.noise_multiplier, plan.clip_norm) for plan in plans}) == 1


def test_a_ledger_counts_a_record_where_central_noise_claims_an_organization() -> None:
    privacy = {"unit": "organization", "where": "central", "noise_multiplier": 4.0, "clip_norm": 1.0}
    spec = sample_spec(privacy=privacy, strategy=UNIFORM)
    plan = planned(spec)
    claim, counted = round_cost(spec, plan, 1, 6), round_cost(spec, plan, 1, 6, ledger=True)
    doubled = plan.model_copy(update={"noise_multiplier": 2.0})
    assert counted == round_cost(spec, doubled, 1, 6) != claim
    local = sample_spec(privacy={**privacy, "where": "local"}, strategy=UNIFORM)
    assert round_cost(local, planned(local), 1, 6, ledger=True) == round_cost(local, planned(local), 1, 6)


def test_results_that_stay_at_the_site_cost_nothing() -> None:
    spec = record_job(evaluation={"release": "local"})
    assert round_cost(spec, planned(spec), 21, 6) == Cost.zero()
    assert round_cost(spec, planned(spec), 1, 6) == round_cost(spec, planned(spec), 2, 6)


def test_what_no_noise_can_reach_is_refused_with_what_would_help() -> None:
    with pytest.raises(PlanImpossible, match="raise epsilon or delta, or train for fewer rounds"):
        plan_of(record_job(rounds=1_000_000, privacy={**RECORD, "epsilon": 0.01}), 100, 6)
    with pytest.raises(PlanImpossible, match=r"draw 2.5e\+18 integers of noise.*: raise delta, train a smaller model"):
        plan_of(record_job(rounds=1_000_000), 1_000_000, 10**8)


def test_noise_that_is_given_is_kept_and_epsilon_is_computed() -> None:
    spec = record_job(privacy={"unit": "record", "noise_multiplier": 1.1, "clip_norm": 1.0, "delta": 1e-6})
    plan = planned(spec)
    assert plan.noise_multiplier == 1.1
    assert plan.delta == 1e-6
    assert plan.epsilon == pytest.approx(grant_cost(spec, plan, 6, 20).epsilon(1e-6))


def test_an_honest_plan_contradicts_nothing() -> None:
    for spec in (
        record_job(),
        record_job(data=SCALED, evaluation={"release": "noised"}),
        sample_spec(
            privacy={"unit": "organization", "where": "central", "epsilon": 3, "clip_norm": 1}, strategy=UNIFORM
        ),
    ):
        assert plan_contradictions(spec, planned(spec), 6) == []
    assert plan_contradictions(sample_spec(), None, 6) == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"noise_multiplier": 0.5}, "the job costs epsilon"),
        ({"sampling_probability": 0.9}, "the job costs epsilon"),
        ({"steps_per_round": 10_000}, "the job costs epsilon"),
        ({"sampling_probability": 0.0}, "no possible sampling probability"),
        ({"sampling_probability": float("nan")}, "no possible sampling probability"),
        ({"steps_per_round": 0}, "no possible sampling probability"),
        ({"noise_multiplier": 0.0}, "no possible noise"),
        ({"noise_multiplier": float("inf")}, "no possible noise"),
        ({"statistics_noise_multiplier": None}, "noise for statistics"),
        ({"statistics_noise_multiplier": 0.1}, "the job costs epsilon"),
        ({"evaluation_noise_multiplier": 3.0}, "noise for evaluations"),
        ({"clip_norm": 50.0}, "another unit, place, clip_norm or delta"),
        ({"delta": 1e-2}, "another unit, place, clip_norm or delta"),
        ({"unit": "organization", "where": "local"}, "another unit, place, clip_norm or delta"),
        ({"expected_batch": 0.0}, "no possible batch"),
        ({"epsilon": 0.5}, "not 0.5 as it says"),
        ({"budget_epsilon": 0.5}, "not 0.5 as it says"),
        ({"steps_per_round": 9_000_000_000}, "no possible sampling probability or number of steps"),
    ],
)
def test_a_plan_that_breaks_the_promise_is_named(change: dict[str, Any], complaint: str) -> None:
    spec = record_job(data=SCALED)
    forged = PrivacyPlan.model_construct(**{**planned(spec).model_dump(), **change})
    assert any(complaint in sentence for sentence in plan_contradictions(spec, forged, 6))


def test_a_plan_where_none_belongs_and_none_where_one_does_are_named() -> None:
    assert plan_contradictions(record_job(), None, 6) == [
        "The job has a privacy unit, but the task has no privacy plan."
    ]
    assert len(plan_contradictions(sample_spec(), planned(record_job()), 6)) == 1


def test_less_noise_than_the_job_names_is_named_whatever_epsilon_says() -> None:
    spec = record_job(privacy={"unit": "record", "noise_multiplier": 2.0, "clip_norm": 1.0})
    forged = planned(spec).model_copy(update={"noise_multiplier": 1.9, "epsilon": 99.0, "budget_epsilon": 99.0})
    assert plan_contradictions(spec, forged, 6) == ["The task's noise multiplier is 1.9; the job's is 2."]


def test_less_noise_than_the_job_names_for_its_statistics_and_evaluations_is_named() -> None:
    spec = record_job(
        data=SCALED,
        privacy={"unit": "record", "noise_multiplier": 3.0, "clip_norm": 1.0, "statistics_noise_multiplier": 50.0},
        evaluation={"release": "noised", "noise_multiplier": 60.0},
    )
    plan = planned(spec)
    assert plan_contradictions(spec, plan, 6) == []
    forged = {"epsilon": 99.0, "budget_epsilon": 99.0}
    for clause, what in (("statistics", "statistics' noise"), ("evaluation", "evaluations' noise")):
        weaker = plan.model_copy(update={f"{clause}_noise_multiplier": 20.0, **forged})
        assert any(f"The task's {what} multiplier is 20" in one for one in plan_contradictions(spec, weaker, 6))


@pytest.mark.parametrize(
    ("privacy", "more", "told"),
    [
        ({"epsilon": 0.01, "delta": 1e-12}, {}, "no noise reaches epsilon 0.01 at delta 1e-12"),
        (
            {"epsilon": 1.0, "statistics_noise_multiplier": 0.01},
            {"data": SCALED},
            "statistics_noise_multiplier more noise",
        ),
        ({"noise_multiplier": 0.01}, {}, "more than epsilon 100, which promises nothing"),
    ],
)
def test_what_cannot_be_promised_is_refused_and_never_an_error_of_ours(
    privacy: dict[str, Any], more: dict[str, Any], told: str
) -> None:
    spec = record_job(privacy={"unit": "record", "clip_norm": 1.0, **privacy}, **more)
    with pytest.raises(PlanImpossible, match=told):
        plan_of(spec, 300, 6)


def test_more_steps_or_draws_than_are_counted_are_refused() -> None:
    many = record_job(
        privacy={"unit": "record", "noise_multiplier": 1000.0, "clip_norm": 1.0},
        training={"optimizer": {"sgd": {"lr": 0.1}}, "batch_size": 1, "epochs": 10_000},
    )
    with pytest.raises(PlanImpossible):
        plan_of(many, 1_000_000, 1_000_000)
    with pytest.raises(PlanImpossible):
        plan_of(many, 1_000_000, 6)


def test_a_plan_says_what_it_takes_of_a_budget_that_counts_records() -> None:
    central = sample_spec(
        privacy={"unit": "organization", "where": "central", "epsilon": 3.0, "clip_norm": 1.0}, strategy=UNIFORM
    )
    plan = planned(central)
    assert plan.epsilon <= 3.0 < plan.budget_epsilon == grant_cost(central, plan, 6, 2, ledger=True).epsilon(1e-6)
    assert planned(record_job()).budget_epsilon == planned(record_job()).epsilon


# --- Noise in shares --------------------------------------------------------------------------------------------------


def distributed_job(members: int = 10, colluding: int = 0, **changes: Any) -> JobSpec:
    privacy = {"unit": "organization", "where": "distributed", "clip_norm": 1.0, "epsilon": 8.0}
    return sample_spec(
        **{
            "privacy": privacy | changes.pop("privacy", {}),
            "strategy": UNIFORM,
            "secure_aggregation": {"max_colluding": colluding},
            "cohort": {"min_updates": members},
            **changes,
        }
    )


@pytest.mark.parametrize(
    ("members", "elements", "rounds", "epsilon", "delta", "effective"),
    [
        (20, 10**6, 50, 3.0, 1e-6, 11.63),
        (100, 10**6, 100, 3.0, 1e-6, 16.45),
        (10, 10**5, 20, 8.0, 1e-5, 2.85),
    ],
)
def test_noise_in_shares_is_the_published_one(
    members: int, elements: int, rounds: int, epsilon: float, delta: float, effective: float
) -> None:
    """Effective: the sum's deviation in units of the clip, which the rounded sensitivity is a little above."""
    spec = distributed_job(members, rounds=rounds, privacy={"epsilon": epsilon, "delta": delta})
    plan = planned(spec, elements=elements)
    event = round_event(spec, plan, 1, elements)
    assert isinstance(event, DistributedGaussianRelease)
    found = (event.shares * event.local_variance) ** 0.5 / (1 << 20)
    assert found == pytest.approx(effective, rel=2e-3)
    assert plan.epsilon <= epsilon
    less = plan.model_copy(update={"noise_multiplier": plan.noise_multiplier * 0.998})
    assert grant_cost(spec, less, elements, rounds).epsilon(delta) > epsilon


def test_the_event_says_the_shares_that_are_surely_there_and_the_sensitivity_of_the_lattice() -> None:
    spec, elements = distributed_job(10, 3), 1000
    plan = planned(spec, elements=elements)
    claimed, counted = (round_event(spec, plan, 1, elements, ledger=ledger) for ledger in (False, True))
    assert isinstance(claimed, DistributedGaussianRelease)
    assert isinstance(counted, DistributedGaussianRelease)
    sensitivity = (1 << 20) + 16  # 4 * 16^2 is the first such square above 1000
    assert (claimed.sensitivity, claimed.shares, claimed.dimension) == (sensitivity, 7, elements)
    assert 7 * claimed.local_variance >= (plan.noise_multiplier * sensitivity) ** 2 > 7 * (claimed.local_variance - 1)
    assert counted == DistributedGaussianRelease(2 * sensitivity, claimed.local_variance, 7, elements)
    assert plan.epsilon < plan.budget_epsilon < 4 * plan.epsilon
    assert round_cost(spec, plan, 1, elements).draws == 7 * elements


def test_who_may_collude_adds_to_the_noise_of_each_and_not_to_the_claim() -> None:
    """The sum's noise is what the claim needs; of fewer shares each is larger."""
    alone, against = distributed_job(10), distributed_job(10, 3)
    plans = [planned(spec, elements=1000) for spec in (alone, against)]
    assert plans[0].noise_multiplier == plans[1].noise_multiplier
    shares = [round_event(spec, plan, 1, 1000) for spec, plan in zip((alone, against), plans, strict=True)]
    variances = [one.local_variance for one in shares if isinstance(one, DistributedGaussianRelease)]
    assert variances[1] == pytest.approx(variances[0] * 10 / 7, rel=1e-6)


def test_plans_of_jobs_that_differ_in_their_shares_alone_are_not_mistaken_for_each_other() -> None:
    """Their plans are kept in a cache: noise that 200 can share is too much for 3."""
    noise = {"epsilon": None, "noise_multiplier": 5000.0}
    planned(distributed_job(200, privacy=noise), elements=10**8)
    with pytest.raises(PlanImpossible, match="does not fit into 32 bits"):
        plan_of(distributed_job(3, privacy=noise), 300, 10**8)


@pytest.mark.parametrize("where", ["local", "distributed"])
def test_noise_that_does_not_fit_under_masks_is_refused_with_what_would_help(where: str) -> None:
    much = {"where": where, "epsilon": None, "noise_multiplier": 9000.0}
    few, elements = distributed_job(3, privacy=much), 10**9
    with pytest.raises(PlanImpossible, match=r"does not fit into 32 bits.*less noise, or more organizations"):
        plan_of(few, 300, elements)
    planned(distributed_job(3, privacy=much), elements=1000)
    without = sample_spec(privacy=dict(few.privacy.model_dump(), where="local"), strategy=UNIFORM)
    planned(without, elements=elements)  # without masks there is room
    with pytest.raises(PlanImpossible, match="32 bits"):
        plan_of(few, 300, elements)  # and that plan, which is kept, is not taken for this one
    plan = planned(distributed_job(3, privacy={"where": where}), elements=1000)
    louder = plan.model_copy(update={"noise_multiplier": 1e8})
    (told,) = plan_contradictions(distributed_job(3, privacy={"where": where}), louder, 1000)
    assert "cannot be kept" in told
    assert "32 bits" in told


def test_an_honest_plan_in_shares_contradicts_nothing_and_a_quieter_one_is_found_out() -> None:
    spec = distributed_job(10, 3)
    plan = planned(spec)
    assert plan_contradictions(spec, plan, 6) == []
    quieter = plan.model_copy(update={"noise_multiplier": plan.noise_multiplier / 2})
    assert any("By the task's plan the job costs epsilon" in one for one in plan_contradictions(spec, quieter, 6))
    forged = quieter.model_copy(update={"epsilon": 99.0, "budget_epsilon": 99.0})
    assert any("it promises 8" in one for one in plan_contradictions(spec, forged, 6))
    central = plan.model_copy(update={"where": "central"})
    assert any("another unit, place" in one for one in plan_contradictions(spec, central, 6))


def test_more_draws_than_the_samplers_share_of_delta_covers_are_refused_in_words() -> None:
    many = distributed_job(140, rounds=100)
    with pytest.raises(PlanImpossible, match=r"draw 1.4e\+11 integers of noise"):
        plan_of(many, 300, 10**7)
    planned(distributed_job(140, rounds=100, privacy={"delta": 1e-5}), elements=10**7)
