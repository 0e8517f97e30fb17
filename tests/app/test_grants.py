"""Grants: given by hand or by rule, for a purpose, a time and a number of rounds; honoured in the middle of a job."""

from collections.abc import Callable

import pytest

from isthmus.wire.jobs import (
    ApproveParticipation,
    JobReason,
    JobState,
    JobView,
    ParticipationState,
    ParticipationView,
    RejectParticipation,
    WithdrawParticipation,
)
from isthmus.wire.problems import ProblemCode
from isthmus.wire.rounds import TaskState
from tests.federation import BY_HAND, OPEN, Federation, Site, filled, job_spec
from tests.running import refused

MakeFederation = Callable[..., Federation]


def part_of(site: Site, job: JobView) -> ParticipationView:
    """The site's participation in the job, as its steward sees it."""
    return next(part for part in site.steward.participations.list(job_id=job.id))


def approve(site: Site, job: JobView, **asked: object) -> ParticipationView:
    """The steward says yes."""
    return site.steward.participations.approve(part_of(site, job).id, ApproveParticipation.model_validate(asked))


def test_a_job_waits_for_its_stewards_and_runs_once_enough_have_said_yes(make_federation: MakeFederation) -> None:
    federation = make_federation(policy=BY_HAND)
    job = federation.start()
    assert job.state is JobState.AWAITING_APPROVAL

    approve(federation.sites[0], job)
    assert federation.job(job).state is JobState.AWAITING_APPROVAL
    granted = approve(federation.sites[1], job).grant
    assert federation.job(job).state is JobState.RUNNING

    assert granted is not None
    assert (granted.purpose, granted.rounds, granted.rounds_used, granted.by_rule) == ("research", 1, 0, False)
    assert federation.researcher.jobs.round(job.id, 1).cohort_size == 2


def test_one_who_says_yes_late_joins_at_the_next_round(make_federation: MakeFederation) -> None:
    federation = make_federation(policy=BY_HAND)
    job = federation.start(job_spec(rounds=2))
    for site in federation.sites[:2]:
        approve(site, job)
    approve(federation.sites[2], job)
    for site in federation.sites[:2]:
        site.hand_in(site.claim(), filled(1.0))

    federation.until(lambda: federation.job(job).current_round == 2)
    assert federation.researcher.jobs.round(job.id, 2).cohort_size == 3


def test_a_no_is_final_and_its_note_is_shown_to_the_researcher(make_federation: MakeFederation) -> None:
    federation = make_federation(policy=BY_HAND)
    job = federation.start()
    mine = part_of(federation.sites[0], job)
    federation.sites[0].steward.participations.reject(mine.id, RejectParticipation(note="not with this vendor"))

    seen = {part.id: part for part in federation.researcher.jobs.participations(job.id)}[mine.id]
    assert (seen.state, seen.detail) == (ParticipationState.REJECTED, "not with this vendor")
    with refused(ProblemCode.STATE_CONFLICT):
        approve(federation.sites[0], job)


def test_a_policy_grants_by_rule_and_the_grant_says_so(federation: Federation) -> None:
    job = federation.start()
    assert job.state is JobState.RUNNING
    grants = [part.grant for part in federation.researcher.jobs.participations(job.id)]
    assert [grant.by_rule for grant in grants if grant is not None] == [True] * 3


@pytest.mark.parametrize(
    ("policy", "clause"),
    [
        ({"purposes": ["audit"]}, "purposes"),
        ({"principals": ["grace"]}, "principals"),
        ({"model_kinds": ["entry_point"]}, "model_kinds"),
        ({"modes": ["record", "organization-local"]}, "modes"),
        ({"max_clip_norm": 1.0}, "max_clip_norm"),
        ({"min_cohort": 3}, "min_cohort"),
        ({"max_rounds": 2}, "max_rounds"),
        ({"allow_exact_metrics": False}, "allow_exact_metrics"),
        ({"allow_exact_statistics": False}, "allow_exact_statistics"),
        ({"require_secure_aggregation": True}, "require_secure_aggregation"),
    ],
)
def test_a_policy_that_refuses_names_its_clause_and_the_others_go_on(
    make_federation: MakeFederation, policy: dict[str, object], clause: str
) -> None:
    federation = make_federation()
    strict = federation.sites[2]
    strict.steward.datasets.set_policy(strict.dataset.id, OPEN.model_validate({**OPEN.model_dump(), **policy}))
    spec = job_spec(
        rounds=3,
        evaluation={"holdout": 0.2, "release": "exact"},
        data={**job_spec().data.model_dump(mode="json"), "standardize": "federated"},
    )
    job = federation.start(spec)

    refused_part = part_of(strict, job)
    assert refused_part.state is ParticipationState.REJECTED
    assert refused_part.detail is not None
    assert clause in refused_part.detail
    assert job.state is JobState.RUNNING
    with refused(ProblemCode.STATE_CONFLICT):
        approve(strict, job)


def test_a_policy_made_stricter_after_the_request_is_what_the_approval_is_judged_by(
    make_federation: MakeFederation,
) -> None:
    federation = make_federation(policy=BY_HAND)
    job = federation.start()
    site = federation.sites[0]
    site.steward.datasets.set_policy(
        site.dataset.id, BY_HAND.model_copy(update={"max_rounds": 1, "purposes": ("audit",)})
    )

    with refused(ProblemCode.GRANT_REFUSED_BY_POLICY) as found:
        approve(site, job)
    assert "purposes" in found[0].detail


