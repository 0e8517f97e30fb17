"""Whom a new attempt asks: those who are there, where others are off; and after shares were told, exactly the same."""

from collections.abc import Callable

import pytest

from isthmus.wire.events import EventKind
from isthmus.wire.jobs import JobReason, JobState, JobView, WithdrawParticipation
from isthmus.wire.problems import ProblemCode
from isthmus.wire.rounds import RoundPhase
from isthmus.wire.secured import Step
from tests.app.test_grants import part_of
from tests.app.test_handed_on_tasks import hand_on
from tests.app.test_secured_aborts import events, lie, until_attempt
from tests.federation import Federation
from tests.running import refused
from tests.secured import (
    STEPS,
    Masking,
    assert_forgotten,
    assert_published,
    enter,
    go,
    pass_round,
    pass_step,
    secured_spec,
    take,
    view_of,
)

MakeFederation = Callable[..., Federation]


# --- Organizations that are off ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("attempts", [1, 3])
def test_the_round_goes_on_with_those_who_sent_keys_in_time_and_waits_for_nobody_who_is_off(
    make_federation: MakeFederation, attempts: int
) -> None:
    federation = make_federation(sites=5)
    job = federation.start(secured_spec(cohort={"attempts": attempts}))
    there, off = federation.sites[:3], federation.sites[3:]
    members = enter(there)
    for member in members:
        member.exchange(Step.KEYS)
    assert view_of(federation, job).needed == 4

    pass_step(federation)
    until_attempt(federation, job, 2)

    assert view_of(federation, job).needed == view_of(federation, job).members == 3
    (told,) = events(federation, job, EventKind.ATTEMPT_ABORTED)
    assert (told["because"], told["missing"]) == ("too-few-keys", [f"{site.organization.name}/heart" for site in off])
    assert all(site.try_claim() is None for site in off)
    assert federation.researcher.jobs.round(job.id, 1).cohort_size == 5
    anew = enter(there)
    go(anew)
    assert federation.finish(job).state is JobState.COMPLETED
    assert_published(federation, job, anew)
    assert_forgotten(federation)


def test_an_attempt_after_the_one_of_those_who_were_there_asks_everybody_again(make_federation: MakeFederation) -> None:
    federation = make_federation(sites=5)
    job = federation.start(secured_spec(cohort={"attempts": 2}))  # a smaller roster uses none up
    for member in enter(federation.sites[:3]):
        member.exchange(Step.KEYS)
    pass_step(federation)
    until_attempt(federation, job, 2)
    members = enter(federation.sites[:3])
    take(members, Step.KEYS)
    members[0].exchange(Step.SHARES)
    pass_step(federation)
    until_attempt(federation, job, 3)

    anew = enter(federation.sites)
    go(anew)

    assert federation.finish(job).state is JobState.COMPLETED
    assert_published(federation, job, anew)


def test_keys_that_come_late_make_the_smaller_roster_at_once(make_federation: MakeFederation) -> None:
    federation = make_federation(sites=5)
    job = federation.start(secured_spec())
    members = enter(federation.sites[:3])
    for member in members[:2]:
        member.exchange(Step.KEYS)
    pass_step(federation)
    assert members[0].exchange(Step.KEYS, wait_s=1) is None

    with refused(ProblemCode.LEASE_LOST):  # its message made the new attempt
        members[2].exchange(Step.KEYS)

    assert federation.researcher.jobs.round(job.id, 1).attempt == 2
    assert view_of(federation, job).members == 3


def test_fewer_than_the_job_asks_for_wait_for_the_others_until_the_deadline(make_federation: MakeFederation) -> None:
    federation = make_federation(sites=5)
    job = federation.start(secured_spec())
    for member in enter(federation.sites)[:2]:
        member.exchange(Step.KEYS)
    pass_step(federation)
    pass_round(federation)

    until_attempt(federation, job, 2)

    assert view_of(federation, job).members == 5


def test_over_selection_closes_the_updates_early_and_nothing_before_them(make_federation: MakeFederation) -> None:
    federation = make_federation(sites=6)
    cohort = {"target_updates": 4, "over_selection": 2}
    job = federation.start(secured_spec(cohort=cohort))
    members = enter(federation.sites)
    for step in (Step.KEYS, Step.SHARES):
        for member in members[:-1]:
            assert member.exchange(step) is None
        take(members[-1:], step)
        take(members[:-1], step)

    for member in members[:5]:  # the threshold of six
        member.upload()

    assert federation.researcher.jobs.round(job.id, 1).phase is RoundPhase.SURVIVORS


