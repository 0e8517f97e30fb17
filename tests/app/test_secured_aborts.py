"""Attempts that too few stay in: nothing of them is kept, and a new one has new keys and whoever may be asked then."""

from collections.abc import Callable
from datetime import timedelta

import numpy as np
import pytest

from isthmus.wire.events import EventKind
from isthmus.wire.jobs import JobReason, JobState, JobView, ParticipationState, WithdrawParticipation
from isthmus.wire.problems import ProblemCode
from isthmus.wire.rounds import RefuseTask, RoundPhase, TaskState
from isthmus.wire.secured import Step
from tests.app.test_grants import approve, part_of
from tests.app.test_handed_on_tasks import hand_on
from tests.federation import BY_HAND, Federation
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
BECAUSE = dict(
    zip(
        STEPS,
        ("too-few-keys", "too-few-shares", "too-few-updates", "too-few-signatures", "too-few-answers"),
        strict=True,
    )
)


def events(federation: Federation, job: JobView, kind: EventKind) -> list[dict[str, object]]:
    """What was told of that kind."""
    return [event.data for event in federation.researcher.jobs.events(job.id, follow=False) if event.kind is kind]


def until_attempt(federation: Federation, job: JobView, attempt: int) -> None:
    """Wait for an attempt of the first round."""
    federation.until(lambda: federation.researcher.jobs.round(job.id, 1).attempt == attempt)


def give_up(federation: Federation, job: JobView, members: list[Masking], step: Step) -> None:
    """All but the last go into a step, whose time then passes: too few for an attempt of three."""
    for member in members[:-1]:
        if step is Step.UPDATE:
            member.upload()
        else:
            member.exchange(step)
    if step in (Step.KEYS, Step.UPDATE):
        pass_round(federation)
    else:
        pass_step(federation)


@pytest.mark.parametrize("step", STEPS)
def test_below_the_threshold_an_attempt_is_given_up_and_the_next_one_begins_with_nothing_of_it(
    federation: Federation, step: Step
) -> None:
    job = federation.start(secured_spec())
    members = enter(federation.sites)
    for one in STEPS[: STEPS.index(step)]:
        take(members, one)
    uploads = federation.blobs("updates")

    give_up(federation, job, members, step)
    until_attempt(federation, job, 2)

    for member in members[:-1]:
        with refused(ProblemCode.LEASE_LOST):
            member.exchange(Step.KEYS, member.sent[Step.KEYS])
    again = federation.researcher.jobs.round(job.id, 1)
    assert (again.phase, again.accepted, again.updates) == (RoundPhase.COLLECTING, 0, [])
    assert all(task.state is TaskState.OFFERED for task in again.tasks)
    federation.until(lambda: not federation.blobs("updates"))
    assert len(uploads) == (3 if step in (Step.SURVIVORS, Step.UNMASK) else 0)
    (told,) = events(federation, job, EventKind.ATTEMPT_ABORTED)
    assert told == {
        "round": 1, "attempt": 1, "step": step.value, "because": BECAUSE[step], "missing": [members[-1].name],
    }  # fmt: skip
    (opened,) = events(federation, job, EventKind.ROUND_REOPENED)
    assert (opened["attempt"], opened["kept"], opened["offered"]) == (2, 0, 3)

    anew = enter(federation.sites)
    assert {member.offer.attempt for member in anew} == {2}
    assert {member.context for member in anew}.isdisjoint(member.context for member in members)
    go(anew)

    assert federation.finish(job).state is JobState.COMPLETED
    assert_published(federation, job, anew)
    assert_forgotten(federation)
    grants = [part.grant for part in federation.researcher.jobs.participations(job.id)]
    assert [grant.rounds_used for grant in grants if grant is not None] == [1, 1, 1]
    spent = federation.platform.execute("SELECT count(*) FROM ledger_entries WHERE kind = 'spend'")
    assert spent == [(3,)]


def test_keys_are_waited_for_beyond_their_time_as_long_as_they_are_too_few(federation: Federation) -> None:
    job = federation.start(secured_spec())
    members = enter(federation.sites)
    for member in members[:2]:
        member.exchange(Step.KEYS)
    pass_step(federation)

    assert members[0].exchange(Step.KEYS, wait_s=1) is None
    assert view_of(federation, job).attempt == 1
    take(members[2:], Step.KEYS)

    take(members, Step.KEYS)
    assert view_of(federation, job).step is Step.SHARES


