"""Workers enrol with a one-time token, and are revoked."""

from datetime import datetime
from uuid import UUID

from sqlalchemy import update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit.service import append, organization_stream
from app.credentials import hash_token
from app.database import clock
from app.dependencies import Caller
from app.errors import EnrollmentRefused, NameTaken, StateConflict
from app.models import EnrollmentToken, Principal, Worker
from app.organizations.queries import get_organization
from app.organizations.service import add_key, add_principal, end_keys
from app.workers import queries
from isthmus.wire.events import EventKind
from isthmus.wire.organizations import Role, Scope
from isthmus.wire.workers import EnrollWorker, WorkerEnrolled, WorkerView


def principal_name(organization: str, worker: str) -> str:
    """How a worker is called as a principal. No name that people choose holds ':' or '/', so none can equal it."""
    return f"worker:{organization}/{worker}"


async def enroll_worker(session: AsyncSession, body: EnrollWorker, *, service_public_key: str) -> WorkerEnrolled:
    """Turn a token into a worker with a key of its own. Of two that present one token, one wins.

    A refusal of any kind leaves the token as it was, since the transaction is rolled back.

    Raises:
        EnrollmentRefused: the token is unknown, used or expired.
        NameTaken: the organization has, or had, a worker of this name.
        StateConflict: the public key was enrolled before.
    """
    now = await clock(session)
    token_id, organization_id = await _use_token(session, body.token, now=now)
    organization = await get_organization(session, organization_id)
    principal = await add_principal(
        session,
        name=principal_name(organization.name, body.name),
        display_name=body.name,
        role=Role.WORKER,
        organization_id=organization.id,
        now=now,
    )
    if principal is None:
        raise NameTaken("worker", body.name)
    enrolled = await session.scalars(
        insert(Worker)
        .values(
            organization_id=organization.id,
            principal_id=principal.id,
            name=body.name,
            public_key=body.public_key,
            version=body.version,
            enrolled_at=now,
        )
        .on_conflict_do_nothing(index_elements=[Worker.public_key])
        .returning(Worker)
    )
    worker = enrolled.one_or_none()
    if worker is None:
        raise StateConflict("This public key was enrolled before. Make a fresh key pair for every worker.")
    key, issued = await add_key(
        session, principal_id=principal.id, label="enrolment", scopes=[Scope.TASKS], expires_at=None, now=now
    )
    append(
        session,
        organization_stream(organization.id),
        EventKind.WORKER_ENROLLED,
        at=now,
        actor=principal.name,
        worker_id=str(worker.id),
        name=worker.name,
        public_key=worker.public_key,
        token_id=str(token_id),
        key_id=key.id,
    )
    return WorkerEnrolled(
        worker=queries.view_of(worker, organization.name),
        api_key=issued.shown,
        service_public_key=service_public_key,
    )


async def _use_token(session: AsyncSession, token: str, *, now: datetime) -> tuple[UUID, UUID]:
    """Mark the token used, in one statement that only one transaction can win; its id and its organization's."""
    digest = hash_token(token)
    if digest is None:
        raise EnrollmentRefused
    used = await session.execute(
        update(EnrollmentToken)
        .where(
            EnrollmentToken.token_hash == digest,
            EnrollmentToken.used_at.is_(None),
            EnrollmentToken.expires_at > now,
        )
        .values(used_at=now)
        .returning(EnrollmentToken.id, EnrollmentToken.organization_id)
    )
    row = used.one_or_none()
    if row is None:
        raise EnrollmentRefused
    return row[0], row[1]


async def revoke_worker(session: AsyncSession, worker_id: UUID, *, caller: Caller) -> WorkerView:
    """End a worker, its principal and its keys, for good; again, it changes nothing.

    Its open tasks are taken away by the coordinator's next sweep. Another worker of the organization may announce its
    datasets from now on.

    Raises:
        NotFound: there is no such worker, or it is another organization's.
    """
    worker, organization = await queries.get_worker(session, worker_id, caller=caller, lock=True)
    if worker.revoked_at is None:
        now = await clock(session)
        worker.revoked_at = now
        await session.execute(
            update(Principal)
            .where(Principal.id == worker.principal_id, Principal.disabled_at.is_(None))
            .values(disabled_at=now)
        )
        await end_keys(session, worker.principal_id, now=now)
        append(
            session,
            organization_stream(worker.organization_id),
            EventKind.WORKER_REVOKED,
            at=now,
            actor=caller.name,
            worker_id=str(worker.id),
            name=worker.name,
        )
    return queries.view_of(worker, organization)
