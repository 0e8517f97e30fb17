"""Asking for participations, granting and ending them; a grant that ends is honoured in the middle of a job."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from uuid import UUID

from procrastinate import App as Queue
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit.service import append, job_stream
from app.blobs import BlobStore
from app.database import clock
from app.dependencies import Caller
from app.errors import GrantRefusedByPolicy, NoMatchingDataset, StateConflict
from app.federation.lifecycle import ENDED_JOBS, OPEN_TASKS
from app.models import Dataset, Grant, Job, Organization, Participation, Principal, Round, Task, Update, Worker
from app.participations.queries import find_own
from app.rounds.closing import settle
from app.rounds.opening import begin_if_enough
from app.rounds.queries import find_open_round, get_job
from app.wakeups import announce_change
from isthmus.federation.rounds import number_after
from isthmus.wire.data import DatasetSchema, misfits
from isthmus.wire.datasets import DatasetState, UsePolicy, policy_objections
from isthmus.wire.events import EventKind
from isthmus.wire.jobs import ApproveParticipation, JobSpec, JobState, ParticipationState
from isthmus.wire.rounds import RoundPhase, TaskState, kind_of_round

RENEWABLE = (ParticipationState.EXPIRED, ParticipationState.EXHAUSTED)
"""A steward who said yes may say so again. A no, and a grant taken back, are final for the job."""
GRANT_S = 30 * 86400


def needed_kinds(spec: JobSpec) -> frozenset[str]:
    """The kinds of tasks that the rounds of a job offer."""
    first, last = number_after(spec, None), number_after(spec, spec.rounds)
    numbers = [number for number in (first, 1, last) if number is not None]
    return frozenset(kind_of_round(number, spec.rounds).value for number in numbers)


async def request_participations(session: AsyncSession, job: Job, owner: Principal, now: datetime) -> None:
    """Ask every dataset that fits the job. Its policy may refuse at once, or grant by rule; else its steward decides.

    Raises:
        NoMatchingDataset: fewer datasets than a round needs fit and may be asked; says why each of the others does not.
    """
    spec = JobSpec.model_validate(job.spec)
    found = await session.execute(
        select(Dataset, Organization.name)
        .join(Organization, Organization.id == Dataset.organization_id)
        .join(Worker, Worker.id == Dataset.worker_id)
        .where(Dataset.state == DatasetState.CONFIRMED, Worker.revoked_at.is_(None))
        .order_by(Dataset.id)
    )
    asked, reasons = [], []
    listed = {f"{organization}/{dataset.name}": dataset for dataset, organization in found}
    wanted = spec.data.datasets
    for name in sorted(listed) if wanted is None else sorted(set(wanted)):
        if name not in listed:
            reasons.append(f"{name}: there is no confirmed dataset of that name.")
            continue
        dataset = listed[name]
        unfit = misfits(spec.data, DatasetSchema.model_validate(dataset.data_schema))
        lacking = needed_kinds(spec).difference(dataset.task_kinds)
        if lacking:
            unfit.append(f"It does not take tasks of kind {', '.join(sorted(lacking))}.")
        if unfit:
            reasons.append(f"{name}: {' '.join(unfit)}")
            continue
        asked.append((name, dataset))
    objections = {
        dataset.id: policy_objections(UsePolicy.model_validate(dataset.policy), spec, principal=owner.name)
        for _, dataset in asked
    }
    reasons += [f"{name}: policy: {' '.join(objections[d.id])}" for name, d in asked if objections[d.id]]
    able = [dataset for _, dataset in asked if not objections[dataset.id]]
    if len(able) < spec.cohort.min_updates:
        raise NoMatchingDataset(
            f"{len(able)} datasets fit the job and allow it; it needs {spec.cohort.min_updates}. "
            + " ".join(reasons[:10])
        )
    for name, dataset in asked:
        await _request(session, job, spec, owner, name, dataset, objections[dataset.id], now)


async def _request(
    session: AsyncSession,
    job: Job,
    spec: JobSpec,
    owner: Principal,
    name: str,
    dataset: Dataset,
    objections: list[str],
    now: datetime,
) -> None:
    participation = Participation(job_id=job.id, dataset_id=dataset.id, declared_rows=dataset.rows, created_at=now)
    events: list[tuple[EventKind, dict[str, object]]] = [
        (EventKind.PARTICIPATION_REQUESTED, {"dataset": name, "purpose": spec.purpose})
    ]
    grant = None
    rule, ruler = UsePolicy.model_validate(dataset.policy).automatic_approval, dataset.policy_set_by
    if objections:
        participation.state = ParticipationState.REJECTED
        participation.detail = f"The dataset's policy refuses: {' '.join(objections)}"
        events.append((EventKind.PARTICIPATION_REJECTED, {"dataset": name, "detail": participation.detail}))
    elif rule is not None and ruler is not None and spec.rounds <= rule.max_rounds:
        participation.state = ParticipationState.APPROVED
        grant = Grant(
            purpose=spec.purpose,
            expires_at=now + timedelta(days=rule.grant_days),
            rounds=spec.rounds,
            granted_by=ruler,
            granted_at=now,
            by_rule=True,
        )
        events.append((EventKind.PARTICIPATION_APPROVED, _granted(name, grant)))
    session.add(participation)
    await session.flush()
    if grant is not None:
        grant.participation_id = participation.id
        session.add(grant)
        await session.flush()
    for kind, data in events:
        append(session, job_stream(job.id), kind, at=now, actor=owner.name, **data)


def _granted(name: str, grant: Grant) -> dict[str, object]:
    return {
        "dataset": name,
        "purpose": grant.purpose,
        "rounds": grant.rounds,
        "expires_at": grant.expires_at.isoformat(),
        "by_rule": grant.by_rule,
    }


async def approve(session: AsyncSession, caller: Caller, participation_id: UUID, asked: ApproveParticipation) -> None:
    """Grant a participation: for a purpose, until a time, for a number of rounds. Its weight is frozen now.

    A grant that has expired or is used up is renewed: the rounds come on top of those that were used.

    Raises:
        NotFound: missing, or another organization's.
        StateConflict: it was decided before, or the job is over.
        GrantRefusedByPolicy: the dataset's own policy forbids it, or the grant would be for another purpose.
    """
    job_id, dataset_id = await find_own(session, caller, participation_id)
    job = await get_job(session, job_id, "update")
    participation = await _lock(session, participation_id)
    if job.state in ENDED_JOBS:
        raise StateConflict(f"The job is {job.state}; there is nothing to approve any more.")
    if participation.state not in (ParticipationState.PENDING, *RENEWABLE):
        raise StateConflict(f"The participation is {participation.state}; that is final for this job.")
    dataset, organization, owner = (
        await session.execute(
            select(Dataset, Organization.name, Principal.name)
            .join(Organization, Organization.id == Dataset.organization_id)
            .join(Principal, Principal.id == job.owner_id)
            .where(Dataset.id == dataset_id)
        )
    ).one()
    spec = JobSpec.model_validate(job.spec)
    objections = policy_objections(UsePolicy.model_validate(dataset.policy), spec, principal=owner)
    if asked.purpose is not None and asked.purpose != spec.purpose:
        objections.append(f"purpose: the job is for {spec.purpose!r}, not for {asked.purpose!r}.")
    if objections:
        raise GrantRefusedByPolicy(" ".join(objections))
    now = await clock(session)
    grant = await _find_grant(session, participation_id)
    if grant is None:
        grant = Grant(participation_id=participation.id, rounds_used=0)
        session.add(grant)
    grant.purpose, grant.rounds = spec.purpose, grant.rounds_used + (asked.rounds or spec.rounds)
    grant.expires_at = now + timedelta(seconds=asked.expires_in_s or GRANT_S)
    grant.granted_by, grant.granted_at, grant.ended_at = caller.principal_id, now, None
    grant.by_rule = False
    participation.state, participation.detail = ParticipationState.APPROVED, None
    participation.declared_rows = dataset.rows
    await session.flush()
    name = f"{organization}/{dataset.name}"
    append(
        session,
        job_stream(job_id),
        EventKind.PARTICIPATION_APPROVED,
        at=now,
        actor=caller.name,
        **_granted(name, grant),
    )
    await begin_if_enough(session, job, now)
    await announce_change(session, job_id)


async def reject(session: AsyncSession, caller: Caller, participation_id: UUID, note: str) -> None:
    """Say no to a pending participation, and why.

    Raises:
        NotFound: missing, or another organization's.
        StateConflict: it was decided before; an approved one is withdrawn.
    """
    job_id, _ = await find_own(session, caller, participation_id)
    await get_job(session, job_id, "share")
    participation = await _lock(session, participation_id)
    if participation.state is not ParticipationState.PENDING:
        raise StateConflict(f"The participation is {participation.state}; only a pending one can be rejected.")
    participation.state, participation.detail = ParticipationState.REJECTED, note
    now = await clock(session)
    stream = job_stream(job_id)
    append(
        session,
        stream,
        EventKind.PARTICIPATION_REJECTED,
        at=now,
        actor=caller.name,
        dataset=await name_of(session, participation),
        detail=note,
    )
    await announce_change(session, job_id)


async def withdraw(
    session: AsyncSession, queue: Queue, caller: Caller, participation_id: UUID, note: str
) -> Sequence[str]:
    """Take a grant back, at any moment. Keys of blobs to delete once this is committed.

    An upload under way finds its task cancelled. An update that is in but not frozen leaves the set. One that is frozen
    stays in this aggregate and enters no later one. What was spent stays spent.

    Raises:
        NotFound: missing, or another organization's.
        StateConflict: there is no grant to take back.
    """
    job_id, _ = await find_own(session, caller, participation_id)
    job = await get_job(session, job_id, "update")
    of = await find_open_round(session, job_id, "update")
    participation = await lock_with_tasks(session, participation_id)
    if participation.state not in (ParticipationState.APPROVED, *RENEWABLE):
        raise StateConflict(f"The participation is {participation.state}; there is no grant to withdraw.")
    now = await clock(session)
    name = await name_of(session, participation)
    await end_grant(session, participation, ParticipationState.WITHDRAWN, note, now)
    deleted: list[str] = []
    if of is not None and of.phase is RoundPhase.COLLECTING:
        deleted = await _exclude(session, job, of, participation, name, now)
        await cancel_tasks(session, [participation.id], "The grant was withdrawn.")
        await session.flush()
    append(
        session,
        job_stream(job_id),
        EventKind.PARTICIPATION_WITHDRAWN,
        at=now,
        actor=caller.name,
        dataset=name,
        note=note,
        stays_in_round=of.number if of is not None and of.phase is RoundPhase.AGGREGATING else None,
    )
    if of is not None and job.state in (JobState.RUNNING, JobState.PAUSED):
        await settle(session, queue, job, of, now)
    await announce_change(session, job_id)
    return deleted


async def delete_blobs(blobs: BlobStore, keys: Sequence[str]) -> None:
    """Forget the bytes of withdrawn updates, after the commit that excluded them."""
    for key in keys:
        await blobs.delete(key)


async def _exclude(
    session: AsyncSession, job: Job, of: Round, participation: Participation, name: str, now: datetime
) -> list[str]:
    accepted = (
        await session.scalars(
            select(Update).where(
                Update.round_id == of.id, Update.participation_id == participation.id, Update.excluded.is_(False)
            )
        )
    ).one_or_none()
    if accepted is None:
        return []
    accepted.excluded = True
    of.accepted -= 1
    await session.execute(
        update(Task)
        .where(Task.id == accepted.task_id)
        .values(state=TaskState.CANCELLED, detail="The grant was withdrawn after the update was in; it was deleted.")
    )
    append(
        session,
        job_stream(job.id),
        EventKind.UPDATE_EXCLUDED,
        at=now,
        round=of.number,
        dataset=name,
        digest=accepted.digest,
        accepted=of.accepted,
    )
    return [accepted.blob_key]


async def cancel_tasks(session: AsyncSession, participation_ids: Sequence[UUID], detail: str) -> None:
    """Call off what these participations may still bring in their open round."""
    await session.execute(
        update(Task)
        .where(Task.participation_id.in_(participation_ids), Task.state.in_((*OPEN_TASKS, TaskState.FAILED)))
        .values(state=TaskState.CANCELLED, detail=detail, lease_expires_at=None)
    )


async def end_grant(
    session: AsyncSession, participation: Participation, state: ParticipationState, detail: str | None, now: datetime
) -> None:
    """End a participation's grant, and say how."""
    participation.state, participation.detail = state, detail
    await session.execute(
        update(Grant).where(Grant.participation_id == participation.id, Grant.ended_at.is_(None)).values(ended_at=now)
    )


async def _lock(session: AsyncSession, participation_id: UUID) -> Participation:
    found = await session.scalars(
        select(Participation)
        .where(Participation.id == participation_id)
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    return found.one()


async def lock_with_tasks(session: AsyncSession, participation_id: UUID) -> Participation:
    """The participation's open tasks, then itself: the order of the house."""
    await session.execute(
        select(Task.id)
        .where(Task.participation_id == participation_id, Task.state.in_((*OPEN_TASKS, TaskState.SUBMITTED)))
        .order_by(Task.id)
        .with_for_update()
    )
    return await _lock(session, participation_id)


async def _find_grant(session: AsyncSession, participation_id: UUID) -> Grant | None:
    found = await session.scalars(select(Grant).where(Grant.participation_id == participation_id))
    return found.one_or_none()


async def name_of(session: AsyncSession, participation: Participation) -> str:
    """`organization/dataset`, as events tell of it."""
    row = await session.execute(
        select(Organization.name, Dataset.name)
        .join(Organization, Organization.id == Dataset.organization_id)
        .where(Dataset.id == participation.dataset_id)
    )
    organization, dataset = row.one()
    return f"{organization}/{dataset}"
