"""Reading jobs, their rounds, metrics and checkpoints, as far as the caller may see them."""

from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, exists, select, true
from sqlalchemy.ext.asyncio import AsyncSession

from app.dependencies import Caller
from app.errors import NotFound
from app.federation.pooling import site_metrics
from app.models import Checkpoint, Dataset, Grant, Job, Organization, Participation, Principal, Round, Task, Update
from app.pagination import Paging, paginate
from app.rounds.queries import find_open_round, list_tasks
from app.rounds.secured.views import list_secured
from isthmus.wire.base import Page
from isthmus.wire.data import FeatureStatistics
from isthmus.wire.jobs import JobSpec, JobState, JobView
from isthmus.wire.manifest import Manifest
from isthmus.wire.organizations import Role
from isthmus.wire.privacy import NoisePlace
from isthmus.wire.rounds import OPEN_PHASES, CheckpointView, RoundMetrics, RoundView, SiteMetrics, TaskKind, UpdateView


def visible_to(caller: Caller) -> ColumnElement[bool]:
    """Admins see all jobs, researchers their own, stewards those that ask for a dataset of theirs."""
    if caller.role is Role.ADMIN:
        return true()
    if caller.role is Role.RESEARCHER:
        return Job.owner_id == caller.principal_id
    asked = (
        select(Participation.id)
        .join(Dataset, Dataset.id == Participation.dataset_id)
        .where(Participation.job_id == Job.id, Dataset.organization_id == caller.organization_id)
    )
    return exists(asked)


def open_to(caller: Caller) -> ColumnElement[bool]:
    """Whose models and records may be read: as `visible_to`, but a steward's only where it said yes once.

    Being asked is not being part of it: who refuses a job sees what is asked, and not what the others answered.
    """
    if caller.role is not Role.STEWARD:
        return visible_to(caller)
    granted = (
        select(Grant.id)
        .join(Participation, Participation.id == Grant.participation_id)
        .join(Dataset, Dataset.id == Participation.dataset_id)
        .where(Participation.job_id == Job.id, Dataset.organization_id == caller.organization_id)
    )
    return exists(granted)


def _own(caller: Caller) -> UUID | None:
    """The one organization whose tasks, updates and results the caller may see; None: all of them."""
    return caller.organization_id if caller.role is Role.STEWARD else None


async def require_open(session: AsyncSession, caller: Caller, job_id: UUID) -> None:
    """Whether the caller may read the job's models and its record.

    Raises:
        NotFound: missing, another's, or of a job that the steward never granted anything.
    """
    if await session.scalar(select(Job.id).where(Job.id == job_id, open_to(caller))) is None:
        raise NotFound("job", job_id)


async def require_visible(session: AsyncSession, caller: Caller, job_id: UUID) -> None:
    """Whether the caller may see the job.

    Raises:
        NotFound: missing, or another's.
    """
    if await session.scalar(select(Job.id).where(Job.id == job_id, visible_to(caller))) is None:
        raise NotFound("job", job_id)


async def get_job_view(session: AsyncSession, caller: Caller, job_id: UUID) -> JobView:
    """One job.

    Raises:
        NotFound: missing, or another's.
    """
    found = await session.execute(
        select(Job, Principal.name)
        .join(Principal, Principal.id == Job.owner_id)
        .where(Job.id == job_id, visible_to(caller))
        .execution_options(populate_existing=True)
    )
    row = found.one_or_none()
    if row is None:
        raise NotFound("job", job_id)
    open_round = await find_open_round(session, job_id)
    return _view(row[0], row[1], None if open_round is None else open_round.number)


async def page_jobs(
    session: AsyncSession, caller: Caller, paging: Paging, *, state: JobState | None = None
) -> Page[JobView]:
    """One page of jobs, the newest first."""
    statement = (
        select(Job, Principal.name, Round.number)
        .join(Principal, Principal.id == Job.owner_id)
        .outerjoin(Round, (Round.job_id == Job.id) & Round.phase.in_(OPEN_PHASES))
        .where(visible_to(caller))
    )
    if state is not None:
        statement = statement.where(Job.state == state)
    rows, cursor = await paginate(session, statement, Job.id, UUID, paging, newest_first=True)
    return Page[JobView](items=[_view(*row) for row in rows], next_cursor=cursor)


