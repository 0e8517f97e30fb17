"""Putting tasks on offer, and saying so; and what becomes of a job whose round nobody can be asked for."""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from app.audit.service import append, job_stream
from app.federation.lifecycle import JobEvent, advance_job
from app.models import Job, Round, Task
from app.rounds.queries import Candidate, list_candidates
from app.wakeups import announce_change
from isthmus.wire.events import EventKind
from isthmus.wire.jobs import JobReason
from isthmus.wire.rounds import TaskState


def new_task(job_id: UUID, opened: Round, candidate: Candidate, now: datetime) -> Task:
    """A task on offer to the worker of a participation that the round did not ask yet."""
    return Task(
        job_id=job_id,
        round_id=opened.id,
        participation_id=candidate.participation_id,
        worker_id=candidate.worker_id,
        kind=opened.kind,
        attempt=opened.attempt,
        offered_at=now,
    )


def offer_again(task: Task, of: Round, worker_id: UUID, now: datetime) -> None:
    """Put a task back on offer, to the worker that serves its dataset now, under the next fence."""
    task.state, task.worker_id, task.attempt = TaskState.OFFERED, worker_id, of.attempt
    task.fence += 1
    task.offered_at, task.lease_expires_at, task.detail = now, None, None


def ask(session: AsyncSession, of: Round, candidate: Candidate, task: Task | None, now: datetime) -> None:
    """Offer an open round's work to a participation: by the task that it has in it, or by a first one."""
    if task is None:
        session.add(new_task(of.job_id, of, candidate, now))
        of.cohort_size += 1
    else:  # to whichever worker serves the dataset now
        offer_again(task, of, candidate.worker_id, now)


async def tell_reopened(session: AsyncSession, job: Job, of: Round, now: datetime, **what: Any) -> None:
    """Record that an open round has tasks on offer again, and wake whom it concerns."""
    append(
        session,
        job_stream(job.id),
        EventKind.ROUND_REOPENED,
        at=now,
        round=of.number,
        attempt=of.attempt,
        kept=of.accepted,
        **what,
    )
    await announce_change(session, job.id)


async def pause_for_want(session: AsyncSession, job: Job, needed: int, now: datetime) -> None:
    """Pause a job whose next, or open, round cannot be filled for want of grants. Needs the job's lock."""
    present = len(await list_candidates(session, job.id, now))
    job.state = advance_job(job.state, JobEvent.PAUSED)
    job.reason, job.paused_at = JobReason.TOO_FEW_PARTICIPATIONS, now
    job.detail = (
        f"The round needs {needed} participations; {present} are approved and able to take part. Get more, then resume."
    )
    append(session, job_stream(job.id), EventKind.JOB_PAUSED, at=now, reason=job.reason.value, detail=job.detail)
    await announce_change(session, job.id)
