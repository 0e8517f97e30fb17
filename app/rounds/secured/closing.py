"""What is due for a secured round: its steps close, its set is frozen, its attempt is given up and begun anew."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Final

from procrastinate import App as Queue
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit.service import append, job_stream
from app.errors import BudgetExhausted
from app.federation.lifecycle import OPEN_TASKS, RoundEvent, advance_round
from app.federation.secured_lifecycle import AbortReason, SecuredState, abort_reason, due_secured_event, may_shrink
from app.ledger.pricing import spends_when_summed
from app.models import Job, Round, SecuredAttempt, SecuredMember, Task, Update
from app.queue import AGGREGATE_ROUND, defer
from app.rounds.ending import end_open_tasks, fail
from app.rounds.offering import pause_for_want
from app.rounds.secured.again import LEFT_BEHIND, begin_again, who_again, who_stays
from app.rounds.secured.giving_up import give_round_up, tell_aborted
from app.rounds.secured.queries import among, get_attempt, list_places, names_of, read_standing
from app.rounds.secured.spending import spend_for_survivors
from app.rounds.specs import spec_of
from app.wakeups import announce_change, announce_step
from isthmus.wire.events import EventKind
from isthmus.wire.jobs import JobReason
from isthmus.wire.rounds import OPEN_PHASES, RoundPhase, TaskState
from isthmus.wire.secured import Step

LIAR_COSTS: Final = 2
"""Answers that one wrong one costs: with so many more than the threshold it is found and left out."""


async def settle_secured(session: AsyncSession, queue: Queue, job: Job, of: Round, now: datetime) -> RoundEvent | None:
    """Do what is due for a secured round, if anything is. Needs the locks of the job and the round."""
    if of.phase not in OPEN_PHASES or of.phase is RoundPhase.AGGREGATING:
        return None
    attempt = await get_attempt(session, of.id)
    standing = await read_standing(session, job, of, attempt)
    return await settle_standing(session, queue, job, of, attempt, standing.state, now)


async def settle_standing(
    session: AsyncSession,
    queue: Queue,
    job: Job,
    of: Round,
    attempt: SecuredAttempt,
    state: SecuredState,
    now: datetime,
) -> RoundEvent | None:
    """The same, for a round of which it was read how it stands."""
    because, anew = abort_reason(state, now), None
    if may_shrink(state, now):
        anew = await who_stays(session, job, of, now)
        state = replace(state, staying=len(anew.asked))
    if because is not None and state.staying < state.min_updates:
        anew = await who_again(session, job, of, attempt, now)
        state = replace(state, again=len(anew.asked), able=anew.able)
    event = due_secured_event(state, now)
    if event in (RoundEvent.KEYS_CLOSED, RoundEvent.SHARES_CLOSED):
        await _close_early_step(session, job, of, attempt, event, now)
    elif event is RoundEvent.SURVIVORS_FIXED:
        await _freeze(session, job, of, attempt, state, now)
    elif event is RoundEvent.SURVIVORS_SIGNED:
        await _open_unmasking(session, job, of, attempt, now)
    elif event is RoundEvent.UNMASKED:
        await _begin_aggregation(session, queue, job, of, now)
    elif event in (RoundEvent.ROSTER_SHRUNK, RoundEvent.ATTEMPT_ABORTED):
        assert anew is not None, "asked for above"
        await tell_aborted(session, job, of, attempt, because or AbortReason.KEYS, now)
        await begin_again(session, job, of, attempt, event, anew, now)
    elif event is RoundEvent.GRANTS_LACKING:
        of.phase = advance_round(of.phase, event)
        await pause_for_want(session, job, of.min_updates, now)
    elif event is RoundEvent.ATTEMPTS_EXHAUSTED:
        assert because is not None, "there is no other cause"
        assert anew is not None, "asked for above"
        await give_round_up(session, job, of, attempt, because, anew, now)
    return event


async def _close_early_step(
    session: AsyncSession, job: Job, of: Round, attempt: SecuredAttempt, event: RoundEvent, now: datetime
) -> None:
    """Close `keys` or `shares`: whoever's message is missing has left the attempt."""
    step = attempt.step
    of.phase = advance_round(of.phase, event)
    places = await list_places(session, of.id, step)
    asked = range(attempt.members) if attempt.keyed is None else attempt.keyed
    stay = [place.index for place in places if place.sent and place.open and place.index in asked]
    if len(stay) < len(asked):
        gone = select(SecuredMember.task_id).where(SecuredMember.round_id == of.id, ~among(stay))
        await session.execute(
            update(Task)
            .where(Task.id.in_(gone), Task.state.in_(OPEN_TASKS))
            .values(state=TaskState.EXPIRED, detail=LEFT_BEHIND.format(step=step.value), lease_expires_at=None)
        )
    if step is Step.KEYS:
        kind, attempt.keyed, attempt.step = EventKind.KEYS_CLOSED, stay, Step.SHARES
        attempt.step_closes_at = now + _step(job)
    else:
        kind, attempt.shared, attempt.step = EventKind.SHARES_CLOSED, stay, Step.UPDATE
        attempt.step_closes_at = None
    missing = sorted(set(asked).difference(stay))
    _tell(session, job, of, kind, now, members=names_of(places, stay), missing=names_of(places, missing))
    await _announce(session, job, of)