def test_a_grant_for_another_purpose_is_refused(make_federation: MakeFederation) -> None:
    federation = make_federation(policy=BY_HAND)
    job = federation.start()
    with refused(ProblemCode.GRANT_REFUSED_BY_POLICY):
        approve(federation.sites[0], job, purpose="marketing")


def test_a_grant_for_fewer_rounds_is_exhausted_and_the_job_goes_on_without_it(make_federation: MakeFederation) -> None:
    federation = make_federation(policy=BY_HAND)
    job = federation.start(job_spec(rounds=2))
    approve(federation.sites[0], job, rounds=1)
    approve(federation.sites[1], job)
    for site in federation.sites[:2]:
        site.hand_in(site.claim(), filled(1.0))
    paused = federation.until_state(job, JobState.PAUSED)
    assert paused.reason is JobReason.TOO_FEW_PARTICIPATIONS
    assert part_of(federation.sites[0], job).state is ParticipationState.EXHAUSTED

    approve(federation.sites[2], job)
    federation.researcher.jobs.resume(job.id)
    for site in federation.sites[1:]:
        site.hand_in(site.claim(), filled(1.0))
    assert federation.finish(job).state is JobState.COMPLETED


def test_a_grant_that_expires_in_the_middle_of_a_round_ends_its_task(make_federation: MakeFederation) -> None:
    federation = make_federation()
    job = federation.start()
    first, second, third = federation.sites
    offer = third.claim()
    federation.platform.execute(
        "UPDATE grants SET expires_at = clock_timestamp() WHERE participation_id = %s", [offer.participation_id]
    )

    federation.until(lambda: part_of(third, job).state is ParticipationState.EXPIRED)
    assert not third.heartbeat(offer).held
    with refused(ProblemCode.GRANT_WITHDRAWN):
        third.hand_in(offer, filled(9.0))
    assert third.worker.tasks.get(offer.task_id).state is TaskState.CANCELLED
    first.hand_in(first.claim(), filled(1.0))
    second.hand_in(second.claim(), filled(1.0))
    assert federation.finish(job).state is JobState.COMPLETED
    assert not list(third.steward.datasets.ledger(third.dataset.id))


def test_an_update_that_came_before_its_grant_expired_stays(federation: Federation) -> None:
    job = federation.start()
    first, second, third = federation.sites
    offer = third.claim()
    third.hand_in(offer, filled(4.0))
    federation.platform.execute(
        "UPDATE grants SET expires_at = clock_timestamp() WHERE participation_id = %s", [offer.participation_id]
    )
    federation.until(lambda: part_of(third, job).state is ParticipationState.EXPIRED)

    first.hand_in(first.claim(), filled(1.0))
    second.hand_in(second.claim(), filled(1.0))
    federation.finish(job)
    assert (federation.model(job)["0.bias"] == 2.0).all()


def test_a_grant_past_its_time_admits_nothing_even_before_the_sweep(make_federation: MakeFederation) -> None:
    federation = make_federation(coordinate=False)
    federation.start()
    site = federation.sites[0]
    offer = site.claim()
    federation.platform.execute("UPDATE grants SET expires_at = clock_timestamp()")
    with refused(ProblemCode.GRANT_WITHDRAWN):
        site.hand_in(offer, filled(1.0))


def test_only_the_dataset_s_own_steward_decides(make_federation: MakeFederation) -> None:
    federation = make_federation(policy=BY_HAND)
    job = federation.start()
    mine = part_of(federation.sites[0], job)
    other = federation.sites[1].steward
    for call in (
        lambda client: client.participations.approve(mine.id, ApproveParticipation()),
        lambda client: client.participations.reject(mine.id, RejectParticipation(note="no")),
        lambda client: client.participations.withdraw(mine.id, WithdrawParticipation(note="no")),
        lambda client: client.participations.get(mine.id),
    ):
        with refused(ProblemCode.NOT_FOUND):
            call(other)
    with refused(ProblemCode.FORBIDDEN):
        federation.researcher.participations.approve(mine.id, ApproveParticipation())
    with refused(ProblemCode.FORBIDDEN):
        federation.platform.admin.participations.approve(mine.id, ApproveParticipation())


def test_the_weight_is_the_rows_declared_when_the_grant_was_given(make_federation: MakeFederation) -> None:
    federation = make_federation(policy=BY_HAND, sites=2)
    job = federation.start()
    first, second = federation.sites
    first.announce(rows=300)
    approve(first, job)
    approve(second, job)
    first.announce(rows=900)
    first.hand_in(first.claim(), filled(1.0))
    second.hand_in(second.claim(), filled(5.0))
    federation.finish(job)
    assert (federation.model(job)["0.bias"] == 2.0).all()


def test_a_retired_dataset_releases_nothing_any_more(federation: Federation) -> None:
    federation.start()
    site = federation.sites[0]
    offer = site.claim()
    site.steward.datasets.retire(site.dataset.id)

    with refused(ProblemCode.DATASET_NOT_CONFIRMED):
        site.hand_in(offer, filled(1.0))
    assert not list(site.steward.datasets.ledger(site.dataset.id))
