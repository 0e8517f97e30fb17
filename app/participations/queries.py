"""Reading participations, as far as the caller may see them."""

from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Select, select, true
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased

from app.dependencies import Caller
from app.errors import NotFound
from app.models import Dataset, Grant, Job, Organization, Participation, Principal
from app.pagination import Paging, paginate
from isthmus.wire.base import Page
from isthmus.wire.jobs import GrantView, ParticipationState, ParticipationView
from isthmus.wire.organizations import Role

_Granter = aliased(Principal)


def visible_to(caller: Caller) -> ColumnElement[bool]:
    """Admins see all; stewards those of their organization; researchers those of their own jobs."""
    if caller.role is Role.ADMIN:
        return true()
    if caller.role is Role.RESEARCHER:
        return Job.owner_id == caller.principal_id
    return Dataset.organization_id == caller.organization_id


def _statement() -> Select[*tuple[Any, ...]]:
    return (
        select(Participation, Job, Dataset.name, Organization.name, Principal.name, Grant, _Granter.name)
        .join(Job, Job.id == Participation.job_id)
        .join(Dataset, Dataset.id == Participation.dataset_id)
        .join(Organization, Organization.id == Dataset.organization_id)
        .join(Principal, Principal.id == Job.owner_id)
        .outerjoin(Grant, Grant.participation_id == Participation.id)
        .outerjoin(_Granter, _Granter.id == Grant.granted_by)
    )


def _view(
    participation: Participation,
    job: Job,
    dataset: str,
    organization: str,
    owner: str,
    grant: Grant | None,
    granter: str | None,
) -> ParticipationView:
    return ParticipationView(
        id=participation.id,
        job_id=job.id,
        job=job.name,
        dataset_id=participation.dataset_id,
        dataset=dataset,
        organization=organization,
        state=participation.state,
        detail=participation.detail,
        declared_rows=participation.declared_rows,
        grant=None if grant is None else _grant_view(grant, granter or ""),
        requested_by=owner,
        purpose=str(job.spec["purpose"]),  # a spec may be large: it is not read for one word
        created_at=participation.created_at,
    )


def _grant_view(grant: Grant, granter: str) -> GrantView:
    return GrantView(
        purpose=grant.purpose,
        expires_at=grant.expires_at,
        rounds=grant.rounds,
        rounds_used=grant.rounds_used,
        granted_by=granter,
        granted_at=grant.granted_at,
        by_rule=grant.by_rule,
    )


async def get_participation_view(session: AsyncSession, caller: Caller, participation_id: UUID) -> ParticipationView:
    """One participation.

    Raises:
        NotFound: missing, or another's.
    """
    found = await session.execute(_statement().where(Participation.id == participation_id, visible_to(caller)))
    row = found.one_or_none()
    if row is None:
        raise NotFound("participation", participation_id)
    return _view(*row)


async def page_participations(
    session: AsyncSession,
    caller: Caller,
    paging: Paging,
    *,
    job_id: UUID | None = None,
    state: ParticipationState | None = None,
) -> Page[ParticipationView]:
    """One page of the participations that the caller may see."""
    statement = _statement().where(visible_to(caller))
    if job_id is not None:
        statement = statement.where(Participation.job_id == job_id)
    if state is not None:
        statement = statement.where(Participation.state == state)
    rows, cursor = await paginate(session, statement, Participation.id, UUID, paging)
    return Page[ParticipationView](items=[_view(*row) for row in rows], next_cursor=cursor)


async def find_own(session: AsyncSession, caller: Caller, participation_id: UUID) -> tuple[UUID, UUID]:
    """(job, dataset) of a participation of the steward's own organization, to be locked in the order of the house.

    Raises:
        NotFound: missing, or another organization's. Only data holders decide over their data, not the platform.
    """
    found = await session.execute(
        select(Participation.job_id, Participation.dataset_id)
        .join(Dataset, Dataset.id == Participation.dataset_id)
        .where(Participation.id == participation_id, Dataset.organization_id == caller.organization_id)
    )
    row = found.one_or_none()
    if row is None:
        raise NotFound("participation", participation_id)
    return row[0], row[1]