# --- After shares were told -------------------------------------------------------------------------------------------


def told_and_given_up(
    federation: Federation, members: list[Masking], *, told: int = 1, leave: Callable[[], None] = lambda: None
) -> None:
    """Some tell their shares, too few; then the time is over. The last member has left before."""
    for member in members[:-1]:
        member.exchange(Step.KEYS)
    pass_step(federation)
    federation.until(lambda: members[0].exchange(Step.KEYS))
    stay = members[:-1]
    for step in STEPS[:-1]:
        take(stay, step)
    for member in stay[:told]:
        member.exchange(Step.UNMASK)
    leave()
    pass_step(federation)


def test_after_shares_were_told_a_new_attempt_is_of_exactly_the_same_survivors(make_federation: MakeFederation) -> None:
    federation = make_federation(sites=5)
    job = federation.start(secured_spec())
    told_and_given_up(federation, enter(federation.sites))
    until_attempt(federation, job, 2)

    stood = view_of(federation, job)
    assert (stood.members, stood.threshold, stood.needed) == (4, 3, 4)
    assert federation.sites[4].try_claim() is None
    anew = enter(federation.sites[:4])
    go(anew)

    assert federation.finish(job).state is JobState.COMPLETED
    assert_published(federation, job, anew)
    assert_forgotten(federation)


def test_where_no_share_was_told_everybody_is_asked_again(make_federation: MakeFederation) -> None:
    federation = make_federation(sites=5)
    job = federation.start(secured_spec())
    told_and_given_up(federation, enter(federation.sites), told=0)

    until_attempt(federation, job, 2)

    assert view_of(federation, job).members == 5


@pytest.mark.parametrize("step", [Step.KEYS, Step.UPDATE])
def test_the_bound_outlives_an_attempt_in_which_nothing_was_told(make_federation: MakeFederation, step: Step) -> None:
    federation = make_federation(sites=5)
    job = federation.start(secured_spec())
    told_and_given_up(federation, enter(federation.sites))
    until_attempt(federation, job, 2)
    members = enter(federation.sites[:4])
    for one in STEPS[: STEPS.index(step)]:
        take(members, one)
    for member in members[:3]:  # three would do for another round of four
        if step is Step.KEYS:
            member.exchange(step)
        else:
            member.upload()
    pass_step(federation)
    pass_round(federation)
    until_attempt(federation, job, 3)

    assert (view_of(federation, job).members, view_of(federation, job).needed) == (4, 4)
    anew = enter(federation.sites[:4])
    go(anew)
    assert federation.finish(job).state is JobState.COMPLETED
    assert_published(federation, job, anew)


@pytest.mark.parametrize("cause", ["withdrawn", "handed on"])
def test_a_round_that_cannot_have_the_same_survivors_again_fails_at_once_and_says_why(
    make_federation: MakeFederation, cause: str
) -> None:
    federation = make_federation(sites=5)
    job = federation.start(secured_spec())
    members = enter(federation.sites)
    told_and_given_up(federation, members, leave=lambda: _leave(members[2], job, cause))

    ended = federation.finish(job)

    assert (ended.state, ended.reason) == (JobState.FAILED, JobReason.ROUND_FAILED)
    assert ended.detail is not None
    names = ", ".join(member.name for member in members[:4])
    assert f"Shares were told for the sum of {names}" in ended.detail
    why = "may not be asked any more" if cause == "withdrawn" else "another worker serves it now"
    assert why in ended.detail
    assert f": {members[2].name}. Submit the job anew." in ended.detail
    assert "1 of 3 attempts" in ended.detail
    assert_forgotten(federation)


def _leave(member: Masking, job: JobView, cause: str) -> None:
    if cause == "withdrawn":
        part = part_of(member.site, job)
        member.site.steward.participations.withdraw(part.id, WithdrawParticipation(note="no more"))
    else:
        hand_on(member.site)


