"""The ways in which rounds and jobs end before their time, and what is forgotten when a round is over."""

from datetime import datetime

from sqlalchemy import delete, func, literal, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit.service import append, job_stream
from app.database import clock
from app.federation.lifecycle import OPEN_TASKS, JobEvent, RoundEvent, advance_job, advance_round
from app.ledger.pricing import noises_the_sum
from app.models import DiscardedBlob, Job, Round, SecuredAttempt, SecuredMember, Task, Update
from app.models.base import UtcDateTime
from app.rounds.specs import is_secured, spec_of
from app.wakeups import announce_change, announce_step
from isthmus.wire.events import EventKind
from isthmus.wire.jobs import JobReason
from isthmus.wire.rounds import TaskState


async def exhaust(session: AsyncSession, job: Job, of: Round, now: datetime) -> None:
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
    await end_open_tasks(session, of, TaskState.CANCELLED, "The round failed.")
    await forget_inputs(session, job, of, now)
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
        await end_open_tasks(session, of, TaskState.CANCELLED, "The job was cancelled.")
        await forget_inputs(session, job, of, now)
        append(session, stream, EventKind.ROUND_CANCELLED, at=now, actor=actor, round=of.number)
    append(session, stream, EventKind.JOB_CANCELLED, at=now, actor=actor, note=note)
    await announce_change(session, job.id)


async def end_open_tasks(session: AsyncSession, of: Round, state: TaskState, detail: str) -> None:
    """Nobody works on for nothing: heartbeats of these tasks will say so, and their admissions are refused."""
    await session.execute(
        update(Task)
        .where(Task.round_id == of.id, Task.state.in_(OPEN_TASKS))
        .values(state=state, detail=detail, lease_expires_at=None)
    )


async def forget_inputs(session: AsyncSession, job: Job, of: Round, now: datetime) -> list[str]:
    """Let go of what was summed, where it must not be kept; keys of blobs that go once this is committed.

    Un-noised updates and the key of the noise: with either, central noise could be taken away again. Masked updates
    and the messages that unmask: with both, and enough members' help, a single one could be opened. Digests stay.
    """
    noised, secured = noises_the_sum(spec_of(job), of.kind), is_secured(job, of.kind)
    if not noised and not secured:
        return []
    discarded = await discard_updates(session, of, now)
    if noised:
        await session.execute(update(Round).where(Round.id == of.id).values(noise_key=None))
    if secured:
        await forget_attempt(session, of)
    return discarded


async def discard_updates(session: AsyncSession, of: Round, now: datetime) -> list[str]:
    """Have the blobs of a round's updates deleted once this is committed, by whoever comes first; their keys."""
    found = await session.scalars(
        insert(DiscardedBlob)
        .from_select(
            ["key", "discarded_at"],
            select(Update.blob_key, literal(now, UtcDateTime())).where(
                Update.round_id == of.id, Update.blob_key.is_not(None)
            ),
        )
        .on_conflict_do_nothing()
        .returning(DiscardedBlob.key)
    )
    keys = list(found)
    # So they are discarded once: an update that was excluded outlives the attempt that it was in.
    await session.execute(update(Update).where(Update.round_id == of.id).values(blob_key=None))
    return keys


async def forget_attempt(session: AsyncSession, of: Round) -> None:
    """Delete the roster and the messages of a secured round's attempt, and tell those who wait for its steps."""
    await session.execute(delete(SecuredMember).where(SecuredMember.round_id == of.id))
    await session.execute(delete(SecuredAttempt).where(SecuredAttempt.round_id == of.id))
    await announce_step(session, of.id)
