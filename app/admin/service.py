"""Principals come and go; keys are issued, rotated and revoked.

A key never gives its holder more than it has: what a holder does with one key (issue a further one, rotate or revoke
another) stays within that key's scopes and ends no later than that key. Only an admin goes beyond.
"""

from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.admin import queries
from app.audit.service import PLATFORM, SERVICE, append
from app.credentials import Issued
from app.database import clock
from app.dependencies import Caller
from app.errors import Forbidden, InvalidRequest, NameTaken, NotFound, StateConflict
from app.models import ApiKey, Principal, Worker
from app.organizations.queries import get_organization
from app.organizations.service import add_key, add_principal, end_keys
from app.workers.service import revoke_worker
from isthmus.wire.events import EventKind
from isthmus.wire.organizations import (
    ROLE_SCOPES,
    ApiKeyIssued,
    ApiKeyView,
    CreateApiKey,
    CreatePrincipal,
    Role,
    RotateApiKey,
)

ADMINS_LOCK: Final = 0x15_7B_07  # who adds the first admin, or ends one, takes turns


async def create_principal(session: AsyncSession, body: CreatePrincipal, *, caller: Caller) -> Principal:
    """Register somebody who will hold keys.

    Raises:
        NameTaken: names are given once, and `service` is what events call the service itself.
        NotFound: there is no such organization.
    """
    if body.organization_id is not None:
        await get_organization(session, body.organization_id)
    now = await clock(session)
    principal = None
    if body.name != SERVICE:
        principal = await add_principal(
            session,
            name=body.name,
            display_name=body.display_name,
            role=body.role,
            organization_id=body.organization_id,
            now=now,
        )
    if principal is None:
        raise NameTaken("principal", body.name)
    await _note_principal(session, principal, at=now, actor=caller.name)
    return principal


async def disable_principal(session: AsyncSession, principal_id: UUID, *, caller: Caller) -> Principal:
    """End a principal and all its keys; a worker is revoked with it. Again, it changes nothing.

    Raises:
        NotFound: there is no such principal.
        StateConflict: nobody else holds a key to the platform.
    """
    await _take_turns(session)
    principal = await queries.get_principal(session, principal_id, lock=True)
    if principal.disabled_at is not None:
        return principal
    if principal.role is Role.ADMIN and not await queries.has_admin(session, besides=principal.id):
        raise StateConflict("Nobody else holds a live key to the platform. Give somebody one first.")
    worker = (await session.scalars(select(Worker.id).where(Worker.principal_id == principal.id))).one_or_none()
    if worker is not None:
        await revoke_worker(session, worker, caller=caller)
    now = await clock(session)
    principal.disabled_at = now
    await end_keys(session, principal.id, now=now)
    append(
        session,
        PLATFORM,
        EventKind.PRINCIPAL_DISABLED,
        at=now,
        actor=caller.name,
        principal_id=str(principal.id),
        name=principal.name,
    )
    return principal


async def create_key(session: AsyncSession, body: CreateApiKey, *, caller: Caller) -> ApiKeyIssued:
    """Issue a key: a further one of the caller, or for an admin anybody's.

    Raises:
        NotFound: the principal is missing, or somebody else and the caller is no admin.
        Forbidden: the caller is a worker, or the key would have scopes, or live longer, than the caller's own.
        InvalidRequest: the principal's role does not go with the scopes.
        StateConflict: the principal is disabled.
    """
    if caller.role is Role.WORKER:
        raise Forbidden("A worker has one key, which it may rotate.")
    own = body.principal_id in (None, caller.principal_id)
    if not own and not caller.is_admin:
        raise NotFound("principal", str(body.principal_id))
    principal = await queries.get_principal(session, body.principal_id or caller.principal_id, lock=True)
    if principal.disabled_at is not None:
        raise StateConflict(f"Principal {principal.name!r} is disabled.")
    now = await clock(session)
    expires_at = None if body.expires_in_s is None else now + timedelta(seconds=body.expires_in_s)
    allowed = ROLE_SCOPES[principal.role]
    scopes = frozenset(body.scopes or (caller.scopes if own else allowed))
    if own:
        mine = await session.get_one(ApiKey, caller.key_id)
        expires_at = expires_at or mine.expires_at
        _stay_within(scopes, expires_at, caller=caller, mine=mine)
    if not scopes <= allowed:
        raise InvalidRequest(
            f"A key of a principal with role `{principal.role}` may have scopes {_listed(allowed)}; "
            f"{_listed(scopes - allowed)} is not among them."
        )
    key, issued = await add_key(
        session, principal_id=principal.id, label=body.label, scopes=scopes, expires_at=expires_at, now=now
    )
    await _note_key(session, key, at=now, actor=caller.name)
    return _shown(key, issued)


