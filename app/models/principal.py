"""Whoever holds API keys."""

from datetime import datetime
from uuid import UUID

from sqlalchemy import CheckConstraint, ForeignKey
from sqlalchemy.orm import Mapped, mapped_column

from app.models.base import Base, uuid7
from isthmus.wire.organizations import Role


class Principal(Base):
    """A platform admin, a researcher, an organization's steward, or a worker."""

    __tablename__ = "principals"
    __table_args__ = (
        CheckConstraint(
            "(role IN ('steward', 'worker')) = (organization_id IS NOT NULL)", name="role_and_organization_agree"
        ),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid7)
    name: Mapped[str] = mapped_column(unique=True)
    display_name: Mapped[str]
    role: Mapped[Role]
    organization_id: Mapped[UUID | None] = mapped_column(ForeignKey("organizations.id"), index=True)
    created_at: Mapped[datetime]
    disabled_at: Mapped[datetime | None]
