"""Closing rounds: what is due, and the freeze of the set."""

from datetime import datetime, timedelta

from procrastinate import App as Queue
from sqlalchemy import or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit.service import append, job_stream
from app.federation.lifecycle import OFFERED_AGAIN, OPEN_TASKS, RoundEvent, advance_round, due_event
from app.ledger.pricing import noises_the_sum
from app.models import Dataset, Job, Participation, Round, Task
from app.queue import AGGREGATE_ROUND, defer
from app.rounds.ending import end_open_tasks, exhaust
from app.rounds.offering import offer_again, pause_for_want, tell_reopened
from app.rounds.opening import refill
from app.rounds.queries import list_contributions, round_state
from app.rounds.secured.closing import settle_secured
from app.rounds.specs import is_secured, spec_of
from app.wakeups import announce_change
from isthmus.wire.events import EventKind
from isthmus.wire.rounds import TaskState


async def settle(session: AsyncSession, queue: Queue, job: Job, of: Round, now: datetime) -> RoundEvent | None:
    """Do what is due for a round, if anything is. Needs the locks of the job and the round; says what was done."""
    if is_secured(job, of.kind):
        return await settle_secured(session, queue, job, of, now)
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
        await exhaust(session, job, of, now)
    return event


async def _freeze(session: AsyncSession, queue: Queue, job: Job, of: Round, event: RoundEvent, now: datetime) -> None:
    """Fix the set and its order; from here on nothing enters and nothing leaves."""
    of.phase = advance_round(of.phase, event)
    of.frozen_at = of.deferred_at = now
    if of.accepted < of.cohort_size:  # else every task brought its update, and none is open
        if event is RoundEvent.TARGET_REACHED:
            await end_open_tasks(session, of, TaskState.CANCELLED, "The round closed: enough updates were in.")
        else:
            await end_open_tasks(session, of, TaskState.EXPIRED, "The round closed at its deadline.")
    contributions = await list_contributions(session, of.id)
    for position, contribution in enumerate(contributions):
        contribution.update.position = position
    hidden = noises_the_sum(spec_of(job), of.kind)  # see `accept_update`
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
