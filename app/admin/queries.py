"""Reading principals and keys, as far as the caller may see them."""

from uuid import UUID

from sqlalchemy import func, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.dependencies import Caller
from app.errors import NotFound
from app.models import ApiKey, Organization, Principal
from app.pagination import Paging, paginate
from isthmus.wire.base import Page
from isthmus.wire.organizations import ApiKeyView, Me, OrganizationView, PrincipalView, Role, Scope


async def get_principal(session: AsyncSession, principal_id: UUID, *, lock: bool = False) -> Principal:
    """The principal of this id. Its row's lock orders what happens to its keys.

    Raises:
        NotFound: there is none.
    """
    statement = select(Principal).where(Principal.id == principal_id)
    if lock:
        statement = statement.with_for_update(key_share=True).execution_options(populate_existing=True)
    principal = (await session.scalars(statement)).one_or_none()
    if principal is None:
        raise NotFound("principal", principal_id)
    return principal


async def page_principals(session: AsyncSession, paging: Paging) -> Page[PrincipalView]:
    """One page of all principals, the oldest first."""
    rows, cursor = await paginate(session, select(Principal), Principal.id, UUID, paging)
    return Page[PrincipalView](items=[PrincipalView.model_validate(row[0]) for row in rows], next_cursor=cursor)


async def get_key(session: AsyncSession, key_id: str, *, caller: Caller) -> ApiKey:
    """The key of this id.

    Raises:
        NotFound: there is none, or it is somebody else's and the caller is no admin.
    """
    statement = select(ApiKey).where(ApiKey.id == key_id).execution_options(populate_existing=True)
    if not caller.is_admin:
        statement = statement.where(ApiKey.principal_id == caller.principal_id)
    key = (await session.scalars(statement)).one_or_none()
    if key is None:
        raise NotFound("API key", key_id)
    return key


async def page_keys(
    session: AsyncSession, principal_id: UUID | None, paging: Paging, *, caller: Caller
) -> Page[ApiKeyView]:
    """One page of keys without their secrets: the caller's own; for an admin, anybody's or everybody's.

    Raises:
        NotFound: the principal is missing or somebody else.
    """
    statement = select(ApiKey)
    if not caller.is_admin:
        if principal_id not in (None, caller.principal_id):
            raise NotFound("principal", str(principal_id))
        principal_id = caller.principal_id
    if principal_id is not None:
        await get_principal(session, principal_id)
        statement = statement.where(ApiKey.principal_id == principal_id)
    rows, cursor = await paginate(session, statement, ApiKey.id, str, paging)
    return Page[ApiKeyView](items=[ApiKeyView.model_validate(row[0]) for row in rows], next_cursor=cursor)


async def get_me(session: AsyncSession, caller: Caller) -> Me:
    """Who the service takes the caller for."""
    principal = await get_principal(session, caller.principal_id)
    organization = None
    if principal.organization_id is not None:
        organization = OrganizationView.model_validate(await session.get_one(Organization, principal.organization_id))
    return Me(
        principal=PrincipalView.model_validate(principal),
        organization=organization,
        key_id=caller.key_id,
        scopes=sorted(caller.scopes),
        worker_id=caller.worker_id,
    )


async def has_admin(session: AsyncSession, *, besides: UUID | None = None) -> bool:
    """Whether somebody, `besides` this principal, holds a live key to the whole platform."""
    statement = (
        select(ApiKey.id)
        .join(Principal, Principal.id == ApiKey.principal_id)
        .where(
            Principal.role == Role.ADMIN,
            Principal.disabled_at.is_(None),
            ApiKey.revoked_at.is_(None),
            or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > func.clock_timestamp()),
            ApiKey.scopes.contains([Scope.PLATFORM.value]),
        )
        .limit(1)
    )
    if besides is not None:
        statement = statement.where(Principal.id != besides)
    return (await session.scalars(statement)).one_or_none() is not None
