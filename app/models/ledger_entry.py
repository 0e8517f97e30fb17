"""What was released of a dataset."""

from datetime import datetime
from uuid import UUID

from sqlalchemy import BigInteger, ForeignKey, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from app.models.base import Base, uuid7
from isthmus.wire.ledger import LedgerKind


class LedgerEntry(Base):
    """One release of a dataset, written before a byte of it was read. Append-only; a trigger refuses changes."""

    __tablename__ = "ledger_entries"
    __table_args__ = (
        UniqueConstraint("participation_id", "round_number", "release", name="uq_ledger_entries_charge_key"),
        UniqueConstraint("dataset_id", "sequence"),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid7)
    dataset_id: Mapped[UUID] = mapped_column(ForeignKey("datasets.id"))
    sequence: Mapped[int]
    kind: Mapped[LedgerKind]
    job_id: Mapped[UUID] = mapped_column(ForeignKey("jobs.id"), index=True)
    participation_id: Mapped[UUID] = mapped_column(ForeignKey("participations.id"))
    round_number: Mapped[int]
    release: Mapped[str]
    clip_norm: Mapped[float | None]
    noise_multiplier: Mapped[float]
    elements: Mapped[int] = mapped_column(BigInteger)
    digest: Mapped[str]
    created_at: Mapped[datetime]