def test_when_all_attempts_are_used_up_the_job_fails_and_says_of_what_there_were_too_few(
    federation: Federation,
) -> None:
    job = federation.start(secured_spec(cohort={"attempts": 2}))
    for attempt in (1, 2):
        members = enter(federation.sites)
        take(members, Step.KEYS)
        give_up(federation, job, members, Step.SHARES)
        if attempt == 1:
            until_attempt(federation, job, 2)

    ended = federation.finish(job)

    assert (ended.state, ended.reason) == (JobState.FAILED, JobReason.ROUND_FAILED)
    assert ended.detail is not None
    assert "2 of 2 attempts" in ended.detail
    assert "too few shares" in ended.detail
    assert len(events(federation, job, EventKind.ATTEMPT_ABORTED)) == 2
    assert_forgotten(federation)
    with refused(ProblemCode.JOB_NOT_RUNNING):
        members[0].exchange(Step.KEYS, members[0].sent[Step.KEYS])


@pytest.mark.parametrize("step", [Step.KEYS, Step.SHARES, Step.UPDATE])
def test_who_gives_its_task_up_is_not_waited_for(make_federation: MakeFederation, step: Step) -> None:
    federation = make_federation(sites=4)
    job = federation.start(secured_spec())
    members = enter(federation.sites)
    for one in STEPS[: STEPS.index(step)]:
        take(members, one)
    if step is not Step.UPDATE:
        members[1].exchange(step)  # its message is in, and still it is not counted

    members[1].site.fail(members[1].offer)
    stay = [member for member in members if member is not members[1]]
    for one in STEPS[STEPS.index(step) :]:
        take(stay, one)

    assert federation.finish(job).state is JobState.COMPLETED
    assert_published(federation, job, stay)
    assert stay[0].keyed is not None
    assert stay[0].shared is not None
    assert (1 in stay[0].keyed.advertisements) == (step is not Step.KEYS)
    assert (1 in stay[0].shared.indices) == (step is Step.UPDATE)


def test_a_refusal_that_leaves_too_few_asks_everybody_else_in_a_new_attempt(make_federation: MakeFederation) -> None:
    federation = make_federation(sites=4)
    job = federation.start(secured_spec(cohort={"fraction": 0.75}))
    asked = [site for site in federation.sites if (offer := site.try_claim()) and not site.heartbeat(offer).reason]
    assert len(asked) == 3
    (other,) = [site for site in federation.sites if site not in asked]
    first = federation.researcher.jobs.round(job.id, 1).tasks[0]
    refusing = next(site for site in asked if site.organization.name == first.organization)
    refusing.worker.tasks.refuse(first.id, _refusal(first.fence))
    until_attempt(federation, job, 2)

    members = enter([site for site in federation.sites if site is not refusing])
    assert other in {member.site for member in members}
    go(members)

    assert federation.finish(job).state is JobState.COMPLETED
    assert_published(federation, job, members)
    assert federation.researcher.jobs.round(job.id, 1).cohort_size == 4


def _refusal(fence: int) -> RefuseTask:
    return RefuseTask(fence=fence, reason="the policy says no")


def test_a_refusal_without_anybody_else_to_ask_fails_the_round(federation: Federation) -> None:
    job = federation.start(secured_spec())
    members = enter(federation.sites)

    members[0].site.refuse(members[0].offer)

    assert federation.finish(job).state is JobState.FAILED
    assert_forgotten(federation)


def test_for_want_of_grants_the_job_pauses_and_a_new_attempt_begins_when_it_is_resumed(
    make_federation: MakeFederation,
) -> None:
    federation = make_federation(policy=BY_HAND)
    job = federation.start(secured_spec())
    for site in federation.sites:
        approve(site, job)
    members = enter(federation.sites)
    take(members, Step.KEYS)
    lost = members[0].site
    federation.platform.execute(
        "UPDATE grants SET expires_at = clock_timestamp() WHERE participation_id = %s",
        [members[0].offer.participation_id],
    )

    paused = federation.until_state(job, JobState.PAUSED)
    assert paused.reason is JobReason.TOO_FEW_PARTICIPATIONS
    assert part_of(lost, job).state is ParticipationState.EXPIRED
    approve(lost, job)
    federation.researcher.jobs.resume(job.id)
    until_attempt(federation, job, 2)

    anew = enter(federation.sites)
    go(anew)
    assert federation.finish(job).state is JobState.COMPLETED
    assert_published(federation, job, anew)


