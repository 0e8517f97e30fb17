"""The life of a task before its upload: claim, heartbeat, refuse, fail; and leases that lapse."""

from collections.abc import Sequence
from typing import Any, Final
from uuid import UUID

from procrastinate import App as Queue
from sqlalchemy import (
    Boolean,
    ColumnElement,
    Interval,
    Select,
    bindparam,
    case,
    exists,
    func,
    literal_column,
    select,
    update,
)
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased

from app.audit.service import append, job_stream
from app.database import clock
from app.errors import LeaseLost, TaskNotClaimed, TaskNotOpen
from app.models import (
    Checkpoint,
    Dataset,
    Grant,
    Job,
    Organization,
    Participation,
    Principal,
    Round,
    SecuredAttempt,
    SecuredMember,
    Task,
    Worker,
)
from app.rounds.closing import settle
from app.rounds.queries import get_task, hold_round, hold_task
from app.rounds.specs import manifest_of, manifest_of_task, plan_of, spec_of
from app.settings import Settings
from app.wakeups import announce_change
from isthmus.wire.data import FeatureStatistics
from isthmus.wire.datasets import DatasetState
from isthmus.wire.events import EventKind
from isthmus.wire.jobs import JobState, ParticipationState
from isthmus.wire.rounds import (
    ClaimTask,
    HeartbeatReceipt,
    ModelReference,
    RoundPhase,
    TaskOffer,
    TaskState,
)
from isthmus.wire.secured import SecuredOffer
from isthmus.wire.version import API_PREFIX

TO_CLAIM: Final[ColumnElement[Any]] = literal_column("('offered', 'claimed')")
"""Written out, not bound: a prepared statement then finds the index of the tasks that are in one of these states."""
SOMETHING_ON_OFFER: Final = exists().where(Task.worker_id == Worker.id, Task.state.op("IN")(TO_CLAIM))
"""Whether it is worth while to claim, asked about a `Worker` of the enclosing statement; an index answers it."""


def _claim(*, among: bool) -> Select[Any]:
    """What `claim_task` runs, with or without a choice of datasets; built once, which costs more than to run it."""
    offered = aliased(Task)
    candidate = (
        select(offered.id)
        .join(Job, Job.id == offered.job_id)
        .join(Round, Round.id == offered.round_id)
        .join(Participation, Participation.id == offered.participation_id)
        .join(Dataset, Dataset.id == Participation.dataset_id)
        .join(Worker, Worker.id == offered.worker_id)
        .where(
            offered.worker_id == bindparam("claimant"),  # no name of a column: it would be set
            Worker.revoked_at.is_(None),
            Dataset.worker_id == offered.worker_id,
            Dataset.state == DatasetState.CONFIRMED,
            offered.state.op("IN")(TO_CLAIM),
            (offered.state == TaskState.OFFERED)
            | (bindparam("says", type_=Boolean()) & offered.id.not_in(bindparam("holding", expanding=True))),
            Job.state == JobState.RUNNING,
            Round.phase == RoundPhase.COLLECTING,
            Participation.state == ParticipationState.APPROVED,
        )
        .order_by(offered.offered_at, offered.id)
        .limit(1)
        .with_for_update(of=offered)
    )
    if among:
        candidate = candidate.where(Dataset.name.in_(bindparam("datasets", expanding=True)))
    claimed = (
        update(Task)
        .where(Task.id == candidate.scalar_subquery())
        .values(
            state=TaskState.CLAIMED,
            fence=Task.fence + case((Task.state == TaskState.OFFERED, 0), else_=1),
            lease_expires_at=func.clock_timestamp() + bindparam("lease", type_=Interval()),
        )
        .returning(Task.id, Task.kind, Task.fence, Task.attempt, Task.job_id, Task.round_id, Task.participation_id)
        .cte("claimed")
    )
    return (
        select(claimed, Job, Round, Participation, Grant, Dataset.name, Organization.name, Principal.name, Checkpoint)
        .add_columns(SecuredAttempt.roster_digest, SecuredAttempt.members, SecuredMember.index)
        .join(Job, Job.id == claimed.c.job_id)
        .join(Round, Round.id == claimed.c.round_id)
        .join(Participation, Participation.id == claimed.c.participation_id)
        .outerjoin(Grant, Grant.participation_id == Participation.id)
        .join(Dataset, Dataset.id == Participation.dataset_id)
        .join(Organization, Organization.id == Dataset.organization_id)
        .join(Principal, Principal.id == Job.owner_id)
        .outerjoin(Checkpoint, (Checkpoint.job_id == Job.id) & (Checkpoint.digest == Round.model_digest))
        .outerjoin(SecuredMember, SecuredMember.task_id == claimed.c.id)
        .outerjoin(SecuredAttempt, SecuredAttempt.round_id == SecuredMember.round_id)
        .order_by(Checkpoint.round_number.desc())
        .limit(1)
    )


