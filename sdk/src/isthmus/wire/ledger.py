"""The ledger of a dataset: one entry for everything of it that was released."""

from datetime import datetime
from enum import StrEnum
from uuid import UUID

from isthmus.wire.base import Response


class LedgerKind(StrEnum):
    """What an entry says. Reservations and refunds come with the accountant."""

    SPEND = "spend"


class LedgerEntryView(Response):
    """One release. It records what was done to the update; no epsilon is claimed for it."""

    id: UUID
    sequence: int
    kind: LedgerKind
    dataset_id: UUID
    job_id: UUID
    participation_id: UUID
    round_number: int
    release: str
    """What was released: `train`, `statistics` or `evaluate`."""
    clip_norm: float | None
    noise_multiplier: float
    elements: int
    digest: str
    """The released bytes."""
    created_at: datetime