async def rotate_key(session: AsyncSession, key_id: str, body: RotateApiKey, *, caller: Caller) -> ApiKeyIssued:
    """Issue a successor with the same label and scopes; the old key ends after the overlap, or earlier if it was to.

    At most two keys of a rotation live: a predecessor of the old key ends at once. Rotated again because the answer
    was lost, the old key gets another successor, and the one that nobody ever used is revoked. The successor ends when
    the old key was to end; rotated by an admin, it lives for as long as the old key was made for.

    Raises:
        NotFound: there is no such key, or it is somebody else's and the caller is no admin.
        Forbidden: the key has scopes, or lives longer, than the one that asks.
        StateConflict: the key has ended, or its successor is in use already.
    """
    key = await queries.get_key(session, key_id, caller=caller)
    await queries.get_principal(session, key.principal_id, lock=True)
    await session.refresh(key)
    now = await clock(session)
    if not caller.is_admin:
        mine = await session.get_one(ApiKey, caller.key_id)
        _stay_within(frozenset(key.scopes), key.expires_at, caller=caller, mine=mine)
    if not _lives(key, now):
        raise StateConflict("This key has ended; only a live key can be rotated.")
    for successor in await session.scalars(select(ApiKey).where(ApiKey.replaces_id == key.id)):
        if _lives(successor, now):
            if successor.last_used_at is not None:
                raise StateConflict(f"This key was rotated already, and its successor {successor.id} is in use.")
            successor.revoked_at = now
    if key.replaces_id is not None:
        predecessor = await session.get_one(ApiKey, key.replaces_id)
        if _lives(predecessor, now):
            predecessor.expires_at = now
    expires_at = key.expires_at
    if expires_at is not None and caller.is_admin:
        expires_at = now + (expires_at - key.created_at)
    overlap_ends = now + timedelta(seconds=body.overlap_s)
    key.expires_at = overlap_ends if key.expires_at is None else min(key.expires_at, overlap_ends)
    next_key, issued = await add_key(
        session,
        principal_id=key.principal_id,
        label=key.label,
        scopes=key.scopes,
        expires_at=expires_at,
        now=now,
        replaces_id=key.id,
    )
    append(
        session,
        PLATFORM,
        EventKind.KEY_ROTATED,
        at=now,
        actor=caller.name,
        principal_id=str(key.principal_id),
        key_id=key.id,
        successor_id=next_key.id,
        key_ends_at=key.expires_at.isoformat(),
    )
    return _shown(next_key, issued)


async def revoke_key(session: AsyncSession, key_id: str, *, caller: Caller) -> ApiKey:
    """End a key at once; again, it changes nothing.

    Raises:
        NotFound: there is no such key, or it is somebody else's and the caller is no admin.
        Forbidden: the key has scopes that the one that asks has not.
    """
    key = await queries.get_key(session, key_id, caller=caller)
    await queries.get_principal(session, key.principal_id, lock=True)
    await session.refresh(key)
    if not caller.is_admin and not caller.scopes.issuperset(key.scopes):
        raise Forbidden(f"That key has scopes {_listed(key.scopes)}; revoke it with one that has them, or with itself.")
    if key.revoked_at is None:
        now = await clock(session)
        key.revoked_at = now
        append(
            session,
            PLATFORM,
            EventKind.KEY_REVOKED,
            at=now,
            actor=caller.name,
            principal_id=str(key.principal_id),
            key_id=key.id,
        )
    return key


async def create_first_admin(session: AsyncSession, *, name: str = "admin") -> Issued:
    """Make the first admin and a key to the whole platform, for whoever starts the service.

    Where admins are left but all their keys have ended, it is a new key for the oldest of them.

    Raises:
        StateConflict: somebody holds such a key already.
        NameTaken: somebody who is no admin, or a disabled one, has the name.
    """
    await _take_turns(session)
    if await queries.has_admin(session):
        raise StateConflict("Somebody holds a live key to the platform already: ask for one there.")
    now = await clock(session)
    oldest = select(Principal).where(Principal.role == Role.ADMIN, Principal.disabled_at.is_(None))
    principal = (await session.scalars(oldest.order_by(Principal.id).limit(1))).one_or_none()
    if principal is None:
        principal = await add_principal(
            session, name=name, display_name="Administrator", role=Role.ADMIN, organization_id=None, now=now
        )
        if principal is None:
            raise NameTaken("principal", name)
        await _note_principal(session, principal, at=now, actor=SERVICE)
    key, issued = await add_key(
        session,
        principal_id=principal.id,
        label="first key",
        scopes=ROLE_SCOPES[Role.ADMIN],
        expires_at=None,
        now=now,
    )
    await _note_key(session, key, at=now, actor=SERVICE)
    return issued


async def _take_turns(session: AsyncSession) -> None:
    await session.execute(select(func.pg_advisory_xact_lock(ADMINS_LOCK)))


def _lives(key: ApiKey, now: datetime) -> bool:
    return key.revoked_at is None and (key.expires_at is None or key.expires_at > now)


def _stay_within(scopes: frozenset[str], expires_at: datetime | None, *, caller: Caller, mine: ApiKey) -> None:
    """Refuse a key that would have more scopes than `mine`, the caller's own, or live longer."""
    if not scopes <= caller.scopes:
        raise Forbidden(
            f"Your key has scopes {_listed(caller.scopes)}; it cannot give {_listed(scopes - caller.scopes)}."
        )
    if mine.expires_at is not None and (expires_at is None or expires_at > mine.expires_at):
        raise Forbidden(f"Your key ends at {mine.expires_at.isoformat()}; it cannot give one that lives longer.")


def _listed(scopes: frozenset[str] | list[str]) -> str:
    return ", ".join(f"`{scope}`" for scope in sorted(map(str, scopes)))


def _shown(key: ApiKey, issued: Issued) -> ApiKeyIssued:
    return ApiKeyIssued(**ApiKeyView.model_validate(key).model_dump(), key=issued.shown)


async def _note_principal(session: AsyncSession, principal: Principal, *, at: datetime, actor: str) -> None:
    append(
        session,
        PLATFORM,
        EventKind.PRINCIPAL_CREATED,
        at=at,
        actor=actor,
        principal_id=str(principal.id),
        name=principal.name,
        role=principal.role.value,
        organization_id=None if principal.organization_id is None else str(principal.organization_id),
    )


async def _note_key(session: AsyncSession, key: ApiKey, *, at: datetime, actor: str) -> None:
    append(
        session,
        PLATFORM,
        EventKind.KEY_ISSUED,
        at=at,
        actor=actor,
        principal_id=str(key.principal_id),
        key_id=key.id,
        scopes=list(key.scopes),
        expires_at=None if key.expires_at is None else key.expires_at.isoformat(),
    )
