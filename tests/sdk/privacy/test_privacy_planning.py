"""What a privacy section becomes at a dataset: it keeps the job's promise, adds up to the unit, and cannot be faked."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.privacy.cost import Cost, Limit, fits
from isthmus.privacy.planning import (
    PlanImpossible,
    costs_by_round,
    grant_cost,
    plan_contradictions,
    plan_of,
    round_cost,
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
