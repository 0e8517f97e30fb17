"""Reading organizations."""

from uuid import UUID

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.errors import NotFound
from app.models import Organization
from app.pagination import Paging, paginate
from isthmus.wire.base import Page
from isthmus.wire.organizations import OrganizationView


async def get_organization(session: AsyncSession, organization_id: UUID) -> Organization:
    """The organization of this id.

    Raises:
        NotFound: there is none.
    """
    organization = await session.get(Organization, organization_id)
    if organization is None:
        raise NotFound("organization", organization_id)
    return organization


async def page_organizations(session: AsyncSession, paging: Paging) -> Page[OrganizationView]:
    """One page of all organizations, the oldest first."""
    rows, cursor = await paginate(session, select(Organization), Organization.id, UUID, paging)
    return Page[OrganizationView](items=[OrganizationView.model_validate(row[0]) for row in rows], next_cursor=cursor)
