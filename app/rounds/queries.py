"""Reading rounds and what hangs on them; and the locks, in the order of the house."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final, Literal
from uuid import UUID

from sqlalchemy import Select, Text, bindparam, cast, exists, func, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit.service import know_head
from app.errors import NotFound
from app.federation.lifecycle import OFFERED_AGAIN, OPEN_TASKS, RoundState
from app.models import (
    Checkpoint,
    Dataset,
    EventStream,
    Grant,
    Job,
    Ledger,
    Organization,
    Participation,
    Round,
    SecuredAttempt,
    Task,
    Update,
    Worker,
)
from app.models.base import UtcDateTime
from isthmus.wire.datasets import DatasetState
from isthmus.wire.jobs import JobState, ParticipationState
from isthmus.wire.rounds import OPEN_PHASES, RoundPhase, TaskKind, TaskState, TaskView

Lock = Literal["share", "update"] | None


def _locked(statement: Select[Any], lock: Lock) -> Select[Any]:
    if lock is None:
        return statement
    return statement.with_for_update(read=lock == "share").execution_options(populate_existing=True)


async def get_job(session: AsyncSession, job_id: UUID, lock: Lock = None) -> Job:
    """The job, locked if asked.

    Raises:
        NotFound: there is none.
    """
    job = (await session.scalars(_locked(select(Job).where(Job.id == job_id), lock))).one_or_none()
    if not isinstance(job, Job):
        raise NotFound("job", job_id)
    return job


async def get_round(session: AsyncSession, round_id: UUID, lock: Lock = None) -> Round:
    """The round, locked if asked.

    Raises:
        NotFound: there is none.
    """
    found = (await session.scalars(_locked(select(Round).where(Round.id == round_id), lock))).one_or_none()
    if not isinstance(found, Round):
        raise NotFound("round", round_id)
    return found


STREAM: Final = (EventStream.name, EventStream.sequence, EventStream.head_hash)
"""The head of an event stream, for `know_head`."""
OF_JOB: Final = EventStream.name == func.concat("job:", cast(Job.id, Text))
"""Joins a job with its event stream."""
_ROUND_WITH_JOB: Final = (
    select(Job, Round, *STREAM)
    .join(Round, Round.job_id == Job.id)
    .join(EventStream, OF_JOB)
    .where(Round.id == bindparam("round_id"))
    .execution_options(populate_existing=True)
    .suffix_with(text("FOR UPDATE OF jobs, rounds, event_streams"))  # in this order: see `hold_task`
)


async def hold_round(session: AsyncSession, round_id: UUID) -> tuple[Job, Round]:
    """A round and its job, locked alone, the job first, in one statement.

    Raises:
        NotFound: there is none.
    """
    row = (await session.execute(_ROUND_WITH_JOB, {"round_id": round_id})).one_or_none()
    if row is None:
        raise NotFound("round", round_id)
    job, of, stream, sequence, head_hash = row
    know_head(session, stream, sequence, head_hash)
    return job, of


async def find_open_round(session: AsyncSession, job_id: UUID, lock: Lock = None) -> Round | None:
    """The job's one round that is not over, if any."""
    statement = select(Round).where(Round.job_id == job_id, Round.phase.in_(OPEN_PHASES))
    found = (await session.scalars(_locked(statement, lock))).one_or_none()
    return found if isinstance(found, Round) else None


async def get_task(session: AsyncSession, task_id: UUID, worker_id: UUID) -> Task:
    """The task, if it is the worker's.

    Raises:
        NotFound: it is not, or there is none.
    """
    statement = select(Task).where(Task.id == task_id, Task.worker_id == worker_id)
    task = (await session.scalars(statement)).one_or_none()
    if task is None:
        raise NotFound("task", task_id)
    return task


async def find_update(session: AsyncSession, task_id: UUID) -> Update | None:
    """The task's accepted update, if any."""
    return (await session.scalars(_UPDATE, {"task_id": task_id})).one_or_none()


