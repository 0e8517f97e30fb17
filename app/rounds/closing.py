"""Closing rounds: what is due, the freeze of the set, and the ways in which rounds and jobs end before their time."""

from datetime import datetime, timedelta

from procrastinate import App as Queue
from sqlalchemy import func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit.service import append, job_stream
from app.database import clock
from app.federation.lifecycle import (
    OFFERED_AGAIN,
    OPEN_TASKS,
    JobEvent,
    RoundEvent,
    advance_job,
    advance_round,
    due_event,
)
from app.ledger.pricing import spends_when_summed
from app.models import Dataset, Job, Participation, Round, Task
from app.queue import AGGREGATE_ROUND, defer
from app.rounds.central import forget_inputs
from app.rounds.opening import offer_again, pause_for_want, refill, tell_reopened
from app.rounds.queries import list_contributions, round_state
from app.rounds.specs import spec_of
from app.wakeups import announce_change
from isthmus.wire.events import EventKind
from isthmus.wire.jobs import JobReason
from isthmus.wire.rounds import TaskState


async def settle(session: AsyncSession, queue: Queue, job: Job, of: Round, now: datetime) -> RoundEvent | None:
    """Do what is due for a round, if anything is. Needs the locks of the job and the round; says what was done."""
    event = due_event(await round_state(session, job, of, now), now)
    if event in (RoundEvent.TARGET_REACHED, RoundEvent.DEADLINE_WITH_ENOUGH):
        await _freeze(session, queue, job, of, event, now)
    elif event is RoundEvent.OFFER_MISSING_AGAIN:
        await _offer_again(session, job, of, now)
    elif event is RoundEvent.REFILLED:
        await refill(session, job, of, now)
    elif event is RoundEvent.GRANTS_LACKING:
        of.phase = advance_round(of.phase, event)
        await pause_for_want(session, job, of.min_updates, now)
    elif event is RoundEvent.ATTEMPTS_EXHAUSTED:
        await _exhaust(session, job, of, now)
    return event


async def _freeze(session: AsyncSession, queue: Queue, job: Job, of: Round, event: RoundEvent, now: datetime) -> None:
    """Fix the set and its order; from here on nothing enters and nothing leaves."""
    of.phase = advance_round(of.phase, event)
    of.frozen_at = of.deferred_at = now
    if of.accepted < of.cohort_size:  # else every task brought its update, and none is open
        if event is RoundEvent.TARGET_REACHED:
            await _end_open_tasks(session, of, TaskState.CANCELLED, "The round closed: enough updates were in.")
        else:
            await _end_open_tasks(session, of, TaskState.EXPIRED, "The round closed at its deadline.")
    contributions = await list_contributions(session, of.id)
    for position, contribution in enumerate(contributions):
        contribution.update.position = position
    hidden = spends_when_summed(spec_of(job), of.kind)  # see `accept_update`
    append(
        session,
        job_stream(job.id),
        EventKind.ROUND_FROZEN,
        at=now,
        round=of.number,
        because=event.value,
        updates=[
            {
                "organization": item.organization,
                "dataset": item.dataset,
                "digest": None if hidden else item.update.digest,
                "weight": item.update.weight,
            }
            for item in contributions
        ],
    )
    await defer(session, queue, AGGREGATE_ROUND, round_id=of.id)
    await announce_change(session, job.id, offers=False)


async def _offer_again(session: AsyncSession, job: Job, of: Round, now: datetime) -> None:
    """A new attempt: keeps the updates that are in and the tasks whose worker is alive; offers the others once more."""
    of.phase = advance_round(of.phase, RoundEvent.OFFER_MISSING_AGAIN)
    of.attempt += 1
    of.closes_at = now + timedelta(seconds=spec_of(job).cohort.deadline_s)
    missing = or_(
        Task.state.in_(OFFERED_AGAIN),
        Task.state == TaskState.OFFERED,
        Task.state.in_(OPEN_TASKS) & (Task.lease_expires_at <= now),
    )
    found = await session.execute(
        select(Task, Dataset.worker_id)
        .join(Participation, Participation.id == Task.participation_id)
        .join(Dataset, Dataset.id == Participation.dataset_id)
        .where(Task.round_id == of.id, missing)
        .order_by(Task.id)
        .with_for_update(of=Task)
        .execution_options(populate_existing=True)
    )
    offered = found.all()
    for task, worker_id in offered:
        offer_again(task, of, worker_id, now)
    await tell_reopened(session, job, of, now, offered=len(offered))