def _view(job: Job, owner: str, current_round: int | None) -> JobView:
    return JobView(
        id=job.id,
        name=job.name,
        owner=owner,
        state=job.state,
        reason=job.reason,
        detail=job.detail,
        spec=JobSpec.model_validate(job.spec),
        spec_digest=job.spec_digest,
        manifest=None if job.manifest is None else Manifest.model_validate(job.manifest),
        rounds_completed=job.rounds_completed,
        current_round=current_round,
        model_digest=job.model_digest,
        statistics=None if job.statistics is None else FeatureStatistics.model_validate(job.statistics),
        created_at=job.created_at,
        started_at=job.started_at,
        ended_at=job.ended_at,
    )


async def page_rounds(session: AsyncSession, caller: Caller, job_id: UUID, paging: Paging) -> Page[RoundView]:
    """One page of a job's rounds, in order."""
    statement = select(Round).where(Round.job_id == job_id)
    rows, cursor = await paginate(session, statement, Round.number, int, paging)
    return Page[RoundView](
        items=await _round_views(session, caller, job_id, [row[0] for row in rows]), next_cursor=cursor
    )


async def get_round_view(session: AsyncSession, caller: Caller, job_id: UUID, number: int) -> RoundView:
    """One round of a job.

    Raises:
        NotFound: it has none of that number.
    """
    found = await session.scalars(select(Round).where(Round.job_id == job_id, Round.number == number))
    of = found.one_or_none()
    if of is None:
        raise NotFound("round", number)
    return (await _round_views(session, caller, job_id, [of]))[0]


async def _updates(
    session: AsyncSession, caller: Caller, round_ids: list[UUID]
) -> dict[UUID, list[tuple[Update, str, str]]]:
    statement = (
        select(Update, Organization.name, Dataset.name)
        .join(Participation, Participation.id == Update.participation_id)
        .join(Dataset, Dataset.id == Participation.dataset_id)
        .join(Organization, Organization.id == Dataset.organization_id)
        .where(Update.round_id.in_(round_ids), Update.excluded.is_(False))
    )
    own = _own(caller)
    found = await session.execute(statement if own is None else statement.where(Dataset.organization_id == own))
    grouped: dict[UUID, list[tuple[Update, str, str]]] = {round_id: [] for round_id in round_ids}
    for update, organization, dataset in found:
        grouped[update.round_id].append((update, organization, dataset))
    for listed in grouped.values():
        listed.sort(key=lambda item: item[1:])
    return grouped


async def _hides_updates(session: AsyncSession, caller: Caller, job_id: UUID) -> bool:
    """Whether a job's updates are un-noised, and the caller one of those from whom the service's noise hides them."""
    if caller.role is not Role.RESEARCHER:  # a steward sees its own organization's alone, an admin is the operator
        return False
    privacy = await session.scalar(select(Job.spec["privacy"]).where(Job.id == job_id))
    return privacy is not None and privacy.get("where") == NoisePlace.CENTRAL


async def _round_views(session: AsyncSession, caller: Caller, job_id: UUID, rounds: list[Round]) -> list[RoundView]:
    ids = [of.id for of in rounds]
    hidden = await _hides_updates(session, caller, job_id)
    tasks = await list_tasks(session, ids, _own(caller))
    updates = await _updates(session, caller, ids)
    is_open = [of.id for of in rounds if of.phase in OPEN_PHASES]
    own = caller.organization if caller.role is Role.STEWARD else None
    secured = await list_secured(session, is_open, own) if is_open else {}
    return [
        RoundView(
            id=of.id,
            job_id=of.job_id,
            number=of.number,
            kind=of.kind,
            phase=of.phase,
            attempt=of.attempt,
            cohort_seed=of.cohort_seed,
            cohort_size=of.cohort_size,
            target_updates=of.target_updates,
            min_updates=of.min_updates,
            accepted=of.accepted,
            detail=of.detail,
            model_digest=of.model_digest,
            result_digest=of.result_digest,
            metrics=of.metrics,
            opened_at=of.opened_at,
            closes_at=of.closes_at,
            completed_at=of.completed_at,
            secured=secured.get(of.id),
            tasks=tasks[of.id],
            updates=[_update_view(*item, hidden=hidden) for item in updates[of.id]],
        )
        for of in rounds
    ]


