"""Workers and how they enrol."""

from datetime import datetime
from typing import Annotated
from uuid import UUID

from pydantic import StringConstraints

from isthmus.wire.base import Label, Name, Request, Response

PublicKey = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
"""An Ed25519 public key, 32 bytes in hexadecimal."""


class EnrollWorker(Request):
    """A worker introduces itself with its organization's one-time token and its own public key."""

    token: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    name: Name
    public_key: PublicKey
    version: Label = "unknown"


class WorkerView(Response):
    """An agent at an organization."""

    id: UUID
    organization_id: UUID
    organization: str
    name: str
    public_key: str
    version: str
    enrolled_at: datetime
    last_seen_at: datetime | None
    revoked_at: datetime | None


class WorkerEnrolled(Response):
    """What a worker needs from now on. The key is shown once; the service's public key is to be pinned."""

    worker: WorkerView
    api_key: str
    service_public_key: str


class ServiceIdentity(Response):
    """Who signs receipts here, and which contract is spoken."""

    service_public_key: str
    contract_version: str
    version: str
