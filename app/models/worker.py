"""Agents at organizations."""

from datetime import datetime
from uuid import UUID

from sqlalchemy import ForeignKey, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from app.models.base import Base, uuid7


class Worker(Base):
    """An agent that enrolled with a one-time token. A revoked one gets no more work; its name stays taken."""

    __tablename__ = "workers"
    __table_args__ = (UniqueConstraint("organization_id", "name"),)

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid7)
    organization_id: Mapped[UUID] = mapped_column(ForeignKey("organizations.id"))
    principal_id: Mapped[UUID] = mapped_column(ForeignKey("principals.id"), unique=True)
    name: Mapped[str]
    public_key: Mapped[str] = mapped_column(unique=True)
    version: Mapped[str]
    enrolled_at: Mapped[datetime]
    last_seen_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