@pytest.mark.parametrize("accepted", [False, True], ids=["at work", "its update in"])
def test_who_withdraws_before_the_freeze_is_not_in_the_sum(make_federation: MakeFederation, accepted: bool) -> None:
    federation = make_federation(sites=5)
    job = federation.start(secured_spec())
    members = enter(federation.sites)
    for step in (Step.KEYS, Step.SHARES):
        take(members, step)
    if accepted:
        members[0].upload()

    gone = members[0].site
    gone.steward.participations.withdraw(part_of(gone, job).id, WithdrawParticipation(note="a patient asked"))

    with refused(ProblemCode.GRANT_WITHDRAWN):
        members[0].exchange(Step.UPDATE)
    assert view_of(federation, job).dropped == [members[0].name]
    stay = members[1:]
    for step in STEPS[2:]:
        take(stay, step)
    assert federation.finish(job).state is JobState.COMPLETED
    assert_published(federation, job, stay)
    assert_forgotten(federation)


def test_who_withdraws_after_the_freeze_stays_in_this_sum_and_may_still_help_to_unmask_it(
    federation: Federation,
) -> None:
    job = federation.start(secured_spec())
    members = enter(federation.sites)
    go(members, through=Step.UPDATE)

    gone = members[0].site
    gone.steward.participations.withdraw(part_of(gone, job).id, WithdrawParticipation(note="no more"))
    for step in (Step.SURVIVORS, Step.UNMASK):
        take(members, step)

    assert federation.finish(job).state is JobState.COMPLETED
    assert_published(federation, job, members)
    (told,) = events(federation, job, EventKind.PARTICIPATION_WITHDRAWN)
    assert told["stays_in_round"] == 1


def test_who_withdrew_after_the_freeze_is_not_asked_again_when_the_attempt_is_given_up(
    make_federation: MakeFederation,
) -> None:
    federation = make_federation(sites=4)
    job = federation.start(secured_spec())
    members = enter(federation.sites)
    go(members, through=Step.UPDATE)
    gone = members[0].site
    gone.steward.participations.withdraw(part_of(gone, job).id, WithdrawParticipation(note="no more"))

    pass_step(federation)
    until_attempt(federation, job, 2)

    assert gone.try_claim() is None
    assert gone.worker.tasks.get(members[0].offer.task_id).state is TaskState.CANCELLED
    anew = enter(federation.sites[1:])
    go(anew)
    assert federation.finish(job).state is JobState.COMPLETED
    assert_published(federation, job, anew)


def test_a_revoked_worker_is_left_behind(make_federation: MakeFederation) -> None:
    federation = make_federation(sites=4)
    job = federation.start(secured_spec())
    members = enter(federation.sites)
    take(members, Step.KEYS)
    site = federation.sites[3]
    (worker,) = site.steward.workers.list()
    site.steward.workers.revoke(worker.id)

    stay = members[:3]
    for member in stay:
        member.exchange(Step.SHARES)
    for member in stay:
        federation.until(lambda member=member: member.exchange(Step.SHARES, wait_s=2))
    for step in STEPS[2:]:
        take(stay, step)

    assert federation.finish(job).state is JobState.COMPLETED
    assert_published(federation, job, stay)


def test_a_dataset_that_is_handed_on_is_out_of_the_attempt_and_asked_in_the_next_under_its_new_identity(
    make_federation: MakeFederation,
) -> None:
    federation = make_federation(sites=3)
    job = federation.start(secured_spec())
    members = enter(federation.sites)
    take(members, Step.KEYS)
    site = federation.sites[1]
    hand_on(site)

    until_attempt(federation, job, 2)

    anew = enter(federation.sites)
    go(anew)
    assert federation.finish(job).state is JobState.COMPLETED
    assert_published(federation, job, anew)
    assert anew[1].keyed is not None
    key = federation.platform.signing[site.worker][0].public_key().public_bytes_raw()
    assert anew[1].keyed.roster[1].identity == key


def test_a_worker_that_was_killed_goes_on_in_the_same_attempt_under_its_next_fence(federation: Federation) -> None:
    job = federation.start(secured_spec())
    members = enter(federation.sites)
    take(members, Step.KEYS)
    member = members[0]
    federation.platform.execute(
        "UPDATE tasks SET lease_expires_at = clock_timestamp() WHERE id = %s", [member.offer.task_id]
    )

    anew = federation.until(member.site.try_claim)
    assert (anew.attempt, anew.fence, anew.secured) == (1, member.offer.fence + 1, member.secured)
    with refused(ProblemCode.LEASE_LOST):
        member.exchange(Step.SHARES)
    before = member.answers[Step.KEYS]
    member.offer = anew
    assert member.exchange(Step.KEYS, member.sent[Step.KEYS]) == before
    for step in STEPS[1:]:
        take(members, step)

    assert federation.finish(job).state is JobState.COMPLETED
    assert_published(federation, job, members)