async def _freeze(
    session: AsyncSession, job: Job, of: Round, attempt: SecuredAttempt, state: SecuredState, now: datetime
) -> None:
    """Fix the set and its order; from here on nothing enters and nothing leaves but by a new attempt."""
    of.phase = advance_round(of.phase, RoundEvent.SURVIVORS_FIXED)
    of.frozen_at = now
    reached = state.arrived >= state.target
    if state.awaited and reached:
        await end_open_tasks(session, of, TaskState.CANCELLED, "The round closed: enough updates were in.")
    elif state.awaited:
        await end_open_tasks(session, of, TaskState.EXPIRED, "The round closed at its deadline.")
    found = await session.execute(
        select(Update, SecuredMember.index, SecuredMember.organization, SecuredMember.dataset)
        .join(SecuredMember, SecuredMember.task_id == Update.task_id)
        .where(Update.round_id == of.id, Update.excluded.is_(False))
        .order_by(SecuredMember.index)
    )
    rows = found.all()
    for position, (accepted, *_) in enumerate(rows):
        accepted.position = position
    attempt.survivors, attempt.step = [index for _, index, _, _ in rows], Step.SURVIVORS
    attempt.step_closes_at = now + _step(job)
    _tell(
        session,
        job,
        of,
        EventKind.ROUND_FROZEN,
        now,
        because=(RoundEvent.TARGET_REACHED if reached else RoundEvent.DEADLINE_WITH_ENOUGH).value,
        updates=[
            {
                "organization": organization,
                "dataset": dataset,
                "digest": accepted.digest,
                "weight": accepted.weight,
            }
            for accepted, _, organization, dataset in rows
        ],
    )
    await _announce(session, job, of)


async def _open_unmasking(session: AsyncSession, job: Job, of: Round, attempt: SecuredAttempt, now: datetime) -> None:
    """Enough signed the one set: spend for it where that is still to be done, and have the sum unmasked."""
    if spends_when_summed(spec_of(job), of.kind):
        try:
            async with session.begin_nested():
                await spend_for_survivors(session, job, of)
        except BudgetExhausted as refusal:
            detail = f"The updates of round {of.number} cannot be summed: {refusal.detail}"
            await fail(session, job, of, RoundEvent.AGGREGATE_REJECTED, JobReason.AGGREGATE_REJECTED, detail, now)
            return
    of.phase = advance_round(of.phase, RoundEvent.SURVIVORS_SIGNED)
    places = await list_places(session, of.id, Step.SURVIVORS)
    attempt.signed, attempt.step = [place.index for place in places if place.sent], Step.UNMASK
    attempt.step_closes_at = now + timedelta(seconds=spec_of(job).cohort.deadline_s)
    missing = sorted(set(attempt.survivors or ()).difference(attempt.signed))
    members = names_of(places, attempt.signed)
    _tell(session, job, of, EventKind.SURVIVORS_SIGNED, now, members=members, missing=names_of(places, missing))
    await _announce(session, job, of)


async def _begin_aggregation(session: AsyncSession, queue: Queue, job: Job, of: Round, now: datetime) -> None:
    """Enough told their shares: have the sum unmasked, off the event loop."""
    attempt = await get_attempt(session, of.id)
    of.phase = advance_round(of.phase, RoundEvent.UNMASKED)
    of.deferred_at = now
    places = await list_places(session, of.id, Step.UNMASK)
    told = [place.index for place in places if place.sent]
    missing = sorted(set(attempt.survivors or ()).difference(told))
    members = names_of(places, told)
    _tell(session, job, of, EventKind.UNMASKED, now, members=members, missing=names_of(places, missing))
    await defer(session, queue, AGGREGATE_ROUND, round_id=of.id)
    await _announce(session, job, of)


async def ask_for_more(
    session: AsyncSession, queue: Queue, job: Job, of: Round, *, answers: int, suspects: Sequence[int], now: datetime
) -> None:
    """Shares that were in do not fit together: wait for two answers more than there were. Needs the round's lock.

    A liar costs two answers: its own, and one to find out which one it is. Two are not waited for where there is only
    one left. What has come meanwhile may do at once; where nobody is left to answer, the attempt is given up.
    """
    attempt = await get_attempt(session, of.id)
    of.phase = advance_round(of.phase, RoundEvent.SHARES_WRONG)
    survivors = len(attempt.survivors or ())
    attempt.answers_needed = min(answers + LIAR_COSTS, max(survivors, answers + 1))
    attempt.answers_tried, attempt.progress = answers, None
    attempt.step_closes_at = now + timedelta(seconds=spec_of(job).cohort.deadline_s)
    named = names_of(await list_places(session, of.id, Step.UNMASK), suspects)
    attempt.suspects = sorted({*(attempt.suspects or ()), *named})
    _tell(
        session,
        job,
        of,
        EventKind.SHARES_WRONG,
        now,
        suspects=named,
        answers=answers,
        answers_needed=attempt.answers_needed,
    )
    await settle_secured(session, queue, job, of, now)
    await announce_change(session, job.id, offers=False)


def _step(job: Job) -> timedelta:
    secured = spec_of(job).secure_aggregation
    assert secured is not None, "asked only for secured rounds"
    return timedelta(seconds=secured.step_s)


def _tell(session: AsyncSession, job: Job, of: Round, kind: EventKind, now: datetime, **data: Any) -> None:
    append(session, job_stream(job.id), kind, at=now, round=of.number, attempt=of.attempt, **data)


async def _announce(session: AsyncSession, job: Job, of: Round) -> None:
    """Wake who waits for the step, and who watches the job."""
    await announce_step(session, of.id)
    await announce_change(session, job.id, offers=False)
