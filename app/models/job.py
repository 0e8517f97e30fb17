"""Federated training jobs."""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from app.models.base import Base, uuid7
from isthmus.wire.jobs import JobReason, JobState


class Job(Base):
    """What a researcher asked for and where it stands. Its row is the first lock of every change to its rounds."""

    __tablename__ = "jobs"
    __table_args__ = (Index("ix_jobs_owner_id_id", "owner_id", "id"), Index("ix_jobs_state", "state"))

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid7)
    name: Mapped[str]
    owner_id: Mapped[UUID] = mapped_column(ForeignKey("principals.id"))
    state: Mapped[JobState] = mapped_column(default=JobState.DRAFT)
    reason: Mapped[JobReason | None]
    detail: Mapped[str | None]
    spec: Mapped[dict[str, Any]]
    spec_digest: Mapped[str]
    manifest: Mapped[dict[str, Any] | None]
    model_digest: Mapped[str | None]
    rounds_completed: Mapped[int] = mapped_column(default=0)
    statistics: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime]
    paused_at: Mapped[datetime | None]  # the rounds' deadlines stand still meanwhile
    started_at: Mapped[datetime | None]
    ended_at: Mapped[datetime | None]
