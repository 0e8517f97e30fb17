"""Each clause of a policy refuses by name, before anybody is asked, and says what would pass; and that passes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from isthmus.wire.datasets import Budget
from isthmus.wire.jobs import JobState, ParticipationState
from isthmus.wire.privacy import PrivacyMode
from isthmus.wire.problems import ProblemCode
from tests.federation import BY_HAND, CENTRAL, LOCAL, OPEN, RECORD, UNIFORM, Federation, Site, job_spec
from tests.running import refused
from tests.standing import _standing, standing

__all__ = ["_standing", "standing"]

MakeFederation = Callable[..., Federation]
DATA = job_spec().data.model_dump(mode="json")
SECURED: dict[str, Any] = {
    "privacy": {"unit": "none", "clip_norm": 1.0}, "secure_aggregation": True, "cohort": {"min_updates": 3},
}  # fmt: skip
WEAK: dict[str, Any] = {"unit": "record", "clip_norm": 1.0, "epsilon": 3.0}


class Clause(NamedTuple):
    """A policy, a job that it refuses, the words of the refusal, and a job that passes instead."""

    policy: dict[str, Any]
    job: dict[str, Any]
    words: str
    passes: dict[str, Any]


CLAUSES = {
    "purposes": Clause(
        {"purposes": ("audit", "teaching")}, {}, "purposes: 'research' is not allowed (allowed: audit, teaching).",
        {"purpose": "audit"},
    ),
    "no-privacy": Clause(
        {"modes": (PrivacyMode.RECORD, PrivacyMode.CENTRAL)}, {},
        "modes: privacy 'none' is not allowed (allowed: record, organization-central).", {"privacy": RECORD},
    ),
    "another-unit": Clause(
        {"modes": (PrivacyMode.RECORD,)}, {"privacy": LOCAL, "strategy": UNIFORM},
        "modes: privacy 'organization-local' is not allowed (allowed: record).", {"privacy": RECORD},
    ),
    "another-place": Clause(
        {"modes": (PrivacyMode.LOCAL,)}, {"privacy": CENTRAL, "strategy": UNIFORM},
        "modes: privacy 'organization-central' is not allowed (allowed: organization-local).",
        {"privacy": LOCAL, "strategy": UNIFORM},
    ),
    "max_epsilon": Clause(
        {"max_epsilon": 1.0}, {"privacy": WEAK}, "at most 1 passes (more noise, or fewer rounds).",
        {"privacy": {**WEAK, "epsilon": 1.0}},
    ),
    "max_epsilon-from-noise": Clause(
        {"max_epsilon": 0.5}, {"privacy": RECORD}, "max_epsilon: the job's epsilon at this dataset is 0.6",
        {"privacy": {**RECORD, "noise_multiplier": 8.0}},
    ),
    "the-budget-bounds-one-job": Clause(
        {"budget": Budget(epsilon=2.0)}, {"privacy": WEAK}, "at most 2 passes", {"privacy": {**WEAK, "epsilon": 1.9}},
    ),
    "max_delta": Clause(
        {"max_delta": 1e-7}, {"privacy": WEAK}, "max_delta: the job's delta is 1e-05; at most 1e-07 passes.",
        {"privacy": {**WEAK, "delta": 1e-7}},
    ),
    "no-budget": Clause(
        {"budget": None}, {"privacy": WEAK}, "budget: the dataset has no privacy budget", {"privacy": "none"},
    ),
    "principals": Clause({"principals": ("grace",)}, {}, "principals: 'ada' is not listed.", {}),
    "max_clip_norm": Clause(
        {"max_clip_norm": 1.0}, {}, "max_clip_norm: the job's clip norm is unbounded; at most 1 passes.",
        {"privacy": {"unit": "none", "clip_norm": 1.0}},
    ),
    "min_cohort": Clause(
        {"min_cohort": 3}, {}, "min_cohort: rounds may close with 2 updates; at least 3 pass.",
        {"cohort": {"min_updates": 3}},
    ),
    "max_rounds": Clause(
        {"max_rounds": 2}, {"rounds": 3}, "max_rounds: the job has 3 rounds; at most 2 pass.", {"rounds": 2},
    ),
    "allow_exact_metrics": Clause(
        {"allow_exact_metrics": False}, {"evaluation": {"release": "exact"}},
        "allow_exact_metrics: the job's evaluation.release is 'exact'; 'local' would pass.",
        {"evaluation": {"release": "local"}},
    ),
    "allow_exact_statistics": Clause(
        {"allow_exact_statistics": False}, {"data": {**DATA, "standardize": "federated"}},
        "allow_exact_statistics: the job's data.standardize is 'federated'; 'none' would pass.",
        {"data": {**DATA, "standardize": "none"}},
    ),
    "require_secure_aggregation": Clause(
        {"require_secure_aggregation": True}, {"privacy": {"unit": "none", "clip_norm": 1.0}},
        "require_secure_aggregation: the job has no secure aggregation; write secure_aggregation: true.", SECURED,
    ),
}  # fmt: skip


@pytest.mark.parametrize("clause", CLAUSES.values(), ids=CLAUSES)
def test_a_clause_refuses_at_submission_and_what_it_says_would_pass_does(standing: Federation, clause: Clause) -> None:
    def set_everywhere(changes: dict[str, Any]) -> None:
        for site in standing.sites:
            site.steward.datasets.set_policy(site.dataset.id, OPEN.model_validate({**OPEN.model_dump(), **changes}))

    try:
        set_everywhere(clause.policy)
        job = standing.draft(job_spec(**clause.job))
        with refused(ProblemCode.NO_MATCHING_DATASET) as refusals:
            standing.researcher.jobs.start(job.id)

        assert "0 datasets fit the job and allow it; it needs 2." in refusals[0].detail
        assert "clinic-00/heart: policy: " in refusals[0].detail
        assert clause.words in refusals[0].detail
        assert standing.job(job).state is JobState.DRAFT
        assert not list(standing.researcher.jobs.participations(job.id))

        if clause.policy.keys() == {"principals"}:
            set_everywhere({"principals": ("ada",)})
        assert standing.start(job_spec(**clause.passes)).state is JobState.RUNNING
    finally:
        set_everywhere({})


def test_an_approval_is_refused_once_secure_aggregation_is_required(make_federation: MakeFederation) -> None:
    federation = make_federation(policy=BY_HAND, sites=3)
    plain, secured = federation.start(), federation.start(job_spec(**SECURED))
    site = federation.sites[0]
    required = BY_HAND.model_copy(update={"require_secure_aggregation": True})
    site.steward.datasets.set_policy(site.dataset.id, required)

    with refused(ProblemCode.GRANT_REFUSED_BY_POLICY) as refusals:
        _approve(federation, site, number=0)
    assert "require_secure_aggregation: the job has no secure aggregation" in refusals[0].detail

    _approve(federation, site, number=1)
    states = [site.steward.participations.list(job_id=job.id) for job in (plain, secured)]
    assert [[part.state for part in parts] for parts in states] == [
        [ParticipationState.PENDING], [ParticipationState.APPROVED]
    ]  # fmt: skip


def test_an_approval_for_more_rows_that_no_noise_covers_is_refused(make_federation: MakeFederation) -> None:
    federation = make_federation(policy=BY_HAND, sites=2)
    site = federation.sites[0]
    job = federation.start(job_spec(privacy={**WEAK, "delta": 1e-15}))
    site.announce(rows=10_000)

    with refused(ProblemCode.PRIVACY_IMPOSSIBLE) as refusals:
        _approve(federation, site)
    assert "The dataset has 10000 rows now" in refusals[0].detail
    assert "raise delta" in refusals[0].detail

    site.announce(rows=100)
    _approve(federation, site)
    assert federation.job(job).state is JobState.AWAITING_APPROVAL


def test_an_approval_that_the_budget_does_not_hold_is_refused_until_something_is_given_back(
    make_federation: MakeFederation,
) -> None:
    policy = BY_HAND.model_copy(update={"budget": Budget(epsilon=3.5)})
    federation = make_federation(policy=policy, sites=2)
    site = federation.sites[0]
    first, second = (federation.start(job_spec(privacy=WEAK)) for _ in range(2))
    _approve(federation, site, number=0)

    with refused(ProblemCode.BUDGET_EXHAUSTED):
        _approve(federation, site, number=1)
    federation.researcher.jobs.cancel(first.id)

    def given_back() -> bool:
        budget = site.steward.datasets.get(site.dataset.id).budget
        assert budget is not None
        return budget.reserved_epsilon == 0

    federation.until(given_back)
    _approve(federation, site, number=1)
    assert federation.job(second).state is JobState.AWAITING_APPROVAL


def _approve(federation: Federation, site: Site, number: int = 0) -> None:
    """Approve the participation that the site was asked for as number so and so."""
    asked = sorted(site.steward.participations.list(), key=lambda item: item.created_at)
    site.steward.participations.approve(asked[number].id)
