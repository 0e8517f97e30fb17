"""Organizations, principals, API keys and enrolment tokens."""

from datetime import datetime
from enum import StrEnum
from types import MappingProxyType
from typing import Final
from uuid import UUID

from pydantic import Field, model_validator

from isthmus.wire.base import Label, Name, Request, Response


class Role(StrEnum):
    """What a principal is; it decides which scopes its keys may have."""

    ADMIN = "admin"
    RESEARCHER = "researcher"
    STEWARD = "steward"
    WORKER = "worker"


class Scope(StrEnum):
    """What one API key may be used for."""

    PLATFORM = "platform"  # organizations, principals, anybody's keys, all events
    JOBS_READ = "jobs:read"
    JOBS_WRITE = "jobs:write"
    DATASETS_READ = "datasets:read"  # workers, datasets, participations, ledgers of the organization
    DATASETS_WRITE = "datasets:write"  # enrol and revoke workers, confirm datasets, set policies
    GRANTS_WRITE = "grants:write"  # approve, reject, withdraw
    TASKS = "tasks"  # announce datasets, claim tasks, hand in updates


ROLE_SCOPES: Final = MappingProxyType(
    {
        Role.ADMIN: frozenset({Scope.PLATFORM, Scope.JOBS_READ, Scope.DATASETS_READ}),
        Role.RESEARCHER: frozenset({Scope.JOBS_READ, Scope.JOBS_WRITE, Scope.DATASETS_READ}),
        Role.STEWARD: frozenset({Scope.JOBS_READ, Scope.DATASETS_READ, Scope.DATASETS_WRITE, Scope.GRANTS_WRITE}),
        Role.WORKER: frozenset({Scope.TASKS}),
    }
)


class CreateOrganization(Request):
    """A data holder joins the platform."""

    name: Name
    display_name: Label


class OrganizationView(Response):
    """A data holder."""

    id: UUID
    name: str
    display_name: str
    created_at: datetime


class CreateEnrollmentToken(Request):
    """Ask for a token with which one worker may enrol, once, soon."""

    expires_in_s: int = Field(default=3600, ge=60, le=7 * 86400)


class EnrollmentTokenIssued(Response):
    """The token itself: shown once, usable once."""

    id: UUID
    organization_id: UUID
    organization: str
    token: str
    expires_at: datetime


class CreatePrincipal(Request):
    """Somebody who will hold API keys. Stewards belong to an organization; workers come by enrolment only."""

    name: Name
    display_name: Label
    role: Role
    organization_id: UUID | None = None

    @model_validator(mode="after")
    def _role_and_organization_agree(self) -> "CreatePrincipal":
        if self.role is Role.WORKER:
            raise ValueError("workers are not created here: they enrol with a one-time token")
        if (self.role is Role.STEWARD) != (self.organization_id is not None):
            raise ValueError("a steward belongs to an organization; admins and researchers to none")
        return self


class PrincipalView(Response):
    """Whoever holds API keys."""

    id: UUID
    name: str
    display_name: str
    role: Role
    organization_id: UUID | None
    created_at: datetime
    disabled_at: datetime | None


class CreateApiKey(Request):
    """A key for a principal. Without `principal_id` it is one more key of the caller, no wider than the calling one.

    No scopes: all that the role allows, or that the calling key has. No expiry: none, or that of the calling key.
    """

    principal_id: UUID | None = None
    label: Label = "key"
    scopes: tuple[Scope, ...] | None = Field(default=None, min_length=1)
    expires_in_s: int | None = Field(default=None, ge=60, le=5 * 366 * 86400)


class RotateApiKey(Request):
    """Issue a successor; the old key stays alive for `overlap_s`, so that nothing stops while it is replaced."""

    overlap_s: int = Field(default=86400, ge=0, le=30 * 86400)


class ApiKeyView(Response):
    """A key without its secret."""

    id: str
    principal_id: UUID
    label: str
    scopes: list[Scope]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None


class ApiKeyIssued(ApiKeyView):
    """A new key with its secret: the only time that it is shown."""

    key: str


class Me(Response):
    """Who the service takes the caller for."""

    principal: PrincipalView
    organization: OrganizationView | None
    key_id: str
    scopes: list[Scope]
    worker_id: UUID | None