_UPDATE: Final = select(Update).where(Update.task_id == bindparam("task_id"))


@dataclass(frozen=True, slots=True)
class HeldTask:
    """A task and all that stands above and beside it, read together under their locks."""

    job: Job
    of: Round
    task: Task
    participation: Participation
    grant: Grant
    dataset_id: UUID
    dataset: str
    dataset_state: DatasetState
    served_by: UUID
    """The worker that serves the dataset now."""
    ledger_id: UUID
    organization: str


_HELD: Final = (
    select(Job, Round, Task, Participation, Grant, Dataset.id, Dataset.name, Dataset.state)
    .add_columns(Dataset.worker_id, Ledger.id, Organization.name, *STREAM)
    .select_from(Task)
    .join(Job, Job.id == Task.job_id)
    .join(EventStream, OF_JOB)
    .join(Round, Round.id == Task.round_id)
    .join(Participation, Participation.id == Task.participation_id)
    .join(Grant, Grant.participation_id == Participation.id)
    .join(Dataset, Dataset.id == Participation.dataset_id)
    .join(Ledger, Ledger.id == Dataset.ledger_id)
    .join(Organization, Organization.id == Dataset.organization_id)
    .where(Task.id == bindparam("task_id"), Task.worker_id == bindparam("worker_id"))
    .execution_options(populate_existing=True)
)
# Postgres locks a row's tables in the order in which the clauses name them, and then judges the newest versions.
_ADMITTING: Final = _HELD.suffix_with(
    text(
        "FOR SHARE OF jobs, rounds FOR UPDATE OF tasks, participations, grants FOR SHARE OF datasets "
        "FOR NO KEY UPDATE OF ledgers"
    )
)
_ACCEPTING: Final = _HELD.suffix_with(
    text("FOR UPDATE OF jobs, rounds, tasks FOR SHARE OF participations FOR UPDATE OF event_streams")
)


