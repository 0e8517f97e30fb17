"""What was promised and released of a dataset."""

from datetime import datetime
from uuid import UUID

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, UniqueConstraint
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Mapped, mapped_column

from app.models.base import Base, uuid7
from isthmus.wire.ledger import LedgerKind


class LedgerEntry(Base):
    """A grant's reservation, one release (written before it can be seen), or what of a reservation was given back.

    Append-only. A trigger numbers it, moves the sums of its ledger and of its participation, writes the time and both
    epsilons, and chains it to the entry before: `isthmus.privacy.chain` verifies that.
    """

    __tablename__ = "ledger_entries"
    __table_args__ = (
        UniqueConstraint("participation_id", "round_number", "release", name="uq_ledger_entries_charge_key"),
        UniqueConstraint("ledger_id", "sequence"),
        CheckConstraint(
            "(kind = 'spend') = (round_number IS NOT NULL AND release IS NOT NULL AND digest IS NOT NULL)",
            name="spends_name_their_release",
        ),
        CheckConstraint("isthmus_not_negative(rdp_nano, draws)", name="cost_not_negative"),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid7)
    ledger_id: Mapped[UUID] = mapped_column(ForeignKey("ledgers.id"))
    lineage: Mapped[str]
    dataset_id: Mapped[UUID] = mapped_column(ForeignKey("datasets.id"))
    sequence: Mapped[int]
    kind: Mapped[LedgerKind]
    job_id: Mapped[UUID] = mapped_column(ForeignKey("jobs.id"), index=True)
    participation_id: Mapped[UUID] = mapped_column(ForeignKey("participations.id"))
    round_number: Mapped[int | None]
    release: Mapped[str | None]
    mode: Mapped[str]
    event: Mapped[str | None]  # canonical JSON, letter by letter as it is hashed
    orders_version: Mapped[str]
    rdp_nano: Mapped[list[int]] = mapped_column(ARRAY(BigInteger))
    draws: Mapped[int] = mapped_column(BigInteger)
    elements: Mapped[int] = mapped_column(BigInteger)
    digest: Mapped[str | None]
    reserved_epsilon: Mapped[float]
    spent_epsilon: Mapped[float]
    created_at: Mapped[datetime]
    previous_hash: Mapped[str]
    hash: Mapped[str]