async def _exhaust(session: AsyncSession, job: Job, of: Round, now: datetime) -> None:
    """The round cannot be filled, and with it the job fails; the reason names who did not come and why."""
    missing = await session.execute(
        select(Task.state, Task.detail, func.count())
        .where(Task.round_id == of.id, Task.state != TaskState.SUBMITTED)
        .group_by(Task.state, Task.detail)
        .order_by(func.count().desc())
        .limit(5)
    )
    whys = [f"{count} {state.value}" + (f" ({detail})" if detail else "") for state, detail, count in missing]
    detail = (
        f"Round {of.number} has {of.accepted} of at least {of.min_updates} updates after {of.attempt} of {of.attempts} "
        f"attempts; missing: {'; '.join(whys) or 'nobody is left to ask'}."
    )
    await fail(session, job, of, RoundEvent.ATTEMPTS_EXHAUSTED, JobReason.ROUND_FAILED, detail, now)


async def fail(
    session: AsyncSession, job: Job, of: Round, event: RoundEvent, reason: JobReason, detail: str, now: datetime
) -> None:
    """A round that cannot be completed ends its job. Needs the locks of both."""
    of.phase = advance_round(of.phase, event)
    of.detail, of.completed_at = detail, now
    await _forget(session, job, of)
    await _end_open_tasks(session, of, TaskState.CANCELLED, "The round failed.")
    job.state = advance_job(job.state, JobEvent.FAILED)
    job.reason, job.detail, job.ended_at = reason, detail, now
    stream = job_stream(job.id)
    append(session, stream, EventKind.ROUND_FAILED, at=now, round=of.number, because=event.value, detail=detail)
    append(session, stream, EventKind.JOB_FAILED, at=now, reason=reason.value, detail=detail)
    await announce_change(session, job.id)


async def cancel(session: AsyncSession, job: Job, of: Round | None, note: str, actor: str) -> None:
    """End a job at any moment. Needs the job's lock, and that of its open round if there is one."""
    now = await clock(session)
    job.state = advance_job(job.state, JobEvent.CANCELLED)
    job.reason, job.detail, job.ended_at = JobReason.BY_REQUEST, note, now
    stream = job_stream(job.id)
    if of is not None:
        of.phase = advance_round(of.phase, RoundEvent.JOB_CANCELLED)
        of.detail, of.completed_at = "The job was cancelled.", now
        await _forget(session, job, of)
        await _end_open_tasks(session, of, TaskState.CANCELLED, "The job was cancelled.")
        append(session, stream, EventKind.ROUND_CANCELLED, at=now, actor=actor, round=of.number)
    append(session, stream, EventKind.JOB_CANCELLED, at=now, actor=actor, note=note)
    await announce_change(session, job.id)


async def _forget(session: AsyncSession, job: Job, of: Round) -> None:
    """A round that ends before its time keeps no updates that only central noise would have protected, and no key."""
    if spends_when_summed(spec_of(job), of.kind):
        await forget_inputs(session, of)  # their blobs are nobody's then, and collected


async def _end_open_tasks(session: AsyncSession, of: Round, state: TaskState, detail: str) -> None:
    """Nobody works on for nothing: heartbeats of these tasks will say so, and their admissions are refused."""
    await session.execute(
        update(Task)
        .where(Task.round_id == of.id, Task.state.in_(OPEN_TASKS))
        .values(state=state, detail=detail, lease_expires_at=None)
    )