_CLAIM: Final = _claim(among=False)
_CLAIM_AMONG: Final = _claim(among=True)


async def claim_task(session: AsyncSession, settings: Settings, worker_id: UUID, asked: ClaimTask) -> TaskOffer | None:
    """The worker's oldest offered task, now under a lease; None if nothing is on offer.

    A task that the worker had claimed and says that it does not hold is offered to it again, under the next fence.

    Locks the task alone, and waits for whoever holds it just then: a message that is being refused, say. To skip it
    would be to miss the offer. Two claims never get the same task.
    """
    found = await session.execute(
        _CLAIM if asked.datasets is None else _CLAIM_AMONG,
        {
            "claimant": worker_id,
            "lease": settings.lease,
            "datasets": asked.datasets or (),
            "says": asked.holding is not None,
            "holding": asked.holding or (),
        },
    )
    row = found.one_or_none()
    return None if row is None else _offer(settings, tuple(row))


def _offer(settings: Settings, row: Sequence[Any]) -> TaskOffer:
    *row, roster_digest, members, index = row
    task_id, kind, fence, attempt, *_, job, of, participation, grant, dataset, organization, owner, checkpoint = row
    assert grant is not None, "an approved participation has its grant"
    assert checkpoint is not None, "a round starts from a checkpoint of its job"
    spec = spec_of(job)
    manifest = manifest_of(job)
    return TaskOffer(
        task_id=task_id,
        kind=kind,
        fence=fence,
        lease_s=settings.lease.total_seconds(),
        heartbeat_s=settings.heartbeat.total_seconds(),
        job_id=job.id,
        job=job.name,
        spec=spec,
        spec_digest=job.spec_digest,
        requested_by=owner,
        purpose=grant.purpose,
        grant_expires_at=grant.expires_at,
        grant_rounds=grant.rounds,
        participation_id=participation.id,
        organization=organization,
        dataset=dataset,
        round_number=of.number,
        attempt=attempt,
        closes_at=of.closes_at,
        job_seed=spec.seed or "",  # never empty: the service draws one when the job is created
        model=ModelReference(
            url=f"{API_PREFIX}/checkpoints/{checkpoint.digest}",
            digest=checkpoint.digest,
            size_bytes=checkpoint.size_bytes,
        ),
        model_manifest=manifest,
        upload_manifest=manifest_of_task(job, kind, of.number),
        statistics=None if job.statistics is None else FeatureStatistics.model_validate(job.statistics),
        plan=plan_of(participation),
        secured=None
        if index is None
        else SecuredOffer(round_id=of.id, roster_digest=roster_digest, members=members, index=index),
    )


