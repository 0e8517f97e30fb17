"""A steward's approval of a participation."""

from datetime import datetime
from uuid import UUID

from sqlalchemy import CheckConstraint, ForeignKey, Index, text
from sqlalchemy.orm import Mapped, mapped_column

from app.models.base import Base, uuid7


class Grant(Base):
    """For what, until when and for how many rounds. Ended by withdrawal, expiry or use; never deleted."""

    __tablename__ = "grants"
    __table_args__ = (
        CheckConstraint("rounds_used >= 0 AND rounds_used <= rounds", name="not_overused"),
        Index("ix_grants_expires_at_live", "expires_at", postgresql_where=text("ended_at IS NULL")),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid7)
    participation_id: Mapped[UUID] = mapped_column(ForeignKey("participations.id"), unique=True)
    purpose: Mapped[str]
    expires_at: Mapped[datetime]
    rounds: Mapped[int]
    rounds_used: Mapped[int] = mapped_column(default=0)
    granted_by: Mapped[UUID] = mapped_column(ForeignKey("principals.id"))
    granted_at: Mapped[datetime]
    by_rule: Mapped[bool]
    ended_at: Mapped[datetime | None]