async def hold_task(
    session: AsyncSession, task_id: UUID, worker_id: UUID, purpose: Literal["admit", "accept"]
) -> HeldTask:
    """The worker's task, locked with what decides about it, in the order of the house and in one statement.

    To `admit`, a job and a round are only shared: admissions of one round do not wait for each other; the dataset's
    ledger is locked last. To `accept` or to end a task, job and round are locked alone.

    Raises:
        NotFound: the task is not the worker's, or there is none.
    """
    statement = _ADMITTING if purpose == "admit" else _ACCEPTING
    found = await session.execute(statement, {"task_id": task_id, "worker_id": worker_id})
    row = found.one_or_none()
    if row is None:
        raise NotFound("task", task_id)
    *held, stream, sequence, head_hash = row
    if purpose == "accept":
        know_head(session, stream, sequence, head_hash)
    return HeldTask(*held)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A participation that may be asked now."""

    participation_id: UUID
    organization: str
    dataset: str
    worker_id: UUID
    rounds_left: int


async def list_candidates(session: AsyncSession, job_id: UUID, now: datetime) -> Sequence[Candidate]:
    """Approved participations with a grant that holds at `now`, a confirmed dataset and a worker not revoked."""
    found = await session.execute(_CANDIDATES, {"job_id": job_id, "now": now})
    return [Candidate(*row) for row in found]


_CANDIDATES: Final = (
    select(Participation.id, Organization.name, Dataset.name, Dataset.worker_id, Grant.rounds - Grant.rounds_used)
    .join(Grant, Grant.participation_id == Participation.id)
    .join(Dataset, Dataset.id == Participation.dataset_id)
    .join(Organization, Organization.id == Dataset.organization_id)
    .join(Worker, Worker.id == Dataset.worker_id)
    .where(
        Participation.job_id == bindparam("job_id"),
        Participation.state == ParticipationState.APPROVED,
        Grant.ended_at.is_(None),
        Grant.expires_at > bindparam("now", type_=UtcDateTime()),
        Dataset.state == DatasetState.CONFIRMED,
        Worker.revoked_at.is_(None),
    )
)


async def round_state(session: AsyncSession, job: Job, of: Round, now: datetime) -> RoundState:
    """All that decides what is due for the round, read under its lock."""
    state = RoundState(
        phase=of.phase,
        paused=job.state is JobState.PAUSED,
        accepted=of.accepted,
        target_updates=of.target_updates,
        min_updates=of.min_updates,
        attempt=of.attempt,
        attempts=of.attempts,
        open_tasks=0,
        offered_again=0,
        able=0,
        unasked=0,
        closes_at=of.closes_at,
        uploading_until=None,
    )
    if of.accepted >= of.target_updates:  # that decides alone, whatever its tasks do
        return state
    open_tasks, offered_again, uploading_until = (await session.execute(_TASKS_OF_ROUND, {"round_id": of.id})).one()
    state = replace(
        state,
        open_tasks=open_tasks,
        offered_again=offered_again,
        uploading_until=None if uploading_until is None else min(uploading_until, graced(of)),
    )
    if state.can_be_filled:
        return state
    able = await list_candidates(session, job.id, now)
    return replace(state, able=len(able), unasked=len(await list_unasked(session, of, able)))


_TASKS_OF_ROUND: Final = select(
    func.count().filter(Task.state.in_(OPEN_TASKS)),
    func.count().filter(Task.state.in_(OFFERED_AGAIN)),
    func.max(Task.progress_until).filter(Task.state == TaskState.UPLOADING),
).where(Task.round_id == bindparam("round_id"))


async def list_unasked(session: AsyncSession, of: Round, able: Sequence[Candidate]) -> list[Candidate]:
    """Those of `able` that the round does not ask, and whose grant has a round left for it.

    One whose task was called off (its grant had expired, its worker was revoked) before it brought anything is asked
    again, now that it is able again.
    """
    called_off = (Task.state == TaskState.CANCELLED) & ~exists(select(Update.id).where(Update.task_id == Task.id))
    asked = set(await session.scalars(select(Task.participation_id).where(Task.round_id == of.id, ~called_off)))
    trains = of.kind is TaskKind.TRAIN
    return [item for item in able if item.participation_id not in asked and (item.rounds_left > 0 or not trains)]


def graced(of: Round) -> datetime:
    """The latest moment until which an upload in progress holds the round open."""
    return datetime.fromtimestamp(of.closes_at.timestamp() + of.grace_s, of.closes_at.tzinfo)


@dataclass(frozen=True, slots=True)
class Contribution:
    """An accepted update with the names that order it."""

    update: Update
    organization: str
    dataset: str


async def list_contributions(session: AsyncSession, round_id: UUID) -> list[Contribution]:
    """The round's accepted updates that were not excluded, in canonical order: by names, as code points."""
    found = await session.execute(_CONTRIBUTIONS, {"round_id": round_id})
    contributions = [Contribution(*row) for row in found]
    return sorted(contributions, key=lambda item: (item.organization, item.dataset))


_CONTRIBUTIONS: Final = (
    select(Update, Organization.name, Dataset.name)
    .join(Participation, Participation.id == Update.participation_id)
    .join(Dataset, Dataset.id == Participation.dataset_id)
    .join(Organization, Organization.id == Dataset.organization_id)
    .where(Update.round_id == bindparam("round_id"), Update.excluded.is_(False))
)


async def last_finished_number(session: AsyncSession, job_id: UUID) -> int | None:
    """The number of the job's last completed round; None if there is none."""
    number: int | None = await session.scalar(
        select(func.max(Round.number)).where(Round.job_id == job_id, Round.phase == RoundPhase.COMPLETED)
    )
    return number