async def renew_lease(
    session: AsyncSession, settings: Settings, task_id: UUID, worker_id: UUID, fence: int
) -> HeartbeatReceipt:
    """The lease is longer, or the task is not this worker's to work on any more. One statement when all is well.

    A lease that has passed but was not taken away is still valid: only the sweep ends it.
    """
    renewed = await session.execute(
        update(Task)
        .where(
            Task.id == task_id,
            Task.worker_id == worker_id,
            Task.fence == fence,
            Task.state.in_((TaskState.CLAIMED, TaskState.UPLOADING)),
        )
        .values(
            lease_expires_at=func.clock_timestamp() + settings.lease,
        )
        .returning(Task.id)
    )
    lease_s = settings.lease.total_seconds()
    if renewed.scalar_one_or_none() is not None:
        return HeartbeatReceipt(held=True, lease_s=lease_s)
    task = await get_task(session, task_id, worker_id)
    if task.state in (TaskState.CLAIMED, TaskState.UPLOADING, TaskState.OFFERED):
        return HeartbeatReceipt(
            held=False, lease_s=lease_s, reason="The lease was taken away; the task is offered anew."
        )
    return HeartbeatReceipt(held=False, lease_s=lease_s, reason=task.detail or f"The task is {task.state}.")


async def end_task(
    session: AsyncSession,
    queue: Queue,
    *,
    task_id: UUID,
    worker_id: UUID,
    fence: int,
    state: TaskState,
    reason: str,
    actor: str,
) -> None:
    """A worker gives its task up: `REFUSED` is final for the round, `FAILED` may be offered again. Twice is harmless.

    Raises:
        LeaseLost: the fence has moved on.
        TaskNotOpen, TaskNotClaimed: there is nothing to give up.
    """
    held = await hold_task(session, task_id, worker_id, "accept")
    job, of, task = held.job, held.of, held.task
    if task.fence != fence:
        raise LeaseLost
    if task.state is state:
        return
    if task.state is TaskState.OFFERED:
        raise TaskNotClaimed
    if task.state not in (TaskState.CLAIMED, TaskState.UPLOADING):
        raise TaskNotOpen(f"The task is {task.state}: {task.detail or 'it ended before'}.")
    task.state, task.detail, task.lease_expires_at = state, reason, None
    await session.flush()
    now = await clock(session)
    kind = EventKind.TASK_REFUSED if state is TaskState.REFUSED else EventKind.TASK_FAILED
    append(session, job_stream(job.id), kind, at=now, actor=actor, round=of.number, reason=reason)
    if job.state in (JobState.RUNNING, JobState.PAUSED):
        await settle(session, queue, job, of, now)
    await announce_change(session, job.id)


async def list_lapsed(session: AsyncSession) -> Sequence[tuple[UUID, UUID]]:
    """(job, round) of which some lease has passed."""
    found = await session.execute(
        select(Task.job_id, Task.round_id)
        .where(
            Task.state.in_((TaskState.CLAIMED, TaskState.UPLOADING)),
            Task.lease_expires_at <= func.statement_timestamp(),
        )
        .distinct()
    )
    return [(job_id, round_id) for job_id, round_id in found]


async def lapse_leases(session: AsyncSession, job_id: UUID, round_id: UUID) -> int:
    """Take leases away that have passed: each task is offered again under the next fence. How many there were."""
    await hold_round(session, round_id)
    now = await clock(session)
    taken = await session.execute(
        update(Task)
        .where(
            Task.round_id == round_id,
            Task.state.in_((TaskState.CLAIMED, TaskState.UPLOADING)),
            Task.lease_expires_at <= now,
        )
        .values(
            state=TaskState.OFFERED,
            fence=Task.fence + 1,
            offered_at=now,
            lease_expires_at=None,
            detail="The worker's lease ran out; offered again.",
        )
        .returning(Task.id, Task.fence)
    )
    lost = sorted(taken.all())
    for task_id, fence in lost:
        append(session, job_stream(job_id), EventKind.LEASE_LOST, at=now, task_id=str(task_id), fence=fence)
    if lost:
        await announce_change(session, job_id)
    return len(lost)