def test_a_round_whose_heaviest_member_left_cannot_be_scaled_the_same_again_and_fails_at_once(
    make_federation: MakeFederation,
) -> None:
    federation = make_federation(sites=0)
    federation.add(5, rows=lambda number: (70, 300, 150, 80, 500)[number])
    job = federation.start(secured_spec(strategy="fedavg"))
    members = enter(federation.sites)
    told_and_given_up(federation, members)

    ended = federation.finish(job)

    assert ended.state is JobState.FAILED
    assert ended.detail is not None
    assert f"the largest weight, which was that of {members[4].name}" in ended.detail


def test_a_round_whose_heaviest_member_stayed_is_tried_again(make_federation: MakeFederation) -> None:
    federation = make_federation(sites=0)
    federation.add(5, rows=lambda number: (70, 300, 150, 80, 100)[number])
    job = federation.start(secured_spec(strategy="fedavg"))
    told_and_given_up(federation, enter(federation.sites))
    until_attempt(federation, job, 2)

    anew = enter(federation.sites[:4])
    go(anew)

    assert federation.finish(job).state is JobState.COMPLETED
    assert_published(federation, job, anew)


# --- Who is named -----------------------------------------------------------------------------------------------------


def test_the_job_that_fails_names_who_was_missing_and_why_and_how_many_were_needed(
    make_federation: MakeFederation,
) -> None:
    federation = make_federation(sites=5)
    job = federation.start(secured_spec(cohort={"attempts": 1}))
    members = enter(federation.sites)
    take(members, Step.KEYS)
    for member in members[:3]:
        member.exchange(Step.SHARES)
    members[3].site.fail(members[3].offer)
    pass_step(federation)

    detail = federation.finish(job).detail

    assert detail is not None
    assert "1 of 1 attempts: too few shares" in detail
    assert "Of the 5 that it asked 4 are needed (threshold 4, min_updates 3)" in detail
    assert f"{members[3].name} (failed: " in detail
    assert f"{members[4].name} (claimed)" in detail
    assert members[0].name not in detail


def test_suspects_of_wrong_shares_are_remembered_and_named_when_the_job_fails(federation: Federation) -> None:
    job = federation.start(secured_spec(cohort={"attempts": 2}))
    members = enter(federation.sites)
    go(members, through=Step.SURVIVORS)
    members[0].exchange(Step.UNMASK, lie(members[0]))
    take(members[1:], Step.UNMASK)
    until_attempt(federation, job, 2)
    (told,) = events(federation, job, EventKind.SHARES_WRONG)
    assert told["suspects"]
    for member in enter(federation.sites)[:2]:
        member.exchange(Step.KEYS)

    pass_round(federation)

    detail = federation.finish(job).detail
    assert detail is not None
    assert f"Suspected of wrong shares: {', '.join(told['suspects'])}." in detail
    assert "2 of 2 attempts: too few keys" in detail


# --- Wrong shares -----------------------------------------------------------------------------------------------------


def wrong(federation: Federation, job: JobView, members: list[Masking], answers: int) -> None:
    """So many tell shares, of whom the first one lies; it is found that they do not fit together."""
    go(members, through=Step.SURVIVORS)
    members[0].exchange(Step.UNMASK, lie(members[0]))
    for member in members[1:answers]:
        member.exchange(Step.UNMASK)
    federation.until(lambda: events(federation, job, EventKind.SHARES_WRONG))


def test_a_liar_costs_two_answers(make_federation: MakeFederation) -> None:
    federation = make_federation(sites=7)
    job = federation.start(secured_spec())
    members = enter(federation.sites)
    wrong(federation, job, members, 5)

    (told,) = events(federation, job, EventKind.SHARES_WRONG)
    assert (told["answers"], told["answers_needed"]) == (5, 7)
    members[5].exchange(Step.UNMASK)
    assert federation.researcher.jobs.round(job.id, 1).phase is RoundPhase.UNMASKING
    members[6].exchange(Step.UNMASK)

    assert federation.finish(job).state is JobState.COMPLETED
    assert_published(federation, job, members)


def test_where_only_one_more_answer_comes_it_is_tried_with_that_when_the_time_is_over(
    make_federation: MakeFederation,
) -> None:
    federation = make_federation(sites=7)
    job = federation.start(secured_spec())
    members = enter(federation.sites)
    wrong(federation, job, members, 5)
    members[5].exchange(Step.UNMASK)

    pass_step(federation)

    assert federation.finish(job).state is JobState.COMPLETED
    assert_published(federation, job, members)
