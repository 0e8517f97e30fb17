"""What happened, as a hash chain that anyone can check."""

import hashlib
from collections.abc import Iterable
from datetime import datetime
from enum import StrEnum
from typing import Any, Final
from uuid import UUID

from pydantic import Field

from isthmus.wire.base import Response, canonical_json

GENESIS: Final = "0" * 64


class EventKind(StrEnum):
    """Past participles of what can happen. Claims and heartbeats are not events."""

    ORGANIZATION_CREATED = "organization-created"
    PRINCIPAL_CREATED = "principal-created"
    PRINCIPAL_DISABLED = "principal-disabled"
    KEY_ISSUED = "key-issued"
    KEY_ROTATED = "key-rotated"
    KEY_REVOKED = "key-revoked"
    ENROLLMENT_TOKEN_ISSUED = "enrollment-token-issued"  # noqa: S105 -- an event's name
    WORKER_ENROLLED = "worker-enrolled"
    WORKER_REVOKED = "worker-revoked"
    DATASET_ANNOUNCED = "dataset-announced"
    DATASET_CONFIRMED = "dataset-confirmed"
    DATASET_RETIRED = "dataset-retired"
    DATASET_POLICY_SET = "dataset-policy-set"
    DATASET_BUDGET_SET = "dataset-budget-set"
    DATASET_MOVED = "dataset-moved"  # handed on by its worker to another
    JOB_CREATED = "job-created"
    MODEL_UPLOADED = "model-uploaded"
    JOB_STARTED = "job-started"
    JOB_RUNNING = "job-running"
    JOB_PAUSED = "job-paused"
    JOB_RESUMED = "job-resumed"
    JOB_COMPLETED = "job-completed"
    JOB_FAILED = "job-failed"
    JOB_CANCELLED = "job-cancelled"
    PARTICIPATION_REQUESTED = "participation-requested"
    PARTICIPATION_APPROVED = "participation-approved"
    PARTICIPATION_REJECTED = "participation-rejected"
    PARTICIPATION_WITHDRAWN = "participation-withdrawn"
    PARTICIPATION_EXPIRED = "participation-expired"
    PARTICIPATION_EXHAUSTED = "participation-exhausted"
    ROUND_OPENED = "round-opened"
    ROUND_REOPENED = "round-reopened"
    UPDATE_ACCEPTED = "update-accepted"
    UPDATE_EXCLUDED = "update-excluded"
    TASK_REFUSED = "task-refused"
    TASK_FAILED = "task-failed"
    LEASE_LOST = "lease-lost"
    ROUND_FROZEN = "round-frozen"
    KEYS_CLOSED = "keys-closed"  # secured rounds: who sent keys, and who did not
    SHARES_CLOSED = "shares-closed"
    SURVIVORS_SIGNED = "survivors-signed"  # enough signed one set: unmasking is open
    UNMASKED = "unmasked"  # enough shares are in
    SHARES_WRONG = "shares-wrong"  # they do not open what they should: more are waited for
    ATTEMPT_ABORTED = "attempt-aborted"  # nothing was learned; a new attempt has new keys
    ROUND_COMPLETED = "round-completed"
    ROUND_FAILED = "round-failed"
    ROUND_CANCELLED = "round-cancelled"


class EventView(Response):
    """One link of a chain."""

    id: UUID
    stream: str
    """`job:<id>`, `organization:<id>` or `platform`."""
    sequence: int
    kind: EventKind | str = Field(union_mode="left_to_right")
    """One of `EventKind`, or a newer service's that this version has no name for."""
    at: datetime
    actor: str
    """Name of the principal, or `service`."""
    data: dict[str, Any]
    previous_hash: str
    hash: str


def event_hash(
    *, stream: str, sequence: int, kind: str, at: datetime, actor: str, data: dict[str, Any], previous_hash: str
) -> str:
    """SHA-256 over the canonical JSON of an event and its predecessor's hash."""
    return hashlib.sha256(
        canonical_json(
            {
                "stream": stream,
                "sequence": sequence,
                "kind": kind,
                "at": at.isoformat(),
                "actor": actor,
                "data": data,
                "previous_hash": previous_hash,
            }
        )
    ).hexdigest()


def verify_chain(events: Iterable[EventView], *, previous_hash: str = GENESIS, sequence: int = 0) -> str:
    """Check that `events` continue a chain after (`sequence`, `previous_hash`); the hash of the last one.

    Raises:
        ValueError: an event is missing, out of order or changed; the message says which.
    """
    for event in events:
        sequence += 1
        if event.sequence != sequence:
            raise ValueError(f"{event.stream}: event {sequence} is missing")
        if event.previous_hash != previous_hash:
            raise ValueError(f"{event.stream}: event {sequence} does not continue its predecessor")
        expected = event_hash(
            stream=event.stream,
            sequence=event.sequence,
            kind=str(event.kind),
            at=event.at,
            actor=event.actor,
            data=event.data,
            previous_hash=event.previous_hash,
        )
        if event.hash != expected:
            raise ValueError(f"{event.stream}: event {sequence} was changed")
        previous_hash = event.hash
    return previous_hash