async def get_checkpoint(session: AsyncSession, job_id: UUID, digest: str) -> Checkpoint:
    """The newest checkpoint of the job with this digest.

    Raises:
        NotFound: there is none.
    """
    found = await session.scalars(
        select(Checkpoint)
        .where(Checkpoint.job_id == job_id, Checkpoint.digest == digest)
        .order_by(Checkpoint.round_number.desc())
        .limit(1)
    )
    checkpoint = found.one_or_none()
    if checkpoint is None:
        raise NotFound("checkpoint", digest)
    return checkpoint


async def list_waiting_jobs(session: AsyncSession) -> Sequence[UUID]:
    """Jobs that wait for approval: a dataset confirmed anew, or a grant that ended, may have decided them."""
    return (await session.scalars(select(Job.id).where(Job.state == JobState.AWAITING_APPROVAL))).all()


async def list_due_rounds(session: AsyncSession, now: datetime) -> Sequence[tuple[UUID, UUID]]:
    """(job, round) of open rounds of which something may be due: the decision is made again under their locks."""
    open_tasks = select(Task.id).where(Task.round_id == Round.id, Task.state.in_(OPEN_TASKS)).correlate(Round).exists()
    found = await session.execute(
        select(Round.job_id, Round.id)
        .join(Job, Job.id == Round.job_id)
        .outerjoin(SecuredAttempt, SecuredAttempt.round_id == Round.id)
        .where(
            (
                (Round.phase == RoundPhase.COLLECTING)
                & (
                    ((Job.state == JobState.RUNNING) & ((Round.closes_at <= now) | ~open_tasks))
                    | (Round.accepted >= Round.target_updates)
                )
            )
            | (
                Round.phase.in_((RoundPhase.COLLECTING, RoundPhase.SURVIVORS, RoundPhase.UNMASKING))
                & (Job.state == JobState.RUNNING)
                & (SecuredAttempt.step_closes_at <= now)
            )
        )
    )
    return [(job_id, round_id) for job_id, round_id in found]


async def list_tasks(
    session: AsyncSession, round_ids: Sequence[UUID], organization_id: UUID | None = None
) -> dict[UUID, list[TaskView]]:
    """The tasks of rounds as people see them, by round, in canonical order; only one organization's if given."""
    statement = _task_rows().where(Task.round_id.in_(round_ids))
    if organization_id is not None:
        statement = statement.where(Dataset.organization_id == organization_id)
    views: dict[UUID, list[TaskView]] = {round_id: [] for round_id in round_ids}
    for row in await session.execute(statement):
        views[row[0].round_id].append(_task_view(*row))
    for listed in views.values():
        listed.sort(key=lambda view: (view.organization, view.dataset))
    return views


def _task_rows() -> Select[*tuple[Any, ...]]:
    return (
        select(Task, Round.number, Organization.name, Dataset.name, Worker.name)
        .join(Round, Round.id == Task.round_id)
        .join(Participation, Participation.id == Task.participation_id)
        .join(Dataset, Dataset.id == Participation.dataset_id)
        .join(Organization, Organization.id == Dataset.organization_id)
        .join(Worker, Worker.id == Task.worker_id)
    )


def _task_view(task: Task, number: int, organization: str, dataset: str, worker: str) -> TaskView:
    return TaskView(
        id=task.id,
        kind=task.kind,
        state=task.state,
        round_number=number,
        attempt=task.attempt,
        fence=task.fence,
        organization=organization,
        dataset=dataset,
        worker=worker,
        detail=task.detail,
        offered_at=task.offered_at,
        lease_expires_at=task.lease_expires_at,
    )


async def get_task_view(session: AsyncSession, task_id: UUID, worker_id: UUID) -> TaskView:
    """A worker's own task.

    Raises:
        NotFound: it is another's, or there is none.
    """
    found = await session.execute(
        _task_rows().where(Task.id == task_id, Task.worker_id == worker_id).execution_options(populate_existing=True)
    )
    row = found.one_or_none()
    if row is None:
        raise NotFound("task", task_id)
    return _task_view(*row)