# --- Pausing and cancelling -------------------------------------------------------------------------------------------


def test_while_a_job_is_paused_its_steps_have_all_time_and_close_when_all_have_come(federation: Federation) -> None:
    job = federation.start(secured_spec())
    members = enter(federation.sites)
    take(members, Step.KEYS)
    members[0].exchange(Step.SHARES)
    federation.researcher.jobs.pause(job.id)
    pass_step(federation)

    assert members[0].exchange(Step.SHARES, wait_s=1) is None
    for step in STEPS[1:]:
        take(members, step)

    done = federation.until(lambda: now if (now := federation.job(job)).rounds_completed else None)
    assert done.state is JobState.COMPLETED
    assert_published(federation, job, members)


def test_a_pause_moves_the_time_of_the_step(federation: Federation) -> None:
    job = federation.start(secured_spec())
    before = view_of(federation, job).step_closes_at
    assert before is not None
    federation.researcher.jobs.pause(job.id)
    federation.platform.execute("UPDATE jobs SET paused_at = paused_at - interval '1 hour'")

    federation.researcher.jobs.resume(job.id)

    after = view_of(federation, job).step_closes_at
    assert after is not None
    assert timedelta(hours=1) <= after - before < timedelta(hours=1, minutes=1)


@pytest.mark.parametrize("through", [None, *STEPS[:4]])
def test_a_job_that_is_cancelled_in_any_step_keeps_nothing_of_it(federation: Federation, through: Step | None) -> None:
    job = federation.start(secured_spec())
    members = enter(federation.sites)
    if through is not None:
        go(members, through=through)

    federation.researcher.jobs.cancel(job.id)

    assert federation.researcher.jobs.round(job.id, 1).phase is RoundPhase.CANCELLED
    assert_forgotten(federation)
    with refused(ProblemCode.JOB_NOT_RUNNING):
        members[0].exchange(Step.KEYS, b"")


# --- Sums and shares that are not right -------------------------------------------------------------------------------


def lie(member: Masking) -> bytes:
    """An unmask message with a wrong share in it, of the right form."""
    told = bytearray(member.message(Step.UNMASK))
    told[-1] ^= 1
    return bytes(told)


def test_a_wrong_share_is_found_and_the_one_answer_that_is_left_unmasks_the_sum(
    make_federation: MakeFederation,
) -> None:
    federation = make_federation(sites=4)
    job = federation.start(secured_spec())
    members = enter(federation.sites)
    go(members, through=Step.SURVIVORS)
    members[0].exchange(Step.UNMASK, lie(members[0]))
    take(members[1:3], Step.UNMASK)
    federation.until(lambda: events(federation, job, EventKind.SHARES_WRONG))

    (told,) = events(federation, job, EventKind.SHARES_WRONG)
    assert (told["attempt"], told["answers"], told["answers_needed"]) == (1, 3, 4)
    assert federation.researcher.jobs.round(job.id, 1).phase is RoundPhase.UNMASKING
    assert view_of(federation, job).missing == [members[3].name]
    take(members[3:], Step.UNMASK)

    assert federation.finish(job).state is JobState.COMPLETED
    assert_published(federation, job, members)
    assert len(events(federation, job, EventKind.UNMASKED)) == 2


def test_wrong_shares_and_nobody_left_to_answer_give_the_attempt_up(federation: Federation) -> None:
    job = federation.start(secured_spec())
    members = enter(federation.sites)
    go(members, through=Step.SURVIVORS)
    members[0].exchange(Step.UNMASK, lie(members[0]))
    take(members[1:], Step.UNMASK)

    until_attempt(federation, job, 2)

    (told,) = events(federation, job, EventKind.ATTEMPT_ABORTED)
    assert told["because"] == "wrong-shares"
    federation.until(lambda: not federation.blobs("updates"))
    anew = enter(federation.sites)
    go(anew)
    assert federation.finish(job).state is JobState.COMPLETED
    assert_published(federation, job, anew)


def test_a_sum_longer_than_the_clip_allows_is_rejected_with_a_sentence(federation: Federation) -> None:
    job = federation.start(secured_spec())
    long = np.full(6, 1 << 23, np.int32)

    go(enter(federation.sites, {1: long}))

    ended = federation.finish(job)
    assert (ended.state, ended.reason) == (JobState.FAILED, JobReason.AGGREGATE_REJECTED)
    assert ended.detail is not None
    assert "clip_norm 1" in ended.detail
    assert all((tensor == 0).all() for tensor in federation.model(job).values())
    assert_forgotten(federation)
