"""Reading workers, as far as the caller may see them."""

from uuid import UUID

from sqlalchemy import ColumnElement, select, true
from sqlalchemy.ext.asyncio import AsyncSession

from app.dependencies import Caller
from app.errors import Forbidden, NotFound
from app.models import Organization, Worker
from app.pagination import Paging, paginate
from isthmus.wire.base import Page
from isthmus.wire.organizations import Role
from isthmus.wire.workers import WorkerView


def visible_to(caller: Caller) -> ColumnElement[bool]:
    """Which workers the caller may see: an admin all, a steward those of the organization.

    Raises:
        Forbidden: the caller is neither.
    """
    if caller.role is Role.ADMIN:
        return true()
    if caller.role is Role.STEWARD:
        return Worker.organization_id == caller.organization_id
    raise Forbidden("Workers are shown to the stewards of their organization and to admins.")


def view_of(worker: Worker, organization: str) -> WorkerView:
    """A worker as answered."""
    return WorkerView(
        id=worker.id,
        organization_id=worker.organization_id,
        organization=organization,
        name=worker.name,
        public_key=worker.public_key,
        version=worker.version,
        enrolled_at=worker.enrolled_at,
        last_seen_at=worker.last_seen_at,
        revoked_at=worker.revoked_at,
    )


async def get_worker(
    session: AsyncSession, worker_id: UUID, *, caller: Caller, lock: bool = False
) -> tuple[Worker, str]:
    """A worker and the name of its organization.

    Raises:
        NotFound: there is none that the caller may see.
    """
    statement = (
        select(Worker, Organization.name)
        .join(Organization, Organization.id == Worker.organization_id)
        .where(Worker.id == worker_id, visible_to(caller))
    )
    if lock:
        statement = statement.with_for_update(of=Worker, key_share=True)
    row = (await session.execute(statement)).one_or_none()
    if row is None:
        raise NotFound("worker", worker_id)
    return row[0], row[1]


async def page_workers(session: AsyncSession, paging: Paging, *, caller: Caller) -> Page[WorkerView]:
    """One page of the workers that the caller may see, the oldest first."""
    statement = (
        select(Worker, Organization.name)
        .join(Organization, Organization.id == Worker.organization_id)
        .where(visible_to(caller))
    )
    rows, cursor = await paginate(session, statement, Worker.id, UUID, paging)
    return Page[WorkerView](items=[view_of(row[0], row[1]) for row in rows], next_cursor=cursor)
