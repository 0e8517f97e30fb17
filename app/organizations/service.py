"""Organizations join, and what enrolling and administering have in common: adding principals and keys, ending keys."""

from collections.abc import Iterable
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit.service import PLATFORM, append, organization_stream
from app.credentials import Issued, issue_key, issue_token
from app.database import clock
from app.dependencies import Caller
from app.errors import NameTaken, NotFound
from app.models import ApiKey, EnrollmentToken, Organization, Principal
from app.organizations import queries
from isthmus.wire.events import EventKind
from isthmus.wire.organizations import CreateEnrollmentToken, CreateOrganization, EnrollmentTokenIssued, Role, Scope


async def create_organization(session: AsyncSession, body: CreateOrganization, *, caller: Caller) -> Organization:
    """Admit a data holder.

    Raises:
        NameTaken: names are given once.
    """
    now = await clock(session)
    created = await session.scalars(
        insert(Organization)
        .values(name=body.name, display_name=body.display_name, created_at=now)
        .on_conflict_do_nothing(index_elements=[Organization.name])
        .returning(Organization)
    )
    organization = created.one_or_none()
    if organization is None:
        raise NameTaken("organization", body.name)
    append(
        session,
        PLATFORM,
        EventKind.ORGANIZATION_CREATED,
        at=now,
        actor=caller.name,
        organization_id=str(organization.id),
        name=organization.name,
    )
    return organization


async def issue_enrollment_token(
    session: AsyncSession, organization_id: UUID, body: CreateEnrollmentToken, *, caller: Caller
) -> EnrollmentTokenIssued:
    """Make a token with which one worker of the organization may enrol, once, soon. Only its hash is kept.

    Raises:
        NotFound: there is no such organization, or it is not the caller's.
    """
    if not caller.is_admin and organization_id != caller.organization_id:
        raise NotFound("organization", organization_id)
    organization = await queries.get_organization(session, organization_id)
    now, issued = await clock(session), issue_token()
    token = EnrollmentToken(
        organization_id=organization.id,
        token_hash=issued.secret_hash,
        created_by=caller.principal_id,
        created_at=now,
        expires_at=now + timedelta(seconds=body.expires_in_s),
    )
    session.add(token)
    await session.flush()
    append(
        session,
        organization_stream(organization.id),
        EventKind.ENROLLMENT_TOKEN_ISSUED,
        at=now,
        actor=caller.name,
        token_id=str(token.id),
        expires_at=token.expires_at.isoformat(),
    )
    return EnrollmentTokenIssued(
        id=token.id,
        organization_id=organization.id,
        organization=organization.name,
        token=issued.shown,
        expires_at=token.expires_at,
    )


async def add_principal(
    session: AsyncSession, *, name: str, display_name: str, role: Role, organization_id: UUID | None, now: datetime
) -> Principal | None:
    """A new holder of keys, or None if the name is taken."""
    created = await session.scalars(
        insert(Principal)
        .values(name=name, display_name=display_name, role=role, organization_id=organization_id, created_at=now)
        .on_conflict_do_nothing(index_elements=[Principal.name])
        .returning(Principal)
    )
    return created.one_or_none()


async def add_key(
    session: AsyncSession,
    *,
    principal_id: UUID,
    label: str,
    scopes: Iterable[str],
    expires_at: datetime | None,
    now: datetime,
    replaces_id: str | None = None,
) -> tuple[ApiKey, Issued]:
    """A new key: the row, which has no secret, and the secret, which is nowhere else."""
    issued = issue_key()
    key = ApiKey(
        id=issued.id,
        principal_id=principal_id,
        label=label,
        secret_hash=issued.secret_hash,
        scopes=sorted(Scope(scope).value for scope in scopes),
        created_at=now,
        expires_at=expires_at,
        replaces_id=replaces_id,
    )
    session.add(key)
    await session.flush()
    return key, issued


async def end_keys(session: AsyncSession, principal_id: UUID, *, now: datetime) -> None:
    """Revoke every key of a principal that is not revoked yet."""
    await session.execute(
        update(ApiKey).where(ApiKey.principal_id == principal_id, ApiKey.revoked_at.is_(None)).values(revoked_at=now)
    )
