"""Before anybody is asked: the numbers are those that would be charged, and the advice says what to change."""

from typing import Any

import pytest

from isthmus.privacy.cost import Cost, Limit, fits
from isthmus.privacy.outlook import Outlook, outlook_of
from isthmus.privacy.planning import grant_cost, plan_of
from isthmus.testing import sample_spec
from isthmus.wire.datasets import Budget
from isthmus.wire.jobs import JobSpec

RECORD = {"unit": "record", "epsilon": 3.0, "clip_norm": 1.0}
UNIFORM = {"fedavg": {"weights": "uniform"}}


def of(spec: JobSpec, *rows: int, budget: Budget | None = None) -> Outlook:
    return outlook_of(spec, [(f"site-{number}/heart", count, budget) for number, count in enumerate(rows)], 1000)


def advice(spec: JobSpec, *rows: int, budget: Budget | None = None) -> str:
    return " ".join(of(spec, *rows, budget=budget).advice)


def organizations(where: str, **privacy: Any) -> JobSpec:
    section = {"unit": "organization", "where": where, "clip_norm": 1.0, "epsilon": 8.0, "delta": 1e-5, **privacy}
    return sample_spec(privacy=section, strategy=UNIFORM, rounds=50)


def test_epsilon_grows_by_round_up_to_what_the_plan_claims() -> None:
    spec = sample_spec(privacy=RECORD, rounds=20)
    (site,) = of(spec, 300).datasets
    assert site.plan is not None
    numbers, epsilons = zip(*site.epsilon_by_round, strict=True)
    assert numbers == tuple(range(1, 22))
    assert list(epsilons) == sorted(epsilons)
    assert epsilons[-1] == site.plan.epsilon <= 3.0 < epsilons[-1] * 1.01


def test_a_long_job_is_drawn_by_some_of_its_rounds_and_its_last() -> None:
    spec = sample_spec(privacy={"unit": "record", "noise_multiplier": 20.0, "clip_norm": 1.0}, rounds=3000)
    (site,) = of(spec, 300).datasets
    assert len(site.epsilon_by_round) < 1100
    assert site.epsilon_by_round[-1][0] == 3001


def test_so_many_jobs_fit_and_not_one_more() -> None:
    spec, budget = sample_spec(privacy=RECORD, rounds=20), Budget(epsilon=10, delta=1e-5)
    (site,) = of(spec, 300, budget=budget).datasets
    plan = plan_of(spec, 300, 1000)
    assert plan is not None
    assert site.jobs_in_budget is not None
    once = grant_cost(spec, plan, 1000, 20, ledger=True)
    total = Cost.zero()
    for _ in range(site.jobs_in_budget):
        total = total + once
    assert fits(total, Limit.of(10, 1e-5))
    assert not fits(total + once, Limit.of(10, 1e-5))
    assert of(spec, 300).datasets[0].jobs_in_budget is None


@pytest.mark.parametrize(("sites", "expected"), [(5, 0.85), (10, 0.42), (50, 0.085)])
def test_the_noise_of_a_central_mean_is_that_of_the_published_check(sites: int, expected: float) -> None:
    """Epsilon 8 at delta 1e-5 over 50 rounds needs z = 4.24 by the closed form (Balle and Wang); ours is a bit more."""
    found = of(organizations("central"), *[300] * sites).mean_noise
    assert found is not None
    assert expected * 0.99 < found < expected * 1.1


def test_local_noise_is_doubled_and_falls_with_the_root_of_the_sites() -> None:
    central, local = of(organizations("central"), *[300] * 25), of(organizations("local"), *[300] * 25)
    assert central.mean_noise is not None
    assert local.mean_noise == pytest.approx(central.mean_noise * 25 * 2 / 5)


def test_few_organizations_are_told_to_hide_records() -> None:
    assert "With 4 organizations use unit: record" in advice(organizations("central"), 300, 300, 300, 300)
    assert "use unit: record" not in advice(organizations("central"), *[300] * 60)


def in_shares(members: int = 4, colluding: int = 0) -> JobSpec:
    section = {"unit": "organization", "where": "distributed", "clip_norm": 1.0, "epsilon": 8.0, "delta": 1e-5}
    return sample_spec(
        privacy=section,
        strategy=UNIFORM,
        rounds=50,
        secure_aggregation={"max_colluding": colluding},
        cohort={"min_updates": members},
    )


def test_the_noise_of_a_mean_in_shares_is_that_of_all_who_add_them() -> None:
    """As much as central noise where as many take part as the shares are sized for, and more of it with more."""
    sites = [300] * 10
    central = of(organizations("central"), *sites).mean_noise
    enough, larger = of(in_shares(10), *sites).mean_noise, of(in_shares(10, 2), *sites).mean_noise
    assert central is not None
    assert enough == pytest.approx(central, rel=1e-3)
    assert larger == pytest.approx(central * (10 / 8) ** 0.5, rel=1e-3)
    assert of(in_shares(10), 300).datasets[0].step_noise is None


def test_jobs_in_shares_are_told_what_their_claim_leaves_open() -> None:
    told = advice(in_shares(), *[300] * 4)
    assert "With 4 organizations use unit: record with secure_aggregation: hiding a whole organization" in told
    assert "Write secure_aggregation: {max_colluding: 1}" in told
    assert "max_colluding" not in advice(in_shares(10, 1), *[300] * 10)
    assert "cohort.min_updates 10 or more updates, and there are 4 datasets" in advice(in_shares(10), *[300] * 4)
    assert "datasets: it cannot take place" not in advice(in_shares(10), 300) + advice(in_shares(10), *[300] * 10)


def test_noise_that_drowns_everything_is_told() -> None:
    small = sample_spec(privacy={**RECORD, "epsilon": 0.1}, training={"optimizer": "adam", "batch_size": 4}, rounds=100)
    assert "little will be learned: use larger batches" in advice(small, 50, 50)
    assert "little will be learned" not in advice(sample_spec(privacy=RECORD), 10_000, 10_000)


def test_weak_promises_and_loose_deltas_are_told() -> None:
    assert "Epsilon 50 promises little" in advice(sample_spec(privacy={**RECORD, "epsilon": 50.0}), 300)
    assert "Delta 0.001 is large for 2,000 records" in advice(sample_spec(privacy={**RECORD, "delta": 1e-3}), 2000)
    assert "records in 3 organizations is promised no more than epsilon 9" in advice(
        sample_spec(privacy={**RECORD, "max_orgs_per_person": 3}, rounds=20), 300
    )


def test_a_budget_that_never_suffices_is_told_by_name() -> None:
    told = advice(sample_spec(privacy=RECORD), 300, budget=Budget(epsilon=1))
    assert "The whole budget of site-0/heart does not allow this job even once" in told


def test_no_privacy_is_told_first_and_alone() -> None:
    found = of(sample_spec(), 300)
    assert found.advice[0].startswith("No privacy is claimed")
    assert len(found.advice) == 1
    assert found.mean_noise is None


def test_a_target_out_of_reach_is_an_obstacle_and_not_an_error() -> None:
    spec = sample_spec(privacy=RECORD, rounds=1_000_000)
    found = outlook_of(spec, [("a/heart", 10**6, None)], 10**8)
    assert found.datasets[0].plan is None
    assert "no noise reaches epsilon 3" in str(found.datasets[0].obstacle)
    assert "a/heart: no noise reaches" in found.advice[0]