def _update_view(update: Update, organization: str, dataset: str, *, hidden: bool) -> UpdateView:
    return UpdateView(
        organization=organization,
        dataset=dataset,
        digest=None if hidden else update.digest,
        size_bytes=update.size_bytes,
        weight=update.weight,
        l2_norm=None if hidden else update.l2_norm,
        position=update.position,
        received_at=update.received_at,
        metrics=site_metrics(update.released),
    )


async def page_metrics(session: AsyncSession, caller: Caller, job_id: UUID, paging: Paging) -> Page[RoundMetrics]:
    """One page of what a job's rounds measured, in order."""
    statement = select(Round).where(Round.job_id == job_id, Round.kind != TaskKind.STATISTICS)
    rows, cursor = await paginate(session, statement, Round.number, int, paging)
    rounds = [row[0] for row in rows]
    updates = await _updates(session, caller, [of.id for of in rounds])
    items = [
        RoundMetrics(
            round_number=of.number,
            kind=of.kind,
            measured_round=of.number - 1,
            duration_s=_seconds(of),
            accepted=of.accepted,
            pooled=of.metrics,
            sites=[
                SiteMetrics(organization=organization, dataset=dataset, metrics=site_metrics(update.released))
                for update, organization, dataset in updates[of.id]
            ],
        )
        for of in rounds
    ]
    return Page[RoundMetrics](items=items, next_cursor=cursor)


def _seconds(of: Any) -> float | None:
    return None if of.completed_at is None else float((of.completed_at - of.opened_at).total_seconds())


async def page_checkpoints(session: AsyncSession, job_id: UUID, paging: Paging) -> Page[CheckpointView]:
    """One page of a job's checkpoints, in order of their rounds."""
    statement = select(Checkpoint).where(Checkpoint.job_id == job_id)
    rows, cursor = await paginate(session, statement, Checkpoint.round_number, int, paging)
    return Page[CheckpointView](items=[CheckpointView.model_validate(row[0]) for row in rows], next_cursor=cursor)


async def require_checkpoint(session: AsyncSession, caller: Caller, digest: str) -> int:
    """The size of a checkpoint that the caller may read: of a job open to it (`open_to`), or of its worker's round.

    Raises:
        NotFound: missing, another's, or of a job that the steward never granted anything.
    """
    statement = select(Checkpoint.size_bytes).where(Checkpoint.digest == digest)
    if caller.worker_id is not None:
        asked = select(Task.id).join(Round, Round.id == Task.round_id)
        statement = statement.where(
            exists(asked.where(Task.worker_id == caller.worker_id, Round.model_digest == Checkpoint.digest))
        )
    else:
        statement = statement.join(Job, Job.id == Checkpoint.job_id).where(open_to(caller))
    size: int | None = await session.scalar(statement.limit(1))
    if size is None:
        raise NotFound("checkpoint", digest)
    return size


async def get_model_digest(session: AsyncSession, caller: Caller, job_id: UUID) -> str:
    """The digest of a job's newest checkpoint, if the job's models may be read (`open_to`).

    Raises:
        NotFound: the job is missing, another's or never granted anything by the steward, or has no model yet.
    """
    await require_open(session, caller, job_id)
    digest: str | None = await session.scalar(select(Job.model_digest).where(Job.id == job_id))
    if digest is None:
        raise NotFound("model of job", job_id)
    return digest
