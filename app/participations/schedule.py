"""What time, or somebody else's change, ends: grants that have passed, tasks that nobody can bring any more.

Every piece is its own transaction, driven by the coordinator's sweep, and takes its locks in the order of the house.
"""

from collections.abc import Sequence
from typing import Final
from uuid import UUID

from procrastinate import App as Queue
from sqlalchemy import ColumnElement, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit.service import append, job_stream
from app.database import clock
from app.federation.lifecycle import OPEN_TASKS
from app.models import Dataset, Grant, Participation, Task, Worker
from app.participations.service import cancel_tasks, end_grant, lock_with_tasks, name_of
from app.rounds.closing import settle
from app.rounds.offering import offer_again
from app.rounds.queries import find_open_round, get_job, get_round
from app.rounds.specs import is_secured
from app.wakeups import announce_change
from isthmus.wire.datasets import DatasetState
from isthmus.wire.events import EventKind
from isthmus.wire.jobs import JobState, ParticipationState
from isthmus.wire.rounds import TaskState

HANDED_ON: Final = "The dataset was handed on to another worker, which is asked if there is a new attempt."


async def list_expired(session: AsyncSession) -> Sequence[tuple[UUID, UUID]]:
    """(job, participation) of grants whose time has passed."""
    found = await session.execute(
        select(Participation.job_id, Participation.id)
        .join(Grant, Grant.participation_id == Participation.id)
        # clock_timestamp() may differ from row to row, so that Postgres would not look into an index with it.
        .where(Grant.ended_at.is_(None), Grant.expires_at <= func.statement_timestamp())
        .order_by(Participation.job_id, Participation.id)
    )
    return [(job_id, participation_id) for job_id, participation_id in found]


async def expire_grant(session: AsyncSession, queue: Queue, job_id: UUID, participation_id: UUID) -> None:
    """End a grant whose time has passed: its open tasks are cancelled; updates that came in time stay."""
    job = await get_job(session, job_id, "update")
    of = await find_open_round(session, job_id, "update")
    participation = await lock_with_tasks(session, participation_id)
    now = await clock(session)
    if participation.state is not ParticipationState.APPROVED:
        await end_grant(session, participation, participation.state, participation.detail, now)
        return
    name = await name_of(session, participation)
    await end_grant(session, participation, ParticipationState.EXPIRED, "The grant's time has passed.", now)
    await cancel_tasks(session, [participation.id], "The grant has expired.")
    append(session, job_stream(job_id), EventKind.PARTICIPATION_EXPIRED, at=now, dataset=name)
    if of is not None and job.state in (JobState.RUNNING, JobState.PAUSED):
        await session.flush()
        await settle(session, queue, job, of, now)
    await announce_change(session, job_id)


def _stranded() -> ColumnElement[bool]:
    """Of a task joined with its dataset and worker: nobody can, or may, bring its update any more."""
    return (Worker.revoked_at.is_not(None)) | (Dataset.state != DatasetState.CONFIRMED)


def _handed_on() -> ColumnElement[bool]:
    """Of a task joined with its dataset and worker: another worker serves the dataset now, and may bring the update."""
    return (Task.worker_id != Dataset.worker_id) & ~_stranded()


async def list_stranded(session: AsyncSession) -> Sequence[tuple[UUID, UUID]]:
    """(job, round) with open tasks of revoked workers, of datasets not confirmed any more, or now served by others."""
    found = await session.execute(
        select(Task.job_id, Task.round_id)
        .join(Worker, Worker.id == Task.worker_id)
        .join(Participation, Participation.id == Task.participation_id)
        .join(Dataset, Dataset.id == Participation.dataset_id)
        .where(Task.state.in_(OPEN_TASKS), _stranded() | _handed_on())
        .distinct()
    )
    return [(job_id, round_id) for job_id, round_id in found]


async def release_stranded(session: AsyncSession, queue: Queue, job_id: UUID, round_id: UUID) -> None:
    """Cancel tasks of revoked workers and of datasets that are not confirmed: the round goes on without them.

    Tasks of a dataset that was handed on are offered to the worker that serves it now. It took the records of what was
    released over with the dataset: what was admitted, it hands in with the same bytes. Under secure aggregation it has
    another identity than the one in the roster, and is asked in the next attempt.
    """
    job = await get_job(session, job_id, "update")
    of = await get_round(session, round_id, "update")
    stranded = (
        select(Task.id)
        .join(Worker, Worker.id == Task.worker_id)
        .join(Participation, Participation.id == Task.participation_id)
        .join(Dataset, Dataset.id == Participation.dataset_id)
        .where(Task.round_id == round_id, Task.state.in_(OPEN_TASKS), _stranded())
    )
    await session.execute(
        update(Task)
        .where(Task.id.in_(stranded))
        .values(
            state=TaskState.CANCELLED,
            detail="The worker was revoked, or the dataset is not confirmed any more.",
            lease_expires_at=None,
        )
    )
    now = await clock(session)
    handed_on = await session.execute(
        select(Task, Dataset.worker_id)
        .join(Worker, Worker.id == Task.worker_id)
        .join(Participation, Participation.id == Task.participation_id)
        .join(Dataset, Dataset.id == Participation.dataset_id)
        .where(Task.round_id == round_id, Task.state.in_(OPEN_TASKS), _handed_on())
        .order_by(Task.id)
        .with_for_update(of=Task)
        .execution_options(populate_existing=True)
    )
    for task, worker_id in handed_on.all():
        if is_secured(job, of.kind):  # it is in the roster under the other worker's identity
            task.state, task.detail, task.lease_expires_at = TaskState.EXPIRED, HANDED_ON, None
            continue
        held = task.state is not TaskState.OFFERED
        offer_again(task, of, worker_id, now)
        if held:
            append(session, job_stream(job_id), EventKind.LEASE_LOST, at=now, task_id=str(task.id), fence=task.fence)
    await session.flush()
    if job.state in (JobState.RUNNING, JobState.PAUSED):
        await settle(session, queue, job, of, now)
    await announce_change(session, job_id)
