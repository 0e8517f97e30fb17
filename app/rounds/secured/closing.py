"""What is due for a secured round: its steps close, its set is frozen, its attempt is given up and begun anew."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Final

from procrastinate import App as Queue
from sqlalchemy import delete, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit.service import append, job_stream
from app.errors import BudgetExhausted
from app.federation.lifecycle import OPEN_TASKS, RoundEvent, advance_round
from app.federation.secured_lifecycle import AbortReason, SecuredState, abort_reason, due_secured_event
from app.ledger.pricing import spends_when_summed
from app.models import Job, Round, SecuredAttempt, SecuredMember, Task, Update
from app.queue import AGGREGATE_ROUND, defer
from app.rounds.ending import discard_updates, end_open_tasks, exhaust, fail, forget_attempt
from app.rounds.offering import new_task, offer_again, pause_for_want, tell_reopened
from app.rounds.queries import Candidate, list_candidates, list_unasked
from app.rounds.secured.opening import open_attempt
from app.rounds.secured.queries import among, get_attempt, list_places, names_of, read_standing
from app.rounds.secured.spending import spend_for_survivors
from app.rounds.specs import spec_of
from app.wakeups import announce_change, announce_step
from isthmus.wire.events import EventKind
from isthmus.wire.jobs import JobReason
from isthmus.wire.rounds import OPEN_PHASES, RoundPhase, TaskState
from isthmus.wire.secured import LARGEST_COHORT, Step

LEFT_BEHIND: Final = (
    "The step {step} closed without this participation: its message had not come. It is asked again if there is a new "
    "attempt, and in the next round."
)


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
    because = abort_reason(state, now)
    again: list[_Asked] = []
    if because is not None:
        again, able = await _who_again(session, job, of, now)
        state = replace(state, again=len(again), able=able)
    event = due_secured_event(state, now)
    if event in (RoundEvent.KEYS_CLOSED, RoundEvent.SHARES_CLOSED):
        await _close_early_step(session, job, of, attempt, event, now)
    elif event is RoundEvent.SURVIVORS_FIXED:
        await _freeze(session, job, of, attempt, state, now)
    elif event is RoundEvent.SURVIVORS_SIGNED:
        await _open_unmasking(session, job, of, attempt, now)
    elif event is RoundEvent.UNMASKED:
        await _begin_aggregation(session, queue, job, of, now)
    elif event is RoundEvent.ATTEMPT_ABORTED:
        assert because is not None, "asked for above"
        await _begin_again(session, job, of, attempt, because, again, now)
    elif event is RoundEvent.GRANTS_LACKING:
        of.phase = advance_round(of.phase, event)
        await pause_for_want(session, job, of.min_updates, now)
    elif event is RoundEvent.ATTEMPTS_EXHAUSTED:
        assert because is not None, "asked for above"
        await _tell_aborted(session, job, of, attempt, because, now)
        told = f"the last one ended with {because.value.replace('-', ' ')}; "
        await exhaust(session, job, of, now, why=told)
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
    """Shares that were in do not fit together: wait for one answer more than there were. Needs the round's lock.

    What has come meanwhile may do at once; where nobody is left to answer, the attempt is given up.
    """
    attempt = await get_attempt(session, of.id)
    of.phase = advance_round(of.phase, RoundEvent.SHARES_WRONG)
    attempt.answers_needed, attempt.progress = answers + 1, None
    attempt.step_closes_at = now + timedelta(seconds=spec_of(job).cohort.deadline_s)
    places = await list_places(session, of.id, Step.UNMASK)
    _tell(
        session,
        job,
        of,
        EventKind.SHARES_WRONG,
        now,
        suspects=names_of(places, suspects),
        answers=answers,
        answers_needed=attempt.answers_needed,
    )
    await settle_secured(session, queue, job, of, now)
    await announce_change(session, job.id, offers=False)


_SAID_NO: Final = (TaskState.REFUSED, TaskState.CANCELLED)
_Asked = tuple[Candidate, Task | None]
"""Who is asked in a new attempt, and by which task; None: it is not asked in this round yet."""


async def _who_again(session: AsyncSession, job: Job, of: Round, now: datetime) -> tuple[list[_Asked], int]:
    """Who would be asked in a new attempt, and how many may be asked at all.

    All that the round asked, that did not say no and that may be asked now; where they are too few, all others too.
    """
    candidates = {item.participation_id: item for item in await list_candidates(session, job.id, now)}
    found = await session.scalars(
        select(Task)
        .where(Task.round_id == of.id)
        .order_by(Task.id)
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    tasks = {task.participation_id: task for task in found}
    again: list[_Asked] = [
        (candidates[participation_id], task)
        for participation_id, task in tasks.items()
        if task.state not in _SAID_NO
        and participation_id in candidates
        and _has_a_round(candidates[participation_id], task)
    ]
    if len(again) < of.min_updates:
        others = await list_unasked(session, of, list(candidates.values()))
        room = LARGEST_COHORT - len(again)
        again += [(item, tasks.get(item.participation_id)) for item in others][:room]
    return again, len(candidates)


def _has_a_round(candidate: Candidate, task: Task) -> bool:
    """Whether the grant has a round left, or this one was taken from it before."""
    return candidate.rounds_left > 0 or task.admitted_digest is not None


async def _begin_again(
    session: AsyncSession,
    job: Job,
    of: Round,
    attempt: SecuredAttempt,
    because: AbortReason,
    again: Sequence[_Asked],
    now: datetime,
) -> None:
    """Give the attempt up, delete all that came in, and begin a new one: new keys, and whoever may be asked now."""
    await _tell_aborted(session, job, of, attempt, because, now)
    of.phase = advance_round(of.phase, RoundEvent.ATTEMPT_ABORTED)
    await discard_updates(session, of, now)
    await session.execute(delete(Update).where(Update.round_id == of.id, Update.excluded.is_(False)))
    await forget_attempt(session, of)
    of.attempt += 1
    of.accepted, of.frozen_at, of.deferred_at = 0, None, None
    of.closes_at = now + timedelta(seconds=spec_of(job).cohort.deadline_s)
    offered = {task.id for _, task in again if task is not None}
    await session.execute(
        update(Task)
        .where(Task.round_id == of.id, Task.id.not_in(offered), Task.state.not_in(_SAID_NO))
        .values(state=TaskState.CANCELLED, detail="It may not be asked any more.", lease_expires_at=None)
    )
    for candidate, task in again:
        if task is None:
            session.add(new_task(job.id, of, candidate, now))
            of.cohort_size += 1
        else:  # to whichever worker serves the dataset now
            offer_again(task, of, candidate.worker_id, now)
    await session.flush()
    await open_attempt(session, job, of, now)
    await tell_reopened(session, job, of, now, offered=len(again))


async def _tell_aborted(
    session: AsyncSession, job: Job, of: Round, attempt: SecuredAttempt, because: AbortReason, now: datetime
) -> None:
    places = await list_places(session, of.id, attempt.step)
    stage = stage_of(attempt)
    missing = [place.index for place in places if place.index in stage and not place.sent]
    _tell(
        session,
        job,
        of,
        EventKind.ATTEMPT_ABORTED,
        now,
        step=attempt.step.value,
        because=because.value,
        missing=names_of(places, missing),
    )


def stage_of(attempt: SecuredAttempt) -> Sequence[int]:
    """The members that the present step is for."""
    if attempt.step is Step.KEYS:
        return range(attempt.members)
    if attempt.step is Step.SHARES:
        return attempt.keyed or ()
    return (attempt.shared if attempt.step is Step.UPDATE else attempt.survivors) or ()


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
