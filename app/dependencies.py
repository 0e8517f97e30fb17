"""What routers ask for: the transaction, the caller, the parts; and creations that may be repeated."""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from typing import Annotated, Any, Final, TypeVar, cast
from uuid import UUID

from fastapi import Depends, Header, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from procrastinate import App as Queue
from pydantic import BaseModel
from sqlalchemy import ColumnElement, Select, bindparam, func, select, true, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from app.blobs import BlobStore
from app.credentials import Signer, parse_key
from app.database import AdvisoryLocks, Sessions, clock
from app.errors import Forbidden, IdempotencyConflict, KeyExpired, KeyRevoked, SecretShownOnce, Unauthenticated
from app.meters import Meters
from app.models import ApiKey, IdempotencyKey, Organization, Principal, Worker
from app.settings import Settings
from app.wakeups import Wakeups
from isthmus.wire.base import Request as WireRequest
from isthmus.wire.base import digest_of
from isthmus.wire.organizations import Role, Scope
from isthmus.wire.version import IDEMPOTENCY_HEADER


@dataclass(frozen=True, slots=True)
class Parts:
    """What the service is put together from."""

    settings: Settings
    sessions: Sessions
    single_statements: Sessions
    locks: AdvisoryLocks
    blobs: BlobStore
    signer: Signer
    wakeups: Wakeups
    queue: Queue
    meters: Meters


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and what this key may be used for."""

    principal_id: UUID
    name: str
    role: Role
    organization_id: UUID | None
    organization: str | None
    worker_id: UUID | None
    key_id: str
    scopes: frozenset[Scope]

    @property
    def is_admin(self) -> bool:
        """Whether the whole platform is open to this key."""
        return self.role is Role.ADMIN and Scope.PLATFORM in self.scopes


async def _parts(request: Request) -> Parts:  # async, as all here: FastAPI runs any other in a thread, every time
    return cast(Parts, request.app.state.parts)


PartsOf = Annotated[Parts, Depends(_parts)]


async def _transaction(parts: PartsOf) -> AsyncIterator[AsyncSession]:
    """One transaction per request: committed if the endpoint returns, rolled back if it raises."""
    async with parts.sessions.begin() as session:
        yield session


Transaction = Annotated[AsyncSession, Depends(_transaction, scope="function")]

_bearer = HTTPBearer(auto_error=False, description="An API key of this service: `isk_<id>_<secret>`.")
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]

NOTED_EVERY = timedelta(seconds=60)
"""How often it is noted that a key is in use, and that its worker was heard of."""


_NO_QUESTION: Final = true()


@cache
def _holder_and(question: ColumnElement[bool]) -> Select[*tuple[Any, ...]]:
    """A key with all that decides about it, and the answer to a question; building it costs more than running it."""
    return (
        select(
            ApiKey.secret_hash,
            ApiKey.scopes,
            ApiKey.revoked_at,
            ApiKey.expires_at,
            ApiKey.last_used_at,
            Principal.id,
            Principal.name,
            Principal.role,
            Principal.organization_id,
            Principal.disabled_at,
            Organization.name,
            Worker.id,
            Worker.revoked_at,
            func.clock_timestamp(),
            question,
        )
        .join(Principal, Principal.id == ApiKey.principal_id)
        .outerjoin(Organization, Organization.id == Principal.organization_id)
        .outerjoin(Worker, Worker.principal_id == Principal.id)
        .where(ApiKey.id == bindparam("key_id"))
    )


async def authenticate(session: AsyncSession, credentials: HTTPAuthorizationCredentials | None) -> Caller:
    """Who holds the presented key. One statement, and a second one a minute to note that the key was used.

    Raises:
        Unauthenticated: there is no key, or none that was issued here.
        KeyExpired, KeyRevoked: it was good once.
    """
    caller, _ = await authenticate_asking(session, credentials, _NO_QUESTION)
    return caller


async def authenticate_asking(
    session: AsyncSession, credentials: HTTPAuthorizationCredentials | None, question: ColumnElement[bool]
) -> tuple[Caller, bool]:
    """As `authenticate`; and the answer to a question about the caller's rows, from the same statement.

    Nobody but the caller learns it: a key that is refused is refused before anything else.
    """
    presented = None if credentials is None else parse_key(credentials.credentials)
    if presented is None:
        raise Unauthenticated
    found = await session.execute(_holder_and(question), {"key_id": presented.id})
    row = found.one_or_none()
    if row is None or not presented.matches(row[0]):
        raise Unauthenticated
    (
        _,
        scopes,
        revoked_at,
        expires_at,
        last_used_at,
        principal_id,
        name,
        role,
        organization_id,
        disabled_at,
        organization,
        worker_id,
        worker_revoked_at,
        now,
        answer,
    ) = row
    if revoked_at is not None or disabled_at is not None or worker_revoked_at is not None:
        raise KeyRevoked
    if expires_at is not None and expires_at <= now:
        raise KeyExpired
    if last_used_at is None or now - last_used_at >= NOTED_EVERY:
        await _note_use(session, presented.id, worker_id, now)
    caller = Caller(
        principal_id=principal_id,
        name=name,
        role=role,
        organization_id=organization_id,
        organization=organization,
        worker_id=worker_id,
        key_id=presented.id,
        scopes=frozenset(map(Scope, scopes)),
    )
    return caller, bool(answer)


async def _note_use(session: AsyncSession, key_id: str, worker_id: UUID | None, now: datetime) -> None:
    """The key was used and its worker was heard of: one statement, since a fleet that waits does this all day."""
    used = update(ApiKey).where(ApiKey.id == key_id).values(last_used_at=now)
    if worker_id is None:
        await session.execute(used)
        return
    heard = update(Worker).where(Worker.id == worker_id).values(last_seen_at=now)
    await session.execute(heard.add_cte(used.cte("used")))


def check_scope(caller: Caller, *scopes: Scope) -> Caller:
    """The caller, if its key has one of `scopes`.

    Raises:
        Forbidden: it has none of them; the message says which would do.
    """
    if not caller.scopes.intersection(scopes):
        wanted = " or ".join(f"`{scope}`" for scope in scopes)
        raise Forbidden(
            f"This needs a key with scope {wanted}; yours has {', '.join(sorted(caller.scopes)) or 'none'}."
        )
    return caller


async def _caller(session: Transaction, credentials: Credentials) -> Caller:
    return await authenticate(session, credentials)


AnyCaller = Annotated[Caller, Depends(_caller, scope="function")]


def _holder_of(*scopes: Scope) -> Callable[[Caller], Awaitable[Caller]]:
    async def holder(caller: AnyCaller) -> Caller:
        return check_scope(caller, *scopes)

    return holder


Admin = Annotated[Caller, Depends(_holder_of(Scope.PLATFORM))]
JobReader = Annotated[Caller, Depends(_holder_of(Scope.JOBS_READ))]
JobWriter = Annotated[Caller, Depends(_holder_of(Scope.JOBS_WRITE))]
DatasetReader = Annotated[Caller, Depends(_holder_of(Scope.DATASETS_READ))]
DatasetWriter = Annotated[Caller, Depends(_holder_of(Scope.DATASETS_WRITE))]
GrantWriter = Annotated[Caller, Depends(_holder_of(Scope.GRANTS_WRITE))]
Agent = Annotated[Caller, Depends(_holder_of(Scope.TASKS))]


async def _brief_caller(parts: PartsOf, credentials: Credentials) -> Caller:
    """The caller of a request that waits or streams: authenticated in a transaction that ends at once."""
    async with parts.sessions.begin() as session:
        return await authenticate(session, credentials)


BriefCaller = Annotated[Caller, Depends(_brief_caller)]


def _brief_holder_of(*scopes: Scope) -> Callable[[Caller], Awaitable[Caller]]:
    async def holder(caller: BriefCaller) -> Caller:
        return check_scope(caller, *scopes)

    return holder


BriefJobReader = Annotated[Caller, Depends(_brief_holder_of(Scope.JOBS_READ))]
BriefJobWriter = Annotated[Caller, Depends(_brief_holder_of(Scope.JOBS_WRITE))]
BriefGrantWriter = Annotated[Caller, Depends(_brief_holder_of(Scope.GRANTS_WRITE))]

View = TypeVar("View", bound=BaseModel)


class Once:
    """Runs a creation once for its `Idempotency-Key`: repeated with the same body it gives the same answer."""

    def __init__(
        self,
        request: Request,
        session: Transaction,
        caller: AnyCaller,
        key: Annotated[
            str | None,
            Header(
                alias=IDEMPOTENCY_HEADER,
                min_length=1,
                max_length=255,
                description="Repeat the call with the same key and body to get the same answer; kept for 24 hours.",
            ),
        ] = None,
    ) -> None:
        self._route = f"{request.method} {request.url.path}"
        self._session = session
        self._caller = caller
        self._key = key

    async def __call__(
        self, view: type[View], body: WireRequest, act: Callable[[], Awaitable[View]], *, secret: bool = False
    ) -> View:
        """The answer of `act`, or of the call before with the same key. An answer with a `secret` is not kept.

        Raises:
            IdempotencyConflict: the key was used with another body.
            SecretShownOnce: it was done before, and its secret was shown then.
        """
        if self._key is None:
            return await act()
        now = await clock(self._session)
        mine = IdempotencyKey.principal_id == self._caller.principal_id
        same = (mine, IdempotencyKey.route == self._route, IdempotencyKey.key == self._key)
        digest = digest_of(body)
        taken = await self._session.execute(
            insert(IdempotencyKey)
            .values(
                principal_id=self._caller.principal_id,
                route=self._route,
                key=self._key,
                body_digest=digest,
                answer=None,
                created_at=now,
            )
            .on_conflict_do_nothing()
            .returning(IdempotencyKey.key)
        )
        if taken.scalar_one_or_none() is None:  # waits for a call that is under way, by the unique index
            before = (await self._session.scalars(select(IdempotencyKey).where(*same))).one()
            if before.body_digest != digest:
                raise IdempotencyConflict
            if before.answer is None:
                raise SecretShownOnce
            return view.model_validate(before.answer)
        answer = await act()
        if not secret:
            kept = answer.model_dump(mode="json")
            await self._session.execute(update(IdempotencyKey).where(*same).values(answer=kept))
        return answer


Repeatable = Annotated[Once, Depends(Once, scope="function")]
